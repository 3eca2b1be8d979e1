"""The update dW of one layer in float64 numpy, both methods: the definition that the stacks are checked against.

RandLoRA is `dW = s * sum_i B_i diag(lambda_i) A diag(gamma_i)` (arXiv:2502.00987), with PEFT's pairing of flat indices:
row q of the scaled A, counted as `k*n + b`, meets column q of B, counted as `basis*r + rank`. AdaLoRA is
`dW = s * B diag(E) A` (arXiv:2303.10512).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from interop.adalora import SVDFactors
from interop.bases import Bases


class Factors(NamedTuple):
    """The trainable part of one layer: lambda (r, n) scales basis columns, gamma (n, min(out, in)) rows of A."""

    lam: Any  # an array of numpy's here, of the framework's in the stacks
    gamma: Any


def product_blocks(
    factors: Factors | SVDFactors,
    bases: Bases | None,
    shape: tuple[int, int],
    *,
    scaling: float,
    size: int = 1024,
    dtype: DTypeLike = np.float64,
) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """The update of a layer of shape (out, in), in blocks of `size` along its longer side, each with its place."""
    wide = shape[0] < shape[1]
    if isinstance(factors, SVDFactors):
        A, E, B = (part.astype(dtype) for part in factors)
        long, short = ((E * A).T, scaling * B.T) if wide else (B, scaling * E * A)
    else:
        assert bases is not None
        lam, gamma = (part.astype(dtype) for part in factors)
        n, min_dim = gamma.shape
        A = bases.A[:, 0, :min_dim].astype(dtype)
        scaled_A = (scaling * lam)[:, :, None] * A[:, None, :] * gamma  # (r, n, min_dim)
        long, short = bases.B[: max(shape), :n], scaled_A.reshape(-1, min_dim)
    for start in range(0, max(shape), size):
        rows = slice(start, min(start + size, max(shape)))
        block = long[rows].astype(dtype).reshape(rows.stop - start, -1) @ short
        yield ((slice(None), rows), block.T) if wide else ((rows, slice(None)), block)
