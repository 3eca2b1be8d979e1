"""Layouts read from the jaxpr: the axes of each kernel as written out by hand, and what they mean in numbers."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas
from jax.sharding import PartitionSpec
from tolerances import TOLERANCE

from randlora_jax import InferredLayouts, Layout, infer_layouts

DENSE = Layout((0,), (1,))
STACKED = Layout((1,), (2,), (0,))


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def filled(tree, seed=0):
    """Random values for a tree of shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 2, leaf.dtype), tree)


def linen_model(module, *inputs):
    """A linen module as a function, and its variables as shapes."""
    return module.apply, jax.eval_shape(module.init, jax.random.key(0), *inputs)


def nnx_model(make):
    """An NNX module as a function, and its state as shapes."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return lambda state, *inputs: nnx.merge(graph, state)(*inputs), state


# ---- Functions of one kernel W, written in as many ways as people write them ----------------------------------------
# What it does to its input: "one" weight, a "chain" of stacked weights, or "each" weight on its own part of the input.


def jitted_cast(w, x):
    return x @ jax.jit(lambda v: v.astype(jnp.float32))(w)


def rematted(w, x):
    return jax.checkpoint(lambda v, x: jax.jit(jnp.dot)(x, v))(w, x)


@jax.custom_vjp
def with_own_gradient(w, x):
    return x @ w


with_own_gradient.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))


@jax.custom_jvp
def with_own_tangent(w, x):
    return x @ w


with_own_tangent.defjvp(lambda primals, tangents: (primals[1] @ primals[0], tangents[1] @ primals[0]))


def sharded(w, x, *, tiled=True):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")

    def body(w, x):
        return x @ jax.lax.psum(jax.lax.all_gather(w, "data", tiled=tiled).reshape(4, 6), "data")

    return jax.shard_map(body, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=PartitionSpec())(w, x)


def constrained(w, x):
    w = jax.lax.optimization_barrier(jax.lax.reduce_precision(jnp.copy(w), 8, 23))
    return x @ checkpoint_name(w, "w")


def branched(w, x):
    return jax.lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: (w.T @ x.T).T, w)


def unscanned_loop(w, x):
    return jax.lax.fori_loop(0, 3, lambda i, y: y @ w[i], x)


def unrolled(w, x):
    return x @ w[0] @ w[1] @ w[2]


def unstacked(w, x):
    return functools.reduce(jnp.matmul, jnp.unstack(w), x)


def restacked_chain(w, x):
    return functools.reduce(jnp.matmul, jnp.stack([w[0], w[1], w[2]]), x)


def scanned(w, x):
    return jax.lax.scan(lambda y, w: (y @ w, None), x, w)[0]


def cast_in_a_scan_then_scanned(w, x):
    return scanned(jax.lax.map(lambda w: w.astype(jnp.float32), w), x)


def counted(w, x):
    def body(state):
        i, y = state
        return i + 1, y @ jax.lax.dynamic_index_in_dim(w, i, keepdims=False)

    return jax.lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]


def gathered(w, x):
    return jax.lax.scan(lambda y, i: (y @ jnp.take(w, i, axis=0), None), x, jnp.arange(3))[0]


def cast_by_parts(w, x):
    halves = jax.lax.map(lambda half: jax.lax.reduce_precision(half, 8, 23), w.reshape(2, 2, 6))
    return x @ halves.reshape(4, 6)


def in_two_parts_with_heads(w, x):
    first, second = w[:, :4].reshape(4, 2, 2), w[:, 4:].reshape(4, 3, 2)
    heads = [jnp.einsum("bd,dnh->bnh", x, part) for part in (first, second)]
    return jnp.concatenate(heads, axis=1)


def scanned_in_pairs(w, x):
    pairs = w.reshape(2, 2, 4, 4)
    return jax.lax.scan(lambda y, pair: (scanned(pair, y), None), x, pairs)[0]


def scanned_twice(w, x):
    return jax.lax.scan(lambda y, part: (scanned(part, y), None), x, w)[0]


def carried(w, x):
    return jax.lax.scan(lambda state, _: ((state[0], state[1] @ state[0]), None), (w, x), None, length=1)[0][1]


def split_then_joined(w, x):
    return jnp.concatenate([x @ part for part in jnp.split(w, 3, axis=1)], axis=1)


def by_the_ragged_product(w, x):
    return jax.lax.ragged_dot(x.reshape(6, 4), w, jnp.full(3, 2))


def selected_experts(w, x):
    return jnp.einsum("td,tdf->tf", x.reshape(6, 4), w[x.reshape(6, 4)[:, 0].astype(jnp.int32) * 0 + 1])


WAYS = {
    "matmul": (lambda w, x: x @ w, (4, 6), DENSE, "one"),
    "transposed": (lambda w, x: x @ w.T, (6, 4), Layout((1,), (0,)), "one"),
    "kernel first": (lambda w, x: (w @ x.T).T, (6, 4), Layout((1,), (0,)), "one"),
    "merged heads": (lambda w, x: x @ w.reshape(4, 6), (4, 2, 3), Layout((0,), (1, 2)), "one"),
    "merged inputs": (lambda w, x: x @ w.reshape(4, 6), (2, 2, 6), Layout((0, 1), (2,)), "one"),
    "split heads": (lambda w, x: jnp.einsum("bd,dnh->bnh", x, w.reshape(4, 2, 3)), (4, 6), DENSE, "one"),
    "split inputs": (
        lambda w, x: jnp.einsum("bij,ijo->bo", x.reshape(-1, 2, 2), w.reshape(2, 2, 6)),
        (4, 6),
        DENSE,
        "one",
    ),
    "regrouped": (
        lambda w, x: jnp.einsum("bij,ijo->bo", x.reshape(-1, 2, 2), w.reshape(2, 2, 6)),
        (4, 2, 3),
        Layout((0,), (1, 2)),
        "one",
    ),
    "out axis first": (lambda w, x: jnp.einsum("bd,ndh->bnh", x, w), (2, 4, 3), Layout((1,), (0, 2)), "one"),
    "in axes apart": (
        lambda w, x: jnp.einsum("bij,ioj->bo", x.reshape(-1, 2, 2), w),
        (2, 6, 2),
        Layout((0, 2), (1,)),
        "one",
    ),
    "one head": (lambda w, x: x @ w.reshape(4, -1), (4, 1, 6), Layout((0,), (1, 2)), "one"),
    "one output": (lambda w, x: (x @ w)[:, 0], (4, 1), DENSE, "one"),
    "jit with a cast inside": (jitted_cast, (4, 6), DENSE, "one"),
    "remat": (rematted, (4, 6), DENSE, "one"),
    "custom_vjp": (with_own_gradient, (4, 6), DENSE, "one"),
    "custom_jvp": (with_own_tangent, (4, 6), DENSE, "one"),
    "shard_map": (sharded, (4, 6), DENSE, "one"),
    "shard_map, shards stacked": (functools.partial(sharded, tiled=False), (4, 6), DENSE, "one"),
    "barriers": (constrained, (4, 6), DENSE, "one"),
    "cond": (branched, (4, 6), DENSE, "one"),
    "permuted columns, and back": (
        lambda w, x: (x @ w[:, np.array([5, 3, 1, 0, 2, 4])])[:, np.array([3, 2, 4, 1, 5, 0])],
        (4, 6),
        DENSE,
        "one",
    ),
    "parts stacked by lax.map": (cast_by_parts, (4, 6), DENSE, "one"),
    "heads of two parts": (in_two_parts_with_heads, (4, 10), DENSE, "one"),
    "with rows set": (lambda w, x: x @ jax.lax.dynamic_update_slice(w, w[:2], (0, 0)), (4, 6), DENSE, "one"),
    "reversed, and back": (lambda w, x: (x @ w[:, ::-1])[:, ::-1], (4, 6), DENSE, "one"),
    "padded": (lambda w, x: (x @ jnp.pad(w, ((0, 0), (1, 2))))[:, 1:-2], (4, 6), DENSE, "one"),
    "with entries set": (lambda w, x: x @ w.at[0, 0].set(w[0, 0]), (4, 6), DENSE, "one"),
    "joined columns": (lambda w, x: x @ jnp.concatenate([w[:, :2], w[:, 2:]], axis=1), (4, 6), DENSE, "one"),
    "repeated heads": (lambda w, x: (x @ jnp.repeat(w, 2, axis=1))[:, ::2], (4, 6), DENSE, "one"),
    "tiled heads": (lambda w, x: (x @ jnp.tile(w, (1, 2)))[:, :6], (4, 6), DENSE, "one"),
    "scaled by a constant": (lambda w, x: x @ (w * jnp.full((4, 6), 2.0) / 2), (4, 6), DENSE, "one"),
    "masked by data": (lambda w, x: x @ jnp.where(x[0, 0] > jnp.inf, 0, w), (4, 6), DENSE, "one"),
    "carry of a loop": (carried, (4, 4), DENSE, "one"),
    "split columns": (split_then_joined, (4, 6), DENSE, "one"),
    "fori_loop with W[i]": (unscanned_loop, (3, 4, 4), STACKED, "chain"),
    "while_loop with W[i]": (counted, (3, 4, 4), STACKED, "chain"),
    "take inside a scan": (gathered, (3, 4, 4), STACKED, "chain"),
    "W[0], W[1], W[2]": (unrolled, (3, 4, 4), STACKED, "chain"),
    "unstack": (unstacked, (3, 4, 4), STACKED, "chain"),
    "stack of W[0], W[1], W[2]": (restacked_chain, (3, 4, 4), STACKED, "chain"),
    "scan": (scanned, (3, 4, 4), STACKED, "chain"),
    "scan over a cast by lax.map": (cast_in_a_scan_then_scanned, (3, 4, 4), STACKED, "chain"),
    "scan, last axis": (lambda w, x: scanned(jnp.moveaxis(w, -1, 0), x), (4, 4, 3), Layout((0,), (1,), (2,)), "chain"),
    "scan of split layers": (scanned_in_pairs, (4, 4, 4), STACKED, "chain"),
    "scan of scans": (scanned_twice, (2, 3, 4, 4), Layout((2,), (3,), (0, 1)), "chain"),
    "scan of scans, inner first": (
        lambda w, x: scanned_twice(w.transpose(3, 0, 1, 2), x),
        (3, 4, 4, 2),
        Layout((1,), (2,), (3, 0)),
        "chain",
    ),
    "lax.map": (
        lambda w, x: jax.lax.map(lambda pair: pair[1] @ pair[0], (w, x.reshape(3, 2, 4))),
        (3, 4, 6),
        STACKED,
        "each",
    ),
    "vmap": (lambda w, x: jax.vmap(lambda w, x: x @ w)(w, x.reshape(3, 2, 4)), (3, 4, 6), STACKED, "each"),
    "vmap, axis 1": (
        lambda w, x: jax.vmap(lambda w, x: x @ w, in_axes=(1, 0))(w, x.reshape(3, 2, 4)),
        (4, 3, 6),
        Layout((0,), (2,), (1,)),
        "each",
    ),
    "experts": (lambda w, x: jnp.einsum("ecd,edf->ecf", x.reshape(3, 2, 4), w), (3, 4, 6), STACKED, "each"),
    "ragged_dot": (by_the_ragged_product, (3, 4, 6), STACKED, "each"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_layout_of_a_kernel_is_found_in_every_way_to_write_a_layer_and_gives_its_torch_weight(way):
    fn, kernel_shape, layout, kind = WAYS[way]
    params, x = {"layer": {"kernel": shape(*kernel_shape)}}, shape(6, 4)
    found = infer_layouts(lambda params, x: fn(params["layer"]["kernel"], x), params, x)
    assert (dict(found), dict(found.refused)) == ({"layer": layout}, {})
    kernel, x = filled(shape(*kernel_shape)), filled(x, seed=1)
    weight = layout.to_torch(kernel)
    weights = weight.reshape(-1, *weight.shape[-2:])
    if kind == "each":
        want = jnp.einsum("sbi,soi->sbo", x.reshape(len(weights), -1, 4), weights)
    else:
        want = functools.reduce(lambda y, weight: y @ weight.T, weights, x)
    got = fn(kernel, x)
    np.testing.assert_allclose(got.reshape(-1), want.reshape(-1), **TOLERANCE["float32", "forward"])


# ---- Modules of Flax, and trees of other frameworks -----------------------------------------------------------------


class Scanned(linen.Module):
    """Three layers in a scan, with parameters stacked on a given axis."""

    axis: int
    lifted: str = "scan"

    @linen.compact
    def __call__(self, x):
        if self.lifted == "vmap":
            lift = linen.vmap(linen.Dense, variable_axes={"params": self.axis}, split_rngs={"params": True})
            return lift(4, name="layers")(x)

        class Layer(linen.Module):
            @linen.compact
            def __call__(self, x, _):
                return linen.remat(linen.Dense)(4, name="up")(x), None

        lift = linen.scan(Layer, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)
        return lift(name="layers")(x, None)[0]


class ScannedNnx(nnx.Module):
    """Three layers made by vmap and run by scan."""

    def __init__(self, rngs):
        make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs)))
        self.layers = make(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


ATTENTION = {**dict.fromkeys(("query", "key", "value"), Layout((0,), (1, 2))), "out": Layout((0, 1), (2,))}
X, HEADS, FLAT = shape(5, 4), shape(5, 2, 3), shape(3, 2, 4)
SEVERAL = linen.DenseGeneral((2, 5), axis=(-2, -1))
BATCHED = linen.DenseGeneral(5, axis=-1, batch_dims=0)
NNX_ATTENTION = functools.partial(nnx.MultiHeadAttention, num_heads=2, in_features=4, decode=False)
MODULES = {
    "linen Dense": (lambda: linen_model(linen.Dense(6), X), [X], {"": DENSE}, True),
    "linen DenseGeneral": (lambda: linen_model(SEVERAL, HEADS), [HEADS], {"": Layout((0, 1), (2, 3))}, True),
    "linen DenseGeneral, batched": (lambda: linen_model(BATCHED, FLAT), [FLAT], {"": STACKED}, False),
    "linen Einsum": (
        lambda: linen_model(linen.Einsum((2, 4, 3), "td,ndh->tnh", use_bias=False), X),
        [X],
        {"": Layout((1,), (0, 2))},
        True,
    ),
    "linen attention": (lambda: linen_model(linen.MultiHeadDotProductAttention(2), X, X), [X, X], ATTENTION, False),
    "linen scan, axis 0": (lambda: linen_model(Scanned(0), X), [X], {"layers.up": STACKED}, False),
    "linen scan, axis 1": (lambda: linen_model(Scanned(1), X), [X], {"layers.up": Layout((0,), (2,), (1,))}, False),
    "linen scan, axis -1": (lambda: linen_model(Scanned(-1), X), [X], {"layers.up": Layout((0,), (1,), (2,))}, False),
    "linen vmap": (lambda: linen_model(Scanned(0, "vmap"), FLAT), [FLAT], {"layers": STACKED}, False),
    "NNX Linear": (lambda: nnx_model(lambda rngs: nnx.Linear(4, 6, rngs=rngs)), [X], {"": DENSE}, True),
    "NNX LinearGeneral": (
        lambda: nnx_model(lambda rngs: nnx.LinearGeneral((2, 3), (5, 7), axis=(-2, -1), rngs=rngs)),
        [HEADS],
        {"": Layout((0, 1), (2, 3))},
        True,
    ),
    "NNX Einsum": (
        lambda: nnx_model(lambda rngs: nnx.Einsum("td,ndh->tnh", (2, 4, 3), rngs=rngs)),
        [X],
        {"": Layout((1,), (0, 2))},
        True,
    ),
    "NNX attention": (lambda: nnx_model(lambda rngs: NNX_ATTENTION(rngs=rngs)), [X], ATTENTION, False),
    "NNX vmap and scan": (lambda: nnx_model(ScannedNnx), [X], {"layers": STACKED}, False),
}


@pytest.mark.parametrize("module", MODULES)
def test_modules_of_flax_have_the_layouts_of_their_documentation(module):
    make, inputs, layouts, plain = MODULES[module]
    fn, params = make()
    found = infer_layouts(fn, params, *inputs)
    wanted = {name or "kernel": layout for name, layout in layouts.items()}  # a model that is one layer has no name
    assert dict(found) == wanted
    assert all("added to activations" in reason for name, reason in found.refused.items() if name.endswith("bias"))
    if plain:
        (x,), params = filled(inputs, seed=1), filled(params)
        (kernel,) = (leaf for leaf in jax.tree.leaves(params) if leaf.ndim == wanted["kernel"].ndim)
        zero_bias = jax.tree.map(lambda leaf: leaf if leaf is kernel else leaf * 0, params)
        want = x.reshape(len(x), -1) @ wanted["kernel"].to_torch(kernel).T
        got = fn(zero_bias, x)
        np.testing.assert_allclose(got.reshape(want.shape), want, **TOLERANCE["float32", "forward"])


# ---- What is no kernel ----------------------------------------------------------------------------------------------


def perceiver(params, x):
    latents = params["latents"] @ params["query"]
    return latents @ (x @ params["key"]).T


def tied(params, x):
    return jnp.tanh(params["w"][x]) @ params["w"].T


def by_pallas(params, x):
    def product(x, w, out):
        out[...] = x[...] @ w[...]

    return pallas.pallas_call(product, out_shape=shape(5, 6), interpret=True)(x, params["w"])


TOKENS = shape(5, dtype=jnp.int32)
W44, W46 = shape(4, 4), shape(4, 6)
REFUSED = {
    "unused": (lambda p, x: x, {"w": W46}, X, "not used"),
    "returned": (lambda p, x: (x, p), {"w": W46}, X, "only returned, never in a matrix product"),
    "bias": (lambda p, x: x + p["w"], {"w": shape(4)}, X, "only added to activations, never in a matrix product"),
    "norm scale": (lambda p, x: x * p["w"], {"w": shape(4)}, X, "only multiplied with activations element by element"),
    "position table": (lambda p, x: x + p["w"][:5], {"w": shape(9, 4)}, X, "only added to activations"),
    "class token": (lambda p, x: jnp.concatenate([p["w"], x]), {"w": shape(1, 4)}, X, "only concatenated with activ"),
    "sorted": (lambda p, x: x @ jnp.sort(p["w"]), {"w": W46}, X, "only used by sort"),
    "called back": (
        lambda p, x: x @ jax.pure_callback(np.asarray, W46, p["w"]),
        {"w": W46},
        X,
        "only used by pure_callback",
    ),
    "in another language": (by_pallas, {"w": W46}, X, "only used by pallas_call"),
    "embedding": (lambda p, x: p["w"][x], {"w": shape(9, 4)}, TOKENS, r"an embedding table \(rows are looked up\)$"),
    "embedding by vmap": (
        lambda p, x: jax.vmap(lambda i: p["w"][i])(x.reshape(-1)) @ jnp.ones((4, 2)),
        {"w": shape(9, 4)},
        TOKENS,
        r"an embedding table \(rows are looked up\)$",
    ),
    "embedding, one row": (lambda p, x: p["w"][x], {"w": shape(9, 4)}, shape(dtype=jnp.int32), "an embedding table"),
    "tied embedding": (tied, {"w": shape(9, 4)}, TOKENS, r"tied to a matrix product with in \(1,\), out \(0,\)"),
    "convolution": (
        lambda p, x: jax.lax.conv(x[None, None], p["w"], (1, 1), "SAME"),
        {"w": shape(2, 1, 3, 3)},
        X,
        "the kernel of a convolution",
    ),
    "vector": (lambda p, x: x @ p["w"], {"w": shape(4)}, X, "a vector: none .* is left in the output"),
    "outer vector": (lambda p, x: jnp.outer(x, p["w"]), {"w": shape(4)}, X, "only multiplied with activations element"),
    "stacked vectors": (lambda p, x: x @ p["w"][0] + x @ p["w"][1], {"w": shape(2, 4)}, X, "a vector"),
    "transposed use": (
        lambda p, x: x @ p["w"] @ p["w"].T,
        {"w": W46},
        X,
        r"used in different ways: in \(0,\), out \(1,\); and in \(1,\), out \(0,\)",
    ),
    "square, transposed use": (lambda p, x: x @ p["w"] @ p["w"].T, {"w": W44}, X, "used in different ways"),
    "scanned and used whole": (
        lambda p, x: scanned(p["w"], x) + jnp.einsum("td,ldf->ltf", x, p["w"]).sum(0),
        {"w": shape(3, 4, 4)},
        X,
        r"in \(1,\), out \(2,\), stack \(0,\); and in \(1,\), out \(0, 2\)",
    ),
    "one part of a fused axis": (
        lambda p, x: x @ p["w"].reshape(4, 3, 2)[:, 0],
        {"w": W46},
        X,
        r"taken apart: parts of axis 1 of \(4, 6\) are stacked and produced",
    ),
    "axes mixed": (
        lambda p, x: x @ p["w"].reshape(4, 6),
        {"w": shape(6, 4)},
        X,
        r"only reshaped to \(4, 6\), which mixes its axes",
    ),
    "times a parameter": (lambda p, x: x @ (p["w"] @ p["v"]), {"w": W44, "v": W44}, X, "multiplied by another param"),
    "repeated": (
        lambda p, x: x @ jnp.broadcast_to(p["w"], (4, 6)),
        {"w": shape(1, 6)},
        X,
        "a vector: none .* is contracted with data",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_kernel_is_refused_by_what_it_is_instead(case):
    fn, params, x, reason = REFUSED[case]
    found = infer_layouts(fn, params, x)
    assert not found
    assert set(found.refused) == set(params)
    assert re.search(reason, found.refused["w"]), found.refused


# ---- Whole models ---------------------------------------------------------------------------------------------------


def test_weight_norm_leaves_the_direction_a_kernel_and_makes_the_scale_a_vector():
    fn, params = linen_model(linen.WeightNorm(linen.Dense(6)), X)
    found = infer_layouts(fn, params, X)
    assert dict(found) == {"layer_instance": DENSE}
    assert found.refused["layer_instance.kernel.scale"].startswith("a vector")


def test_parameters_that_meet_only_parameters_are_refused_and_those_that_meet_data_are_not():
    params = {"latents": shape(7, 4), "query": W46, "key": W46}
    found = infer_layouts(perceiver, params, X)
    assert dict(found) == {"key": DENSE}
    hint = "multiplied by another parameter or a constant, never by data: pass its Layout if it is a kernel"
    assert dict(found.refused) == {"latents": hint, "query": hint}


def test_a_state_that_starts_at_zero_is_data_from_its_second_step_on():
    def rnn(params, x):
        def step(state, x):
            return jnp.tanh(state @ params["hidden"] + params["bias"]), state

        return jax.lax.scan(step, jnp.zeros((2, 4)), x)

    def fed(params, x):
        return jax.lax.scan(lambda state, x: (state @ params["hidden"] + x, state), jnp.zeros((2, 4)), x)

    params, x = {"hidden": W44, "bias": shape(4)}, shape(3, 2, 4)
    assert dict(infer_layouts(fed, params, x)) == {"hidden": DENSE}
    assert "never by data" in infer_layouts(rnn, params, x).refused["hidden"]


class Block(linen.Module):
    """A transformer's encoder layer."""

    @linen.compact
    def __call__(self, x):
        x = linen.LayerNorm()(x + linen.MultiHeadDotProductAttention(2, name="attention")(x))
        return linen.LayerNorm()(x + linen.Dense(4, name="down")(linen.gelu(linen.Dense(8, name="up")(x))))


