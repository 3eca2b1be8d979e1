"""Which weights an adapter has on a model: a config's targets found, an adapter's weights matched with the kernels."""

import dataclasses
import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from interop.adalora import AdaLoraConfig, SVDFactors
from interop.adapter import Adapter, init_adapter, lacking
from interop.bases import DEFAULT_RECIPE
from interop.config import RandLoraConfig
from interop.delta import Factors
from interop.errors import AdapterFormatError, bulleted
from interop.fields import AdapterConfig
from interop.files import load
from interop.storage import used_bases
from interop.targets import resolve_targets
from randlora_jax.adalora_adapter import AdaLoraAdapter, stack_triplets
from randlora_jax.adapter import RandLoraAdapter
from randlora_jax.kernels import AnyFactors, Kernel, Kernels
from randlora_jax.layouts import Layout

AnyAdapter = RandLoraAdapter | AdaLoraAdapter
Source = AnyAdapter | Adapter | str | os.PathLike[str]
OUTPUT_LAYERS = ("lm_head",)  # what "all-linear" leaves out, as PEFT does with a model's output embedding


def as_interop(source: Source) -> Adapter:
    """The numpy form of an adapter of any stack, or of a folder.

    Raises:
        TypeError: `source` is none of these.
    """
    if isinstance(source, str | os.PathLike):
        return load(source)
    adapter = source.to_interop() if hasattr(source, "to_interop") else source
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"config_or_adapter is a {type(source).__name__}: pass a RandLoraConfig, an adapter, or an adapter folder."
        )
    return adapter


def new_adapter(
    config: AdapterConfig,
    found: Kernels,
    *,
    recipe: str = DEFAULT_RECIPE,
    key: jax.Array | None,
    dtype: DTypeLike | None = None,
    with_dropout: Collection[str] = (),
) -> AnyAdapter:
    """A new adapter for those kernels that the config selects; see `init` and `on_kernels`."""
    refuse_unsupported(config)
    if key is None and isinstance(config, AdaLoraConfig):
        raise ValueError("AdaLoRA draws A and B at random: pass key=jax.random.key(0), or rngs=nnx.Rngs(0).")
    assert isinstance(config, RandLoraConfig | AdaLoraConfig)  # there is no other
    if key is None and isinstance(config, RandLoraConfig) and not config.init_weights:
        raise ValueError("init_weights=False draws lambda at random: pass key=jax.random.key(0), or rngs=nnx.Rngs(0).")
    shapes = select_weights(config, found)
    lacking = _without_dropout(found, shapes, with_dropout)
    if config.dropout and isinstance(config, AdaLoraConfig):
        raise ValueError(f"lora_dropout={config.dropout}: W + dW has no place for dropout. Set lora_dropout=0.0.")
    if config.dropout and lacking:
        raise ValueError(
            f"randlora_dropout={config.dropout}: W + dW has no place for dropout. Build the model from"
            " randlora_jax.RandLoraLinear layers, which have one, or set randlora_dropout=0.0."
            f" Of the targets, these have none: {lacking[:4]}."
        )
    adapter = init_adapter(config, shapes, recipe=recipe, rng=_rng_from_key(key))
    adapter = dataclasses.replace(adapter, config=_in_file_names(config, shapes))
    return on_kernels(adapter, found, dtype=dtype, with_dropout=with_dropout, drawn_by=recipe)


def require_randlora(config: AdapterConfig, instead: str) -> None:
    """Raise a TypeError that says what to do instead, if the config is not one of RandLoRA."""
    if isinstance(config, AdaLoraConfig):
        raise TypeError(f"the adapter is one of AdaLoRA, this is for RandLoRA: {instead}")


def refuse_unsupported(config: AdapterConfig) -> None:
    """Raise a ValueError if the config asks for what only the torch stack trains."""
    for name, only in {"bias": "none", "modules_to_save": None}.items():
        if getattr(config, name) != only:
            raise ValueError(
                f"{name}={getattr(config, name)!r}: this stack trains with {name}={only!r} only. Set that."
            )
    config.require_no_head()


