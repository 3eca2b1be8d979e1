"""The Pallas kernels: interpreted on CPU against the oracle, lowered for GPU and TPU, which nothing here runs on."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from crossing import cross
from stacks import CASES, SCALING, Case, draw_layer
from tolerances import TOLERANCE

from randlora_jax import adapted_linear, delta_weight, pallas_kernels
from randlora_jax.products import Operands, Update, fold
from tests.jax.programs import equations
from tests.jax.test_contraction import Drawn, assert_close

TARGETS = ("gpu", "tpu")
# (out, in), with three and two tiles of 16 on a side, and none a multiple of it, nor the number of bases of anything.
TILED = {"tall": Case((40, 24), 4), "odd": Case((33, 17), 5), "one tile": Case((9, 8), 3), "a chunk": Case((48, 32), 2)}
ALL = [(target, name, transposed) for target in TARGETS for name in TILED for transposed in (False, True)]
QUICK = [("gpu", "tall", False), ("gpu", "odd", True), ("tpu", "tall", True), ("tpu", "odd", False)]
marked = [each if each in QUICK else pytest.param(*each, marks=pytest.mark.slow) for each in ALL]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in arrays that are quick to interpret."""
    monkeypatch.setattr(pallas_kernels, "GPU_TILE", 16)
    monkeypatch.setattr(pallas_kernels, "TPU_TILE", 16)


def operands_of(drawn):
    A, B, lam, gamma = (jnp.asarray(drawn[name]) for name in ("A", "B", "lam", "gamma"))
    return Operands(A[:, 0], B, lam, gamma)


def ternary(drawn):
    return {**drawn, "B": np.sign(np.round(np.float32(drawn["B"]))).astype(np.int8)}


def computed(drawn, weight, target, transposed, dtype=None):
    """W + dW, and the gradients of lambda and gamma for the gradient W, as numpy arrays with the long side first."""
    update, turned = Update(SCALING, dtype, transposed), jnp.asarray(weight.T if transposed else weight)
    options = {"update": update, "target": target, "interpret": True}
    folded = jax.jit(functools.partial(pallas_kernels._fold, result=weight.dtype, **options))
    project = jax.jit(functools.partial(pallas_kernels._project, **options))
    operands = operands_of(drawn)
    full = np.asarray(folded(turned, operands))
    return full.T if transposed else full, project(operands, turned)


def drawn_weight(case, dtype=np.float32):
    return np.random.default_rng(1).standard_normal(case.shape).astype(dtype)


