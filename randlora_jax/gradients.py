"""The update with hand-written gradients: backward keeps lambda and gamma, never the scaled bases, which it rebuilds.

A and B are frozen: their cotangent is a symbolic zero, so XLA never computes a gradient for them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from interop.shapes import check_factor_shapes
from randlora_jax.scaling import compute_dtype, factor_grads, scale_bases


class _Operands(NamedTuple):
    """What both rules keep for backward: the arguments, nothing derived from them."""

    bases_A: Array
    bases_B: Array
    lam: Array
    gamma: Array

    def computed(self) -> "_Operands":
        """In the dtype to compute in, B flattened to (D, n*r)."""
        dtype = compute_dtype(self.lam, self.gamma)
        A, B, lam, gamma = (array.astype(dtype) for array in self)
        return _Operands(A, B.reshape(B.shape[0], -1), lam, gamma)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _delta_weight(bases_A: Array, bases_B: Array, lam: Array, gamma: Array, scaling: float) -> Array:
    A, B, lam, gamma = _Operands(bases_A, bases_B, lam, gamma).computed()
    return scaling * (B @ scale_bases(A, lam, gamma))


def _delta_weight_fwd(
    bases_A: Array, bases_B: Array, lam: Array, gamma: Array, scaling: float
) -> tuple[Array, _Operands]:
    return _delta_weight(bases_A, bases_B, lam, gamma, scaling), _Operands(bases_A, bases_B, lam, gamma)


def _delta_weight_bwd(scaling: float, kept: _Operands, grad: Array) -> tuple[None, None, Array, Array]:
    A, B, lam, gamma = kept.computed()
    grads = factor_grads(A, lam, gamma, scaling * (B.T @ grad))
    return None, None, grads.lam.astype(kept.lam.dtype), grads.gamma.astype(kept.gamma.dtype)


_delta_weight.defvjp(_delta_weight_fwd, _delta_weight_bwd)


def delta_weight(
    bases_A: Float[Array, "r d"],
    bases_B: Float[Array, "D n r"],
    lam: Float[Array, "r n"],
    gamma: Float[Array, "n d"],
    *,
    scaling: float,
) -> Float[Array, "D d"]:
    """Dense update `scaling * B (lam * A * gamma)`, long side first, in PEFT's pairing of flat indices.

    Row `k*n + b` of the scaled A meets column `b*r + k` of B: the sum of arXiv:2502.00987 up to a fixed shuffle of
    random columns. Costs O(D n r d) time and a (D, d) result, in float32 or wider. Differentiable in lam and gamma.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    check_factor_shapes(bases_A.shape, bases_B.shape, lam.shape, gamma.shape)
    return _delta_weight(bases_A, bases_B, lam, gamma, scaling)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _apply_delta(
    x: Array, bases_A: Array, bases_B: Array, lam: Array, gamma: Array, short_input: bool, scaling: float
) -> Array:
    A, B, lam, gamma = _Operands(bases_A, bases_B, lam, gamma).computed()
    scaled_A = scale_bases(A, lam, gamma)
    wide = x.astype(scaled_A.dtype)
    y = (wide @ scaled_A.T) @ B.T if short_input else (wide @ B) @ scaled_A
    return (scaling * y).astype(x.dtype)


def _apply_delta_fwd(
    x: Array, bases_A: Array, bases_B: Array, lam: Array, gamma: Array, short_input: bool, scaling: float
) -> tuple[Array, tuple[Array, _Operands]]:
    y = _apply_delta(x, bases_A, bases_B, lam, gamma, short_input, scaling)
    return y, (x, _Operands(bases_A, bases_B, lam, gamma))


def _apply_delta_bwd(
    short_input: bool, scaling: float, residuals: tuple[Array, _Operands], grad: Array
) -> tuple[Array, None, None, Array, Array]:
    x, kept = residuals
    A, B, lam, gamma = kept.computed()
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


_apply_delta.defvjp(_apply_delta_fwd, _apply_delta_bwd)


def apply_delta(
    x: Float[Array, "*batch inputs"],
    bases_A: Float[Array, "r d"],
    bases_B: Float[Array, "D n r"],
    lam: Float[Array, "r n"],
    gamma: Float[Array, "n d"],
    *,
    out_features: int,
    scaling: float,
) -> Float[Array, "*batch outputs"]:
    """`x @ dW.T` without forming dW, for a layer with weight (out, in); fewer operations when x has few rows.

    The result has the dtype of x; the products are computed in float32 or wider.

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
