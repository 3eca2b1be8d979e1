"""The update with hand-written gradients: backward keeps lambda and gamma, never the scaled bases, which it rebuilds.

A and B are frozen: their cotangent is a symbolic zero, so XLA never computes a gradient for them. The forward rules
call the plain formulas, so that forward mode works on top of reverse mode: `jax.hessian`, `jax.jvp` of a gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from interop.shapes import check_factor_shapes
from randlora_jax.scaling import compute_dtype, factor_grads, scale_bases


class _Operands(NamedTuple):
    """What both rules keep for backward: the arguments, nothing derived from them."""

    bases_A: Array
    bases_B: Array
    lam: Array
    gamma: Array

    def computed(self, dtype: np.dtype | None) -> "_Operands":
        """B flattened to (D, n*r), in the dtype of the products; the rest in float32 or wider."""
        wide = compute_dtype(self.lam, self.gamma)
        A, lam, gamma = (array.astype(wide) for array in (self.bases_A, self.lam, self.gamma))
        return _Operands(A, self.bases_B.reshape(self.bases_B.shape[0], -1).astype(dtype or wide), lam, gamma)


def _product(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    """The sum over one axis of each operand, in the dtype of the narrower one, summed in float32 or wider."""
    dtype, wide = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize), compute_dtype(x, y)
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    product = jax.lax.dot_general(x.astype(dtype), y.astype(dtype), numbers, preferred_element_type=wide)
    # On CPU, XLA would fold a transposition of the product into it, and has no such product of bfloat16 in float32.
    return product if dtype == wide else jax.lax.optimization_barrier(product)


class _Static(NamedTuple):
    """What `_delta_weight` is told besides arrays; see `delta_weight`."""

    scaling: float
    dtype: np.dtype | None
    transposed: bool


def _delta(bases_A: Array, bases_B: Array, lam: Array, gamma: Array, static: _Static) -> Array:
    A, B, lam, gamma = _Operands(bases_A, bases_B, lam, gamma).computed(static.dtype)
    scaled_A = scale_bases(A, lam, gamma)
    return static.scaling * (_product(scaled_A, B, (0, 1)) if static.transposed else _product(B, scaled_A, (1, 0)))


def _delta_weight_fwd(
    bases_A: Array, bases_B: Array, lam: Array, gamma: Array, static: _Static
) -> tuple[Array, _Operands]:
    return _delta(bases_A, bases_B, lam, gamma, static), _Operands(bases_A, bases_B, lam, gamma)


def _delta_weight_bwd(static: _Static, kept: _Operands, grad: Array) -> tuple[None, None, Array, Array]:
    A, B, lam, gamma = kept.computed(static.dtype)
    grad_scaled_A = _product(B, grad, (0, 1 if static.transposed else 0))
    grads = factor_grads(A, lam, gamma, static.scaling * grad_scaled_A)
    return None, None, grads.lam.astype(kept.lam.dtype), grads.gamma.astype(kept.gamma.dtype)


_delta_weight = jax.custom_vjp(_delta, nondiff_argnums=(4,))
_delta_weight.defvjp(_delta_weight_fwd, _delta_weight_bwd)


def delta_weight(
    bases_A: Float[Array, "r d"],
    bases_B: Shaped[Array, "D n r"],
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
        bases_B: May be stored in any floating dtype.
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
    static = _Static(scaling, None if dtype is None else np.dtype(dtype), transposed)
    return _delta_weight(bases_A, bases_B, lam, gamma, static)


def _apply(
    x: Array, bases_A: Array, bases_B: Array, lam: Array, gamma: Array, short_input: bool, scaling: float
) -> Array:
    A, B, lam, gamma = _Operands(bases_A, bases_B, lam, gamma).computed(None)
    scaled_A = scale_bases(A, lam, gamma)
    wide = x.astype(scaled_A.dtype)
    y = (wide @ scaled_A.T) @ B.T if short_input else (wide @ B) @ scaled_A
    return (scaling * y).astype(x.dtype)


def _apply_delta_fwd(
    x: Array, bases_A: Array, bases_B: Array, lam: Array, gamma: Array, short_input: bool, scaling: float
) -> tuple[Array, tuple[Array, _Operands]]:
    y = _apply(x, bases_A, bases_B, lam, gamma, short_input, scaling)
    return y, (x, _Operands(bases_A, bases_B, lam, gamma))


def _apply_delta_bwd(
    short_input: bool, scaling: float, residuals: tuple[Array, _Operands], grad: Array
) -> tuple[Array, None, None, Array, Array]:
    x, kept = residuals
    A, B, lam, gamma = kept.computed(None)
    scaled_A = scale_bases(A, lam, gamma)
    rows_x = x.reshape(-1, x.shape[-1]).astype(scaled_A.dtype)  # (T, in)
    rows_g = scaling * grad.reshape(-1, grad.shape[-1]).astype(scaled_A.dtype)  # (T, out)
    if short_input:  # y = (x U^T) B^T
        hidden = rows_g @ B  # (T, n*r)
        grad_scaled_A, grad_x = hidden.T @ rows_x, hidden @ scaled_A
    else:  # y = (x B) U
        hidden = rows_g @ scaled_A.T  # (T, n*r)
        grad_scaled_A, grad_x = (rows_x @ B).T @ rows_g, hidden @ B.T
    grads = factor_grads(A, lam, gamma, grad_scaled_A)
    grad_x = grad_x.reshape(x.shape).astype(x.dtype)
    return grad_x, None, None, grads.lam.astype(kept.lam.dtype), grads.gamma.astype(kept.gamma.dtype)


_apply_delta = jax.custom_vjp(_apply, nondiff_argnums=(5, 6))
_apply_delta.defvjp(_apply_delta_fwd, _apply_delta_bwd)


def apply_delta(
    x: Float[Array, "*batch inputs"],
    bases_A: Float[Array, "r d"],
    bases_B: Shaped[Array, "D n r"],
    lam: Float[Array, "r n"],
    gamma: Float[Array, "n d"],
    *,
    out_features: int,
    scaling: float,
) -> Float[Array, "*batch outputs"]:
    """`x @ dW.T` without forming dW, for a layer with weight (out, in); fewer operations when x has few rows.

    The result has the dtype of x; the products are summed in float32 or wider, as `delta_weight` with dtype=None.

    Raises:
        ValueError: the shapes do not fit each other, or x is not floating point.
    """
    check_factor_shapes(bases_A.shape, bases_B.shape, lam.shape, gamma.shape)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}: pass floating point inputs.")
    long, short = bases_B.shape[0], bases_A.shape[-1]
    if sorted((x.shape[-1], out_features)) != [short, long]:
        raise ValueError(
            f"a layer of shape ({out_features}, {x.shape[-1]}) does not fit bases for a {long} x {short} layer:"
            " slice them with layer_bases(bases, (out, in))."
        )
    return _apply_delta(x, bases_A, bases_B, lam, gamma, x.shape[-1] == short, scaling)
