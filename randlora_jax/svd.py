"""The update of AdaLoRA and its regularization, as plain formulas (arXiv:2303.10512, section 3.1)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from interop.adalora import SVDFactors
from randlora_jax.scaling import compute_dtype


def delta_of_triplets(
    factors: SVDFactors, *, scaling: float, dtype: np.dtype | None = None, in_first: bool = False
) -> Float[Array, "rows columns"]:
    """Dense update `scaling * B (E * A)` of one weight, (out, in), in float32 or wider.

    Args:
        factors: A (r, in), E (r, 1) and B (out, r).
        scaling: `config.scaling`.
        dtype: What the operands of the product are rounded to, as in `delta_weight`.
        in_first: Give (in, out) instead, straight from the product.
    """
    wide = compute_dtype(*factors)
    A, E, B = (part.astype(wide) for part in factors)
    scaled_A, B = ((part if dtype is None else part.astype(dtype)) for part in (E * A, B))
    operands, axes = ((scaled_A, B), (0, 1)) if in_first else ((B, scaled_A), (1, 0))
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    product = jax.lax.dot_general(*operands, numbers, preferred_element_type=wide)
    # On CPU, XLA would fold a transposition of the product into it, and has no such product of bfloat16 in float32.
    return scaling * (product if dtype in (None, wide) else jax.lax.optimization_barrier(product))


def distance_from_orthogonal(
    factors: SVDFactors, present: np.ndarray
) -> tuple[Float[Array, "*weights"], Float[Array, "*weights"]]:
    """Frobenius norms of `A A^T - I` and `B^T B - I`, of each weight.

    Args:
        factors: Those of one weight, or of several with an axis over them in front.
        present: Which rows of A are triplets and no padding (*weights, r); the others count for nothing.
    """
    return _distance(factors.A, present), _distance(factors.B.mT, present)


def _distance(rows: Float[Array, "*weights r size"], present: np.ndarray) -> Float[Array, "*weights"]:
    """Frobenius norm of `X X^T - I` over the rows that are present; where it is zero, its gradient is zero."""

    def norm(rows: Array) -> Array:
        rows = rows.astype(compute_dtype(rows)) * present[..., None]
        gram = jnp.einsum("...ri,...si->...rs", rows, rows, precision="highest")
        squares = ((gram - np.eye(present.shape[-1]) * present[..., None]) ** 2).sum((-2, -1))
        return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)

    mesh = jax.typeof(rows).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:  # a sum over a sharded axis is XLA's to place
        return jax.sharding.auto_axes(norm, out_sharding=NamedSharding(mesh, PartitionSpec()))(rows)
    return norm(rows)
