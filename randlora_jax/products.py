"""The products of one layer's update and of their gradients, as plain formulas that XLA compiles."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from randlora_jax.scaling import FactorGrads, compute_dtype, factor_grads, scale_bases


class Operands(NamedTuple):
    """What the rules keep of an adapter for backward: the arguments, nothing derived from them."""

    bases_A: Any
    bases_B: Any
    lam: Any
    gamma: Any

    def computed(self, dtype: np.dtype | None) -> "Operands":
        """B flattened to (D, n*r), in the dtype of the products; the rest in float32 or wider."""
        A, lam, gamma = self.widened()
        return Operands(A, self.bases_B.reshape(self.bases_B.shape[0], -1).astype(dtype or lam.dtype), lam, gamma)

    def widened(self) -> tuple[Array, Array, Array]:
        """A, lambda and gamma in float32 or wider."""
        wide = compute_dtype(self.lam, self.gamma)
        return self.bases_A.astype(wide), self.lam.astype(wide), self.gamma.astype(wide)


class Update(NamedTuple):
    """What `fold` and `project` are told besides arrays; see `delta_weight`."""

    scaling: float
    dtype: np.dtype | None
    transposed: bool
    kernels: str = "xla"


def product(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    """The sum over one axis of each operand, in the dtype of the narrower one, summed in float32 or wider."""
    dtype, wide = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize), compute_dtype(x, y)
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    result = jax.lax.dot_general(x.astype(dtype), y.astype(dtype), numbers, preferred_element_type=wide)
    # On CPU, XLA would fold a transposition of the product into it, and has no such product of bfloat16 in float32.
    return result if dtype == wide else jax.lax.optimization_barrier(result)


def fold(weight: Array | None, operands: Operands, update: Update, result: np.dtype | None = None) -> Array:
    """W + dW, or dW without a weight; (D, d), or (d, D) if transposed; made in float32 or wider, given in `result`."""
    A, B, lam, gamma = operands.computed(update.dtype)
    scaled_A = scale_bases(A, lam, gamma)
    delta = update.scaling * (product(scaled_A, B, (0, 1)) if update.transposed else product(B, scaled_A, (1, 0)))
    folded = delta if weight is None else weight.astype(jnp.promote_types(weight.dtype, delta.dtype)) + delta
    return folded.astype(result or folded.dtype)


def project(operands: Operands, grad: Array, update: Update) -> FactorGrads:
    """Gradients of lambda and gamma, in their dtypes, from the gradient of what `fold` gives."""
    grad_scaled_A = product(operands.computed(update.dtype).bases_B, grad, (0, 1 if update.transposed else 0))
    return operand_grads(operands, update.scaling * grad_scaled_A)


def operand_grads(operands: Operands, grad_scaled_A: Array) -> FactorGrads:
    """Gradients of lambda and gamma, in their dtypes, from that of the scaled A."""
    grads = factor_grads(*operands.widened(), grad_scaled_A)
    return FactorGrads(grads.lam.astype(operands.lam.dtype), grads.gamma.astype(operands.gamma.dtype))
