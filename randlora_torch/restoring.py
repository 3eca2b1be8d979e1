"""Attached adapters set to saved values, in place."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interop.adalora import AdaLoraConfig, SVDFactors
from interop.adapter import Adapter
from interop.bases import Bases, cut_bases, same_numbers
from interop.errors import bulleted
from randlora_torch.attach import (
    Attached,
    AttachedAdapter,
    attached_to,
    find_attached,
    held_triplets,
    saved_parameters,
    state_of,
)
from randlora_torch.bases import to_numpy, to_torch
from randlora_torch.extracting import held_bases
from randlora_torch.extras import brought_by, embedding_parameters
from randlora_torch.layer import AdapterLayer
from randlora_torch.loading import Source, as_adapter, layer_shapes
from randlora_torch.merging import is_sharded
from randlora_torch.structure import adapted_layers
from randlora_torch.training_state import with_state


def restore(model: nn.Module, source: Source, adapter_name: str) -> None:
    """Set an attached adapter to saved values, in place.

    Raises:
        ValueError: the adapter is not attached, or merged, or the saved one is of another kind: what differs is listed.
    """
    info = find_attached(model, adapter_name)
    saved, state = with_state(source, as_adapter(source, None))
    saved = saved.bind(layer_shapes(model, saved.config))
    layers = {name: layer for name, layer in adapted_layers(model).items() if layer.holds(adapter_name)}
    values = brought_by(saved)
    embeddings = {key: place for key, place in embedding_parameters(model, info.modules).items() if key in values}
    extras = {**embeddings, **saved_parameters(model, adapter_name)}
    problems = list(_differences(model, adapter_name, layers, saved, extras, values))
    if problems:
        raise ValueError(bulleted(f"adapter {adapter_name!r} cannot be set to the saved values", problems))
    empty = [name for name, layer in layers.items() if layer.factors(adapter_name)[0].device.type == "meta"]
    if isinstance(saved.config, AdaLoraConfig):  # what low_cpu_mem_usage left without values takes on the saved ranks
        info = dataclasses.replace(
            info, held={**info.held, **{name: held_triplets(saved.config, name) for name in empty}}
        )
    with torch.no_grad():
        for name, factors in saved.factors.items():
            places, given = layers[name].factors(adapter_name), _in_places(info, saved, name, factors)
            if name in empty:
                pairs = zip(given, places, strict=True)
                layers[name].set_factors(
                    adapter_name, type(factors)(*(value.to(place.dtype) for value, place in pairs))
                )
                for new, old in zip(layers[name].factors(adapter_name), places, strict=True):
                    new.requires_grad_(old.requires_grad)
            else:
                for place, value in zip(places, given, strict=True):
                    _fill(place, value)
        for key, place in extras.items():
            _fill(place, values[key])
    if isinstance(saved.config, AdaLoraConfig):
        rows = {name: [saved.config.kept(name)[i] for i in info.held[name]] for name in info.modules}
        info = dataclasses.replace(info, config=info.config_keeping(rows), allocator=None)
        attached_to(model)[adapter_name] = info if state is None else state.resume(model, adapter_name, info)


def _in_places(info: AttachedAdapter, saved: Adapter, name: str, factors: Any) -> list[Tensor]:
    """The saved parameters of a layer as its own hold them: where an AdaLoRA adapter has fewer triplets, with zeros."""
    values = list(map(to_torch, factors))
    if not isinstance(factors, SVDFactors):
        return values
    rows = [info.held[name].index(i) for i in held_triplets(saved.config, name)]
    A, E, B = values
    count = len(info.held[name])
    whole = A.new_zeros(count, A.shape[1]), E.new_zeros(count, 1), B.new_zeros(len(B), count)
    whole[0][rows], whole[1][rows], whole[2][:, rows] = A, E, B
    return list(whole)


def _differences(
    model: nn.Module,
    adapter_name: str,
    layers: Mapping[str, AdapterLayer],
    saved: Adapter,
    extras: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> Iterator[str]:
    """Why the values of a saved adapter make no sense in the place of an attached one's."""
    info = find_attached(model, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        yield "it is merged into the base weights: unmerge_adapter() first"
    if type(info.config) is not type(saved.config):
        yield f"{info.config.METHOD} is attached, {saved.config.METHOD} is saved"
        return
    svd = isinstance(saved.config, AdaLoraConfig)
    for field in ("init_r", "lora_alpha") if svd else ("r", "randlora_alpha"):
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
    if isinstance(saved.config, AdaLoraConfig):
        taken = [name for name in info.modules if name in saved.factors and not _holds(info, saved.config, name)]
        if taken:
            yield f"{taken[:4]} have triplets that the attached adapter had lost before"
        return
    if info.config.r == saved.config.r and not _are_held(state_of(model), adapter_name, saved.bases):
        yield "bases: they are not the same (another seed, sparsity or recipe)"


def _are_held(state: Attached, adapter_name: str, bases: Bases | None) -> bool:
    """Whether these are the bases of an attached adapter, as far as it holds them."""
    held, origin = held_bases(state, adapter_name), state.adapters[adapter_name].origin
    if bases is None or bases.dims != (held.dims if origin is None else origin.dims):
        return False
    return all(map(same_numbers, cut_bases(bases, held.dims), map(to_numpy, held)))


def _holds(info: AttachedAdapter, config: AdaLoraConfig, name: str) -> bool:
    return set(held_triplets(config, name)) <= set(info.held[name])


def _fill(place: Any, value: Tensor) -> None:
    if is_sharded(place):
        distribute = torch.distributed.tensor.distribute_tensor
        value = distribute(value.to(place.device), place.device_mesh, place.placements)
    place.copy_(value)
