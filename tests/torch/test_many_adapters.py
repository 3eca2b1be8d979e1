"""Adapters that differ in rank, seed, sparsity and targets side by side, on plain and on quantized models."""

import itertools

import numpy as np
import pytest
import torch
from crossing import cross

from interop import RandLoraConfig
from randlora_torch import RandLoraLayer, extract, get_peft_model, load_adapter
from tests.torch.conftest import (
    TOKENS,
    assert_close,
    assert_same,
    delta_by_oracle,
    layers_of,
    load_llama,
    output,
    randomize,
    relative_error,
)

bitsandbytes = pytest.importorskip("bitsandbytes")

BASES = ["plain", "nf4-double", "int8"]
every_base = pytest.mark.parametrize("base", BASES)
ADAPTERS = {
    "dense": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "sparse": {"r": 8, "target_modules": ["q_proj", "down_proj"], "sparse": True, "projection_prng_key": 7},
    "very_sparse": {"r": 16, "target_modules": "all-linear", "very_sparse": True, "projection_prng_key": 2**40 + 3},
}


def config(name, **fields):
    return RandLoraConfig(**{**ADAPTERS[name], "randlora_alpha": ADAPTERS[name]["r"], **fields})


def add(model, name, seed=0, **fields):
    """Add the adapter of this name to a plain or adapted model, make it active, with random values."""
    return randomize(get_peft_model(model, config(name, **fields), name), name, seed, scale=1 / 15)


def company(folder, base, names=tuple(ADAPTERS), **fields):
    model = load_llama(folder, base)
    for seed, name in enumerate(names):
        add(model, name, seed, **fields)
    return model.eval()


def alone(folder, base, path, name):
    return load_adapter(load_llama(folder, base), path, name).eval()


@every_base
@pytest.mark.parametrize("save_projection", [True, False])
def test_three_adapters_are_in_company_what_each_of_them_is_alone(llama_folder, tmp_path, base, save_projection):
    model = company(llama_folder, base, save_projection=save_projection)
    want = {}
    for name in ADAPTERS:
        model.set_adapter(name)
        want[name] = output(model)
    model.save_pretrained(tmp_path)
    for name, other in itertools.permutations(ADAPTERS, 2):
        assert relative_error(want[name], want[other]) > 0.02
        model.set_adapter(other)
        model.set_adapter(name)
        assert_same(output(model), want[name])
    for seed, name in enumerate(ADAPTERS):
        assert_same(output(add(load_llama(llama_folder, base).eval(), name, seed)), want[name])
        assert_same(output(alone(llama_folder, base, tmp_path / name, name)), want[name])


@cross(order={", ".join(order): order for order in itertools.permutations(ADAPTERS)}, base=BASES)
def test_the_order_of_loading_changes_no_adapter(llama_folder, tmp_path, base, order):
    source = company(llama_folder, base)
    source.save_pretrained(tmp_path)
    model = load_llama(llama_folder, base).eval()
    for name in order:
        load_adapter(model, tmp_path / name, name)
    assert model.active_adapters == [order[0]]
    for name in ADAPTERS:
        source.set_adapter(name)
        model.set_adapter(name)
        assert_same(output(model), output(source))


@every_base
def test_a_layer_that_an_adapter_does_not_target_is_the_base_layer_under_it(llama_folder, base):
    model, plain = company(llama_folder, base), company(llama_folder, base, names=())
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    model.set_adapter("sparse")
    block, base_block = model.model.layers[0], plain.model.layers[0]
    for part in ("self_attn.v_proj", "mlp.up_proj"):
        layer, base_layer = block.get_submodule(part), base_block.get_submodule(part)
        assert_same(layer.train()(x).detach(), base_layer.train()(x))
    with model.disable_adapter():
        assert_same(output(model.train()), output(plain.train()))


def updates(model, names):
    """By layer, the sum of the updates of these adapters, by the oracle."""
    total = {}
    for name in names:
        for path, layer in layers_of(model, name):
            total[path] = total.get(path, 0) + delta_by_oracle(layer, name)
    return total


@every_base
@pytest.mark.parametrize("names", [["dense", "very_sparse"], list(ADAPTERS)], ids="-".join)
def test_several_active_adapters_equal_the_sum_of_their_updates(llama_folder, base, names):
    model = company(llama_folder, base).train()
    model.set_adapter(names)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    total = updates(model, names)
    for path, layer in layers_of(model, "very_sparse"):
        rows = x[:, : layer.in_features]
        want = layer.base_layer(rows).numpy() + rows.numpy() @ total[path].T
        assert relative_error(layer(rows), torch.from_numpy(want)) < 1e-5
    want = output(model)
    model.set_adapter(names[::-1])  # rounds sums otherwise
    assert_close(output(model), want)
    model.merge_adapter()
    for _, layer in layers_of(model, "very_sparse"):
        assert layer.merged_adapters == [name for name in names[::-1] if name in layer.randlora_lambda]
    assert relative_error(output(model), want) < (1e-5 if base == "plain" else 0.3)
    model.unmerge_adapter()
    assert_close(output(model), want)


def test_on_a_plain_model_merging_several_adapters_adds_the_sum_of_their_updates(llama_folder):
    model, plain = company(llama_folder, "plain"), company(llama_folder, "plain", names=())
    model.set_adapter(list(ADAPTERS))
    want = output(model)
    merged = model.merge_and_unload()
    for path, update in updates(company(llama_folder, "plain"), ADAPTERS).items():
        exact = plain.get_submodule(path).weight.detach().numpy() + update
        np.testing.assert_allclose(merged.get_submodule(path).weight.detach(), exact, rtol=1e-5, atol=1e-5)
    assert_close(output(merged), want)


@every_base
def test_deleting_one_adapter_leaves_the_others_as_they_were(llama_folder, base):
    model = company(llama_folder, base)
    want = {}
    for name in ADAPTERS:
        model.set_adapter(name)
        want[name] = output(model)
    model.delete_adapter("very_sparse")
    assert model.active_adapters == ["dense"]
    adapted = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, RandLoraLayer)}
    assert adapted == {"q_proj", "v_proj", "down_proj"}
    for name in ("dense", "sparse"):
        model.set_adapter(name)
        assert_same(output(model), want[name])
    add(model, "very_sparse", 2)
    assert_same(output(model), want["very_sparse"])


@every_base
def test_adapters_with_equal_bases_hold_one_tensor_also_once_loaded(llama_folder, tmp_path, base):
    model = add(load_llama(llama_folder, base), "dense")
    randomize(get_peft_model(model, config("dense"), "twin"), "twin", seed=5)
    model.save_pretrained(tmp_path)
    loaded = alone(llama_folder, base, tmp_path / "twin", "twin")
    load_adapter(loaded, tmp_path / "dense", "dense")
    load_adapter(loaded, extract(company(llama_folder, base), "sparse"), "sparse")
    for held in (loaded.randlora_A, loaded.randlora_B):
        assert held["dense"] is held["twin"]
        assert held["sparse"] is not held["twin"]
    device = loaded.randlora_B["dense"].device
    stored = [loaded.randlora_B.on(name, device) for name in ("dense", "twin")]
    assert stored[0] is stored[1]


@every_base
def test_training_one_adapter_changes_no_bit_of_the_others_nor_of_the_base(llama_folder, base):
    model = company(llama_folder, base)
    model.set_adapter("sparse")
    frozen = {name: value.clone() for name, value in model.state_dict().items() if not name.endswith(".sparse")}
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 2 * len(layers_of(model, "sparse"))
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model.train()(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = model.state_dict()
    assert_same({name: after[name] for name in frozen}, frozen)
