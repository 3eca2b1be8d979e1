"""AdaLoRA on Llamas in 8 and 4 bits: outputs and gradients of the dequantized W + dW, and merging, measured."""

import numpy as np
import oracle
import pytest
import torch
from crossing import cross

import randlora_torch
from interop import AdaLoraConfig
from randlora_torch import AdaLoraLayer, extract, get_peft_model, load_adapter
from randlora_torch.bases import to_numpy
from tests.torch.conftest import QUANTIZATIONS, TOKENS, assert_same, load_llama, loss_of, output, relative_error

bitsandbytes = pytest.importorskip("bitsandbytes")
bnb = pytest.importorskip("randlora_torch.bnb")
quantized = pytest.importorskip("tests.torch.test_quantized")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SCHEDULE = {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 2, "total_step": 8, "lora_alpha": 4}
every_kind = pytest.mark.parametrize("kind", QUANTIZATIONS)
few_kinds = pytest.mark.parametrize("kind", ["nf4-double", "int8"])
CASES = [("nf4", F32, F32), ("nf4-double", BF16, BF16), ("fp4", F32, F16), ("int8", F32, F32), ("int8", BF16, F32)]
CASES += [("int8-all", F16, F32)]
every_case = pytest.mark.parametrize(
    ("kind", "dtype", "compute"), CASES, ids=[f"{k}-{str(d)[6:]}-{str(c)[6:]}" for k, d, c in CASES]
)


def config(**fields):
    return AdaLoraConfig(**{**SCHEDULE, "target_modules": "all-linear", "orth_reg_weight": 0.1, **fields})


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaLoraLayer)}


def adapted(folder, kind, dtype=F32, compute=F32, **fields):
    """A loaded Llama with an adapter whose updates are about as large as its weights."""
    model = get_peft_model(load_llama(folder, kind, dtype, compute), config(**fields))
    generator = torch.Generator().manual_seed(0)
    for layer in layers_of(model).values():
        for part, scale in zip(layer.factors("default"), (0.45, 0.45, 0.45), strict=True):
            part.data.copy_(torch.randn(part.shape, generator=generator) * scale)
    return model


def delta(layer):
    factors = map(to_numpy, layer.factors("default"))
    return torch.from_numpy(oracle.svd_delta_weight(*factors, scaling=layer.scaling["default"]))


def updated(layer):
    return quantized.dequantized(layer.base_layer).double() + delta(layer)


def plain_twin(model, folder):
    """The Llama of plain float32 layers, those adapted with W + dW."""
    twin = load_llama(folder)
    for name, module in twin.named_modules():
        if getattr(module, "weight", None) is not None:
            layer = model.get_submodule(name)
            weight = updated(layer) if isinstance(layer, AdaLoraLayer) else quantized.dequantized(layer)
            module.weight = torch.nn.Parameter(weight.to(F32, copy=True))
    return twin


@every_kind
def test_every_layer_is_of_its_kind(llama_folder, kind):
    model = get_peft_model(load_llama(llama_folder, kind), config())
    want = bnb.SVDLinear8bitLt if "int8" in kind else bnb.SVDLinear4bit
    assert {type(layer) for layer in layers_of(model).values()} == {want}
    assert len(layers_of(model)) == 7


@few_kinds
def test_a_layer_is_made_by_hand_as_in_peft(llama_folder, kind):
    base = load_llama(llama_folder, kind).model.layers[0].mlp.down_proj
    made = randlora_torch.SVDLinear8bitLt if kind == "int8" else randlora_torch.SVDLinear4bit
    layer = made(base, "default", r=3, lora_alpha=6, lora_dropout=0.5, init_lora_weights=False).eval()
    assert [tuple(part.shape) for part in layer.factors("default")] == [(3, 128), (3, 1), (64, 3)]
    x = torch.randn(2, 128)
    want = base(x) + x @ delta(layer).float().T
    assert relative_error(layer(x), want) < 1e-5
    assert relative_error(layer.train()(x), want) > 0.1


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@every_case
def test_a_layer_computes_with_the_dequantized_weight_plus_dw(llama_folder, kind, dtype, compute, training):
    model = adapted(llama_folder, kind, dtype, compute).train(training)
    bound = 1e-5 if (dtype, compute) == (F32, F32) else 1e-2
    if not training:
        bound = quantized.EVAL_BOUNDS.get(kind, bound)
    seen = {}
    for name, layer in layers_of(model).items():
        layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0].detach(), y.detach())}))
    output(model)
    assert len(seen) == 7
    for name, layer in layers_of(model).items():
        x, y = seen[name]
        assert y.dtype == dtype
        want = x.double() @ updated(layer).T
        assert relative_error(y, want) < bound
        without = x.double() @ quantized.dequantized(layer.base_layer).double().T
        assert relative_error(without, want) > 0.2


