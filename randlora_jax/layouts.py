"""How a kernel of a JAX model relates to torch's 2-D weight (out, in), and how its path relates to a torch name.

The layout is applied to dW only. lambda, gamma and the bases always stay in torch's coordinates, so that conversion is
renaming.
"""

import dataclasses
import math
from typing import Any

import jax
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Layout:
    """Axes of a kernel that the layer contracts with its input, and axes that it produces.

    Axis groups are read in the given order, in row-major fashion: a (heads, head_dim, model) output projection with
    in_axes (0, 1) and out_axes (2,) is torch's (model, heads * head_dim) weight.

    Raises:
        ValueError: the two groups are not a permutation of all axes of a kernel.
    """

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that every axis stands in exactly one group."""
        axes = (*self.in_axes, *self.out_axes)
        if sorted(axes) != list(range(len(axes))) or not self.in_axes or not self.out_axes:
            raise ValueError(
                f"in_axes={self.in_axes}, out_axes={self.out_axes}: together they must name every axis 0..ndim-1 of"
                " the kernel once, with at least one axis in each."
            )

    @property
    def ndim(self) -> int:
        """Number of axes of the kernel."""
        return len(self.in_axes) + len(self.out_axes)

    def torch_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, int]:
        """(out, in) of the torch weight that a kernel of this shape stands for.

        Raises:
            ValueError: the kernel has another number of axes.
        """
        if len(kernel_shape) != self.ndim:
            raise ValueError(f"a kernel of shape {kernel_shape} does not have the axes of {self}.")
        out, inp = (math.prod(kernel_shape[axis] for axis in axes) for axes in (self.out_axes, self.in_axes))
        return out, inp

    def to_kernel(self, weight: Float[Array, "outputs inputs"], kernel_shape: tuple[int, ...]) -> Float[Array, "..."]:
        """A torch weight (out, in) in the layout of the kernel."""
        order = self.out_axes + self.in_axes
        split = weight.reshape([kernel_shape[axis] for axis in order])
        return split.transpose([order.index(axis) for axis in range(len(order))])


IN_OUT = Layout(in_axes=(0,), out_axes=(1,))  # linen, NNX, haiku
OUT_IN = Layout(in_axes=(1,), out_axes=(0,))  # equinox, torch
_DEFAULTS = {"kernel": IN_OUT, "w": IN_OUT, "weight": OUT_IN}


def path_parts(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The parts of a pytree path as strings, without the "params" collection that linen puts first."""
    parts = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    if len(parts) > 1 and parts[-1] == "value" and parts[-2] in _DEFAULTS:  # nnx.State holds Variables
        parts = parts[:-1]
    return parts[1:] if parts[:1] == ("params",) else parts


def module_name(parts: tuple[str, ...]) -> str:
    """The adapter's name for a parameter: its dotted path, without a final "kernel", "w" or "weight".

    >>> module_name(("layers", "0", "q_proj", "kernel"))
    'layers.0.q_proj'
    """
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] in _DEFAULTS else parts)


def default_layout(parts: tuple[str, ...], ndim: int) -> Layout | None:
    """The layout of a 2-D `kernel` or `w` (in, out), or `weight` (out, in); None for anything else."""
    return _DEFAULTS.get(parts[-1]) if parts and ndim == 2 else None
