"""New and saved adapters brought onto a model, and attached ones set to saved values."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interop.adapter import Adapter, init_adapter
from interop.bases import Bases, bases_digest
from interop.config import RandLoraConfig
from interop.errors import bulleted
from interop.fields import HEADS
from interop.files import load
from interop.targets import default_targets, resolve_targets
from randlora_torch.adapter import RandLoraAdapter
from randlora_torch.attach import attach, check_request, find_attached, saved_parameters
from randlora_torch.bases import to_numpy, to_torch
from randlora_torch.extras import brought_by, embedding_parameters
from randlora_torch.layer import RandLoraLayer, compute_device, layer_shape
from randlora_torch.merging import is_sharded
from randlora_torch.structure import adaptable_layers, adapted_layers, base_modules

Source = Adapter | RandLoraAdapter | str | os.PathLike[str]


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
    layers, others = adaptable_layers(model)
    targets = resolve_targets(config, list(layers), output_layers=_output_heads(model, layers), other_modules=others)
    shapes = {name: layer_shape(layers[name]) for name in targets}
    stored_in_out = any(isinstance(layers[name], Conv1D) for name in targets)
    config = dataclasses.replace(config, fan_in_fan_out=stored_in_out)  # what the layers are, as PEFT corrects it
    rng = None if config.init_weights else np.random.default_rng(int(torch.randint(2**62, ())))
    attach(model, init_adapter(config, shapes, recipe=recipe, rng=rng), adapter_name, loaded=False)
    for layer in adapted_layers(model).values() if dtype is not None or meta else ():
        for held in (layer.randlora_lambda, layer.randlora_gamma):
            if adapter_name in held:
                value = held[adapter_name].detach()
                held[adapter_name] = nn.Parameter(value.to("meta" if meta else value.device, dtype))


def attach_saved(model: nn.Module, source: Source, adapter_name: str, recipe: str | None) -> None:
    """Attach an adapter from a folder or from any stack."""
    check_request(model, adapter_name)
    attach(model, _as_adapter(source, recipe).bind(_layer_shapes(model)), adapter_name, loaded=True)


def restore(model: nn.Module, source: Source, adapter_name: str) -> None:
    """Set an attached adapter to saved values, in place.

    Raises:
        ValueError: the adapter is not attached, or merged, or the saved one is of another kind: what differs is listed.
    """
    info = find_attached(model, adapter_name)
    saved = _as_adapter(source, None).bind(_layer_shapes(model))
    layers = {name: layer for name, layer in adapted_layers(model).items() if adapter_name in layer.randlora_lambda}
    values = brought_by(saved)
    embeddings = {key: place for key, place in embedding_parameters(model, info.modules).items() if key in values}
    extras = {**embeddings, **saved_parameters(model, adapter_name)}
    problems = list(_differences(model, adapter_name, layers, saved, extras, values))
    if problems:
        raise ValueError(bulleted(f"adapter {adapter_name!r} cannot be set to the saved values", problems))
    with torch.no_grad():
        for name, factors in saved.factors.items():
            layer = layers[name]
            for held, value in zip((layer.randlora_lambda, layer.randlora_gamma), map(to_torch, factors), strict=True):
                place = held[adapter_name]
                if place.device.type == "meta":  # left without values by low_cpu_mem_usage
                    value = value.to(compute_device(layer.base_layer), place.dtype)
                    held[adapter_name] = nn.Parameter(value, requires_grad=place.requires_grad)
                else:
                    _fill(place, value)
        for key, place in extras.items():
            _fill(place, values[key])


def _differences(
    model: nn.Module,
    adapter_name: str,
    layers: Mapping[str, RandLoraLayer],
    saved: Adapter,
    extras: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> Iterator[str]:
    """Why the values of a saved adapter make no sense in the place of an attached one's."""
    info = find_attached(model, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        yield "it is merged into the base weights: unmerge_adapter() first"
    for field in ("r", "randlora_alpha"):
        mine, other = getattr(info.config, field), getattr(saved.config, field)
        if mine != other:
            yield f"{field}: {mine} is attached, {other} is saved"
    for what, a, b in (("layers", layers, saved.factors), ("trained modules and biases", extras, values)):
        changed = sorted(set(a) ^ set(b))
        if changed:
            yield f"{what}: {changed[:4]} are in one of them only"
    resized = [key for key in extras if key in values and extras[key].shape != values[key].shape]
    if resized:
        yield f"{resized[:4]} have other shapes"
    stored = zip((model._randlora.bases_A, model._randlora.bases_B), info.bases_dtypes, strict=True)
    bases = Bases(*(to_numpy(held[adapter_name].to(dtype)) for held, dtype in stored))
    if info.config.r == saved.config.r and bases_digest(bases) != bases_digest(saved.bases):
        yield "bases: they are not the same (another seed, sparsity or recipe)"


def _fill(place: Tensor, value: Tensor) -> None:
    if is_sharded(place):
        distribute = torch.distributed.tensor.distribute_tensor
        value = distribute(value.to(place.device), place.device_mesh, place.placements)
    place.copy_(value)


def _as_adapter(source: Any, recipe: str | None) -> Adapter:
    if isinstance(source, str | os.PathLike):
        return load(source, recipe=recipe)
    adapter = source.to_interop() if hasattr(source, "to_interop") else source
    if not isinstance(adapter, Adapter):
        raise TypeError(f"dir_or_adapter is a {type(source).__name__}: pass an adapter folder or an adapter.")
    return adapter


def _as_config(config: Any) -> RandLoraConfig:
    if isinstance(config, RandLoraConfig):
        return config
    if type(config).__module__.startswith("peft.") and hasattr(config, "to_dict"):
        return RandLoraConfig.from_dict(config.to_dict())
    raise TypeError(f"peft_config is a {type(config).__name__}: pass a RandLoraConfig.")


def _completed(config: RandLoraConfig, model: nn.Module) -> RandLoraConfig:
    """The config with what PEFT reads from the model where it is left open: its name, targets and trained head."""
    changes: dict[str, Any] = {}
    if config.base_model_name_or_path is None:
        changes["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    if config.target_modules is None:
        changes["target_modules"] = default_targets(getattr(getattr(model, "config", None), "model_type", None))
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


def _layer_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: layer_shape(layer) for name, layer in adaptable_layers(model)[0].items()}


def _output_heads(model: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    """What "all-linear" leaves out: the output embedding, and the head of a classifier."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return [name for name, layer in layers.items() if layer is head]
