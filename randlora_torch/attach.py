"""Adapters put on the layers of a model, in place: the model object and the names of its layers stay."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interop.adapter import Adapter, Factors
from interop.bases import Bases
from interop.config import RandLoraConfig
from randlora_torch.adapter import RandLoraAdapter
from randlora_torch.bases import BufferDict, to_torch
from randlora_torch.extras import Extras, embedding_parameters, extra_parameters, find_extras, match_extras
from randlora_torch.layer import BASE_ROWS, RandLoraLayer, Rows
from randlora_torch.merging import is_sharded
from randlora_torch.saved import ModulesToSaveWrapper
from randlora_torch.structure import (
    adapted_layers,
    base_modules,
    bnb_layers,
    floating_dtype,
    layer_kind,
)


@dataclasses.dataclass(frozen=True)
class AttachedAdapter:
    """What a model remembers of an adapter besides the parameters in its layers.

    Attributes:
        config: Its config.
        recipe: Name of the recipe of its bases, or None.
        modules: Names of the adapted layers.
        bases_dtypes: The dtypes of A and B in its file; in memory they may be wider, for speed.
        extras: What it holds besides lambda and gamma.
    """

    config: RandLoraConfig
    recipe: str | None
    modules: tuple[str, ...]
    bases_dtypes: tuple[torch.dtype, torch.dtype]
    extras: Extras


@dataclasses.dataclass
class Attached:
    """All that a model remembers of its adapters. No module, so that the bases are no children of the model."""

    adapters: dict[str, AttachedAdapter] = dataclasses.field(default_factory=dict)
    bases_A: BufferDict = dataclasses.field(default_factory=BufferDict)
    bases_B: BufferDict = dataclasses.field(default_factory=BufferDict)
    active: list[str] = dataclasses.field(default_factory=list)
    disabled: bool = False
    rows: Rows | None = None  # of a mixed batch, while it is computed


def attach(model: nn.Module, adapter: Adapter, adapter_name: str, *, loaded: bool) -> None:
    """Put an adapter that is bound to the model on its layers. Everything that can fail comes before any change.

    Args:
        model: The model, with or without other adapters.
        adapter: The adapter; its bases are known.
        adapter_name: Its name on this model, which `check_request` accepted.
        loaded: Whether it must bring the values of its modules and biases; a new one starts from the model's.

    Raises:
        ValueError, AdapterFormatError: the model cannot take this adapter.
    """
    config = adapter.config
    state: Attached = getattr(model, "_randlora", None) or Attached()
    layers = {name: model.get_submodule(name) for name in adapter.modules}
    base = dict(base_modules(model))
    _check_attachable(model, state)
    with biases_outside(state):
        extras = find_extras(adapter, model)
    weights = match_extras(adapter, base, extras) if loaded else {}
    options = (config.r, config.randlora_alpha, config.randlora_dropout)
    created = {
        name: layer_kind(layer)(layer, adapter_name, state.bases_A, state.bases_B, *options)
        for name, layer in layers.items()
        if not isinstance(layer, RandLoraLayer)
    }
    if not state.adapters:
        model.requires_grad_(False)
        if bnb_layers() is not None:
            bnb_layers().protect_from_repacking(model)
    _share_bases(state, adapter_name, adapter.bases, floating_dtype(model))
    _replace(model, layers, created, state)
    for name, factors in adapter.factors.items():
        if name not in created:
            layers[name].update_layer(adapter_name, *options)
        model.get_submodule(name).set_factors(adapter_name, Factors(*map(to_torch, factors)))
    for name in extras.modules:
        _wrap(model, name, adapter_name)
    dtypes = tuple(to_torch(basis[:0]).dtype for basis in adapter.bases)
    info = AttachedAdapter(config, adapter.recipe, adapter.modules, dtypes, extras)
    state.adapters[adapter_name] = info
    model._randlora = state
    places = saved_parameters(model, adapter_name)
    with torch.no_grad():
        for key, value in weights.items():
            places[key].copy_(value)


@contextlib.contextmanager
def biases_outside(state: Attached) -> Iterator[None]:
    """Within this context, the biases in the model are the base's."""
    inside = [
        info.extras.biases for info in state.adapters.values() if info.extras.biases and info.extras.biases.inside
    ]
    for biases in inside:
        biases.swap(inside=False)
    try:
        yield
    finally:
        for biases in inside:
            biases.swap(inside=True)


