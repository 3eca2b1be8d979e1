"""The update in JAX: the laws of both stacks, and what only JAX has: residuals, transformations, compilations."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from stacks import CASES, DTYPES, SCALING, Case, Stack, UpdateLaws, draw_layer, every_case, few_cases, formula
from strategies import draw_adapter
from tolerances import TOLERANCE

import interop
from interop import RECIPES, RandLoraConfig
from randlora_jax import RandLoraAdapter, apply_delta, delta_weight, layer_bases, make_bases


class JaxStack(Stack):
    """Compiled, because eager JAX compiles every single operation of every shape."""

    cast, numpy = staticmethod(jnp.asarray), staticmethod(np.asarray)
    delta_weight = staticmethod(jax.jit(delta_weight, static_argnames="scaling"))
    apply_delta = staticmethod(jax.jit(apply_delta, static_argnames=("out_features", "scaling")))
    layer_bases = staticmethod(jax.jit(layer_bases, static_argnums=1))

    def gradients(self, function, *arguments):
        def total(*arguments):
            return function(*arguments).sum()

        return jax.jit(jax.grad(total, argnums=tuple(range(len(arguments)))))(*arguments)

    def wide(self):
        return jax.enable_x64(True)


class TestUpdate(UpdateLaws):
    stack = JaxStack()


def layer_of(case, seed=0, **dtypes):
    return TestUpdate().layer(draw_layer(case, seed, **dtypes), case)


def apply(x, arguments, case):
    return apply_delta(x, *arguments, out_features=case.shape[0], scaling=SCALING)


def stacked_layers(case, count, **dtypes):
    """The layers' shared bases, and their lambda and gamma stacked along a first axis."""
    layers = [layer_of(case, seed, **dtypes) for seed in range(count)]
    lam, gamma = (jnp.stack([layer[i] for layer in layers]) for i in (2, 3))
    return layers[0][:2], lam, gamma


@few_cases
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_inputs_are_multiplied_in_float32_and_only_the_result_is_rounded(case, dtype, rng):
    drawn = draw_layer(case, 2, factors=dtype)
    x = rng.standard_normal((4, case.shape[1])).astype(DTYPES[dtype])
    got = np.asarray(
        JaxStack.apply_delta(x, *TestUpdate().layer(drawn, case), out_features=case.shape[0], scaling=SCALING)
    )
    want = x.astype(np.float64) @ oracle.delta_weight(**drawn, scaling=SCALING, shape=case.shape).T
    # Half a unit in the last place, besides what float32 leaves.
    rounding = float(ml_dtypes.finfo(DTYPES[dtype]).eps) / 2
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=1.01 * rounding, atol=1e-4)


@few_cases
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_inputs_do_not_round_the_gradients_of_the_factors(case, dtype, rng):
    drawn = draw_layer(case, 8)
    x = rng.standard_normal((4, case.shape[1])).astype(DTYPES[dtype])
    A, B, *trainable = TestUpdate().layer(drawn, case)
    grads = JaxStack().gradients(lambda *t: apply(jnp.asarray(x), (A, B, *t), case), *trainable)
    rows = np.ones((case.shape[0], 4)) @ x.astype(np.float64)
    want = oracle.gradients(**drawn, scaling=SCALING, shape=case.shape, upstream=rows)
    for got, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(got, expected, **TOLERANCE["float32", "gradient"])


@every_case
def test_backward_keeps_its_arguments_and_nothing_derived_from_them(case, rng):
    # Above all not the scaled bases (r*n, d), nor A or B in a wider dtype.
    arguments = layer_of(case)
    x = jnp.asarray(rng.standard_normal((4, case.shape[1]), np.float32))
    for function, given in (
        (lambda *a: delta_weight(*a, scaling=SCALING), arguments),
        (lambda x, *a: apply(x, a, case), (x, *arguments)),
        (lambda lam, gamma: apply(x, (*arguments[:2], lam, gamma), case), arguments[2:]),
    ):
        _, backward = jax.vjp(function, *given)
        kept = sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(backward))
        allowed = [(array.shape, array.dtype.name) for array in (x, *arguments)]
        assert kept, "the residuals are not visible: this test sees nothing"
        for residual in kept:
            assert residual in allowed
            allowed.remove(residual)


def test_the_backward_pass_of_frozen_bases_contains_no_product_of_their_size():
    case = CASES["r does not divide, tall"]
    arguments = layer_of(case)
    grad = jax.jit(jax.grad(lambda lam, gamma: delta_weight(*arguments[:2], lam, gamma, scaling=SCALING).sum(), (0, 1)))
    dots = [line for line in grad.lower(*arguments[2:]).as_text().splitlines() if "dot_general" in line]
    assert dots
    for line in dots:  # the cotangent of B would be (12, 9) or (12, 3, 3)
        assert "-> tensor<12x" not in line


@pytest.mark.parametrize("case", [CASES["wide"], CASES["tall"]], ids=["wide", "tall"])
def test_jit_and_remat_equal_eager_in_value_and_gradients(case, rng):
    arguments = layer_of(case)
    x = jnp.asarray(rng.standard_normal((3, case.shape[1]), np.float32))

    def loss(x, lam, gamma):
        return (apply(x, (*arguments[:2], lam, gamma), case) ** 2).sum()

    want = jax.value_and_grad(loss, argnums=(0, 1, 2))(x, *arguments[2:])
    for variant in (jax.jit(loss), jax.checkpoint(loss), jax.jit(jax.checkpoint(loss))):
        got = jax.value_and_grad(variant, argnums=(0, 1, 2))(x, *arguments[2:])
        chex.assert_trees_all_close(got, want, **TOLERANCE["float32", "gradient"])