@pytest.mark.parametrize(("target", "name", "transposed"), marked)
def test_the_kernels_compute_the_oracles_update_and_gradients_whatever_the_tiles(target, name, transposed):
    case = TILED[name]
    drawn, weight = draw_layer(case, spare=0), drawn_weight(case)
    given = {"scaling": SCALING, "shape": case.shape}
    got, grads = computed(drawn, weight, target, transposed)
    np.testing.assert_allclose(got, weight + oracle.delta_weight(**drawn, **given), **TOLERANCE["float32"])
    want = oracle.gradients(**drawn, **given, upstream=weight)
    for grad, wanted in zip(grads, want, strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@cross(target=TARGETS, dtypes=[("bfloat16", "int8"), ("float16", "float16")])
def test_weights_and_bases_of_any_dtype_are_read_and_only_the_result_is_rounded(target, dtypes):
    weights, bases = dtypes
    case = TILED["one tile"]
    drawn = ternary(draw_layer(case, spare=0)) if bases == "int8" else draw_layer(case, bases=bases, spare=0)
    weight = drawn_weight(case, jnp.dtype(weights))
    got, _ = computed(drawn, weight, target, transposed=True)
    assert got.dtype == weight.dtype
    want = np.float64(weight) + oracle.delta_weight(**drawn, scaling=SCALING, shape=case.shape)
    half_a_unit = float(jnp.finfo(weights).eps) / 2
    np.testing.assert_allclose(np.float64(got), want, rtol=1.01 * half_a_unit, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_a_dtype_rounds_the_factors_of_the_products(target):
    case = TILED["one tile"]
    drawn, weight, dtype = draw_layer(case, spare=0), drawn_weight(case), np.dtype(jnp.bfloat16)
    got, _ = computed(drawn, weight, target, transposed=False, dtype=dtype)
    want = fold(jnp.asarray(weight), operands_of(drawn), Update(SCALING, dtype, transposed=False))
    np.testing.assert_allclose(got, want, **TOLERANCE["float32"])
    exact = fold(jnp.asarray(weight), operands_of(drawn), Update(SCALING, None, transposed=False))
    assert np.abs(got - exact).max() > 1e-2


# Behind the public functions


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_adapted_linear_by_pallas_has_the_values_and_gradients_of_the_oracle(name):
    drawn = Drawn(CASES[name])
    assert_close(drawn.computed(plan="folded", kernels="pallas"), drawn.wanted(), "float32")


def test_delta_weight_by_pallas_is_that_by_xla_and_so_are_its_derivatives_of_second_order():
    _, _, A, B, lam, gamma = Drawn(CASES["wide"]).arguments

    def curvature(kernels):
        def loss(lam, gamma):
            return (delta_weight(A, B, lam, gamma, scaling=SCALING, kernels=kernels) ** 2).sum()

        @jax.jit
        def computed(lam, gamma):
            return jax.jvp(jax.value_and_grad(loss, argnums=(0, 1)), (lam, gamma), (jnp.cos(lam), jnp.sin(gamma)))

        return computed(lam, gamma)

    got, want = curvature("pallas"), curvature("xla")
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5 * scale)


REALISTIC = {"n=32": (4096, 1024, 32), "n=96": (3072, 3072, 32), "padded": (1000, 700, 16)}  # D, d, r


def lowered(function, platform, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


CALLS = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}


@cross(sizes=[("n=32", "bfloat16"), ("n=96", "int8"), ("padded", "bfloat16")], platform=list(CALLS))
def test_a_training_step_is_lowered_to_three_calls_of_kernels(platform, sizes, monkeypatch):
    monkeypatch.undo()  # tiles as on the device
    size, bases = sizes
    D, d, r = REALISTIC[size]
    n, array = -(-d // r), jax.ShapeDtypeStruct
    x, kernel = array((8, d), jnp.bfloat16), array((d, D), jnp.bfloat16)
    adapter = [array((r, d), jnp.bfloat16), array((D, n, r), bases), array((r, n), jnp.float32)]

    def loss(x, kernel, A, B, lam, gamma):
        options = {"plan": "folded", "kernels": "pallas", "dtype": jnp.bfloat16}
        return adapted_linear(x, kernel, A, B, lam, gamma, scaling=SCALING, **options).astype(jnp.float32).sum()

    step = jax.value_and_grad(loss, argnums=(0, 4, 5))
    text = lowered(step, platform, x, kernel, *adapter, array((n, d), jnp.float32))
    assert text.count(CALLS[platform]) == 3  # W' forward, W' again, the gradients


def test_the_scaled_bases_are_nowhere_in_the_program():
    case = Case((96, 64), 4)
    x, kernel, A, B, lam, gamma = Drawn(case).arguments

    def shapes(kernels):
        def loss(x, lam, gamma):
            options = {"plan": "folded", "kernels": kernels}
            return adapted_linear(x, kernel, A, B, lam, gamma, scaling=SCALING, **options).sum()

        program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, lam, gamma)
        return {variable.aval.shape for equation in equations(program) for variable in equation.outvars}

    assert (64, 64) in shapes("xla")
    assert not {(64, 64), (4, 16, 64)} & shapes("pallas")


def test_kernels_that_do_not_exist_or_cannot_take_the_dtype_are_refused():
    x, kernel, *rest = Drawn(CASES["wide"]).arguments
    message = r"kernels='cuda' is not known: choose one of \['xla', 'pallas'\]\."
    with pytest.raises(ValueError, match=message):
        adapted_linear(x, kernel, *rest, scaling=1.0, kernels="cuda")
    with pytest.raises(ValueError, match=message):
        delta_weight(*rest, scaling=1.0, kernels="cuda")
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"float32, but lambda or gamma is float64: use kern"):
        delta_weight(*rest[:2], *(part.astype(jnp.float64) for part in rest[2:]), scaling=1.0, kernels="pallas")
