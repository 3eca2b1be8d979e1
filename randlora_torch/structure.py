"""What a model is made of: its base modules by name, which of them can be adapted, and by which of our layers."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from interop.adalora import AdaLoraConfig
from interop.fields import AdapterConfig
from randlora_torch.adalora import SVDConv2d, SVDLinear
from randlora_torch.layer import AdapterLayer
from randlora_torch.randlora import Linear
from randlora_torch.saved import ModulesToSaveWrapper


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base model under their own names, whatever adapters stand in their places."""
    inside: str | None = None  # the adapted layer or wrapped module whose parts come next
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, AdapterLayer | ModulesToSaveWrapper):
            inside = f"{name}."
            module = module.base_layer if isinstance(module, AdapterLayer) else module.original_module
        yield name, module


def adapted_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The layers of a model that carry adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def wrapped_modules(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """The modules of a model of which adapters train copies, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def adaptable_layers(
    model: nn.Module, config: AdapterConfig, *, linear_only: bool = False
) -> tuple[dict[str, nn.Module], list[str]]:
    """Base layers that the method of a config can adapt, by name, and the names of all other modules."""
    convolutions = isinstance(config, AdaLoraConfig) and not linear_only
    layers: dict[str, nn.Module] = {}
    others: list[str] = []
    wrapped = wrapped_modules(model)
    for name, module in base_modules(model):
        fits = _is_linear(module) or (convolutions and type(module).forward is nn.Conv2d.forward)
        if name and name not in wrapped and fits:
            layers[name] = module
        else:
            others.append(name)
    return layers, others


def bnb_layers() -> ModuleType | None:
    """Our bitsandbytes layers. A model with such layers has imported bitsandbytes; without them it is not touched."""
    return importlib.import_module("randlora_torch.bnb") if "bitsandbytes" in sys.modules else None


def layer_kind(base_layer: nn.Module, config: AdapterConfig) -> type[AdapterLayer]:
    """The class that adapts a base layer by the method of a config."""
    bnb, svd = bnb_layers(), isinstance(config, AdaLoraConfig)
    if bnb is not None and isinstance(base_layer, bnb.Base8bit):
        return bnb.SVDLinear8bitLt if svd else bnb.Linear8bitLt
    if bnb is not None and isinstance(base_layer, bnb.Base4bit):
        return bnb.SVDLinear4bit if svd else bnb.Linear4bit
    if svd:
        return SVDConv2d if isinstance(base_layer, nn.Conv2d) else SVDLinear
    return Linear


def _is_linear(module: nn.Module) -> bool:
    """Whether the module computes `x @ W.T + b`, and nothing else, when it is called."""
    bnb = bnb_layers()
    if bnb is not None and isinstance(module, bnb.Base4bit | bnb.Base8bit):
        return True
    if isinstance(module, NonDynamicallyQuantizableLinear):  # nn.MultiheadAttention reads its weight, uncalled
        return False
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def floating_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the model's activations start in: that of its first parameter in floating point."""
    usual = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    packed = ("Params4bit", "Int8Params")
    found = (p.dtype for p in model.parameters() if p.dtype in usual and type(p).__name__ not in packed)
    return next(found, torch.float32)
