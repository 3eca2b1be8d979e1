"""What `lazy_params` puts into linen variables comes out of them again."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from strategies import draw_adalora, draw_adapter

from randlora_jax import Layout, RandLoraConfig, adalora, lazy_params, load_adapter
from randlora_jax.linen import RandLoraBases, RandLoraBox, RandLoraLinear, extract_lazy

STACKED = {f"layers.up.{i}": (12, 8) for i in range(3)}
SHAPES = {"head": (6, 8), **STACKED}
KEPT = {"layers.up.0": (True, False, False, True), "layers.up.1": (False,) * 4, "head": (True, False, True, True)}
LAYOUTS = {"layers.up": Layout((0,), (2,), (1,))}  # stacked in the middle
MAKE = {
    "RandLoRA": lambda: draw_adapter(shapes=SHAPES, r=3),
    "AdaLoRA, pruned": lambda: draw_adalora(shapes=SHAPES, kept=KEPT),
}


def variables(dtype=jnp.float32):
    ones = lambda *shape: jnp.ones(shape, dtype)  # noqa: E731
    return {
        "params": {
            "layers": {"up": {"kernel": nn.Partitioned(ones(8, 3, 12), (None, None, None)), "bias": ones(3, 12)}},
            "head": {"kernel": ones(8, 6)},
        }
    }


@pytest.mark.parametrize("method", MAKE)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_it_is_the_inverse_of_lazy_params(method, dtype):
    adapter = load_adapter(MAKE[method](), variables(), layouts=LAYOUTS, dtype=dtype)
    for params in (variables(), variables()["params"], nn.FrozenDict(variables())):
        again = extract_lazy(lazy_params(params, adapter))
        chex.assert_trees_all_equal(again, adapter)
        assert jax.tree.structure(again) == jax.tree.structure(adapter)


def test_in_a_loss_function_it_is_differentiated():
    adapter = load_adapter(MAKE["AdaLoRA, pruned"](), variables(), layouts=LAYOUTS)

    def loss(trainable):
        return adalora.orthogonal_loss(extract_lazy(lazy_params(variables(), adapter.with_trainable(trainable))))

    want = jax.jit(jax.grad(adalora.orthogonal_loss))(adapter).factors
    chex.assert_trees_all_close(jax.jit(jax.grad(loss))(adapter.trainable), want, rtol=1e-6)
    assert np.abs(want["head"].A).max() > 0.01


def test_the_boxes_compile_once_for_adapters_that_differ_in_numbers_only():
    adapter = load_adapter(MAKE["AdaLoRA, pruned"](), variables(), layouts=LAYOUTS)
    traces = []

    @jax.jit
    def kernel(variables):
        traces.append(1)
        return variables["params"]["head"]["kernel"].unbox()

    for scale in (1, 2):
        trainable = jax.tree.map(lambda leaf, scale=scale: scale * leaf, adapter.trainable)
        kernel(lazy_params(variables(), adapter.with_trainable(trainable)))
    assert len(traces) == 1


def test_variables_that_hold_no_adapter_or_parts_of_two_are_refused():
    with pytest.raises(ValueError, match=r"the variables hold no adapter: pass what one call of lazy_params"):
        extract_lazy(variables())
    adapters = [load_adapter(draw_adapter(shapes=SHAPES, r=r), variables(), layouts=LAYOUTS) for r in (3, 4)]
    first, second = (lazy_params(variables(), adapter)["params"] for adapter in adapters)
    with pytest.raises(ValueError, match=r"the variables hold parts of several adapters: pass what one call of"):
        extract_lazy({"params": {"layers": first["layers"], "head": second["head"]}})
    assert isinstance(first["head"]["kernel"], RandLoraBox)


def test_explicit_layers_do_not_hold_their_config_and_say_who_takes_it():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return RandLoraLinear(6)(x, RandLoraBases(RandLoraConfig(r=3), shapes=((6, 8),))())

    explicit = jax.eval_shape(Model().init, jax.random.key(0), jnp.ones((2, 8)))
    with pytest.raises(
        TypeError, match=r"do not hold the adapter's config: call randlora_jax\.linen\.extract_adapter\("
    ):
        extract_lazy(explicit)
