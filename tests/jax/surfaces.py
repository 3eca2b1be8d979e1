"""The table of cases for `test_surfaces`: models whose adapted kernels lie in every way that a framework lays them out.

The expected side knows nothing of `Layout`: each kernel of a case says by hand where torch weights (out, in) go in it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from flax import linen as nn
from flax import nnx

from interop import Factors
from randlora_jax import Layout, RandLoraBasis

HEADS, HEAD_DIM, WIDTH, HIDDEN, LAYERS = 2, 5, 8, 12, 3
# Halves the time of compilation, which is most of what these tests take.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Target(NamedTuple):
    """An adapted kernel: its layout, (out, in) of its weights, and where a list of torch weights goes in the kernel."""

    layout: Layout
    shape: tuple[int, int]
    place: Callable[[list[Any], Any], Any] = lambda dw, xp: dw[0].T


class Model(NamedTuple):
    """`forward(params, x)` of plain parameters, and for NNX how to build the module that `attach` adapts."""

    forward: Callable[[Any, Any], Any]
    params: Any
    module: Callable[[], nnx.Module] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    name: str
    build: Callable[[], Any]  # gives (forward, shapes of params), a linen module, or what makes an NNX module of rngs
    targets: dict[str, Target]
    x: tuple[int, ...] = (4, WIDTH)
    r: int = 5
    dtype: str = "float32"
    surfaces: tuple[str, ...] = ("effective_params",)
    slow: tuple[str, ...] = ()  # more surfaces, for the runs of all cases

    @functools.cached_property
    def layouts(self):
        return {name: target.layout for name, target in self.targets.items()}

    @functools.cached_property
    def inputs(self):
        return jnp.asarray(np.random.default_rng(1).standard_normal(self.x), self.dtype)

    @functools.cached_property
    def model(self):
        made = self.build()
        if isinstance(made, nn.Module):
            return Model(made.apply, filled(jax.eval_shape(made.init, jax.random.key(0), self.inputs)))
        if isinstance(made, tuple):
            forward, shapes = made
            return Model(forward, filled(shapes))
        graph, state = nnx.split(nnx.eval_shape(lambda: made(nnx.Rngs(0))))
        params = filled(state)
        # A merge that shared its Variables with the trace outside could not be scanned.
        forward = lambda params, x: nnx.merge(graph, params, copy=True)(x)  # noqa: E731
        return Model(forward, params, lambda: nnx.merge(graph, jax.tree.map(jnp.copy, params), copy=True))

    def __str__(self):
        return self.name


def filled(shapes):
    """Random parameters of order 1 / sqrt(width), the same at each call."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 3, leaf.dtype), shapes)


def name_of(path):
    """The dotted name that targets have here: without linen's collection, a box's `value` and the leaf's own name."""
    dotted = jax.tree_util.keystr(path, simple=True, separator=".")
    return re.sub(r"^params\.|\.(kernel|w|weight)(\.value)?$", "", dotted)


def kernels_of(params, names):
    """The kernels of those names, wherever they lie in the tree."""
    named = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return {name: named[name] for name in names}


def with_kernels(params, kernels):
    return jax.tree_util.tree_map_with_path(lambda path, leaf: kernels.get(name_of(path), leaf), params)


def weights_of(factors):
    """(lambda, gamma) of every weight of a kernel."""
    return list(zip(*factors, strict=True)) if factors.lam.ndim == 3 else [factors]


def oracle_kernels(case, adapter):
    """W + dW in float64 by the oracle's loops."""
    A, B = adapter.bases

    def effective(name, kernel):
        target = case.targets[name]
        options = {"scaling": adapter.config.scaling, "shape": target.shape}
        dw = [oracle.delta_weight(A, B, lam, gamma, **options) for lam, gamma in weights_of(adapter.factors[name])]
        return np.asarray(kernel, np.float64) + target.place(dw, np)

    return {name: effective(name, kernel) for name, kernel in kernels_of(case.model.params, case.targets).items()}


