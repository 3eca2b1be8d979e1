"""The frozen random bases A and B from a seed, bit for bit as PEFT draws them with torch, without torch.

PEFT draws on torch's CPU generator, whose half-precision uniform kernel changed in torch 2.12 (pytorch#175988): the
same seed gives unrelated bases before and after. A *recipe* names the generation and the dtype, so that an adapter
saved without its bases can be rebuilt anywhere. All arithmetic below reproduces torch's AVX2/AVX512 builds.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from interop.config import RandLoraConfig
from interop.shapes import MAX_BASIS, Dims, bases_shapes

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)


class Bases(NamedTuple):
    """One pair of frozen bases, shared by all layers of an adapter; a layer uses a prefix of each."""

    A: Any  # (r, 1, min_dim), an array of numpy's here, of the framework's in the stacks
    B: Any  # (max_dim, n, r)

    @property
    def dims(self) -> Dims:
        """(max_dim, min_dim) that the pair was made for."""
        return Dims(self.B.shape[0], self.A.shape[2])


class _Recipe(NamedTuple):
    legacy: bool  # torch <= 2.11: the low 8 (bf16) or 11 (fp16) bits of a draw; later: 24 bits
    dtype: np.dtype


_RECIPES = {
    "torch>=2.12": _Recipe(legacy=False, dtype=BFLOAT16),
    "torch>=2.12-fp16": _Recipe(legacy=False, dtype=FLOAT16),
    "torch<=2.11": _Recipe(legacy=True, dtype=BFLOAT16),
    "torch<=2.11-fp16": _Recipe(legacy=True, dtype=FLOAT16),
}
RECIPES: tuple[str, ...] = tuple(_RECIPES)
DEFAULT_RECIPE = "torch>=2.12"

_CHUNK = 1 << 20
_MANTISSA = {BFLOAT16: 8, FLOAT16: 11}


def make_bases(config: RandLoraConfig, *, max_dim: int, min_dim: int, recipe: str = DEFAULT_RECIPE) -> Bases:
    """Draw the bases of `config` for layers of at most max_dim by min_dim, as PEFT does (arXiv:2502.00987, sec. 4).

    Dense bases are uniform (Kaiming with a = sqrt(5)) and come in the recipe's dtype; `sparse` and `very_sparse` ones
    are ternary, float32, and the same under every recipe. Both are divided by their standard deviation. About 0.5 s
    for 4096 x 4096.

    Args:
        config: Its r, projection_prng_key, sparse and very_sparse are read.
        max_dim: Longest side of the targeted layers, see `interop.shapes.shared_dims`.
        min_dim: Short side the bases must reach.
        recipe: One of `interop.RECIPES`.

    Raises:
        ValueError: unknown recipe, impossible sizes, or a basis that is constant and so cannot be normalized.

    Example:
        >>> bases = make_bases(RandLoraConfig(r=4), max_dim=16, min_dim=8)
        >>> bases.A.shape, bases.B.shape, bases.A.dtype.name
        ((4, 1, 8), (16, 2, 4), 'bfloat16')
    """
    if recipe not in _RECIPES:
        raise ValueError(f"recipe={recipe!r} is not known: choose one of {list(RECIPES)}.")
    if not 1 <= min_dim <= max_dim:
        raise ValueError(f"max_dim={max_dim}, min_dim={min_dim}: needs 1 <= min_dim <= max_dim. Swap them?")
    shape_A, shape_B = bases_shapes(Dims(max_dim, min_dim), config.r)
    if math.prod(shape_B) > MAX_BASIS:
        raise ValueError(f"basis B of shape {shape_B} is too large: at most {MAX_BASIS:,d} numbers are drawn.")
    stream = _TorchStream(config.projection_prng_key)
    if config.ternary:
        sparsity = _sparsity(config, min_dim)
        A = _draw_ternary(stream, shape_A, sparsity)
        B = _draw_ternary(stream, shape_B, sparsity)
    else:
        kind = _RECIPES[recipe]
        A = _draw_uniform(stream, math.prod(shape_A), fan=min_dim, recipe=kind).reshape(shape_A)
        B = np.empty(shape_B, kind.dtype)
        for block in range(shape_B[1]):  # torch draws basis by basis and concatenates on axis 1
            B[:, block] = _draw_uniform(stream, max_dim * config.r, fan=config.r, recipe=kind).reshape(max_dim, -1)
    return Bases(_normalize("A", A, config, min_dim), _normalize("B", B, config, min_dim))


def bases_digest(bases: Bases) -> str:
    """SHA-256 (hex) of the shapes and float32 values of A and B: the same however the values are stored."""
    digest = hashlib.sha256()
    for array in bases:
        digest.update(repr(tuple(array.shape)).encode())
        for chunk in chunks(array):
            digest.update(chunk.astype("<f4").tobytes())
    return digest.hexdigest()


def identify_recipe(config: RandLoraConfig, bases: Bases) -> str | None:
    """The recipe whose bases equal these in every value, or None (made by other code, another seed, or rounded)."""
    want_A, want_B = bases_shapes(bases.dims, config.r)
    if bases.A.shape != want_A or bases.B.shape != want_B or bases.dims.max_dim < bases.dims.min_dim:
        return None
    try:
        return _search_recipes(config, bases)
    except ValueError:  # this seed's own bases cannot be normalized, so it did not make these
        return None


def cut_bases(bases: Bases, dims: Dims) -> Bases:
    """The prefix of the bases that layers of at most these sizes use, as views."""
    r = bases.A.shape[0]
    A, B = (tuple(map(slice, shape)) for shape in bases_shapes(dims, r))
    return Bases(bases.A[A], bases.B[B])


def recipe_gives_A(config: RandLoraConfig, bases: Bases, recipe: str | None) -> bool:
    """Whether the seed of `config` gives this A under the recipe; A is drawn first and small, so this is quick."""
    if recipe is None:
        return False
    stream, shape = _TorchStream(config.projection_prng_key), bases.A.shape
    min_dim = bases.dims.min_dim
    if config.ternary:
        drawn = _draw_ternary(stream, shape, _sparsity(config, min_dim))
    else:
        drawn = _draw_uniform(stream, bases.A.size, fan=min_dim, recipe=_RECIPES[recipe]).reshape(shape)
    try:
        return same_numbers(_normalize("A", drawn, config, min_dim), bases.A)
    except ValueError:  # this seed's own basis cannot be normalized, so it did not make this one
        return False


def _search_recipes(config: RandLoraConfig, bases: Bases) -> str | None:
    for recipe in _RECIPES:
        if recipe_gives_A(config, bases, recipe):  # worth the time to draw all of B
            made = make_bases(config, **bases.dims._asdict(), recipe=recipe)
            if same_numbers(made.B, bases.B):
                return recipe
    return None


def _sparsity(config: RandLoraConfig, min_dim: int) -> float:
    """Inverse of the density of ternary bases."""
    return math.sqrt(min_dim) if config.very_sparse else 3


def same_numbers(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two bases of one size hold the same numbers, to the sign of a zero, in whatever dtypes."""
    pairs = zip(chunks(a), chunks(b), strict=True)
    return all(np.array_equal(_float32_bits(one), _float32_bits(other)) for one, other in pairs)


