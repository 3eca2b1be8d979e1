"""One weight of a base as it goes into a merged folder: copied, converted, dequantized, added to, quantized again."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from interop.adapter import Adapter
from interop.blockwise import Rounding, Squares, add, cast, cast_piece
from interop.bnb import Weight4bit, Weight8bit, read_weight
from interop.bnb_quantize import CHUNK, quantize_4bit, quantize_8bit, quantize_scales
from interop.mergeplan import Plan, Step, read_state, state_key
from interop.modelfolder import CheckpointFormatError, ModelFolder

Put = Callable[[str, Iterable[Any]], None]
DELTA_ROWS = 128  # of the long side of a layer, of which the sum is taken in float64 at a time
_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def take(step: Step, plan: Plan, model: ModelFolder, put: Put) -> Rounding | None:
    """Give all tensors of one weight to `put`, and return what rounding changed in it, if it has an update.

    Raises:
        ValueError: a number is not finite in the end, or a quantized weight is malformed.
    """
    if not step.touched and (step.requantized or not step.keys):
        for key, spec in step.outputs.items():
            put(key, _copied(model, key, spec.dtype))
        return None
    weight = _value(step, plan.adapter, model)
    squares: Squares | None = None
    if step.module is not None:
        goal = _FLOAT32 if step.requantized else step.dtype
        squares = add(_matrix(step, weight), plan.adapter.delta_blocks(step.module, size=DELTA_ROWS), goal)
    if step.requantized:
        error = _requantize(step, weight, model, put)
        if squares is not None:
            squares.error = error
    else:
        put(step.name, cast(weight.T if step.transposed and step.keys else weight, step.dtype))
    return None if squares is None else squares.rounding()


def _copied(model: ModelFolder, key: str, dtype: np.dtype) -> Iterator[Any]:
    old = model.dtype(key)
    chunks = model.file(key).chunks(key)
    return chunks if old == dtype else (cast_piece(np.frombuffer(chunk, old), dtype) for chunk in chunks)


def _matrix(step: Step, weight: np.ndarray) -> np.ndarray:
    """The weight as (out, in), a view."""
    if step.transposed and not step.keys:
        return weight.T
    return weight.reshape(len(weight), -1)


def _value(step: Step, adapter: Adapter, model: ModelFolder) -> np.ndarray:
    """The weight before its update, in an array of its own that can hold what `step.dtype` rounds."""
    adapted = step.module is not None
    if step.saved is not None:
        value = np.array(adapter.saved_weights[step.saved])
    elif not step.keys:
        value = model.tensor(step.name)
    else:
        return _dequantized(_read(step, model), step)
    if step.requantized or (adapted and value.dtype not in (step.dtype, _FLOAT64)):
        return value.astype(_FLOAT32, copy=False)
    return value


def _read(step: Step, model: ModelFolder) -> Weight4bit | Weight8bit:
    try:
        weight = read_weight(model, step.name, step.keys)
    except ValueError as error:
        raise CheckpointFormatError(f"the base's weight is malformed: {error}") from error
    assert not isinstance(weight, np.ndarray), f"{step.name} is not quantized"
    return weight


def _dequantized(weight: Weight4bit | Weight8bit, step: Step) -> np.ndarray:
    """A quantized weight as an array, made in pieces."""
    plain = isinstance(weight, Weight4bit) and weight.dtype == step.dtype and not step.requantized
    array = np.empty(weight.shape, step.dtype if plain else _FLOAT32)
    flat = array.reshape(-1)
    for start, values in _pieces(weight):
        flat[start : start + values.size] = values
    return array


def _pieces(weight: Weight4bit | Weight8bit) -> Iterator[tuple[int, np.ndarray]]:
    """The numbers of a quantized weight, flat, as a merge reads them: 8-bit ones in float32, not rounded further."""
    size = math.prod(weight.shape)
    if isinstance(weight, Weight8bit):
        rows = max(1, CHUNK // weight.shape[1])
        for start in range(0, len(weight.values), rows):
            part = slice(start, start + rows)
            some_rows = Weight8bit(weight.values[part], weight.scales[part], _FLOAT32)
            yield start * weight.shape[1], some_rows.dequantize().reshape(-1)
        return
    for start in range(0, size, CHUNK):
        stop, block = min(start + CHUNK, size), start // weight.blocksize
        piece = dataclasses.replace(
            weight,
            packed=weight.packed[start // 2 : -(-stop // 2)],
            absmax=weight.absmax[block:],
            shape=(stop - start,),
        )
        yield start, piece.dequantize()


def _requantize(step: Step, weight: np.ndarray, model: ModelFolder, put: Put) -> float:
    """Quantize a weight in the base's own way; returns the sum of squares of what that changed."""
    quantized: Weight4bit | Weight8bit
    if "SCB" in step.keys:
        quantized = _requantize_8bit(step, weight, put)
    else:
        quantized = _requantize_4bit(step, weight, model, put)
    for piece in ("weight_format", "quant_map", "nested_quant_map"):
        if piece in step.keys:
            put(step.keys[piece], model.file(step.keys[piece]).chunks(step.keys[piece]))
    flat, error = weight.reshape(-1), 0.0
    for start, values in _pieces(quantized):
        difference = flat[start : start + values.size] - values.astype(np.float64)
        error += float(np.vdot(difference, difference))
    return error


def _requantize_8bit(step: Step, weight: np.ndarray, put: Put) -> Weight8bit:
    values, row_maxima = quantize_8bit(weight)
    put(step.name, [values])
    put(step.keys["SCB"], [row_maxima])
    return Weight8bit(values, row_maxima * np.float32(1 / 127), _FLOAT32)


def _requantize_4bit(step: Step, weight: np.ndarray, model: ModelFolder, put: Put) -> Weight4bit:
    state, _ = read_state(model, step.keys)
    code = tuple(model.tensor(step.keys["quant_map"]).tolist())
    packed, absmax = quantize_4bit(weight, state.quant_type, state.blocksize, state.dtype)
    put(step.name, [packed])
    if state.nested_blocksize is not None:
        absmax = _requantize_scales(step, absmax, state.nested_blocksize, model, put)
    else:
        put(step.keys["absmax"], [absmax])
        key = state_key(step.keys)[1]
        put(key, model.file(key).chunks(key))
    return Weight4bit(packed, absmax, code, state.blocksize, state.shape, state.dtype, state.quant_type)


def _requantize_scales(step: Step, absmax: np.ndarray, blocksize: int, model: ModelFolder, put: Put) -> np.ndarray:
    """Quantize the scales, too; returns them as they are read back."""
    table, key = model.tensor(step.keys["nested_quant_map"]), state_key(step.keys)[1]
    codes, maxima, offset = quantize_scales(absmax, table, blocksize)
    put(step.keys["absmax"], [codes])
    put(step.keys["nested_absmax"], [maxima])
    fields = {**json.loads(model.tensor(key).tobytes()), "nested_offset": offset}
    put(key, [np.frombuffer(json.dumps(fields).encode().ljust(step.outputs[key].nbytes), np.uint8)])
    return table[codes] * np.repeat(maxima, blocksize)[: codes.size] + np.float32(offset)
