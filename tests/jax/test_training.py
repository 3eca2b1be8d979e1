"""Gradient accumulation: exact against the large batch, with the update built once."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stacks import without_type_checks
from tolerances import TOLERANCE

from interop import RandLoraConfig
from randlora_jax import accumulate_gradients, effective_params, init
from tests.jax.programs import equations

CONFIG = RandLoraConfig(r=3, randlora_alpha=3, target_modules=["up", "down"])


def params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 3, dtype)  # noqa: E731
    return {"up": {"kernel": draw(8, 12), "bias": draw(12)}, "down": {"kernel": draw(12, 5)}}


def adapter(dtype=jnp.float32):
    made, rng = init(CONFIG, params(dtype)), np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 3, leaf.dtype)  # noqa: E731
    return made.with_trainable(jax.tree.map(draw, made.trainable))


def batch(rows=12):
    rng = np.random.default_rng(2)
    return {
        "x": jnp.asarray(rng.standard_normal((rows, 8)), jnp.float32),
        "y": jnp.asarray(rng.standard_normal((rows, 5)), jnp.float32),
    }


def errors(params, batch):
    hidden = jnp.tanh(batch["x"].astype(params["up"]["kernel"].dtype) @ params["up"]["kernel"] + params["up"]["bias"])
    return (hidden @ params["down"]["kernel"]).astype(jnp.float32) - batch["y"]


def mean_loss(params, batch):
    return (errors(params, batch) ** 2).mean()


def micro(batch, count):
    return jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch)


@functools.cache
def large_batch(dtype=jnp.float32):
    """Loss and gradients in one go."""
    whole = adapter(dtype)
    loss = lambda trainable: mean_loss(effective_params(params(dtype), whole.with_trainable(trainable)), batch())  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))(whole.trainable)


@pytest.mark.parametrize("count", [1, 4, 12])
def test_micro_batches_give_loss_and_gradients_of_the_large_batch(count):
    got = jax.jit(functools.partial(accumulate_gradients, mean_loss))(adapter(), params(), micro(batch(), count))
    chex.assert_trees_all_close(got, large_batch(), **TOLERANCE["float32", "gradient"])


@pytest.mark.slow
def test_sums_of_unequal_micro_batches_add_up_under_one_common_count():
    weights = jnp.asarray([1.0] * 5 + [0.0] * 7)  # a mask: the micro-batches count 4, 1 and 0 rows
    masked = batch() | {"weight": weights}

    def loss(params, batch):
        return ((errors(params, batch) ** 2).mean(-1) * batch["weight"]).sum() / weights.sum()

    got = accumulate_gradients(loss, adapter(), params(), micro(masked, 3), reduction="sum")
    want = accumulate_gradients(loss, adapter(), params(), micro(masked, 1), reduction="sum")
    chex.assert_trees_all_close(got, want, **TOLERANCE["float32", "gradient"])


def test_training_with_micro_batches_is_training_with_the_large_batch():
    optimizer = optax.adam(0.01)

    @functools.partial(jax.jit, static_argnums=2)
    def step(trainable, state, count):
        loss, grads = accumulate_gradients(
            mean_loss, adapter().with_trainable(trainable), params(), micro(batch(), count)
        )
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(trainable, updates), state, loss

    def train(count):
        trainable, losses = adapter().trainable, []
        state = optimizer.init(trainable)
        for _ in range(10):
            trainable, state, loss = step(trainable, state, count)
            losses.append(float(loss))
        return losses

    losses = train(1)
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(train(4), losses, rtol=1e-5)


def test_the_update_is_built_once_and_its_gradient_projected_once():
    """The product with B stands in the program once forward and once backward per layer, outside the loop."""
    wide = init(dataclasses.replace(CONFIG, r=7), params())
    jaxpr = jax.make_jaxpr(functools.partial(accumulate_gradients, mean_loss))(wide, params(), micro(batch(), 4))
    (scan,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    outside = [e for e in equations(jaxpr, skip="scan") if e.primitive.name == "dot_general"]
    inside = [e for e in equations(scan.params["jaxpr"]) if e.primitive.name == "dot_general"]
    factor_grads = [(2, 7), (2, 8), (1, 7), (1, 5)]  # small contractions, as are those with three axes
    products = [e.outvars[0].aval.shape for e in outside if e.outvars[0].aval.ndim == 2]
    assert sorted(set(products) - set(factor_grads)) == [(7, 5), (8, 12), (12, 5), (14, 8)]  # B U and B^T G
    assert len(products) == 4 + 4
    assert len(inside) == 2 + 3  # two layers forward; backward the gradients of two kernels and one input
    assert not any({7, 14} & set(operand.aval.shape) for e in inside for operand in e.invars)


def test_gradients_of_a_half_precision_model_are_summed_in_float32():
    half, wide = params(jnp.bfloat16), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params(jnp.bfloat16))
    loss, grads = accumulate_gradients(mean_loss, adapter(), half, micro(batch(), 6))
    want_loss, want = accumulate_gradients(mean_loss, adapter(), wide, micro(batch(), 6))
    chex.assert_trees_all_equal_dtypes(grads, want)
    np.testing.assert_allclose(loss, want_loss, rtol=0.05)
    chex.assert_trees_all_close(
        grads, want, atol=0.05 * max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    )
    program = jax.make_jaxpr(functools.partial(accumulate_gradients, mean_loss))(adapter(), half, micro(batch(), 6))
    (scan,) = [equation for equation in program.eqns if equation.primitive.name == "scan"]
    assert {aval.dtype for aval in scan.params["jaxpr"].out_avals} == {jnp.dtype(jnp.float32)}  # it stacks nothing


def test_auxiliary_values_come_back_stacked_over_the_micro_batches():
    def loss(params, batch):
        return mean_loss(params, batch), batch["x"].sum()

    (value, sums), _ = accumulate_gradients(loss, adapter(), params(), micro(batch(), 4), has_aux=True)
    np.testing.assert_allclose(value, large_batch()[0], rtol=1e-6)
    np.testing.assert_allclose(sums, micro(batch(), 4)["x"].sum((1, 2)), rtol=1e-6)


@pytest.mark.parametrize("batches", [{"x": jnp.ones((4, 2)), "y": jnp.ones((3, 2))}, {"x": jnp.ones(())}, {}])
def test_batches_without_a_common_axis_are_refused(batches):
    with pytest.raises(ValueError, match=r"every array must have the same first axis, over the micro-batches"):
        accumulate_gradients(mean_loss, adapter(), params(), batches)


def test_an_unknown_reduction_is_refused():
    with without_type_checks(), pytest.raises(ValueError, match=r"reduction='max': choose 'mean' or 'sum'"):
        accumulate_gradients(mean_loss, adapter(), params(), micro(batch(), 4), reduction="max")
