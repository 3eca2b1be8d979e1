"""The scaled bases `lambda * A * gamma` and their gradient, as plain formulas (arXiv:2502.00987, section 4).

Both are in full precision also on hardware where jax by default is not: they cost little beside the products with B.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class FactorGrads(NamedTuple):
    """Gradients of one layer's lambda and gamma."""

    lam: Float[Array, "r n"]
    gamma: Float[Array, "n d"]


def compute_dtype(*arrays: Array) -> jnp.dtype:
    """float32 or wider: factors and bases may be stored in half precision, products are not computed in it."""
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays))


def scale_bases(
    bases_A: Float[Array, "r d"], lam: Float[Array, "r n"], gamma: Float[Array, "n d"]
) -> Float[Array, "r*n d"]:
    """Rows `lam[k, b] * bases_A[k] * gamma[b]`, row index `k*n + b` as PEFT flattens them."""
    scaled = lam[:, :, None] * bases_A[:, None, :] * gamma  # (r, n, d)
    return scaled.reshape(-1, scaled.shape[-1])


def factor_grads(
    bases_A: Float[Array, "r d"], lam: Float[Array, "r n"], gamma: Float[Array, "n d"], grad: Float[Array, "r*n d"]
) -> FactorGrads:
    """Gradients of lambda and gamma from the gradient of `scale_bases`; the frozen A needs none."""
    weighted = grad.reshape(*lam.shape, -1) * bases_A[:, None, :]  # (r, n, d)
    grad_lam = jnp.einsum("rnd,nd->rn", weighted, gamma, precision="highest")
    return FactorGrads(grad_lam, jnp.einsum("rnd,rn->nd", weighted, lam, precision="highest"))
