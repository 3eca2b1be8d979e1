"""Adapters on a torch model, attached in place: the model object, its class and its layers' names stay.

As torch's `fully_shard` does, the model's class is swapped for a subclass of itself (and of `RandLoraMixin`), so that
`isinstance(model, PreTrainedModel)` still holds and `model.save_pretrained` writes the adapter.
"""

import collections
import dataclasses
import importlib
import os
import sys
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from interop.adapter import Adapter, Factors, init_adapter
from interop.bases import DEFAULT_RECIPE
from interop.config import RandLoraConfig
from interop.files import load
from interop.targets import resolve_targets
from randlora_torch.adapter import RandLoraAdapter
from randlora_torch.bases import BufferDict, to_torch
from randlora_torch.layer import Linear, RandLoraLayer, layer_shape
from randlora_torch.mixin import AttachedAdapter, RandLoraMixin, adapted_class, adapted_layers

Model = TypeVar("Model", bound=nn.Module)
Source = Adapter | RandLoraAdapter | str | os.PathLike[str]


def get_peft_model(
    model: Model, config: RandLoraConfig, adapter_name: str = "default", *, recipe: str = DEFAULT_RECIPE
) -> Model:
    """Attach a new adapter to `model`, in place, freeze everything else, and return the model.

    Args:
        model: Any module with linear layers: nn.Linear, transformers' Conv1D, bitsandbytes' Linear4bit.
        config: What to adapt and how.
        adapter_name: Name of the adapter.
        recipe: How the bases are drawn, see `interop.RECIPES`.

    Raises:
        ValueError: a target matches nothing or no linear layer, the name is taken or not usable, or the config asks
            for trained biases or modules_to_save, which this release cannot train.
    """
    layers, others = _adaptable_layers(model)
    heads = _output_heads(model, layers)
    targets = resolve_targets(config, list(layers), output_layers=heads, other_modules=others)
    shapes = {name: layer_shape(layers[name]) for name in targets}
    rng = None if config.init_weights else np.random.default_rng(int(torch.randint(2**62, ())))
    if config.base_model_name_or_path is None:
        config = dataclasses.replace(config, base_model_name_or_path=getattr(model, "name_or_path", None) or None)
    _attach(model, init_adapter(config, shapes, recipe=recipe, rng=rng), adapter_name)
    model.set_adapter(adapter_name)
    return model


def load_adapter(
    model: Model,
    dir_or_adapter: Source,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    recipe: str | None = None,
) -> Model:
    """Attach a saved or converted adapter to `model`, in place, and return the model.

    The first adapter of a model becomes active; later ones wait for `model.set_adapter`.

    Args:
        model: The base model that the adapter was made for.
        dir_or_adapter: A folder in PEFT's format, or an adapter of any stack.
        adapter_name: Name to attach it under.
        is_trainable: Whether to go on training it; otherwise its parameters are frozen too.
        recipe: The recipe of the bases, for a folder that neither holds them nor names it.

    Raises:
        FileNotFoundError, AdapterFormatError: see `interop.load`; or the adapter was made for another model.
        ValueError: the adapter name is taken or not usable.
        TypeError: `dir_or_adapter` is no folder and no adapter.
    """
    if isinstance(dir_or_adapter, str | os.PathLike):
        adapter = load(dir_or_adapter, recipe=recipe)
    else:
        adapter = dir_or_adapter.to_interop() if hasattr(dir_or_adapter, "to_interop") else dir_or_adapter
    if not isinstance(adapter, Adapter):
        raise TypeError(f"dir_or_adapter is a {type(dir_or_adapter).__name__}: pass an adapter folder or an adapter.")
    layers, _ = _adaptable_layers(model)
    first = not getattr(model, "randlora_adapters", {})
    _attach(model, adapter.bind({name: layer_shape(layer) for name, layer in layers.items()}), adapter_name)
    if first:
        model.set_adapter(adapter_name)
    for layer in adapted_layers(model).values():
        for parameter in layer.factors(adapter_name) if adapter_name in layer.randlora_lambda else ():
            parameter.requires_grad_(is_trainable)
    return model


