"""The defects R1 to R20 of PEFT 0.21.2's RandLoRA, each as a law that our stack keeps and PEFT breaks.

A law runs over both; the strict xfail proves that it sees the defect. Where a law is not about bitsandbytes, it is not
written for quantized models; all models are tiny.
"""

import contextlib

import numpy as np
import pytest
import torch
from defects import MLP, OURS, PEFT, X, broken_in_peft, delta, mlp, norm, outputs, randomize, with_updates
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import interop
import randlora_torch
from randlora_torch.bases import to_torch

bitsandbytes = pytest.importorskip("bitsandbytes")
bnb = pytest.importorskip("randlora_torch.bnb")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, about save_projection=False and 8-bit merges
Failed = pytest.fail.Exception  # what pytest.raises raises if nothing was raised

WEIGHTS = "adapter_model.safetensors"
TOKENS = torch.randint(0, 40, (4, 6), generator=torch.Generator().manual_seed(9))
QUANTIZATION = {
    "8-bit": {"load_in_8bit": True},
    "4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4-bit-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
every_quantization = pytest.mark.parametrize("kind", ["8-bit", "4-bit"])
# One name per orientation of a layer.
SQUARE, TALL, WIDE = "self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"
every_shape = pytest.mark.parametrize("target", [SQUARE, TALL, WIDE], ids=["square", "tall", "wide"])


@pytest.fixture(autouse=True)
def _on_one_thread():
    """Threads only slow models down that are this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(
        LlamaConfig(num_key_value_heads=1, vocab_size=40, max_position_embeddings=16, initializer_range=0.2, **sizes)
    ).save_pretrained(path)
    return path


def llama(folder, kind=None):
    options = {"quantization_config": BitsAndBytesConfig(**QUANTIZATION[kind]), "device_map": "cpu"} if kind else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    bnb.protect_from_repacking(model)  # so that what PEFT gets wrong is not bitsandbytes' repacking on AVX512-BF16 CPUs
    return model


def adapted_llama(stack, folder, kind, *targets):
    fields = {"r": 8, "target_modules": list(targets) or [SQUARE, TALL, WIDE]}
    return randomize(stack, stack.attach(llama(folder, kind), stack.config(**fields)))


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=TOKENS, **kwargs).logits


def dequantized(layer):
    """The numbers that a bitsandbytes layer computes with; a weight that is not packed stands for itself."""
    weight = layer.weight
    if weight.dtype == torch.int8:
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return weight.data.float() * scales.float()[:, None] / 127
    if weight.dtype != torch.uint8:
        return weight.data.float()
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()


def stored(layer):
    """Every tensor of which a layer's weight is made, copied."""
    weight = layer.weight
    if weight.dtype == torch.int8:
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return [weight.data.clone(), scales.clone()]
    state = getattr(weight, "quant_state", None)
    return [weight.data.clone()] + ([] if state is None else [state.absmax.clone(), state.code.clone()])


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def assert_close(got, want):
    """For sums of a few hundred float32 products of order 1."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def single(stack, model):
    """The one adapted layer of a model."""
    (layer,) = stack.layers(model).values()
    return layer


# R1, R2: merging into quantized weights.

WRONG_PRODUCT = (AssertionError, RuntimeError)  # a wrong update if the layer is square, an error of shapes if not


@every_shape
@broken_in_peft("R1, the product of the two scaled bases is taken in the wrong order", WRONG_PRODUCT)
def test_r01_merging_into_8_bit_adds_the_update_itself(stack, target, folder):
    model = adapted_llama(stack, folder, "8-bit", target)
    layer = single(stack, model)
    base, update = dequantized(layer.base_layer).double().numpy(), delta(layer)
    model.merge_adapter()
    exact = base + update
    merged = dequantized(layer.base_layer).double().numpy()
    # int8 with one scale a row: half a step of 1/127 of the largest, from a weight rounded to float16 (11 bits).
    bound = (0.5 / 127 + 2.0**-11 + 1e-6) * np.abs(exact).max(axis=1, keepdims=True)
    assert norm(update) > 10 * norm(np.broadcast_to(bound, update.shape))
    assert (np.abs(merged - exact) / bound).max() <= 1


@every_shape
@broken_in_peft("R1, the product of the two scaled bases is taken in the wrong order", WRONG_PRODUCT)
def test_r01_a_model_merged_in_8_bit_computes_what_it_computed(stack, target, folder):
    model = adapted_llama(stack, folder, "8-bit", target)
    want, base = logits(model), logits(llama(folder, "8-bit"))
    model.merge_adapter()
    assert norm(logits(model) - want) < 0.1 * norm(want - base)


@every_shape
@broken_in_peft("R2, the merged weight stays float32 under the mark of a packed one", WRONG_PRODUCT)
def test_r02_merging_into_4_bit_keeps_the_weight_packed(stack, target, folder):
    model = adapted_llama(stack, folder, "4-bit", target)
    base = single(stack, model).base_layer
    shape, want = base.weight.shape, logits(model)
    settings = [base.weight.quant_state.as_dict()[key] for key in ("quant_type", "blocksize", "dtype", "shape")]
    model.merge_adapter()
    assert base.weight.dtype == torch.uint8
    assert base.weight.shape == shape
    assert [base.weight.quant_state.as_dict()[key] for key in ("quant_type", "blocksize", "dtype", "shape")] == settings
    assert norm(logits(model) - want) < 0.5 * norm(want)


@every_shape
@pytest.mark.parametrize("kind", ["4-bit", "4-bit-double"])
@broken_in_peft("R2, the product of the two scaled bases is taken in the wrong order", WRONG_PRODUCT)
def test_r02_merging_into_4_bit_adds_the_update_itself(stack, kind, target, folder):
    model = adapted_llama(stack, folder, kind, target)
    layer = single(stack, model)
    base, update = dequantized(layer.base_layer).double().numpy(), delta(layer)
    code = layer.base_layer.weight.quant_state.code.double().sort().values
    model.merge_adapter()
    exact = base + update
    merged = dequantized(layer.base_layer).double().numpy()
    # Half the widest gap between two of the 16 numbers, times the largest number in the block of 64. Double
    # quantization rounds that to 8 bits, about their mean: at most 1/127 of the span of them all.
    largest = np.abs(exact.reshape(-1, 64)).max(axis=1)
    widest = code.diff().max().item() / 2
    slack = np.ptp(largest) / 127 if kind == "4-bit-double" else 1e-6
    bound = np.repeat(widest * largest + 2 * slack, 64).reshape(exact.shape)
    assert (np.abs(merged - exact) / bound).max() <= 1
    assert norm(merged - exact) < 0.5 * norm(update)  # a wrong update is off by its own norm or more


# R3: several adapters on quantized layers.

NESTED = "R3, the second adapter on a quantized layer wraps the wrapper of the first"


def two_on_quantized(stack, folder, kind):
    model = adapted_llama(stack, folder, kind)
    model.add_adapter("b", stack.config(r=8, target_modules=[SQUARE, TALL, WIDE]))
    return randomize(stack, model, "b").eval()


@every_quantization
@broken_in_peft(NESTED)
def test_r03_a_second_adapter_on_a_quantized_layer_stands_beside_the_first(stack, kind, folder):
    for layer in stack.layers(two_on_quantized(stack, folder, kind)).values():
        assert type(layer.base_layer).__module__.startswith("bitsandbytes")
        assert sorted(layer.randlora_lambda.keys()) == ["b", "default"]


@every_quantization
@broken_in_peft(NESTED)
def test_r03_the_file_of_each_of_two_adapters_names_the_layers_of_the_model(stack, kind, folder, tmp_path):
    model = two_on_quantized(stack, folder, kind)
    model.save_pretrained(tmp_path)
    want = {f"base_model.model.model.layers.0.{name}.randlora_lambda" for name in (SQUARE, TALL, WIDE)}
    for path in (tmp_path, tmp_path / "b"):
        assert {key for key in load_file(path / WEIGHTS) if key.endswith("lambda")} == want


@every_quantization
@broken_in_peft(NESTED)
def test_r03_the_first_of_two_adapters_on_a_quantized_model_comes_back_from_its_file(stack, kind, folder, tmp_path):
    model = two_on_quantized(stack, folder, kind)
    model.set_adapter("default")
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert_close(logits(stack.load(llama(folder, kind), tmp_path).eval()), want)


# R4: files and memory.


@broken_in_peft("R4, A and B are written once per adapted layer and once more")
def test_r04_a_file_holds_each_basis_once(stack, tmp_path):
    model = stack.attach(mlp(), stack.config(target_modules=["lin0", "lin1", "lin2"]))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        keys = [key for key in file.keys() if key.endswith(("randlora_A", "randlora_B"))]
    assert sorted(keys) == ["base_model.randlora_A", "base_model.randlora_B"]


@broken_in_peft("R4, A and B are written once per adapted layer and once more")
def test_r04_a_file_is_as_large_as_what_is_trained_and_one_pair_of_bases(stack, tmp_path):
    names = [f"{i}.lin1" for i in range(8)]
    base = nn.Sequential(*(mlp(32, 64, 64, 32) for _ in range(8)))
    model = stack.attach(base, stack.config(r=8, target_modules=names))
    model.save_pretrained(tmp_path)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bases = 8 * 64 + 64 * 64
    header = 200 * (2 * len(names) + 2) + 4000
    assert (tmp_path / WEIGHTS).stat().st_size <= 4 * (trained + bases) + header


# R5 to R9: adapters beside each other.


def saved(stack, folder, sizes=(), **fields):
    """An adapter alone: its folder and its outputs."""
    model = randomize(stack, stack.attach(mlp(*sizes), stack.config(**fields))).eval()
    model.save_pretrained(folder)
    return outputs(model)


@pytest.mark.parametrize("first", [{}, {"sparse": True}], ids=["dense first", "sparse first"])
@broken_in_peft("R5, loading a second adapter overwrites the bases of the first in place")
def test_r05_loading_a_second_adapter_changes_no_bit_of_the_first(stack, first, tmp_path):
    second = {} if first else {"sparse": True}
    of_a, of_b = saved(stack, tmp_path / "a", **first), saved(stack, tmp_path / "b", **second)
    model = stack.load(mlp(), tmp_path / "a").eval()
    model.load_adapter(tmp_path / "b", "b")
    assert_same(outputs(model), of_a)
    model.set_adapter("b")
    assert_close(outputs(model), of_b)


@pytest.mark.parametrize("kind", ["sparse", "very_sparse"])
@broken_in_peft("R6, a second adapter gets the bases of the first, whatever its config says")
def test_r06_a_second_adapter_has_the_bases_of_its_own_config(stack, kind):
    model = stack.attach(mlp(), stack.config())
    model.add_adapter("b", stack.config(**{kind: True}))
    drawn = interop.make_bases(OURS.config(**{kind: True}), max_dim=20, min_dim=20)
    for held, want in zip(stack.bases(model, "b"), drawn, strict=True):
        assert_same(held.float(), to_torch(want).float())


@broken_in_peft("R6, a second adapter gets the bases of the first, whatever its config says")
def test_r06_a_sparse_second_adapter_comes_back_from_a_file_without_bases(stack, tmp_path):
    model = stack.attach(mlp(), stack.config(save_projection=False))
    model.add_adapter("b", stack.config(save_projection=False, sparse=True))
    randomize(stack, model, "b").eval().set_adapter("b")
    want = outputs(model)
    model.save_pretrained(tmp_path)
    assert_close(outputs(stack.load(mlp(), tmp_path / "b").eval()), want)


@pytest.mark.parametrize("save_projection", [True, False], ids=["with bases", "without bases"])
@broken_in_peft("R7, a second adapter on smaller layers keeps the larger bases", (AssertionError, RuntimeError))
def test_r07_a_second_adapter_on_smaller_layers_comes_back_alone(stack, save_projection, tmp_path):
    sizes, fields = (10, 20, 20, 40), {"save_projection": save_projection}
    model = stack.attach(mlp(*sizes), stack.config(target_modules=["lin1", "lin2"], **fields))
    model.add_adapter("b", stack.config(**fields))
    randomize(stack, model, "b").eval().set_adapter("b")
    want = outputs(model)
    model.save_pretrained(tmp_path)
    assert_close(outputs(stack.load(mlp(*sizes), tmp_path / "b").eval()), want)


@broken_in_peft("R7, a second adapter cannot be on larger layers", RuntimeError)
def test_r07_a_second_adapter_may_be_on_larger_layers(stack, tmp_path):
    sizes, larger = (10, 20, 20, 40), {"target_modules": ["lin1", "lin2"]}
    of_b = saved(stack, tmp_path, sizes, **larger)
    model = stack.attach(mlp(*sizes), stack.config())
    model.load_adapter(tmp_path, "b")
    model.eval().set_adapter("b")
    assert_close(outputs(model), of_b)


@pytest.mark.parametrize("r", [2, 10], ids=["smaller", "larger"])
@broken_in_peft("R8, adapters of one model cannot differ in r", (RuntimeError, ValueError))
def test_r08_a_second_adapter_may_have_another_r(stack, r):
    model = stack.attach(mlp(), stack.config())
    model.add_adapter("b", stack.config(r=r))
    layer = single(stack, randomize(stack, randomize(stack, model), "b").eval())
    for name in ("b", "default", "b"):
        model.set_adapter(name)
        assert_close(outputs(model), with_updates(mlp(), {"lin1": delta(layer, name)}))


@pytest.mark.parametrize("r", [2, 10], ids=["smaller", "larger"])
@broken_in_peft("R8, adapters of one model cannot differ in r", (RuntimeError, ValueError))
def test_r08_a_second_adapter_of_another_r_can_be_loaded(stack, r, tmp_path):
    of_a, of_b = saved(stack, tmp_path / "a"), saved(stack, tmp_path / "b", r=r)
    model = stack.load(mlp(), tmp_path / "a")
    model.load_adapter(tmp_path / "b", "b")
    model.eval().set_adapter("b")
    assert_close(outputs(model), of_b)
    model.set_adapter("default")
    assert_close(outputs(model), of_a)


@broken_in_peft("R9, the count of bases is kept per layer: it is that of the adapter added last", RuntimeError)
def test_r09_an_adapter_added_with_a_smaller_r_changes_no_bit_of_the_first(stack):
    targets = ["lin0", "lin1"]
    model = randomize(stack, stack.attach(mlp(), stack.config(target_modules=targets))).eval()
    want = outputs(model)
    model.add_adapter("b", stack.config(r=2, target_modules=targets))
    model.set_adapter("default")
    assert_same(outputs(model), want)


class Mixed(MLP):
    """An MLP with layers, last in the order of its modules, that RandLoRA does not adapt."""

    def __init__(self):
        super().__init__()
        self.embedding, self.bilinear = nn.Embedding(4, 20), nn.Bilinear(3, 3, 3)
        self.conv1, self.conv2 = nn.Conv1d(3, 3, 3), nn.Conv2d(3, 3, 3)


@broken_in_peft("R9, an adapter that could not be added stays in the layers that came first")
def test_r09_an_adapter_that_is_refused_leaves_nothing_behind(stack):
    model = randomize(stack, stack.attach(mlp(kind=Mixed), stack.config(target_modules=["lin0", "lin1"]))).eval()
    want, names = outputs(model), [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"embedding|Embedding"):
        model.add_adapter("b", stack.config(r=2, target_modules=["lin0", "lin1", "embedding"]))
    assert [name for name, _ in model.named_parameters()] == names
    assert_same(outputs(model), want)


# R10: bases that come from the seed.

FP16_HOST = "peft.tuners.randlora.model.is_bf16_available"  # patched to say no: PEFT on a host without bfloat16
NO_BASES = {"save_projection": False, "target_modules": ["lin0", "lin1"]}


@broken_in_peft("R10, the bases depend on whether the host knows bfloat16")
def test_r10_an_adapter_without_its_bases_is_the_same_on_every_host(stack, tmp_path, monkeypatch):
    want = saved(stack, tmp_path, **NO_BASES)
    monkeypatch.setattr(FP16_HOST, lambda: False)
    assert_close(outputs(stack.load(mlp(), tmp_path).eval()), want)


@broken_in_peft("R10, the bases depend on whether the host knows bfloat16")
def test_r10_what_peft_saved_on_a_host_without_bfloat16_can_be_loaded_elsewhere(stack, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(FP16_HOST, lambda: False)
        want = saved(PEFT, tmp_path, **NO_BASES)
    named = {"recipe": "torch>=2.12-fp16"} if stack is OURS else {}
    assert_close(outputs(stack.load(mlp(), tmp_path, **named).eval()), want)


@broken_in_peft("R10, the bases depend on the version of torch, and nothing says which one drew them")
def test_r10_what_peft_saved_under_an_older_torch_can_be_loaded(stack, tmp_path):
    model = randomize(PEFT, PEFT.attach(mlp(), PEFT.config(**NO_BASES))).eval()
    # The older torch is simulated; interop's tests check this recipe against hashes from real ones.
    older = interop.make_bases(OURS.config(**NO_BASES), max_dim=20, min_dim=20, recipe="torch<=2.11")
    for held, drawn in zip(PEFT.bases(model), older, strict=True):
        held.copy_(to_torch(drawn))
    want = outputs(model)
    model.save_pretrained(tmp_path)
    named = {"recipe": "torch<=2.11"} if stack is OURS else {}
    assert_close(outputs(stack.load(mlp(), tmp_path, **named).eval()), want)


@broken_in_peft("R10, nothing in a file says how its bases were drawn")
def test_r10_a_file_that_names_the_recipe_of_its_bases_is_believed(stack, tmp_path):
    model = OURS.attach(mlp(), OURS.config(**NO_BASES), recipe="torch<=2.11")
    want = outputs(randomize(OURS, model).eval())
    model.save_pretrained(tmp_path)
    assert_close(outputs(stack.load(mlp(), tmp_path).eval()), want)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@broken_in_peft("R10, sparse bases are drawn in torch's default dtype")
def test_r10_sparse_bases_do_not_depend_on_torchs_default_dtype(stack, tmp_path):
    want = saved(stack, tmp_path, **NO_BASES, sparse=True)
    base = mlp()
    with default_dtype(torch.bfloat16):
        model = stack.load(base, tmp_path)
    assert_close(outputs(model.eval()), want)


class WithHead(MLP):
    """The same model with a new head that nothing was trained for."""

    def __init__(self):
        super().__init__()
        self.head = nn.ModuleDict({"lin1": nn.Linear(2, 64)})


@broken_in_peft("R10, the bases depend on all layers whose name ends as an adapted one")
def test_r10_the_bases_are_those_of_the_layers_that_were_adapted(stack, tmp_path):
    want = saved(stack, tmp_path, **NO_BASES)
    torch.manual_seed(0)
    assert_close(outputs(stack.load(WithHead().eval(), tmp_path).eval()), want)


# R11 to R16.


@broken_in_peft("R11, a sparse basis that is zero everywhere is divided by its standard deviation")
def test_r11_sparse_bases_are_finite_or_refused_with_the_reason(stack):
    refused = 0
    for seed in range(30):
        config = stack.config(r=1, sparse=True, projection_prng_key=seed, target_modules=["lin0", "lin1"])
        try:
            model, problem = stack.attach(mlp(4, 4, 4, 4), config), None
        except ValueError as error:
            problem = str(error)
        if problem is None:
            assert all(basis.isfinite().all() for basis in stack.bases(model))
            assert outputs(randomize(stack, model).eval(), X[:, :4]).isfinite().all()
        else:
            assert f"is zero everywhere (r=1, min_dim=4, projection_prng_key={seed})" in problem
            refused += 1
    assert 0 < refused < 15


@broken_in_peft("R12, adapter_names is ignored")
def test_r12_each_row_of_a_batch_is_computed_by_its_own_adapter(stack, folder):
    model = adapted_llama(stack, folder, None)
    model.add_adapter("b", stack.config(r=8, target_modules=[SQUARE, TALL, WIDE]))
    randomize(stack, model, "b").eval()
    rows = ["b", "default", "__base__", "default"]
    mixed = logits(model, adapter_names=rows)
    alone = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        alone[name] = logits(model)
    with model.disable_adapter():
        alone["__base__"] = logits(model)
    assert (alone["default"] - alone["b"]).abs().max() > 0.1
    assert_close(mixed, torch.stack([alone[name][i] for i, name in enumerate(rows)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_quantization
@broken_in_peft("R13, quantized layers return float32 for inputs in half precision")
def test_r13_an_adapted_quantized_layer_returns_the_dtype_of_its_base_layer(stack, kind, dtype, folder):
    layer = single(stack, adapted_llama(stack, folder, kind, SQUARE))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        got, base = layer(x), layer.base_layer(x)
    assert got.dtype == base.dtype == dtype
    want = base.double() + x.double() @ torch.from_numpy(delta(layer)).T
    assert norm(got.double() - want) < 2.0**-6 * norm(want)  # bfloat16 has 8 bits, and there are three roundings


class Casts(TorchDispatchMode):
    """Counts the casts and copies to another dtype of tensors of at least this size."""

    def __init__(self, size):
        super().__init__()
        self.size, self.shapes = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.numel() >= self.size:
            self.shapes.append(tuple(out.shape))
        return out


@broken_in_peft("R14, half-precision bases are cast to float32 as a whole, at every forward of every layer")
def test_r14_no_step_after_the_first_casts_a_whole_basis(stack):
    config = stack.config(r=8, target_modules=["lin0", "lin2"])
    model = stack.attach(mlp(64, 96, 64, 96).bfloat16(), config, autocast_adapter_dtype=False)
    randomize(stack, model).train()
    x = torch.randn(2, 64).bfloat16()
    model(x).sum().backward()
    with Casts(stack.bases(model)[1].numel()) as casts:
        model(x).sum().backward()
        outputs(model, x)
    assert casts.shapes == []


@broken_in_peft("R14, the bases of a half-precision model are held in float32")
def test_r14_the_bases_of_a_bfloat16_model_take_two_bytes_a_number(stack):
    model = stack.attach(mlp().bfloat16(), stack.config())
    outputs(model, X.bfloat16())
    assert stack.bases(model)[1].dtype == torch.bfloat16
    assert single(stack, model).randlora_lambda["default"].dtype == torch.float32  # what trains is not rounded


@broken_in_peft("R15, the state dict holds the same memory once per layer", RuntimeError)
def test_r15_the_state_dict_of_a_model_can_be_written_as_safetensors_and_read_back(stack, tmp_path):
    model = randomize(stack, stack.attach(mlp(), stack.config(target_modules=["lin0", "lin1"]))).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = stack.attach(mlp(), stack.config(target_modules=["lin0", "lin1"])).eval()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_same(outputs(again), outputs(model))


@broken_in_peft("R15, a transformers model with the adapter cannot be saved", RuntimeError)
def test_r15_a_transformers_model_saves_its_adapter_by_its_own_method(stack, folder, tmp_path):
    model, config = llama(folder), stack.config(r=8, target_modules=["q_proj", "v_proj"])
    if stack is OURS:
        randlora_torch.get_peft_model(model, config)
    else:
        model.add_adapter(config)
    randomize(stack, model).eval()
    model.save_pretrained(tmp_path)
    again = llama(folder)
    (OURS.load if stack is OURS else type(again).load_adapter)(again, tmp_path)
    assert_same(logits(again), logits(model))


def damage_no_bases(tensors):
    return {key: value for key, value in tensors.items() if not key.endswith(("randlora_A", "randlora_B"))}


def damage_one_basis(tensors):
    key = "base_model.model.lin1.randlora_B"
    return {**tensors, key: tensors[key] * 2}


def damage_no_lambda(tensors):
    return {key: value for key, value in tensors.items() if key != "base_model.model.lin1.randlora_lambda"}


def damage_another_layer(tensors):
    key = "base_model.model.lin{}.randlora_gamma"
    return {**tensors, key.format(2): tensors[key.format(1)].clone()}


DAMAGES = {
    "no bases": (damage_no_bases, "holds no bases"),
    "copies of a basis that differ": (damage_one_basis, "differs from another copy of basis B"),
    "no lambda": (damage_no_lambda, r"lin1\.randlora_lambda: missing"),
    "gamma of another layer": (damage_another_layer, r"lin2\.randlora_lambda: missing"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
@broken_in_peft("R16, files are not validated", Failed)
def test_r16_a_file_that_is_not_a_whole_adapter_is_refused(stack, damage, message, tmp_path):
    saved(PEFT, tmp_path, target_modules=["lin0", "lin1"])
    save_file(damage(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        stack.load(mlp(), tmp_path)


# R17: merging and unmerging.


def cycle(model, times=10):
    for _ in range(times):
        model.merge_adapter()
        model.unmerge_adapter()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@broken_in_peft("R17, weights drift with each merge and unmerge")
def test_r17_ten_merges_and_unmerges_change_no_bit_of_a_weight(stack, dtype):
    model = stack.attach(mlp(10, 64, 64, 2).to(dtype), stack.config())
    base = single(stack, randomize(stack, model)).base_layer
    before = stored(base)
    cycle(model)
    assert_same(stored(base), before)


@broken_in_peft("R17, weights drift with each merge and unmerge")
def test_r17_ten_merges_and_unmerges_change_no_bit_of_an_8_bit_weight(stack, folder):
    model = adapted_llama(stack, folder, "8-bit", SQUARE)
    base = single(stack, model).base_layer
    before = stored(base)
    cycle(model)
    assert_same(stored(base), before)


@broken_in_peft("R2, a merge into 4 bits leaves a weight that is not packed", (AssertionError, RuntimeError))
def test_r17_ten_merges_and_unmerges_change_no_bit_of_a_4_bit_weight(stack, folder):
    model = adapted_llama(stack, folder, "4-bit", SQUARE)
    base = single(stack, model).base_layer
    before = stored(base)
    cycle(model)
    assert_same(stored(base), before)


# R18: kinds of layers.

UNSUPPORTED = ["embedding", "bilinear", "conv1", "conv2"]


@pytest.mark.parametrize("kind", UNSUPPORTED)
@broken_in_peft("R18, the refusal names neither the layer nor what could be adapted")
def test_r18_a_target_that_cannot_be_adapted_is_refused_by_name_with_what_can_be(stack, kind):
    allowed = r"is not a linear layer\. Adaptable layers end in: lin0, lin1, lin2\."
    with pytest.raises(ValueError, match=rf"target_modules entry '{kind}' .* It matches '{kind}', which {allowed}"):
        stack.attach(mlp(kind=Mixed), stack.config(target_modules=[kind]))


@pytest.mark.parametrize("kind", UNSUPPORTED)
@broken_in_peft("R18, a refusal comes after some layers were replaced")
def test_r18_a_refused_target_leaves_the_model_as_it_was(stack, kind):
    model = mlp(kind=Mixed)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"target_modules entry|is not supported"):
        stack.attach(model, stack.config(target_modules=["lin1", kind]))
    assert {name: type(module) for name, module in model.named_modules()} == before


@broken_in_peft("R18, there is no exclude_modules", TypeError)
def test_r18_layers_can_be_excluded(stack):
    model = stack.attach(mlp(), stack.config(target_modules="all-linear", exclude_modules=["lin0"]))
    assert sorted(stack.layers(model)) == ["lin1", "lin2"]


class Attention(nn.Module):
    """nn.MultiheadAttention reads the weight of its out_proj and never calls it."""

    def __init__(self):
        super().__init__()
        self.attention, self.lin = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        return self.lin(self.attention(x, x, x)[0])


@broken_in_peft("R18, an adapter on the out_proj of nn.MultiheadAttention is accepted and never applied", Failed)
def test_r18_the_output_projection_of_multihead_attention_is_refused(stack):
    with pytest.raises(ValueError, match=r"It matches 'attention\.out_proj', which is not a linear layer"):
        stack.attach(mlp(kind=Attention), stack.config(target_modules=["out_proj"]))


@broken_in_peft("R18, the fast path of nn.TransformerEncoderLayer reads the weights without the adapter")
def test_r18_the_fast_path_of_a_transformer_encoder_computes_with_the_adapter(stack):
    def encoder():
        torch.manual_seed(0)
        return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()

    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    config = stack.config(target_modules=["linear1", "linear2"])
    model = randomize(stack, stack.attach(encoder(), config)).eval()
    updates = {name: delta(layer) for name, layer in stack.layers(model).items()}
    want = with_updates(encoder(), updates, x)
    assert (want - outputs(encoder(), x)).abs().max() > 0.1
    assert_close(outputs(model, x), want)


# R19, R20.


@pytest.mark.parametrize("r", [0, -1])
@broken_in_peft("R19, an r below 1 becomes an error of division or of tensor shapes", (ZeroDivisionError, RuntimeError))
def test_r19_an_r_below_one_is_refused_with_the_reason(stack, r):
    with pytest.raises(ValueError, match=f"r={r}: must be at least 1"):
        stack.attach(mlp(), stack.config(r=r, randlora_alpha=1))


@pytest.mark.parametrize("saved_with", [None, True, False], ids=["new", "loaded with bases", "loaded without bases"])
@broken_in_peft("R20, on a meta model the bases are lost", NotImplementedError)
def test_r20_an_adapter_on_a_meta_model_works_once_the_model_has_its_weights(stack, saved_with, tmp_path):
    config = stack.config(target_modules=["lin0", "lin1"], save_projection=saved_with is not False)
    model = randomize(stack, stack.attach(mlp(), config)).eval()
    want = outputs(model)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = MLP()
    model = stack.attach(empty, config) if saved_with is None else stack.load(empty, tmp_path)
    bases = {name: layer.base_layer for name, layer in stack.layers(model).items()}
    for name, layer in {**bases, "lin2": empty.lin2}.items():
        layer.load_state_dict(mlp().get_submodule(name).state_dict(), assign=True)
    if saved_with is None or stack is PEFT:  # PEFT leaves even the loaded lambda and gamma on the meta device
        randomize(stack, model)
    assert_same(outputs(model.eval()), want)
