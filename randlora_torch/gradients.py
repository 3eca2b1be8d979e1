"""The update with hand-written gradients: backward keeps lambda and gamma, never the scaled bases, which it rebuilds.

A and B are frozen and get no gradient. The backward passes are made of ordinary torch operations, so they can be
differentiated again, and the functions work under `torch.func`.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interop.shapes import check_factor_shapes
from randlora_torch.scaling import compute_dtype, factor_grads, scale_bases


class UniqueBaseGrad(torch.autograd.Function):
    """`lambda * A * gamma` (r, n, d) from A (r, 1, d), with gradients for lambda and gamma only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(randlora_A: Tensor, randlora_lambda: Tensor, randlora_gamma: Tensor) -> Tensor:
        """Scale A; returns (r, n, d)."""
        return randlora_lambda[:, :, None] * randlora_A * randlora_gamma[None]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keep the inputs: the bases are there anyway, the factors are small."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, Tensor]:
        """Gradients of lambda (r, n) and gamma (n, d)."""
        randlora_A, randlora_lambda, randlora_gamma = ctx.saved_tensors
        flat = grad_output.reshape(-1, grad_output.shape[-1])
        return None, *factor_grads(randlora_A[:, 0], randlora_lambda, randlora_gamma, flat)


class _Operands(NamedTuple):
    """What both functions keep for backward: the arguments, nothing derived from them."""

    bases_A: Tensor
    bases_B: Tensor
    lam: Tensor
    gamma: Tensor

    def computed(self) -> "_Operands":
        """In the dtype to compute in, B flattened to (D, n*r)."""
        dtype = compute_dtype(self.lam, self.gamma)
        A, B, lam, gamma = (tensor.to(dtype) for tensor in self)
        return _Operands(A, B.reshape(B.shape[0], -1), lam, gamma)


class _DeltaWeight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(bases_A: Tensor, bases_B: Tensor, lam: Tensor, gamma: Tensor, scaling: float) -> Tensor:
        A, B, lam, gamma = _Operands(bases_A, bases_B, lam, gamma).computed()
        return scaling * (B @ scale_bases(A, lam, gamma))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *operands, ctx.scaling = inputs
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        kept = _Operands(*ctx.saved_tensors)
        A, B, lam, gamma = kept.computed()
        grads = factor_grads(A, lam, gamma, ctx.scaling * (B.T @ grad))
        return None, None, grads.lam.to(kept.lam.dtype), grads.gamma.to(kept.gamma.dtype), None


def delta_weight(
    bases_A: Float[Tensor, "r d"],
    bases_B: Float[Tensor, "D n r"],
    lam: Float[Tensor, "r n"],
    gamma: Float[Tensor, "n d"],
    *,
    scaling: float,
) -> Float[Tensor, "D d"]:
    """Dense update `scaling * B (lambda * A * gamma)`, long side first, in PEFT's pairing of flat indices.

    Row `k*n + b` of the scaled A meets column `b*r + k` of B: the sum of arXiv:2502.00987 up to a fixed shuffle of
    random columns. Costs O(D n r d) time and a (D, d) result, in float32 or wider. Differentiable in lam and gamma.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    check_factor_shapes(bases_A.shape, bases_B.shape, lam.shape, gamma.shape)
    return _DeltaWeight.apply(bases_A, bases_B, lam, gamma, scaling)


class _ApplyDelta(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, bases_A: Tensor, bases_B: Tensor, lam: Tensor, gamma: Tensor, short_input: bool, scaling: float
    ) -> Tensor:
        A, B, lam, gamma = _Operands(bases_A, bases_B, lam, gamma).computed()
        scaled_A = scale_bases(A, lam, gamma)
        wide = x.to(scaled_A.dtype)
        y = (wide @ scaled_A.T) @ B.T if short_input else (wide @ B) @ scaled_A
        return (scaling * y).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.short_input, ctx.scaling = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, *operands = ctx.saved_tensors
        kept = _Operands(*operands)
        A, B, lam, gamma = kept.computed()
        scaled_A = scale_bases(A, lam, gamma)
        rows_x = x.reshape(-1, x.shape[-1]).to(scaled_A.dtype)  # (T, in)
        rows_g = ctx.scaling * grad.reshape(-1, grad.shape[-1]).to(scaled_A.dtype)  # (T, out)
        if ctx.short_input:  # y = (x U^T) B^T
            hidden = rows_g @ B  # (T, n*r)
            grad_scaled_A, back = hidden.T @ rows_x, scaled_A
        else:  # y = (x B) U
            hidden = rows_g @ scaled_A.T  # (T, n*r)
            grad_scaled_A, back = (rows_x @ B).T @ rows_g, B.T
        grads = factor_grads(A, lam, gamma, grad_scaled_A)
        grad_x = (hidden @ back).reshape(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grads.lam.to(kept.lam.dtype), grads.gamma.to(kept.gamma.dtype), None, None


def apply_delta(
    x: Float[Tensor, "*batch inputs"],
    bases_A: Float[Tensor, "r d"],
    bases_B: Float[Tensor, "D n r"],
    lam: Float[Tensor, "r n"],
    gamma: Float[Tensor, "n d"],
    *,
    out_features: int,
    scaling: float,
) -> Float[Tensor, "*batch outputs"]:
    """`x @ dW.T` without forming dW, for a layer with weight (out, in); fewer operations when x has few rows.

    The result has the dtype of x; the products are computed in float32 or wider.

    Raises:
        ValueError: the shapes do not fit each other, or x is not floating point.
    """
    check_factor_shapes(bases_A.shape, bases_B.shape, lam.shape, gamma.shape)
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: pass floating point inputs.")
    long, short = bases_B.shape[0], bases_A.shape[-1]
    if sorted((x.shape[-1], out_features)) != [short, long]:
        raise ValueError(
            f"a layer of shape ({out_features}, {x.shape[-1]}) does not fit bases for a {long} x {short} layer:"
            " slice them with layer_bases(bases, (out, in))."
        )
    return _ApplyDelta.apply(x, bases_A, bases_B, lam, gamma, x.shape[-1] == short, scaling)
