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
from randlora_torch.fused import project
from randlora_torch.scaling import compute_dtype, factor_grads, scale_bases
from randlora_torch.sparse import SparseBasis, is_sparse_usable


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


class Operands(NamedTuple):
    """What the functions of an update keep for backward: the arguments, nothing derived from them."""

    bases_A: Tensor
    bases_B: Tensor
    lam: Tensor
    gamma: Tensor

    def matrices(self, scaling: float, dtype: torch.dtype, tall: bool) -> tuple[Tensor, Tensor]:
        """Two matrices in `dtype` whose product is dW (out, in).

        (D, k) B and (k, d) U for a tall dW, (d, k) U^T and (k, D) B^T for a wide one, with k = n * r.
        """
        scaled_A, B = self.scaled_A(scaling, dtype), self.flat_B(dtype)
        return (B, scaled_A) if tall else (scaled_A.T, B.T)

    def flat_B(self, dtype: torch.dtype) -> Tensor:
        """B (D, n*r) in `dtype`."""
        return self.bases_B.to(dtype).reshape(self.bases_B.shape[0], -1)

    def scaled_A(self, scaling: float, dtype: torch.dtype) -> Tensor:
        """U = `scaling * lambda * A * gamma` (r*n, d) in `dtype`, made in float32 or wider."""
        A, lam, gamma = self._wide()
        return scale_bases(A, scaling * lam, gamma).to(dtype)

    def project(
        self, grad_weight: Tensor, scaling: float, tall: bool, sparse: SparseBasis | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from that of dW (out, in)."""

        def by_torch(grad_weight: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
            if sparse is not None and is_sparse_usable(grad_weight.dtype):
                grad_scaled_A = sparse.project(grad_weight, tall)
            else:
                grad_scaled_A = self.flat_B(grad_weight.dtype).T @ (grad_weight if tall else grad_weight.T)
            return self._replace(lam=lam, gamma=gamma).grads(grad_scaled_A, scaling)

        grads = project(grad_weight, *self, scaling=scaling, dtype=grad_weight.dtype, torch_way=by_torch)
        return grads[0].to(self.lam.dtype), grads[1].to(self.gamma.dtype)

    def side(self, tall: bool) -> int:
        """Rows of dW (out, in)."""
        return self.bases_B.shape[0] if tall else self.bases_A.shape[-1]

    def grads(self, grad_scaled_A: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from that of U / scaling, computed in float32 and returned in their dtypes."""
        A, lam, gamma = self._wide()
        grads = factor_grads(A, lam, gamma, grad_scaled_A.to(A.dtype))
        return (scaling * grads.lam).to(self.lam.dtype), (scaling * grads.gamma).to(self.gamma.dtype)

    def _wide(self) -> tuple[Tensor, Tensor, Tensor]:
        dtype = compute_dtype(self.lam, self.gamma)
        return self.bases_A.to(dtype), self.lam.to(dtype), self.gamma.to(dtype)


def add_product(weight: Tensor | None, left: Tensor, right: Tensor, *, in_place: bool = False) -> Tensor:
    """`weight + left @ right` in the dtype of the product, which is added to a wider weight before rounding.

    Args:
        weight: (out, in); None for zero.
        left: (out, k).
        right: (k, in).
        in_place: Whether the result may take the place of `weight`.
    """
    if weight is None:
        return left @ right
    if weight.stride(0) == 1 != weight.stride(1):  # stored (in, out): so is the result
        return add_product(weight.T, right.T, left.T, in_place=in_place).T
    if weight.dtype != left.dtype:
        return (weight + left @ right).to(left.dtype)
    return weight.addmm_(left, right) if in_place else torch.addmm(weight, left, right)


class _DeltaWeight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(bases_A: Tensor, bases_B: Tensor, lam: Tensor, gamma: Tensor, scaling: float) -> Tensor:
        with no_autocast(lam):
            operands = Operands(bases_A, bases_B, lam, gamma)
            return add_product(None, *operands.matrices(scaling, compute_dtype(lam, gamma), tall=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *operands, ctx.scaling = inputs
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with no_autocast(grad):
            return None, None, *Operands(*ctx.saved_tensors).project(grad, ctx.scaling, tall=True), None


def delta_weight(
    bases_A: Float[Tensor, "r d"],
    bases_B: Shaped[Tensor, "D n r"],
    lam: Float[Tensor, "r n"],
    gamma: Float[Tensor, "n d"],
    *,
    scaling: float,
) -> Float[Tensor, "D d"]:
    """Dense update `scaling * B (lambda * A * gamma)`, long side first, in PEFT's pairing of flat indices.

    Row q of the scaled A, counted as `k*n + b`, meets column q of B, counted as `basis*r + rank`: the sum of
    arXiv:2502.00987 up to a fixed shuffle of random columns. Costs O(D n r d) time and a (D, d) result, in float32 or
    wider. Differentiable in lam and gamma.

    Args:
        bases_A: See `layer_bases`; so is bases_B.
        bases_B: May be stored in any dtype, also as integers.
        lam: Applied to A in float32 or wider, as gamma is.
        gamma: See lam.
        scaling: `config.scaling`, times `LayerBases.scale`.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    check_factor_shapes(bases_A.shape, bases_B.shape, lam.shape, gamma.shape)
    return _DeltaWeight.apply(bases_A, bases_B, lam, gamma, scaling)