def written_out(lam, gamma, A, B, scaling, shape):
    """The update as one formula that JAX differentiates by itself."""
    r, n = lam.shape
    rows = jnp.einsum("kb,kd,bd->kbd", lam, A[:, 0, : min(shape)], gamma).reshape(r * n, min(shape))
    columns = B[: max(shape), :n].reshape(max(shape), n * r)
    delta = scaling * jnp.einsum("oj,ji->oi", columns, rows)
    return delta if shape[0] >= shape[1] else delta.T


@functools.partial(jax.jit, static_argnums=(5, 6), compiler_options=QUICK)
def pulled_back(grad, lam, gamma, A, B, scaling, shape):
    """Gradients (lambda, gamma) of the written-out formula from that of its result, for weights stacked in front."""

    def pull(grad, *factors):
        return jax.vjp(lambda *factors: written_out(*factors, A, B, scaling, shape), *factors)[1](grad)

    return Factors(*jax.vmap(pull)(grad, lam, gamma))


def formula_grads(case, adapter, kernel_grads):
    """Gradients of the factors from those of the kernels that hold W + dW."""
    grads = {}
    for name, target in case.targets.items():
        stacked = adapter.factors[name].lam.ndim == 3
        factors = adapter.factors[name] if stacked else Factors(*(part[None] for part in adapter.factors[name]))
        # Placing the numbers 1, 2, 3... shows where in the kernel each element of each weight is; 0 is in none.
        numbers = 1 + np.arange(len(factors.lam) * np.prod(target.shape)).reshape(-1, *target.shape)
        places = np.asarray(target.place(list(numbers), np)).astype(int).ravel()
        by_weight = np.zeros(numbers.size + 1, np.float32)
        by_weight[places] = np.asarray(kernel_grads[name], np.float32).ravel()
        grad = by_weight[1:].reshape(numbers.shape)
        pulled = pulled_back(grad, *factors, *adapter.bases, adapter.config.scaling, target.shape)
        grads[name] = pulled if stacked else Factors(*(part[0] for part in pulled))
    return grads


# Kernels of single weights.
TALL = Target(Layout((0,), (1,)), (HIDDEN, WIDTH))
WIDE = Target(Layout((0,), (1,)), (WIDTH, HIDDEN))
SQUARE = Target(Layout((0,), (1,)), (WIDTH, WIDTH))
INTO_HEADS = Target(
    Layout((0,), (1, 2)), (HEADS * HEAD_DIM, WIDTH), lambda dw, xp: dw[0].T.reshape(WIDTH, HEADS, HEAD_DIM)
)
OUT_OF_HEADS = Target(
    Layout((0, 1), (2,)), (WIDTH, HEADS * HEAD_DIM), lambda dw, xp: dw[0].T.reshape(HEADS, HEAD_DIM, WIDTH)
)
MANY_TO_MANY = Target(
    Layout((0, 1), (2, 3)), (HEADS * HEAD_DIM, WIDTH), lambda dw, xp: dw[0].T.reshape(2, 4, HEADS, HEAD_DIM)
)
HEADS_OUTSIDE = Target(  # Gemma's (heads, model, head_dim): the output axes enclose the input axis
    Layout((1,), (0, 2)),
    (HEADS * HEAD_DIM, WIDTH),
    lambda dw, xp: dw[0].reshape(HEADS, HEAD_DIM, WIDTH).transpose(0, 2, 1),
)
TORCH_WAY = Target(Layout((1,), (0,)), (HIDDEN, WIDTH), lambda dw, xp: dw[0])
TORCH_WAY_BACK = Target(Layout((1,), (0,)), (WIDTH, HIDDEN), lambda dw, xp: dw[0])
MULTI_HEAD = {"query": INTO_HEADS, "key": INTO_HEADS, "value": INTO_HEADS, "out": OUT_OF_HEADS}

