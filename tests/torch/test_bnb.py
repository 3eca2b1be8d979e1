"""Adapters on bitsandbytes' 4-bit layers, on the CPU; sizes are multiples of 64 where its kernels need that."""

import copy

import numpy as np
import pytest
import torch
from tolerances import TOLERANCE
from torch import nn

from interop import RandLoraConfig
from randlora_torch import extract, get_peft_model, load_adapter
from tests.torch.conftest import assert_same, delta_by_oracle, plain_dequantization

bitsandbytes = pytest.importorskip("bitsandbytes")
bnb = pytest.importorskip("randlora_torch.bnb")

QUANTIZATIONS = [(kind, nested) for kind in ("nf4", "fp4") for nested in (False, True)]
every_quantization = pytest.mark.parametrize(
    ("kind", "nested"), QUANTIZATIONS, ids=[f"{kind}{'-double' * nested}" for kind, nested in QUANTIZATIONS]
)
SHAPES = {"up": (128, 64), "down": (64, 128), "mix": (64, 64)}


class Net(nn.Module):
    """Three 4-bit layers, tall, wide and square, around a nonlinearity."""

    def __init__(self, kind, nested, **options):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, (out, inp) in SHAPES.items():
            layer = bitsandbytes.nn.Linear4bit(inp, out, quant_type=kind, compress_statistics=nested, **options)
            weight = torch.randn(out, inp, generator=generator) / inp**0.5
            layer.weight = bitsandbytes.nn.Params4bit(
                weight, requires_grad=False, quant_type=kind, compress_statistics=nested, module=layer
            )
            layer.bias.data = torch.randn(out, generator=generator)
            self.add_module(name, layer)
        self.requires_grad_(False)
        self.to("cpu")  # moving is what quantizes

    def forward(self, x):
        return self.mix(self.down(torch.relu(self.up(x))))


def net(kind="nf4", nested=True, **options):
    return Net(kind, nested, **options).eval()


def config(targets=tuple(SHAPES), **fields):
    """A small config; alpha = r keeps updates of order 1."""
    return RandLoraConfig(**{"r": 16, "randlora_alpha": 16, "target_modules": targets, **fields})


def trained(kind="nf4", nested=True, **options):
    """An adapted net with random factors; dW has about a third of the size of W."""
    model = get_peft_model(net(kind, nested, **options), config())
    generator = torch.Generator().manual_seed(1)
    for name in SHAPES:
        for parameter in model.get_submodule(name).factors("default"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 20)
    return model


def batch(rows=4, dtype=torch.float32):
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(2)).to(dtype)


def packed(layer):
    """Everything a 4-bit layer stores, to compare bit for bit."""
    weight = layer.weight
    state = weight.quant_state
    parts = [weight.data.clone(), state.absmax.clone(), state.code.clone()]
    return parts + ([state.offset.clone(), state.state2.absmax.clone()] if state.nested else [])


@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize(
    "shape", [(32, 32), (48, 48), (8, 96), (16, 160), (5, 6), (64, 64), (24, 128), (3, 40)], ids=str
)
@every_quantization
def test_a_weight_dequantizes_to_what_its_bytes_say_whatever_its_shape(shape, kind, nested, blocksize):
    # bitsandbytes' own dequantization is wrong on AVX512 if rows are multiples of 16 but not of the blocksize.
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    options = {"quant_type": kind, "compress_statistics": nested, "blocksize": blocksize, "requires_grad": False}
    quantized = bitsandbytes.nn.Params4bit(weight, **options).to("cpu")
    before = quantized.data.clone()
    got = bnb.dequantize_4bit(quantized)
    assert got.dtype == quantized.quant_state.dtype
    np.testing.assert_allclose(got.float().numpy(), plain_dequantization(quantized), **TOLERANCE["float32", "merge"])
    error = ((got.float() - weight).norm() / weight.norm()).item()
    assert error < (0.13 if blocksize == 64 else 0.15)
    assert quantized.quant_state.shape == shape
    assert_same(quantized.data, before)


