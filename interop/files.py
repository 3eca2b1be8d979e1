"""PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`, read strictly and replaced as one.

What PEFT does not record is in `interop.notes`, in the metadata of the safetensors file; the tensors are those of
`interop.contents`. FORMAT.md specifies all of it.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interop.adalora import AdaLoraConfig
from interop.adapter import Adapter
from interop.bases import DEFAULT_RECIPE, RECIPES, identify_recipe, make_bases
from interop.card import model_card as card_of
from interop.card import write_card
from interop.contents import Contents, bases_tensors, read_tensors, trained_tensors
from interop.errors import AdapterFormatError, bulleted, legible
from interop.fields import AdapterConfig
from interop.folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    ConfigFile,
    adapter_folders,
    open_pair,
    replace_pair,
)
from interop.integrity import not_finite
from interop.notes import check_bases, check_tensors, make_notes, read_notes, seal
from interop.shapes import shared_dims
from interop.strictjson import parse_object
from interop.tensorfile import LazyTensor, TensorFileError, safetensors_parts

BASES = ("one", "none", "per-layer")  # how many copies a file holds
DEFAULT_NAME = "default"  # of the adapter that stands in the folder itself


def adapter_names(directory: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of the adapters in a folder: "default" for the folder itself, and those of PEFT's sub-folders.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no adapter.
    """
    directory = Path(directory)
    inside = adapter_folders(directory) if directory.is_dir() else []
    names = (*([DEFAULT_NAME] if (directory / CONFIG_NAME).is_file() else []), *inside)
    if not names:
        raise FileNotFoundError(f"{directory} holds no adapter: neither {CONFIG_NAME} nor a sub-folder with one.")
    return names


def load(
    directory: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    recipe: str | None = None,
    lazy: bool = False,
) -> Adapter:
    """Read an adapter folder written by us or by PEFT. Nothing in it is ignored and nothing is executed.

    After a save that was killed, and while another process saves, this gives the old adapter or the new one, never a
    mixture. The folder is only read: the next `save` cleans up what a killed one left.

    Args:
        directory: The folder with `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: Which of the adapters that PEFT saved together, each in a sub-folder; by default, and as
            "default", the one in the folder itself.
        recipe: The recipe of the bases (`interop.RECIPES`), for a file of RandLoRA that holds no bases and does not
            name it. Without it, today's torch is assumed and a warning says so.
        lazy: Leave all but the bases in the file, which stays open, until numpy asks for it (`LazyTensor`): for what
            takes one layer after the other. Everything is checked now, all the same.

    Raises:
        FileNotFoundError: the folder or one of its two files does not exist.
        AdapterFormatError: the content is malformed, incomplete, damaged, has left-over tensors, inf or nan, or
            contradicts itself.
        OSError: another process saves there again and again, without a moment's rest.
    """
    parent, directory = Path(directory), _folder_of(directory, adapter_name)
    if directory != parent and parent.is_dir() and not directory.is_dir():
        raise FileNotFoundError(f"{parent} holds no adapter {adapter_name!r}: it has {list(adapter_names(parent))}.")
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is not known: choose one of {list(RECIPES)}.")
    path = directory / WEIGHTS_NAME
    try:
        with open_pair(directory) as (file, found):
            config = _parse_config(found)
            notes = read_notes(path, file.metadata)
            kept = file.again() if lazy else None
            contents = read_tensors(
                path, file, config, read=None if kept is None else functools.partial(LazyTensor, kept)
            )
        try:
            return _assemble(path, config, contents, notes, recipe)
        except AdapterFormatError as error:
            raise AdapterFormatError(f"{path}: {error}") from error
    except TensorFileError as error:
        raise AdapterFormatError(
            f"{path} is not a valid safetensors file ({error}). Copy or download it again."
        ) from error


def _folder_of(directory: str | os.PathLike[str], adapter_name: str | None) -> Path:
    """Where an adapter of that name stands in a folder, as PEFT puts it."""
    if adapter_name in (None, DEFAULT_NAME):
        return Path(directory)
    if adapter_name in ("", ".", "..") or not set("/\\:\0").isdisjoint(adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} cannot be the name of a sub-folder: leave out '/', '\\' and ':'."
        )
    inside = Path(directory) / adapter_name
    if inside.is_symlink():  # in a folder from elsewhere, it may lead anywhere
        raise AdapterFormatError(
            f"{inside} is a link to another folder, which is not followed. Pass the folder that it leads to itself."
        )
    return inside


