"""safetensors files: read with every offset checked, tensor by tensor; written as the same bytes for the same tensors.

The safetensors library maps a file into memory and copies out of it, takes the last of two equal keys, and orders
metadata at random. Adapters here are untrusted, may be larger than half the memory, and are compared byte by byte. Its
README specifies the format: u64 header length, JSON header padded to 8 bytes, tensors without gaps or overlaps.
"""

import json
import math
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import ml_dtypes
import numpy as np

from interop.errors import legible
from interop.regularfile import open_regular
from interop.strictjson import MAX_BYTES, JSONError, parse_object

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "U8": "uint8"}
_NAMES |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"}
DTYPES = {code: np.dtype(getattr(ml_dtypes, name, name)) for code, name in _NAMES.items()}
_MORE_NAMES = {"U64": "uint64", "U32": "uint32", "U16": "uint16", "C64": "complex64"}
_MORE_NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
_MORE = {code: getattr(ml_dtypes, name, getattr(np, name, None)) for code, name in _MORE_NAMES.items()}
READABLE = DTYPES | {code: np.dtype(kind) for code, kind in _MORE.items() if kind}  # a base model may hold more
_CODES = {dtype: code for code, dtype in READABLE.items()}
MAX_AXES, MAX_SIZE = 16, 2**31 - 1  # of one tensor: axes, and the length of each
MAX_COUNT = 2**56  # product of the sizes but those that are 0
MAX_NAME, MAX_PARTS = 1024, 64  # of a tensor's name: characters, and parts between dots
_CHUNK = 1 << 22  # bytes
_seeking = threading.Lock()  # where a read cannot say from where, descriptors of one file share their position


class TensorFileError(ValueError):
    """The bytes are no safetensors file, or one that contradicts itself."""