@every_quantization
def test_the_output_is_the_base_output_plus_x_times_the_transposed_update(kind, nested):
    model, base = trained(kind, nested), net(kind, nested)
    bnb.protect_from_repacking(base)
    x = batch()
    for name, (_, inputs) in SHAPES.items():
        x = batch().repeat(1, inputs // 64)
        layer = model.get_submodule(name)
        assert type(layer) is bnb.Linear4bit
        want = base.get_submodule(name)(x).numpy() + x.numpy() @ delta_by_oracle(layer).T
        np.testing.assert_allclose(layer(x).detach().numpy(), want, **TOLERANCE["float32", "forward"])


def test_a_new_adapter_changes_no_bit_of_the_output():
    base = net()
    bnb.protect_from_repacking(base)
    want = base(batch())
    model = get_peft_model(base, config())
    assert_same(model(batch()), want)
    assert type(model).__name__ == "Net"
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        f"{layer}.randlora_{part}.default" for layer in SHAPES for part in ("lambda", "gamma")
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_quantization
def test_half_precision_inputs_give_the_dtype_of_the_base_output(dtype, kind, nested):
    model, base = trained(kind, nested, compute_dtype=dtype), net(kind, nested, compute_dtype=dtype)
    bnb.protect_from_repacking(base)
    x = batch(dtype=dtype)
    got = model.up(x)
    assert got.dtype == base.up(x).dtype == dtype
    want = base.up(x).double().numpy() + x.double().numpy() @ delta_by_oracle(model.up).T
    name = str(dtype).removeprefix("torch.")
    np.testing.assert_allclose(got.detach().double().numpy(), want, **TOLERANCE[name, "forward"])


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@every_quantization
def test_training_gradients_are_those_of_the_dequantized_model_and_survive_an_eval_forward(kind, nested):
    # An eval forward repacks weights in place on AVX512-BF16 CPUs; afterwards no gradient comes through.
    model = trained(kind, nested)
    plain = nn.ModuleDict({name: nn.Linear(inp, out) for name, (out, inp) in SHAPES.items()})
    for name in SHAPES:
        base = model.get_submodule(name).base_layer
        plain[name].weight.data = torch.from_numpy(plain_dequantization(base.weight)).float()
        plain[name].bias.data = base.bias.data.clone()
    reference = load_adapter(plain, extract(model), is_trainable=True)
    reference.forward = lambda x: Net.forward(reference, x)
    for name in SHAPES:
        setattr(reference, name, reference[name])
    x = batch()
    want = gradients(reference, x)
    before = gradients(model.train(), x)
    assert set(before) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, grad in before.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-3, atol=1e-3 * want[name].abs().max().item())
        assert grad.isfinite().all()
        assert (grad != 0).any()
    with torch.no_grad():
        evaluated = model.eval()(x)
    torch.testing.assert_close(evaluated, reference(x).detach(), rtol=1e-4, atol=1e-4)
    after = gradients(model.train(), x)
    for name, grad in before.items():
        assert_same(after[name], grad)


def test_a_base_that_was_evaluated_before_it_was_adapted_is_unpacked_again():
    base = net(nested=False, compute_dtype=torch.bfloat16)
    want = plain_dequantization(base.up.weight)
    with torch.no_grad():
        base(batch(dtype=torch.bfloat16))
    model = get_peft_model(base, config())
    got = bnb.dequantize_4bit(model.up.base_layer.weight)
    # bitsandbytes keeps the scales of a repacked weight in bfloat16.
    torch.testing.assert_close(got.float(), torch.from_numpy(want).float(), rtol=1e-2, atol=1e-6)
    grads = gradients(model.train(), batch(dtype=torch.bfloat16))
    assert all(grad.isfinite().all() for grad in grads.values())
    assert (grads["up.randlora_lambda.default"] != 0).any()


