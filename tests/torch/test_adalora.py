"""AdaLoRA's layers and models: the update against a float64 loop, and what adapted models can do."""

import copy
import dataclasses
import pickle
import warnings

import numpy as np
import oracle
import pytest
import torch
from stacks import without_type_checks
from tolerances import TOLERANCE
from torch import nn
from transformers.pytorch_utils import Conv1D

import interop
from interop import AdaLoraConfig, RandLoraConfig
from randlora_torch import (
    AdaLoraAdapter,
    AdaLoraLayer,
    AdaLoraModel,
    RandLoraModel,
    SVDConv2d,
    SVDLinear,
    extract,
    get_peft_model,
    load_adapter,
)
from randlora_torch.bases import to_numpy
from tests.torch.conftest import MLP, MODELS, TOKENS, X, assert_close, assert_same, llama, loss_of, mlp, output

SCHEDULE = {"init_r": 3, "target_r": 1, "tinit": 1, "tfinal": 2, "total_step": 8, "lora_alpha": 3}
every_model = pytest.mark.parametrize("kind", MODELS)


def config(targets, **fields):
    return AdaLoraConfig(**{**SCHEDULE, "target_modules": targets, **fields})


def adapted(kind="MLP", name="default", **fields):
    make, targets, _, _ = MODELS[kind]
    return get_peft_model(make(), config(targets, **fields), name)


def layers_of(model, name="default"):
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, AdaLoraLayer) and module.holds(name)
    }


def randomize(model, name="default", seed=0):
    """A, E and B as after training: updates of order one."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(model, name).values():
        for parameter, scale in zip(layer.factors(name), (0.3, 1.0, 1.0), strict=True):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def trained(kind="MLP", name="default", **fields):
    return randomize(adapted(kind, name, **fields), name)


def delta_by_oracle(layer, name="default"):
    return oracle.svd_delta_weight(*map(to_numpy, layer.factors(name)), scaling=layer.scaling[name])


# Layers.


class Convolution(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": (3, 2), **options})

    def forward(self, x):
        return self.conv(x)


PICTURES = torch.randn(2, 4, 8, 7, generator=torch.Generator().manual_seed(3))
BASES = {
    "wide": (lambda: nn.Linear(6, 4), X),
    "tall": (lambda: nn.Linear(6, 11, bias=False), X),
    "Conv1D": (lambda: Conv1D(5, 6), X),
    "conv": (lambda: Convolution().conv, PICTURES),
    "strided": (lambda: Convolution(stride=(2, 1), padding=(1, 2), dilation=(1, 2)).conv, PICTURES),
    "grouped": (lambda: Convolution(groups=2, bias=False).conv, PICTURES),
    "depthwise": (lambda: Convolution(groups=4, out_channels=8, padding="same").conv, PICTURES),
    "reflecting": (lambda: Convolution(padding=1, padding_mode="reflect").conv, PICTURES),
}
every_base = pytest.mark.parametrize("base", BASES)


def layer_of(base, r=3, **options):
    """An adapted layer of some kind with random factors, and an input for it."""
    torch.manual_seed(0)
    make, x = BASES[base]
    inner = make().requires_grad_(False)
    kind = SVDConv2d if isinstance(inner, nn.Conv2d) else SVDLinear
    return kind(inner, "default", r, 5, init_lora_weights=False, **options), x


def with_weight(layer, matrix):
    """The base layer with a weight (out, in) in torch's orientation."""
    twin = copy.deepcopy(layer.base_layer)
    stored = torch.as_tensor(matrix, dtype=twin.weight.dtype)
    stored = stored.T if isinstance(twin, Conv1D) else stored
    twin.weight = nn.Parameter(stored.reshape(twin.weight.shape).contiguous())
    return twin


def base_matrix(layer):
    weight = layer.base_layer.weight.detach().double()
    return (weight.T if isinstance(layer.base_layer, Conv1D) else weight.flatten(start_dim=1)).numpy()


@every_base
def test_a_layer_computes_with_its_weight_plus_the_update_of_the_oracle(base):
    layer, x = layer_of(base)
    update = delta_by_oracle(layer)
    np.testing.assert_allclose(layer.get_delta_weight("default").detach(), update, **TOLERANCE["float32"])
    want = with_weight(layer, base_matrix(layer) + update)(x)
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    assert (want - layer.base_layer(x)).norm() > 0.1 * want.norm()
    torch.testing.assert_close(
        layer.weight, with_weight(layer, base_matrix(layer) + update).weight, rtol=1e-5, atol=1e-5
    )


