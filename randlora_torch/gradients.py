"""The update with hand-written gradients: backward keeps lambda and gamma, never the scaled bases, which it rebuilds.

A and B are frozen and get no gradient. The backward passes are made of ordinary torch operations, so they can be
differentiated again, and the functions work under `torch.func`.
"""

import contextlib
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

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


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which inputs meet bases: that of the input, or what autocast makes of it."""
    kind = x.device.type
    if x.dtype != torch.float64 and is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """For code that chooses the dtypes of its products itself."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if is_autocast_available(kind) else contextlib.nullcontext()


class _Operands(NamedTuple):
    """What both functions keep for backward: the arguments, nothing derived from them."""

    bases_A: Tensor
    bases_B: Tensor
    lam: Tensor
    gamma: Tensor

    def scaled(self, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`scaling * lambda * A * gamma` (r*n, d), computed in float32, and B (D, n*r); both in `dtype`."""
        A, lam, gamma = self._wide()
        B = self.bases_B.to(dtype)
        return scale_bases(A, scaling * lam, gamma).to(dtype), B.reshape(B.shape[0], -1)

    def grads(self, grad_scaled_A: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma, computed in float32 and returned in their dtypes."""
        A, lam, gamma = self._wide()
        grads = factor_grads(A, lam, gamma, grad_scaled_A.to(A.dtype))
        return (scaling * grads.lam).to(self.lam.dtype), (scaling * grads.gamma).to(self.gamma.dtype)

    def _wide(self) -> tuple[Tensor, Tensor, Tensor]:
        dtype = compute_dtype(self.lam, self.gamma)
        return self.bases_A.to(dtype), self.lam.to(dtype), self.gamma.to(dtype)


class _DeltaWeight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(bases_A: Tensor, bases_B: Tensor, lam: Tensor, gamma: Tensor, scaling: float) -> Tensor:
        with no_autocast(lam):
            scaled_A, B = _Operands(bases_A, bases_B, lam, gamma).scaled(scaling, compute_dtype(lam, gamma))
            return B @ scaled_A

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *operands, ctx.scaling = inputs
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        kept = _Operands(*ctx.saved_tensors)
        with no_autocast(grad):
            B = kept.bases_B.to(grad.dtype).reshape(kept.bases_B.shape[0], -1)
            return None, None, *kept.grads(B.T @ grad, ctx.scaling), None


def delta_weight(
    bases_A: Float[Tensor, "r d"],
    bases_B: Shaped[Tensor, "D n r"],
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
        x: Tensor,
        bases_A: Tensor,
        bases_B: Tensor,
        lam: Tensor,
        gamma: Tensor,
        short_input: bool,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        with no_autocast(x):
            scaled_A, B = _Operands(bases_A, bases_B, lam, gamma).scaled(scaling, dtype)
            rows = x.to(dtype)
            return (rows @ scaled_A.T) @ B.T if short_input else (rows @ B) @ scaled_A

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.short_input, ctx.scaling, ctx.dtype = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, *operands = ctx.saved_tensors
        kept = _Operands(*operands)
        with no_autocast(x):
            scaled_A, B = kept.scaled(ctx.scaling, ctx.dtype)
            rows_x = x.reshape(-1, x.shape[-1]).to(ctx.dtype)  # (T, in)
            rows_g = grad.reshape(-1, grad.shape[-1]).to(ctx.dtype)  # (T, out)
            if ctx.short_input:  # y = (x U^T) B^T
                hidden = rows_g @ B  # (T, n*r)
                grad_scaled_A, back = hidden.T @ rows_x, scaled_A
            else:  # y = (x B) U
                hidden = rows_g @ scaled_A.T  # (T, n*r)
                grad_scaled_A, back = (rows_x @ B).T @ rows_g, B.T
            grad_x = (hidden @ back).reshape(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
            return grad_x, None, None, *kept.grads(grad_scaled_A, ctx.scaling), None, None, None


def apply_delta(
    x: Float[Tensor, "*batch inputs"],
    bases_A: Float[Tensor, "r d"],
    bases_B: Shaped[Tensor, "D n r"],
    lam: Float[Tensor, "r n"],
    gamma: Float[Tensor, "n d"],
    *,
    out_features: int,
    scaling: float,
) -> Float[Tensor, "*batch outputs"]:
    """`x @ dW.T` without forming dW, for a layer with weight (out, in); fewer operations when x has few rows.

    The products run in the dtype of x, or in autocast's, and so does the result; the bases are best given in that
    dtype, and are converted otherwise. Lambda and gamma are applied to A in float32.

    Raises:
        ValueError: the shapes do not fit each other, or x is not floating point.
    """
    check_factor_shapes(bases_A.shape, bases_B.shape, lam.shape, gamma.shape)
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: pass floating point inputs.")
    long, short = bases_B.shape[0], bases_A.shape[-1]
    if (x.shape[-1], out_features) not in ((short, long), (long, short)):
        raise ValueError(
            f"a layer of shape ({out_features}, {x.shape[-1]}) does not fit bases for a {long} x {short} layer:"
            " slice them with layer_bases(bases, (out, in))."
        )
    return _ApplyDelta.apply(x, bases_A, bases_B, lam, gamma, x.shape[-1] == short, scaling, product_dtype(x))
