"""How a kernel of a JAX model relates to torch's 2-D weight (out, in), and how its path relates to a torch name.

The layout is applied to dW only. lambda, gamma and the bases always stay in torch's coordinates, so that conversion is
renaming and stacking.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Layout:
    """Axes of a kernel that the layer contracts with its input, that it produces, and that number separate weights.

    Axis groups are read in the given order, in row-major fashion: a (heads, head_dim, model) output projection with
    in_axes (0, 1) and out_axes (2,) is torch's (model, heads * head_dim) weight.

    A kernel with stack_axes holds several weights of one shape: the layers of a scan, the members of a vmap, experts,
    or projections fused into one array. Each has its own lambda and gamma.

    Attributes:
        in_axes: Axes that are summed over with the input.
        out_axes: Axes that appear in the output.
        stack_axes: Axes over which separate weights are stacked, outermost transformation first.
        modules: Names that the weights have in adapter files, one for each in row-major order of stack_axes. None in
            place of a name leaves that weight unadapted. By default the kernel's own name, with the index appended
            for stacked weights: "layers.q_proj.0", "layers.q_proj.1", and so on.
        scale: What the kernel is torch's weight times, where a model has folded a constant into it.
        interleaved: Whether the last of out_axes holds the pairs that a rotary embedding turns next to each other,
            where torch has the first members of all pairs, then the second ones.

    Raises:
        ValueError: the groups are not a permutation of all axes of a kernel, `modules` are no distinct names, or the
            scale is 0 or not finite.
    """

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stack_axes: tuple[int, ...] = ()
    modules: tuple[str | None, ...] | None = None
    scale: float | int = 1.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        """Check that every axis stands in exactly one group."""
        for field in ("in_axes", "out_axes", "stack_axes"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        axes = (*self.in_axes, *self.out_axes, *self.stack_axes)
        if sorted(axes) != list(range(len(axes))) or not self.in_axes or not self.out_axes:
            raise ValueError(
                f"in_axes={self.in_axes}, out_axes={self.out_axes}, stack_axes={self.stack_axes}: together they must"
                " name every axis 0..ndim-1 of the kernel once, with at least one axis in in_axes and in out_axes."
            )
        if isinstance(self.modules, str):
            raise ValueError(f"modules={self.modules!r}: pass a tuple of names, one for each stacked weight.")
        if self.modules is not None:
            object.__setattr__(self, "modules", tuple(self.modules))
            names = [name for name in self.modules if name is not None]
            if not names or len(set(names)) != len(names):
                raise ValueError(f"modules={self.modules}: give at least one name, and none of them twice.")
        object.__setattr__(self, "scale", float(self.scale))
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"scale={self.scale}: give a finite number other than 0; 1.0 is torch's own weight.")

    @property
    def ndim(self) -> int:
        """Number of axes of the kernel."""
        return len(self.in_axes) + len(self.out_axes) + len(self.stack_axes)

    def torch_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, int]:
        """(out, in) of the torch weight that a kernel of this shape, or each weight stacked in it, stands for.

        Raises:
            ValueError: the kernel has another number of axes.
        """
        self._check(kernel_shape)
        out, inp = (math.prod(kernel_shape[axis] for axis in axes) for axes in (self.out_axes, self.in_axes))
        return out, inp

    def stack_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of stack_axes, in their order; () for a kernel that is one weight.

        Raises:
            ValueError: the kernel has another number of axes.
        """
        self._check(kernel_shape)
        return tuple(kernel_shape[axis] for axis in self.stack_axes)

    @property
    def is_plain(self) -> bool:
        """Whether kernel and torch weight hold the same numbers, in whatever order of axes."""
        return self.scale == 1 and not self.interleaved

    @property
    def in_first(self) -> bool:
        """Whether the kernel's inputs come before its outputs, as in flax, and not after them, as in torch."""
        return self.in_axes[0] < self.out_axes[0]

    def to_kernel(
        self, weight: Float[Array, "*stack rows columns"], kernel_shape: tuple[int, ...], *, in_first: bool = False
    ) -> Float[Array, "..."]:
        """Torch weights `(*stack_shape, out, in)`, or transposed `(*stack_shape, in, out)`, in the kernel's layout."""
        groups = (self.in_axes, self.out_axes) if in_first else (self.out_axes, self.in_axes)
        order = (*self.stack_axes, *groups[0], *groups[1])
        split = weight.reshape([kernel_shape[axis] for axis in order])
        if self.interleaved:  # (..., 2 halves, pairs, ...) -> (..., pairs, 2 members, ...)
            split = _swap_factors(split, order.index(self.out_axes[-1]), 2)
        kernel = split.transpose([order.index(axis) for axis in range(len(order))])
        return kernel if self.scale == 1 else kernel * self.scale

    def to_torch(self, kernel: Float[Array, "..."]) -> Float[Array, "*stack outputs inputs"]:
        """The inverse of `to_kernel`: torch weights `(*stack_shape, out, in)` of a kernel.

        Raises:
            ValueError: the kernel has another number of axes.
        """
        shape = (*self.stack_shape(kernel.shape), *self.torch_shape(kernel.shape))
        kernel = kernel if self.scale == 1 else kernel / self.scale
        if self.interleaved:
            kernel = _swap_factors(kernel, self.out_axes[-1], kernel.shape[self.out_axes[-1]] // 2)
        return kernel.transpose((*self.stack_axes, *self.out_axes, *self.in_axes)).reshape(shape)

    def module_names(self, name: str, kernel_shape: tuple[int, ...]) -> tuple[str | None, ...]:
        """Names of the weights in adapter files; None marks one that is not adapted.

        >>> Layout((1,), (2,), stack_axes=(0,)).module_names("layers.q_proj", (2, 8, 8))
        ('layers.q_proj.0', 'layers.q_proj.1')

        Raises:
            ValueError: `modules` gives another number of names than there are weights.
        """
        stack = self.stack_shape(kernel_shape)
        count = math.prod(stack)
        if self.modules is None:
            return weight_names(name, count if stack else None)
        if len(self.modules) != count:
            raise ValueError(
                f"{name} has shape {kernel_shape}, that is {count} weights by {self}: give {count} names in modules."
            )
        return self.modules

    def without(self, gone: tuple[int, ...]) -> "Layout":
        """The layout of one slice, after transformations took these stack_axes."""
        kept = tuple(axis for axis in self.stack_axes if axis not in gone)
        shift = {axis: axis - sum(other < axis for other in gone) for axis in range(self.ndim)}
        inp, out, stack = (tuple(shift[axis] for axis in axes) for axes in (self.in_axes, self.out_axes, kept))
        return Layout(inp, out, stack, scale=self.scale, interleaved=self.interleaved)

    def within(self, stacked: int) -> "Layout":
        """The layout with so many stack_axes more, in front of all axes, and default names for the weights."""
        groups = (self.in_axes, self.out_axes, self.stack_axes)
        inp, out, stack = (tuple(axis + stacked for axis in axes) for axes in groups)
        return Layout(inp, out, (*range(stacked), *stack), scale=self.scale, interleaved=self.interleaved)

    def align(self, array: Float[Array, "*weights rows columns"], kernel_shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Put stacked factors on the kernel's own stack_axes, so that a scan or vmap slices both alike.

        The other axes are the two of the factor, then axes of size one, as many as the kernel has.
        """
        if not self.stack_axes:
            return array
        count = len(self.stack_axes)
        padding = (1,) * (self.ndim - count - 2)
        stacked = array.reshape(self.stack_shape(kernel_shape) + array.shape[1:] + padding)
        return jnp.moveaxis(stacked, range(count), self.stack_axes)

    def unalign(self, array: Float[Array, "..."]) -> Float[Array, "*weights rows columns"]:
        """The inverse of `align`: (weights, rows, columns), without the first axis for a kernel that is one weight."""
        count = len(self.stack_axes)
        front = jnp.moveaxis(array, self.stack_axes, range(count))
        rows_columns = front.shape[count : count + 2]
        return front.reshape((-1, *rows_columns) if count else rows_columns)

    def _check(self, kernel_shape: tuple[int, ...]) -> None:
        if len(kernel_shape) != self.ndim:
            raise ValueError(f"a kernel of shape {kernel_shape} does not have the axes of {self}.")
        if self.interleaved and kernel_shape[self.out_axes[-1]] % 2:
            raise ValueError(
                f"a kernel of shape {kernel_shape} cannot be interleaved: its axis {self.out_axes[-1]}, the last of"
                " out_axes, has no pairs. Correct the order of out_axes."
            )


def _swap_factors(array: Array, axis: int, first: int) -> Array:
    """The array with one axis read as (first, rest) and written as (rest, first)."""
    shape = array.shape
    split = array.reshape(*shape[:axis], first, shape[axis] // first, *shape[axis + 1 :])
    return split.swapaxes(axis, axis + 1).reshape(shape)


IN_OUT = Layout(in_axes=(0,), out_axes=(1,))  # linen, NNX, haiku
OUT_IN = Layout(in_axes=(1,), out_axes=(0,))  # equinox, torch
_DEFAULTS = {"kernel": IN_OUT, "w": IN_OUT, "weight": OUT_IN}
LEAVES = tuple(_DEFAULTS)  # what kernels are called, which is no part of their names


def path_parts(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The parts of a pytree path as strings, without linen's "params" in front and the `.value` of a box at the end."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):  # nnx.Variable, nn.Partitioned
        path = path[:-1]
    keys = (jax.tree_util.keystr((key,), simple=True) for key in path)
    parts = tuple(part for key in keys for part in key.split("/"))  # haiku: {"mlp/~/linear_0": {"w": ...}}
    return parts[1:] if parts[:1] == ("params",) else parts


def weight_names(name: str, count: int | None) -> tuple[str, ...]:
    """Default names of the weights in a kernel, with the index appended if they are stacked; None: it is one weight."""
    return (name,) if count is None else tuple(f"{name}.{i}" for i in range(count))


def module_name(parts: tuple[str, ...]) -> str:
    """The adapter's name for a parameter: its dotted path, without a final "kernel", "w" or "weight".

    >>> module_name(("layers", "0", "q_proj", "kernel"))
    'layers.0.q_proj'
    """
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] in _DEFAULTS else parts)


def default_layout(parts: tuple[str, ...], ndim: int) -> Layout | None:
    """The layout of a 2-D `kernel` or `w` (in, out), or `weight` (out, in); None for anything else."""
    return _DEFAULTS.get(parts[-1]) if parts and ndim == 2 else None