@every_base
def test_gradients_are_those_of_the_dense_formula_in_float64(base):
    layer, x = layer_of(base)
    layer.double()
    x = x.double().requires_grad_()
    (layer(x) ** 2).sum().backward()
    A, E, B = (part.detach().clone().requires_grad_() for part in layer.factors("default"))
    twin, x2 = with_weight(layer, base_matrix(layer)), x.detach().clone().requires_grad_()
    weight = torch.from_numpy(base_matrix(layer)) + layer.scaling["default"] * B @ (A * E)
    stored = (weight.T if isinstance(twin, Conv1D) else weight).reshape(twin.weight.shape)
    (torch.func.functional_call(twin, {"weight": stored}, (x2,)) ** 2).sum().backward()
    for got, want in zip((*layer.factors("default"), x), (A, E, B, x2), strict=True):
        torch.testing.assert_close(got.grad, want.grad, **TOLERANCE["float64", "gradient"])
    assert layer.base_layer.weight.grad is None


@every_base
@pytest.mark.parametrize("keep_base", [True, False])
def test_a_merged_layer_computes_the_same_and_unmerging_restores_the_weight(base, keep_base):
    layer, x = layer_of(base)
    before, want = layer.base_layer.weight.clone(), layer(x)
    layer.merge(keep_base=keep_base)
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.base_layer(x), layer(x), rtol=0, atol=0)
    layer.unmerge()
    torch.testing.assert_close(
        layer.base_layer.weight, before, **({"rtol": 0, "atol": 0} if keep_base else TOLERANCE["float32", "merge"])
    )
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


@every_base
def test_a_layer_of_rank_0_is_its_base_and_can_be_merged_and_trained(base):
    layer, x = layer_of(base, r=0)
    assert_same(layer(x), layer.base_layer(x))
    (layer(x) ** 2).sum().backward()
    assert [tuple(part.grad.shape) for part in layer.factors("default")] == [
        (0, layer.in_features),
        (0, 1),
        (layer.out_features, 0),
    ]
    before = layer.base_layer.weight.clone()
    layer.merge()
    assert_same(layer.base_layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_base
def test_the_output_has_the_dtype_of_the_base_output(base, dtype):
    layer, x = layer_of(base)
    want = with_weight(layer, base_matrix(layer) + delta_by_oracle(layer))(x)
    layer.base_layer.to(dtype)
    got = layer(x.to(dtype))
    assert got.dtype == dtype
    assert layer.lora_A["default"].dtype == torch.float32
    assert (got.float() - want).norm() < 2e-2 * want.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x).dtype == torch.bfloat16


def test_a_new_adapter_starts_as_pefts_and_changes_no_bit():
    torch.manual_seed(0)
    layer = SVDLinear(nn.Linear(400, 300), "default", 8, 4)
    A, E, B = layer.factors("default")
    assert (A.shape, E.shape, B.shape) == ((8, 400), (8, 1), (300, 8))
    assert_same(E.detach(), torch.zeros(8, 1))
    for part in (A, B):
        assert 0.018 < part.std() < 0.022
        assert abs(part.mean()) < 2e-3
    np.testing.assert_allclose(layer.scaling["default"], 4 / (8 + 1e-5))
    x = torch.randn(3, 400)
    assert_same(layer(x), layer.base_layer(x))
    with pytest.raises(ValueError, match="r=-1: must be at least 0"):
        SVDLinear(nn.Linear(4, 3), "default", -1)


