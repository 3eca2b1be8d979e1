"""The update with hand-written gradients: backward keeps lambda and gamma, never the scaled bases, which it rebuilds.

A and B are frozen: their cotangent is a symbolic zero, so XLA never computes a gradient for them. The forward rules
call the plain formulas, so that forward mode works on top of reverse mode: `jax.hessian`, `jax.jvp` of a gradient.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from interop.shapes import check_factor_shapes
from randlora_jax.scaling import FactorGrads, compute_dtype, factor_grads, scale_bases


class Operands(NamedTuple):
    """What the rules keep of an adapter for backward: the arguments, nothing derived from them."""

    bases_A: Any
    bases_B: Any
    lam: Any
    gamma: Any

    def computed(self, dtype: np.dtype | None) -> "Operands":
        """B flattened to (D, n*r), in the dtype of the products; the rest in float32 or wider."""
        wide = compute_dtype(self.lam, self.gamma)
        A, lam, gamma = (array.astype(wide) for array in (self.bases_A, self.lam, self.gamma))
        return Operands(A, self.bases_B.reshape(self.bases_B.shape[0], -1).astype(dtype or wide), lam, gamma)


class Update(NamedTuple):
    """What `fold` and `project` are told besides arrays; see `delta_weight`."""

    scaling: float
    dtype: np.dtype | None
    transposed: bool


def product(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    """The sum over one axis of each operand, in the dtype of the narrower one, summed in float32 or wider."""
    dtype, wide = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize), compute_dtype(x, y)
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    result = jax.lax.dot_general(x.astype(dtype), y.astype(dtype), numbers, preferred_element_type=wide)
    # On CPU, XLA would fold a transposition of the product into it, and has no such product of bfloat16 in float32.
    return result if dtype == wide else jax.lax.optimization_barrier(result)


def fold(weight: Array | None, operands: Operands, update: Update) -> Array:
    """W + dW, or dW without a weight, in float32 or wider; (D, d), or (d, D) if transposed."""
    A, B, lam, gamma = operands.computed(update.dtype)
    scaled_A = scale_bases(A, lam, gamma)
    delta = update.scaling * (product(scaled_A, B, (0, 1)) if update.transposed else product(B, scaled_A, (1, 0)))
    return delta if weight is None else weight.astype(jnp.promote_types(weight.dtype, delta.dtype)) + delta


def project(operands: Operands, grad: Array, update: Update) -> FactorGrads:
    """Gradients of lambda and gamma, in their dtypes, from the gradient of what `fold` gives."""
    grad_scaled_A = product(operands.computed(update.dtype).bases_B, grad, (0, 1 if update.transposed else 0))
    return operand_grads(operands, update.scaling * grad_scaled_A)


def operand_grads(operands: Operands, grad_scaled_A: Array) -> FactorGrads:
    """Gradients of lambda and gamma, in their dtypes, from that of the scaled A."""
    A, _, lam, gamma = operands.computed(None)
    grads = factor_grads(A, lam, gamma, grad_scaled_A)
    return FactorGrads(grads.lam.astype(operands.lam.dtype), grads.gamma.astype(operands.gamma.dtype))


def _delta_weight_fwd(operands: Operands, update: Update) -> tuple[Array, Operands]:
    return fold(None, operands, update), operands


def _delta_weight_bwd(update: Update, operands: Operands, grad: Array) -> tuple[Operands]:
    return (Operands(None, None, *project(operands, grad, update)),)


_delta_weight = jax.custom_vjp(lambda operands, update: fold(None, operands, update), nondiff_argnums=(1,))
_delta_weight.defvjp(_delta_weight_fwd, _delta_weight_bwd)


def delta_weight(
    bases_A: Float[Array, "r d"],
    bases_B: Num[Array, "D n r"],
    lam: Float[Array, "r n"],
    gamma: Float[Array, "n d"],
    *,
    scaling: float,
    dtype: DTypeLike | None = None,
    transposed: bool = False,
) -> Float[Array, "rows columns"]:
    """Dense update `scaling * B (lam * A * gamma)`, long side first, in PEFT's pairing of flat indices.

    Row `k*n + b` of the scaled A meets column `b*r + k` of B: the sum of arXiv:2502.00987 up to a fixed shuffle of
    random columns. Costs O(D n r d) time and a (D, d) result, in float32 or wider. Differentiable in lam and gamma.

    Args:
        bases_A: See `layer_bases`; so is bases_B.
        bases_B: May be stored in any dtype, such as int8.
        lam: Applied to A in float32 or wider, as gamma is.
        gamma: See lam.
        scaling: `config.scaling`.
        dtype: What the factors of the large product are rounded to; it is summed in float32 or wider all the same.
            None: what jax rounds float32 operands to (`jax.default_matmul_precision`), nothing on CPU.
        transposed: Give (d, D) instead, straight from the product.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    check_factor_shapes(bases_A.shape, bases_B.shape, lam.shape, gamma.shape)
    update = Update(scaling, None if dtype is None else np.dtype(dtype), transposed)
    return _delta_weight(Operands(bases_A, bases_B, lam, gamma), update)
