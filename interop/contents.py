"""Which tensor of an adapter file is what: from an adapter to PEFT's keys and back, strictly.

Keys are `base_model.model.<module>.` and `randlora_lambda|gamma`, or for AdaLoRA `lora_A|E|B`. The bases of RandLoRA
are `base_model.randlora_A|B` (one copy, as PEFT's main branch writes it) or a copy per layer (PEFT <= 0.21.2), which
must then all be equal.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from interop.adalora import SVDFactors
from interop.adapter import Adapter, Factors, factors_kind
from interop.bases import Bases
from interop.errors import AdapterFormatError, bulleted
from interop.fields import AdapterConfig
from interop.targets import EMBEDDINGS, in_modules
from interop.tensorfile import DTYPES

PARTS = {  # the last part of the keys of a layer's factors
    Factors: Factors("randlora_lambda", "randlora_gamma"),
    SVDFactors: SVDFactors("lora_A", "lora_E", "lora_B"),
}
_BASES = Bases("randlora_A", "randlora_B")
_KEY = re.compile(r"(?s)base_model\.(?:model\.(?P<module>.+)\.)?(?P<part>[^.]+)")


class Contents(NamedTuple):
    """The tensors of a file, sorted."""

    factors: dict[str, Any]  # Factors or SVDFactors
    bases: Bases | None
    saved_weights: dict[str, np.ndarray]


def to_tensors(adapter: Adapter, *, with_bases: bool) -> dict[str, np.ndarray]:
    """All tensors of an adapter's file, by key."""
    tensors: dict[str, np.ndarray] = dict(adapter.saved_weights)
    parts = PARTS[factors_kind(adapter.config)]
    for name, factors in adapter.factors.items():
        keys = (f"base_model.model.{name}.{part}" for part in parts)
        tensors |= dict(zip(keys, factors, strict=True))
    if with_bases and adapter.bases is not None:
        tensors |= {f"base_model.{part}": basis for part, basis in zip(_BASES, adapter.bases, strict=True)}
    return tensors


def read_tensors(path: Path | str, file: Any, config: AdapterConfig) -> Contents:
    """Sort the tensors of an open safetensors file into factors, one copy of the bases, and what else there may be.

    Raises:
        AdapterFormatError: a tensor is missing, left over, of a dtype that adapters do not have, or a basis has several
            copies that differ; all are listed.
    """
    kind = factors_kind(config)
    wanted, bases = PARTS[kind], _BASES if kind is Factors else ()
    found: dict[str, dict[str, np.ndarray]] = {}
    copies: dict[str, np.ndarray] = {}
    others: dict[str, np.ndarray] = {}
    problems: list[str] = []
    for key in file.keys():
        code, match = file.get_slice(key).get_dtype(), _KEY.fullmatch(key)
        module, part = (match["module"], match["part"]) if match else (None, "")
        if code not in DTYPES:
            problems.append(f"{key}: dtype {code} is not one of {sorted(DTYPES)}")
        elif part in bases:
            first = copies.setdefault(part, value := file.get_tensor(key))
            if not _same_bits(first, value):
                problems.append(f"{key}: differs from another copy of basis {part[-1]} in the same file")
        elif part in wanted and module is not None:
            found.setdefault(module, {})[part] = file.get_tensor(key)
        elif part in wanted:
            names = " and ".join(name.removeprefix("randlora_") for name in wanted)
            problems.append(f"{key}: left over; {names} belong to a module")
        elif not _accounted_for(key, config):
            problems.append(f"{key}: left over; no tensor of {config.METHOD}, nor named by bias or modules_to_save")
        else:
            others[key] = file.get_tensor(key)
    for module, parts in found.items():
        problems += [f"base_model.model.{module}.{part}: missing" for part in wanted if part not in parts]
    if copies:
        missing = [part for part in bases if part not in copies]
        problems += [f"base_model.{part}: missing, the other basis is there" for part in missing]
    if problems:
        raise AdapterFormatError(bulleted(f"{path} is not a complete {config.METHOD} adapter", problems))
    factors = {module: kind(*(parts[part] for part in wanted)) for module, parts in found.items()}
    return Contents(factors, Bases(*(copies[part] for part in bases)) if copies else None, others)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))


def _accounted_for(key: str, config: AdapterConfig) -> bool:
    """Whether a tensor that is not the method's own is one that PEFT saves for this config."""
    *path, last = key.removeprefix("base_model.model.").replace(".base_layer.", ".").split(".")
    if (config.bias != "none" and last == "bias") or (path and path[-1] in EMBEDDINGS):
        return True
    return in_modules(".".join(path), config.modules_to_save)