@pytest.mark.parametrize("base", ["wide", "conv"])
def test_dropout_thins_the_input_of_the_update_while_training_only(base):
    layer, x = layer_of(base, lora_dropout=0.5)
    without = layer.eval()(x)
    torch.manual_seed(1)
    thinned = layer.train()(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    update = with_weight(layer, layer.get_delta_weight("default").detach())
    update.bias = None
    torch.testing.assert_close(thinned, layer.base_layer(x) + update(dropped), rtol=1e-4, atol=1e-4)
    assert not torch.equal(thinned, without)


# Models.


@every_model
def test_an_adapted_model_has_pefts_parameters_and_starts_as_its_base(kind):
    make, _, count, _ = MODELS[kind]
    model = adapted(kind)
    assert isinstance(model, AdaLoraModel)
    assert not isinstance(model, RandLoraModel)
    assert isinstance(model, type(make()))
    layers = layers_of(model)
    assert len(layers) == count
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{path}.{part}.default" for path in layers for part in ("lora_A", "lora_E", "lora_B")}
    assert_same(output(model), output(make()))
    assert not torch.equal(output(randomize(model)), output(make()))
    assert model.ranks() == dict.fromkeys(layers, 3)
    assert model.peft_config["default"].fan_in_fan_out == (kind == "GPT-2")


@every_model
def test_saved_and_loaded_merged_and_unloaded_a_model_computes_the_same(kind, tmp_path):
    model = trained(kind)
    want, base = output(model), output(MODELS[kind][0]())
    model.save_pretrained(tmp_path)
    assert_same(output(load_adapter(MODELS[kind][0](), tmp_path)), want)
    with model.disable_adapter():
        assert_same(output(model), base)
    model.merge_adapter()
    assert_close(output(model), want)
    model.unmerge_adapter()
    assert_same(output(model), want)
    plain = copy.deepcopy(model).merge_and_unload()
    assert type(plain) is type(MODELS[kind][0]())
    assert_close(output(plain), want)
    assert_same(output(model.unload()), base)


def test_a_new_adapter_is_saved_with_all_its_triplets_though_their_values_are_zero(tmp_path):
    adapted().save_pretrained(tmp_path)
    assert interop.load(tmp_path).config.rank_pattern is None
    assert load_adapter(mlp(), tmp_path).ranks() == {"up": 3, "down": 3}


def test_a_model_is_copied_and_pickled_with_its_adapter_and_allocator():
    model = trained()
    loss_of(model.train()).backward()
    model.update_and_allocate(1)
    want = output(model.eval())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin, AdaLoraModel)
        assert_same(output(twin), want)
        assert twin.rankallocator.step == 1
        assert twin.rankallocator.importance.keys() == model.rankallocator.importance.keys()
        randomize(twin, seed=5)
    assert_same(output(model), want)


def test_several_adapters_of_different_rank_switch_add_up_and_serve_rows():
    model = trained()
    model.add_adapter("wide", config(["up"], init_r=2))
    randomize(model, "wide", 1)
    alone = {"default": output(model)}
    model.set_adapter("wide")
    alone["wide"] = output(model)
    assert layers_of(model, "wide").keys() == {"up"}
    model.set_adapter("default")
    assert_same(output(model), alone["default"])
    with model.disable_adapter():
        alone["__base__"] = output(model)
    names = ["default", "wide", "__base__", "default"]
    rows = output(model.eval(), adapter_names=names)
    for i, name in enumerate(names):
        assert_close(rows[i], alone[name][i])
    model.set_adapter(["default", "wide"])
    layer = model.up
    both = layer.get_delta_weight("default") + layer.get_delta_weight("wide")
    torch.testing.assert_close(layer(X) - layer.base_layer(X), X @ both.T, rtol=1e-4, atol=1e-5)
    model.delete_adapter("wide")
    assert_same(output(model), alone["default"])
    model.delete_adapter("default")
    assert_same(output(model), alone["__base__"])
    assert layers_of(model) == {}


def test_biases_and_modules_are_trained_saved_and_loaded(tmp_path):
    for fields in ({"bias": "lora_only"}, {"bias": "all"}, {"modules_to_save": ["head"]}):
        model = randomize(adapted(**fields))
        with torch.no_grad():
            for value in extract(model).saved_weights.values():
                value.add_(1)
        want = output(model)
        assert not torch.equal(want, output(trained()))
        model.save_pretrained(tmp_path)
        assert_same(output(load_adapter(mlp(), tmp_path)), want)


