"""What PEFT's format has no place for: the recipe of the bases, the shapes of the layers, and SHA-256 sums.

It stands as JSON under `randlora` in the metadata of the safetensors file, which PEFT passes over.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interop.adapter import Adapter
from interop.bases import Bases, bases_digest, recipe_gives_A
from interop.errors import AdapterFormatError, legible
from interop.folder import CONFIG_HASH, NOTES_KEY, digest
from interop.integrity import tensors_digest
from interop.shapes import MAX_SIDE
from interop.strictjson import JSONError, parse_object

FORMAT_VERSION = 1
TENSORS_HASH = "tensors_sha256"
SEAL_KEY = f"{NOTES_KEY}_sha256"  # where in the metadata the SHA-256 of the notes stands
BASES_HASH = "bases_sha256"
HASHES = (BASES_HASH, CONFIG_HASH, TENSORS_HASH)
KEYS = ("format_version", "recipe", "max_dim", "min_dim", "shapes", *HASHES)  # all of them, in version 1


def make_notes(adapter: Adapter, trained: Mapping[str, Any], config: bytes) -> dict[str, Any]:
    """The notes of an adapter with these tensors besides the bases, and this config file."""
    dims = None if adapter.bases is None else adapter.bases.dims
    rebuilt = adapter.bases is None or recipe_gives_A(adapter.config, adapter.bases, adapter.recipe)
    return {
        "format_version": FORMAT_VERSION,
        "recipe": adapter.recipe if rebuilt else None,  # bases that were changed since have none
        BASES_HASH: None if adapter.bases is None else bases_digest(adapter.bases),
        "max_dim": dims and dims.max_dim,
        "min_dim": dims and dims.min_dim,
        "shapes": adapter.shapes and {name: list(shape) for name, shape in adapter.shapes.items()},
        CONFIG_HASH: digest(config),
        TENSORS_HASH: tensors_digest(trained),
    }


def seal(notes: Mapping[str, Any]) -> dict[str, str]:
    """The notes as metadata: their text, and its SHA-256, so that they are whole or not there at all."""
    text = json.dumps(notes, sort_keys=True)
    return {NOTES_KEY: text, SEAL_KEY: _sha256(text)}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_notes(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The notes in a file's metadata, checked for types; {} for a file by PEFT.

    Raises:
        AdapterFormatError: they are damaged or malformed, or of a later version.
    """
    text, sealed = metadata.get(NOTES_KEY), metadata.get(SEAL_KEY)
    if text is None and sealed is None:
        return {}
    if text is None or sealed != _sha256(text):
        raise AdapterFormatError(
            f"{path}: the metadata entry {NOTES_KEY!r} was damaged or edited, by its SHA-256 under {SEAL_KEY!r}. Copy"
            " or download the file again."
        )
    try:
        notes = parse_object(text.encode())
        _check_version(path, notes)
        _check_types(notes)
    except (JSONError, KeyError, TypeError) as error:
        raise AdapterFormatError(
            f"{path}: the metadata entry {NOTES_KEY!r} is malformed ({legible(repr(error))}). Copy or download the file"
            " again."
        ) from error
    return notes


def _check_version(path: Path, notes: Mapping[str, Any]) -> None:
    version = notes["format_version"]
    if type(version) is not int or version < 1:
        raise TypeError("format_version must be a positive integer")
    if version > FORMAT_VERSION:
        raise AdapterFormatError(
            f"{path} has format_version {legible(version)}, this release reads up to {FORMAT_VERSION}: upgrade"
            " randlora."
        )


def _check_types(notes: Mapping[str, Any]) -> None:
    wrong = sorted(notes.keys() ^ set(KEYS))
    if wrong:
        raise TypeError(f"{wrong} are missing or unknown; version {FORMAT_VERSION} has {list(KEYS)}")
    texts = [notes[name] for name in ("recipe", *HASHES) if notes[name] is not None]
    if not all(type(text) is str for text in texts):
        raise TypeError("the recipe and SHA-256 sums must be strings")
    shapes = {} if notes["shapes"] is None else notes["shapes"]
    if not isinstance(shapes, dict):
        raise TypeError("shapes must be an object or null")
    sizes = [notes[name] for name in ("max_dim", "min_dim") if notes[name] is not None]
    sizes += [size for shape in shapes.values() for size in _pair(shape)]
    if not all(type(size) is int and 0 < size <= MAX_SIDE for size in sizes):
        raise TypeError(f"sizes must be integers from 1 to {MAX_SIDE}")


def _pair(shape: Any) -> Any:
    if not isinstance(shape, list) or len(shape) != 2:
        raise TypeError(f"the shape {shape!r} is not a pair (out, in)")
    return shape


def check_bases(bases: Bases, notes: Mapping[str, Any], cause: str) -> None:
    """Check that these are the bases that the file was written with.

    Raises:
        AdapterFormatError: they are not; the message ends with the likely cause.
    """
    want, got = notes.get(BASES_HASH), bases_digest(bases)
    if want != got:
        raise AdapterFormatError(f"the bases have SHA-256 {got}, the file was written with {legible(want)}. {cause}")


def check_tensors(trained: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Check that these are the tensors, besides the bases, that the file was written with, if it says.

    Raises:
        AdapterFormatError: they are not.
    """
    want = notes.get(TENSORS_HASH)
    if want is not None and want != tensors_digest(trained):
        raise AdapterFormatError(
            "the tensors are not those that the file was written with, by their SHA-256. It was damaged, or edited by a"
            " tool that kept the metadata: copy or download it again."
        )
