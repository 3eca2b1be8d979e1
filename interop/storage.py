"""How bases lie in memory: narrowly, and no more of them than layers use, without losing a bit of what files hold.

PEFT sizes the bases by the element-wise maximum over all layers (`shared_dims`), often more than any layer reads, and
files have that size. Where a recipe draws them, a stack holds the block that is used, and its `Origin` for the rest.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from interop.bases import BFLOAT16, FLOAT16, Bases, chunks, cut_bases, identify_recipe, make_bases, same_numbers
from interop.config import RandLoraConfig
from interop.shapes import Dims, used_dims


class Stored(NamedTuple):
    """A basis as it lies in memory: `values * scale`."""

    values: np.ndarray  # int8, bfloat16, float16 or float32
    scale: float  # 1.0, except where the values are the codes -1, 0 and 1 of a ternary basis


def store(basis: np.ndarray, *, prefer: np.dtype | None = None) -> Stored:
    """A basis in the narrowest dtype that keeps every bit of it: int8 codes if it is ternary, else 16 bits if they do.

    Args:
        basis: In float32, bfloat16 or float16.
        prefer: Which dtype of 16 bits to try first, such as that of the model.
    """
    ternary = split_ternary(basis)
    if ternary is not None:
        return ternary
    for dtype in (prefer, basis.dtype, BFLOAT16, FLOAT16):
        if dtype is not None and dtype.itemsize == 2 and _fits(basis, dtype):
            return Stored(basis.astype(dtype, copy=False), 1.0)
    return Stored(basis, 1.0)


def restore(stored: Stored, dtype: np.dtype) -> np.ndarray:
    """The basis in the dtype that it had before `store`, bit for bit."""
    if stored.values.dtype == np.int8:
        return join_ternary(*stored).astype(dtype, copy=False)
    return stored.values.astype(dtype, copy=False)


def split_ternary(basis: np.ndarray) -> Stored | None:
    """The signs of a basis as int8, and the one magnitude that all its other entries have; None if it is not ternary.

    None also where `join_ternary` could not give every bit back: with inf, nan or a negative zero in it.
    """
    codes, scale = np.empty(basis.shape, np.int8), 0.0
    for part, into in zip(chunks(basis), chunks(codes), strict=True):
        part = part.astype(np.float32)
        scale = scale or float(np.abs(part).max())
        into[:] = (part > 0).astype(np.int8) - (part < 0).astype(np.int8)
        if not math.isfinite(scale) or not same_numbers(join_ternary(into, scale), part):
            return None
    return Stored(codes, scale)


def join_ternary(codes: np.ndarray, scale: float) -> np.ndarray:
    """The inverse of `split_ternary`, in float32."""
    return codes.astype(np.float32) * np.float32(scale)


class Origin(NamedTuple):
    """What the whole bases are drawn from, of which a part is held."""

    config: RandLoraConfig  # with the r, projection_prng_key, sparse and very_sparse of an adapter's, and no more
    dims: Dims
    recipe: str

    def whole(self, held: Bases) -> Bases:
        """All of the bases, drawn again, in the dtypes of the part that is held.

        Raises:
            ValueError: the part is not what is drawn.
        """
        made = make_bases(self.config, **self.dims._asdict(), recipe=self.recipe)
        if not all(map(same_numbers, cut_bases(made, held.dims), held)):
            raise ValueError(
                f"the bases in memory are not those that projection_prng_key={self.config.projection_prng_key} and the"
                f" recipe {self.recipe!r} give: they were changed since they were attached. A file must hold more of"
                " them than layers use, and that was not kept. Attach the adapter again, from where it came."
            )
        return Bases(*(basis.astype(part.dtype, copy=False) for basis, part in zip(made, held, strict=True)))


class Used(NamedTuple):
    """What is to be held of an adapter's bases."""

    bases: Bases
    origin: Origin | None  # None if these are all of them


def used_bases(
    bases: Bases,
    shapes: Iterable[tuple[int, int]],
    config: RandLoraConfig,
    *,
    drawn_by: str | None = None,
) -> Used:
    """The block of the bases that some layer uses, as views, if the rest can be drawn again; or else all of them.

    Args:
        bases: Of an adapter, in numpy.
        shapes: (out, in) of its layers.
        config: Of the adapter.
        drawn_by: The recipe that is known to have drawn them; if none is, it is searched for, by drawing them again.
    """
    dims = used_dims(shapes)
    recipe = None if dims == bases.dims else drawn_by or identify_recipe(config, bases)
    if recipe is None:
        return Used(bases, None)
    return Used(cut_bases(bases, dims), Origin(_what_is_drawn(config), bases.dims, recipe))


def _what_is_drawn(config: RandLoraConfig) -> RandLoraConfig:
    fields = ("r", "projection_prng_key", "sparse", "very_sparse")
    return RandLoraConfig(**{name: getattr(config, name) for name in fields})


def _fits(basis: np.ndarray, dtype: np.dtype) -> bool:
    """Whether a dtype can hold every number of a basis."""
    with np.errstate(over="ignore"):  # what overflows does not fit
        return dtype == basis.dtype or all(same_numbers(part.astype(dtype), part) for part in chunks(basis))
