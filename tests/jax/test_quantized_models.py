"""Training over a quantized base: the surfaces compute as over the dequantized one, and the codes stay as they are."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from crossing import cross
from flax import linen, nnx
from tolerances import TOLERANCE

from interop import RandLoraConfig
from randlora_jax import (
    Layout,
    RandLoraParam,
    accumulate_gradients,
    attach,
    bound_bases,
    detach,
    effective_params,
    extract,
    init,
    lazy_params,
    merge,
)
from randlora_jax.nnx_weight import RandLoraWeight
from randlora_jax.quantized import dequantize, from_bnb, is_quantized, stack
from tests.jax.test_quantized import eight_bit, four_bit

CONFIG = RandLoraConfig(r=3, randlora_alpha=3, target_modules=["up"])  # "down" is quantized, but not adapted


def qarray(shape, seed=0):
    """An nf4 `qwix.QArray` for a kernel (in, out)."""
    qwix = pytest.importorskip("qwix")
    kernel = jnp.asarray(np.random.default_rng(seed).standard_normal(shape[::-1]), jnp.float32)
    return qwix.quantize(kernel, "nf4", channelwise_axes=(1,), tiled_axes={0: 4})


KINDS = {
    "4bit": lambda shape, seed=0: from_bnb(four_bit(shape, seed=seed)),
    "8bit": lambda shape, seed=0: from_bnb(eight_bit(shape, seed=seed)),
    "QArray": qarray,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
OUT_IN = {"up": (12, 8), "down": (8, 12)}


def quantized(kind):
    """Params of an MLP with two quantized kernels (in, out) and a plain bias."""
    return {name: {"kernel": KINDS[kind](shape), "bias": jnp.ones(shape[0])} for name, shape in OUT_IN.items()}


def dense(params):
    return jax.tree.map(dequantize, params, is_leaf=is_quantized)


def batch():
    return jnp.asarray(np.random.default_rng(1).standard_normal((4, 8)), jnp.float32)


def forward(params, x):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"] + params["down"]["bias"]


def randomized(adapter):
    rng = np.random.default_rng(2)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 3, leaf.dtype)  # noqa: E731
    return adapter.with_trainable(jax.tree.map(draw, adapter.trainable))


class Model(linen.Module):
    """The MLP in linen."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(8, name="down")(jnp.tanh(linen.Dense(12, name="up")(x)))


class Net(nnx.Module):
    """The MLP in NNX, with given params."""

    def __init__(self, params):
        self.up, self.down = nnx.Linear(8, 12, rngs=nnx.Rngs(0)), nnx.Linear(12, 8, rngs=nnx.Rngs(0))
        for name in OUT_IN:
            layer = getattr(self, name)
            layer.kernel, layer.bias = nnx.Param(params[name]["kernel"]), nnx.Param(params[name]["bias"])

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def functional(surface):
    def outputs(params, adapter, x):
        if surface == "effective_params":
            return forward(effective_params(params, adapter), x)
        return Model().apply({"params": lazy_params(params, adapter)}, x)

    return outputs


@cross(kind=list(KINDS), surface=["effective_params", "lazy_params"])
def test_outputs_and_gradients_are_those_over_the_dequantized_base(kind, surface):
    params = quantized(kind)
    adapter = randomized(init(CONFIG, params))

    @jax.jit
    def run(trainable, params):
        outputs = lambda t: functional(surface)(params, adapter.with_trainable(t), batch())  # noqa: E731
        return jax.value_and_grad(lambda t: (outputs(t) ** 2).mean())(trainable)

    got, want = run(adapter.trainable, params), run(adapter.trainable, dense(params))
    chex.assert_trees_all_close(got, want, **TOLERANCE["float32", "gradient"])
    assert all(np.any(leaf) for leaf in jax.tree.leaves(got))


@every_kind
def test_a_new_adapter_changes_no_bit_of_the_output(kind):
    params = quantized(kind)
    adapter = init(CONFIG, params)
    want = forward(dense(params), batch())
    np.testing.assert_array_equal(forward(effective_params(params, adapter), batch()), want)
    np.testing.assert_array_equal(attach(Net(params), CONFIG)(batch()), Net(dense(params))(batch()))