@every_quantization
def test_merging_is_within_the_quantization_error_and_unmerging_restores_the_very_bytes(kind, nested):
    model = trained(kind, nested)
    x = batch()
    want, before = model(x), {name: packed(model.get_submodule(name).base_layer) for name in SHAPES}
    exact = {
        name: plain_dequantization(model.get_submodule(name).base_layer.weight)
        + delta_by_oracle(model.get_submodule(name))
        for name in SHAPES
    }
    model.merge_adapter()
    for name in SHAPES:
        base = model.get_submodule(name).base_layer
        got = plain_dequantization(base.weight)
        assert np.linalg.norm(got - exact[name]) / np.linalg.norm(exact[name]) < 0.13
        assert base.weight.data.dtype == torch.uint8
        assert base.weight.data.numel() == got.size // 2
        merged = model.get_submodule(name)(x.repeat(1, got.shape[1] // 64))
        plain = x.repeat(1, got.shape[1] // 64) @ torch.from_numpy(got).float().T + base.bias
        torch.testing.assert_close(merged, plain, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    for name in SHAPES:
        assert_same(packed(model.get_submodule(name).base_layer), before[name])
    assert_same(model(x), want)


SETTINGS = [
    {"quant_type": "nf4", "compress_statistics": True, "blocksize": 64},
    {"quant_type": "fp4", "compress_statistics": False, "blocksize": 128},
    {"quant_type": "nf4", "compress_statistics": False, "quant_storage": torch.bfloat16},
    {"quant_type": "nf4", "compress_statistics": True, "quant_storage": torch.float32},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_every_setting_of_the_quantization(settings, dtype):
    storage = {"quant_storage": settings.get("quant_storage", torch.uint8)}
    layer = bitsandbytes.nn.Linear4bit(
        128, 64, compute_dtype=torch.float32, quant_type=settings["quant_type"], **storage
    )
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, module=layer, **settings)
    model = nn.ModuleDict({"up": layer.to("cpu")})
    get_peft_model(model, config(["up"], init_weights=False))

    def described():
        base = model["up"].base_layer
        state = base.weight.quant_state
        assert base.quant_state is state
        return (
            (type(base.weight), base.weight.requires_grad, base.weight.bnb_quantized, base.weight.module is base),
            (base.weight.dtype, base.weight.shape, base.weight.quant_type, base.weight.quant_storage),
            (base.weight.blocksize, base.weight.compress_statistics, base.compute_dtype),
            (state.quant_type, state.blocksize, state.nested, state.dtype, state.shape, state.absmax.dtype),
        )

    before, bytes_before = described(), packed(model["up"].base_layer)
    model.merge_adapter()
    assert described() == before
    assert not torch.equal(packed(model["up"].base_layer)[0], bytes_before[0])
    assert model["up"](batch().repeat(1, 2)).isfinite().all()
    model.unmerge_adapter()
    assert described() == before
    assert_same(packed(model["up"].base_layer), bytes_before)


def test_several_merges_are_undone_to_the_first_bytes():
    model = load_adapter(trained(), extract(trained()), "b")
    before = packed(model.up.base_layer)
    model.merge_adapter(["default"])
    once = packed(model.up.base_layer)
    model.merge_adapter(["b"])
    assert not torch.equal(once[0], packed(model.up.base_layer)[0])
    assert model.up.merged_adapters == ["default", "b"]
    model.unmerge_adapter()
    assert_same(packed(model.up.base_layer), before)
    with model.disable_adapter():
        assert_same(packed(model.up.base_layer), before)


def test_with_a_merged_adapter_disabled_the_model_is_the_base_model():
    model, base = trained(), net()
    bnb.protect_from_repacking(base)
    model.merge_adapter()
    merged = packed(model.up.base_layer)
    with model.disable_adapter():
        assert_same(model(batch()), base(batch()))
    assert model.up.merged
    assert_same(packed(model.up.base_layer), merged)


def test_a_safe_merge_refuses_what_is_not_finite_and_leaves_the_bytes():
    model = trained()
    model.mix.factors("default").lam.data[0, 0] = float("inf")
    before = {name: packed(model.get_submodule(name).base_layer) for name in SHAPES}
    with pytest.raises(ValueError, match=r"merging \['default'\] would make the weight of mix not finite"):
        model.merge_adapter(safe_merge=True)
    for name in SHAPES:
        assert_same(packed(model.get_submodule(name).base_layer), before[name])


def test_a_deep_copy_of_a_merged_model_can_be_unmerged():
    model = trained()
    before = packed(model.up.base_layer)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert_same(packed(twin.up.base_layer), before)
    assert model.up.merged


def test_shapes_that_the_cpu_kernels_compute_wrongly_are_refused_before_the_model_is_changed():
    layer = bitsandbytes.nn.Linear4bit(96, 8, quant_type="nf4").to("cpu")
    model = nn.ModuleDict({"up": layer})
    message = r"in_features=96 is a multiple of 16 but not of the 4-bit blocksize 64: .*Leave this layer out of the"
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(["up"]))
    assert type(model) is nn.ModuleDict
    assert model["up"] is layer


UNQUANTIZED = {
    "8-bit": (lambda: bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False), "load it with has_fp16_weights=F"),
    "8-bit, half": (lambda: bitsandbytes.nn.Linear8bitLt(64, 64).to("cpu"), r"load it with has_fp16_weights=False and"),
    "4-bit": (lambda: bitsandbytes.nn.Linear4bit(64, 64), r"yet: move the model to its device first \(model\.to\)\."),
}


@pytest.mark.parametrize("kind", UNQUANTIZED)
def test_layers_that_are_not_quantized_are_refused_before_the_model_is_changed(kind):
    make, message = UNQUANTIZED[kind]
    model = nn.ModuleDict({"plain": nn.Linear(64, 64), "up": make()})
    with pytest.raises(ValueError, match=rf"the {kind[:5]} layer is not quantized.*{message}"):
        get_peft_model(model, config(["plain", "up"]))
    assert type(model) is nn.ModuleDict
    assert type(model["plain"]) is nn.Linear
    assert type(model["up"]).__module__.startswith("bitsandbytes")
    assert model["plain"].weight.requires_grad


def test_4_bit_weights_are_counted_unpacked(capsys):
    trained().print_trainable_parameters()
    bias = 128 + 64 + 64
    weights = sum(out * inp for out, inp in SHAPES.values())
    trainable = sum(-(-min(shape) // 16) * (16 + min(shape)) for shape in SHAPES.values())
    total = bias + weights + trainable
    line = f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}\n"
    assert capsys.readouterr().out.startswith(line)
