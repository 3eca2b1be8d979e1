"""What every surface holds of the bases: the block that layers use, ternary ones as codes. Files hold all of them."""

import contextlib
import dataclasses

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import TOLERANCE

import interop
from interop import Bases, RandLoraConfig, init_adapter
from randlora_jax import (
    Layout,
    RandLoraBases,
    RandLoraBasis,
    RandLoraLinear,
    RandLoraParam,
    attach,
    bound_bases,
    detach,
    effective_params,
    extract,
    init,
    lazy_params,
    linen,
    load_adapter,
    make_bases,
    merge,
    unmerge,
)
from randlora_jax.bases import HeldBasis, layer_bases
from randlora_jax.provenance import describe
from randlora_jax.sharding import adapter_shardings

SHAPES = {"down": (8, 24), "up": (24, 8)}  # PEFT's bases are for (24, 24), the layers use (24, 8)
KINDS = {"dense": {}, "sparse": {"sparse": True}}
every_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
FILE = "adapter_model.safetensors"
STACKED = {f"blocks.{name}": Layout((1,), (2,), stack_axes=(0,)) for name in SHAPES}


def config(**fields):
    return RandLoraConfig(**{"r": 3, "randlora_alpha": 3, "target_modules": sorted(SHAPES), **fields})


def params():
    rng = np.random.default_rng(0)
    return {name: {"kernel": jnp.asarray(rng.normal(size=shape[::-1]), jnp.float32)} for name, shape in SHAPES.items()}


def random_factors(tree, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)


def adapted(**fields):
    adapter = init(config(**fields), params())
    return adapter.with_trainable(random_factors(adapter.trainable))


def hub(**fields):
    """A new adapter that was never held by a stack."""
    return init_adapter(config(**fields), SHAPES)