@every_kind
def test_an_nnx_model_trains_over_quantized_kernels_which_stay_as_they_are(kind):
    params = quantized(kind)
    adapter = randomized(init(CONFIG, params))

    @nnx.jit
    def step(model, optimizer, x):
        loss = lambda model: (model(x) ** 2).mean()  # noqa: E731
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(model)
        optimizer.update(model, grads)
        return value

    def train(params):
        model = attach(Net(params), adapter)
        optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=RandLoraParam)
        return model, [float(step(model, optimizer, batch())) for _ in range(3)]

    (model, losses), (_, want) = train(params), train(dense(params))
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    assert losses[-1] < losses[0]
    chex.assert_trees_all_equal(model.up.kernel.base.get_value(), params["up"]["kernel"])
    chex.assert_trees_all_equal(model.down.kernel.base.get_value(), params["down"]["kernel"])
    assert extract(model).modules == ("up",)


def test_detaching_keeps_quantized_kernels_readable_and_merging_makes_the_adapted_one_dense():
    params = quantized("4bit")
    adapter = randomized(init(CONFIG, params))
    bare = detach(attach(Net(params), adapter))
    assert isinstance(bare.up.kernel, RandLoraWeight)
    np.testing.assert_array_equal(bare(batch()), Net(dense(params))(batch()))
    attach(bare, CONFIG)  # and it can be adapted again
    merged = detach(attach(Net(params), adapter), merge=True)
    assert type(merged.up.kernel) is nnx.Param
    want = effective_params(params, adapter)
    np.testing.assert_array_equal(merged.up.kernel[...], want["up"]["kernel"])
    np.testing.assert_array_equal(merge(params, adapter)["down"]["kernel"], dequantize(params["down"]["kernel"]))


class Scanned(linen.Module):
    """Layers scanned and rematerialized."""

    @linen.compact
    def __call__(self, x):
        class Block(linen.Module):
            @linen.compact
            def __call__(self, x, _):
                return x + Model()(x), None

        layers = linen.scan(linen.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return layers(name="layers")(x, None)[0]


@pytest.mark.parametrize("kind", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_stacked_quantized_kernels_are_dequantized_layer_by_layer_inside_a_scan(kind):
    block = {
        name: {"kernel": stack([KINDS[kind](shape, seed=seed) for seed in (0, 1)]), "bias": jnp.ones((2, shape[0]))}
        for name, shape in OUT_IN.items()
    }
    params = {"layers": {"Model_0": block}}
    layouts = {"layers.Model_0.up": Layout((1,), (2,), (0,))}
    adapter = randomized(init(CONFIG, params, layouts=layouts))

    @jax.jit
    def run(trainable, params):
        apply = lambda t: Scanned().apply({"params": lazy_params(params, adapter.with_trainable(t))}, batch())  # noqa: E731
        return jax.value_and_grad(lambda t: (apply(t) ** 2).mean())(trainable)

    got, want = run(adapter.trainable, params), run(adapter.trainable, dense(params))
    chex.assert_trees_all_close(got, want, **TOLERANCE["float32", "gradient"])
    plain = Scanned().apply({"params": effective_params(params, adapter)}, batch())
    np.testing.assert_allclose(
        Scanned().apply({"params": lazy_params(params, adapter)}, batch()), plain, **TOLERANCE["float32"]
    )


def test_stacked_quantized_kernels_are_dequantized_layer_by_layer_inside_an_nnx_scan():
    class Stacked(nnx.Module):
        def __init__(self, kernel):
            self.layers = nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0))
            self.layers.kernel = nnx.Param(kernel)

        def __call__(self, x):
            step = nnx.remat(lambda x, layer: x + jnp.tanh(layer(x)))
            return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    kernel = stack([KINDS["4bit"]((8, 8), seed=seed) for seed in (0, 1)])
    config = RandLoraConfig(r=3, randlora_alpha=3, target_modules=["layers"])
    layouts = {"layers": Layout((1,), (2,), (0,))}
    adapter = randomized(init(config, {"layers": {"kernel": kernel}}, layouts=layouts))

    def outputs(kernel):
        model = attach(Stacked(kernel), adapter)
        with bound_bases(model):
            return model(batch())

    np.testing.assert_allclose(outputs(kernel), outputs(dequantize(kernel)), **TOLERANCE["float32"])


def test_gradients_accumulate_over_a_quantized_base():
    params = quantized("4bit")
    adapter = randomized(init(CONFIG, params))
    loss = lambda params, x: (forward(params, x) ** 2).mean()  # noqa: E731
    got = accumulate_gradients(loss, adapter, params, batch().reshape(2, 2, 8))
    want = accumulate_gradients(loss, adapter, dense(params), batch()[None])
    chex.assert_trees_all_close(got, want, **TOLERANCE["float32", "gradient"])
