"""Adapters on any pytree of parameters: new factors, effective parameters, merge and unmerge, counts."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from interop.adalora import SVDFactors
from interop.bases import DEFAULT_RECIPE
from interop.config import RandLoraConfig
from interop.contents import PARTS
from interop.fields import AdapterConfig
from randlora_jax.adapter import RandLoraAdapter
from randlora_jax.kernels import (
    AnyFactors,
    Kernel,
    combine_kernel,
    find_kernels,
    fits_weight,
    named_leaves,
    refuse_missing,
)
from randlora_jax.layouts import Layout, default_layout, module_name, path_parts
from randlora_jax.naming import Layouts, Rules, resolve_layouts
from randlora_jax.quantized import dequantize, is_quantized
from randlora_jax.selection import (
    AnyAdapter,
    Source,
    as_interop,
    new_adapter,
    on_kernels,
    require_randlora,
    select_weights,
)
from randlora_jax.sharding import like_kernels
from randlora_jax.tracing import InferredLayouts

Params = TypeVar("Params")


def init(
    config: RandLoraConfig,
    params: Any,
    *,
    layouts: Layouts | None = None,
    recipe: str = DEFAULT_RECIPE,
    key: jax.Array | None = None,
    dtype: DTypeLike | None = None,
) -> RandLoraAdapter:
    """A new adapter for the kernels of `params` that `config.target_modules` selects, at PEFT's starting values.

    Where the kernels are sharded over a mesh, the adapter is placed beside them (`randlora_jax.sharding`).

    Args:
        config: What to adapt and how. A list entry of target_modules matches a kernel of that name, or whose path ends
            in it; a string is a regular expression for the whole path, with "." or "/" between its parts. Kernels
            with `Layout.modules` are matched by those names.
        params: A pytree of arrays, ShapeDtypeStructs or quantized kernels. Names are dotted paths without the leaf's
            own "kernel", "w" or "weight". Without `layouts`, 2-D leaves named `kernel` or `w` are (in, out), those
            named `weight` (out, in), and nothing else is adapted.
        layouts: Those of `infer_layouts`; or of single kernels, e.g. `{"attn.query": Layout((0,), (1, 2))}`; or what
            gives the names that kernels have in adapter files: one of `LAYOUTS`, e.g. "tunix-gemma3", a YAML file, or
            a list of `LayoutRule` objects. `infer_layouts(...).named(rules)` is both.
        recipe: How the bases are drawn, see `interop.RECIPES`.
        key: A `jax.random.key`, needed for `init_weights=False` only.
        dtype: What the operands of the large products are rounded to, e.g. bfloat16. lambda and gamma stay float32.
            None: what jax rounds float32 operands to, nothing on CPU, TF32 on GPU, bfloat16 on TPU; see
            `jax.default_matmul_precision`. `merge`, `unmerge` and `RandLoraAdapter.delta_weight` round nothing then.

    Raises:
        ValueError: a target matches nothing or no adaptable kernel, the bases cannot be made, or the config asks for
            trained biases, modules_to_save or dropout.
        TypeError: it is an `AdaLoraConfig`, for which there is `randlora_jax.adalora.init`.
    """
    require_randlora(config, "randlora_jax.adalora.init(config, params, key=key) makes such an adapter.")
    leaves = named_leaves(params)
    adapter = new_adapter(config, find_kernels(leaves, layouts), recipe=recipe, key=key, dtype=dtype)
    assert isinstance(adapter, RandLoraAdapter)
    return like_kernels(adapter, leaves)


def find_targets(config: AdapterConfig, params: Any, *, layouts: Layouts | None = None) -> dict[str, tuple[int, int]]:
    """(out, in) of the weights that `init` would adapt, by name: print it before training.

    Raises:
        ValueError: a target matches nothing or no adaptable kernel.
    """
    return select_weights(config, find_kernels(named_leaves(params), layouts))


def name_layouts(params: Any, rules: Rules, *, layouts: Mapping[str, Layout] | None = None) -> Mapping[str, Layout]:
    """`layouts` with what rules say of the kernels of `params`: print it, or pass it on as `layouts`.

    Args:
        params: See `init`; an NNX model is such a pytree, too.
        rules: One of `LAYOUTS`, a YAML file, or a list of `LayoutRule`.
        layouts: Those of `infer_layouts`, or of single kernels; rules without axes go by them.

    Raises:
        ValueError: there is no such table or file, a rule is malformed or is for no kernel, two are for one, or two
            weights get one name.
    """
    if isinstance(layouts, InferredLayouts):
        return layouts.named(rules)
    return {**(layouts or {}), **resolve_layouts(rules, named_leaves(params), layouts)}


def load_adapter(
    source: Source, params: Any, *, layouts: Layouts | None = None, dtype: DTypeLike | None = None
) -> AnyAdapter:
    """An adapter of any stack, or a folder in PEFT's format, on the kernels of `params`; see `init` for the arguments.

    Raises:
        AdapterFormatError: a kernel is missing or has another shape, or the folder holds no complete adapter.
        TypeError: `source` is none of these.
    """
    leaves = named_leaves(params)
    return like_kernels(on_kernels(as_interop(source), find_kernels(leaves, layouts), dtype=dtype), leaves)


def effective_params(params: Params, adapter: AnyAdapter) -> Params:
    """`params` with W + dW in place of each adapted W, in W's dtype; differentiable in `adapter.trainable`.

    Quantized kernels, adapted or not, become arrays.

    Raises:
        ValueError: `params` lacks an adapted layer or holds it in another shape.
    """
    return _combine(params, adapter, jnp.add)


def merge(params: Params, adapter: AnyAdapter) -> Params:
    """The base weights with the adapter folded in: `effective_params`, in full precision on any hardware.

    Its products are not rounded to TF32 or bfloat16 operands, as jax does by default on GPU and TPU in training.

    Raises:
        ValueError: as `effective_params`.
    """
    with jax.default_matmul_precision("highest"):
        return effective_params(params, adapter)


def unmerge(params: Params, adapter: AnyAdapter) -> Params:
    """Take a merged adapter out again: W - dW, equal to the base weights up to one rounding in W's dtype.

    Raises:
        ValueError: as `effective_params`.
    """
    with jax.default_matmul_precision("highest"):
        return _combine(params, adapter, jnp.subtract)


def _combine(params: Params, adapter: AnyAdapter, combine: Callable[[Any, Any], Any]) -> Params:
    scaling, dtype = adapter.config.scaling, adapter.dtype

    def change(leaf: Any, factors: AnyFactors, kernel: Kernel) -> jax.Array:
        weight = dequantize(leaf)
        return combine_kernel(weight, adapter.bases, factors, kernel, scaling=scaling, dtype=dtype, combine=combine)

    return map_kernels(params, adapter, change, other=dequantize)


def map_kernels(
    params: Params,
    adapter: AnyAdapter,
    change: Callable[[Any, AnyFactors, Kernel], Any],
    *,
    other: Callable[[Any], Any],
    is_leaf: Callable[[Any], bool] = is_quantized,
    unboxed: Callable[[Any], Any] = lambda leaf: leaf,
) -> Params:
    """`params` with `change(leaf, factors, kernel)` for each adapted kernel and `other(leaf)` for the other leaves.

    Args:
        params: See `effective_params`.
        adapter: See `effective_params`.
        change: What becomes of an adapted kernel.
        other: What becomes of any other leaf.
        is_leaf: What else than an array is a leaf.
        unboxed: From a leaf to what has the kernel's shape.

    Raises:
        ValueError: `params` lacks an adapted layer or holds it in another shape.
    """
    layouts, shapes = dict(adapter.layouts), dict(adapter.shapes or ())
    names: list[str] = []
    adapted: list[str] = []

    def visit(path: tuple[Any, ...], leaf: Any) -> Any:
        parts = path_parts(path)
        name = module_name(parts)
        layout = layouts.get(name) or default_layout(parts, len(getattr(unboxed(leaf), "shape", ())))
        names.append(name)
        if name not in adapter.factors or layout is None:
            return other(leaf)
        adapted.append(name)
        kernel = Kernel(layout, tuple(unboxed(leaf).shape))
        if kernel.shape != shapes.get(name, kernel.shape) or not _fits(kernel, name, adapter.factors[name]):
            raise ValueError(
                f"{name} has shape {kernel.kernel_shape}, in torch's terms {kernel.shape}; the adapter was made for"
                f" {shapes.get(name, 'another')}. Use the base model that it was trained on."
            )
        return change(leaf, adapter.factors[name], kernel)

    result = jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_leaf)
    refuse_missing(adapter.factors, adapted, names)
    return result


def _fits(kernel: Kernel, name: str, factors: AnyFactors) -> bool:
    """Whether the factors are for weights of the kernel's shape, and for as many."""
    stacked = (len(kernel.modules(name)),) if kernel.layout.stack_axes else ()
    return fits_weight(factors, kernel.shape) and factors[0].shape[:-2] == stacked