def same_bits(got, want):
    for one, other in zip(got, want, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == np.ascontiguousarray(other).tobytes()


def assert_holds_the_block(bases, fields):
    assert bases.A.shape == (3, 1, 8)
    assert bases.B.shape == (24, 3, 3)
    assert isinstance(bases.B, HeldBasis)
    assert bases.B.values.dtype == (jnp.int8 if fields else jnp.bfloat16)
    assert bases.B.nbytes == 24 * 9 * (1 if fields else 2)
    want = hub(**fields).bases
    np.testing.assert_array_equal(np.asarray(bases.A), want.A[:, :, :8])
    np.testing.assert_array_equal(np.asarray(bases.B), want.B[:, :3])
    np.testing.assert_array_equal(bases.B.astype(jnp.float32), want.B[:, :3].astype(np.float32))


class Up(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(8, 24, rngs=rngs), nnx.Linear(24, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


class Explicit(nnx.Module):
    def __init__(self, fields, rngs):
        bases = RandLoraBases(config(**fields), SHAPES.values())
        self.up = RandLoraLinear(8, 24, bases=bases, rngs=rngs)
        self.down = RandLoraLinear(24, 8, bases=bases, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


class LinenNet(nn.Module):
    fields: dict

    @nn.compact
    def __call__(self, x):
        bases = linen.RandLoraBases(config(**self.fields), tuple(SHAPES.values()), name="bases")()
        x = jnp.tanh(linen.RandLoraLinear(24, name="up")(x, bases))
        return linen.RandLoraLinear(8, name="down")(x, bases)


X = jnp.asarray(np.random.default_rng(5).normal(size=(4, 8)), jnp.float32)


def by_init(fields):
    return init(config(**fields), params())


def by_load_adapter(fields):
    return load_adapter(hub(**fields), params())


def by_load_adapter_without_bases(fields):
    return load_adapter(dataclasses.replace(hub(**fields), bases=None), params())


def by_attach(fields):
    return extract(attach(Up(nnx.Rngs(0)), config(**fields)))


def by_explicit_layers(fields):
    return extract(Explicit(fields, nnx.Rngs(0)))


def by_linen_layers(fields):
    variables = LinenNet(fields).init(jax.random.key(0), X)
    return linen.extract_adapter(variables, config(**fields))


def by_inserting(fields):
    variables = LinenNet(fields).init(jax.random.key(0), X)
    return linen.extract_adapter(linen.insert_adapter(variables, hub(**fields), config(**fields)), config(**fields))


SURFACES = [
    by_init,
    by_load_adapter,
    by_load_adapter_without_bases,
    by_attach,
    by_explicit_layers,
    by_linen_layers,
    by_inserting,
]


@every_kind
@pytest.mark.parametrize("made", SURFACES)
def test_every_surface_holds_the_block_and_gives_all_bases(made, fields, tmp_path):
    adapter, want = made(fields), hub(**fields)
    assert_holds_the_block(adapter.bases, fields)
    got = adapter.to_interop()
    same_bits(got.bases, want.bases)
    adapter.save_pretrained(tmp_path / "stack")
    interop.save(dataclasses.replace(want, config=adapter.config), tmp_path / "hub")
    assert (tmp_path / "stack" / FILE).read_bytes() == (tmp_path / "hub" / FILE).read_bytes()


@every_kind
def test_updates_are_those_of_all_bases_and_gradients_those_of_the_formula(fields):
    adapter = adapted(**fields)
    whole = adapter.to_interop()
    for name in adapter.modules:
        want = whole.delta_weight(name)
        np.testing.assert_allclose(adapter.delta_weight(name), want, **TOLERANCE["float32"])
        got = jax.grad(lambda t, name=name: adapter.with_trainable(t).delta_weight(name).sum())(adapter.trainable)
        bases = Bases(*(basis.astype(np.float32) for basis in whole.bases))
        upstream = np.ones(SHAPES[name])
        lam, gamma = whole.factors[name]
        grads = oracle.gradients(*bases, lam, gamma, scaling=1.0, shape=SHAPES[name], upstream=upstream)
        for mine, expected in zip(got[name], grads, strict=True):
            np.testing.assert_allclose(mine, expected, **TOLERANCE["float32", "gradient"])


@every_kind
def test_merging_unmerging_and_lazy_parameters_use_the_block(fields):
    adapter, base = adapted(**fields), params()
    want = jax.jit(effective_params)(base, adapter)
    chex.assert_trees_all_close(merge(base, adapter), want, **TOLERANCE["float32", "merge"])
    chex.assert_trees_all_close(unmerge(want, adapter), base, rtol=1e-5, atol=1e-5)

    @jax.jit
    def kernels(adapter, base):
        return nn.meta.unbox(lazy_params(base, adapter))

    chex.assert_trees_all_close(kernels(adapter, base), want, **TOLERANCE["float32", "merge"])
    again = linen.extract_lazy(lazy_params(base, adapter))
    same_bits(again.to_interop().bases, hub(**fields).bases)


@every_kind
def test_an_nnx_model_trains_with_the_block_and_copies_hold_their_own(fields):
    model = attach(Up(nnx.Rngs(0)), adapted(**fields))
    assert len([leaf for leaf in jax.tree.leaves(nnx.state(model, RandLoraBasis)) if leaf.ndim == 3]) == 2

    @nnx.jit
    def grads(model):
        loss = lambda model: (model(X) ** 2).sum()  # noqa: E731
        return nnx.grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(model)

    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads(model)))
    with bound_bases(model):
        bound = model(X)
    np.testing.assert_array_equal(bound, model(X))
    assert_holds_the_block(extract(nnx.clone(model)).bases, fields)
    merged = detach(nnx.clone(model), merge=True)
    np.testing.assert_allclose(merged(X), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bound", [True, False], ids=["bound_bases", "StateAxes"])
def test_layers_that_are_scanned_share_the_block(bound):
    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.vmap(Up, in_axes=0, out_axes=0)(rngs.fork(split=2))

        def __call__(self, x):
            layers = 0 if bound else nnx.StateAxes({RandLoraBasis: None, ...: 0})
            return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, layers), out_axes=nnx.Carry)(x, self.blocks)

    names = [f"blocks.{name}" for name in SHAPES]
    given = config(init_weights=False, target_modules=names, **KINDS["sparse"])
    model = attach(Stack(nnx.Rngs(0)), given, rngs=nnx.Rngs(1), layouts=STACKED)
    adapter = extract(model)
    assert_holds_the_block(adapter.bases, KINDS["sparse"])
    with bound_bases(model) if bound else contextlib.nullcontext():
        got = model(X)
    merged = detach(model, merge=True)
    np.testing.assert_allclose(got, merged(X), rtol=1e-4, atol=1e-4)


@every_kind
def test_linen_layers_compute_with_the_block_in_remat_and_serialize(fields):
    net = LinenNet(fields)
    variables = net.init(jax.random.key(0), X)
    variables = {**variables, "randlora": random_factors(variables["randlora"])}
    adapter = linen.extract_adapter(variables, config(**fields))
    up, down = (variables["params"][name] for name in ("up", "down"))
    hidden = jnp.tanh(X @ (up["kernel"] + adapter.delta_weight("up").T) + up["bias"])
    want = hidden @ (down["kernel"] + adapter.delta_weight("down").T) + down["bias"]
    np.testing.assert_allclose(jax.jit(net.apply)(variables, X), want, **TOLERANCE["float32", "forward"])
    grads = jax.grad(lambda t: jax.checkpoint(net.apply)({**variables, "randlora": t}, X).sum())(variables["randlora"])
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads))
    read = flax.serialization.from_bytes(variables, flax.serialization.to_bytes(variables))
    chex.assert_trees_all_equal(read, variables)


