"""The paper's sum as naive float64 loops, in PEFT's pairing of flat indices; shares no code with the packages.

`dW = scaling * sum over n bases b and r ranks k of B_b[:, k] Lambda_b[k, k] (A[k, :] * Gamma_b)` (arXiv:2502.00987).
PEFT flattens the scaled A as `k*n + b` and B as it lies in memory, `b*r + k`, and multiplies the two: number j of one
meets number j of the other, which pairs the same random columns and rows in a shuffled order.

AdaLoRA's update is a sum, too: over triplets of a singular value and its two vectors.
"""

import numpy as np


def delta_weight(A, B, lam, gamma, *, scaling, shape):
    """The update of one layer of shape (out, in); A and B may be larger than the layer needs, as PEFT shares them."""
    columns, rows = _columns_and_rows(A, B, lam, gamma, max(shape))
    delta = np.zeros((max(shape), min(shape)))
    for column, row in zip(columns, rows, strict=True):
        delta += np.outer(column, row)
    return scaling * (delta.T if _short_side_is_output(shape) else delta)


def gradients(A, B, lam, gamma, *, scaling, shape, upstream):
    """Gradients (lambda, gamma) of `sum(upstream * dW)`, by the chain rule through each term of the sum."""
    r, n = lam.shape
    A, lam, gamma = _float64(A.reshape(r, -1)), _float64(lam), _float64(gamma)
    upstream = scaling * (_float64(upstream).T if _short_side_is_output(shape) else _float64(upstream))
    columns, _ = _columns_and_rows(A, B, lam, gamma, max(shape))
    grad_lam, grad_gamma = np.zeros_like(lam), np.zeros_like(gamma)
    for k in range(r):
        for b in range(n):
            grad_row = columns[k * n + b] @ upstream
            base_row = A[k, : gamma.shape[1]]
            grad_lam[k, b] = (grad_row * gamma[b] * base_row).sum()
            grad_gamma[b] += grad_row * lam[k, b] * base_row
    return grad_lam, grad_gamma


def _columns_and_rows(A, B, lam, gamma, max_dim):
    """The r*n columns of B and scaled rows of A that meet each other, in the order of their flat index."""
    r, n = lam.shape
    A, B, lam, gamma = _float64(A.reshape(r, -1)), _float64(B), _float64(lam), _float64(gamma)
    columns = [B[:max_dim, b, k] for b in range(n) for k in range(r)]
    rows = [lam[k, b] * gamma[b] * A[k, : gamma.shape[1]] for k in range(r) for b in range(n)]
    return columns, rows


def _short_side_is_output(shape):
    out_features, in_features = shape
    return out_features < in_features


def _float64(array):
    return np.asarray(array).astype(np.float64)


def svd_delta_weight(A, E, B, *, scaling):
    """AdaLoRA's `P Lambda Q` (arXiv:2303.10512, section 3.1), one triplet after the other; 0 if none is left."""
    A, E, B = _float64(A), _float64(E), _float64(B)
    delta = np.zeros((B.shape[0], A.shape[1]))
    for i in range(len(E)):
        delta += E[i, 0] * np.outer(B[:, i], A[i])
    return scaling * delta