# Kernels of several weights.
EXPERTS_UP = Target(Layout((1,), (2,), (0,)), (HIDDEN, WIDTH), lambda dw, xp: xp.stack([d.T for d in dw]))
EXPERTS_DOWN = Target(Layout((1,), (2,), (0,)), (WIDTH, HIDDEN), lambda dw, xp: xp.stack([d.T for d in dw]))


def _gemma(d):
    return d.reshape(HEADS, HEAD_DIM, WIDTH).transpose(0, 2, 1)


FUSED = Target(
    Layout((2,), (1, 3), (0,), modules=("attn.k_proj", "attn.v_proj")),
    (HEADS * HEAD_DIM, WIDTH),
    lambda dw, xp: xp.stack([_gemma(d) for d in dw]),
)
ONLY_V = Target(
    Layout((2,), (1, 3), (0,), modules=(None, "attn.v_proj")),
    (HEADS * HEAD_DIM, WIDTH),
    lambda dw, xp: xp.stack([xp.zeros((HEADS, WIDTH, HEAD_DIM)), _gemma(dw[0])]),
)
ONLY_ONE_EXPERT = Target(
    Layout((1,), (2,), (0,), modules=(None, "expert", None)),
    (WIDTH, HIDDEN),
    lambda dw, xp: xp.stack([xp.zeros((HIDDEN, WIDTH)), dw[0].T, xp.zeros((HIDDEN, WIDTH))]),
)


def _scanned(axis, mix, out):
    """The kernels of `LAYERS` stacked blocks, with the layers on one axis of every kernel."""
    return {
        "layers.mix": Target(mix, (WIDTH, WIDTH), lambda dw, xp: xp.stack([d.T for d in dw], axis)),
        "layers.out": Target(
            out,
            (WIDTH, HEADS * HEAD_DIM),
            lambda dw, xp: xp.stack([d.T.reshape(HEADS, HEAD_DIM, WIDTH) for d in dw], axis),
        ),
    }


SCANNED = {
    0: _scanned(0, Layout((1,), (2,), (0,)), Layout((1, 2), (3,), (0,))),
    1: _scanned(1, Layout((0,), (2,), (1,)), Layout((0, 2), (3,), (1,))),
    -1: _scanned(-1, Layout((0,), (1,), (2,)), Layout((0, 1), (2,), (3,))),
}
# (outer 2, in, inner 3, out): the inner scan stacks on axis 1, the outer one on axis 0 of the result.
NESTED = Target(
    Layout((1,), (3,), (0, 2)),
    (WIDTH, WIDTH),
    lambda dw, xp: xp.stack([xp.stack([d.T for d in dw[:3]], 1), xp.stack([d.T for d in dw[3:]], 1)]),
)
# (outer 2, inner 3, in, out): members of a vmap inside the layers of a scan.
SCANNED_MEMBERS = Target(
    Layout((2,), (3,), (0, 1)),
    (WIDTH, WIDTH),
    lambda dw, xp: xp.stack([d.T for d in dw]).reshape(2, 3, WIDTH, WIDTH),
)
# (k and v, heads, layers 3, model, head_dim): a scan takes the axis in the middle and leaves the first to the layer.
SCANNED_FUSED = Target(
    Layout((3,), (1, 4), (2, 0), modules=tuple(f"layers.{i}.{name}" for i in range(LAYERS) for name in "kv")),
    (HEADS * HEAD_DIM, WIDTH),
    lambda dw, xp: xp.stack([xp.stack([_gemma(dw[2 * i]), _gemma(dw[2 * i + 1])]) for i in range(LAYERS)], 2),
)
MEMBERS = Target(Layout((1,), (2,), (0,)), (HIDDEN, WIDTH), lambda dw, xp: xp.stack([d.T for d in dw]))


