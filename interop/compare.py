"""Updates of layers compared number by number, in blocks, so that no layer has to exist twice.

Two adapters may write the same update in many ways: with other bases, by another method, with lambda and gamma scaled
against each other. Where all numbers are equal, though, so are the updates, and nothing has to be multiplied.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from interop.adalora import AdaLoraConfig
from interop.adapter import Adapter
from interop.convert import convert
from interop.files import load
from interop.tensorfile import byte_chunks

Place = tuple[slice, slice]


class Difference(NamedTuple):
    """How far an update b is from an update a.

    Attributes:
        norm_a, norm_b: Frobenius norms of the two.
        norm: That of their difference.
        cosine: Of the angle between the two, as vectors; 0 if one of them is 0.
    """

    norm_a: float
    norm_b: float
    norm: float
    cosine: float

    @property
    def relative(self) -> float:
        """The norm of the difference over the larger of the two norms, from 0 to 2; 0 if both updates are 0."""
        larger = max(self.norm_a, self.norm_b)
        return self.norm / larger if larger else 0.0


def open_adapter(source: Any, *, adapter_name: str | None = None, recipe: str | None = None) -> Adapter:
    """The adapter in a folder, from which each layer is read when it is looked at, or in anything `convert` takes."""
    if isinstance(source, str | os.PathLike):
        return load(source, adapter_name=adapter_name, recipe=recipe, lazy=True)
    return convert(source, to="peft", adapter_name=adapter_name)


def layer_differences(
    a: Adapter, module: str, others: Mapping[str, Adapter | np.ndarray], shape: tuple[int, int] | None = None
) -> dict[str, Difference]:
    """Compare a layer's update, in float64, with those of other adapters, or with updates computed elsewhere.

    Args:
        a: The adapter whose updates the others are compared with.
        module: The layer.
        others: Adapters that adapt it, in the same shape, or arrays (out, in).
        shape: See `Adapter.delta_weight`.

    Raises:
        ValueError: see `Adapter.delta_weight`.
    """
    takes = {name: _blocks_of(a, other, module, shape) for name, other in others.items()}
    sums = {name: np.zeros(4) for name in others}
    for where, block in a.delta_blocks(module, shape):
        for name, take in takes.items():
            other = take(where, block)
            apart = other - block
            sums[name] += [np.vdot(x, y) for x, y in ((block, block), (other, other), (apart, apart), (block, other))]
    return {name: _difference(sums[name].tolist()) for name in others}


def _difference(sums: list[float]) -> Difference:
    norm_a, norm_b, norm = (value**0.5 for value in sums[:3])
    return Difference(norm_a, norm_b, norm, sums[3] / (norm_a * norm_b) if norm_a and norm_b else 0.0)


def _blocks_of(
    a: Adapter, other: Adapter | np.ndarray, module: str, shape: tuple[int, int] | None
) -> Callable[[Place, np.ndarray], np.ndarray]:
    """What gives the other update at a place, told the first one there."""
    if isinstance(other, np.ndarray):
        return lambda where, _: other[where].astype(np.float64)
    if other is a:
        return lambda _, block: block
    blocks = other.delta_blocks(module, shape)
    return lambda *_: next(blocks)[1]


def same_numbers(a: Adapter, b: Adapter, module: str) -> bool:
    """Whether both make the update of a layer of the same factors, bases and scaling; b went through `share_bases`."""
    if type(a.config) is not type(b.config) or a.config.scaling != b.config.scaling:
        return False
    if not all(_same_bytes(x, y) for x, y in zip(a.factors[module], b.factors[module], strict=True)):
        return False
    return isinstance(a.config, AdaLoraConfig) or (a.bases is not None and a.bases is b.bases)


def _same_bytes(a: Any, b: Any) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return all(x == y for x, y in zip(byte_chunks(a), byte_chunks(b), strict=True))


def share_bases(a: Adapter, b: Adapter) -> Adapter:
    """The adapter b, holding a's bases if its own are equal, so that they are in memory once and compared once."""
    if a.bases is None or b.bases is None or not all(map(_same_bytes, a.bases, b.bases)):
        return b
    return dataclasses.replace(b, bases=a.bases)


def unmatched(a: Adapter, b: Adapter) -> list[str]:
    """What only one of two adapters adapts, or they adapt in different shapes, or have besides, one a line."""
    lines = [f"{name}: only in A" for name in a.factors if name not in b.factors]
    lines += [f"{name}: only in B" for name in b.factors if name not in a.factors]
    shapes_a, shapes_b = a.shapes or {}, b.shapes or {}
    lines += [
        f"{name}: a layer of shape {shape} in A, {shapes_b[name]} in B"
        for name, shape in shapes_a.items()
        if shapes_b.get(name, shape) != shape
    ]
    for key in sorted({*a.saved_weights, *b.saved_weights}):
        mine, other = a.saved_weights.get(key), b.saved_weights.get(key)
        if mine is None or other is None:
            lines.append(f"{key}: only in {'A' if other is None else 'B'}")
        elif not _same_bytes(mine, other):
            lines.append(f"{key}: other numbers in A than in B")
    return lines


def in_both(a: Adapter, b: Adapter) -> list[str]:
    """The layers that both adapt, in one shape."""
    shapes_a, shapes_b = a.shapes or {}, b.shapes or {}
    shared = (name for name in a.factors if name in b.factors)
    return [name for name in shared if name not in shapes_a or shapes_b.get(name, shapes_a[name]) == shapes_a[name]]
