"""Adapters taken out of PEFT's own models, as its files would hold them; with `peft_host` all that knows PEFT.

Factors and bases are read from PEFT's layers, which are what computes: the list by which PEFT saves loses those of
layers that it nested, and of adapters that are called as a module is. It only says what else belongs to the file.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from interop.adalora import AdaLoraConfig, SVDFactors, keep_triplets
from interop.adapter import Adapter
from interop.bases import Bases, cut_bases, identify_recipe
from interop.config import RandLoraConfig
from interop.contents import read_tensors
from interop.errors import AdapterFormatError, bulleted
from interop.fields import AdapterConfig
from interop.shapes import shared_dims
from interop.tensorfile import Tensors
from randlora_torch.adapter import AdaLoraAdapter, RandLoraAdapter
from randlora_torch.bases import to_numpy
from randlora_torch.extracting import whole
from randlora_torch.layer import layer_shape

try:
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.adalora.layer import AdaLoraLayer
    from peft.tuners.randlora.layer import RandLoraLayer
    from peft.tuners.tuners_utils import BaseTuner
except ModuleNotFoundError as error:
    raise ImportError(f"{error.name} is not installed. Run: pip install 'randlora[peft]'") from error

_BASES = Bases("randlora_A", "randlora_B")
_NOT_SAVED = ("ranknum", *_BASES)  # the first is init_r, the bases are read apart from a layer's own tensors


def extract_peft(model: Any, adapter_name: str | None = None) -> RandLoraAdapter | AdaLoraAdapter:
    """An adapter of a `peft.PeftModel`, or of a model that PEFT put its layers into, with its current values.

    Bases that PEFT made larger than this adapter needs, for one that was there before it, are cut to size. Of AdaLoRA,
    the triplets of `rank_pattern` are given, as PEFT saves them.

    Args:
        model: With adapters of RandLoRA or AdaLoRA.
        adapter_name: Which one; may be left out if there is only one.

    Raises:
        ValueError: the model has no such adapter, several and no name was given, or it is one of another method.
        AdapterFormatError: a tensor of the adapter is left over, the bases of two layers differ, or the parts do not
            fit together, as in a second adapter of another r, which PEFT cannot compute with either.
    """
    name = _the_name(model.peft_config, adapter_name)
    theirs, base = model.peft_config[name], _base_model(model)
    config = AdapterConfig.from_dict({**theirs.to_dict(), **_saved_fields(model, theirs)})
    layers = {_unnested(path): layer for path, layer in base.named_modules() if _has_adapter(layer, name)}
    shapes = {module: layer_shape(layer.get_base_layer()) for module, layer in layers.items()}
    found = {**_other_tensors(base, theirs, name), **dict(_own_tensors(layers, name))}
    tensors = Tensors({key: _to_array(key, tensor) for key, tensor in found.items()})
    where = f"adapter {name!r} of the {type(model).__name__}"
    contents = read_tensors(where, tensors, config)
    if set(contents.factors) != set(layers):
        differing = sorted(set(contents.factors) ^ set(layers))
        raise AdapterFormatError(bulleted(f"{where}: these have tensors or are layers of it, but not both", differing))
    parts: dict[str, Any] = {"config": config, "shapes": shapes, "saved_weights": contents.saved_weights}
    try:
        if isinstance(config, AdaLoraConfig):
            factors = {module: _kept(config, module, triplets) for module, triplets in contents.factors.items()}
            return AdaLoraAdapter.from_interop(Adapter(factors=factors, **parts))
        assert isinstance(config, RandLoraConfig)
        assert contents.bases is not None
        bases = _cut(contents.bases, shapes)
        recipe = identify_recipe(config, bases)
        adapter = Adapter(factors=contents.factors, bases=bases, recipe=recipe, **parts)
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{where}: {error}") from error
    return RandLoraAdapter.from_interop(adapter)


def _the_name(configs: Mapping[str, Any], adapter_name: str | None) -> str:
    if adapter_name is None and len(configs) != 1:
        raise ValueError(f"the model has the adapters {list(configs)}: pass adapter_name to say which one.")
    if adapter_name is not None and adapter_name not in configs:
        raise ValueError(f"adapter {adapter_name!r} is not attached: the model has {list(configs)}.")
    return adapter_name or next(iter(configs))


def _base_model(model: nn.Module) -> nn.Module:
    """The model whose layers PEFT replaced: names in files are relative to it."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def _saved_fields(model: nn.Module, config: Any) -> dict[str, Any]:
    """What PEFT writes into the config of a file in other values than it has in memory."""
    fields: dict[str, Any] = {"inference_mode": True}
    if isinstance(model, PeftModel) and config.task_type is None:
        kind = type(model.get_base_model())
        fields["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return fields


def _has_adapter(layer: nn.Module, name: str) -> bool:
    if isinstance(layer, RandLoraLayer):
        return name in layer.randlora_lambda
    return isinstance(layer, AdaLoraLayer) and name in layer.lora_A


def _unnested(path: str) -> str:
    """A path without the layers that PEFT put around each other: those of a module, or the key of its bias."""
    return re.sub(r"(\.base_layer)+$", "", re.sub(r"(\.base_layer)+\.", ".base_layer.", path))


def _own_tensors(layers: Mapping[str, nn.Module], name: str) -> Iterator[tuple[str, Tensor]]:
    """All that the layers hold for an adapter, under the keys of a file; each copy of the bases once."""
    seen = set()
    for module, layer in layers.items():
        for path, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            part, _, rest = path.partition(".")
            if part not in ("base_layer", *_NOT_SAVED) and rest.split(".")[0] == name:
                yield f"base_model.model.{module}.{part}{rest.removeprefix(name)}", tensor
        for part in _BASES if isinstance(layer, RandLoraLayer) else ():
            basis = getattr(layer, part)[name]
            if (basis.device, basis.data_ptr()) not in seen:
                seen.add((basis.device, basis.data_ptr()))
                yield f"base_model.model.{module}.{part}", basis


def _other_tensors(base: nn.Module, config: Any, name: str) -> dict[str, Tensor]:
    """What PEFT saves with an adapter besides what is its layers' own: biases, whole modules, embeddings."""
    config = copy.copy(config)
    if hasattr(config, "rank_pattern"):
        config.rank_pattern = None
    owners = tuple(
        f"{path}." for path, module in base.named_modules() if isinstance(module, RandLoraLayer | AdaLoraLayer)
    )
    state = {
        key: value
        for key, value in base.state_dict().items()
        if not any(key.startswith(owner) and not key.startswith(f"{owner}base_layer.") for owner in owners)
    }
    listed = get_peft_model_state_dict(_Only(base, {name: config}), state_dict=state, adapter_name=name)
    return {f"base_model.model.{_unnested(key)}": value for key, value in listed.items()}


class _Only:
    """A model as it is, except that PEFT finds only these adapters on it."""

    def __init__(self, model: nn.Module, peft_config: dict[str, Any]) -> None:
        self._model, self.peft_config = model, peft_config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _to_array(key: str, tensor: Tensor) -> np.ndarray:
    if tensor.is_meta:
        raise AdapterFormatError(f"{key} is on the meta device and has no values: load the adapter first.")
    return to_numpy(whole(tensor))


def _kept(config: AdaLoraConfig, module: str, factors: SVDFactors) -> SVDFactors:
    """The triplets that are left: those that PEFT holds, which it takes away when it saves or loads."""
    pruned = len(factors.E) == config.rank(module)
    return factors if pruned else keep_triplets(factors, config.kept(module))


def _cut(bases: Bases, shapes: Mapping[str, tuple[int, int]]) -> Bases:
    """The bases without the rows and columns that no layer of the adapter uses."""
    return Bases(*map(np.ascontiguousarray, cut_bases(bases, shared_dims(shapes.values()))))