def detach_layers(model: nn.Module, *, empty_only: bool = False, keep_saved: bool = False) -> None:
    """Put base layers back in their places.

    Args:
        model: The adapted model.
        empty_only: Only where no adapter is left.
        keep_saved: Leave the trained modules that are in force in place of the base's.
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, RandLoraLayer) and not (empty_only and len(module.randlora_lambda)):
            model.set_submodule(name, module.base_layer)
        elif isinstance(module, ModulesToSaveWrapper) and not (empty_only and len(module.modules_to_save)):
            model.set_submodule(name, module.current if keep_saved else module.original_module)


def check_request(model: nn.Module, adapter_name: str) -> None:
    """Check that an adapter can be attached under this name, before anything is loaded or made for it.

    Raises:
        TypeError, ValueError: the name is no string, not usable, or taken.
    """
    if not isinstance(adapter_name, str):
        raise TypeError(f"adapter_name={adapter_name!r}: pass a string.")
    taken = any(hasattr(container(), adapter_name) for container in (nn.ModuleDict, nn.ParameterDict, BufferDict))
    if not adapter_name or any(mark in adapter_name for mark in "./\\\0") or taken or adapter_name == BASE_ROWS:
        raise ValueError(
            f"adapter_name={adapter_name!r}: must be a non-empty name without dots and slashes that is no attribute of"
            f" torch's containers, such as 'keys', nor {BASE_ROWS!r}. Choose another."
        )
    adapters = attached_to(model)
    if adapter_name in adapters:
        raise ValueError(
            f"adapter_name={adapter_name!r} is taken: the model has {list(adapters)}. Choose another name, delete it"
            " with model.delete_adapter(name), or set it to saved values with model.restore_adapter(folder, name)."
        )


def attached_to(model: Any) -> dict[str, AttachedAdapter]:
    """What is attached to this very model, by adapter name."""
    return model._randlora.adapters if hasattr(model, "_randlora") else {}


def find_attached(model: Any, adapter_name: str) -> AttachedAdapter:
    """What the model remembers of an adapter.

    Raises:
        ValueError: no adapter of this name is attached.
    """
    attached = attached_to(model)
    if adapter_name not in attached:
        raise ValueError(f"adapter {adapter_name!r} is not attached: the model has {list(attached)}.")
    return attached[adapter_name]


def extract(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    with_embeddings: bool = False,
) -> RandLoraAdapter:
    """An adapter attached to `model`, with the current values of its parameters (shared where they are whole).

    Args:
        model: A model with an adapter attached.
        adapter_name: Which one; may be left out if there is only one.
        state_dict: Values to take instead of the model's, under the model's names, where a trainer has gathered them.
        with_embeddings: Whether to take the base's embeddings and output head along, as PEFT does for added tokens.

    Raises:
        ValueError: the model has no such adapter, or several and no name was given.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled model
    attached = attached_to(model)
    if not attached:
        inside = [name for name, module in model.named_modules() if getattr(module, "_randlora", None)]
        hint = f" Its part {inside[0]!r} has one." if inside else " Attach one first."
        raise ValueError(f"no adapter is attached to this {type(model).__name__}.{hint}")
    if adapter_name is None and len(attached) != 1:
        raise ValueError(f"the model has the adapters {list(attached)}: pass adapter_name to say which one.")
    name = adapter_name or next(iter(attached))
    info = find_attached(model, name)
    layers = adapted_layers(model)
    given = state_dict or {}
    held = (*model.named_parameters(), *model.named_buffers()) if given else ()
    gathered = {id(tensor): given[key] for key, tensor in held if key in given}

    def value(tensor: Tensor) -> Tensor:
        return gathered[id(tensor)].detach() if id(tensor) in gathered else whole(tensor)

    bases = zip((model._randlora.bases_A[name], model._randlora.bases_B[name]), info.bases_dtypes, strict=True)
    embeddings = embedding_parameters(model, info.modules) if with_embeddings else {}
    extras = {**embeddings, **saved_parameters(model, name)}
    return RandLoraAdapter(
        factors={module: Factors(*map(value, layers[module].factors(name))) for module in info.modules},
        bases=Bases(*(basis.to(dtype) for basis, dtype in bases)),
        config=info.config,
        shapes={module: (layers[module].out_features, layers[module].in_features) for module in info.modules},
        recipe=info.recipe,
        saved_weights={key: value(tensor) for key, tensor in extras.items()},
    )