def _attach(model: nn.Module, adapter: Adapter, adapter_name: str) -> None:
    """Put an adapter, bound to the model, on its layers, and make the model a `RandLoraMixin`."""
    config = adapter.config
    _check_request(model, config, adapter_name)
    fresh = not isinstance(model, RandLoraMixin)
    basis_A, basis_B = (BufferDict(), BufferDict()) if fresh else (model.randlora_A, model.randlora_B)
    options = (config.r, config.randlora_alpha, config.randlora_dropout)
    layers = {name: model.get_submodule(name) for name in adapter.modules}
    # Whatever can fail comes before the model is touched.
    _check_attachable(model, layers, fresh)
    swapped = adapted_class(type(model)) if fresh else type(model)
    created = {
        name: _layer_kind(layer, name)(layer, adapter_name, basis_A, basis_B, *options)
        for name, layer in layers.items()
        if not isinstance(layer, RandLoraLayer)
    }
    if fresh:
        model.requires_grad_(False)
        model.randlora_adapters = {}
        model.__class__ = swapped
        if _bnb() is not None:
            _bnb().protect_from_repacking(model)
    aliases: dict[int, list[str]] = collections.defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        aliases[id(module)].append(name)
    owners = collections.Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    tied = {key for key, count in owners.items() if count > 1}
    device = _base_layer(layers[adapter.modules[0]]).weight.device
    basis_A[adapter_name], basis_B[adapter_name] = (to_torch(basis).to(device) for basis in adapter.bases)
    active = next((layer.active_adapters for layer in adapted_layers(model).values()), [adapter_name])
    for name, factors in adapter.factors.items():
        if name in created:
            created[name].active_adapters = list(active)
            created[name].tied = id(layers[name].weight) in tied
            for alias in aliases[id(layers[name])]:
                model.set_submodule(alias, created[name].train(model.training))
        else:
            layers[name].update_layer(adapter_name, *options)
        model.get_submodule(name).set_factors(adapter_name, Factors(*map(to_torch, factors)))
    model.randlora_adapters[adapter_name] = AttachedAdapter(config, adapter.recipe, adapter.modules)


def _check_request(model: nn.Module, config: RandLoraConfig, adapter_name: str) -> None:
    """Whether this release can attach such an adapter under this name."""
    taken = any(hasattr(container(), adapter_name) for container in (nn.ModuleDict, nn.ParameterDict, BufferDict))
    if not adapter_name or any(mark in adapter_name for mark in "./\\\0") or taken:
        raise ValueError(
            f"adapter_name={adapter_name!r}: must be a non-empty name without dots and slashes that is no attribute of"
            " torch's containers, such as 'keys'. Choose another."
        )
    if adapter_name in getattr(model, "randlora_adapters", {}):
        raise ValueError(f"adapter_name={adapter_name!r} is taken: the model has {list(model.randlora_adapters)}.")
    if config.bias != "none" or config.modules_to_save:
        raise ValueError(
            f"bias={config.bias!r}, modules_to_save={config.modules_to_save}: this release trains lambda and gamma"
            " only. Use bias='none' and modules_to_save=None."
        )
    config.require_no_head()


def _check_attachable(model: nn.Module, layers: dict[str, nn.Module], fresh: bool) -> None:
    if fresh and adapted_layers(model):
        raise ValueError(
            f"a part of this model, with {next(iter(adapted_layers(model)))!r}, carries adapters already: attach to"
            " that part, or load its adapter on a model that has none."
        )
    on_meta = [name for name, layer in layers.items() if _base_layer(layer).weight.device.type == "meta"]
    if on_meta:
        raise ValueError(
            f"the weights of {on_meta[:4]} are on the meta device (not loaded, or offloaded): load them first, an"
            " adapter on them would compute nothing."
        )


def _base_layer(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, RandLoraLayer) else layer


def _bnb() -> ModuleType | None:
    """Our bitsandbytes layers. A model with such layers has imported bitsandbytes; without them it is not touched."""
    return importlib.import_module("randlora_torch.bnb") if "bitsandbytes" in sys.modules else None


def _layer_kind(base_layer: nn.Module, name: str) -> type[RandLoraLayer]:
    """The class that adapts a base layer."""
    bnb = _bnb()
    if bnb is not None and isinstance(base_layer, bnb.Base8bit):
        raise ValueError(f"{name} is an 8-bit layer, which this release cannot adapt: load the base in 4 bit or plain.")
    return bnb.Linear4bit if bnb is not None and isinstance(base_layer, bnb.Base4bit) else Linear


def _adaptable_layers(model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    """Base layers that can be adapted, by name, and the names of all other modules."""
    layers: dict[str, nn.Module] = {}
    others: list[str] = []
    inside = None  # the adapted layer whose parts come next
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, RandLoraLayer):
            layers[name], inside = module.base_layer, f"{name}."
        elif name and _is_linear(module):
            layers[name] = module
        else:
            others.append(name)
    return layers, others


def _is_linear(module: nn.Module) -> bool:
    """Whether the module computes `x @ W.T + b`, and nothing else, when it is called."""
    bnb = _bnb()
    if bnb is not None and isinstance(module, bnb.Base4bit | bnb.Base8bit):
        return True
    if isinstance(module, NonDynamicallyQuantizableLinear):  # nn.MultiheadAttention reads its weight, uncalled
        return False
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _output_heads(model: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    """What "all-linear" leaves out: the output embedding."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return [name for name, layer in layers.items() if layer is head]
