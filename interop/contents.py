"""Which tensor of an adapter file is what: from an adapter to PEFT's keys and back, strictly.

Keys are `base_model.model.<module>.` and `randlora_lambda|gamma`, or for AdaLoRA `lora_A|E|B`. The bases of RandLoRA
are `base_model.randlora_A|B` (one copy, as PEFT's main branch writes it) or a copy per layer (PEFT <= 0.21.2), which
must then all be equal.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from interop.adalora import SVDFactors
from interop.adapter import Adapter, factors_kind
from interop.bases import Bases
from interop.delta import Factors
from interop.errors import AdapterFormatError, bulleted
from interop.fields import AdapterConfig
from interop.integrity import not_finite
from interop.targets import EMBEDDINGS, in_modules
from interop.tensorfile import DTYPES, byte_chunks

PARTS = {  # the last part of the keys of a layer's factors
    Factors: Factors("randlora_lambda", "randlora_gamma"),
    SVDFactors: SVDFactors("lora_A", "lora_E", "lora_B"),
}
_DTYPES = set(DTYPES.values())
_BASES = Bases("randlora_A", "randlora_B")
_KEY = re.compile(r"(?s)base_model\.(?:model\.(?P<module>.+)\.)?(?P<part>[^.]+)")


class Contents(NamedTuple):
    """The tensors of a file, sorted."""

    factors: dict[str, Any]  # Factors or SVDFactors
    bases: Bases | None
    saved_weights: dict[str, np.ndarray]


def trained_tensors(adapter: Adapter) -> dict[str, Any]:
    """All tensors of an adapter's file but the bases, by key."""
    tensors: dict[str, Any] = dict(adapter.saved_weights)
    parts = PARTS[factors_kind(adapter.config)]
    for name, factors in adapter.factors.items():
        keys = (f"base_model.model.{name}.{part}" for part in parts)
        tensors |= dict(zip(keys, factors, strict=True))
    return tensors


def bases_tensors(adapter: Adapter, *, per_layer: bool) -> dict[str, Any]:
    """The bases by key: once, and if asked for once more for each layer, as PEFT <= 0.21.2 writes them."""
    places = ["base_model", *(f"base_model.model.{name}" for name in adapter.factors if per_layer)]
    return {
        f"{place}.{part}": basis for place in places for part, basis in zip(_BASES, adapter.bases or (), strict=False)
    }


def read_tensors(
    path: Path | str, file: Any, config: AdapterConfig, *, read: Callable[[str], Any] | None = None
) -> Contents:
    """Sort the tensors of an open safetensors file into factors, one copy of the bases, and what else there may be.

    Args:
        path: What errors call the file.
        file: A `TensorFile`, or what has its `keys`, `dtype`, `shape`, `tensor` and `chunks`.
        config: Of the adapter.
        read: From a key to what is kept of a tensor that is no basis; by default the array.

    Raises:
        AdapterFormatError: a tensor is missing, left over, of a dtype that adapters do not have, or holds inf or nan,
            or a basis has several copies that differ; all are listed.
        TensorFileError: the file became shorter while it was read.
    """
    kind = factors_kind(config)
    found, problems = _sorted(file, config)
    for module, parts in found.factors.items():
        problems += [f"base_model.model.{module}.{part}: missing" for part in PARTS[kind] if part not in parts]
    if found.copies:
        missing = [part for part in _BASES if part not in found.copies]
        problems += [f"base_model.{part}: missing, the other basis is there" for part in missing]
    _raise(path, config, problems)  # before anything is read
    kept = {key: (read or file.tensor)(key) for key in found.keys}
    bases = {part: file.tensor(keys[0]) for part, keys in found.copies.items()}
    problems = [f"{key}: holds inf or nan" for key in not_finite(kept)]
    for part, (first, *others) in found.copies.items():
        problems += [f"{first}: holds inf or nan" for _ in not_finite({first: bases[part]})]
        problems += [
            f"{key}: differs from another copy of basis {part[-1]} in the same file"
            for key in others
            if not _holds(file, key, bases[part])
        ]
    _raise(path, config, problems)
    factors = {
        module: kind(*(kept.pop(parts[part]) for part in PARTS[kind])) for module, parts in found.factors.items()
    }
    return Contents(factors, Bases(*(bases[part] for part in _BASES)) if bases else None, kept)


class _Sorted(NamedTuple):
    """Keys of a file, by what they are."""

    keys: list[str]  # all but those of bases
    factors: dict[str, dict[str, str]]  # by module and part
    copies: dict[str, list[str]]  # of the bases, by part


def _sorted(file: Any, config: AdapterConfig) -> tuple[_Sorted, list[str]]:
    """The keys of a file, and what is wrong with each of them."""
    kind = factors_kind(config)
    wanted, bases = PARTS[kind], _BASES if kind is Factors else ()
    found = _Sorted([], {}, {})
    problems: list[str] = []
    for key in file.keys():
        match = _KEY.fullmatch(key)
        module, part = (match["module"], match["part"]) if match else (None, "")
        if file.dtype(key) not in _DTYPES:
            problems.append(f"{key}: dtype {file.dtype(key)} is not one of {sorted(map(str, _DTYPES))}")
        elif part in bases:
            found.copies.setdefault(part, []).append(key)
        elif part in wanted and module is not None:
            found.factors.setdefault(module, {})[part] = key
            found.keys.append(key)
        elif part in wanted:
            names = " and ".join(name.removeprefix("randlora_") for name in wanted)
            problems.append(f"{key}: left over; {names} belong to a module")
        elif not _accounted_for(key, config):
            problems.append(f"{key}: left over; no tensor of {config.METHOD}, nor named by bias or modules_to_save")
        else:
            found.keys.append(key)
    return found, problems


def _raise(path: Path | str, config: AdapterConfig, problems: list[str]) -> None:
    if problems:
        raise AdapterFormatError(bulleted(f"{path} is not a complete {config.METHOD} adapter", problems))


def _holds(file: Any, key: str, array: np.ndarray) -> bool:
    """Whether a tensor of the file has the shape, dtype and bits of an array; it is not read as a whole."""
    if (file.shape(key), file.dtype(key)) != (array.shape, array.dtype):
        return False
    return all(a == b for a, b in zip(file.chunks(key), byte_chunks(array), strict=True))


def _accounted_for(key: str, config: AdapterConfig) -> bool:
    """Whether a tensor that is not the method's own is one that PEFT saves for this config."""
    *path, last = key.removeprefix("base_model.model.").replace(".base_layer.", ".").split(".")
    if (config.bias != "none" and last == "bias") or (path and path[-1] in EMBEDDINGS):
        return True
    return in_modules(".".join(path), config.modules_to_save)