def _float32_bits(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32).view(np.uint32)


def chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array of any shape in flat pieces, for what needs more memory than the array itself."""
    flat = array.reshape(-1)
    return (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))


class _TorchStream:
    """The raw 32-bit draws of `torch.Generator("cpu").manual_seed(seed)`: MT19937 seeded with the low 32 bits."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed & 0xFFFFFFFF)

    def draw(self, count: int) -> np.ndarray:
        return self._state.randint(0, 2**32, count, dtype=np.uint32)


def _draw_uniform(stream: _TorchStream, count: int, *, fan: int, recipe: _Recipe) -> np.ndarray:
    """`torch.nn.init.kaiming_uniform_(a=sqrt(5))` on a half-precision tensor: U(-1/sqrt(fan), 1/sqrt(fan))."""
    gain = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))
    bound = math.sqrt(3.0) * (gain / math.sqrt(fan))  # in torch's order of operations
    if recipe.legacy:
        table = _legacy_table(bound, recipe.dtype)
        return table[stream.draw(count) & np.uint32(table.size - 1)]
    out = np.empty(count, recipe.dtype)
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        out[start:stop] = _uniform_24bit(stream.draw(stop - start), bound, recipe.dtype)
    return out


def _legacy_table(bound: float, dtype: np.dtype) -> np.ndarray:
    """All values that torch <= 2.11 can draw: its kernel works in the target dtype, with so many bits."""
    low, high = (np.asarray(np.float32(x)).astype(dtype).astype(np.float64) for x in (-bound, bound))
    span = np.asarray(np.float32(high - low)).astype(dtype).astype(np.float64)
    steps = np.arange(1 << _MANTISSA[dtype]) * 2.0 ** -_MANTISSA[dtype]
    return (steps * span + low).astype(np.float32).astype(dtype)


