"""`W + s B U` and the gradients of lambda and gamma from that of the sum, as one Triton kernel each.

U, the scaled A, is as large as W; it is made tile by tile and never written, and neither is its gradient. No GPU has
measured these kernels yet: `kernel_choice` finds out on each machine whether they pay.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from randlora_torch import triton_programs
from randlora_torch.packed import Packed4bit, Rows8bit

Weight = Tensor | Packed4bit | Rows8bit

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_SMALLEST = 16  # side of the smallest tile that tensor cores multiply
_ENOUGH_PROGRAMS = 512  # a few for each multiprocessor of a large GPU


class Tiles(NamedTuple):
    """How a kernel cuts its work up: the most that a program takes at once, in powers of 2 from 16 on.

    Attributes:
        long: Of the long side of the layer.
        short: Of its short side.
        flat: Of the columns of B.
        warps: Warps of a program.
        stages: Depth of the pipeline that loads tiles.
    """

    long: int
    short: int
    flat: int
    warps: int = 4
    stages: int = 3


class Launch(NamedTuple):
    """One call of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tiles: Tiles


def start_kernel(launch: Launch) -> None:
    """Run it on the device of its tensors."""
    options = {"num_warps": launch.tiles.warps, "num_stages": launch.tiles.stages}
    with torch.cuda.device_of(launch.arguments["bases_B"]):
        launch.kernel[launch.grid](**launch.arguments, **options)


def fold_tiles(dtype: torch.dtype) -> tuple[Tiles, ...]:
    """What is worth trying for `folded_weight` in this dtype, the likeliest first."""
    if dtype == torch.float32:
        return Tiles(64, 64, 32), Tiles(128, 64, 16)
    return Tiles(128, 128, 64, 8), Tiles(256, 128, 32, 8), Tiles(128, 64, 64)


def projection_tiles(dtype: torch.dtype) -> tuple[Tiles, ...]:
    """What is worth trying for `projected_gradient` in this dtype, the likeliest first."""
    if dtype == torch.float32:
        return Tiles(32, 64, 64), Tiles(16, 64, 128)
    return Tiles(64, 128, 128, 8), Tiles(64, 64, 128), Tiles(64, 64, 64)


def folded_weight(
    weight: Weight | None,
    bases_A: Tensor,
    bases_B: Tensor,
    lam: Tensor,
    gamma: Tensor,
    *,
    scaling: float,
    dtype: torch.dtype,
    out_features: int | None = None,
    tiles: Tiles | None = None,
    start: Callable[[Launch], None] = start_kernel,
) -> Tensor:
    """`W + scaling * dW` (out, in) in `dtype`.

    B and the scaled A are rounded to `dtype` and multiplied. The products are added up in float32, W is added to them
    (a quantized one without rounding it to any dtype), and the sum is rounded once.

    Args:
        weight: W (out, in), float32, bfloat16 or float16 with any strides, or quantized; None for dW alone.
        bases_A: (r, d).
        bases_B: (D, n, r), each row in one piece, as in a slice of larger bases. Integers are converted as they are.
        lam: (r, n).
        gamma: (n, d).
        scaling: Of the update, times what integer bases are in units of.
        dtype: float32, bfloat16 or float16.
        out_features: For dW alone: d or D, which of them is the layer's output; D by default.
        tiles: By default the likeliest.
        start: Starts the kernel.

    Raises:
        ValueError: the rows of B are not in one piece, or there is no kernel for the dtype.
    """
    factors = _factors(bases_A, bases_B, lam, gamma, dtype)
    long, short = factors["long"], factors["short"]
    outputs = out_features or (long if weight is None else weight.shape[0])
    sides = slice(None) if outputs == long else slice(None, None, -1)  # (long, short) <-> (out, in)
    out = bases_B.new_empty((long, short)[sides], dtype=dtype)
    most = tiles or fold_tiles(dtype)[0]
    block_long, block_short = _block(long, most.long), _block(short, most.short)
    arguments = factors | _weight_arguments(weight, out, sides)
    arguments |= {"out": out, "scaling": scaling}
    arguments["out_long"], arguments["out_short"] = out.stride()[sides]
    arguments |= {"LONG": block_long, "SHORT": block_short, "FLAT": _fitting_block(factors["n"], most.flat)}
    grid = (_ceil_div(long, block_long) * _ceil_div(short, block_short),)
    start(Launch(triton_programs.fold, grid, arguments, most))
    return out


