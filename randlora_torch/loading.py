"""New and saved adapters brought onto a model."""

import dataclasses
import os
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from interop.adalora import AdaLoraConfig
from interop.adapter import Adapter, init_adapter
from interop.fields import HEADS, AdapterConfig
from interop.files import load
from interop.targets import default_targets, resolve_targets
from randlora_torch.adapter import AdaLoraAdapter, RandLoraAdapter
from randlora_torch.attach import attach, attached_to, check_request, find_attached
from randlora_torch.layer import layer_shape
from randlora_torch.structure import adaptable_layers, adapted_layers, base_modules
from randlora_torch.training_state import with_state

Source = Adapter | RandLoraAdapter | AdaLoraAdapter | str | os.PathLike[str]


def attach_new(
    model: nn.Module,
    config: Any,
    adapter_name: str,
    recipe: str,
    *,
    dtype: torch.dtype | None = None,
    meta: bool = False,
) -> None:
    """Attach a new adapter; `dtype` is that of its factors (None: float32), `meta` leaves them without values."""
    check_request(model, adapter_name)
    config = _completed(_as_config(config), model)
    layers, others = adaptable_layers(model, config, linear_only=str(config.target_modules).lower() == "all-linear")
    targets = resolve_targets(config, list(layers), output_layers=_output_heads(model, layers), other_modules=others)
    shapes = {name: layer_shape(layers[name]) for name in targets}
    stored_in_out = any(isinstance(layers[name], Conv1D) for name in targets)
    config = dataclasses.replace(config, fan_in_fan_out=stored_in_out)  # what the layers are, as PEFT corrects it
    draws = isinstance(config, AdaLoraConfig) or not config.init_weights
    rng = np.random.default_rng(int(torch.randint(2**62, ()))) if draws else None
    adapter = init_adapter(config, shapes, recipe=recipe, rng=rng)
    attach(model, adapter, adapter_name, loaded=False, drawn_by=adapter.recipe)
    for layer in adapted_layers(model).values() if dtype is not None or meta else ():
        for held in layer.parameter_dicts:
            if adapter_name in held:
                value = held[adapter_name].detach()
                held[adapter_name] = nn.Parameter(value.to("meta" if meta else value.device, dtype))


def attach_saved(
    model: nn.Module, source: Source, adapter_name: str, recipe: str | None, *, to_train: bool = False
) -> None:
    """Attach an adapter from a folder or from any stack; `to_train`, with what an unfinished training left there."""
    check_request(model, adapter_name)
    adapter = as_adapter(source, recipe)
    adapter, state = with_state(source, adapter) if to_train else (adapter, None)
    bound = adapter.bind(layer_shapes(model, adapter.config))
    drawn_by = bound.recipe if adapter.bases is None else None
    attach(model, bound, adapter_name, loaded=True, drawn_by=drawn_by)
    if state is not None:
        attached_to(model)[adapter_name] = state.resume(model, adapter_name, find_attached(model, adapter_name))


def as_adapter(source: Any, recipe: str | None) -> Adapter:
    """The numpy form of an adapter of any stack, or of a folder.

    Raises:
        TypeError: `source` is none of these.
    """
    if isinstance(source, str | os.PathLike):
        return load(source, recipe=recipe)
    adapter = source.to_interop() if hasattr(source, "to_interop") else source
    if not isinstance(adapter, Adapter):
        raise TypeError(f"dir_or_adapter is a {type(source).__name__}: pass an adapter folder or an adapter.")
    return adapter


def _as_config(config: Any) -> AdapterConfig:
    if isinstance(config, AdapterConfig):
        return config
    if type(config).__module__.startswith("peft.") and hasattr(config, "to_dict"):
        return AdapterConfig.from_dict(config.to_dict())
    raise TypeError(f"peft_config is a {type(config).__name__}: pass a RandLoraConfig or an AdaLoraConfig.")


def _completed(config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """The config with what PEFT reads from the model where it is left open: its name, targets and trained head."""
    changes: dict[str, Any] = {}
    if config.base_model_name_or_path is None:
        changes["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    if config.target_modules is None:
        changes["target_modules"] = default_targets(getattr(getattr(model, "config", None), "model_type", None), config)
    heads = HEADS.get(config.task_type or "", ())
    if heads:
        if not any(name.split(".")[-1] in heads for name, _ in base_modules(model)):
            raise ValueError(f"task_type={config.task_type!r}: the model has no head named {' or '.join(heads)}.")
        changes["modules_to_save"] = tuple(dict.fromkeys((*(config.modules_to_save or ()), *heads)))
    kind = getattr(model, "_base_class", type(model))
    if config.task_type is None and config.auto_mapping is None and hasattr(kind, "from_pretrained"):
        # By this, PEFT's AutoPeftModel finds the class.
        changes["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return dataclasses.replace(config, **changes)


def layer_shapes(model: nn.Module, config: AdapterConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of all layers that the method of a config can adapt."""
    return {name: layer_shape(layer) for name, layer in adaptable_layers(model, config)[0].items()}


def _output_heads(model: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    """What "all-linear" leaves out: the output embedding, and the head of a classifier."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return [name for name, layer in layers.items() if layer is head]
