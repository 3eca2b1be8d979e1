"""The programs that a GPU runs for `triton_kernels`, in Triton's language; nothing but these two imports Triton.

`long` and `short` are the sides of the layer, i and j count along them; k and b are the indices of lambda, and
`k*n + b` is the index of its flat numbers and of B's columns. Arguments in capitals are compiled in. What lies outside
of a tensor is read as 0 and not written.
"""

from typing import no_type_check  # type checkers may not wrap what Triton compiles

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _weight_tile(weight, scales, code, places, rows, inside, BLOCKSIZE: tl.constexpr, KIND: tl.constexpr):
    """Numbers of W in float32: where they lie, and in which rows, is given."""
    if KIND == "4bit":
        byte = tl.load(weight + places // 2, mask=inside, other=0).to(tl.int32)
        nibble = tl.where(places % 2 == 0, byte >> 4, byte & 15)
        numbers = tl.load(code + nibble) * tl.load(scales + places // BLOCKSIZE, mask=inside, other=0.0)
    else:
        numbers = tl.load(weight + places, mask=inside, other=0).to(tl.float32)
        if KIND == "8bit":
            numbers *= tl.load(scales + rows, mask=inside, other=0.0) * (1 / 127)
    return numbers


@triton.jit
@no_type_check
def fold(
    out, weight, scales, code, bases_A, bases_B, lam, gamma,
    scaling, long, short, n, r, stride_A, stride_B, stride_gamma,
    out_long, out_short, weight_long, weight_short, rows_long, rows_short,
    KIND: tl.constexpr, BLOCKSIZE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    LONG: tl.constexpr, SHORT: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """A (SHORT, LONG) tile of W'; neighbors share rows of B, and all of them A and gamma, which caches hold.

    The tile lies short side first because the scaled A, which is made in registers, is then the left operand, the one
    that Hopper's tensor cores take from there.
    """
    tiles_short = tl.cdiv(short, SHORT)
    first_i = tl.program_id(0).to(tl.int64) // tiles_short * LONG
    row_B, row = bases_B + first_i * stride_B, tl.arange(0, LONG)
    i, j = first_i + row, tl.program_id(0) % tiles_short * SHORT + tl.arange(0, SHORT)
    in_i, in_j = (i < long)[None, :], (j < short)[:, None]
    tile = tl.zeros((SHORT, LONG), tl.float32)
    for start in range(0, n, FLAT):
        b = start + tl.arange(0, FLAT)
        gammas = tl.load(gamma + b[None, :] * stride_gamma + j[:, None], mask=in_j & (b < n)[None, :], other=0.0)
        gammas = gammas.to(tl.float32)
        for k in range(r):
            lams = scaling * tl.load(lam + k * n + b, mask=b < n, other=0.0).to(tl.float32)
            row_A = tl.load(bases_A + k * stride_A + j, mask=j < short, other=0.0).to(tl.float32)
            scaled_A = (lams[None, :] * (row_A[:, None] * gammas)).to(DTYPE)
            places = row[None, :] * stride_B + (k * n + b)[:, None]
            columns = tl.load(row_B + places, mask=in_i & (b < n)[:, None], other=0).to(DTYPE)
            tile = tl.dot(scaled_A, columns, tile, input_precision=PRECISION)
    i, j = i[None, :], j.to(tl.int64)[:, None]
    if KIND != "none":
        places, rows = i * weight_long + j * weight_short, i * rows_long + j * rows_short
        tile += _weight_tile(weight, scales, code, places, rows, in_i & in_j, BLOCKSIZE, KIND)
    tl.store(out + i * out_long + j * out_short, tile.to(DTYPE), mask=in_i & in_j)


@triton.jit
@no_type_check
def project(
    grad, bases_A, bases_B, lam, gamma, lam_parts, gamma_parts,
    long, short, n, r, stride_A, stride_B, stride_gamma,
    grad_long, grad_short, chunks, per_group,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    LONG: tl.constexpr, SHORT: tl.constexpr, KS: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """What one tile of b, one of the short side and a group of ks add to the gradients of lambda and gamma.

    `G = B^T dW'` is made for KS ks and BS bs at a time, as KS*BS rows.
    """
    column, row = tl.arange(0, KS * BS), tl.arange(0, LONG)
    b = tl.program_id(0) * BS + column % BS
    j = tl.program_id(1) * SHORT + tl.arange(0, SHORT)
    group = tl.program_id(2)
    in_j = (j < short)[None, :]
    first_grad = grad + (tl.program_id(1) * SHORT).to(tl.int64) * grad_short
    places_grad = row[:, None] * grad_long + tl.arange(0, SHORT)[None, :] * grad_short
    to_gamma = tl.zeros((BS, SHORT), tl.float32)
    for chunk in range(group * per_group, tl.minimum((group + 1) * per_group, chunks)):
        k = chunk * KS + column // BS
        flat, inside = k * n + b, (k < r) & (b < n)
        places_B = row[:, None] * stride_B + flat[None, :]
        G = tl.zeros((KS * BS, SHORT), tl.float32)
        for start in range(0, long, LONG):
            in_i, first = (start + row < long)[:, None], tl.cast(start, tl.int64)
            columns = tl.load(bases_B + first * stride_B + places_B, mask=in_i & inside[None, :], other=0)
            grads = tl.load(first_grad + first * grad_long + places_grad, mask=in_i & in_j, other=0.0)
            G = tl.dot(tl.trans(columns.to(DTYPE)), grads.to(DTYPE), G, input_precision=PRECISION)
        both = inside[:, None] & in_j
        G *= tl.load(bases_A + k[:, None] * stride_A + j[None, :], mask=both, other=0.0).to(tl.float32)
        gammas = tl.load(gamma + b[:, None] * stride_gamma + j[None, :], mask=both, other=0.0).to(tl.float32)
        tl.store(lam_parts + tl.program_id(1) * r * n + flat, tl.sum(G * gammas, axis=1), mask=inside)
        lams = tl.load(lam + flat, mask=inside, other=0.0).to(tl.float32)
        to_gamma += tl.sum(tl.reshape(G * lams[:, None], (KS, BS, SHORT)), axis=0)
    b = tl.program_id(0) * BS + tl.arange(0, BS)
    places = (group * n + b).to(tl.int64)[:, None] * short + j[None, :]
    tl.store(gamma_parts + places, to_gamma, mask=(b < n)[:, None] & in_j)
