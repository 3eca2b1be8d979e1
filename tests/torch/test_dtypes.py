"""Which dtype things have: activations keep theirs, factors train in float32, and of bases there is one copy."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from randlora_torch import extract, get_peft_model, load_adapter
from tests.torch.conftest import (
    MODELS,
    assert_same,
    config,
    delta_by_oracle,
    layers_of,
    llama,
    load_llama,
    loss_of,
    output,
    randomize,
    relative_error,
    trained,
)

HALF = [torch.bfloat16, torch.float16]
F32 = torch.float32
R, N = 3, 6  # rank and number of bases of the Llama's layers, whose short side is 16 (of v_proj: 8)


def adapted(dtype, kind="Llama", *, autocast_adapter_dtype=True, **fields):
    make, targets, _, _ = MODELS[kind]
    model = get_peft_model(make().to(dtype), config(targets, **fields), autocast_adapter_dtype=autocast_adapter_dtype)
    return randomize(model)


def exact_twin(model, dtype=torch.float64, kind="Llama"):
    """The plain model in float64 with W + dW, W as the adapted model has it."""
    plain = MODELS[kind][0]().to(next(model.parameters()).dtype).to(dtype)
    for name, layer in layers_of(model):
        plain.get_submodule(name).weight.data += torch.from_numpy(delta_by_oracle(layer)).to(dtype)
    return plain


@pytest.mark.parametrize("dtype", HALF)
def test_a_half_precision_model_computes_in_its_dtype_as_well_as_the_plain_one_with_w_plus_dw(dtype):
    model = adapted(dtype)
    dtypes = set()
    for module in model.modules():
        module.register_forward_hook(lambda _, x, y: dtypes.add(y.dtype) if isinstance(y, torch.Tensor) else None)
    got, want = output(model), output(exact_twin(model))
    cost = relative_error(output(exact_twin(model).to(dtype)), want)
    assert got.dtype == dtype
    assert dtypes <= {dtype, F32}  # norms and the rotary embedding compute in float32
    assert {layer(torch.zeros(1, layer.in_features, dtype=dtype)).dtype for _, layer in layers_of(model)} == {dtype}
    assert relative_error(got, want) < 2 * cost


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_of_float32_factors_come_in_float32(dtype):
    model, twin = adapted(dtype), adapted(torch.float32)
    loss_of(model).backward()
    loss_of(twin).backward()
    for (_, layer), (_, other) in zip(layers_of(model), layers_of(twin), strict=True):
        for got, want in zip(layer.factors("default"), other.factors("default"), strict=True):
            assert got.dtype == got.grad.dtype == F32
            assert relative_error(got.grad, want.grad) < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_a_float64_model_computes_exactly_up_to_its_float32_factors():
    model = adapted(torch.float64)
    got, want = output(model), output(exact_twin(model))
    assert got.dtype == torch.float64
    assert relative_error(got, want) < 1e-6
    model.double()  # the factors too
    assert relative_error(output(model), want) < 1e-13
    model(torch.zeros(1, 3, dtype=torch.long)).logits.sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float64}


@pytest.mark.parametrize("dtype", [*HALF, F32])
def test_without_autocasting_the_factors_train_in_the_dtype_of_the_model(dtype, tmp_path):
    model = adapted(dtype, autocast_adapter_dtype=False)
    assert {part.dtype for _, layer in layers_of(model) for part in layer.factors("default")} == {dtype}
    loss_of(model).backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {dtype}
    model.save_pretrained(tmp_path)
    again = load_adapter(llama().to(dtype), tmp_path)
    assert_same(output(again), output(model))
    assert {part.dtype for _, layer in layers_of(again) for part in layer.factors("default")} == {dtype}


def test_without_autocasting_the_factors_of_a_float64_model_are_in_float64():
    model = adapted(torch.float64, autocast_adapter_dtype=False)
    assert {part.dtype for _, layer in layers_of(model) for part in layer.factors("default")} == {torch.float64}


def test_float64_factors_are_not_rounded_in_silence_when_they_are_saved(tmp_path):
    model = adapted(torch.float64).double()
    with pytest.raises(ValueError, match=r"is float64: store it as float32, bfloat16 or float16"):
        model.save_pretrained(tmp_path)
    model.float().save_pretrained(tmp_path)
    assert_same(output(load_adapter(llama(), tmp_path)), output(model))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["Llama", "GPT-2", "BERT"])
def test_autocast_computes_in_its_dtype_with_float32_parameters_and_gradients(dtype, kind):
    model = adapted(F32, kind)
    want, bases = output(model), model.randlora_B["default"]
    with torch.autocast("cpu", dtype):
        got = output(model)
        loss_of(model).backward()
        assert layers_of(model)[0][1](torch.zeros(1, 16)).dtype == dtype
    assert got.dtype == dtype
    assert 1e-5 < relative_error(got, want) < (0.1 if dtype == torch.bfloat16 else 0.02)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.grad.dtype for p in parameters} == {F32}
    assert all(p.grad.isfinite().all() for p in parameters)
    assert model.randlora_B["default"] is bases
    assert_same(output(model), want)
    with torch.autocast("cpu", dtype, enabled=False):
        assert_same(output(model), want)


def kept_for_backward(model):
    """The tensors that a forward pass keeps."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss_of(model)
    return kept


def held(model):
    """The tensors that hold bases, copies included."""
    both = (model.randlora_A, model.randlora_B)
    return [t for bases in both for t in (*map(bases.stored, bases), *bases._copies.values())]