class _Entry(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # in bytes from the beginning of the file
    nbytes: int


class TensorFile:
    """An open safetensors file. The header is checked as a whole, then tensors are read when they are asked for.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: it does not exist, or is no regular file.
        TensorFileError: the header is malformed, or contradicts itself or the length of the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file = open_regular(self.path)
        try:
            self.metadata, self._entries = _read_header(self._file)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; `LazyTensor`s of it stay readable."""
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def keys(self) -> list[str]:
        """The names of the tensors, sorted."""
        return sorted(self._entries)

    def dtype(self, key: str) -> np.dtype:
        """The dtype of a tensor."""
        return self._entries[key].dtype

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._entries[key].shape

    def tensor(self, key: str) -> np.ndarray:
        """A tensor, in memory of its own.

        Raises:
            TensorFileError: the file became shorter since it was opened.
        """
        entry = self._entries[key]
        array = np.empty(entry.shape, entry.dtype)
        if entry.nbytes:
            _read_into(array.reshape(-1).view(np.uint8).data, self._file, entry.start)
        return array

    def chunks(self, key: str) -> Iterator[memoryview]:
        """The bytes of a tensor in pieces, each of which is gone when the next is taken."""
        entry = self._entries[key]
        buffer = memoryview(bytearray(min(_CHUNK, entry.nbytes)))
        for start in range(0, entry.nbytes, _CHUNK):
            piece = buffer[: min(_CHUNK, entry.nbytes - start)]
            _read_into(piece, self._file, entry.start + start)
            yield piece

    def again(self) -> "TensorFile":
        """The same open file with a life of its own, whatever has taken its place in the folder since."""
        other = object.__new__(TensorFile)
        other.path, other.metadata, other._entries = self.path, self.metadata, self._entries
        other._file = open(os.dup(self._file.fileno()), "rb", buffering=0)
        return other

    def fileno(self) -> int:
        """The descriptor of the open file."""
        return self._file.fileno()


class LazyTensor:
    """A tensor of a file, read each time numpy is given it; for adapters that are looked at layer by layer."""

    def __init__(self, file: TensorFile, key: str):
        self._file, self._key = file, key
        self.dtype, self.shape = file.dtype(key), file.shape(key)
        self.ndim, self.size = len(self.shape), math.prod(self.shape)
        self.nbytes = self.size * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"LazyTensor({self._key!r}, {self.dtype}, {self.shape})"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self)[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        try:
            array = self._file.tensor(self._key)
        except TensorFileError as error:
            raise TensorFileError(f"{self._file.path}, the adapter's file, cannot be read any more: {error}") from error
        return array if dtype is None else array.astype(dtype, copy=False)

    def astype(self, dtype: Any) -> np.ndarray:
        """The tensor in another dtype."""
        return np.asarray(self).astype(dtype)

    def chunks(self) -> Iterator[memoryview]:
        """See `TensorFile.chunks`."""
        return self._file.chunks(self._key)


class Tensors(dict[str, np.ndarray]):
    """Arrays by name, which are asked for as those of a `TensorFile` are."""

    tensor = dict.__getitem__

    def dtype(self, key: str) -> np.dtype:
        """The dtype of an array."""
        return self[key].dtype

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of an array."""
        return self[key].shape

    def chunks(self, key: str) -> Iterator[memoryview]:
        """The bytes of an array in pieces."""
        return byte_chunks(self[key])


def byte_chunks(tensor: Any) -> Iterator[memoryview]:
    """The bytes of an array or a `LazyTensor` in pieces."""
    if isinstance(tensor, LazyTensor):
        yield from tensor.chunks()
        return
    flat = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
    yield from (flat[start : start + _CHUNK] for start in range(0, len(flat), _CHUNK))


def _read_into(buffer: memoryview, file: BinaryIO, start: int) -> None:
    done = 0
    while done < len(buffer):
        count = _read_once(buffer[done:], file, start + done)
        if not count:
            raise TensorFileError("it became shorter while it was read")
        done += count


def _read_once(buffer: memoryview, file: Any, start: int) -> int:
    if hasattr(os, "preadv"):  # other threads, and processes since a fork, may read from here at the same time
        return os.preadv(file.fileno(), [buffer], start)
    with _seeking:
        file.seek(start)
        return file.readinto(buffer) or 0


def _read_header(file: BinaryIO) -> tuple[dict[str, str], dict[str, _Entry]]:
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise TensorFileError(f"it has {size} bytes, too few for a header")
    prefix = bytearray(8)
    _read_into(memoryview(prefix), file, 0)
    length = struct.unpack("<Q", prefix)[0]
    if length > min(size - 8, MAX_BYTES):
        raise TensorFileError(
            f"it says that its header has {length:,d} bytes; the file has {size:,d}, and {MAX_BYTES:,d} are allowed"
        )
    text = bytearray(length)
    _read_into(memoryview(text), file, 8)
    if text[:1] != b"{":  # JSON would allow white space, and `parse_object` a byte order mark
        raise TensorFileError(f"its header begins with {bytes(text[:1])!r}, not with '{{'")
    try:
        header = parse_object(bytes(text))
    except JSONError as error:
        raise TensorFileError(f"the header {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise TensorFileError("__metadata__ in the header is not an object of strings")
    first = 8 + length
    entries = {key: _entry(key, fields, first, size) for key, fields in header.items()}
    end = first
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            what = "overlaps another tensor" if entry.start < end else "leaves a gap before it"
            raise TensorFileError(f"tensor {legible(repr(key))} {what}")
        end += entry.nbytes
    if end != size:
        raise TensorFileError(f"its tensors end after {end:,d} bytes, the file after {size:,d}")
    return metadata, entries


def _entry(key: str, fields: Any, first: int, size: int) -> _Entry:
    name = legible(repr(key))
    if len(key) > MAX_NAME or key.count(".") >= MAX_PARTS:
        raise TensorFileError(
            f"the name {name} has {len(key):,d} characters in {key.count('.') + 1:,d} parts; {MAX_NAME:,d} in"
            f" {MAX_PARTS} are allowed"
        )
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise TensorFileError(f"the header entry of {name} does not have dtype, shape and data_offsets")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in READABLE:
        raise TensorFileError(f"tensor {name} has dtype {legible(repr(code))}, which is not one of {sorted(READABLE)}")
    ok = _are_sizes(shape) and len(shape) <= MAX_AXES and max(shape, default=0) <= MAX_SIZE
    if not ok or math.prod(filter(None, shape)) > MAX_COUNT:  # numpy multiplies without the zeros
        raise TensorFileError(
            f"tensor {name} has the shape {legible(shape)}: at most {MAX_AXES} sizes from 0 to {MAX_SIZE} are allowed,"
            f" and {MAX_COUNT} numbers"
        )
    dtype = READABLE[code]
    nbytes = math.prod(shape) * dtype.itemsize
    if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - first:
        raise TensorFileError(f"tensor {name} has the data_offsets {legible(offsets)}, which lie outside the file")
    if offsets[1] - offsets[0] != nbytes:
        raise TensorFileError(
            f"tensor {name} is given {offsets[1] - offsets[0]:,d} bytes, but {code} {shape} takes {nbytes:,d}"
        )
    return _Entry(dtype, tuple(shape), first + offsets[0], nbytes)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def safetensors_parts(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Iterator[Any]:
    """Header and buffers of a safetensors file, in one fixed order: the widest dtype first, then by name.

    Args:
        tensors: Arrays, or what has a `dtype`, `shape` and `nbytes` and becomes an array when its turn comes.
        metadata: Texts by name.
    """
    header, starts = safetensors_header(tensors, metadata)
    yield header[:8]
    yield header[8:]
    for key in starts:
        yield from byte_chunks(tensors[key])


def safetensors_header(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """What a file begins with, and where in it each tensor begins, in the order in which they stand there."""
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for key in order:
        start, end = end, end + tensors[key].nbytes
        shape = list(tensors[key].shape)
        header[key] = {"dtype": _CODES[tensors[key].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {key: first + header[key]["data_offsets"][0] for key in order}
