"""Flax linen: variables whose adapted kernels become W + dW where the model reads them, not before.

`Module.param` unboxes what it finds. A box that computes W + dW there does so inside `nn.scan` and `nn.remat`, for the
layer at hand, so that no second copy of the kernels exists at any time, as one does with `effective_params`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import linen as nn
from flax import struct

from interop.adalora import AdaLoraConfig
from interop.bases import Bases
from interop.fields import AdapterConfig
from randlora_jax.adalora_adapter import AdaLoraAdapter
from randlora_jax.adapter import RandLoraAdapter
from randlora_jax.bases import Captured
from randlora_jax.kernels import AnyFactors, Kernel, align_factors, unalign_factors
from randlora_jax.layouts import module_name, path_parts
from randlora_jax.linen_linear import TRAINABLE, RandLoraBases, RandLoraLinear, extract_adapter, insert_adapter
from randlora_jax.params import map_kernels
from randlora_jax.quantized import dequantize, is_quantized
from randlora_jax.rebuilding import adapted_kernel
from randlora_jax.selection import AnyAdapter

__all__ = [
    "RandLoraBases",
    "RandLoraBox",
    "RandLoraLinear",
    "extract_adapter",
    "extract_lazy",
    "insert_adapter",
    "lazy_params",
]

Params = TypeVar("Params")


def lazy_params(params: Params, adapter: AnyAdapter) -> Params:
    """Variables of linen with which a model computes W + dW at each access to an adapted W; see `effective_params`.

    Call it inside the function that is jitted and differentiated, on arrays that are arguments of that function:

        def loss(trainable, adapter, params, x):
            variables = lazy_params(params, adapter.with_trainable(trainable))
            return model.apply(variables, x).mean()

    Works in `nn.scan`, `nn.vmap` and `nn.remat`, with the params on any of `variable_axes`. Quantized kernels, adapted
    or not, are dequantized at access too; under `nn.scan` they must be stacked on axis 0.

    What changes variables before the layer reads them would change W and the factors each by itself: with
    `nn.map_variables`, `nn.WeightNorm`, `nn.SpectralNorm` or a `jax.tree.map` over the result, use `effective_params`.
    Where `nn.vmap` gives one input to all its members, the trace cannot tell members from outputs: pass the `Layout` of
    such kernels, with the vmapped axis in stack_axes.

    Args:
        params: The variables of a linen model, or its "params" collection; partitioning metadata is kept.
        adapter: Made by `init` or `load_adapter` for these params.

    Raises:
        ValueError: `params` lacks an adapted layer or holds it in another shape.
    """
    captured = tuple(map(Captured, adapter.bases or ()))

    def box(leaf: Any, factors: AnyFactors, kernel: Kernel) -> RandLoraBox:
        update = _Update(kernel, captured, adapter.config, adapter.recipe, adapter.dtype)
        return RandLoraBox(leaf, align_factors(factors, kernel), update)

    def other(leaf: Any) -> Any:
        return RandLoraBox(leaf, None, None) if is_quantized(nn.meta.unbox(leaf)) else leaf

    def is_leaf(leaf: Any) -> bool:
        return is_quantized(leaf) or isinstance(leaf, nn.meta.AxisMetadata)

    return map_kernels(params, adapter, box, other=other, is_leaf=is_leaf, unboxed=nn.meta.unbox)


@dataclasses.dataclass(frozen=True)
class _Update:
    """What a box knows of its adapter besides arrays that a scan may slice."""

    kernel: Kernel
    bases: tuple[Captured, ...]
    config: AdapterConfig
    recipe: str | None
    dtype: np.dtype | None


class RandLoraBox(struct.PyTreeNode, nn.meta.AxisMetadata[Any]):
    """A kernel with its factors on the same stack axes; `unbox` gives W + dW.

    Attributes:
        value: The frozen kernel, perhaps quantized, perhaps in a box of partitioning metadata.
        factors: lambda and gamma, or A, E and B, or None for a kernel that is only dequantized.
        update: The static part, or None.
    """

    value: Any
    factors: AnyFactors | None
    update: _Update | None = struct.field(pytree_node=False)

    def unbox(self, apply_constraint: bool = True) -> jax.Array:
        """W + dW of the kernel, or of the slice of it that a scan or vmap is working on."""
        inner: Any = self.value
        if isinstance(self.value, nn.meta.AxisMetadata):
            inner = inner.unbox(apply_constraint)
        weight = dequantize(inner)
        if self.update is None or self.factors is None:
            return weight
        factors, kernel = unalign_factors(self.factors, self.update.kernel, weight.shape)
        scaling, dtype = self.update.config.scaling, self.update.dtype
        return adapted_kernel(weight, _bases(self.update), factors, kernel, scaling=scaling, dtype=dtype)

    def replace_boxed(self, val: Any) -> "RandLoraBox":
        """The box with another frozen kernel."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "RandLoraBox":
        """Tell partitioning metadata inside that a transformation stacked the kernel."""
        return self._with_inner("add_axis", index, params)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "RandLoraBox":
        """Tell partitioning metadata inside that a transformation sliced the kernel."""
        return self._with_inner("remove_axis", index, params)

    def _with_inner(self, method: str, *arguments: Any) -> "RandLoraBox":
        if not isinstance(self.value, nn.meta.AxisMetadata):
            return self
        return self.replace(value=getattr(self.value, method)(*arguments))


def _bases(update: _Update) -> Bases | None:
    return Bases(*(basis.array for basis in update.bases)) if update.bases else None


def extract_lazy(variables: Any) -> AnyAdapter:
    """The adapter that `lazy_params` put into variables, with the factors as they are there now.

    Raises:
        ValueError: they hold no adapter, or parts of several.
        TypeError: they are those of a model of `RandLoraLinear` layers, which do not hold the adapter's config.
    """
    leaves = jax.tree_util.tree_leaves_with_path(variables, is_leaf=lambda leaf: isinstance(leaf, RandLoraBox))
    boxes: dict[str, Any] = {
        module_name(path_parts(path)): leaf
        for path, leaf in leaves
        if isinstance(leaf, RandLoraBox) and leaf.update is not None
    }
    if not boxes and isinstance(variables, Mapping) and TRAINABLE in variables:
        raise TypeError(
            "variables of RandLoraLinear layers do not hold the adapter's config: call"
            " randlora_jax.linen.extract_adapter(variables, config) with the one that the model was built with."
        )
    updates = {name: box.update for name, box in sorted(boxes.items())}
    if len({(update.config, update.bases, update.recipe, update.dtype) for update in updates.values()}) != 1:
        what = "parts of several adapters" if boxes else "no adapter"
        raise ValueError(f"the variables hold {what}: pass what one call of lazy_params(variables, adapter) gives.")
    first = next(iter(updates.values()))
    kernels = {name: update.kernel for name, update in updates.items()}
    common: dict[str, Any] = {
        "factors": {
            name: unalign_factors(boxes[name].factors, kernel, kernel.kernel_shape)[0]
            for name, kernel in kernels.items()
        },
        "config": first.config,
        "shapes": tuple((name, kernel.shape) for name, kernel in kernels.items()),
        "layouts": tuple((name, kernel.layout) for name, kernel in kernels.items()),
        "dtype": first.dtype,
    }
    if isinstance(first.config, AdaLoraConfig):
        return AdaLoraAdapter(**common)
    bases = _bases(first)
    assert bases is not None
    return RandLoraAdapter(bases=bases, recipe=first.recipe, **common)
