"""The bytes of a safetensors file: the same for the same tensors.

The safetensors library orders metadata at random, so equal adapters would give unequal files. Its README specifies the
format: u64 header length, JSON header padded with spaces to 8 bytes, tensors without gaps, widest dtype first.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "U8": "uint8"}
_NAMES |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"}
DTYPES = {code: np.dtype(getattr(ml_dtypes, name, name)) for code, name in _NAMES.items()}
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
