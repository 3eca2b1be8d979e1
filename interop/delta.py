"""The update dW of one layer in float64 numpy, both methods: the definition that the stacks are checked against.

RandLoRA is `dW = s * sum_i B_i diag(lambda_i) A diag(gamma_i)` (arXiv:2502.00987), with PEFT's pairing of flat indices:
row `k*n + b` of the scaled A meets column `b*r + k` of B. AdaLoRA is `dW = s * B diag(E) A` (arXiv:2303.10512).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from interop.adalora import SVDFactors
from interop.bases import Bases


class Factors(NamedTuple):
    """The trainable part of one layer: lambda (r, n) scales basis columns, gamma (n, min(out, in)) rows of A."""

    lam: Any  # an array of numpy's here, of the framework's in the stacks
    gamma: Any


def product_blocks(
    factors: Factors | SVDFactors, bases: Bases | None, shape: tuple[int, int], *, scaling: float, size: int
) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """The update of a layer of shape (out, in), in blocks of `size` along its longer side, each with its place."""
    wide = shape[0] < shape[1]
    if isinstance(factors, SVDFactors):
        A, E, B = (part.astype(np.float64) for part in factors)
        long, short = ((E * A).T, B.T) if wide else (B, E * A)
    else:
        assert bases is not None
        long, short = bases.B[: max(shape), : len(factors.gamma)], _scaled_A(factors, bases)
    for start in range(0, max(shape), size):
        rows = slice(start, min(start + size, max(shape)))
        block = scaling * (long[rows].astype(np.float64).reshape(rows.stop - start, -1) @ short)
        yield ((slice(None), rows), block.T) if wide else ((rows, slice(None)), block)


def _scaled_A(factors: Factors, bases: Bases) -> np.ndarray:
    """(r * n, min_dim)."""
    lam, gamma = (part.astype(np.float64) for part in factors)
    min_dim = gamma.shape[1]
    A = bases.A[:, 0, :min_dim].astype(np.float64)
    return (lam[:, :, None] * A[:, None, :] * gamma).reshape(-1, min_dim)
