"""A model's folder while it is written: whole in the end or not there, its tensors put in place in any order."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from interop.tensorfile import safetensors_header


class Spec(NamedTuple):
    """What is known of a tensor before its numbers are."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class TensorWriter:
    """A new safetensors file whose tensors are all known beforehand, and given in any order.

    Args:
        path: The file; there is none yet.
        specs: The tensors, by key.
        metadata: Texts by name.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]):
        header, self._starts = safetensors_header(specs, metadata)
        self._missing = {key: spec.nbytes for key, spec in specs.items()}
        self.nbytes = len(header) + sum(self._missing.values())
        self._file = open(path, "xb")
        self._file.write(header)

    def put(self, key: str, pieces: Iterable[Any]) -> None:
        """Write a tensor, of which the pieces are consecutive arrays or buffers."""
        self._file.seek(self._starts[key])
        missing = self._missing.pop(key)
        for piece in pieces:
            content = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            self._file.write(content)
            missing -= len(content)
        assert missing == 0, f"{key} has another size than its header says"

    def close(self) -> None:
        """Bring the file to the disk, if it is whole."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        assert not self._missing, f"{sorted(self._missing)} were not written"

    def abandon(self) -> None:
        """Close the file as it is."""
        with contextlib.suppress(OSError):
            self._file.close()


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write to, which takes that name when all is done; after an exception, it is gone.

    A kill leaves it, as `.<name>.<token>.new`, and no `target`.

    Raises:
        FileExistsError: `target` is a file, or a folder that is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "is not empty" if target.is_dir() else "is a file"
        raise FileExistsError(f"{target} {what}: nothing is overwritten. Remove it first, or name another folder.")
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    work = target.absolute().parent / f".{target.absolute().name}.{secrets.token_hex(8)}.new"
    try:
        work.mkdir(parents=True)
        yield work
        if target.is_dir():
            target.rmdir()
        os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    _sync(target.absolute().parent)


def _sync(directory: Path) -> None:
    with contextlib.suppress(OSError):  # where directories cannot be synchronized
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def copy_others(source: Path, work: Path, taken: Iterable[str]) -> list[str]:
    """Copy what a model's folder holds besides its weights, and return the names of what is left out.

    Left out are sub-folders, adapters, pickles, and weights in other files or formats, which are not merged.

    Args:
        source: The model's folder.
        work: Where to.
        taken: Names that are written anew.
    """
    taken, left_out = set(taken), []
    for path in sorted(source.iterdir()):
        if path.name in taken:
            continue
        if path.is_file() and not _is_left_out(path.name):
            shutil.copyfile(path, work / path.name)
        else:
            left_out.append(path.name + "/" * path.is_dir())
    return left_out


_WEIGHTS = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".pickle", ".pkl"),
    *(".ckpt", ".h5", ".msgpack", ".msgpack.index.json", ".h5.index.json", ".gguf", ".onnx", ".onnx_data", ".ot"),
)


def _is_left_out(name: str) -> bool:
    return name.lower().endswith(_WEIGHTS) or name.startswith(("adapter_", ".adapter_")) or name.endswith(".new")
