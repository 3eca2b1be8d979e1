"""What tells that numbers arrived as they were sent: a digest over named tensors, and that all of them are finite."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from interop.tensorfile import DTYPES, byte_chunks

# Bits of the exponent: all are set in inf and nan, and in nothing else.
_EXPONENT: dict[np.dtype, np.unsignedinteger] = {
    DTYPES["F64"]: np.uint64(0x7FF0_0000_0000_0000),
    DTYPES["F32"]: np.uint32(0x7F80_0000),
    DTYPES["BF16"]: np.uint16(0x7F80),
    DTYPES["F16"]: np.uint16(0x7C00),
}


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of names, dtypes, shapes and bytes of tensors, whatever their order; see FORMAT.md."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key}\0{tensor.dtype.name}\0{tuple(map(int, tensor.shape))}\0".encode())
        for chunk in byte_chunks(tensor):
            digest.update(chunk)
    return digest.hexdigest()


def not_finite(tensors: Mapping[str, Any]) -> Iterator[str]:
    """The names of floating-point tensors that hold inf or nan."""
    return (key for key, tensor in tensors.items() if not _is_finite(tensor))


def _is_finite(tensor: Any) -> bool:
    mask = _EXPONENT.get(tensor.dtype)
    if mask is None:
        return True
    bits = (np.frombuffer(chunk, mask.dtype) for chunk in byte_chunks(tensor))
    return not any(((chunk & mask) == mask).any() for chunk in bits)