def save(
    adapter: Adapter,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    bases: str | None = None,
    model_card: bool = True,
) -> None:
    """Write an adapter as PEFT's two files, with one copy of the bases or, if `save_projection=False`, none.

    The same adapter always gives the same bytes. The two files replace those of an earlier save as one: whatever
    happens, even `kill -9`, `load` finds the old adapter or the new one. PEFT does, too, except that a kill between two
    renames leaves it no adapter_config.json, until the next save. Where the config says "all-linear" or
    `exclude_modules`, the file names the adapted layers instead, so that PEFT, which reads those otherwise, adapts the
    same ones.

    Args:
        adapter: Any; it is not changed.
        directory: The folder, made if there is none.
        adapter_name: As for `load`: another name than "default" is that of a sub-folder.
        bases: "one" copy; "none", to be rebuilt from the seed; or "per-layer", one more copy for each adapted layer, as
            PEFT <= 0.21.2 writes them and transformers' own `model.load_adapter` needs them. By default "one" or
            "none", as `save_projection` says.
        model_card: Whether to write a README.md beside them, unless there is one by somebody else.

    Raises:
        ValueError: the bases cannot be left out (no recipe rebuilds them) or are not known yet, or a number of the
            adapter is inf or nan.
        AdapterFormatError: the sub-folder of that name is a link to another folder.
        OSError: a file cannot be written, or another process saved there at once and no lock could prevent it.

    Warns:
        UserWarning: the model card could not be written; the adapter was saved.
    """
    directory = _folder_of(directory, adapter_name)
    adapter = _with_bases_as(adapter, bases)
    trained, shared = trained_tensors(adapter), bases_tensors(adapter, per_layer=bases == "per-layer")
    _refuse_not_finite(trained)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(
            f"{directory} is a file: pass the folder to write {CONFIG_NAME} and {WEIGHTS_NAME} to."
        )
    directory.mkdir(parents=True, exist_ok=True)
    config = _config_on_disk(adapter).to_json().encode()
    notes = make_notes(adapter, trained, config)
    tensors = trained | (shared if getattr(adapter.config, "save_projection", False) else {})
    replace_pair(directory, config, safetensors_parts(tensors, {"format": "pt", **seal(notes)}))
    if model_card:
        write_card(card_of(dataclasses.replace(adapter, recipe=notes["recipe"])), directory)


def _with_bases_as(adapter: Adapter, bases: str | None) -> Adapter:
    """The adapter with the config that says whether its file holds bases, after checking that none are lost."""
    if bases not in (None, *BASES):
        raise ValueError(f"bases={bases!r} is not known: choose one of {list(BASES)}.")
    config = adapter.config
    if isinstance(config, AdaLoraConfig):
        if bases not in (None, "none"):
            raise ValueError(f"bases={bases!r}: an AdaLoRA adapter has no bases. Drop the argument.")
        return adapter
    if bases is not None:
        config = dataclasses.replace(config, save_projection=bases != "none")
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
    return dataclasses.replace(adapter, config=config)


def _refuse_not_finite(tensors: Mapping[str, Any]) -> None:
    wrong = [f"{key} holds inf or nan" for key in not_finite(tensors)]
    if wrong:
        raise ValueError(
            bulleted(
                "the adapter is not saved, as it could not be loaded; an earlier save stays. Training diverged", wrong
            )
        )


def _config_on_disk(adapter: Adapter) -> AdapterConfig:
    config = dataclasses.replace(adapter.config, inference_mode=True)  # as PEFT does: a file is for inference first
    if config.exclude_modules is None and str(config.target_modules).lower() != "all-linear":
        return config
    return config.with_targets(adapter.modules)


def _parse_config(file: ConfigFile) -> AdapterConfig:
    try:
        return AdapterConfig.from_dict({"inference_mode": True, **parse_object(file.content)})
    except (ValueError, TypeError) as error:
        raise AdapterFormatError(f"{file.path} is not a valid config of an adapter: {legible(error)}") from error


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
        raise AdapterFormatError(f"the bases were made by the unknown recipe {legible(repr(noted))}. Upgrade randlora.")
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
    check_tensors(trained_tensors(adapter), notes)
    if isinstance(config, AdaLoraConfig):
        return adapter
    if bases is None:
        return _without_bases(path, adapter, notes)
    if notes:
        check_bases(bases, notes, "The file was damaged or edited.")
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
        short = max(gamma.shape[1] for _, gamma in adapter.factors.values())
        if short > dims["min_dim"] or (adapter.shapes and shared_dims(adapter.shapes.values())._asdict() != dims):
            raise AdapterFormatError(
                f"its notes contradict each other: {dims} does not follow from the layers' shapes."
            )
        try:
            bases = make_bases(adapter.config, **dims, recipe=notes["recipe"])
        except (ValueError, MemoryError) as error:
            raise AdapterFormatError(f"its bases cannot be rebuilt: {error}") from error
        check_bases(bases, notes, "The seed or r in adapter_config.json was changed.")
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
