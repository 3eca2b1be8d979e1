"""The kernels of a model: which parameters can be adapted, and W + dW of one kernel, stacked or sharded as it is."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array, Float

from interop.adalora import SVDFactors
from interop.bases import Bases
from interop.delta import Factors
from interop.errors import bulleted
from randlora_jax.bases import layer_bases
from randlora_jax.contraction import check_holds_update
from randlora_jax.gradients import delta_weight
from randlora_jax.layouts import OUT_IN, Layout, default_layout, module_name, path_parts
from randlora_jax.naming import Layouts, resolve_layouts
from randlora_jax.quantized import is_quantized
from randlora_jax.svd import delta_of_triplets

AnyFactors = Factors | SVDFactors  # of RandLoRA, of AdaLoRA


class Kernel(NamedTuple):
    """A parameter that can be adapted: its layout and its shape."""

    layout: Layout
    kernel_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the torch weight that the kernel, or each weight stacked in it, stands for."""
        return self.layout.torch_shape(self.kernel_shape)

    def modules(self, name: str) -> dict[int, str]:
        """Names in adapter files of the weights in a kernel called `name`, by index; without those not adapted."""
        names = self.layout.module_names(name, self.kernel_shape)
        return {index: module for index, module in enumerate(names) if module is not None}


class Kernels(NamedTuple):
    """What `find_kernels` finds.

    Attributes:
        kernels: Kernels that can be adapted, by dotted name.
        refused: Why other parameters cannot be, by dotted name.
        guessed: Names of leaves called "weight" that are taken for (out, in) by their name alone.
    """

    kernels: dict[str, Kernel]
    refused: dict[str, str]
    guessed: list[str]

    @property
    def unclear(self) -> list[str]:
        """Names of kernels that only lack a `Layout`."""
        return [name for name, reason in self.refused.items() if reason == NEEDS_LAYOUT]


NEEDS_LAYOUT = "a kernel with more than two axes, which needs a Layout"
NOT_A_KERNEL = "not a linear layer's kernel"