@every_kind
def test_on_a_mesh_the_block_is_sharded_by_rows_and_gives_all_bases(fields):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    kernels = jax.device_put(params(), NamedSharding(mesh, P(None, "x")))
    adapter = init(config(**fields), kernels)
    assert adapter.bases.B.values.sharding.spec == P("x")
    assert adapter_shardings(adapter, kernels).bases.B.values.spec == P("x")
    assert_holds_the_block(adapter.bases, fields)
    same_bits(adapter.to_interop().bases, hub(**fields).bases)


@every_kind
def test_checkpoints_describe_all_bases_as_they_did(fields):
    want = interop.bases_digest(hub(**fields).bases)
    assert describe(adapted(**fields), None)["bases_sha256"] == want


@every_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_files_keep_the_dtype_in_which_an_adapter_came(fields, dtype, tmp_path):
    source = hub(**fields)
    source = dataclasses.replace(source, bases=Bases(*(b.astype(dtype) for b in source.bases)), recipe=None)
    adapter = load_adapter(source, params())
    assert adapter.bases.B.dtype == dtype
    same_bits(adapter.to_interop().bases, source.bases)
    adapter.save_pretrained(tmp_path)
    same_bits(interop.load(tmp_path).bases, source.bases)


@every_kind
def test_bases_of_other_origin_are_held_as_a_whole_and_saved(fields, tmp_path):
    source = hub(**fields)
    foreign = Bases(*(np.ascontiguousarray(basis[::-1]) for basis in source.bases))
    adapter = load_adapter(dataclasses.replace(source, bases=foreign, recipe=None), params())
    assert adapter.bases.B.shape == (24, 8, 3)
    assert isinstance(adapter.bases.B, HeldBasis) == bool(fields)
    adapter.save_pretrained(tmp_path)
    same_bits(interop.load(tmp_path).bases, foreign)


@every_kind
def test_rounded_bases_are_held_as_a_whole(fields):
    adapter = adapted(**fields)
    rounded = adapter.with_bases_dtype(jnp.float16)
    want = Bases(*(basis.astype(np.float16) for basis in hub(**fields).bases))
    same_bits(rounded.to_interop().bases, want)
    kept = adapter.with_bases_dtype(adapter.bases.B.dtype)
    assert kept is adapter


def test_bases_that_were_changed_behind_our_back_are_not_completed_by_others(tmp_path):
    adapter = adapted()
    B = adapter.bases.B
    seed = dataclasses.replace(B.origin.config, projection_prng_key=1)
    changed = [B.replace(values=B.values * jnp.bfloat16(2)), B.replace(origin=B.origin._replace(config=seed))]
    changed.append(B.replace(origin=B.origin._replace(recipe="torch<=2.11")))
    for other in changed:
        wrong = dataclasses.replace(adapter, bases=adapter.bases._replace(B=other))
        with pytest.raises(
            ValueError, match=r"the bases in memory are not those that projection_prng_key=\d and the r"
        ):
            wrong.save_pretrained(tmp_path)


def test_an_adapter_inserted_with_another_seed_keeps_its_own_bases():
    net = LinenNet({})
    other = init_adapter(config(projection_prng_key=7), SHAPES)
    variables = linen.insert_adapter(net.init(jax.random.key(0), X), other, config())
    same_bits(linen.extract_adapter(variables, config(), recipe=None).to_interop().bases, other.bases)


def test_the_prefix_of_codes_has_their_scale_in_A():
    adapter = adapted(sparse=True)
    A, B = layer_bases(adapter.bases, (10, 6))
    plain = layer_bases(make_bases(config(sparse=True), max_dim=24, min_dim=24), (10, 6))
    assert (B.dtype, B.shape) == (jnp.int8, (10, 2, 3))
    np.testing.assert_allclose(A, plain.A * adapter.bases.B.scale, rtol=1e-6)
    np.testing.assert_array_equal(B * np.float32(adapter.bases.B.scale), plain.B)
