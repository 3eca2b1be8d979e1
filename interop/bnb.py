"""Models that bitsandbytes quantized and transformers saved, read with numpy: every weight to the last bit.

A 4-bit weight is a tensor of packed nibbles (of any dtype, `bnb_4bit_quant_storage`) and beside it `.absmax`,
`.quant_map`, `.quant_state.bitsandbytes__<type>` (JSON in uint8) and, if its scales are quantized too,
`.nested_absmax` and `.nested_quant_map`. An 8-bit layer is an int8 `weight`, its row maxima `SCB`, and `weight_format`.
"""

import math
import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from interop.errors import bulleted
from interop.modelfolder import CONFIG_NAME, FLOATS, CheckpointFormatError, ModelFolder, model_dtype
from interop.shapes import MAX_SIDE
from interop.strictjson import JSONError, parse_object
from interop.tensorfile import DTYPES, MAX_AXES

MALFORMED = "{} holds malformed weights. Save the model again with save_pretrained, or download it again"
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NF4: tuple[float, ...] = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)  # by bit pattern, in twelfths; with the sign bit, the same negative
CODES = {"nf4": NF4, "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in _FP4)}

_PIECES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
_STATE = "quant_state."


@dataclass(frozen=True, eq=False)
class Weight4bit:
    """A weight of 4-bit codes with one scale per block of the flattened weight.

    Attributes:
        packed: uint8 (ceil(n/2),) for a weight of n numbers, row by row; the high half of a byte is the earlier code.
        absmax: float32 (ceil(n/blocksize),), the scale of each block.
        code: The 16 numbers that the codes stand for, before they are scaled.
        blocksize: How many numbers share a scale; blocks go on across rows.
        shape: (out, in); more axes for a parameter of stacked experts.
        dtype: The weight's own dtype, float32, float16 or bfloat16.
        quant_type: "nf4" or "fp4".
    """

    packed: np.ndarray
    absmax: np.ndarray
    code: tuple[float, ...]
    blocksize: int
    shape: tuple[int, ...]
    dtype: np.dtype
    quant_type: str

    def dequantize(self) -> np.ndarray:
        """The weight (out, in) in its dtype, bit for bit what bitsandbytes computes with."""
        code = np.array(self.code, np.float32)
        pairs = np.stack(np.broadcast_arrays(code[:, None], code), axis=-1).reshape(256, 2)  # by byte: high, low
        values = pairs[self.packed].reshape(-1)[: math.prod(self.shape)]
        blocks, rest = divmod(values.size, self.blocksize)
        full = values[: blocks * self.blocksize].reshape(blocks, self.blocksize)
        full *= self.absmax[:blocks, None]
        if rest:
            values[-rest:] *= self.absmax[-1]
        return values.astype(self.dtype, copy=False).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Weight8bit:
    """A weight of 8-bit integers with one scale per row (LLM.int8, arXiv:2208.07339).

    Attributes:
        values: int8 (out, in).
        scales: float32 (out,): SCB/127, the step between neighboring integers.
        dtype: The dtype of the model, in which its layers compute.
    """

    values: np.ndarray
    scales: np.ndarray
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.values.shape

    def dequantize(self) -> np.ndarray:
        """The weight (out, in) in its dtype, bit for bit what `Linear8bitLt` multiplies with when it trains.

        That is values * (SCB/127), rounded to float32 after each operation and then to the dtype. bitsandbytes'
        `int8_vectorwise_dequant` takes (values * SCB)/127, which differs in the last bit of a fifth of the float32s.
        """
        values = self.values.astype(np.float32)
        values *= self.scales[:, None]
        return values.astype(self.dtype, copy=False)


def read_folder(folder: str | os.PathLike[str]) -> dict[str, np.ndarray | Weight4bit | Weight8bit]:
    """The weights of a folder by `save_pretrained`, by their names in torch: quantized ones packed, others as arrays.

    Nothing is ignored and nothing is executed. A folder of a model that is not quantized gives plain arrays.

    Args:
        folder: Holds `model.safetensors`, or `model.safetensors.index.json` and the files that it names; and
            `config.json`, which says the dtype of 8-bit weights (float32 if it does not).

    Raises:
        FileNotFoundError: the folder or its weights do not exist.
        CheckpointFormatError: a part is missing, left over or malformed, or another method quantized the model.
    """
    with ModelFolder(folder) as model:
        problems: list[str] = []
        weights: dict[str, np.ndarray | Weight4bit | Weight8bit] = {}
        for name, keys in grouped(model).items():
            try:
                weights[name] = read_weight(model, name, keys)
            except ValueError as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise CheckpointFormatError(bulleted(MALFORMED.format(folder), problems))
    return weights


def read_weight(model: ModelFolder, name: str, keys: Mapping[str, str]) -> np.ndarray | Weight4bit | Weight8bit:
    """One weight of a folder.

    Args:
        model: The folder.
        name: The weight's name.
        keys: Where its pieces are, see `grouped`.

    Raises:
        ValueError: a piece is missing, left over or malformed.
    """
    require_bitsandbytes(model)
    whole = model.tensor(name) if name in model else None
    return _assemble(name, whole, {piece: model.tensor(key) for piece, key in keys.items()}, model.config)


def require_bitsandbytes(model: ModelFolder) -> None:
    """Refuse a folder whose config names another quantization."""
    quantization = model.config.get("quantization_config") or {}
    method = quantization.get("quant_method", "bitsandbytes") if isinstance(quantization, dict) else quantization
    if method != "bitsandbytes":
        raise CheckpointFormatError(
            f"{model.path / CONFIG_NAME}: the model is quantized by {method!r}; only bitsandbytes' 4 and 8 bits are"
            " read, and models that are not quantized. Load it in torch, dequantize it there, and save it again."
        )


def grouped(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """The keys of the pieces of each weight, by its name; {} for a plain one.

    >>> grouped(["q.weight", "q.weight.absmax", "norm.weight"])
    {'q.weight': {'absmax': 'q.weight.absmax'}, 'norm.weight': {}}
    """
    groups: dict[str, dict[str, str]] = {}
    for key in keys:
        name, piece = _split(key)
        group = groups.setdefault(name, {})
        if piece is not None:
            group[piece] = key
    return groups


def _split(key: str) -> tuple[str, str | None]:
    """The weight that a tensor belongs to, and which piece of it it is; None if it is the weight itself."""
    prefix, _, last = key.rpartition(".")
    if last in ("SCB", "weight_format"):
        return f"{prefix}.weight" if prefix else "weight", last
    if prefix and last in _PIECES:
        return prefix, last
    name, mark, state = key.partition(f".{_STATE}")
    return (name, _STATE + state) if mark else (key, None)


def _assemble(
    name: str, tensor: np.ndarray | None, pieces: dict[str, np.ndarray], config: dict[str, Any]
) -> np.ndarray | Weight4bit | Weight8bit:
    """One weight from its pieces. The ValueErrors raised from here on get its name and the folder put before them."""
    if tensor is None:
        raise ValueError(f"the weight itself is missing, while {sorted(pieces)} are there")
    if "SCB" in pieces or "weight_format" in pieces:
        return _assemble_8bit(tensor, pieces, config)
    if pieces:
        return _assemble_4bit(tensor, pieces)
    if tensor.dtype in (np.int8, np.uint8) and name.rpartition(".")[2] == "weight":
        want = "SCB" if tensor.dtype == np.int8 else f"{_STATE}bitsandbytes__<type>, absmax and quant_map"
        raise ValueError(f"is quantized ({tensor.dtype}), but what it takes to read it is missing: {want}")
    return tensor


def _assemble_8bit(values: np.ndarray, pieces: dict[str, np.ndarray], config: dict[str, Any]) -> Weight8bit:
    _check_pieces(pieces, required={"SCB"}, optional={"weight_format"})
    row_major = pieces.get("weight_format")
    if row_major is not None and (row_major.size != 1 or row_major.item() != 0):
        raise ValueError(
            f"weight_format is {row_major.tolist()}; only 0, row-major, is read, as bitsandbytes writes it"
        )
    if values.dtype != np.int8 or values.ndim != 2:
        raise ValueError(f"has SCB, but is {values.dtype} {values.shape}; an 8-bit weight is int8 (out, in)")
    _check_array("SCB", pieces["SCB"], np.float32, values.shape[0])
    return Weight8bit(values, pieces["SCB"] * np.float32(1 / 127), model_dtype(config))


class QuantState(NamedTuple):
    """The JSON beside a 4-bit weight; the nested fields are None where scales are not quantized themselves."""

    quant_type: str
    blocksize: int
    dtype: np.dtype
    shape: tuple[int, ...]
    nested_blocksize: int | None
    nested_offset: float | None


def _assemble_4bit(tensor: np.ndarray, pieces: dict[str, np.ndarray]) -> Weight4bit:
    piece = state_piece(pieces)
    state = parse_state(piece, pieces[piece])
    nested = state.nested_blocksize is not None
    _check_pieces(pieces, required={piece, *(_PIECES if nested else _PIECES[:2])})
    count = math.prod(state.shape)
    packed = tensor.reshape(-1).view(np.uint8)
    if packed.size != -(-count // 2):
        raise ValueError(f"has {packed.size} bytes, {-(-count // 2)} are needed for shape {state.shape} in 4 bits")
    code = pieces["quant_map"]
    _check_array("quant_map", code, np.float32, 16)
    if not np.abs(code - np.array(CODES[state.quant_type])).max() < 1e-6:
        raise ValueError(f"quant_map is not the table of {state.quant_type}; bitsandbytes knows no other")
    blocks = -(-count // state.blocksize)
    absmax = _unnested(pieces, blocks, state) if nested else pieces["absmax"]
    if absmax.dtype == DTYPES["BF16"]:
        raise ValueError(
            "absmax is bfloat16: bitsandbytes repacked this weight in an eval forward on the CPU and rounded its scales"
            " when it was saved; save the model before any eval forward"
        )
    _check_array("absmax", absmax, np.float32, blocks)
    return Weight4bit(packed, absmax, tuple(code.tolist()), state.blocksize, state.shape, state.dtype, state.quant_type)


def state_piece(pieces: Iterable[str]) -> str:
    """Which piece of a 4-bit weight is the JSON that says how it is quantized."""
    states = [piece for piece in pieces if piece.startswith(_STATE)]
    if len(states) != 1:
        raise ValueError(
            f"has {sorted(states) or 'no quant_state'}: exactly one {_STATE}bitsandbytes__nf4|fp4 is needed"
        )
    return states[0]


def parse_state(piece: str, content: np.ndarray) -> QuantState:
    """Read and check the JSON of a 4-bit weight; `piece` is the name of its piece."""
    quant_type = piece.removeprefix(f"{_STATE}bitsandbytes__")
    if quant_type not in CODES:
        raise ValueError(f"{piece} is no known quant_type: {list(CODES)} are read, as {_STATE}bitsandbytes__<type>")
    try:
        fields = parse_object(content.tobytes())
    except JSONError as error:
        raise ValueError(f"{piece} {error}") from error
    known = {"quant_type", "blocksize", "dtype", "shape"}
    if known - set(fields) or set(fields) - known not in (set(), set(_NESTED_FIELDS)):
        raise ValueError(
            f"{piece} has the fields {sorted(fields)}: {sorted(known)} are needed, and for nested scales all of"
            f" {list(_NESTED_FIELDS)}"
        )
    sizes, inner, offset = fields["shape"], fields.get("nested_blocksize"), fields.get("nested_offset")
    allowed = {
        "quant_type": fields["quant_type"] == quant_type,
        "blocksize": type(fields["blocksize"]) is int and fields["blocksize"] in BLOCKSIZES,
        "dtype": isinstance(fields["dtype"], str) and fields["dtype"] in FLOATS,
        "shape": isinstance(sizes, list)
        and 0 < len(sizes) <= MAX_AXES
        and all(type(s) is int and 0 < s <= MAX_SIDE for s in sizes),
        "nested_blocksize": "nested_blocksize" not in fields or (type(inner) is int and inner in BLOCKSIZES),
        "nested_dtype": fields.get("nested_dtype", "float32") == "float32",
        "nested_offset": "nested_offset" not in fields or (type(offset) is float and math.isfinite(offset)),
    }
    wrong = {field: fields[field] for field, good in allowed.items() if not good}
    if wrong:
        raise ValueError(f"{piece} holds {wrong}, which bitsandbytes does not write")
    return QuantState(quant_type, fields["blocksize"], FLOATS[fields["dtype"]], tuple(sizes), inner, offset)


def _unnested(pieces: dict[str, np.ndarray], blocks: int, state: QuantState) -> np.ndarray:
    """The float32 scales that were quantized themselves. In numpy, as compilers fuse the sum: 1 bit off, at times."""
    assert state.nested_blocksize is not None  # as parse_state saw to
    assert state.nested_offset is not None
    _check_array("absmax", pieces["absmax"], np.uint8, blocks)
    _check_array("nested_absmax", pieces["nested_absmax"], np.float32, -(-blocks // state.nested_blocksize))
    _check_array("nested_quant_map", pieces["nested_quant_map"], np.float32, 256)
    scales = np.repeat(pieces["nested_absmax"], state.nested_blocksize)[:blocks]
    return pieces["nested_quant_map"][pieces["absmax"]] * scales + np.float32(state.nested_offset)


def _check_pieces(pieces: dict[str, np.ndarray], *, required: Set[str], optional: Set[str] = frozenset()) -> None:
    missing, left_over = sorted(required - set(pieces)), sorted(set(pieces) - required - optional)
    if missing or left_over:
        raise ValueError(f"of its parts, {missing} are missing and {left_over} left over")


def _check_array(piece: str, array: np.ndarray, dtype: Any, size: int) -> None:
    if array.dtype != dtype or array.shape != (size,):
        raise ValueError(f"{piece} is {array.dtype} {array.shape}, it must be {np.dtype(dtype)} ({size},)")
