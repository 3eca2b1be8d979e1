"""Adapters on a mesh of eight forced host devices: the specs, and training that equals the single device."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from interop import RandLoraConfig
from randlora_jax import (
    Layout,
    RandLoraParam,
    accumulate_gradients,
    attach,
    effective_params,
    extract,
    init,
    lazy_params,
    load_adapter,
)
from randlora_jax.sharding import adapter_shardings, adapter_specs, pin, shardings_of

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices: tests/conftest.py forces them on CPU")

CONFIG = RandLoraConfig(r=4, randlora_alpha=4, target_modules=["query", "out", "up", "down"])
LAYOUTS = {"query": Layout((0,), (1, 2)), "out": Layout((0, 1), (2,))}
SPECS = {"query": P("fsdp", "tp", None), "out": P("tp", None, "fsdp"), "up": P("fsdp", "tp"), "down": P("tp", "fsdp")}
SHAPES = {"query": (16, 4, 4), "out": (4, 4, 16), "up": (16, 32), "down": (32, 8)}
NOISE = {"rtol": 1e-4, "atol": 1e-6}  # sums over devices come in another order
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(kind, kind))


@functools.cache
def kernels():
    rng = np.random.default_rng(0)
    return {
        name: {"kernel": jnp.asarray(rng.standard_normal(shape) / 3, jnp.float32)} for name, shape in SHAPES.items()
    }


def sharded(mesh):
    return {
        name: {"kernel": jax.device_put(kernels()[name]["kernel"], NamedSharding(mesh, spec))}
        for name, spec in SPECS.items()
    }


def batch(rows=8):
    return jnp.asarray(np.random.default_rng(1).standard_normal((rows, 16)), jnp.float32)


def randomized(trainable):
    """Random values with the same dtypes and shardings."""
    rng = np.random.default_rng(2)
    draw = lambda leaf: jax.device_put(np.asarray(rng.standard_normal(leaf.shape) / 3, leaf.dtype), leaf.sharding)  # noqa: E731
    return jax.tree.map(draw, trainable)


def product(spelling, x, kernel, *out):
    """An einsum that says how its result is sharded where the mesh wants to know, after gathering over fsdp."""
    if AxisType.Explicit not in jax.typeof(kernel).sharding.mesh.axis_types:
        return jnp.einsum(spelling, x, kernel)
    gathered = P(*(axis if axis == "tp" else None for axis in jax.typeof(kernel).sharding.spec))
    return jnp.einsum(spelling, x, jax.sharding.reshard(kernel, gathered), out_sharding=P(*out))


def forward(params, x):
    heads = product("bd,dhk->bhk", x, params["query"]["kernel"], "fsdp", "tp", None)
    x = x + product("bhk,hkd->bd", jnp.tanh(heads), params["out"]["kernel"], "fsdp", None)
    hidden = jnp.tanh(product("bd,de->be", x, params["up"]["kernel"], "fsdp", "tp"))
    return product("be,ed->bd", hidden, params["down"]["kernel"], "fsdp", None)


def loss_of(params, x):
    return (forward(params, x) ** 2).mean()


OPTIMIZER = optax.adam(0.01)


def train(adapter, params, x, *, steps=3, **jit_options):
    """Losses, factors, and how often the step was compiled."""

    @functools.partial(jax.jit, **jit_options)
    def step(trainable, state, adapter, params, x):
        loss = lambda trainable: loss_of(effective_params(params, adapter.with_trainable(trainable)), x)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = OPTIMIZER.update(grads, state)
        return optax.apply_updates(trainable, updates), state, value

    trainable = randomized(adapter.trainable)
    state, losses = OPTIMIZER.init(trainable), []
    for _ in range(steps):
        trainable, state, value = step(trainable, state, adapter, params, x)
        losses.append(float(value))
    return losses, trainable, step._cache_size()


@functools.cache
def single_device():
    return train(init(CONFIG, kernels(), layouts=LAYOUTS), kernels(), batch())[:2]


def on_mesh(mesh):
    """Adapter, params and batch, each where it belongs."""
    params = sharded(mesh)
    return init(CONFIG, params, layouts=LAYOUTS), params, jax.device_put(batch(), NamedSharding(mesh, P("fsdp")))


def test_specs_follow_the_kernels_own():
    adapter, mesh = init(CONFIG, kernels(), layouts=LAYOUTS), mesh_of()
    specs = adapter_specs(adapter, SPECS, mesh)
    gammas = {name: pair.gamma for name, pair in specs.factors.items()}
    assert gammas == {
        "query": P(None, ("fsdp",)),  # square: the columns of torch's (out, in), contracted by fsdp
        "out": P(None, ("tp",)),
        "up": P(None, ("fsdp",)),
        "down": P(None, ("fsdp",)),  # (8, 32): the short side is the output
    }
    assert {pair.lam for pair in specs.factors.values()} == {P()}
    assert jax.tree.leaves(specs.bases) == [P(), P(("fsdp",))]


def test_axes_that_do_not_divide_evenly_are_replicated():
    params = {"odd": {"kernel": jnp.ones((6, 10))}}
    adapter = init(RandLoraConfig(r=2, target_modules=["odd"]), params)
    specs = adapter_specs(adapter, {"odd": P("fsdp", "fsdp")}, mesh_of())
    assert (specs.factors["odd"].gamma, specs.bases.B) == (P(None, None), P(None))


def test_an_adapter_of_sharded_params_lies_on_their_mesh_and_another_stays_where_it_is():
    adapter, _, _ = on_mesh(mesh_of())
    want = adapter_shardings(adapter, sharded(mesh_of()))
    assert shardings_of(adapter.trainable) == want.trainable
    assert jax.tree.leaves(shardings_of(adapter.bases)) == jax.tree.leaves(want.bases)
    assert not adapter.bases.B.sharding.is_fully_replicated
    assert adapter_shardings(adapter, kernels()) is None
    assert len(init(CONFIG, kernels(), layouts=LAYOUTS).bases.B.sharding.device_set) == 1


def test_a_loaded_adapter_lies_on_the_mesh_of_the_params_with_the_same_bits(tmp_path):
    adapter, params, _ = on_mesh(mesh_of())
    adapter.with_trainable(randomized(adapter.trainable)).save_pretrained(tmp_path)
    again = load_adapter(tmp_path, params, layouts=LAYOUTS)
    assert shardings_of(again.trainable) == shardings_of(adapter.trainable)
    chex.assert_trees_all_equal(again.trainable, randomized(adapter.trainable))


@KINDS
def test_training_on_a_mesh_equals_training_on_one_device(kind):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        losses, trainable, _ = train(*on_mesh(mesh))
    np.testing.assert_allclose(losses, single_device()[0], rtol=1e-5)
    chex.assert_trees_all_close(jax.device_get(trainable), jax.device_get(single_device()[1]), **NOISE)


@KINDS
@pytest.mark.parametrize("how", ["out_shardings", "pin"])
def test_pinned_factors_keep_their_shardings_and_the_step_compiles_once(kind, how):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        adapter, params, x = on_mesh(mesh)
        shardings = shardings_of(adapter.trainable)
        if how == "out_shardings":
            state = shardings_of(OPTIMIZER.init(adapter.trainable))
            _, trainable, compiled = train(adapter, params, x, out_shardings=(shardings, state, None))
            assert compiled == 1
        else:
            trainable = jax.jit(lambda tree: pin(jax.tree.map(jnp.sin, tree), shardings))(adapter.trainable)
    placed = jax.tree.map(lambda leaf, want: leaf.sharding.is_equivalent_to(want, leaf.ndim), trainable, shardings)
    assert all(jax.tree.leaves(placed))


@pytest.mark.slow
def test_gradients_accumulate_on_a_mesh():
    adapter, params, x = on_mesh(mesh_of())
    adapter = adapter.with_trainable(randomized(adapter.trainable))
    got = jax.jit(functools.partial(accumulate_gradients, loss_of))(adapter, params, x.reshape(2, 4, 16))
    alone = init(CONFIG, kernels(), layouts=LAYOUTS)
    alone = alone.with_trainable(randomized(alone.trainable))
    want = jax.value_and_grad(
        lambda trainable: loss_of(effective_params(kernels(), alone.with_trainable(trainable)), batch())
    )(alone.trainable)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(want), **NOISE)


class Block(linen.Module):
    """One layer of a scanned model."""

    @linen.compact
    def __call__(self, x, _):
        return x + linen.Dense(16, name="down")(jnp.tanh(linen.Dense(32, name="up")(x))), None


class Scanned(linen.Module):
    """Two layers, scanned and rematerialized."""

    @linen.compact
    def __call__(self, x):
        layers = linen.scan(linen.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(
            name="layers"
        )
        return layers(x, None)[0]


def test_a_scanned_linen_model_with_lazy_params_trains_on_a_mesh():
    model, mesh = Scanned(), mesh_of()
    params = model.init(jax.random.key(0), batch())["params"]
    specs = {"up": P(None, "fsdp", "tp"), "down": P(None, "tp", "fsdp")}
    layouts = {f"layers.{name}": Layout((1,), (2,), (0,)) for name in specs}
    config = RandLoraConfig(r=4, randlora_alpha=4, target_modules=["up", "down"])

    def gradients(params, x):
        adapter = init(config, params, layouts=layouts)
        trainable = randomized(adapter.trainable)

        @jax.jit
        def run(trainable, adapter, params, x):
            lazy = lambda trainable: lazy_params(params, adapter.with_trainable(trainable))  # noqa: E731
            return jax.value_and_grad(lambda t: (model.apply({"params": lazy(t)}, x) ** 2).mean())(trainable)

        return adapter, run(trainable, adapter, params, x)

    _, want = gradients(params, batch())
    place = lambda path, leaf: jax.device_put(  # noqa: E731
        leaf, NamedSharding(mesh, specs[path[1].key] if path[-1].key == "kernel" else P())
    )
    adapter, got = gradients(jax.tree_util.tree_map_with_path(place, params), batch())
    assert adapter.factors["layers.up"].gamma.sharding.spec == P(None, None, ("fsdp",))
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(want), **NOISE)


class Net(nnx.Module):
    """An NNX model of two layers."""

    def __init__(self):
        self.up, self.down = nnx.Linear(16, 32, rngs=nnx.Rngs(0)), nnx.Linear(32, 8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def test_an_adapter_attached_to_a_sharded_nnx_model_lies_on_its_mesh_and_trains_as_on_one_device():
    config = RandLoraConfig(r=4, randlora_alpha=4, target_modules=["up", "down"])

    @nnx.jit
    def step(model, optimizer, x):
        loss = lambda model: (model(x) ** 2).mean()  # noqa: E731
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(model)
        optimizer.update(model, grads)
        return value

    def run(mesh):
        model = Net()
        if mesh is not None:
            for layer, spec in ((model.up, P("fsdp", "tp")), (model.down, P("tp", "fsdp"))):
                layer.kernel.set_value(jax.device_put(layer.kernel[...], NamedSharding(mesh, spec)))
        attach(model, config)
        nnx.update(model, randomized(nnx.state(model, RandLoraParam)))
        optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=RandLoraParam)
        return model, [float(step(model, optimizer, batch())) for _ in range(3)]

    model, losses = run(mesh_of())
    assert not model.up.kernel.adapters["default"].randlora_gamma[...].is_fully_replicated
    np.testing.assert_allclose(losses, run(None)[1], rtol=1e-5)
    hub = extract(model).to_interop()  # gathered, in numpy
    assert hub.factors["up"].gamma.shape == (4, 16)


def test_an_adapter_of_unknown_shapes_has_no_specs():
    adapter = init(CONFIG, kernels(), layouts=LAYOUTS)
    unknown = type(adapter)(factors=adapter.factors, bases=adapter.bases, config=adapter.config)
    with pytest.raises(ValueError, match=r"does not know the shapes of its layers: load_adapter\(source, params\)"):
        adapter_specs(unknown, SPECS, mesh_of())