# --- Plain functions -------------------------------------------------------------------------------------------------


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def dense_shapes(leaf, bias, dtype="float32"):
    return {
        "up": {leaf: shape(WIDTH, HIDDEN, dtype=dtype), bias: shape(HIDDEN, dtype=dtype)},
        "mid": {leaf: shape(HIDDEN, WIDTH, dtype=dtype)},
        "mix": {leaf: shape(WIDTH, WIDTH, dtype=dtype)},
    }


def mlp(params, x, leaf="kernel"):
    x = jnp.tanh(x @ params["up"][leaf] + params["up"].get("bias", params["up"].get("b")))
    return jnp.tanh(x @ params["mid"][leaf]) @ params["mix"][leaf]


haiku_mlp = functools.partial(mlp, leaf="w")
DENSE = {"up": TALL, "mid": WIDE, "mix": SQUARE}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TorchLinear:
    """A layer as equinox has it: a dataclass with a weight (out, in)."""

    weight: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TorchMlp:
    layers: list[TorchLinear]

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(x @ layer.weight.T + layer.bias)
        return x


def torch_mlp():
    layers = [TorchLinear(shape(b, a), shape(b)) for a, b in ((WIDTH, HIDDEN), (HIDDEN, WIDTH))]
    return lambda params, x: params(x), TorchMlp(layers)


def experts(params, x):
    """Every token goes through every expert: (batch, model) -> (batch, experts, model)."""
    hidden = jnp.tanh(jnp.einsum("bd,edf->bef", x, params["up"]["w"]))
    return jnp.einsum("bef,efd->bed", hidden, params["down"]["w"])


EXPERTS = {"up": {"w": shape(LAYERS, WIDTH, HIDDEN)}, "down": {"w": shape(LAYERS, HIDDEN, WIDTH)}}


def fused(params, x):
    k, v = jnp.einsum("bd,cndh->cbnh", x, params["kv"]["w"])
    return jnp.tanh(k) * v


FUSED_SHAPE = {"kv": {"w": shape(2, HEADS, WIDTH, HEAD_DIM)}}


# --- linen -----------------------------------------------------------------------------------------------------------


class LinenMlp(nn.Module):
    dtype: str = "float32"
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.ones_init()
        init = nn.with_partitioning(init, ("embed", "mlp")) if self.boxed else init
        options = {"dtype": self.dtype, "param_dtype": self.dtype, "kernel_init": init}
        x = nn.tanh(nn.Dense(HIDDEN, name="up", **options)(x))
        return nn.Dense(WIDTH, name="mix", **options)(nn.tanh(nn.Dense(WIDTH, name="mid", **options)(x)))