class Bert(linen.Module):
    """Embeddings, scanned and rematted layers, statistics, and a head that is tied to the embeddings."""

    @linen.compact
    def __call__(self, tokens):
        words = linen.Embed(9, 4, name="words")
        x = words(tokens) + linen.Embed(6, 4, name="positions")(jnp.arange(tokens.shape[-1]))
        x = linen.BatchNorm(use_running_average=True, name="norm")(x)
        block = linen.remat(Block, prevent_cse=False)
        x = linen.scan(
            lambda layer, x, _: (layer(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )(block(name="layers"), x, None)[0]
        x = linen.Dense(4, name="transform")(linen.Dropout(0.1, deterministic=True)(x))
        return words.attend(x), linen.Dense(2, name="classifier")(x[:, 0])


def test_a_whole_linen_model_is_read_and_printed_with_a_line_for_each_parameter():
    tokens = shape(3, 5, dtype=jnp.int32)
    fn, variables = linen_model(Bert(), tokens)
    found = infer_layouts(fn, variables, tokens)
    assert dict(found) == {
        **dict.fromkeys([f"layers.attention.{part}" for part in ("query", "key", "value")], Layout((1,), (2, 3), (0,))),
        "layers.attention.out": Layout((1, 2), (3,), (0,)),
        "layers.up": STACKED,
        "layers.down": STACKED,
        "transform": DENSE,
        "classifier": DENSE,
    }
    assert found.refused["words.embedding"].startswith("an embedding table (rows are looked up), tied to")
    assert "added to activations" in found.refused["positions.embedding"]
    assert "added to activations" in found.refused["layers.up.bias"]
    assert found.refused["batch_stats.norm.mean"] == "only added to activations, never in a matrix product"
    lines = str(found).splitlines()
    assert len(lines) == len(jax.tree.leaves(variables))
    assert any(re.fullmatch(r"layers\.attention\.out +in \(1, 2\), out \(3,\), stack \(0,\)", line) for line in lines)
    assert any(re.fullmatch(r"positions\.embedding +refused: only added to activations, .*", line) for line in lines)


def mixtral(params, tokens):
    """Token routing in a scan over layers: fused key and value, experts by ragged products, an untied head."""

    def layer(x, layer):
        query = jnp.einsum("td,ndh->tnh", x, layer["q"]["w"])
        key, value = jnp.einsum("td,kdh->kth", x, layer["kv"]["w"])
        weights = jax.nn.softmax(jnp.einsum("tnh,sh->nts", query, key))
        x = x + jnp.einsum("tnh,nhd->td", jnp.einsum("nts,sh->tnh", weights, value), layer["o"]["w"])
        scores, experts = jax.lax.top_k(x @ layer["router"]["w"], 1)
        order = jnp.argsort(experts[:, 0])
        groups = jnp.bincount(experts[:, 0], length=3)
        hidden = jax.nn.silu(jax.lax.ragged_dot(x[order], layer["up"]["w"], groups))
        x = x.at[order].add(scores * jax.lax.ragged_dot(hidden, layer["down"]["w"], groups))
        return x * jax.lax.rsqrt(jnp.mean(x**2)) * layer["norm"]["scale"], None

    x = jax.lax.scan(layer, params["embed"]["w"][tokens], params["layers"])[0]
    return x @ params["head"]["w"]


def test_a_mixture_of_experts_has_stacks_of_layers_and_experts():
    params = {
        "embed": {"w": shape(9, 4)},
        "head": {"w": shape(4, 9)},
        "layers": {
            "q": {"w": shape(2, 3, 4, 5)},
            "kv": {"w": shape(2, 2, 4, 5)},
            "o": {"w": shape(2, 3, 5, 4)},
            "router": {"w": shape(2, 4, 3)},
            "up": {"w": shape(2, 3, 4, 6)},
            "down": {"w": shape(2, 3, 6, 4)},
            "norm": {"scale": shape(2, 4)},
        },
    }
    found = infer_layouts(mixtral, params, shape(7, dtype=jnp.int32))
    assert dict(found) == {
        "head": DENSE,
        "layers.q": Layout((2,), (1, 3), (0,)),
        "layers.kv": Layout((2,), (1, 3), (0,)),  # one product makes both, so they are one weight (2 * 5, 4)
        "layers.o": Layout((1, 2), (3,), (0,)),
        "layers.router": STACKED,
        "layers.up": Layout((2,), (3,), (0, 1)),
        "layers.down": Layout((2,), (3,), (0, 1)),
    }
    assert set(found.refused) == {"embed", "layers.norm.scale"}


def test_selecting_experts_by_data_stacks_them():
    found = infer_layouts(lambda p, x: selected_experts(p["w"], x), {"w": shape(3, 4, 6)}, shape(6, 4))
    assert dict(found) == {"w": STACKED}


def test_trees_of_other_frameworks_are_read_by_what_they_compute_not_by_their_names():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Linear:
        weight: object
        bias: object

    equinox = {"layers": [Linear(shape(6, 4), shape(6)), Linear(shape(2, 6), None)], "activation": jax.nn.relu}
    haiku = {"mlp/~/linear_0": {"w": W46, "b": shape(6)}, "mlp/~/linear_1": {"w": shape(6, 2)}}

    def run_equinox(model, x):
        for layer in model["layers"]:
            x = jax.vmap(lambda row, layer=layer: layer.weight @ row)(model["activation"](x))
            x = x if layer.bias is None else x + layer.bias
        return x

    def run_haiku(params, x):
        first, second = params.values()
        return jax.nn.relu(x @ first["w"] + first["b"]) @ second["w"]

    out_in = Layout((1,), (0,))
    assert dict(infer_layouts(run_equinox, equinox, X)) == {"layers.0": out_in, "layers.1": out_in}
    assert dict(infer_layouts(run_haiku, haiku, X)) == {"mlp.~.linear_0": DENSE, "mlp.~.linear_1": DENSE}


# ---- Inputs, leaves and errors --------------------------------------------------------------------------------------


def test_modules_of_flax_that_are_not_matrix_products_are_refused_by_name():
    image = shape(1, 5, 5, 2)
    models = [
        (*linen_model(linen.Conv(3, (2, 2)), image), image, "convolution"),
        (*nnx_model(lambda rngs: nnx.Conv(2, 3, (2, 2), rngs=rngs)), image, "convolution"),
        (*linen_model(linen.Embed(9, 4), TOKENS), TOKENS, "embedding table"),
        (*nnx_model(lambda rngs: nnx.Embed(9, 4, rngs=rngs)), TOKENS, "embedding table"),
    ]
    for fn, params, x, reason in models:
        found = infer_layouts(fn, params, x)
        assert not found
        assert [text for text in found.refused.values() if reason in text]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Packed:
    """A quantized kernel: a tree of arrays that counts as one leaf."""

    codes: object
    scale: object
    shape = (4, 6)
    dtype = jnp.dtype("float32")

    def dequantize(self):
        return self.codes.reshape(self.shape) * self.scale


def test_a_quantized_kernel_is_one_leaf_and_the_function_sees_an_array_for_it():
    packed = Packed(shape(24, dtype=jnp.int8), shape())
    found = infer_layouts(lambda params, x: x @ params["up"]["kernel"], {"up": {"kernel": packed}}, X)
    assert (dict(found), dict(found.refused)) == ({"up": DENSE}, {})


def test_keys_flags_and_leaves_without_a_shape_are_passed_on():
    def fn(params, x, key, train, extra):
        assert train is True
        assert params["name"] == "mlp"
        keep = jax.random.bernoulli(key, 0.5, x.shape) & extra["mask"]
        return jnp.where(keep, x, 0) @ params["up"]

    extra = {"mask": shape(5, 1, dtype=bool), "text": "any"}
    for key in (jax.random.key(0), jax.random.PRNGKey(0), shape(2, dtype=jnp.uint32)):
        assert dict(infer_layouts(fn, {"up": W46, "name": "mlp"}, X, key, True, extra)) == {"up": DENSE}


def test_arrays_and_shapes_give_the_same_layouts_and_nothing_is_computed():
    params = {"up": {"kernel": W46}}

    def fn(params, x):
        assert isinstance(x, jax.core.Tracer)
        return x @ params["up"]["kernel"]

    found = infer_layouts(fn, params, X)
    assert found == infer_layouts(fn, filled(params), filled(X)) == {"up": DENSE}
    assert isinstance(found, InferredLayouts)


def test_casts_are_followed_through_calls_and_loops():
    def fn(params, x):
        cast = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree))(params)
        stacked = jax.lax.map(lambda w: w.astype(jnp.bfloat16), params["layers"])
        return scanned(stacked, x.astype(jnp.bfloat16)) @ cast["head"]

    found = infer_layouts(fn, {"layers": shape(3, 4, 4), "head": W46}, X)
    assert dict(found) == {"layers": STACKED, "head": DENSE}


def test_two_parameters_of_one_name_are_refused():
    params = {"up": {"kernel": W46, "w": W46}}
    with pytest.raises(ValueError, match=r"two parameters are called 'up': rename one"):
        infer_layouts(lambda params, x: x, params, X)


def test_errors_of_the_function_come_through_unchanged():
    error = RuntimeError("of the model")

    def fn(params, x):
        raise error

    with pytest.raises(RuntimeError) as caught:
        infer_layouts(fn, {"w": W46}, X)
    assert caught.value is error