def named_leaves(params: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Path and leaf of each parameter; a quantized kernel is one leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
    return [(path_parts(path), leaf) for path, leaf in leaves if hasattr(leaf, "shape")]


def find_kernels(leaves: Iterable[tuple[tuple[str, ...], Any]], layouts: Layouts | None) -> Kernels:
    """Kernels that can be adapted, by dotted name, and why the other parameters cannot be.

    Args:
        leaves: Path and leaf of each parameter.
        layouts: Layouts that do not follow from name and number of axes, by dotted name, or rules for them. Layouts by
            `infer_layouts` are all there are: nothing is concluded from names then.

    Raises:
        ValueError: `layouts` names a parameter that does not exist, or does not fit its shape; rules do not fit the
            parameters; or two parameters have one name.
    """
    leaves = list(leaves)
    layouts = resolve_layouts(layouts, leaves)
    reasons = getattr(layouts, "refused", None)
    found, used = Kernels({}, {}, []), set()
    for parts, leaf in leaves:
        if not parts:
            raise ValueError("params is a single array, which has no name: pass a tree, such as {'name': array}.")
        name = module_name(parts)
        layout = layouts.get(name)
        if layout is None and reasons is None:
            layout = default_layout(parts, len(leaf.shape))
            found.guessed.extend([name] * (layout == OUT_IN))
        if layout is None:
            unclear = parts[-1] in ("kernel", "w") and len(leaf.shape) > 2
            found.refused[name] = (reasons or {}).get(name) or (NEEDS_LAYOUT if unclear else NOT_A_KERNEL)
        elif name in found.kernels:
            raise ValueError(f"two parameters are called {name!r}, one of them by its leaf {parts[-1]!r}: rename one.")
        else:
            used.add(name)
            found.kernels[name] = Kernel(layout, tuple(leaf.shape))
            found.kernels[name].modules(name)  # refuses a wrong number of axes or names
    unknown = sorted(set(layouts) - used)
    if unknown:
        names = [*found.kernels, *found.refused]
        raise ValueError(f"layouts are given for {unknown}, which are no parameters. Names are {names}.")
    return found


def weight_deltas(
    bases: Bases | None,
    factors: AnyFactors,
    shape: tuple[int, int],
    *,
    scaling: float,
    dtype: np.dtype | None = None,
    in_first: bool = False,
) -> Float[Array, "*weights rows columns"]:
    """The update dW of a torch weight of shape (out, in), or of several stacked ones; with in_first (in, out).

    The other arguments are those of `kernel_delta`.
    """
    transposed = (shape[0] >= shape[1]) == in_first  # `delta_weight` gives the long side first

    def update(factors: AnyFactors) -> Array:
        if isinstance(factors, SVDFactors):
            return delta_of_triplets(factors, scaling=scaling, dtype=dtype, in_first=in_first)
        assert bases is not None  # `RandLoraAdapter` has them
        return delta_weight(*layer_bases(bases, shape), *factors, scaling=scaling, dtype=dtype, transposed=transposed)

    return jax.vmap(update)(factors) if is_stacked(factors) else update(factors)


def is_stacked(factors: AnyFactors) -> bool:
    """Whether these are the factors of several weights, on a first axis."""
    return factors[0].ndim > 2


def fits_weight(factors: AnyFactors, shape: tuple[int, int]) -> bool:
    """Whether the factors, stacked or not, are those of a torch weight of shape (out, in)."""
    if isinstance(factors, SVDFactors):
        A, E, B = (part.shape[-2:] for part in factors)
        return (B[0], A[1]) == shape and A[0] == E[0] == B[1]
    return factors.gamma.shape[-2:] == (factors.lam.shape[-1], min(shape))


def kernel_delta(
    bases: Bases | None, factors: AnyFactors, kernel: Kernel, *, scaling: float, dtype: np.dtype | None = None
) -> Float[Array, "..."]:
    """The update dW of all weights of a kernel, in its layout, float32 or wider; zero for weights not adapted.

    The product has the kernel's order of inputs and outputs from the start. XLA would otherwise move a transposition of
    dW to W, and in a scan out of the loop, where it makes a transposed copy of the kernels of all layers.

    Args:
        bases: The shared bases; the part that these weights use is sliced from them. AdaLoRA has none.
        factors: lam (r, n) and gamma (n, d), or A (r, in), E (r, 1) and B (out, r); for a kernel with stack_axes with
            an axis over the weights in front.
        kernel: Layout and shape of the kernel.
        scaling: `config.scaling`.
        dtype: See `delta_weight`.
    """
    layout, in_first = kernel.layout, kernel.layout.in_first
    deltas = weight_deltas(bases, factors, kernel.shape, scaling=scaling, dtype=dtype, in_first=in_first)
    stack = layout.stack_shape(kernel.kernel_shape)
    if stack and len(deltas) < math.prod(stack):
        adapted = np.asarray(list(kernel.modules("")))
        deltas = jnp.zeros((math.prod(stack), *deltas.shape[1:]), deltas.dtype).at[adapted].set(deltas)
    return layout.to_kernel(deltas.reshape(*stack, *deltas.shape[-2:]), kernel.kernel_shape, in_first=in_first)


def combine_kernel(
    weight: Array,
    bases: Bases | None,
    factors: AnyFactors,
    kernel: Kernel,
    *,
    scaling: float,
    dtype: np.dtype | None = None,
    combine: Callable[[Array, Array], Array] = jnp.add,
) -> Array:
    """W + dW, or another combination, of one kernel: computed in the wider dtype, returned in W's dtype and sharding.

    Raises:
        ValueError: W is not of a floating point dtype of at least 16 bits.
    """
    check_holds_update(weight)

    def combined(weight: Array, bases: Bases | None, factors: AnyFactors) -> Array:
        delta = kernel_delta(bases, factors, kernel, scaling=scaling, dtype=dtype)
        return combine(weight.astype(jnp.promote_types(weight.dtype, delta.dtype)), delta).astype(weight.dtype)

    if on_explicit_mesh(weight):  # slices and reshapes of sharded axes are XLA's to place
        return jax.sharding.auto_axes(combined, out_sharding=jax.typeof(weight).sharding)(weight, bases, factors)
    return combined(weight, bases, factors)


def on_explicit_mesh(*arrays: Array) -> bool:
    """Whether the program itself says how any of these arrays is sharded."""
    return any(AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types for array in arrays)


def align_factors(factors: AnyFactors, kernel: Kernel) -> AnyFactors:
    """Factors with their stack on the kernel's own axes (`Layout.align`), unless only some weights are adapted."""
    if _is_partial(kernel.layout):
        return factors
    return type(factors)(*(kernel.layout.align(part, kernel.kernel_shape) for part in factors))


def unalign_factors(factors: AnyFactors, kernel: Kernel, shape: tuple[int, ...]) -> tuple[AnyFactors, Kernel]:
    """The factors of `align_factors` and the kernel as they are now that a scan or vmap may have sliced them.

    Args:
        factors: Aligned factors, or slices of them.
        kernel: The whole kernel.
        shape: Shape of the kernel now: without those stack_axes that the transformations took.

    Raises:
        ValueError: some weights of a sliced kernel are not adapted, or it is sliced along other axes.
    """
    sliced = kernel.layout.ndim - len(shape)
    if _is_partial(kernel.layout):
        if sliced:
            raise ValueError(
                f"a kernel of shape {kernel.kernel_shape} is sliced by a scan or vmap, but only some of its weights are"
                f" adapted ({kernel.layout.modules}): adapt all of them, or use effective_params."
            )
        return factors, kernel
    layout = _sliced_layout(factors, kernel, shape) if sliced else kernel.layout
    return type(factors)(*map(layout.unalign, factors)), Kernel(layout, shape)


def _sliced_layout(factors: AnyFactors, kernel: Kernel, shape: tuple[int, ...]) -> Layout:
    """The layout without the axes that are gone: the outermost ones, or those that the shapes tell."""
    layout = kernel.layout
    for gone in itertools.combinations(layout.stack_axes, max(layout.ndim - len(shape), 0)):
        kept = [axis for axis in range(layout.ndim) if axis not in gone]
        if [kernel.kernel_shape[axis] for axis in kept] == list(shape):
            now = Kernel(layout.without(gone), shape)
            if all(part.ndim == len(shape) and _is_aligned(part, now) for part in factors):
                if fits_weight(type(factors)(*map(now.layout.unalign, factors)), now.shape):
                    return now.layout
    raise ValueError(
        f"a kernel of shape {kernel.kernel_shape} is read as {shape}, but its layout is {layout}: give it the Layout"
        " whose stack_axes are those that the model's scan or vmap slices, or use effective_params."
    )


def _is_aligned(part: Array, now: Kernel) -> bool:
    """Whether a factor has the stack axes of this kernel, and besides them only its own two and axes of size one."""
    stacked = now.layout.stack_axes
    own = [size for axis, size in enumerate(part.shape) if axis not in stacked]
    return all(part.shape[axis] == now.kernel_shape[axis] for axis in stacked) and set(own[2:]) <= {1}


def _is_partial(layout: Layout) -> bool:
    return None in (layout.modules or ())


def refuse_missing(adapted: Iterable[str], found: Iterable[str], names: Iterable[str]) -> None:
    """Raise a ValueError if an adapted kernel was not found among the parameters.

    Args:
        adapted: The kernels of the adapter.
        found: Those that were met with a known layout.
        names: All parameters that were met.
    """
    found, names = set(found), set(names)
    hint = ": it has no known layout, see adapter.with_layouts"
    missing = [name + hint * (name in names) for name in adapted if name not in found]
    if missing:
        raise ValueError(bulleted("the parameters lack these adapted layers", missing))
