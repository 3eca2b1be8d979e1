"""Flax NNX: an adapter is attached by replacing a layer's kernel, not the layer.

The replacement answers as the `nnx.Param` it stands for, with W + dW, so that every module that reads its kernel works
as it is, and each access computes the update inside whatever transformation it happens in.
"""

from typing import Any, TypeVar

import jax
from flax import nnx
from jax.typing import DTypeLike

from interop.adalora import AdaLoraConfig
from interop.bases import DEFAULT_RECIPE, Bases
from interop.fields import AdapterConfig
from randlora_jax.adalora_adapter import AdaLoraAdapter
from randlora_jax.adapter import KernelAdapter, RandLoraAdapter
from randlora_jax.kernels import Kernel, Kernels, find_kernels
from randlora_jax.layouts import module_name
from randlora_jax.naming import Layouts, resolve_layouts
from randlora_jax.nnx_linear import RandLoraLinear
from randlora_jax.nnx_places import Place, active_adapter, adapted_weights, adapter_names, existing_adapter, places_of
from randlora_jax.nnx_switching import set_adapter
from randlora_jax.nnx_weight import LayerAdapter, RandLoraBasis, Static
from randlora_jax.quantized import is_quantized
from randlora_jax.selection import AnyAdapter, Source, as_interop, new_adapter, on_kernels
from randlora_jax.sharding import like_kernels
from randlora_jax.tracing import InferredLayouts, infer_layouts

Model = TypeVar("Model", bound=nnx.Module)


def attach(
    model: Model,
    config_or_adapter: AdapterConfig | Source,
    *,
    adapter_name: str = "default",
    layouts: Layouts | None = None,
    recipe: str = DEFAULT_RECIPE,
    rngs: nnx.Rngs | None = None,
    dtype: DTypeLike | None = None,
) -> Model:
    """Adapt `model` in place and return it; its layers stay what they are, `model(x)` now computes with W + dW.

    The new adapter is the active one. Train it with `nnx.Optimizer(model, tx, wrt=RandLoraParam)` and
    `nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RandLoraParam))`; make the optimizer after this call. Quantized
    kernels, adapted or not, are dequantized at each access from now on. Where the kernels are sharded over a mesh, the
    adapter is placed beside them (`randlora_jax.sharding`).

    Args:
        model: Any NNX model. Without `layouts`, 2-D parameters named `kernel` or `w` are (in, out), and nothing else
            is adapted.
        config_or_adapter: A config of either method for a new adapter; or an adapter of any stack, or a folder, to go
            on with.
        adapter_name: What `set_adapter`, `extract` and `delete_adapter` call it, an identifier.
        layouts: Those of `model_layouts(model, *inputs)`; or of single kernels by dotted name, e.g.
            `{"attn.query": Layout((0,), (1, 2))}`; or what gives the names that kernels have
            in adapter files: one of `LAYOUTS`, such as "tunix-gemma3", a YAML file, or a `LayoutRule` list; see `init`.
        recipe: How the bases of a new adapter are drawn, see `interop.RECIPES`.
        rngs: Needed for a new adapter of AdaLoRA, or one with `init_weights=False`, only.
        dtype: What the operands of the large products are rounded to, e.g. bfloat16; see `init`.

    Raises:
        ValueError: the model has an adapter of that name, a target matches nothing, the adapter was made for another
            model, or a new one asks for trained biases, modules_to_save or dropout.
        TypeError: `model` is no NNX model, or `config_or_adapter` is none of these, or an adapter of AdaLoRA adapts a
            `RandLoraLinear`.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model is a {type(model).__name__}, not an nnx.Module: randlora_jax.init adapts pytrees.")
    _check_new_name(model, adapter_name)
    places = places_of(model)
    leaves = [(place.parts, place.base) for place in places]
    layouts = resolve_layouts(layouts, leaves)
    if isinstance(config_or_adapter, KernelAdapter):  # it was made for a model like this one, or is refused below
        axes = {module_name(place.parts): place.base.ndim for place in places}
        recorded = {name: layout for name, layout in config_or_adapter.layouts if axes.get(name) == layout.ndim}
        layouts = {**recorded, **layouts}
    found = find_kernels(leaves, layouts)
    adapter = _resolve(config_or_adapter, found, recipe, rngs, dtype, _with_dropout(places))
    adapter = like_kernels(adapter, [(parts, base.get_value()) for parts, base in leaves])
    _put(adapter, adapter_name, places, found)
    return set_adapter(model, adapter_name)


def model_layouts(model: nnx.Module, *inputs: Any) -> InferredLayouts:
    """Layouts of the kernels of an NNX model, read off the abstractly traced call `model(*inputs)`.

    Print it to see every parameter with its layout, or why it cannot be adapted.

    Args:
        model: With or without adapters.
        inputs: Example inputs, arrays or ShapeDtypeStructs.
    """
    bare = nnx.eval_shape(lambda: nnx.clone(model))
    places = places_of(bare)
    for place in places:
        setattr(place.owner, place.attribute, place.base)
    graph, state = nnx.split(bare)
    found = infer_layouts(lambda state, *inputs: nnx.merge(graph, state)(*inputs), state, *inputs)
    names: dict[int, list[str]] = {}  # a tied parameter has several, of which the state holds one
    for place in places:
        names.setdefault(id(place.base), []).append(module_name(place.parts))
    tied = {name: group for group in names.values() for name in group}
    layouts = {other: layout for name, layout in found.items() for other in tied.get(name, ())}
    refused = {other: reason for name, reason in found.refused.items() for other in tied.get(name, [name])}
    held = "a parameter in a container that is no nnx.Module, nnx.List or nnx.Dict, where attach cannot replace it"
    shapes = {module_name(place.parts): tuple(place.base.shape) for place in places}
    return InferredLayouts(layouts, refused | {name: held for name in found if name not in tied}, shapes)


def extract(model: nnx.Module, adapter_name: str | None = None) -> AnyAdapter:
    """The active adapter of `model`, or the one of that name, with the current values of its factors.

    Within a loss function, these are differentiated: `adalora.orthogonal_loss(extract(model))` is a part of it.

    Raises:
        ValueError: the model has no such adapter.
        TypeError: `model` is no NNX model.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, not an nnx.Module with an adapter attached. In linen, the variables of"
            " lazy_params(variables, adapter) hold one: see randlora_jax.linen.extract_lazy."
        )
    name = existing_adapter(model, adapter_name or active_adapter(model))
    parts = dict(
        sorted((path, weight.adapters[name]) for path, weight in adapted_weights(model) if name in weight.adapters)
    )
    first = next(iter(parts.values()))
    common: dict[str, Any] = {
        "factors": {path: part.factors() for path, part in parts.items()},
        "config": first.static.config,
        "shapes": tuple((path, part.kernel.shape) for path, part in parts.items()),
        "layouts": tuple((path, part.kernel.layout) for path, part in parts.items()),
        "dtype": first.static.dtype,
    }
    if isinstance(first.static.config, AdaLoraConfig):
        return AdaLoraAdapter(**common)
    assert first.bases is not None  # RandLoRA's parts have them
    return RandLoraAdapter(bases=first.bases, recipe=first.static.recipe, **common)