@pytest.mark.parametrize("case", [CASES["wide"], CASES["tall"]], ids=["wide", "tall"])
def test_forward_mode_over_the_gradients_is_autodiff_of_the_written_out_formula(case, rng):
    """As Hessian-vector products need it: estimates of curvature, second-order optimizers."""
    A, B, lam, gamma = layer_of(case, bases="float32")
    x = jnp.asarray(rng.standard_normal((3, case.shape[1]), np.float32))

    def written_out(lam, gamma):
        delta = formula(A, B, lam, gamma, SCALING)
        return x @ (delta.T if x.shape[1] == A.shape[1] else delta)

    def by_rule(lam, gamma, transposed):
        delta = delta_weight(A, B, lam, gamma, scaling=SCALING, transposed=transposed)
        return x @ (delta if transposed == (x.shape[1] == A.shape[1]) else delta.T)

    def hessian_vector_product(forward):
        gradient = jax.grad(lambda lam, gamma: (forward(lam, gamma) ** 2).sum(), argnums=(0, 1))
        return jax.jvp(gradient, (lam, gamma), (jnp.cos(lam), jnp.sin(gamma)))[1]

    want = hessian_vector_product(written_out)
    close = {"rtol": 1e-4, "atol": 1e-4 * max(float(jnp.abs(part).max()) for part in want)}
    chex.assert_trees_all_close(hessian_vector_product(functools.partial(by_rule, transposed=False)), want, **close)
    chex.assert_trees_all_close(hessian_vector_product(functools.partial(by_rule, transposed=True)), want, **close)
    branch = hessian_vector_product(lambda *factors: apply(x, (A, B, *factors), case))
    chex.assert_trees_all_close(branch, want, **close)


@pytest.mark.parametrize("case", [CASES["wide"], CASES["tall"]], ids=["wide", "tall"])
def test_vmap_over_adapters_is_a_loop_over_adapters(case, rng):
    bases, lam, gamma = stacked_layers(case, 3)
    x = jnp.asarray(rng.standard_normal((3, 5, case.shape[1]), np.float32))

    def loss(x, lam, gamma):
        return (apply(x, (*bases, lam, gamma), case) ** 2).sum()

    step = jax.value_and_grad(loss, argnums=(0, 1, 2))
    got = jax.vmap(step)(x, lam, gamma)
    looped = [step(*each) for each in zip(x, lam, gamma, strict=True)]
    want = jax.tree.map(lambda *each: jnp.stack(each), *looped)
    chex.assert_trees_all_close(got, want, **TOLERANCE["float32", "gradient"])
    deltas = jax.vmap(functools.partial(delta_weight, *bases, scaling=SCALING))(lam, gamma)
    each = [delta_weight(*bases, *pair, scaling=SCALING) for pair in zip(lam, gamma, strict=True)]
    chex.assert_trees_all_close(deltas, jnp.stack(each), **TOLERANCE["float32"])


@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
def test_scan_over_stacked_layers_is_a_loop_over_layers(remat, rng):
    case = Case((8, 8), 3)
    bases, lam, gamma = stacked_layers(case, 3)
    x = jnp.asarray(rng.standard_normal((4, 8), np.float32))

    def layer(bases, x, factors):
        return jnp.tanh(x + apply(x, (*bases, *factors), case)), None

    def scanned(bases, factors):
        body = functools.partial(jax.checkpoint(layer) if remat else layer, bases)
        return (jax.lax.scan(body, x, factors)[0] ** 2).sum()

    def looped(bases, factors):
        y = x
        for pair in zip(*factors, strict=True):
            y, _ = layer(bases, y, pair)
        return (y**2).sum()

    got = jax.jit(jax.value_and_grad(scanned, argnums=1))(bases, (lam, gamma))
    want = jax.value_and_grad(looped, argnums=1)(bases, (lam, gamma))
    chex.assert_trees_all_close(got, want, **TOLERANCE["float32", "gradient"])


def test_an_adapter_as_argument_compiles_once_for_all_adapters_of_equal_config():
    first, second = (RandLoraAdapter.from_interop(draw_adapter(seed)) for seed in (0, 1))
    assert first.config is not second.config
    update = jax.jit(lambda adapter: adapter.delta_weight("block.0.up"))
    for adapter in (first, second, first.with_trainable(second.trainable), jax.tree.map(jnp.negative, second)):
        chex.assert_trees_all_close(update(adapter), adapter.delta_weight("block.0.up"), **TOLERANCE["float32"])
    assert update._cache_size() == 1
    update(RandLoraAdapter.from_interop(draw_adapter(0, randlora_alpha=1)))
    assert update._cache_size() == 2


KINDS = [{}, {"sparse": True}, {"very_sparse": True}, {"projection_prng_key": -17}]


@pytest.mark.parametrize("fields", KINDS, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_bases_are_those_of_interop_bit_for_bit(recipe, fields):
    config = RandLoraConfig(r=4, **fields)
    ours = make_bases(config, max_dim=24, min_dim=17, recipe=recipe)
    theirs = interop.make_bases(config, max_dim=24, min_dim=17, recipe=recipe)
    for mine, numpys in zip(ours, theirs, strict=True):
        assert isinstance(mine, jax.Array)
        assert mine.dtype == numpys.dtype
        assert np.asarray(mine).tobytes() == numpys.tobytes()


def test_bases_that_cannot_be_made_raise_the_errors_of_interop():
    with pytest.raises(ValueError, match=r"recipe='torch' is not known: choose one of"):
        make_bases(RandLoraConfig(r=4), max_dim=8, min_dim=8, recipe="torch")
    with pytest.raises(ValueError, match=r"max_dim=4, min_dim=8: needs 1 <= min_dim <= max_dim\. Swap them\?"):
        make_bases(RandLoraConfig(r=4), max_dim=4, min_dim=8)
