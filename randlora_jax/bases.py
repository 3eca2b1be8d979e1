"""The frozen bases as JAX arrays: made by `interop`, stored once, sliced per layer."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from interop.bases import DEFAULT_RECIPE, Bases
from interop.bases import make_bases as make_numpy_bases
from interop.config import RandLoraConfig
from interop.shapes import num_bases


@dataclasses.dataclass(frozen=True)
class Captured:
    """A basis as a constant of the traced function, out of reach of the transformations inside it."""

    array: jax.Array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Captured) and self.array is other.array

    def __hash__(self) -> int:
        return id(self.array)


class LayerBases(NamedTuple):
    """The part of the shared bases that one layer uses."""

    A: Float[Array, "r d"]
    B: Num[Array, "D n r"]


def make_bases(config: RandLoraConfig, *, max_dim: int, min_dim: int, recipe: str = DEFAULT_RECIPE) -> Bases:
    """The bases of `interop.make_bases` (same bits, same errors) as JAX arrays A (r, 1, min_dim), B (max_dim, n, r).

    Pass them to jitted functions as arguments: a captured array becomes a constant that XLA folds for minutes.
    """
    return jax.tree.map(jnp.asarray, make_numpy_bases(config, max_dim=max_dim, min_dim=min_dim, recipe=recipe))


def layer_bases(bases: Bases, shape: tuple[int, int]) -> LayerBases:
    """The prefix of A and B that a layer of shape (out, in) uses: d = min(shape), D = max(shape), n = ceil(d / r)."""
    n = num_bases(min(shape), bases.A.shape[0])
    return LayerBases(bases.A[:, 0, : min(shape)], bases.B[: max(shape), :n])
