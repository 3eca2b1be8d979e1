"""bitsandbytes' quantizers in numpy, byte for byte as its CPU kernels compute them (0.50).

Every operation is one float32 rounding in their order. They work through a weight in pieces, in little memory.
"""

from typing import NamedTuple

import numpy as np

from interop.bnb import CODES

CHUNK = 1 << 20  # numbers; a multiple of every blocksize
_TINY = np.float32(1e-38)  # takes the place of the scale of a block of zeros
_BINS = 1 << 16  # of the table by which the CPU kernel finds 8-bit codes


class Quantized4bit(NamedTuple):
    """A weight in 4 bits: uint8 (ceil(n/2),) with the earlier code in the high half, float32 (blocks,)."""

    packed: np.ndarray
    absmax: np.ndarray


class QuantizedScales(NamedTuple):
    """The scales of a weight in 8 bits: uint8 (blocks,), float32 (ceil(blocks/blocksize),), and their mean."""

    codes: np.ndarray
    absmax: np.ndarray
    offset: float


class Quantized8bit(NamedTuple):
    """A weight in 8 bits: int8 (out, in) and the largest magnitude of each row, float32 (out,)."""

    values: np.ndarray
    row_maxima: np.ndarray


def quantize_4bit(weight: np.ndarray, quant_type: str, blocksize: int, dtype: np.dtype) -> Quantized4bit:
    """Blocks of the flattened weight divided by their largest magnitude, each number to the nearest of 16 codes.

    Args:
        weight: Of any shape.
        quant_type: "nf4" or "fp4".
        blocksize: How many numbers share a scale.
        dtype: What the weight is rounded to before, as it is in a model of that dtype.
    """
    code = np.array(CODES[quant_type], np.float32)
    order = np.argsort(code, kind="stable")  # of fp4's two zeros, the positive one is first
    ordered = code[order]
    bounds, order = (ordered[:-1] + ordered[1:]) / np.float32(2), order.astype(np.uint8)
    flat = weight.reshape(-1)
    packed, absmax = np.empty(-(-flat.size // 2), np.uint8), np.empty(-(-flat.size // blocksize), np.float32)
    for start in range(0, flat.size, CHUNK):
        values = flat[start : start + CHUNK].astype(dtype).astype(np.float32)
        blocks = -(-values.size // blocksize)
        scaled = _scaled_blocks(values, absmax[start // blocksize :][:blocks], blocksize)
        codes = np.zeros(values.size + values.size % 2, np.uint8)
        codes[: values.size] = order[np.searchsorted(bounds, scaled)]
        if values.size % 2:
            codes[-1] = order[np.searchsorted(bounds, np.float32(0))]
        packed[start // 2 :][: codes.size // 2] = codes[::2] << 4 | codes[1::2]
    return Quantized4bit(packed, absmax)


def _scaled_blocks(values: np.ndarray, absmax: np.ndarray, blocksize: int) -> np.ndarray:
    """Numbers in [-1, 1]; the largest magnitudes are put into `absmax`. A last block that is not full is divided."""
    full, rest = divmod(values.size, blocksize)
    blocks = values[: full * blocksize].reshape(full, blocksize)
    absmax[:full] = np.abs(blocks).max(axis=1, initial=0)
    blocks *= (np.float32(1) / np.maximum(absmax[:full], _TINY))[:, None]
    if rest:
        absmax[full] = np.maximum(np.abs(values[-rest:]).max(), _TINY)
        values[-rest:] /= absmax[full]
    return np.clip(values, -1, 1, out=values)


def quantize_scales(absmax: np.ndarray, table: np.ndarray, blocksize: int) -> QuantizedScales:
    """Scales of blocks, less their mean, quantized in blocks themselves (double quantization, arXiv:2305.14314).

    bitsandbytes takes the mean in float32, here it is rounded once: it may be off by one unit in the last place, and
    `absmax` with it.

    Args:
        absmax: The scales.
        table: The 256 numbers that the codes stand for, ascending (`nested_quant_map`).
        blocksize: How many scales share a scale.
    """
    offset = np.float32(absmax.mean(dtype=np.float64))
    count = -(-absmax.size // blocksize)
    padded = np.zeros(count * blocksize, np.float32)
    padded[: absmax.size] = absmax - offset
    blocks = padded.reshape(count, blocksize)
    maxima = np.abs(blocks).max(axis=1)
    with np.errstate(divide="ignore"):
        inverse = np.where(maxima > 0, np.float32(1) / maxima, np.float32(0))
    blocks *= inverse[:, None]
    codes = _nearest_by_bins(np.clip(padded[: absmax.size], -1, 1), table)
    codes[np.repeat(maxima == 0, blocksize)[: codes.size]] = 0  # what their 0/0 becomes there
    return QuantizedScales(codes, maxima, float(offset))


def _nearest_by_bins(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The codes of numbers in [-1, 1] as the CPU kernel finds them: those of the nearest of 65536 even steps."""
    middles = np.float32(0.5) * (table[:-1] + table[1:])
    steps = np.float32(-1) + np.float32(2) * np.arange(_BINS, dtype=np.float32) / np.float32(_BINS - 1)
    codes = np.searchsorted(middles, steps).astype(np.uint8)
    unit = (values + np.float32(1)) * np.float32(0.5)
    position = (unit.astype(np.float64) * (_BINS - 1) + 0.5).astype(np.float32)  # one fused multiply-add
    return codes[position.astype(np.uint16)]


def quantize_8bit(weight: np.ndarray) -> Quantized8bit:
    """Rows of a weight (out, in), rounded to float16, divided by their largest magnitude, to the nearest 1/127.

    Raises:
        ValueError: a number is too large for float16.
    """
    values, row_maxima = np.empty(weight.shape, np.int8), np.empty(len(weight), np.float32)
    rows = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        with np.errstate(over="ignore"):
            half = weight[part].astype(np.float16).astype(np.float32)
        row_maxima[part] = np.abs(half).max(axis=1)
        if not np.isfinite(row_maxima[part]).all():
            raise ValueError("holds numbers beyond 65504, which float16, and so an 8-bit weight, cannot hold")
        with np.errstate(divide="ignore"):
            steps = np.where(row_maxima[part] > 0, np.float32(1) / row_maxima[part], np.float32(0)) * np.float32(127)
        half *= steps[:, None]
        values[part] = np.rint(half)
    return Quantized8bit(values, row_maxima)
