"""What an adapter holds besides its layers' parameters: trained modules and biases, and embeddings saved along."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from interop.adapter import Adapter
from interop.errors import AdapterFormatError, bulleted
from interop.fields import HEADS, AdapterConfig
from interop.targets import EMBEDDINGS, in_modules
from randlora_torch.bases import to_torch
from randlora_torch.saved import TrainedBiases, bias_names
from randlora_torch.structure import adapted_layers, base_modules, wrapped_modules

PREFIX = "base_model.model."  # of every key in PEFT's files
_DOUBLES = (".original_module.", ".modules_to_save.")  # PEFT's bias="all" also writes biases inside its own wrappers


@dataclasses.dataclass(frozen=True)
class Extras:
    """The further parameters of one adapter, as places in its model.

    Attributes:
        modules: Names of the modules that it trains in full.
        biases: The bias vectors that it trains, or None.
        embeddings: Base weights that its file brings, by key: the module's name and the attribute.
    """

    modules: tuple[str, ...] = ()
    biases: TrainedBiases | None = None
    embeddings: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)


def find_extras(adapter: Adapter, model: nn.Module) -> Extras:
    """What the config of an adapter asks for, and its file brings, on a model.

    Raises:
        ValueError: an entry of modules_to_save matches nothing, or a module that cannot be copied and trained.
    """
    base = dict(base_modules(model))
    modules = _saved_modules(adapter.config, base, {*adapter.modules, *adapted_layers(model)})
    embeddings = {}
    for key in adapter.saved_weights:
        name, _, attribute = key.removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")
        held = base[name]._parameters if name in base else {}
        if name.split(".")[-1] in EMBEDDINGS and attribute in held and "bias" not in attribute:
            if not in_modules(name, adapter.config.modules_to_save):
                embeddings[key] = (name, attribute)
    if embeddings:
        embedding_parameters(model, ())  # refuses merged ones
    return Extras(modules, _trained_biases(adapter.config, base, adapter.modules, modules), embeddings)


def extra_parameters(
    model: nn.Module, extras: Extras, adapter_name: str, adapted: tuple[str, ...]
) -> dict[str, Tensor]:
    """The further parameters of an attached adapter, under the keys of PEFT's files."""
    wrapped, base = wrapped_modules(model), dict(base_modules(model))
    found = _embeddings(extras, base)
    for name in extras.modules:
        content = wrapped[name].modules_to_save[adapter_name].state_dict(keep_vars=True)
        found |= {f"{PREFIX}{name}.{key}": value for key, value in content.items()}
    return found | _bias_parameters(extras, base, adapted)


def embedding_parameters(model: nn.Module, adapted: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights of a model's embeddings and output head, under the keys of PEFT's files.

    Raises:
        ValueError: an adapter is merged into one of them.
    """
    layers = adapted_layers(model)
    named: list[tuple[str, Any]] = [
        (name, module) for name, module in base_modules(model) if name.split(".")[-1] in EMBEDDINGS
    ]
    merged = [name for name, _ in named if name in layers and layers[name].merged]
    if merged:
        raise ValueError(f"{merged} hold merged adapters, and are no base weights now: unmerge_adapter() first.")
    return {f"{PREFIX}{name}{'.base_layer' if name in adapted else ''}.weight": module.weight for name, module in named}


def has_new_tokens(model: nn.Module) -> bool:
    """Whether the vocabulary differs from that of the folder the model came from: its new rows are nowhere else."""
    config = getattr(model, "config", None)
    folder, size = getattr(config, "_name_or_path", None), getattr(config, "vocab_size", None)
    file = Path(folder) / "config.json" if folder else None
    if file is None or not file.is_file() or not size:
        return False
    return bool(json.loads(file.read_text()).get("vocab_size", size) != size)


def brought_by(adapter: Adapter) -> dict[str, Tensor]:
    """What a saved adapter holds besides lambda and gamma, each once."""
    saved = adapter.saved_weights.items()
    return {key: to_torch(value) for key, value in saved if not any(part in key for part in _DOUBLES)}


def match_extras(adapter: Adapter, base: Mapping[str, nn.Module], extras: Extras) -> dict[str, Tensor]:
    """The values that a loaded adapter brings for its further parameters, checked.

    Raises:
        AdapterFormatError: some are missing, left over, or of another shape; all are listed.
    """
    places = _embeddings(extras, base)
    for name in extras.modules:
        places |= {f"{PREFIX}{name}.{key}": value for key, value in base[name].state_dict().items()}
    places |= _bias_parameters(extras, base, adapter.modules)
    given = brought_by(adapter)
    problems = [f"{key}: missing" for key in places.keys() - given.keys()]
    problems += [f"{key}: the model has no such place" for key in given.keys() - places.keys()]
    problems += [
        f"{key}: has shape {tuple(given[key].shape)}, the model's is {tuple(place.shape)}"
        for key, place in places.items()
        if key in given and given[key].shape != place.shape
    ]
    if problems:
        raise AdapterFormatError(bulleted("the adapter's trained modules and biases do not fit the model", problems))
    return given


def _embeddings(extras: Extras, base: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    held = {key: base[name]._parameters[part] for key, (name, part) in extras.embeddings.items()}
    return {key: parameter for key, parameter in held.items() if parameter is not None}


def _bias_parameters(extras: Extras, base: Mapping[str, nn.Module], adapted: tuple[str, ...]) -> dict[str, Tensor]:
    names = {id(module): name for name, module in base.items()}
    found: dict[str, Tensor] = {}
    for module, attribute, value in extras.biases.items() if extras.biases is not None else ():
        name = names[id(module)]
        found[f"{PREFIX}{name}{'.base_layer' if name in adapted else ''}.{attribute}"] = value
    return found


def _saved_modules(config: AdapterConfig, base: Mapping[str, nn.Module], adapted: Collection[str]) -> tuple[str, ...]:
    """Names of the modules that `modules_to_save` means: PEFT's rule is any name that ends so."""
    found: dict[str, None] = {}
    for entry in config.modules_to_save or ():
        matches = [name for name in base if name.endswith(entry)]
        if not matches and entry not in HEADS.get(config.task_type or "", ()):
            raise ValueError(f"modules_to_save entry {entry!r} matches no module of the model. Name it in full.")
        found |= dict.fromkeys(matches)
    # Of a module and its parts, the module is trained.
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    for name in outer:
        parts = [part for part in base if f"{part}.".startswith(f"{name}.")]
        inside = [part for part in parts if part in adapted]
        quantized = [part for part in parts if type(base[part]).__module__.startswith("bitsandbytes")]
        if inside or quantized:
            reason = f"{inside[0]!r} is adapted" if inside else f"{quantized[0]!r} is quantized"
            raise ValueError(f"modules_to_save: {name!r} cannot be trained in full, because {reason}. Leave one out.")
    return tuple(outer)


def _trained_biases(
    config: AdapterConfig, base: Mapping[str, nn.Module], adapted: tuple[str, ...], saved: tuple[str, ...]
) -> TrainedBiases | None:
    if config.bias == "none":
        return None
    chosen = {name: base[name] for name in adapted} if config.bias.endswith("_only") else base
    in_saved = tuple(f"{name}." for name in saved)
    return TrainedBiases(
        (module, attribute)
        for name, module in chosen.items()
        if not f"{name}.".startswith(in_saved or ("\0",))
        for attribute in bias_names(module)
    )