def _uniform_24bit(raw: np.ndarray, bound: float, dtype: np.dtype) -> np.ndarray:
    """Torch >= 2.12: one float32 fused multiply-add, rounded to `dtype`; a draw that rounds up to `bound` wraps."""
    low, high = np.float32(-bound), np.float32(bound)
    unit = (raw & np.uint32(0xFFFFFF)).astype(np.float64) * 2.0**-24
    # 24-bit by 24-bit products are exact in float64, so a single rounding to float32 is what the FMA does.
    values = (unit * np.float64(high - low) + np.float64(low)).astype(np.float32).astype(dtype)
    values[values == high.astype(dtype)] = low.astype(dtype)
    return values


def _draw_ternary(stream: _TorchStream, shape: tuple[int, ...], sparsity: float) -> np.ndarray:
    """-1, 0 or +1 by thresholding `torch.rand` (24 bits in float32) at 1/(2 sparsity) on either side."""
    low, high = np.float32(1 / (2 * sparsity)), np.float32(1 - 1 / (2 * sparsity))
    signs = np.empty(math.prod(shape), np.int8)
    for start in range(0, signs.size, _CHUNK):
        stop = min(start + _CHUNK, signs.size)
        unit = (stream.draw(stop - start) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)
        signs[start:stop] = (unit > high).astype(np.int8) - (unit < low).astype(np.int8)
    return signs.reshape(shape)


def _normalize(name: str, drawn: np.ndarray, config: RandLoraConfig, min_dim: int) -> np.ndarray:
    """Divide by the sample standard deviation, which torch rounds once to the tensor's own dtype."""
    ternary = drawn.dtype == np.int8
    std = _ternary_std(drawn) if ternary else _half_std(drawn)
    if not std > 0:
        what = "is zero everywhere" if ternary and not drawn.any() else "has no spread"
        remedy = (
            "Use sparse=True instead of very_sparse=True, dense bases, a larger r or another projection_prng_key."
            if ternary
            else "Use a larger r, or leave layers this small out of target_modules."
        )
        raise ValueError(
            f"basis {name} of shape {drawn.shape} {what} (r={config.r}, min_dim={min_dim},"
            f" projection_prng_key={config.projection_prng_key}), so it cannot be normalized. {remedy}"
        )
    if ternary:
        values = drawn.astype(np.float32)
        values *= np.float32(1) / np.float32(std)
        return values
    # There are only 65536 half-precision numbers: divide each once (float32 quotient, rounded back), then look up.
    every = np.arange(1 << 16, dtype=np.uint16).view(drawn.dtype)
    with np.errstate(all="ignore"):
        quotient = (every.astype(np.float32) / np.float32(np.float32(std).astype(drawn.dtype))).astype(drawn.dtype)
    for chunk in chunks(drawn):  # numpy turns the indices into int64 first
        chunk[:] = quotient[chunk.view(np.uint16)]
    return drawn


def _half_std(values: np.ndarray) -> float:
    """Sample standard deviation in float64, from a histogram of the 65536 bit patterns (nan for a single value)."""
    counts = np.zeros(1 << 16)
    for chunk in chunks(values):  # numpy counts in a copy as int64
        counts += np.bincount(chunk.view(np.uint16), minlength=1 << 16)
    present = counts > 0
    levels = np.arange(1 << 16, dtype=np.uint16)[present].view(values.dtype).astype(np.float64)
    counts = counts[present]
    if values.size < 2:
        return math.nan
    mean = (counts * levels).sum() / values.size
    return math.sqrt((counts * (levels - mean) ** 2).sum() / (values.size - 1))


def _ternary_std(signs: np.ndarray) -> float:
    """Torch's float32 `.std()` in closed form: the mean is rounded to float32, the squares are summed in float64."""
    if signs.size < 2:
        return math.nan
    plus, minus = int((signs == 1).sum()), int((signs == -1).sum())
    mean = float(np.float32(np.float32(plus - minus) / np.float32(signs.size)))
    zero = signs.size - plus - minus
    squares = plus * (1 - mean) ** 2 + minus * (1 + mean) ** 2 + zero * mean**2
    return math.sqrt(squares / (signs.size - 1))