@every_kind
def test_a_training_llama_in_float32_is_the_plain_one_with_w_plus_dw(llama_folder, kind):
    model = adapted(llama_folder, kind).train()
    twin = plain_twin(model, llama_folder)
    assert relative_error(output(model), output(twin)) < 1e-5
    loss_of(model).backward()
    loss_of(twin).backward()
    for name, layer in layers_of(model).items():
        upstream = twin.get_submodule(name).weight.grad.double()
        A, E, B = (part.detach().double() for part in layer.factors("default"))
        scaling = layer.scaling["default"]
        want = (
            scaling * E * (B.T @ upstream),
            scaling * ((B.T @ upstream) * A).sum(dim=1, keepdim=True),
            scaling * (upstream @ A.T) * E.T,
        )
        for part, expected in zip(layer.factors("default"), want, strict=True):
            assert relative_error(part.grad, expected) < 2e-5


@cross(kind=list(QUANTIZATIONS), keep_base=[True, False])
def test_merging_adds_what_requantizing_the_sum_rounds_and_nothing_else(llama_folder, kind, keep_base):
    model = adapted(llama_folder, kind).train()
    before = {name: quantized.stored(layer.base_layer) for name, layer in layers_of(model).items()}
    want, rounded, exact = output(model), {}, {}
    for name, layer in layers_of(model).items():
        exact[name] = quantized.dequantized(layer.base_layer) + layer.get_delta_weight("default").detach()
        assert relative_error(exact[name], updated(layer)) < 1e-6
        rounded[name] = quantized.requantized(layer, exact[name])
    roundings = model.merge_adapter(keep_base=keep_base)
    assert roundings.keys() == before.keys()
    for name, layer in layers_of(model).items():
        weight, parts = rounded[name]
        assert_same(quantized.stored(layer.base_layer), parts)
        assert_same(quantized.dequantized(layer.base_layer), weight)
        error = (weight.double() - exact[name].double()).norm().item()
        norms = (exact[name].double().norm().item(), delta(layer).norm().item())
        np.testing.assert_allclose(roundings[name], [error / norm for norm in norms], rtol=1e-4)
        assert 0.003 < roundings[name].of_weight < (0.02 if "int8" in kind else 0.15)  # formats.md: 0.0074 and 0.12
    assert relative_error(output(model), want) < (0.1 if "int8" in kind else 1.0)
    model.unmerge_adapter()
    if keep_base:
        assert_same({name: quantized.stored(layer.base_layer) for name, layer in layers_of(model).items()}, before)
        assert_same(output(model), want)


@few_kinds
def test_a_quantized_llama_trains_to_its_ranks_saves_and_loads_with_the_same_logits(llama_folder, tmp_path, kind):
    torch.manual_seed(0)
    model = get_peft_model(load_llama(llama_folder, kind, BF16, BF16), config(target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for step in range(1, 9):
        loss = model.train()(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item() - model.orthogonal_loss().item())
    assert losses[-1] < 0.95 * losses[0]
    assert 0 < sum(model.ranks().values()) <= 2
    model.save_pretrained(tmp_path)
    again = load_adapter(load_llama(llama_folder, kind, BF16, BF16), tmp_path)
    assert again.ranks() == model.ranks()
    got, want = output(again.train()), output(model.train())
    assert relative_error(got.float(), want.float()) < 1e-3
    assert extract(again).config.rank_pattern == extract(model).config.rank_pattern


@few_kinds
def test_a_merged_llama_that_is_unloaded_is_the_quantized_model(llama_folder, kind):
    model = adapted(llama_folder, kind).train()
    model.merge_adapter()
    want = output(model)
    plain = model.merge_and_unload()
    assert layers_of(plain) == {}
    assert_same(output(plain), want)