def saved_parameters(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What an adapter holds besides lambda and gamma, under the keys of PEFT's files."""
    info = find_attached(model, adapter_name)
    return extra_parameters(model, info.extras, adapter_name, info.modules)


def whole(tensor: Tensor) -> Tensor:
    """A parameter's full value, gathered from all processes if it is sharded; detached."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _check_attachable(model: nn.Module, state: Attached) -> None:
    if not state.adapters and adapted_layers(model):
        raise ValueError(
            f"a part of this model, with {next(iter(adapted_layers(model)))!r}, carries adapters already: attach to"
            " that part, or load its adapter on a model that has none."
        )
    foreign = next((name for name, module in model.named_modules() if _is_of_peft(module)), None)
    if foreign is not None or hasattr(model, "_orig_mod"):
        reason = f"{foreign!r} is a layer of PEFT" if foreign else "it is compiled"
        advice = (
            "unload PEFT's adapters (for RandLoRA, see accelerate_peft)" if foreign else "attach to model._orig_mod"
        )
        raise ValueError(f"adapters cannot be attached to this model, because {reason}: {advice}.")
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            "the model's parameters are sharded already, and those of an adapter would not be: attach adapters first,"
            " then shard the model."
        )


def _is_of_peft(module: nn.Module) -> bool:
    return any(
        f"{kind.__module__}.{kind.__name__}" == "peft.tuners.tuners_utils.BaseTunerLayer"
        for kind in type(module).__mro__
    )


def _share_bases(state: Attached, adapter_name: str, bases: Bases, dtype: torch.dtype) -> None:
    """Store the bases, or share those of another adapter if they are the same; in `dtype` if that loses nothing."""
    stored = [_in_dtype(to_torch(basis), dtype) for basis in bases]
    pairs = zip(state.bases_A.values(), state.bases_B.values(), strict=True)
    same = next((pair for pair in pairs if all(map(_same, pair, stored))), None)
    state.bases_A[adapter_name], state.bases_B[adapter_name] = same or stored


def _same(held: Tensor, given: Tensor) -> bool:
    return held.shape == given.shape and held.dtype == given.dtype and torch.equal(held.cpu(), given)


def _in_dtype(basis: Tensor, dtype: torch.dtype) -> Tensor:
    converted = basis.to(dtype)
    return converted if torch.equal(converted.to(basis.dtype), basis) else basis


def _replace(
    model: nn.Module, layers: dict[str, nn.Module], created: dict[str, RandLoraLayer], state: Attached
) -> None:
    """Put the created layers in place, under every name that their base layers have in the model."""
    aliases: dict[int, list[str]] = collections.defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        aliases[id(module)].append(name)
    owners = collections.Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for name, layer in created.items():
        layer.active_adapters, layer.disable_adapters = list(state.active), state.disabled
        layer.tied = owners[id(layers[name]._parameters.get("weight"))] > 1
        for alias in aliases[id(layers[name])]:
            model.set_submodule(alias, layer.train(model.training))


def _wrap(model: nn.Module, name: str, adapter_name: str) -> None:
    module = model.get_submodule(name)
    if not isinstance(module, ModulesToSaveWrapper):
        module = ModulesToSaveWrapper(module).train(module.training)
        model.set_submodule(name, module)
    module.add(adapter_name)
