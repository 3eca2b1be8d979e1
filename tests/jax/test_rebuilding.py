"""`rebuild_weights`: a policy of `jax.checkpoint` under which backward makes W + dW again instead of keeping it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.ad_checkpoint import checkpoint_policies

from randlora_jax import (
    AdaLoraConfig,
    Layout,
    RandLoraConfig,
    RandLoraParam,
    adalora,
    attach,
    bound_bases,
    init,
    lazy_params,
    rebuild_weights,
)

LAYERS, WIDTH, ROWS = 6, 64, 16  # kernels weigh more than activations
LAYOUT = {"layers.dense": Layout((1,), (2,), stack_axes=(0,))}
CONFIG = RandLoraConfig(r=8, target_modules=["dense"], init_weights=False)
KERNELS = 4 * LAYERS * WIDTH * WIDTH  # bytes
POLICIES = {"none": None, "ours": rebuild_weights}


class Layer(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return x + jnp.tanh(linen.Dense(WIDTH, use_bias=False, name="dense")(x)), None


class Model(linen.Module):
    policy: object = None

    @linen.compact
    def __call__(self, x):
        layer = Layer if self.policy is None else linen.remat(Layer, policy=self.policy)
        stack = linen.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return (stack(name="layers")(x, None)[0] ** 2).mean()


def inputs(rows=ROWS):
    return jnp.asarray(np.random.default_rng(0).standard_normal((rows, WIDTH)), jnp.float32)


@functools.cache
def linen_params():
    return Model().init(jax.random.key(0), inputs())


def linen_gradients(policy, adapter):
    """The jitted gradient function of the linen model with its arguments."""

    def loss(trainable, adapter, params, x):
        return Model(policy).apply(lazy_params(params, adapter.with_trainable(trainable)), x)

    return jax.jit(jax.grad(loss)), (adapter.trainable, adapter, linen_params(), inputs())


class NnxModel(nnx.Module):
    def __init__(self, policy):
        make = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs))
        self.layers = nnx.Dict({"dense": make(nnx.Rngs(0).split(LAYERS))})
        self.policy = policy

    def __call__(self, x):
        layer = lambda x, dense: x + jnp.tanh(dense(x))  # noqa: E731
        step = layer if self.policy is None else nnx.remat(layer, policy=self.policy)
        return (nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers["dense"]) ** 2).mean()


def nnx_gradients(policy):
    model = attach(NnxModel(policy), CONFIG, layouts=LAYOUT, rngs=nnx.Rngs(0))
    graph, trainable, rest = nnx.split(model, RandLoraParam, ...)

    def loss(trainable, rest, x):
        merged = nnx.merge(graph, trainable, rest, copy=True)
        with bound_bases(merged):
            return merged(x)

    return jax.jit(jax.grad(loss)), (trainable, rest, inputs())


def made_with(gradients, *given):
    """By policy: the gradients, and the bytes of temporaries."""
    measured = {}
    for name, policy in POLICIES.items():
        function, arguments = gradients(policy, *given)
        compiled = function.lower(*arguments).compile({"xla_backend_optimization_level": 0})
        measured[name] = compiled(*arguments), compiled.memory_analysis().temp_size_in_bytes
    return measured


def adapter_of(config):
    if isinstance(config, RandLoraConfig):
        return init(config, linen_params(), layouts=LAYOUT, key=jax.random.key(1))
    return adalora.init(config, linen_params(), layouts=LAYOUT, key=jax.random.key(1))


def assert_rebuilds(measured):
    (want, before), (got, after) = measured["none"], measured["ours"]
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-7)
    assert before - after > 0.6 * KERNELS  # W + dW of every layer is gone, but for the one or two at hand


def test_a_scanned_linen_model_needs_a_kernel_less_per_layer_and_has_the_same_gradients():
    assert_rebuilds(made_with(linen_gradients, adapter_of(CONFIG)))


def test_a_scanned_nnx_model_needs_a_kernel_less_per_layer_and_has_the_same_gradients():
    assert_rebuilds(made_with(nnx_gradients))


def test_so_does_adalora():
    config = AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, total_step=9, target_modules=["dense"])
    adapter = adapter_of(config)
    shaken = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), adapter)
    assert_rebuilds(made_with(linen_gradients, adapter.with_trainable(shaken.trainable)))


def test_a_policy_that_names_the_weight_only_would_save_what_it_is_made_of():
    """Why `rebuild_weights` is not `save_anything_except_these_names`: it is asked for equations, one at a time."""
    by_name = checkpoint_policies.save_anything_except_these_names("randlora_weight")
    function, arguments = linen_gradients(by_name, adapter_of(CONFIG))
    ours, _ = linen_gradients(rebuild_weights, adapter_of(CONFIG))
    sizes = [f.lower(*arguments).compile().memory_analysis().temp_size_in_bytes for f in (function, ours)]
    assert sizes[0] - sizes[1] > 0.6 * KERNELS


def test_forward_mode_over_the_gradients_under_the_policy_is_that_without_it():
    adapter = adapter_of(CONFIG)

    def curvature(policy):
        def loss(step):
            factors = jax.tree.map(lambda leaf: leaf * step, adapter.trainable)
            return Model(policy).apply(lazy_params(linen_params(), adapter.with_trainable(factors)), inputs(2))

        return jax.jit(jax.jacfwd(jax.grad(loss)))(1.0)

    np.testing.assert_allclose(curvature(rebuild_weights), curvature(None), rtol=1e-4)
