"""The scaled bases `lambda * A * gamma` and their gradient, as plain formulas (arXiv:2502.00987, section 4)."""

from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class FactorGrads(NamedTuple):
    """Gradients of one layer's lambda and gamma."""

    lam: Float[Tensor, "r n"]
    gamma: Float[Tensor, "n d"]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32 or wider: factors and bases may be stored in half precision, products are not computed in it."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def scale_bases(
    bases_A: Float[Tensor, "r d"], lam: Float[Tensor, "r n"], gamma: Float[Tensor, "n d"]
) -> Float[Tensor, "r*n d"]:
    """Rows `lam[k, b] * bases_A[k] * gamma[b]`, row index `k*n + b` as PEFT flattens them."""
    scaled = (lam[:, :, None] * bases_A[:, None]).mul_(gamma)  # one large array is made, not two
    return scaled.reshape(-1, scaled.shape[-1])


def factor_grads(
    bases_A: Float[Tensor, "r d"], lam: Float[Tensor, "r n"], gamma: Float[Tensor, "n d"], grad: Float[Tensor, "r*n d"]
) -> FactorGrads:
    """Gradients of lambda and gamma from the gradient of `scale_bases`; the frozen A needs none."""
    weighted = grad.reshape(*lam.shape, -1) * bases_A[:, None, :]  # (r, n, d)
    grad_gamma = torch.bmm(lam.T[:, None, :], weighted.transpose(0, 1))[:, 0]  # the sum over r, for each of n
    return FactorGrads(torch.linalg.vecdot(weighted, gamma), grad_gamma)
