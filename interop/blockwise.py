"""A weight and its update added block by block: little memory besides the weight, one rounding of each number."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

BLOCK = 1 << 19  # numbers in a piece
_HALVES = (2,)  # bytes of the dtypes that numpy does not round float64 to at once

Index = tuple[slice, slice]


class Rounding(NamedTuple):
    """What storing a weight in its own format (4 bits, int8, bfloat16, ...) changed, in Frobenius norms.

    Attributes:
        of_weight: Norm of the error divided by the norm of the exact W + dW.
        of_update: Norm of the error divided by the norm of dW: from 1 on, nothing of the update can be relied on.
    """

    of_weight: float
    of_update: float


class Squares:
    """Sums of squares of a merged weight, of its update and of its rounding error."""

    def __init__(self) -> None:
        self.weight = self.update = self.error = 0.0

    def rounding(self) -> Rounding:
        """The error, relative to both; 0 where there is none."""
        whole = (self.weight, self.update)
        return Rounding(*(math.sqrt(self.error / square) if self.error else 0.0 for square in map(_not_zero, whole)))


def _not_zero(square: float) -> float:
    return max(square, np.finfo(np.float64).tiny)


def _slices(size: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def add(weight: np.ndarray, blocks: Iterable[tuple[Index, np.ndarray]], dtype: np.dtype) -> Squares:
    """Add blocks to a weight (out, in), in place; what is not finite then is refused.

    Args:
        weight: A view of what is stored. In float32, it may hold more digits than `dtype`, for `rounded` to round.
        blocks: In float64, each with its place.
        dtype: What the result is for.

    Raises:
        ValueError: a sum is inf or nan in `dtype`.
    """
    squares = Squares()
    for index, delta in blocks:
        squares.update += float(np.vdot(delta, delta))
        exact = weight[index].astype(np.float64)
        exact += delta
        squares.weight += float(np.vdot(exact, exact))
        stored = rounded(exact, dtype)
        if not np.isfinite(stored).all():
            raise ValueError(f"W + dW is not finite in {dtype}. Check the base and the adapter.")
        error = exact - stored.astype(np.float64)
        squares.error += float(np.vdot(error, error))
        if weight.dtype == dtype:
            weight[index] = stored
        else:
            weight[index] = _odd_float32(exact) if weight.dtype == np.float32 else exact
    return squares


def rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The numbers in another dtype, each rounded once; ml_dtypes takes float64 to bfloat16 by way of float32."""
    if values.dtype == dtype:
        return values
    if values.dtype == np.float64 and dtype.itemsize in _HALVES:
        values = _odd_float32(values)
    with np.errstate(over="ignore"):  # is looked for in the result
        return values.astype(dtype)


def _odd_float32(values: np.ndarray) -> np.ndarray:
    """Float64 in float32 with the last bit set where digits were cut off: rounding that to 16 bits rounds once."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
    bits = near.view(np.uint32)
    bits -= np.abs(near) > np.abs(values)  # towards zero
    bits |= near != values
    return near


def cast(array: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The numbers of an array in another dtype, in flat pieces.

    Raises:
        ValueError: a finite number is inf in `dtype`.
    """
    flat = array.reshape(-1)
    for part in _slices(flat.size, BLOCK):
        yield cast_piece(flat[part], dtype)


def cast_piece(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """As `cast`, at once."""
    result = rounded(values, dtype)
    if result is not values and (np.isfinite(values) & ~np.isfinite(result)).any():
        raise ValueError(f"holds numbers that are too large for {dtype}. Choose bfloat16 or float32 instead.")
    return result