def _without_dropout(found: Kernels, modules: Iterable[str], with_dropout: Collection[str]) -> list[str]:
    """Kernels holding some of these weights whose layers cannot apply dropout."""
    modules = set(modules)
    return [
        name
        for name, kernel in found.kernels.items()
        if name not in with_dropout and not modules.isdisjoint(kernel.modules(name).values())
    ]


def select_weights(config: AdapterConfig, found: Kernels) -> dict[str, tuple[int, int]]:
    """(out, in) of the weights that the config selects, by their names in adapter files.

    A kernel whose layout gives `modules` is selected by them, weight by weight; any other by its path, as a whole.
    """
    all_linear = config.target_modules == "all-linear"
    if all_linear and found.guessed:
        raise ValueError(
            f"target_modules='all-linear' cannot tell layers from embeddings where both are called 'weight', as in"
            f" {found.guessed[:4]}: name the layers to adapt, or pass layouts=infer_layouts(fn, params, *inputs)."
        )
    weights: dict[str, list[str]] = {}  # what targets are matched against -> names in files
    shapes: dict[str, tuple[int, int]] = {}
    for name, kernel in found.kernels.items():
        modules = kernel.modules(name).values()
        shapes |= dict.fromkeys(modules, kernel.shape)
        weights |= {name: list(modules)} if kernel.layout.modules is None else {module: [module] for module in modules}
    try:
        targets = _resolve(config, weights, found)
    except ValueError as error:
        each = {module: [module] for modules in weights.values() for module in modules}
        try:  # as a file names the weights of a stacked kernel
            targets, weights = _resolve(config, each, found), each
        except ValueError:
            raise ValueError(f"{error}{_layout_hint(found.unclear)}") from error
    if all_linear and found.unclear:
        warnings.warn(
            f"target_modules='all-linear' adapts {len(targets)} kernels.{_layout_hint(found.unclear)} A list of names"
            " as target_modules silences this.",
            stacklevel=5,
        )
    return {module: shapes[module] for target in targets for module in weights[target]}


def _resolve(config: AdapterConfig, weights: Mapping[str, list[str]], found: Kernels) -> tuple[str, ...]:
    """Which names of `weights` the config means."""
    heads = [name for name in weights if name.rsplit(".", 1)[-1] in OUTPUT_LAYERS]
    # The module of a refused parameter is meant by its name, too: "embed" for "embed.embedding".
    owners = {name.rpartition(".")[0]: reason for name, reason in found.refused.items()}
    return resolve_targets(config, list(weights), output_layers=heads, other_modules=owners | found.refused)


def _in_file_names(config: AdapterConfig, shapes: Mapping[str, Any]) -> AdapterConfig:
    """The config with targets by which other stacks find the same weights, where its own would not say them."""
    if config.target_modules == "all-linear":
        return config
    try:
        if set(resolve_targets(config, list(shapes))) == set(shapes) and "/" not in str(config.target_modules):
            return config
    except ValueError:  # an entry names a kernel by its path, its weights have other names in files
        pass
    return config.with_targets(tuple(shapes))


def _layout_hint(unclear: list[str]) -> str:
    if not unclear:
        return ""
    return (
        f" Kernels with more than two axes, such as {unclear[:4]}, need layouts=infer_layouts(fn, params, *inputs), or"
        " layouts={name: Layout(in_axes, out_axes)}."
    )


def on_kernels(
    adapter: Adapter,
    found: Kernels,
    *,
    dtype: DTypeLike | None = None,
    with_dropout: Collection[str] = (),
    drawn_by: str | None = None,
) -> AnyAdapter:
    """An adapter of the hub on the kernels of a model: checked against their shapes, their layouts recorded.

    Of its bases, the part is held that its layers use.

    Args:
        adapter: Of any source, see `as_interop`.
        found: The kernels of the model.
        dtype: See `init`.
        with_dropout: Names of the kernels whose layers apply dropout.
        drawn_by: The recipe that drew the bases just now; None if they came with the adapter.

    Raises:
        AdapterFormatError: a kernel is missing, the message lists both sides; or one has another shape.
        ValueError: two kernels give the same name in `Layout.modules`.
    """
    if adapter.config.dropout and _without_dropout(found, adapter.factors, with_dropout):
        warnings.warn(_no_dropout(adapter.config), stacklevel=3)
    shapes: dict[str, tuple[int, int]] = {}
    for name, kernel in found.kernels.items():
        for module in kernel.modules(name).values():
            if module in shapes:
                raise ValueError(f"two kernels hold a weight called {module!r}: correct Layout.modules of {name!r}.")
            shapes[module] = kernel.shape
    _refuse_missing(adapter, shapes, found)
    bound = adapter.bind(shapes)
    on_device: Any = _on_device(bound, bound.recipe if adapter.bases is None else drawn_by)
    factors, layouts = _stack_weights(on_device.factors, found.kernels)
    return dataclasses.replace(
        on_device,
        factors=factors,
        layouts=tuple(layouts.items()),
        shapes=tuple((name, found.kernels[name].shape) for name in factors),
        dtype=None if dtype is None else np.dtype(dtype),
    )


