"""PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`, read strictly and replaced as one.

What PEFT does not record (recipe, shapes, SHA-256 of bases and config) stands as JSON under `randlora` in the metadata
of the safetensors file; the tensors are those of `interop.contents`.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from interop.adalora import AdaLoraConfig
from interop.adapter import Adapter
from interop.bases import (
    DEFAULT_RECIPE,
    RECIPES,
    Bases,
    bases_digest,
    identify_recipe,
    make_bases,
    recipe_gives_A,
)
from interop.contents import Contents, read_tensors, to_tensors
from interop.errors import AdapterFormatError
from interop.fields import AdapterConfig
from interop.folder import CONFIG_HASH, CONFIG_NAME, WEIGHTS_NAME, ConfigFile, digest, open_pair, replace_pair
from interop.shapes import shared_dims
from interop.tensorfile import safetensors_parts

FORMAT_VERSION = 1


def load(directory: str | os.PathLike[str], *, adapter_name: str | None = None, recipe: str | None = None) -> Adapter:
    """Read an adapter folder written by us or by PEFT. Nothing in it is ignored and nothing is executed.

    After a save that was killed, and while another process saves, this gives the old adapter or the new one, never a
    mixture. The folder is only read: the next `save` cleans up what a killed one left.

    Args:
        directory: The folder with `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: None or "default" for the folder itself, another name for the sub-folder of that name.
        recipe: The recipe of the bases (`interop.RECIPES`), for a file of RandLoRA that holds no bases and does not
            name it. Without it, today's torch is assumed and a warning says so.

    Raises:
        FileNotFoundError: the folder or one of its two files does not exist.
        AdapterFormatError: the content is malformed, incomplete, has left-over tensors, or contradicts itself.
        OSError: another process saves there again and again, without a moment's rest.
    """
    # To be replaced as a whole by the version that lists the sub-folders.
    directory = Path(directory) if adapter_name in (None, "default") else Path(directory) / str(adapter_name)
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is not known: choose one of {list(RECIPES)}.")
    path = directory / WEIGHTS_NAME
    try:
        with open_pair(directory) as (file, found):
            config = _parse_config(found)
            contents = read_tensors(path, file, config)
            notes = _read_notes(path, file.metadata() or {})
    except SafetensorError as error:
        raise AdapterFormatError(
            f"{path} is not a valid safetensors file ({error}). Copy or download it again."
        ) from error
    try:
        return _assemble(path, config, contents, notes, recipe)
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{path}: {error}") from error


def save(adapter: Adapter, directory: str | os.PathLike[str]) -> None:
    """Write an adapter as PEFT's two files, with one copy of the bases or, if `save_projection=False`, none.

    The same adapter always gives the same bytes. The two files replace those of an earlier save as one: whatever
    happens, even `kill -9`, `load` finds the old adapter or the new one. PEFT does, too, except that a kill between two
    renames leaves it no adapter_config.json, until the next save. Where the config says "all-linear" or
    `exclude_modules`, the file names the adapted layers instead, so that PEFT, which reads those otherwise, adapts the
    same ones.

    Raises:
        ValueError: the bases cannot be left out (no recipe rebuilds them) or are not known yet.
        OSError: a file cannot be written, or another process saved there at once and no lock could prevent it.
    """
    tensors = to_tensors(adapter, with_bases=_saves_bases(adapter))
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(
            f"{directory} is a file: pass the folder to write {CONFIG_NAME} and {WEIGHTS_NAME} to."
        )
    directory.mkdir(parents=True, exist_ok=True)
    config = _config_on_disk(adapter).to_json().encode()
    notes = {**_notes(adapter), CONFIG_HASH: digest(config)}
    metadata = {"format": "pt", "randlora": json.dumps(notes, sort_keys=True)}
    replace_pair(directory, config, safetensors_parts(tensors, metadata))


def _saves_bases(adapter: Adapter) -> bool:
    """Whether the bases go into the file, after checking that none are lost."""
    config = adapter.config
    if isinstance(config, AdaLoraConfig):
        return False
    if config.save_projection and adapter.bases is None:
        raise ValueError(
            "save_projection=True, but the bases of this adapter are not known: bind it to its model first"
            " (adapter.bind(shapes)), or set save_projection=False."
        )
    if not config.save_projection and adapter.bases is not None and identify_recipe(config, adapter.bases) is None:
        raise ValueError(
            "save_projection=False, but no recipe rebuilds the bases of this adapter, so they would be lost:"
            " save it with save_projection=True."
        )
    return config.save_projection


def _config_on_disk(adapter: Adapter) -> AdapterConfig:
    config = dataclasses.replace(adapter.config, inference_mode=True)  # as PEFT does: a file is for inference first
    if config.exclude_modules is None and str(config.target_modules).lower() != "all-linear":
        return config
    return config.with_targets(adapter.modules)


def _parse_config(file: ConfigFile) -> AdapterConfig:
    try:
        fields = json.loads(file.content.decode("utf-8-sig"))
        if not isinstance(fields, dict):
            raise ValueError(f"holds a JSON {type(fields).__name__}, not an object")
        return AdapterConfig.from_dict({"inference_mode": True, **fields})
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterFormatError(f"{file.path} is not a valid config of an adapter: {error}") from error


def _read_notes(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Our own metadata, checked for types; {} for a file by PEFT."""
    text = metadata.get("randlora")
    if text is None:
        return {}
    try:
        notes = json.loads(text)
        version = notes["format_version"]
        if version > FORMAT_VERSION:
            raise AdapterFormatError(
                f"{path} has format_version {version}, this release reads up to {FORMAT_VERSION}: upgrade randlora."
            )
        sizes = [notes[name] for name in ("max_dim", "min_dim") if notes.get(name) is not None]
        sizes += [size for shape in (notes.get("shapes") or {}).values() for size in _pair(shape)]
        texts = [notes[name] for name in ("recipe", "bases_sha256", CONFIG_HASH) if notes.get(name) is not None]
        if not all(type(size) is int and size > 0 for size in sizes) or not all(type(text) is str for text in texts):
            raise TypeError("sizes must be positive integers, the recipe and SHA-256 sums strings")
        return notes
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterFormatError(f"{path}: the metadata entry 'randlora' is malformed ({error!r}).") from error


def _pair(shape: Any) -> Any:
    if not isinstance(shape, list) or len(shape) != 2:
        raise TypeError(f"the shape {shape!r} is not a pair (out, in)")
    return shape


def _notes(adapter: Adapter) -> dict[str, Any]:
    dims = None if adapter.bases is None else adapter.bases.dims
    rebuilt = adapter.bases is None or recipe_gives_A(adapter.config, adapter.bases, adapter.recipe)
    return {
        "format_version": FORMAT_VERSION,
        "recipe": adapter.recipe if rebuilt else None,  # bases that were changed since have none
        "bases_sha256": None if adapter.bases is None else bases_digest(adapter.bases),
        "max_dim": dims and dims.max_dim,
        "min_dim": dims and dims.min_dim,
        "shapes": adapter.shapes and {name: list(shape) for name, shape in adapter.shapes.items()},
    }


def _assemble(
    path: Path,
    config: Any,
    contents: Contents,
    notes: dict[str, Any],
    recipe: str | None,
) -> Adapter:
    """Check what was read against the notes, and rebuild or identify the bases."""
    bases = contents.bases
    noted = notes.get("recipe")
    if isinstance(config, AdaLoraConfig) and recipe is not None:
        raise AdapterFormatError(f"it is an AdaLoRA adapter and has no bases for recipe={recipe!r}. Drop the argument.")
    if noted is not None and noted not in RECIPES:
        raise AdapterFormatError(f"the bases were made by the unknown recipe {noted!r}. Upgrade randlora.")
    if recipe and noted and recipe != noted:
        raise AdapterFormatError(
            f"the file names the recipe {noted!r}, but recipe={recipe!r} was passed. Drop the argument."
        )
    shapes = notes.get("shapes")
    adapter = Adapter(
        config=config,
        factors=contents.factors,
        bases=bases,
        recipe=noted or recipe,
        shapes=shapes and {name: tuple(shape) for name, shape in shapes.items()},
        saved_weights=contents.saved_weights,
    )
    if isinstance(config, AdaLoraConfig):
        return adapter
    if bases is None:
        return _without_bases(path, adapter, notes)
    if notes:
        _check_digest(bases, notes, "The file was damaged or edited.")
    made_by = noted or identify_recipe(config, bases)
    if recipe not in (None, made_by) and not config.ternary:
        raise AdapterFormatError(
            f"recipe={recipe!r} does not give the bases in the file; {made_by!r} does. Drop the argument: the file's"
            " own bases are used anyway."
        )
    return dataclasses.replace(adapter, recipe=made_by)


def _without_bases(path: Path, adapter: Adapter, notes: dict[str, Any]) -> Adapter:
    """Rebuild the bases if the file says how; else leave them to the model, whose layers size them."""
    if notes.get("recipe") and notes.get("max_dim") and notes.get("min_dim"):
        dims = {name: notes[name] for name in ("max_dim", "min_dim")}
        if adapter.shapes and shared_dims(adapter.shapes.values())._asdict() != dims:
            raise AdapterFormatError(f"its notes contradict each other: {dims} does not follow from the shapes.")
        try:
            bases = make_bases(adapter.config, **dims, recipe=notes["recipe"])
        except (ValueError, MemoryError) as error:
            raise AdapterFormatError(f"its bases cannot be rebuilt: {error}") from error
        _check_digest(bases, notes, "The seed or r in adapter_config.json was changed.")
        return dataclasses.replace(adapter, bases=bases)
    if adapter.config.save_projection and adapter.recipe is None:
        raise AdapterFormatError(
            "adapter_config.json says save_projection=True, but the file holds no bases (base_model.randlora_A and"
            f" base_model.randlora_B are missing). If they come from the seed, pass recipe= one of {list(RECIPES)}."
        )
    if adapter.recipe is None and not adapter.config.ternary:
        warnings.warn(
            f"{path} neither holds its bases nor names their recipe: they will be rebuilt with {DEFAULT_RECIPE!r}."
            " For an adapter saved under torch <= 2.11 pass recipe='torch<=2.11'; passing any recipe silences this.",
            stacklevel=4,
        )
    return adapter


def _check_digest(bases: Bases, notes: dict[str, Any], cause: str) -> None:
    want, got = notes.get("bases_sha256"), bases_digest(bases)
    if want != got:
        raise AdapterFormatError(f"the bases have SHA-256 {got}, the file was written with {want}. {cause}")
