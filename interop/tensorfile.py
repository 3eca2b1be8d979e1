"""Writing safetensors files: the same bytes for the same tensors, and never half a file.

The safetensors library orders metadata at random, so equal adapters would give unequal files. Its README specifies the
format: u64 header length, JSON header padded with spaces to 8 bytes, tensors without gaps, widest dtype first.
"""

import json
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def safetensors_parts(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> list[Any]:
    """Header and buffers of a safetensors file, in one fixed order and without copying the tensors."""
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for key in order:
        start, end = end, end + tensors[key].nbytes
        shape = list(tensors[key].shape)
        header[key] = {"dtype": _CODES[tensors[key].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    buffers = [np.ascontiguousarray(tensors[key]).reshape(-1).view(np.uint8).data for key in order]
    return [struct.pack("<Q", len(text)), text, *buffers]


def write_atomically(path: Path, parts: Iterable[Any]) -> None:
    """Write the buffers beside `path`, then move them there: a crash leaves the old file or the new one."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)  # mkstemp makes private files; an adapter is an ordinary one
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