def _on_device(bound: Adapter, drawn_by: str | None) -> AnyAdapter:
    if isinstance(bound.config, AdaLoraConfig):
        return AdaLoraAdapter.from_interop(bound)
    assert bound.bases is not None  # as it is bound
    assert bound.shapes is not None
    used, origin = used_bases(bound.bases, bound.shapes.values(), bound.config, drawn_by=drawn_by)
    return RandLoraAdapter.from_interop(dataclasses.replace(bound, bases=used), origin=origin)


def _refuse_missing(adapter: Adapter, shapes: Mapping[str, tuple[int, int]], found: Kernels) -> None:
    """Raise an error that lists layers of the adapter that the model lacks, and those of the model that are left."""
    message = lacking(adapter, shapes)
    if not message:
        return
    left = [module for module in shapes if module not in adapter.factors]
    if left:
        message += "\n" + bulleted("the adapter has nothing for these layers of the model", left)
        message += (
            "\nIf they are the same layers under other names, pass layouts: one of randlora_jax.LAYOUTS, or rules"
            " (LayoutRule) that say what each is called in the adapter."
        )
    raise AdapterFormatError(f"{message}\n{_layout_hint(found.unclear).strip()}".strip())


def _no_dropout(config: AdapterConfig) -> str:
    ours = isinstance(config, AdaLoraConfig)
    field, where = ("lora_dropout", "") if ours else ("randlora_dropout", ", except in RandLoraLinear layers")
    return (
        f"{field}={config.dropout} has no effect in this stack{where}. Training goes on without it;"
        f" dataclasses.replace(config, {field}=0.0) silences this."
    )


def _stack_weights(
    weights: Mapping[str, AnyFactors], kernels: Mapping[str, Kernel]
) -> tuple[dict[str, AnyFactors], dict[str, Layout]]:
    """Factors and layouts by kernel, from factors by weight; a weight that has none gets no name in the layout."""
    factors: dict[str, AnyFactors] = {}
    layouts: dict[str, Layout] = {}
    for name, kernel in sorted(kernels.items()):
        modules = kernel.modules(name)
        adapted = {index: module for index, module in modules.items() if module in weights}
        if not adapted:
            continue
        layout, pairs = kernel.layout, [weights[module] for module in adapted.values()]
        factors[name] = pairs[0]
        if layout.stack_axes:
            factors[name] = _stack(pairs)
            count = len(layout.module_names(name, kernel.kernel_shape))
            if len(adapted) < count:
                layout = dataclasses.replace(layout, modules=tuple(map(adapted.get, range(count))))
        layouts[name] = layout
    return factors, layouts


def _stack(weights: list[AnyFactors]) -> AnyFactors:
    """The factors of several weights, in arrays with an axis over the weights."""
    if isinstance(weights[0], SVDFactors):
        return stack_triplets(cast(list[SVDFactors], weights))  # of one method, all of them
    return Factors(*(jnp.stack(parts) for parts in zip(*weights, strict=True)))


def _rng_from_key(key: jax.Array | None) -> np.random.Generator | None:
    """A numpy generator that is a function of a JAX key."""
    if key is None:
        return None
    if not isinstance(key, jax.Array) or isinstance(key, jax.core.Tracer):
        raise TypeError(f"key={key!r}: pass a concrete jax.random.key(0), outside of jit and other transformations.")
    data = key if jnp.issubdtype(key.dtype, jnp.integer) else jax.random.key_data(key)
    return np.random.default_rng(np.asarray(data).reshape(-1).tolist())
