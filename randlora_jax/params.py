"""Adapters on any pytree of parameters: new factors, effective parameters, merge and unmerge, counts."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from interop.adapter import Adapter, init_adapter
from interop.bases import DEFAULT_RECIPE
from interop.config import RandLoraConfig
from interop.errors import AdapterFormatError, bulleted
from interop.targets import resolve_targets
from randlora_jax.adapter import RandLoraAdapter
from randlora_jax.layouts import OUT_IN, Layout, default_layout, module_name, path_parts

Params = TypeVar("Params")
OUTPUT_LAYERS = ("lm_head",)  # what "all-linear" leaves out, as PEFT does with a model's output embedding


class Kernel(NamedTuple):
    """A parameter that can be adapted: its layout, and the (out, in) shape of the torch weight it stands for."""

    layout: Layout
    shape: tuple[int, int]


def init(
    config: RandLoraConfig,
    params: Any,
    *,
    layouts: Mapping[str, Layout] | None = None,
    recipe: str = DEFAULT_RECIPE,
    key: jax.Array | None = None,
) -> RandLoraAdapter:
    """A new adapter for the kernels of `params` that `config.target_modules` selects, at PEFT's starting values.

    Args:
        config: What to adapt and how.
        params: A pytree of arrays (or ShapeDtypeStructs). 2-D leaves named `kernel` or `w` are (in, out), those named
            `weight` (out, in); names are dotted paths without the leaf's name.
        layouts: Layouts of further kernels by dotted name, e.g. `{"attn.query": Layout((0,), (1, 2))}`.
        recipe: How the bases are drawn, see `interop.RECIPES`.
        key: A `jax.random.key`, needed for `init_weights=False` only.

    Raises:
        ValueError: a target matches nothing or no adaptable kernel, the bases cannot be made, or the config asks for
            trained biases, modules_to_save or dropout.
    """
    leaves = [(path_parts(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    return new_adapter(config, find_kernels(leaves, layouts or {}), recipe=recipe, key=key)


def effective_params(params: Params, adapter: RandLoraAdapter) -> Params:
    """`params` with W + dW in place of each adapted W, in W's dtype; differentiable in `adapter.trainable`.

    Raises:
        ValueError: `params` lacks an adapted layer or holds it in another shape.
    """
    return _map_adapted(params, adapter, lambda weight, delta: weight + delta)


def merge(params: Params, adapter: RandLoraAdapter) -> Params:
    """`effective_params` under the name that users of PEFT look for: the base weights with the adapter folded in."""
    return effective_params(params, adapter)


def unmerge(params: Params, adapter: RandLoraAdapter) -> Params:
    """Take a merged adapter out again: W - dW, equal to the base weights up to one rounding in W's dtype.

    Raises:
        ValueError: as `effective_params`.
    """
    return _map_adapted(params, adapter, lambda weight, delta: weight - delta)


def count_trainable(adapter: RandLoraAdapter) -> int:
    """Number of trainable parameters of the adapter."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapter.trainable))


def trainable_report(adapter: RandLoraAdapter, params: Any) -> str:
    """PEFT's line on trainable parameters, and the bytes of the shared frozen bases."""
    trainable = count_trainable(adapter)
    total = trainable + sum(leaf.size for leaf in jax.tree.leaves(params) if hasattr(leaf, "size"))
    frozen = sum(array.nbytes for array in adapter.bases)
    return (
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}\n"
        f"frozen bases: {frozen:,d} bytes, shared by {len(adapter.modules)} layers"
    )


def print_trainable_parameters(adapter: RandLoraAdapter, params: Any) -> None:
    """Print `trainable_report`."""
    print(trainable_report(adapter, params))


class Kernels(NamedTuple):
    """What `find_kernels` finds: kernels by dotted name, kernels whose layout is not known, and everything else."""

    kernels: dict[str, Kernel]
    unclear: list[str]
    others: list[str]


def find_kernels(leaves: Iterable[tuple[tuple[str, ...], Any]], layouts: Mapping[str, Layout]) -> Kernels:
    """Kernels that can be adapted, by dotted name, and the names of the other parameters.

    Args:
        leaves: Path and leaf of each parameter; what has no shape is left out.
        layouts: Layouts that do not follow from name and number of axes, by dotted name.

    Raises:
        ValueError: `layouts` names a parameter that does not exist, or does not fit its shape; or two parameters have
            one name.
    """
    found = Kernels({}, [], [])
    for parts, leaf in leaves:
        if not hasattr(leaf, "shape"):
            continue
        name = module_name(parts)
        layout = layouts.get(name) or default_layout(parts, len(leaf.shape))
        if layout is None:
            (found.unclear if parts[-1] in ("kernel", "w") and len(leaf.shape) > 2 else found.others).append(name)
        elif name in found.kernels:
            raise ValueError(f"two parameters are called {name!r}, one of them by its leaf {parts[-1]!r}: rename one.")
        else:
            found.kernels[name] = Kernel(layout, layout.torch_shape(leaf.shape))
    unknown = sorted(set(layouts) - set(found.kernels))
    if unknown:
        names = [*found.kernels, *found.unclear, *found.others]
        raise ValueError(f"layouts are given for {unknown}, which are no parameters. Names are {names}.")
    return found


