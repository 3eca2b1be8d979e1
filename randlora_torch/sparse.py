"""`B U` and its gradient with a B that is mostly zeros, as sparse products: what `very_sparse` bases save on a CPU.

A basis of d = 1024 has one number in 32 that is not zero. CSR products pay from about one in ten down; where two thirds
are zeros, as in `sparse` bases, they cost several times the dense product. On GPUs nothing was measured.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MOST_DENSITY = 0.1  # of bases worth it
PRODUCT_PRICE = 0.4  # of a multiply-add of the dense product, zeros included, for `interop.plans`


class SparseBasis(NamedTuple):
    """B (D, n*r) and its transpose, in CSR."""

    rows: Tensor
    columns: Tensor

    def add_product(self, weight: Tensor | None, scaled_A: Tensor, tall: bool) -> Tensor:
        """`weight + dW` (out, in) in the dtype of U (n*r, d)."""
        oriented = weight if weight is None or tall else weight.T
        if oriented is None:
            product = self.rows @ scaled_A
        else:
            product = torch.addmm(oriented.to(scaled_A.dtype), self.rows, scaled_A)
        return product if tall else product.T

    def project(self, grad_weight: Tensor, tall: bool) -> Tensor:
        """Gradient of U (n*r, d) from that of dW (out, in)."""
        return self.columns @ (grad_weight if tall else grad_weight.T)


def sparse_basis(codes: Tensor) -> SparseBasis | None:
    """The codes (D, n, r) of a ternary basis for sparse products in float32, or None if those would not pay."""
    if codes.dtype != torch.int8 or codes.device.type != "cpu":
        return None
    flat = codes.reshape(codes.shape[0], -1)
    if flat.count_nonzero() > MOST_DENSITY * flat.numel():
        return None
    return SparseBasis(_csr(flat), _csr(flat.T))


def _csr(matrix: Tensor) -> Tensor:
    """A CSR matrix in float32, with the indices of MKL."""
    row, column = matrix.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=matrix.shape[0])
    starts = torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0)))
    values = matrix[row, column].float()
    return torch.sparse_csr_tensor(starts.int(), column.int(), values, matrix.shape, check_invariants=False)


def is_sparse_usable(dtype: torch.dtype) -> bool:
    """Whether sparse products can be taken here and now: not while tracing, batched, or differentiated again."""
    busy = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.is_grad_enabled()
    return dtype == torch.float32 and not busy