def detach(model: Model, *, merge: bool = False) -> Model:
    """Take all adapters off `model`, in place; with `merge=True` the kernels keep W + dW of the active one.

    That is computed in full precision, as by `merge`. Quantized kernels that nothing is merged into stay what they
    became in `attach`: they read as arrays.

    Raises:
        ValueError: the model has no adapter.
    """
    existing_adapter(model, next(iter(adapter_names(model)), None))
    for place in places_of(model):
        if not place.adapted:
            continue
        weight = place.weight()
        if merge and weight.active_adapter is not None:
            # A new Param, as the old one may be tied to a layer that the adapter does not belong to.
            with jax.default_matmul_precision("highest"):
                setattr(place.owner, place.attribute, weight.base.replace(weight.get_value()))
        else:
            place.release()
    return model


def _check_new_name(model: nnx.Module, adapter_name: str) -> None:
    if not adapter_name.isidentifier() or hasattr(nnx.Dict, adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} cannot be part of a path in the model's state: use letters, digits and '_',"
            " and no name of a dict's methods."
        )
    if adapter_name in adapter_names(model):
        raise ValueError(
            f"the model already has an adapter attached under the name {adapter_name!r}: pass another adapter_name, or"
            f" delete_adapter(model, {adapter_name!r}) first."
        )


def _put(adapter: AnyAdapter, adapter_name: str, places: list[Place], found: Kernels) -> None:
    """Replace the adapted kernels, and the quantized ones, by weights that hold the adapter's parts."""
    shared = None if adapter.bases is None else Bases(*map(RandLoraBasis, adapter.bases))
    layouts = dict(adapter.layouts)
    for name in _with_dropout(places) & layouts.keys():
        if not layouts[name].is_plain:
            raise ValueError(f"{name} is a RandLoraLinear layer, which takes no {layouts[name]}: leave out its scale.")
    for place in places:
        name = module_name(place.parts)
        if name in layouts and name in found.kernels:
            kernel = Kernel(layouts[name], found.kernels[name].kernel_shape)
            static = Static(adapter.config, kernel, adapter.recipe, adapter.dtype)
            place.weight().adapters[adapter_name] = LayerAdapter(adapter.factors[name], static, shared)
        elif is_quantized(place.base.get_value()):
            place.weight()


def _with_dropout(places: list[Place]) -> set[str]:
    """Names of the kernels whose layers apply dropout."""
    return {module_name(place.parts) for place in places if isinstance(place.owner, RandLoraLinear)}


def _resolve(
    source: AdapterConfig | Source,
    found: Kernels,
    recipe: str,
    rngs: nnx.Rngs | None,
    dtype: DTypeLike | None,
    with_dropout: set[str],
) -> AnyAdapter:
    """The adapter to attach, on the default device and checked against the kernels."""
    if isinstance(source, AdapterConfig):
        key = None if rngs is None else rngs.params()
        adapter = new_adapter(source, found, recipe=recipe, key=key, dtype=dtype, with_dropout=with_dropout)
    else:
        dtype = dtype or getattr(source, "dtype", None)
        adapter = on_kernels(as_interop(source), found, dtype=dtype, with_dropout=with_dropout)
    explicit = sorted(with_dropout.intersection(adapter.modules))
    if explicit and isinstance(adapter, AdaLoraAdapter):
        raise TypeError(
            f"the adapter is one of AdaLoRA, but {explicit[:4]} are RandLoraLinear layers, which take RandLoRA only:"
            " leave them out of target_modules, or build the model from nnx.Linear layers."
        )
    return adapter