@pytest.mark.parametrize("fields", [{}, {"sparse": True}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (F32, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float64, None),
        (F32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
    ],
    ids=str,
)
def test_no_forward_pass_keeps_a_copy_of_the_bases(dtype, autocast, fields):
    model = adapted(dtype, **fields)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss_of(model).backward()
        first = held(model)
        kept = kept_for_backward(model)
        loss_of(model).backward()
    assert [id(tensor) for tensor in held(model)] == [id(tensor) for tensor in first]
    A, B = model.randlora_A.stored("default"), model.randlora_B.stored("default")
    assert len(first) == 2
    assert (A.dtype, A.shape) == (F32, (R, 1, 16))
    of_dense = 4 if (dtype, autocast) == (F32, None) else 2  # as wide as the products of the CPU
    assert (B.element_size(), B.shape) == (1 if fields else of_dense, (24, N, R))
    assert (model.randlora_A.nbytes, model.randlora_B.nbytes) == (A.nbytes, B.nbytes)
    # Backward keeps slices of those tensors; neither A scaled by the factors (r*n, d) nor B laid out flat (D, n*r).
    own = {tensor.untyped_storage().data_ptr() for tensor in first}
    factors = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = [t for t in kept if t.untyped_storage().data_ptr() not in factors]
    slices = [t for t in kept if (t.dim() == 3 and t.shape[-1] == R) or t.shape in ((R, 16), (R, 8))]
    assert len(slices) >= 2 * len(layers_of(model))
    assert {tensor.untyped_storage().data_ptr() for tensor in slices} <= own
    assert not [t for t in kept if t.dim() == 2 and R * N in t.shape]


class LargeResults(TorchDispatchMode):
    """Records the dtypes of results with at least so many numbers."""

    def __init__(self, size):
        super().__init__()
        self.size, self.dtypes = size, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.size:
            self.dtypes.add(result.dtype)
        return result


@pytest.mark.parametrize("shape", [(64, 8), (8, 64)], ids=str)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("autocast", [False, True])
def test_not_even_for_a_moment_are_the_bases_in_float32(shape, dtype, autocast):
    model = nn.ModuleDict({"layer": nn.Linear(*shape[::-1], dtype=F32 if autocast else dtype)})
    layer = randomize(get_peft_model(model, config(["layer"], r=2)))["layer"]
    x = torch.randn(2, shape[1], dtype=F32 if autocast else dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        with LargeResults(64 * 4 * 2) as seen:  # B is (64, 4, 2), the scaled A (8, 8)
            layer(x).sum().backward()
    assert seen.dtypes <= {dtype, layer.randlora_B["default"].dtype}
    assert dtype in seen.dtypes
    assert F32 not in seen.dtypes


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_quantized_models_hold_their_bases_in_two_bytes_a_number_or_in_the_cpus_four(llama_folder, kind, dtype):
    pytest.importorskip("bitsandbytes")
    model = randomize(get_peft_model(load_llama(llama_folder, kind, dtype), config("all-linear", r=16)), scale=1 / 20)
    loss_of(model.train()).backward()
    output(model.eval())
    in_float32 = dtype == F32 or kind == "nf4-double"  # whose compute_dtype is float32
    assert model.randlora_B["default"].dtype == (F32 if in_float32 else torch.bfloat16)
    assert model.randlora_A._copies == model.randlora_B._copies == {}
    assert output(model).dtype == dtype


@pytest.mark.parametrize("kind", ["nf4-double", "int8", "plain"])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_under_autocast_an_adapted_layer_gives_the_dtype_that_its_base_gives(llama_folder, kind, dtype):
    pytest.importorskip("bitsandbytes")
    model = get_peft_model(load_llama(llama_folder, kind, dtype), config(["q_proj"], r=16))
    layer, x = randomize(model.train()).model.layers[0].self_attn.q_proj, torch.ones(2, 64, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == layer.base_layer(x).dtype


def test_bases_are_stored_in_sixteen_bits_of_the_models_if_that_rounds_none_of_them_or_as_codes():
    want = adapted(F32).randlora_B["default"]
    for dtype in (F32, *HALF):
        got = adapted(dtype).randlora_B["default"]
        assert got.element_size() == 2
        assert_same(got.float(), want.float())
    large = get_peft_model(nn.ModuleDict({"x": nn.Linear(512, 1024)}).half(), config(["x"], r=32))
    assert large.randlora_B["default"].dtype == torch.bfloat16  # some of so many are smaller than float16 goes
    sparse = get_peft_model(llama().bfloat16(), config(["q_proj"], sparse=True))
    assert sparse.randlora_B.stored("default").dtype == torch.int8
    assert sparse.randlora_B["default"].dtype == F32  # 1/std of a ternary basis is no bfloat16


def test_the_dtype_of_bases_in_memory_does_not_show_in_files(tmp_path):
    files = []
    for dtype in (F32, torch.bfloat16):
        model = adapted(dtype)
        model.save_pretrained(tmp_path / str(dtype))
        files.append((tmp_path / str(dtype) / "adapter_model.safetensors").read_bytes())
        assert {basis.dtype for basis in extract(model).bases} == {torch.bfloat16}
    assert files[0] == files[1]


def test_serving_under_inference_mode_leaves_bases_that_train():
    model = trained("Llama")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(1, 3, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model).backward()
    assert all((p.grad != 0).any() for p in model.parameters() if p.requires_grad)


def test_a_model_that_was_adapted_under_inference_mode_serves():
    with torch.inference_mode():
        model = load_adapter(llama(), extract(trained("Llama")))
        assert_same(model(torch.arange(5)[None]).logits, trained("Llama")(torch.arange(5)[None]).logits)


def test_a_model_converted_after_training_computes_as_one_converted_before():
    first = trained("MLP").bfloat16()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    second = load_adapter(MODELS["MLP"][0]().bfloat16(), extract(trained("MLP").bfloat16()))
    assert_same(first(x).detach(), second(x))
    assert_same(first.randlora_B["default"].float(), second.randlora_B["default"].float())