def count_trainable(adapter: AnyAdapter) -> int:
    """Number of trainable parameters of the adapter."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapter.trainable))


def trainable_report(adapter: AnyAdapter, params: Any) -> str:
    """PEFT's line on trainable parameters, and for RandLoRA the bytes of the shared frozen bases.

    Args:
        adapter: `extract(model)` for an NNX model.
        params: All parameters; or an NNX model, whose attached adapters do not count twice.
    """
    trainable = count_trainable(adapter)
    base = [leaf for parts, leaf in named_leaves(params) if not _is_adapters(parts)]
    total = trainable + sum(leaf.size for leaf in base if hasattr(leaf, "size"))
    line = f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
    if adapter.bases is None:
        return line
    frozen = sum(array.nbytes for array in adapter.bases)
    return f"{line}\nfrozen bases: {frozen:,d} bytes, shared by {len(adapter.modules)} layers"


def _is_adapters(parts: tuple[str, ...]) -> bool:
    """Whether this is the path of an attached adapter's own array, in an NNX model or in linen variables."""
    held = parts[-1] == "values" and "randlora_B" in parts[-3:-1]  # the array of a `HeldBasis`, perhaps in a box
    own = held or parts[-1].startswith("randlora_")
    return own or (parts[-1] in PARTS[SVDFactors] and parts[-3:-2] == ("adapters",))


def print_trainable_parameters(adapter: AnyAdapter, params: Any) -> None:
    """Print `trainable_report`."""
    print(trainable_report(adapter, params))
