"""A base model's folder, as transformers' `save_pretrained` writes it: its config, and tensors read one at a time."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from interop.errors import bulleted
from interop.regularfile import read_at_most
from interop.strictjson import MAX_BYTES, JSONError, parse_object
from interop.tensorfile import DTYPES, TensorFile, TensorFileError

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
FLOATS = {name: DTYPES[code] for name, code in (("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16"))}


class CheckpointFormatError(ValueError):
    """A model's folder is incomplete, inconsistent or unsafe, or was quantized in a way that is not read here."""


class ModelFolder:
    """An open folder of a model: the names of its tensors are known and checked, their numbers are read on demand.

    Attributes:
        path: The folder.
        config: The content of config.json, {} if there is none.
        files: The open files of tensors, by name.

    Raises:
        FileNotFoundError: the folder or its weights do not exist.
        CheckpointFormatError: a file is missing or malformed, or does not hold what the index says.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.path = Path(folder)
        config = self.path / CONFIG_NAME
        self.config = read_json(config) if config.is_file() else {}
        self.files: dict[str, TensorFile] = {}
        self._places: dict[str, TensorFile] = {}
        try:
            for path, indexed in _files(self.path):
                self._open(path, indexed)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, indexed: set[str] | None) -> None:
        try:
            file = self.files[path.name] = TensorFile(path)
        except TensorFileError as error:
            raise CheckpointFormatError(
                f"{path} is not a valid safetensors file ({error}). Copy or download it again."
            ) from error
        keys = file.keys()
        _check_keys(path, file, set(keys) if indexed is None else indexed)
        self._places |= dict.fromkeys(keys, file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def dtype(self, key: str) -> np.dtype:
        """The dtype of a tensor."""
        return self._places[key].dtype(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._places[key].shape(key)

    def tensor(self, key: str) -> np.ndarray:
        """A tensor, in memory of its own."""
        return self._places[key].tensor(key)

    def file(self, key: str) -> TensorFile:
        """The file that holds a tensor."""
        return self._places[key]


def model_dtype(config: Mapping[str, Any]) -> np.dtype:
    """The dtype that config.json gives a model, in which its 8-bit layers compute."""
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if not isinstance(dtype, str) or dtype not in FLOATS:
        raise ValueError(f"{CONFIG_NAME} gives the model the dtype {dtype!r}, it must be one of {list(FLOATS)}")
    return FLOATS[dtype]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a model's folder.

    Raises:
        CheckpointFormatError: it is malformed.
    """
    try:
        return parse_object(read_at_most(path, MAX_BYTES))
    except JSONError as error:
        raise CheckpointFormatError(f"{path} {error}. Copy or download it again.") from error


def _files(folder: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """The files of weights and the names that the index expects in each; a single file is preferred, as elsewhere."""
    if (folder / WEIGHTS_NAME).is_file():
        yield folder / WEIGHTS_NAME, None
        return
    index = folder / INDEX_NAME
    if not index.is_file():
        raise _no_weights(folder)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFormatError(f"{index} has no weight_map from tensors to files. Copy or download it again.")
    expected = defaultdict(set)
    for key, name in weight_map.items():
        if not _is_file_name(name):
            raise CheckpointFormatError(
                f"{index} says that {key!r} is in {name!r}: it may only name files in its own folder. Do not trust it."
            )
        expected[name].add(key)
    for name, keys in sorted(expected.items()):
        if not (folder / name).is_file():
            raise CheckpointFormatError(f"{folder} lacks {name}, which {INDEX_NAME} names. Copy or download it again.")
        yield folder / name, keys


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and set("/\\\0").isdisjoint(name)


def _check_keys(path: Path, file: TensorFile, indexed: set[str]) -> None:
    keys = set(file.keys())
    problems = [f"{key}: missing, {INDEX_NAME} says it is here" for key in sorted(indexed - keys)]
    problems += [f"{key}: left over, {INDEX_NAME} does not say it is here" for key in sorted(keys - indexed)]
    known = set(DTYPES.values())
    for key in sorted(keys):
        if file.dtype(key) not in known:
            problems.append(f"{key}: dtype {file.dtype(key)} is not one of {sorted(map(str, known))}")
    if problems:
        raise CheckpointFormatError(bulleted(f"{path} does not hold what it should. Download it again", problems))


def _no_weights(folder: Path) -> Exception:
    if not folder.is_dir():
        return FileNotFoundError(f"{folder} is not a folder. Pass the folder that holds {WEIGHTS_NAME}.")
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickles:
        return CheckpointFormatError(
            f"{folder} holds {pickles[0]}, a pickle, which can run code when it is read. Load it in transformers and"
            " save it again, as safetensors."
        )
    return FileNotFoundError(f"{folder} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}: save the model there first.")
