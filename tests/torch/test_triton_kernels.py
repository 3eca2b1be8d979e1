"""Triton's kernels against the oracle, in Triton's interpreter, and compiled for GPUs that are not there.

Tiles are as small as they get, so that small layers have several, and the last ones are not full.
"""

import importlib.util
import itertools

import numpy as np
import oracle
import pytest
import torch
from stacks import Case
from strategies import draw_factors
from tolerances import TOLERANCE

from randlora_torch import fused, kernel_choice
from randlora_torch.kernel_choice import Chooser, agree
from randlora_torch.packed import Packed4bit, Rows8bit
from tests.torch.workers.interpreter import Interpreter

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from randlora_torch.triton_kernels import Tiles, fold_tiles, folded_weight, projected_gradient, projection_tiles

SCALING = 1.5
SMALL = Tiles(16, 16, 16)
SMALL_PROJECTION = Tiles(16, 16, 32)
CASES = {
    "square": Case((32, 32), 4),
    "tall": Case((40, 24), 6),
    "wide": Case((24, 40), 6),
    "r does not divide, tall": Case((37, 21), 4),
    "r does not divide, wide": Case((21, 37), 5),
    "r of one": Case((20, 19), 1),
    "r above the short side": Case((10, 6), 8),
    "one output": Case((1, 5), 1),
    "one input": Case((5, 1), 2),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
ODD = CASES["r does not divide, tall"], CASES["r does not divide, wide"]
both_ways = pytest.mark.parametrize("case", ODD, ids=["tall", "wide"])
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS = ("none", *DTYPES, "nf4", "fp4", "int8")
BASES = (*DTYPES, "ternary")


@pytest.fixture(scope="module")
def interpreted():
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


def fenced(tensor):
    """The same numbers, among others that no kernel may read."""
    poison = torch.nan if tensor.is_floating_point() else 127
    buffer = torch.full([size + 3 for size in tensor.shape], poison, dtype=tensor.dtype)
    inside = buffer[tuple(slice(size) for size in tensor.shape)]
    return inside.copy_(tensor)


def factors_of(case, bases="float32", factors="float32"):
    """A, B, lambda and gamma as the kernels get them, bases sliced from larger ones; the oracle's in float64."""
    drawn = {name: torch.tensor(value) for name, value in draw_factors(0, shape=case.shape, r=case.r).items()}
    if bases == "ternary":
        drawn["B"] = drawn["B"].clamp(-1.4, 1.4).round().to(torch.int8)
    else:
        drawn["A"], drawn["B"] = drawn["A"].to(DTYPES[bases]), drawn["B"].to(DTYPES[bases])
    drawn["lam"], drawn["gamma"] = drawn["lam"].to(DTYPES[factors]), drawn["gamma"].to(DTYPES[factors])
    B = fenced(drawn["B"].flatten(1)).unflatten(1, drawn["B"].shape[1:])  # each row in one piece
    arguments = (fenced(drawn["A"][:, 0]), B, drawn["lam"], fenced(drawn["gamma"]))
    return arguments, {name: value.double().numpy() for name, value in drawn.items()}


def weight_of(kind, shape):
    """A weight as a kernel gets it, and its numbers, which for quantized ones bitsandbytes dequantized."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if kind == "none":
        return None, torch.zeros(shape)
    if kind in DTYPES:
        return fenced(weight.to(DTYPES[kind])), weight.to(DTYPES[kind])
    functional = pytest.importorskip("bitsandbytes").functional
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return Rows8bit(fenced(codes), scales), functional.int8_vectorwise_dequant(codes, scales)
    row = weight.reshape(1, -1)  # as a matrix of one row, bitsandbytes dequantizes all shapes rightly on CPUs
    packed, state = functional.quantize_4bit(row, blocksize=64, quant_type=kind)
    values = functional.dequantize_4bit(packed, state).reshape(shape)
    return Packed4bit(packed, state.absmax, state.code, state.blocksize, shape), values


def assert_near(got, want, tolerance):
    """Within the tolerance, whose atol is in units of a typical result: terms are rounded that cancel in the sum."""
    typical = max(1.0, np.sqrt(np.mean(np.square(want))))
    np.testing.assert_allclose(got.double().numpy(), want, rtol=tolerance["rtol"], atol=typical * tolerance["atol"])


def assert_folds(interpreted, case, weight="float32", bases="float32", dtype="float32", factors="float32"):
    arguments, drawn = factors_of(case, bases, factors)
    stored, values = weight_of(weight, case.shape)
    options = {"scaling": SCALING, "dtype": DTYPES[dtype], "out_features": case.shape[0], "tiles": SMALL}
    got = interpreted("folded_weight", stored, *arguments, **options)
    assert got.dtype == DTYPES[dtype]
    want = values.double().numpy() + oracle.delta_weight(**drawn, scaling=SCALING, shape=case.shape)
    assert_near(got, want, TOLERANCE[dtype])


def assert_projects(interpreted, case, bases="float32", dtype="float32", factors="float32", turned=False, **patched):
    arguments, drawn = factors_of(case, bases, factors)
    sides = case.shape[::-1] if turned else case.shape
    gradient = fenced(torch.randn(sides, generator=torch.Generator().manual_seed(2)).to(DTYPES[dtype]))
    gradient = gradient.T if turned else gradient
    options = {"scaling": SCALING, "tiles": SMALL_PROJECTION, "patched": patched}
    got = interpreted("projected_gradient", gradient, *arguments, **options)
    upstream = gradient.double().numpy()
    wanted = oracle.gradients(**drawn, scaling=SCALING, shape=case.shape, upstream=upstream)
    for grad, want in zip(got, wanted, strict=True):
        assert grad.dtype == torch.float32
        assert_near(grad, want, TOLERANCE[dtype, "gradient"])


@every_case
def test_the_folded_weight_is_the_weight_and_the_sum_over_bases(interpreted, case):
    assert_folds(interpreted, case)


@both_ways
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_are_read_however_they_are_stored(interpreted, case, kind):
    assert_folds(interpreted, case, weight=kind)


@both_ways
@pytest.mark.parametrize("bases", BASES)
def test_bases_are_read_however_they_are_stored(interpreted, case, bases):
    assert_folds(interpreted, case, bases=bases)
    assert_projects(interpreted, case, bases=bases)


@both_ways
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_in_half_precision_round_operands_and_the_result_to_it_and_nothing_else(interpreted, case, dtype):
    for bases in (dtype, "ternary"):
        assert_folds(interpreted, case, weight=dtype, bases=bases, dtype=dtype, factors=dtype)
        assert_projects(interpreted, case, bases=bases, dtype=dtype, factors=dtype)


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_weight_and_basis_in_every_dtype(interpreted, case, weight):
    for bases, dtype, factors in itertools.product(BASES, DTYPES, ("float32", "bfloat16")):
        assert_folds(interpreted, case, weight, bases, dtype, factors)
        if weight == "none":
            assert_projects(interpreted, case, bases, dtype, factors)


@both_ways
def test_a_transposed_weight_is_read_by_its_strides(interpreted, case):
    arguments, _ = factors_of(case)
    stored, values = weight_of("float32", case.shape[::-1])
    options = {"scaling": SCALING, "dtype": torch.float32, "tiles": SMALL}
    got = interpreted("folded_weight", stored.T, *arguments, **options)
    torch.testing.assert_close(got, interpreted("folded_weight", values.T.contiguous(), *arguments, **options))


def test_the_update_alone_has_its_long_side_first_unless_told_otherwise(interpreted):
    arguments, drawn = factors_of(CASES["wide"])
    got = interpreted("folded_weight", None, *arguments, scaling=SCALING, dtype=torch.float32, tiles=SMALL)
    want = oracle.delta_weight(**drawn, scaling=SCALING, shape=(24, 40))
    np.testing.assert_allclose(got.numpy(), want.T, **TOLERANCE["float32"])


@every_case
def test_projected_gradients_are_those_of_lambda_and_gamma(interpreted, case):
    assert_projects(interpreted, case)


@both_ways
def test_the_gradient_of_the_weight_is_read_by_its_strides(interpreted, case):
    assert_projects(interpreted, case, turned=True)


@every_case
def test_a_program_that_takes_several_groups_of_k_adds_them_up(interpreted, case):
    assert_projects(interpreted, case, _ENOUGH_PROGRAMS=1)


def test_large_tiles_on_small_layers_compute_the_same(interpreted):
    case = CASES["r does not divide, tall"]
    arguments, _ = factors_of(case)
    weight, _ = weight_of("float32", case.shape)
    options = {"scaling": SCALING, "dtype": torch.float32}
    want = interpreted("folded_weight", weight, *arguments, **options, tiles=SMALL)
    wanted = interpreted("projected_gradient", weight, *arguments, scaling=SCALING, tiles=SMALL_PROJECTION)
    for dtype in (torch.float32, torch.bfloat16):  # whose likeliest tiles differ
        got = interpreted("folded_weight", weight, *arguments, **options, tiles=fold_tiles(dtype)[0])
        torch.testing.assert_close(got, want, **TOLERANCE["float32"])
        tiles = projection_tiles(dtype)[0]
        got = interpreted("projected_gradient", weight, *arguments, scaling=SCALING, tiles=tiles)
        torch.testing.assert_close(got, wanted, **TOLERANCE["float32", "gradient"])


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_packed_weight_dequantizes_to_what_bitsandbytes_says(kind):
    stored, values = weight_of(kind, (37, 21))
    assert tuple(stored.shape) == (37, 21)
    torch.testing.assert_close(stored.dequantize(), values, rtol=3e-7, atol=0)


def test_what_the_kernels_cannot_read_is_refused():
    (A, B, lam, gamma), _ = factors_of(CASES["tall"])
    with pytest.raises(ValueError, match=r"bases_B of shape \(40, 4, 6\) has strides .* Pass bases_B\.contiguous\(\)"):
        folded_weight(None, A, B.transpose(0, 1).contiguous().transpose(0, 1), lam, gamma, scaling=1.0, dtype=A.dtype)
    with pytest.raises(ValueError, match=r"dtype=torch\.float64 has no kernel: choose one of \[torch\.float32"):
        projected_gradient(torch.zeros(40, 24), A, B, lam, gamma, scaling=1.0, dtype=torch.float64)


@pytest.mark.parametrize(
    ("milliseconds", "torch_lam", "chosen"),
    [([2.0, 1.5, 1.9], 1.0, "64 64 32 4 3"), ([2.0, 1.9, 1.95], 1.0, "torch"), ([2.0, 1.0, 1.0], 1.5, "torch")],
    ids=["faster", "too little faster", "wrong"],
)
def test_a_fold_is_tried_out_with_an_update_that_is_not_0(interpreted, milliseconds, torch_lam, chosen):
    case = CASES["tall"]
    (A, B, lam, gamma), _ = factors_of(case)
    weight, values = weight_of("nf4", case.shape)
    options = {"scaling": SCALING, "dtype": torch.float32, "out_features": case.shape[0]}
    trial = {"milliseconds": milliseconds, "torch_lam": torch_lam}
    results, choices = interpreted("fold_by_choice", weight, (A, B, 0 * lam, gamma), **trial, **options)
    assert [choice.chosen for choice in choices] == [chosen]
    assert choices[0].call == ("fold", (40, 24), 6, "4bit", "float32", "float32", "cpu")
    for result in results:
        torch.testing.assert_close(result, values)


# Compiled for compute capability 9.0 and 8.0, Llama-3.2-3B's sizes; memory of none of it is touched.


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, device="meta", dtype=dtype)


def bases_like(shape, bases, r=32):
    long, short = max(shape), min(shape)
    n = -(-short // r)
    return empty(r, short), empty(long, n, r, dtype=bases), empty(r, n), empty(n, short)


def weight_like(kind, shape):
    count = shape[0] * shape[1]
    if kind == "nf4":
        return Packed4bit(empty(count // 2, dtype=torch.uint8), empty(count // 64), empty(16), 64, shape)
    if kind == "int8":
        return Rows8bit(empty(*shape, dtype=torch.int8), empty(shape[0]))
    return empty(*shape, dtype=DTYPES[kind])


NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.uint8: "u8"}


def compiled(launch, capability):
    """What a GPU would load, of the kernel specialized as for these arguments."""
    signature, constants, aligned = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = f"*{NAMES[value.dtype]}" if is_tensor else {int: "i32", float: "fp32"}[type(value)]
        if is_tensor or (type(value) is int and value % 16 == 0):
            aligned[position,] = [["tt.divisibility", 16]]
    options = {"num_warps": launch.tiles.warps, "num_stages": launch.tiles.stages}
    source = ASTSource(launch.kernel, signature, constants, aligned)
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)


def assert_compiles(launches, capability, monkeypatch, tmp_path, half=True):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (launch,) = launches
    built = compiled(launch, capability)
    assert f".target sm_{capability}" in built.asm["ptx"]
    assert built.asm["cubin"].startswith(b"\x7fELF")
    limit = {80: 163, 90: 227}[capability] * 1024  # bytes of shared memory that a program can have
    assert 0 < built.metadata.shared <= limit
    assert any(name in built.asm["ptx"] for name in ("wgmma", "mma.sync")) == half  # in tensor cores


def compile_fold(shape, weight, bases, dtype, capability, tiles, monkeypatch, tmp_path):
    launches = []
    options = {"scaling": 2.0, "dtype": DTYPES[dtype], "tiles": tiles, "start": launches.append}
    folded_weight(weight_like(weight, shape), *bases_like(shape, bases), **options)
    assert_compiles(launches, capability, monkeypatch, tmp_path, half=dtype != "float32")


def compile_projection(shape, bases, dtype, capability, tiles, monkeypatch, tmp_path):
    launches, gradient = [], empty(*shape, dtype=DTYPES[dtype])
    projected_gradient(gradient, *bases_like(shape, bases), scaling=2.0, tiles=tiles, start=launches.append)
    assert_compiles(launches, capability, monkeypatch, tmp_path, half=dtype != "float32")


UP, DOWN = (8192, 3072), (3072, 8192)
QUICK_FOLDS = [
    (UP, "bfloat16", torch.bfloat16, "bfloat16", 90),
    (DOWN, "nf4", torch.bfloat16, "bfloat16", 80),
    (UP, "int8", torch.int8, "bfloat16", 90),
    (UP, "float32", torch.float32, "float32", 80),
]
QUICK_PROJECTIONS = [(DOWN, torch.bfloat16, "bfloat16", 90), (UP, torch.int8, "bfloat16", 80)]


@pytest.mark.parametrize(("shape", "weight", "bases", "dtype", "capability"), QUICK_FOLDS)
def test_the_fold_compiles_for_gpus(shape, weight, bases, dtype, capability, monkeypatch, tmp_path):
    compile_fold(shape, weight, bases, dtype, capability, fold_tiles(DTYPES[dtype])[0], monkeypatch, tmp_path)


@pytest.mark.parametrize(("shape", "bases", "dtype", "capability"), QUICK_PROJECTIONS)
def test_the_projection_compiles_for_gpus(shape, bases, dtype, capability, monkeypatch, tmp_path):
    compile_projection(shape, bases, dtype, capability, projection_tiles(DTYPES[dtype])[0], monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shape", [UP, DOWN, (3072, 3072), (1024, 3072), (1, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_compiles_for_gpus(shape, dtype, capability, monkeypatch, tmp_path):
    for bases in (DTYPES[dtype], torch.float32, torch.int8):
        for tiles in projection_tiles(DTYPES[dtype]):
            compile_projection(shape, bases, dtype, capability, tiles, monkeypatch, tmp_path)
        for weight, tiles in itertools.product((dtype, "nf4", "int8"), fold_tiles(DTYPES[dtype])):
            compile_fold(shape, weight, bases, dtype, capability, tiles, monkeypatch, tmp_path)


# On a GPU, where there is one: whether it computes the same, and what it chooses.


def factors_on_gpu(shape, bases):
    random = torch.Generator("cuda").manual_seed(0)

    def draw(like):
        return torch.randn(like.shape, generator=random, device="cuda")

    A, B, lam, gamma = map(draw, bases_like(shape, torch.float32))
    if bases == "ternary":
        return A, B.clamp(-1.4, 1.4).round().to(torch.int8), lam, gamma
    return A, B.to(DTYPES[bases]), lam, gamma


def update(A, B, lam, gamma, shape):
    scaled_A = (lam[:, :, None] * A[:, None] * gamma).flatten(0, 1)
    delta = SCALING * B.flatten(1).to(lam.dtype) @ scaled_A
    return delta if len(delta) == shape[0] else delta.T


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [UP, DOWN, (1024, 3072), (37, 21), (1, 5)], ids=str)
@pytest.mark.parametrize("bases", ["bfloat16", "ternary", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_gpu_computes_what_torch_does_in_float64_the_same_bits_every_time(shape, bases, dtype):
    factors = factors_on_gpu(shape, bases)
    A, B, lam, gamma = (part.double() if part.is_floating_point() else part for part in factors)
    want = update(A, B, lam.requires_grad_(), gamma.requires_grad_(), shape)
    gradient = torch.randn_like(want, dtype=torch.float32).to(DTYPES[dtype])
    wanted = torch.autograd.grad(want, (lam, gamma), gradient.double())
    for tiles in fold_tiles(DTYPES[dtype]):
        got = folded_weight(None, *factors, scaling=SCALING, dtype=DTYPES[dtype], out_features=shape[0], tiles=tiles)
        assert_near(got.cpu(), want.detach().cpu().numpy(), TOLERANCE[dtype])
    for tiles in projection_tiles(DTYPES[dtype]):
        got, again = (projected_gradient(gradient, *factors, scaling=SCALING, tiles=tiles) for _ in range(2))
        for grad, same, wanted_grad in zip(got, again, wanted, strict=True):
            assert torch.equal(grad, same)
            assert_near(grad.cpu(), wanted_grad.cpu().numpy(), TOLERANCE[dtype, "gradient"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_chooses_by_its_own_times(monkeypatch):
    chooser = Chooser(kernel_choice.cuda_milliseconds)
    monkeypatch.setattr(fused, "chooser", chooser)
    A, B, lam, gamma = factors_on_gpu(UP, "bfloat16")
    weight = torch.randn(UP, device="cuda", dtype=torch.bfloat16)

    def torch_way(lam, gamma):
        return weight + update(A, B, lam, gamma, UP).to(torch.bfloat16)

    options = {"scaling": SCALING, "dtype": torch.bfloat16, "out_features": UP[0], "torch_way": torch_way}
    got = [fused.fold(weight, A, B, lam, gamma, **options) for _ in range(2)]
    assert agree(got[0], torch_way(lam, gamma), 5e-2)
    assert torch.equal(*got)
    (choice,) = chooser.made.values()
    assert set(choice.milliseconds) > {"torch"}, choice.reason
