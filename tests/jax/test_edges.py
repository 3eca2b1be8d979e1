"""Models and mistakes at the edge of what the JAX stack does: it is right there, or says what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import TOLERANCE

from interop import RandLoraConfig
from randlora_jax import attach, effective_params, extract, infer_layouts, init, lazy_params, model_layouts
from randlora_jax.sharding import pin, shardings_of

CONFIG = RandLoraConfig(r=2, randlora_alpha=2, target_modules="all-linear", init_weights=False)


def draw(*shape):
    return jnp.asarray(np.random.default_rng([len(shape), *shape]).standard_normal(shape) / 3, jnp.float32)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_vmapped_experts_are_sliced_on_whichever_axis_the_vmap_is(axis):
    class Experts(linen.Module):
        @linen.compact
        def __call__(self, x):
            kernel = self.param("experts", lambda key, shape: draw(*shape), (3, 5, 4))  # (experts, in, out)
            return jnp.einsum("bei,eio->beo", x, kernel)

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            options = {"in_axes": 0, "variable_axes": {"params": axis}, "split_rngs": {"params": True}, "axis_size": 3}
            return linen.vmap(Experts, **options)()(x)

    model, x = Model(), draw(3, 2, 3, 5)
    variables = model.init(jax.random.key(0), x)
    adapter = init(CONFIG, variables, layouts=infer_layouts(model.apply, variables, x), key=jax.random.key(1))
    got = model.apply(lazy_params(variables, adapter), x)
    want = model.apply(effective_params(variables, adapter), x)
    assert np.abs(want - model.apply(variables, x)).max() > 0.01
    np.testing.assert_allclose(got, want, **TOLERANCE["float32"])


class Tied(nnx.Module):
    """Two layers with one kernel."""

    def __init__(self):
        self.a, self.b = nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 8, rngs=nnx.Rngs(1))
        self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.b(jax.nn.relu(self.a(x)))


def test_a_tied_kernel_is_found_under_each_of_its_names():
    layouts = model_layouts(Tied(), draw(3, 8))
    assert set(layouts) == {"a", "b"}
    adapted = attach(Tied(), CONFIG, layouts=layouts, rngs=nnx.Rngs(0))
    assert extract(adapted).modules == extract(attach(Tied(), CONFIG, rngs=nnx.Rngs(0))).modules == ("a", "b")


def test_a_parameter_in_a_container_that_attach_cannot_change_is_refused_and_the_others_are_adapted():
    class Model(nnx.Module):
        def __init__(self):
            self.held = nnx.data({"kernel": nnx.Param(draw(8, 8))})
            self.layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(x) @ self.held["kernel"][...]

    layouts = model_layouts(Model(), draw(3, 8))
    assert set(layouts) == {"layer"}
    assert "container that is no nnx.Module" in layouts.refused["held"]
    model = attach(Model(), CONFIG, layouts=layouts, rngs=nnx.Rngs(0))
    assert extract(model).modules == ("layer",)


def test_an_adapted_model_is_tabulated_and_computes_as_before():
    """`nnx.tabulate` compiles each method that the forward pass calls, and gives it and takes from it arrays only."""
    model = attach(nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2))), CONFIG, rngs=nnx.Rngs(0))
    x = draw(3, 8)
    before = model(x)
    table = nnx.tabulate(model, x, console_kwargs={"width": 200})
    assert all(f"layers/{i}" in table for i in range(2))
    np.testing.assert_array_equal(model(x), before)


def test_a_function_that_numbers_are_reduced_by_is_no_layer():
    def forward(params, x):
        weighted = jax.lax.reduce(params["kernel"], jnp.float32(0), lambda a, b: a + 2 * b, (0, 1))
        return x @ params["kernel"] * weighted

    assert set(infer_layouts(forward, {"up": {"kernel": draw(8, 8)}, "kernel": draw(8, 8)}, draw(3, 8))) == {"kernel"}


def test_a_single_array_has_no_name_to_adapt_it_by():
    with pytest.raises(ValueError, match=r"params is a single array, which has no name: pass a tree"):
        init(CONFIG, draw(8, 8), key=jax.random.key(0))


needs_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices: tests/conftest.py forces them")


@needs_devices
def test_kernels_on_different_meshes_are_refused_by_name():
    auto = (AxisType.Auto,)
    mesh, other = jax.make_mesh((4,), ("data",), axis_types=auto), jax.make_mesh((8,), ("fsdp",), axis_types=auto)
    params = {
        "a": {"kernel": jax.device_put(draw(16, 32), NamedSharding(mesh, P("data")))},
        "b": {"kernel": jax.device_put(draw(32, 16), NamedSharding(other, P("fsdp")))},
    }
    with pytest.raises(ValueError, match=r"lie on different meshes: 'a' on \{'data': 4\}, 'b' on \{'fsdp': 8\}"):
        init(CONFIG, params, key=jax.random.key(0))


@needs_devices
@pytest.mark.parametrize("count", [1, 8])
def test_one_training_step_serves_a_mesh_of_one_device_and_of_many(count):
    mesh = jax.make_mesh((count,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    params = {"up": {"kernel": jax.device_put(draw(16, 32), NamedSharding(mesh, P("fsdp")))}}
    adapter, optimizer = init(CONFIG, params, key=jax.random.key(0)), optax.adam(0.01)
    trainable, state = adapter.trainable, optimizer.init(adapter.trainable)
    shardings = shardings_of(trainable), shardings_of(state)

    def step(trainable, state, adapter, params, x):
        loss = lambda t: ((x @ effective_params(params, adapter.with_trainable(t))["up"]["kernel"]) ** 2).mean()  # noqa: E731
        updates, state = optimizer.update(jax.grad(loss)(trainable), state)
        return optax.apply_updates(trainable, updates), state

    step = jax.jit(step, out_shardings=shardings)
    x = jax.device_put(draw(8, 16), NamedSharding(mesh, P()))
    for _ in range(3):
        trainable, state = step(trainable, state, adapter, params, x)
    assert jax.tree.leaves(state)[0] == 3
    assert shardings_of(trainable) == shardings[0]


def test_pinning_leaves_arrays_on_a_single_device_where_they_are():
    adapter = init(CONFIG, {"up": {"kernel": draw(16, 32)}}, key=jax.random.key(0))
    pinned = jax.jit(lambda tree: pin(tree, shardings_of(adapter.trainable)))(adapter.trainable)
    np.testing.assert_array_equal(pinned["up"].lam, adapter.factors["up"].lam)