def test_a_convolutional_network_is_adapted_by_name_but_not_by_all_linear(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(Convolution(), nn.Flatten(), nn.Linear(6 * 6 * 6, 5))

    model = randomize(get_peft_model(make(), config(["0.conv", "2"])))
    assert isinstance(model[0].conv, SVDConv2d)
    want = model(PICTURES)
    model.save_pretrained(tmp_path)
    assert_same(load_adapter(make(), tmp_path)(PICTURES), want)
    adapter = interop.load(tmp_path)
    assert adapter.shapes == {"0.conv": (6, 24), "2": (5, 216)}
    np.testing.assert_allclose(adapter.delta_weight("0.conv"), delta_by_oracle(model[0].conv), atol=1e-6)
    assert layers_of(get_peft_model(make(), config("all-linear"))).keys() == {"2"}
    with pytest.raises(ValueError, match=r"It matches '0\.conv', which is not a linear layer"):
        get_peft_model(make(), RandLoraConfig(r=2, target_modules=["conv"]))


def test_an_adapter_goes_through_the_hub_and_back_to_the_same_bits():
    model = trained("Llama")
    adapter = extract(model)
    assert isinstance(adapter, AdaLoraAdapter)
    hub = interop.convert(model, to="peft")
    for name in hub.modules:
        np.testing.assert_allclose(adapter.delta_weight(name).detach(), hub.delta_weight(name), **TOLERANCE["float32"])
    again = interop.convert(interop.convert(hub, to="torch"), to="peft")
    assert again.config == hub.config
    for name in hub.modules:
        for a, b in zip(again.factors[name], hub.factors[name], strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"shape=\(1, 2\) does not fit"):
        adapter.delta_weight(hub.modules[0], (1, 2))
    with pytest.raises(KeyError, match="'nowhere' is not adapted"):
        adapter.delta_weight("nowhere")


def test_the_two_methods_do_not_meet_on_one_model(tmp_path):
    model = adapted()
    with pytest.raises(
        ValueError, match="the model carries AdaLoRA adapters, and one model carries adapters of one method"
    ):
        model.add_adapter("other", RandLoraConfig(r=2, target_modules=["up"]))
    emptied = adapted()
    emptied.delete_adapter("default")
    with pytest.raises(ValueError, match="the model carries AdaLoRA adapters"):
        emptied.add_adapter("other", RandLoraConfig(r=2, target_modules=["up"]))
    model.save_pretrained(tmp_path)
    other = get_peft_model(mlp(), RandLoraConfig(r=2, target_modules=["up", "down"]))
    with pytest.raises(ValueError, match="the model carries RandLoRA adapters"):
        other.load_adapter(tmp_path, "other")
    with pytest.raises(ValueError, match="RandLoRA is attached, AdaLoRA is saved"):
        other.restore_adapter(tmp_path)
    get_peft_model(other.unload(), config(["up"]))


def test_misuse_is_refused_by_name():
    with pytest.raises(ValueError, match="total_step=None: set it to the number of optimizer steps"):
        AdaLoraConfig(target_modules=["up"])
    with pytest.raises(ValueError, match=r"target_modules entry 'upp' matches none .* Did you mean 'up'"):
        get_peft_model(mlp(), config(["upp"]))
    model = adapted()
    with pytest.raises(ValueError, match="adapter 'other' is not attached"):
        model.ranks("other")
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(ValueError, match=r"no adapter is in training: make one active and trainable"):
        model.update_and_allocate(1)
    with without_type_checks(), pytest.raises(ValueError, match="rank_pattern is a result of training"):
        get_peft_model(mlp(), config(["up"], rank_pattern={"up.lora_E": [True, False, True]}))


def test_pefts_config_is_understood_and_its_table_of_targets_too():
    peft = pytest.importorskip("peft")
    theirs = peft.AdaLoraConfig(**SCHEDULE, target_modules={"up", "down"}, lora_dropout=0.25)
    with without_type_checks():
        model = get_peft_model(mlp(), theirs)
    ours = model.peft_config["default"]
    assert (ours.init_r, ours.target_modules, ours.lora_dropout, ours.total_step) == (3, ("down", "up"), 0.25, 8)
    assert ours.unknown_fields["use_rslora"] is False
    got = get_peft_model(llama(), AdaLoraConfig(**SCHEDULE)).peft_config["default"].target_modules
    assert got == ("q_proj", "v_proj")


def test_with_little_memory_parameters_come_from_the_folder(tmp_path):
    model = trained()
    with torch.no_grad():
        model.up.lora_E["default"][1] = 0
    info = model._randlora.adapters["default"]
    pruned = info.config_keeping({"up": (True, False, True), "down": (True,) * 3})
    model._randlora.adapters["default"] = dataclasses.replace(info, config=pruned)
    model.save_pretrained(tmp_path)
    empty = get_peft_model(mlp(), config(["up", "down"]), low_cpu_mem_usage=True)
    assert empty.up.lora_A["default"].device.type == "meta"
    empty.restore_adapter(tmp_path)
    assert empty.up.lora_A["default"].shape == (2, 6)
    assert_same(output(empty), output(model))
    assert all(p.requires_grad for layer in layers_of(empty).values() for p in layer.factors("default"))
    full = get_peft_model(mlp(), config(["up", "down"]))
    full.restore_adapter(tmp_path)
    assert full.up.lora_A["default"].shape == (3, 6)
    assert full.ranks() == empty.ranks() == {"down": 3, "up": 2}
    assert_close(output(full), output(model))
    for twin in (empty, full):
        assert extract(twin).config.rank_pattern == extract(model).config.rank_pattern
        for name, factors in extract(model).factors.items():
            assert_same(extract(twin).factors[name], factors)
    whole = extract(trained())
    with pytest.raises(ValueError, match="have triplets that the attached adapter had lost before"):
        empty.restore_adapter(whole)


# The loss.


def test_the_orthogonal_loss_is_the_mean_frobenius_distance():
    model = trained("Llama", orth_reg_weight=0.25)
    norms = []
    for layer in layers_of(model).values():
        A, _, B = (part.detach().double() for part in layer.factors("default"))
        norms += [((A @ A.T - torch.eye(3)) ** 2).sum().sqrt(), ((B.T @ B - torch.eye(3)) ** 2).sum().sqrt()]
    np.testing.assert_allclose(model.orthogonal_loss().item(), 0.25 * np.mean(norms), rtol=1e-6)
    model.orthogonal_loss().backward()
    assert model.model.layers[0].self_attn.q_proj.lora_E["default"].grad is None
    assert model.model.layers[0].self_attn.q_proj.lora_A["default"].grad.any()


def test_the_loss_of_a_model_has_it_in_training_only():
    model = trained("Llama")
    with torch.no_grad():
        plain = model.train()(TOKENS, labels=TOKENS).loss
        assert_same(model.eval()(TOKENS, labels=TOKENS).loss, plain)
    in_training = model.train()(TOKENS, labels=TOKENS)
    torch.testing.assert_close(in_training.loss, plain + model.orthogonal_loss())
    assert in_training["loss"] is in_training.loss
    assert_same(model.eval()(TOKENS, labels=TOKENS).loss.detach(), plain)
    model.train().set_requires_grad("default", False)
    assert_same(model(TOKENS, labels=TOKENS).loss.detach(), plain)


def test_the_gradient_of_orthogonal_vectors_and_of_none_is_finite():
    model = adapted()
    with torch.no_grad():
        model.up.set_factors(
            "default", type(model.up.factors("default"))(torch.eye(6)[:3], torch.ones(3, 1), torch.eye(12)[:, :3])
        )
        model.down.set_factors(
            "default", type(model.up.factors("default"))(torch.zeros(0, 12), torch.zeros(0, 1), torch.zeros(6, 0))
        )
    loss = model.orthogonal_loss()
    assert loss == 0
    loss.backward()
    for layer in layers_of(model).values():
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.factors("default"))


def test_a_compiled_model_computes_and_trains_as_the_eager_one():
    model = trained()
    want = output(model)
    loss_of(model).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    with without_type_checks():
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(X), want)
        compiled(X).float().square().sum().backward()
    for got, expected in zip((p.grad for p in model.parameters() if p.requires_grad), grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    compiled.update_and_allocate(1)
    assert model.rankallocator.step == 1


def test_parameters_are_counted(capsys):
    model = adapted()
    model.print_trainable_parameters()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}\n"
    )


def test_loading_leaves_torchs_random_numbers_alone(tmp_path):
    trained().save_pretrained(tmp_path)
    torch.manual_seed(3)
    load_adapter(mlp(3), tmp_path)
    drawn = torch.rand(4)
    mlp(3)
    assert_same(torch.rand(4), drawn)


def test_no_warning_is_given_on_the_way(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapted()
        model.save_pretrained(tmp_path)
        load_adapter(MLP(), tmp_path)
