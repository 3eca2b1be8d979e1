"""Frozen base kernels that stay quantized in memory: packed by bitsandbytes (4 and 8 bits), or `qwix.QArray`.

Each is one leaf of a model's parameters and answers as the kernel it stands for; `dequantize` gives that kernel inside
whatever jit, scan or remat the layer runs in. Training saves memory under remat only (`jax.checkpoint`, `nn.remat`,
`nnx.remat`): without it, the backward pass keeps every dequantized kernel from the forward pass. Scan the layers over a
`stack`, too: of unrolled ones, XLA may dequantize all before it runs the first, as it does on CPU, not on an H200
(benchmarks/results/memory*.md).
"""

import abc
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interop.bnb import NF4, Weight4bit, Weight8bit, read_folder
from randlora_jax.layouts import IN_OUT, Layout

_STATIC = {"static": True}


class _Quantized(abc.ABC):
    """What both kinds share: they answer for the kernel's array, with one more leading axis for each that is stacked.

    The number of stacked axes follows from the leaves, as `lax.scan` and `vmap` slice those and nothing else.
    """

    kernel_shape: tuple[int, ...]
    dtype: np.dtype

    @property
    @abc.abstractmethod
    def stack_shape(self) -> tuple[int, ...]:
        """Sizes of the leading axes over which separate kernels are stacked; () for one kernel."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantized kernel, or stack of kernels."""
        return (*self.stack_shape, *self.kernel_shape)

    @property
    def ndim(self) -> int:
        """Number of axes of the dequantized kernel."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights, not of the bytes that hold them."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the quantized kernel takes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


# The arrays are declared as Any: tracing, shardings and `tree.map` put other things into their places.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized4bit(_Quantized):
    """A kernel of 4-bit codes with one scale per block of the torch weight, row by row. Make it with `from_bnb`.

    Attributes:
        packed: uint8 `(*stack, ceil(n/2))` for a kernel of n weights; the high half of a byte is the earlier code.
        absmax: float32 `(*stack, ceil(n/blocksize))`, the scales.
        code: The 16 numbers that the codes stand for, before they are scaled (static).
        blocksize: How many weights share a scale (static).
        layout: How one kernel relates to torch's (out, in) weight (static).
        kernel_shape: Shape of one kernel, without stacked axes (static).
        dtype: The kernel's dtype (static).
        quant_type: "nf4" or "fp4" (static).
    """

    packed: Any
    absmax: Any
    code: tuple[float, ...] = dataclasses.field(metadata=_STATIC)
    blocksize: int = dataclasses.field(metadata=_STATIC)
    layout: Layout = dataclasses.field(metadata=_STATIC)
    kernel_shape: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    dtype: np.dtype = dataclasses.field(metadata=_STATIC)
    quant_type: str = dataclasses.field(metadata=_STATIC)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """See `_Quantized`."""
        return self.packed.shape[:-1]

    def dequantize(self) -> jax.Array:
        """The kernel in its dtype, bit for bit what bitsandbytes computes with. No gradient passes through it."""
        return _dequantize_4bit(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized8bit(_Quantized):
    """A kernel of 8-bit integers with one scale per output feature. Make it with `from_bnb`.

    Attributes:
        values: int8 `(*stack, out, in)`, as in torch.
        scales: float32 `(*stack, out)`, the step between neighboring integers.
        layout: How one kernel relates to torch's (out, in) weight (static).
        kernel_shape: Shape of one kernel, without stacked axes (static).
        dtype: The kernel's dtype (static).
    """

    values: Any
    scales: Any
    layout: Layout = dataclasses.field(metadata=_STATIC)
    kernel_shape: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    dtype: np.dtype = dataclasses.field(metadata=_STATIC)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """See `_Quantized`."""
        return self.values.shape[:-2]

    def dequantize(self) -> jax.Array:
        """The kernel in its dtype, bit for bit what `Linear8bitLt` trains with. No gradient passes through it."""
        return _dequantize_8bit(self)


def is_quantized(leaf: Any) -> bool:
    """Whether `dequantize` has something to do: a kernel packed by bitsandbytes or a `qwix.QArray`.

    Use it as `is_leaf` in `jax.tree.map`, as both kinds are trees of their arrays.
    """
    return isinstance(leaf, Quantized4bit | Quantized8bit) or _is_qarray(leaf)


def dequantize(leaf: Any) -> Any:
    """The array that a quantized kernel stands for; anything else is returned as it is."""
    if isinstance(leaf, Quantized4bit | Quantized8bit):
        return leaf.dequantize()
    if _is_qarray(leaf):
        return jax.lax.stop_gradient(_qwix().dequantize(leaf))
    return leaf


def from_bnb(
    weight: Weight4bit | Weight8bit, layout: Layout = IN_OUT, kernel_shape: tuple[int, ...] | None = None
) -> Quantized4bit | Quantized8bit:
    """A weight packed by bitsandbytes as a kernel, on the default device; the packed bytes stay as they are.

    Args:
        weight: What `interop.bnb.read_folder` gives.
        layout: How the kernel relates to torch's (out, in) weight; by default it is the transpose.
        kernel_shape: Shape of the kernel, needed if it has more than two axes.

    Raises:
        ValueError: the weight or the layout is of several weights, or the kernel's shape does not fit.
    """
    if len(weight.shape) != 2 or layout.stack_axes or not layout.is_plain:
        raise ValueError(
            f"a weight of shape {weight.shape} cannot be a kernel of {layout}: pass a weight (out, in) and the layout"
            " of a single kernel, neither scaled nor interleaved. `stack` puts several of them together, and"
            " weight.dequantize() gives a plain array."
        )
    if kernel_shape is None and layout.ndim == 2:
        kernel_shape = weight.shape if layout.out_axes == (0,) else weight.shape[::-1]
    if kernel_shape is None or layout.torch_shape(kernel_shape) != weight.shape:
        raise ValueError(
            f"kernel_shape={kernel_shape} by {layout} does not hold a weight of shape {weight.shape}: pass the shape of"
            " the kernel that the layout describes."
        )
    static: dict[str, Any] = {"layout": layout, "kernel_shape": tuple(kernel_shape), "dtype": np.dtype(weight.dtype)}
    if isinstance(weight, Weight8bit):
        return Quantized8bit(jnp.asarray(weight.values), jnp.asarray(weight.scales), **static)
    static |= {"code": weight.code, "blocksize": weight.blocksize, "quant_type": weight.quant_type}
    return Quantized4bit(jnp.asarray(weight.packed), jnp.asarray(weight.absmax), **static)


def load_quantized(
    folder: str | os.PathLike[str], layout: Layout = IN_OUT
) -> dict[str, jax.Array | Quantized4bit | Quantized8bit]:
    """The weights of a transformers folder on the default device, by their names in torch; quantized ones stay so.

    Args:
        folder: See `interop.bnb.read_folder`.
        layout: Of the quantized kernels, which have two axes. Plain arrays are as in the file: 2-D weights (out, in).

    Raises:
        FileNotFoundError, CheckpointFormatError: see `interop.bnb.read_folder`.
        ValueError: see `from_bnb`.
    """
    weights = read_folder(folder)
    # Popped one by one, so that the host does not hold all weights while the device receives them.
    return {name: _to_device(weights.pop(name), layout) for name in list(weights)}


def stack(kernels: Sequence[Quantized4bit | Quantized8bit]) -> Quantized4bit | Quantized8bit:
    """Kernels of one shape and kind along a new leading axis, as `lax.scan` and `vmap` take them apart again.

    Raises:
        ValueError: there are none, or they differ in more than their numbers.
    """
    kernels = list(kernels)
    described = {(jax.tree.structure(kernel), kernel.shape) for kernel in kernels}
    if len(described) != 1:
        kinds = sorted({f"{type(kernel).__name__} {kernel.shape} {kernel.dtype}" for kernel in kernels})
        raise ValueError(
            f"{len(kernels)} kernels of kinds {kinds} cannot be stacked: they must be of one shape, dtype, layout,"
            " quant_type and blocksize, and at least one. Stack those that are alike, and scan over each stack."
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *kernels)


def to_qarray(kernel: Quantized4bit) -> Any:
    """The same kernel as a `qwix.QArray` of qtype "nf4", which dequantizes to the same numbers in float32.

    Its dtype is that of its scales, float32: cast what it dequantizes to, to `kernel.dtype`, for equal bits there.
    Needs the extra `qwix`.

    Raises:
        ValueError: the codes are not nf4, or the blocks go across rows: QArray tiles the input features only.
        ImportError: qwix is not installed.
    """
    layout, shape, blocksize = kernel.layout, kernel.kernel_shape, kernel.blocksize
    if kernel.quant_type != "nf4" or not np.array_equal(
        np.asarray(kernel.code, np.float32), np.asarray(NF4, np.float32)
    ):
        raise ValueError(f"quant_type={kernel.quant_type!r} has no counterpart in qwix, only 'nf4' has: dequantize it.")
    last = layout.in_axes[-1]
    if shape[last] % blocksize:
        raise ValueError(
            f"a kernel of shape {kernel.shape} with {shape[last]} on the last of its input axes is no multiple of the"
            f" blocksize {blocksize}: blocks go across rows, which QArray cannot hold. Keep the kernel as it is."
        )
    outputs, inputs = layout.torch_shape(shape)
    codes = _nibbles(kernel.packed, outputs * inputs).astype(jnp.bfloat16)  # a float that holds 0..15, for the layout
    codes = codes.reshape(*kernel.stack_shape, outputs, inputs)
    scales = kernel.absmax.reshape(*kernel.stack_shape, outputs, inputs // blocksize)
    blocks_shape = tuple(size // blocksize if axis == last else size for axis, size in enumerate(shape))
    return _qwix().QArray(
        qvalue=_to_kernel(codes, layout, shape).astype(jnp.uint4),
        scale=_to_kernel(scales, layout, blocks_shape),
        qtype="nf4",
    )


@jax.jit
def _dequantize_4bit(kernel: Quantized4bit) -> jax.Array:
    outputs, inputs = kernel.layout.torch_shape(kernel.kernel_shape)
    count, blocksize = outputs * inputs, kernel.blocksize
    absmax = jax.lax.stop_gradient(kernel.absmax)
    codes = _nibbles(kernel.packed, count)
    values = jnp.asarray(kernel.code, jnp.float32).at[codes].get(mode="promise_in_bounds")
    if count % blocksize:
        values *= jnp.repeat(absmax, blocksize, axis=-1)[..., :count]
    else:
        values = values.reshape(*absmax.shape, blocksize) * absmax[..., None]
    values = values.reshape(*kernel.stack_shape, outputs, inputs)
    return _to_kernel(_rounded(values, kernel.dtype), kernel.layout, kernel.kernel_shape)


@jax.jit
def _dequantize_8bit(kernel: Quantized8bit) -> jax.Array:
    values = kernel.values.astype(jnp.float32) * jax.lax.stop_gradient(kernel.scales)[..., None]
    return _to_kernel(_rounded(values, kernel.dtype), kernel.layout, kernel.kernel_shape)


def _nibbles(packed: jax.Array, count: int) -> jax.Array:
    """The 4-bit codes (*stack, count) of packed bytes (*stack, ceil(count/2))."""
    return jnp.stack([packed >> 4, packed & 15], axis=-1).reshape(*packed.shape[:-1], -1)[..., :count]


def _rounded(values: jax.Array, dtype: np.dtype) -> jax.Array:
    """A cast that stays one: XLA may drop a cast to bfloat16 and back ("excess precision"), but not this rounding."""
    if dtype == jnp.bfloat16:
        values = jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    return values.astype(dtype)


def _to_kernel(weights: jax.Array, layout: Layout, kernel_shape: tuple[int, ...]) -> jax.Array:
    """Torch weights (*stack, out, in) as kernels (*stack, *kernel_shape)."""
    stacked = weights.shape[:-2]
    return layout.within(len(stacked)).to_kernel(weights, (*stacked, *kernel_shape))


def _to_device(weight: np.ndarray | Weight4bit | Weight8bit, layout: Layout) -> Any:
    return jnp.asarray(weight) if isinstance(weight, np.ndarray) else from_bnb(weight, layout)


def _is_qarray(leaf: Any) -> bool:
    """By name: whoever holds a QArray has imported qwix, and nobody else has to."""
    return type(leaf).__name__ == "QArray" and type(leaf).__module__.partition(".")[0] == "qwix"


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ImportError("qwix is not installed: pip install 'randlora[qwix]'.") from error
    return qwix