def new_adapter(config: RandLoraConfig, found: Kernels, *, recipe: str, key: jax.Array | None) -> RandLoraAdapter:
    """A new adapter for those kernels that the config selects; see `init`."""
    unsupported = {"bias": "none", "modules_to_save": None, "randlora_dropout": 0}
    for name, only in unsupported.items():
        if getattr(config, name) != only:
            raise ValueError(
                f"{name}={getattr(config, name)!r}: this stack trains with {name}={only!r} only. Set that."
            )
    config.require_no_head()
    if not config.init_weights and key is None:
        raise ValueError("init_weights=False draws lambda at random: pass key=jax.random.key(0), or rngs=nnx.Rngs(0).")
    shapes = {name: found.kernels[name].shape for name in _targets(config, found)}
    return on_kernels(init_adapter(config, shapes, recipe=recipe, rng=_rng_from_key(key)), found)


def _targets(config: RandLoraConfig, found: Kernels) -> tuple[str, ...]:
    """Names of the kernels to adapt; what "all-linear" cannot judge is refused or named in a warning."""
    all_linear = config.target_modules == "all-linear"
    guesses = [name for name, kernel in found.kernels.items() if kernel.layout == OUT_IN]
    if all_linear and guesses:
        raise ValueError(
            f"target_modules='all-linear' cannot tell layers from embeddings where both are called 'weight', as in"
            f" {guesses[:4]}: name the layers to adapt."
        )
    heads = [name for name in found.kernels if name.rsplit(".", 1)[-1] in OUTPUT_LAYERS]
    try:
        targets = resolve_targets(config, list(found.kernels), output_layers=heads, other_modules=found.others)
    except ValueError as error:
        raise ValueError(f"{error}{_layout_hint(found.unclear)}") from error
    if all_linear and found.unclear:
        warnings.warn(
            f"target_modules='all-linear' adapts {len(targets)} kernels.{_layout_hint(found.unclear)} A list of names"
            " as target_modules silences this.",
            stacklevel=5,
        )
    return targets


def _layout_hint(unclear: list[str]) -> str:
    if not unclear:
        return ""
    return f" Kernels with more than two axes, such as {unclear[:4]}, need layouts={{name: Layout(in_axes, out_axes)}}."


def on_kernels(adapter: Adapter, found: Kernels) -> RandLoraAdapter:
    """An adapter of the hub on the kernels of a model: checked against their shapes, their layouts recorded.

    Raises:
        AdapterFormatError: a kernel is missing or has another shape.
    """
    if adapter.config.randlora_dropout:
        warnings.warn(
            f"randlora_dropout={adapter.config.randlora_dropout} has no effect in this stack. Training goes on without"
            " it; dataclasses.replace(config, randlora_dropout=0.0) silences this.",
            stacklevel=3,
        )
    try:
        bound = adapter.bind({name: kernel.shape for name, kernel in found.kernels.items()})
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{error}{_layout_hint(found.unclear)}") from error
    layouts = tuple((name, found.kernels[name].layout) for name in bound.modules)
    return dataclasses.replace(RandLoraAdapter.from_interop(bound), layouts=layouts)


def _rng_from_key(key: jax.Array | None) -> np.random.Generator | None:
    """A numpy generator that is a function of a JAX key."""
    if key is None:
        return None
    if not isinstance(key, jax.Array) or isinstance(key, jax.core.Tracer):
        raise TypeError(f"key={key!r}: pass a concrete jax.random.key(0), outside of jit and other transformations.")
    data = key if jnp.issubdtype(key.dtype, jnp.integer) else jax.random.key_data(key)
    return np.random.default_rng(np.asarray(data).reshape(-1).tolist())


def add_delta(kernel: jax.Array, delta: jax.Array, layout: Layout, combine: Callable = jnp.add) -> jax.Array:
    """Combine a kernel with an update in torch coordinates: computed in the wider dtype, returned in the kernel's."""
    if not jnp.issubdtype(kernel.dtype, jnp.floating) or kernel.dtype.itemsize < 2:
        raise ValueError(f"a kernel of dtype {kernel.dtype} cannot hold W + dW: dequantize it to float first.")
    update = layout.to_kernel(delta, kernel.shape)
    return combine(kernel.astype(jnp.promote_types(kernel.dtype, update.dtype)), update).astype(kernel.dtype)


def _map_adapted(params: Params, adapter: RandLoraAdapter, combine: Callable[[Any, Any], Any]) -> Params:
    layouts, shapes = dict(adapter.layouts), dict(adapter.shapes or ())
    names: list[str] = []
    adapted: list[str] = []

    def visit(path: tuple[Any, ...], leaf: Any) -> Any:
        parts = path_parts(path)
        name = module_name(parts)
        layout = layouts.get(name) or default_layout(parts, len(getattr(leaf, "shape", ())))
        names.append(name)
        if name not in adapter.factors or layout is None:
            return leaf
        adapted.append(name)
        shape = layout.torch_shape(leaf.shape)
        if shape != shapes.get(name, shape) or min(shape) != adapter.factors[name].gamma.shape[-1]:
            raise ValueError(
                f"{name} has shape {leaf.shape}, in torch's terms {shape}; the adapter was made for"
                f" {shapes.get(name, 'another')}. Use the base model that it was trained on."
            )
        return add_delta(leaf, adapter.delta_weight(name, shape), layout, combine)

    result = jax.tree_util.tree_map_with_path(visit, params)
    missing = [name for name in adapter.factors if name not in adapted]
    if missing:
        hint = ": it has no known layout, see adapter.with_layouts"
        raise ValueError(
            bulleted("the parameters lack these adapted layers", [n + hint * (n in names) for n in missing])
        )
    return result
