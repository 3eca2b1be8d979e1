"""The frozen bases as JAX arrays: made by `interop`, stored once, sliced per layer."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Shaped

from interop.bases import DEFAULT_RECIPE, Bases
from interop.bases import make_bases as make_numpy_bases
from interop.config import RandLoraConfig
from interop.shapes import num_bases
from interop.storage import Origin, Stored, Used, restore, store


class HeldBasis(struct.PyTreeNode, eq=False):
    """B where it is held in another way than in files: in a narrower dtype, or without what no layer uses.

    A pytree of one array. `np.asarray`, `astype` and slicing give its numbers, those that are held.

    Attributes:
        values: (max_dim, n, r) in bfloat16 or float16, or the int8 codes of a ternary basis.
        scale: What the values are multiplied by (static).
        dtype: The dtype in files (static).
        origin: What all of the bases are drawn from; None if all are held (static).
    """

    values: Any  # an array, or what stands for one: a sharding, a ShapeDtypeStruct
    scale: float = struct.field(pytree_node=False)
    dtype: np.dtype = struct.field(pytree_node=False)
    origin: Origin | None = struct.field(pytree_node=False)

    shape = property(lambda self: self.values.shape)
    ndim = property(lambda self: self.values.ndim)
    size = property(lambda self: self.values.size)
    sharding = property(lambda self: self.values.sharding)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.values.nbytes

    def astype(self, dtype: Any) -> Array:
        """The numbers as an array."""
        wide = self.values.astype(jnp.float32)
        return (wide * jnp.float32(self.scale) if self.values.dtype == jnp.int8 else wide).astype(dtype)

    def __getitem__(self, index: Any) -> Array:
        return self.astype(self.dtype)[index]

    def __jax_array__(self) -> Array:
        return self.astype(self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return restore(Stored(to_host(self.values), self.scale), dtype or self.dtype)


def hold_bases(used: Used) -> Bases:
    """Bases of numpy on the default device: A as it is, B as narrow as it goes, in a `HeldBasis` if that changes it."""
    (A, B), origin = used
    values, scale = store(B)
    held: Any = jnp.asarray(values)
    if origin is not None or held.dtype != B.dtype:
        held = HeldBasis(held, scale, B.dtype, origin)
    return Bases(jnp.asarray(A), held)


def whole_bases(bases: Bases) -> Bases:
    """All of the bases in numpy, as files hold them; drawn again if they are not all held.

    Arrays that are spread over several processes are gathered: call it in all of them.

    Raises:
        ValueError: the bases that are held are not those that are drawn.
    """
    held = Bases(*(np.asarray(basis) if isinstance(basis, HeldBasis) else to_host(basis) for basis in bases))
    origin = getattr(bases.B, "origin", None)
    return held if origin is None else origin.whole(held)


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """The array in numpy; if it is spread over processes, all of them must call this."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


@dataclasses.dataclass(frozen=True)
class Captured:
    """A basis as a constant of the traced function, out of reach of the transformations inside it."""

    array: jax.Array | HeldBasis

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Captured) and self.array is other.array

    def __hash__(self) -> int:
        return id(self.array)


class LayerBases(NamedTuple):
    """The part of the shared bases that one layer uses."""

    A: Float[Array, "r d"]
    B: Shaped[Array, "D n r"]  # perhaps the int8 codes of a ternary basis, whose scale is in A then


def make_bases(config: RandLoraConfig, *, max_dim: int, min_dim: int, recipe: str = DEFAULT_RECIPE) -> Bases:
    """The bases of `interop.make_bases` (same bits, same errors) as JAX arrays A (r, 1, min_dim), B (max_dim, n, r).

    Pass them to jitted functions as arguments: a captured array becomes a constant that XLA folds for minutes.
    """
    return jax.tree.map(jnp.asarray, make_numpy_bases(config, max_dim=max_dim, min_dim=min_dim, recipe=recipe))


def layer_bases(bases: Bases, shape: tuple[int, int]) -> LayerBases:
    """The prefix of A and B that a layer of shape (out, in) uses: d = min(shape), D = max(shape), n = ceil(d / r).

    B stays as it is stored. If these are codes, A is multiplied by their scale instead: the update is the same.
    """
    (A, B), n = bases, num_bases(min(shape), bases.A.shape[0])
    A = A[:, 0, : min(shape)]
    if isinstance(B, HeldBasis):
        wide = A.astype(jnp.promote_types(A.dtype, jnp.float32))
        A, B = (A if B.scale == 1.0 else wide * B.scale), B.values
    return LayerBases(A, B[: max(shape), :n])
