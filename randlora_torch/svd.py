"""AdaLoRA's update `scaling * B (E * A)` (arXiv:2303.10512, section 3.1) and its distance from orthogonality."""

import torch
from jaxtyping import Float
from torch import Tensor

from interop.adalora import SVDFactors
from randlora_torch.gradients import no_autocast, product_dtype
from randlora_torch.scaling import compute_dtype


def delta_weight(
    A: Float[Tensor, "r inputs"], E: Float[Tensor, "r 1"], B: Float[Tensor, "outputs r"], *, scaling: float
) -> Float[Tensor, "outputs inputs"]:
    """Dense update `scaling * B (E * A)` of a weight (out, in), in float32 or wider; differentiable."""
    dtype = compute_dtype(A, E, B)
    with no_autocast(A):
        return scaling * (B.to(dtype) @ (E.to(dtype) * A.to(dtype)))


def apply_delta(
    x: Float[Tensor, "*batch inputs"],
    A: Float[Tensor, "r inputs"],
    E: Float[Tensor, "r 1"],
    B: Float[Tensor, "outputs r"],
    *,
    scaling: float,
) -> Float[Tensor, "*batch outputs"]:
    """`x @ dW.T` without forming dW.

    The products run in the dtype of x, or in autocast's, and so does the result; E is applied to A in float32.

    Raises:
        ValueError: x is not floating point.
    """
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: pass floating point inputs.")
    dtype, wide = product_dtype(x), compute_dtype(A, E, B)
    with no_autocast(x):
        scaled_A = (scaling * E.to(wide) * A.to(wide)).to(dtype)
        return (x.to(dtype) @ scaled_A.T) @ B.to(dtype).T


def distances_from_orthogonal(factors: SVDFactors) -> tuple[Tensor, Tensor]:
    """Frobenius norms of A A^T - I and B^T B - I, float32 or wider: equation 4 of the paper, without the square."""
    dtype = compute_dtype(*factors)
    with no_autocast(factors.A):
        A, B = factors.A.to(dtype), factors.B.to(dtype)
        identity = torch.eye(len(A), dtype=dtype, device=A.device)
        return torch.linalg.norm(A @ A.T - identity), torch.linalg.norm(B.T @ B - identity)