class Transposed(nn.Module):
    """A layer that keeps its kernel as torch does and transposes it for use."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones_init(), (self.features, x.shape[-1]))
        return x @ kernel.T


class LinenGeneral(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.DenseGeneral((HEADS, HEAD_DIM), name="query")(x)
        heads += nn.DenseGeneral((HEADS, HEAD_DIM), axis=(-2, -1), name="many")(x.reshape(-1, 2, 4))
        heads += nn.Einsum((HEADS, WIDTH, HEAD_DIM), "td,ndh->tnh", use_bias=False, name="gemma")(x)
        x = nn.tanh(nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(nn.tanh(heads)))
        return Transposed(WIDTH, name="down")(nn.tanh(Transposed(HIDDEN, name="up")(x)))


def into_heads(x):
    """(batch, model) -> (batch, heads, head_dim), with some features in both heads."""
    return jnp.stack([x[:, :HEAD_DIM], x[:, -HEAD_DIM:]], axis=1)


class LinenBlock(nn.Module):
    boxed: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        init = nn.initializers.ones_init()
        init = nn.with_partitioning(init, ("embed", "mlp")) if self.boxed else init
        x = nn.tanh(nn.Dense(WIDTH, name="mix", kernel_init=init)(x))
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(into_heads(x)), None


class LinenScan(nn.Module):
    axis: int = 0
    remat: bool = False
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(LinenBlock) if self.remat else LinenBlock
        options = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}, "length": LAYERS}
        scan = nn.scan(block, **options, metadata_params={nn.PARTITION_NAME: "layers"})
        return scan(self.boxed, name="layers")(x, None)[0]


class LinenMix(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(nn.Dense(WIDTH, name="mix")(x)), None


class LinenNested(nn.Module):
    @nn.compact
    def __call__(self, x):
        inner = nn.scan(LinenMix, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        outer = nn.scan(inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return outer(name="layers")(x, None)[0]


class LinenMembers(nn.Module):
    """Members of a vmap, each with its own kernel, on the same input."""

    @nn.compact
    def __call__(self, x):
        vmap = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)
        return vmap(HIDDEN, name="members")(x)


class LinenScannedMembers(nn.Module):
    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        members = nn.vmap(LinenMix, **options, in_axes=(0, None), out_axes=(0, None), axis_size=3)
        return nn.scan(members, **options, length=2)(name="layers")(jnp.stack([x, x, -x]), None)[0]


class LinenFused(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        w = self.param("w", nn.initializers.ones_init(), FUSED_SHAPE["kv"]["w"].shape)
        return x + jnp.tanh(fused({"kv": {"w": w}}, x).mean(axis=(1, 2)))[:, None], None


class LinenPartial(nn.Module):
    @nn.compact
    def __call__(self, x):
        return LinenFused(name="kv")(x)[0]


class LinenScannedFused(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.remat(LinenFused)
        options = {"variable_axes": {"params": 2}, "split_rngs": {"params": True}, "length": LAYERS}
        return nn.scan(block, **options)(name="layers")(x, None)[0]


# --- NNX -------------------------------------------------------------------------------------------------------------


class NnxMlp(nnx.Module):
    def __init__(self, rngs, dtype=jnp.float32):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": dtype}
        self.up = nnx.Linear(WIDTH, HIDDEN, **options)
        self.mid = nnx.Linear(HIDDEN, WIDTH, **options)
        self.mix = nnx.Linear(WIDTH, WIDTH, use_bias=False, **options)

    def __call__(self, x):
        return self.mix(nnx.tanh(self.mid(nnx.tanh(self.up(x)))))


class Einsum(nnx.Module):
    """What third parties write: a bare `w`, read in one of three ways."""

    def __init__(self, equation, shape, read, rngs):
        self.w = nnx.Param(jnp.zeros(shape))
        self.equation, self.read = equation, read
        del rngs

    def __call__(self, x):
        weight = {"value": lambda: self.w.value, "index": lambda: self.w[...], "whole": lambda: self.w}[self.read]()
        return jnp.einsum(self.equation, x, weight)


class NnxGeneral(nnx.Module):
    def __init__(self, rngs):
        self.query = nnx.LinearGeneral(WIDTH, (HEADS, HEAD_DIM), rngs=rngs)
        self.many = nnx.Einsum("tab,abnh->tnh", (2, 4, HEADS, HEAD_DIM), rngs=rngs)
        self.gemma = Einsum("td,ndh->tnh", (HEADS, WIDTH, HEAD_DIM), "value", rngs)
        self.out = nnx.LinearGeneral((HEADS, HEAD_DIM), WIDTH, axis=(-2, -1), rngs=rngs)
        self.up = Einsum("td,fd->tf", (HIDDEN, WIDTH), "index", rngs)
        self.down = Einsum("tf,df->td", (WIDTH, HIDDEN), "whole", rngs)

    def __call__(self, x):
        heads = self.query(x) + self.many(x.reshape(-1, 2, 4)) + self.gemma(x)
        return self.down(nnx.tanh(self.up(nnx.tanh(self.out(nnx.tanh(heads))))))


class NnxExperts(nnx.Module):
    def __init__(self, rngs, partial=False):
        self.up = Einsum("bd,edf->bef", (LAYERS, WIDTH, HIDDEN), "value", rngs)
        self.down = Einsum("bef,efd->bed", (LAYERS, HIDDEN, WIDTH), "value", rngs)
        self.kv = Einsum("bed,cndh->cbenh", (2, HEADS, WIDTH, HEAD_DIM), "index", rngs)

    def __call__(self, x):
        k, v = self.kv(self.down(nnx.tanh(self.up(x))))
        return jnp.tanh(k) * v


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, HEADS * HEAD_DIM, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attn(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.mix = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.out = nnx.LinearGeneral((HEADS, HEAD_DIM), WIDTH, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.out(into_heads(nnx.tanh(self.mix(x))))


class NnxScan(nnx.Module):
    """`axes` is the axis of the layers, or `nnx.StateAxes` that say it of everything but the bases."""

    def __init__(self, rngs, axis=0, axes=None, remat=False):
        self.axes, self.remat = axes or axis, remat
        self.layers = nnx.vmap(NnxBlock, in_axes=0, out_axes=axis)(rngs.split(LAYERS))

    def __call__(self, x):
        def step(x, layer):
            return layer(x)

        step = nnx.remat(step) if self.remat else step
        return nnx.scan(step, in_axes=(nnx.Carry, self.axes), out_axes=nnx.Carry)(x, self.layers)


class NnxMembers(nnx.Module):
    """Members of a vmap, each with its own kernel, on the same input."""

    def __init__(self, rngs):
        self.members = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, HIDDEN, rngs=rngs))(rngs.split(3))

    def __call__(self, x):
        return nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(self.members, x)


ALL_BUT_BASES = nnx.StateAxes({RandLoraBasis: None, ...: 0})
MIXED = {
    "query": INTO_HEADS,
    "many": MANY_TO_MANY,
    "gemma": HEADS_OUTSIDE,
    "out": OUT_OF_HEADS,
    "up": TORCH_WAY,
    "down": TORCH_WAY_BACK,
}
TOKENS = (2, 4, WIDTH)
LAZY = {"surfaces": ("lazy_params",), "slow": ("effective_params",)}
ATTACH = {"surfaces": ("attach",), "slow": ("effective_params",)}
BOUND = {"surfaces": ("bound",), "slow": ("effective_params",)}


def plain(forward, shapes, **options):
    return Case(build=lambda: (forward, shapes), **options)


def linen_scan(axis, *, remat=False, boxed=False, **options):
    name = f"linen scan on axis {axis}" + ", remat" * remat + ", partitioned" * boxed
    return Case(name=name, build=lambda: LinenScan(axis, remat, boxed), targets=SCANNED[axis], **options)


def nnx_scan(axis, *, remat=False, **options):
    build = functools.partial(NnxScan, axis=axis, remat=remat)
    return Case(
        name=f"nnx scan on axis {axis}" + ", remat" * remat, build=lambda: build, targets=SCANNED[axis], **options
    )


CASES = (
    plain(mlp, dense_shapes("kernel", "bias"), name="kernels in a dict", targets=DENSE),
    plain(mlp, dense_shapes("kernel", "bias"), name="kernels in a dict, r divides", r=4, targets=DENSE),
    plain(mlp, dense_shapes("kernel", "bias"), name="kernels in a dict, r above all sides", r=20, targets=DENSE),
    plain(mlp, dense_shapes("kernel", "bias"), name="kernels in a dict, r=1", r=1, targets=DENSE),
    plain(
        mlp, dense_shapes("kernel", "bias", "float16"), name="float16 kernels in a dict", dtype="float16", targets=DENSE
    ),
    plain(haiku_mlp, dense_shapes("w", "b"), name="w in a dict, as haiku has", targets=DENSE),
    Case(
        name="weight in dataclasses, as equinox has",
        build=torch_mlp,
        targets={"layers.0": TORCH_WAY, "layers.1": TORCH_WAY_BACK},
    ),
    plain(experts, EXPERTS, name="experts", targets={"up": EXPERTS_UP, "down": EXPERTS_DOWN}),
    plain(experts, EXPERTS, name="one of three experts", targets={"down": ONLY_ONE_EXPERT}),
    plain(fused, FUSED_SHAPE, name="k and v fused", targets={"kv": FUSED}),
    plain(fused, FUSED_SHAPE, name="v of k and v fused", targets={"kv": ONLY_V}),
    Case(name="linen Dense", build=LinenMlp, targets=DENSE, **LAZY),
    Case(name="linen Dense, bfloat16", dtype="bfloat16", build=lambda: LinenMlp("bfloat16"), targets=DENSE, **LAZY),
    Case(name="linen Dense, partitioned", build=lambda: LinenMlp(boxed=True), targets=DENSE, **LAZY),
    Case(name="linen DenseGeneral, Einsum, transposed", build=LinenGeneral, targets=MIXED, **LAZY),
    Case(
        name="linen attention",
        build=lambda: nn.MultiHeadDotProductAttention(HEADS, qkv_features=HEADS * HEAD_DIM),
        targets=MULTI_HEAD,
        x=TOKENS,
        **LAZY,
    ),
    linen_scan(0, **LAZY),
    linen_scan(1, remat=True, surfaces=("effective_params", "lazy_params")),
    linen_scan(-1, **LAZY),
    linen_scan(1, remat=True, boxed=True, **LAZY),
    linen_scan(0, remat=True, surfaces=(), slow=("effective_params", "lazy_params")),
    linen_scan(1, surfaces=(), slow=("effective_params", "lazy_params")),
    linen_scan(-1, remat=True, surfaces=(), slow=("effective_params", "lazy_params")),
    Case(name="linen scan in scan", build=LinenNested, targets={"layers.mix": NESTED}, **LAZY),
    Case(name="linen vmap", build=LinenMembers, targets={"members": MEMBERS}, **LAZY),
    Case(
        name="linen vmap in scan",
        build=LinenScannedMembers,
        targets={"layers.mix": SCANNED_MEMBERS},
        surfaces=(),
        slow=("effective_params", "lazy_params"),
    ),
    Case(name="linen v of k and v fused", build=LinenPartial, targets={"kv": ONLY_V}, **LAZY),
    Case(name="linen k and v fused in scan", build=LinenScannedFused, targets={"layers": SCANNED_FUSED}, **LAZY),
    Case(name="nnx Linear", build=lambda: NnxMlp, targets=DENSE, **ATTACH),
    Case(
        name="nnx Linear, bfloat16",
        dtype="bfloat16",
        build=lambda: functools.partial(NnxMlp, dtype=jnp.bfloat16),
        targets=DENSE,
        surfaces=(),
        slow=("effective_params", "attach"),
    ),
    Case(name="nnx LinearGeneral and other einsums", build=lambda: NnxGeneral, targets=MIXED, **ATTACH),
    Case(
        name="nnx attention",
        build=lambda: NnxAttention,
        targets={f"attn.{name}": target for name, target in MULTI_HEAD.items()},
        x=TOKENS,
        **ATTACH,
    ),
    Case(
        name="nnx experts, k and v fused",
        build=lambda: NnxExperts,
        targets={"up": EXPERTS_UP, "down": ONLY_ONE_EXPERT, "kv": FUSED},
        **ATTACH,
    ),
    nnx_scan(1, remat=True, **BOUND),
    nnx_scan(0, surfaces=(), slow=("effective_params", "bound")),
    nnx_scan(1, surfaces=(), slow=("effective_params", "bound")),
    nnx_scan(0, remat=True, surfaces=(), slow=("effective_params", "bound")),
    Case(
        name="nnx scan on axis 0, StateAxes, remat",
        build=lambda: functools.partial(NnxScan, axes=ALL_BUT_BASES, remat=True),
        targets=SCANNED[0],
        **ATTACH,
    ),
    Case(name="nnx vmap", build=lambda: NnxMembers, targets={"members": MEMBERS}, **BOUND),
)