def projected_gradient(
    grad_weight: Tensor,
    bases_A: Tensor,
    bases_B: Tensor,
    lam: Tensor,
    gamma: Tensor,
    *,
    scaling: float,
    dtype: torch.dtype | None = None,
    tiles: Tiles | None = None,
    start: Callable[[Launch], None] = start_kernel,
) -> tuple[Tensor, Tensor]:
    """Gradients (lambda, gamma) in float32 from that of the folded weight (out, in); the same bits every time.

    With `G = B^T dW'`, `grad_lam[k, b] = s * sum over d of G[k*n + b] * A[k] * gamma[b]` and
    `grad_gamma[b] = s * sum over k of lam[k, b] * A[k] * G[k*n + b]`. Each program writes what it knows of these sums,
    and torch adds that up.

    Args:
        grad_weight: (out, in), with any strides.
        bases_A: (r, d).
        bases_B: (D, n, r), see `folded_weight`.
        lam: (r, n).
        gamma: (n, d).
        scaling: Of the update, times what integer bases are in units of.
        dtype: In which B and the gradient are multiplied; by default that of the gradient.
        tiles: By default the likeliest.
        start: Starts the kernel.

    Raises:
        ValueError: the rows of B are not in one piece, or there is no kernel for the dtype.
    """
    dtype = dtype or grad_weight.dtype
    factors = _factors(bases_A, bases_B, lam, gamma, dtype)
    long, short, n, r = (factors[name] for name in ("long", "short", "n", "r"))
    most = tiles or projection_tiles(dtype)[0]
    block_b, block_short = _fitting_block(n, most.flat), _block(short, most.short)
    block_k = min(most.flat // block_b, _power_of_2(r))
    tiles_b, tiles_short, chunks = _ceil_div(n, block_b), _ceil_div(short, block_short), _ceil_div(r, block_k)
    per_group = _ceil_div(chunks, min(chunks, _ceil_div(_ENOUGH_PROGRAMS, tiles_b * tiles_short)))
    groups = _ceil_div(chunks, per_group)
    lam_parts = lam.new_empty((tiles_short, r, n), dtype=torch.float32)
    gamma_parts = lam.new_empty((groups, n, short), dtype=torch.float32)
    arguments = factors | {"grad": grad_weight, "lam_parts": lam_parts, "gamma_parts": gamma_parts}
    sides = slice(None) if grad_weight.shape[0] == long else slice(None, None, -1)
    arguments["grad_long"], arguments["grad_short"] = grad_weight.stride()[sides]
    arguments |= {"chunks": chunks, "per_group": per_group}
    arguments |= {"LONG": _block(long, most.long), "SHORT": block_short, "KS": block_k, "BS": block_b}
    start(Launch(triton_programs.project, (tiles_b, tiles_short, groups), arguments, most))
    return scaling * lam_parts.sum(0), scaling * gamma_parts.sum(0)


def _factors(bases_A: Tensor, bases_B: Tensor, lam: Tensor, gamma: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments that both kernels take."""
    (long, n, r), short = bases_B.shape, gamma.shape[1]
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype} has no kernel: choose one of {list(_DTYPES)}, or compute in torch.")
    if bases_B.stride()[1:] != (r, 1):
        raise ValueError(
            f"bases_B of shape {tuple(bases_B.shape)} has strides {bases_B.stride()}: each row must lie in one piece."
            " Pass bases_B.contiguous()."
        )
    bases_A, gamma = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (bases_A, gamma))
    tensors = {"bases_A": bases_A, "bases_B": bases_B, "lam": lam.contiguous(), "gamma": gamma}
    strides = {"stride_A": bases_A.stride(0), "stride_B": bases_B.stride(0), "stride_gamma": gamma.stride(0)}
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"  # of float32
    sizes = {"long": long, "short": short, "n": n, "r": r}
    return {**tensors, **sizes, **strides, "DTYPE": _DTYPES[dtype], "PRECISION": precision}


def _weight_arguments(weight: Weight | None, out: Tensor, sides: slice) -> dict[str, Any]:
    """W as the kernel reads it: the number at (i, j) of the long and the short side by strides, its row likewise."""
    values = scales = code = out  # stands for what is not read
    strides: tuple[int, ...] = (out.shape[1], 1)
    rows: tuple[int, ...] = (1, 0)
    blocksize, kind = 1, "none"
    if isinstance(weight, Packed4bit):
        values, scales, code = (part.contiguous() for part in weight[:3])
        blocksize, kind = weight.blocksize, "4bit"
    elif isinstance(weight, Rows8bit):
        values, scales, strides, kind = weight.codes, weight.SCB.contiguous(), weight.codes.stride(), "8bit"
    elif weight is not None:
        values, strides, kind = weight, weight.stride(), "dense"
    arguments: dict[str, Any] = {"weight": values, "scales": scales, "code": code, "BLOCKSIZE": blocksize, "KIND": kind}
    arguments["weight_long"], arguments["weight_short"] = strides[sides]
    arguments["rows_long"], arguments["rows_short"] = rows[sides]
    return arguments


def _block(size: int, most: int) -> int:
    """The tile for a side: no larger than the side needs."""
    return min(most, max(_SMALLEST, _power_of_2(size)))


def _fitting_block(size: int, most: int) -> int:
    """The largest tile of those that leave the least of their last one empty."""
    blocks = [most >> shift for shift in range(most.bit_length()) if most >> shift >= _SMALLEST]
    return min(blocks, key=lambda block: (_ceil_div(size, block) * block, -block))


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _ceil_div(size: int, block: int) -> int:
    return -(-size // block)
