"""W + dW, and lambda's and gamma's gradients, as Pallas kernels that never write the scaled A to memory.

With B viewed as (D, r, n), which its memory is, flat column `k*n + b` is `[:, k, b]`, so `dW = sum over k of
B[:, k] (lam[k] * gamma) A[k]` meets the scaled A row by row, without gathers: a kernel makes the part (n, columns) of
the scaled A for one k where it multiplies it. Compiled by Triton on GPU and by Mosaic on TPU, interpreted elsewhere.
No GPU or TPU has run them yet: tests interpret them on CPU and lower them for both.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton
from jaxtyping import Array

from randlora_jax.products import Operands, Update
from randlora_jax.scaling import FactorGrads

Ref = Any
Sides = tuple[Any, Any]  # of D and of d: sizes, or traced indices
GPU_TILE, TPU_TILE, SMALLEST_TILE = 64, 128, 16
PARAMS = {"gpu": triton.CompilerParams(num_warps=4, num_stages=2), "tpu": pltpu.CompilerParams()}


def fold(weight: Array | None, operands: Operands, update: Update, result: np.dtype) -> Array:
    """W + dW or dW in the dtype `result`, as `products.fold`."""
    rows, columns = operands.bases_B.shape[0], operands.bases_A.shape[1]
    if weight is None:
        weight = jnp.zeros((columns, rows) if update.transposed else (rows, columns), result)
    return _on_platform(functools.partial(_fold, update=update, result=result), weight, operands)


def project(operands: Operands, grad: Array, update: Update) -> FactorGrads:
    """Gradients of lambda and gamma in float32, as `products.project`."""
    return _on_platform(functools.partial(_project, update=update), operands, grad)


def _on_platform(compute: Callable[..., Any], *arguments: Any) -> Any:
    gpu = functools.partial(compute, target="gpu", interpret=False)
    tpu = functools.partial(compute, target="tpu", interpret=False)
    other = functools.partial(compute, target="gpu", interpret=True)
    return jax.lax.platform_dependent(*arguments, cuda=gpu, rocm=gpu, tpu=tpu, default=other)


# The kernels' parts: b is a tile (rows, n) of B for one k, lam a column (n, 1), a and gamma rows (1 and n, columns).


def _scaled(a: Array, lam: Array, gamma: Array) -> Array:
    return lam * (a * gamma)


def _dot(x: Array, y: Array, axes: tuple[int, int], dtype: np.dtype) -> Array:
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x.astype(dtype), y.astype(dtype), numbers, preferred_element_type=jnp.float32)


def _operand_dtype(update: Update) -> np.dtype:
    return update.dtype or np.dtype(np.float32)


def _write_folded(weight: Ref, out: Ref, delta: Array, update: Update) -> None:
    delta = update.scaling * (delta.T if update.transposed else delta)
    out[...] = (weight[...].astype(jnp.float32) + delta).astype(out.dtype)


def _fold_on_gpu(weight: Ref, A: Ref, B: Ref, lam: Ref, gamma: Ref, out: Ref, *, update: Update, chunk: int) -> None:
    r, n = lam.shape
    dtype = _operand_dtype(update)

    def add(step: Array, total: Array) -> Array:
        k, part = jax.lax.div(step, n // chunk), pl.ds(jax.lax.rem(step, n // chunk) * chunk, chunk)
        scaled = _scaled(A[k, :][None, :], lam[k, part][:, None], gamma[part, :])
        return total + _dot(B[:, k, part], scaled, (1, 0), dtype)

    start = jnp.zeros((B.shape[0], A.shape[1]), jnp.float32)
    _write_folded(weight, out, jax.lax.fori_loop(0, r * (n // chunk), add, start), update)


def _fold_on_tpu(weight: Ref, A: Ref, B: Ref, lam: Ref, gamma: Ref, out: Ref, total: Ref, *, update: Update) -> None:
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    total[...] += _dot(B[...], _scaled(A[...], lam[...], gamma[...]), (1, 0), _operand_dtype(update))

    @pl.when(k == pl.num_programs(2) - 1)
    def _() -> None:
        _write_folded(weight, out, total[...], update)


def _project_on_gpu(
    A: Ref, B: Ref, lam: Ref, gamma: Ref, grad: Ref, grad_lam: Ref, grad_gamma: Ref, *, update: Update, rows: int
) -> None:
    dtype = _operand_dtype(update)

    def tile(i: Array, k: Array) -> Array:
        part = pl.ds(i * rows, rows)
        return _dot(B[part, k, :], grad[:, part].T if update.transposed else grad[part, :], (0, 0), dtype)

    def add(k: Array, total: Array) -> Array:
        start = jnp.zeros(gamma.shape, jnp.float32)
        projected = jax.lax.fori_loop(0, B.shape[0] // rows, lambda i, sums: sums + tile(i, k), start)
        weighted = update.scaling * projected * A[k, :][None, :]
        grad_lam[k, :] = jnp.sum(weighted * gamma[...], axis=1)
        return total + weighted * lam[k, :][:, None]

    grad_gamma[...] = jax.lax.fori_loop(0, lam.shape[0], add, jnp.zeros(gamma.shape, jnp.float32))


def _project_on_tpu(
    A: Ref, B: Ref, lam: Ref, gamma: Ref, grad: Ref, grad_lam: Ref, grad_gamma: Ref, projected: Ref, *, update: Update
) -> None:
    k, i = pl.program_id(1), pl.program_id(2)

    @pl.when(i == 0)
    def _() -> None:
        projected[...] = jnp.zeros_like(projected)

    tile = grad[...].T if update.transposed else grad[...]
    projected[...] += _dot(B[...], tile, (0, 0), _operand_dtype(update))

    @pl.when((k == 0) & (i == 0))
    def _() -> None:
        grad_gamma[...] = jnp.zeros_like(grad_gamma)

    @pl.when(i == pl.num_programs(2) - 1)
    def _() -> None:
        weighted = update.scaling * projected[...] * A[...]
        grad_lam[...] = jnp.sum(weighted * gamma[...], axis=1, keepdims=True)
        grad_gamma[...] += weighted * lam[...]


# Their calls


class _Tiles:
    """An adapter's operands cut into tiles: in float32, B as it is stored, padded by zeros, which add nothing."""

    def __init__(self, operands: Operands, update: Update, target: str):
        A, B, lam, gamma = operands
        r, n = lam.shape
        self.transposed, self.on_tpu = update.transposed, target == "tpu"
        self.sizes = B.shape[0], A.shape[1]  # D, d
        most = TPU_TILE if self.on_tpu else GPU_TILE
        rows, columns = (min(most, max(SMALLEST_TILE, _power_of_two(size))) for size in self.sizes)
        self.tile: Sides = (rows, columns)
        # Triton wants powers of two everywhere; Mosaic takes whatever is a whole side of the array.
        self.chunk = n if self.on_tpu else 32 if n % 32 == 0 else SMALLEST_TILE
        A, lam, gamma = (part.astype(jnp.float32) for part in (A, lam, gamma))
        self.A, self.lam = _padded(A, 1, self.tile[1]), _padded(lam, 1, self.chunk)
        self.B = _padded(B.reshape(-1, r, n), self.tile[0], 1, self.chunk)
        self.gamma = _padded(gamma, self.chunk, self.tile[1])
        self.r, self.n = self.lam.shape
        self.grid = self.B.shape[0] // self.tile[0], self.A.shape[1] // self.tile[1]
        if self.on_tpu:  # k first: a block may take one of it, not one of the last two axes
            self.A, self.B, self.lam = self.A[:, None], self.B.swapaxes(0, 1), self.lam[:, :, None]

    def padded(self, matrix: Array) -> Array:
        """A matrix in the update's orientation, of whole tiles."""
        return _padded(matrix, *self.oriented(self.tile))

    def cut(self, matrix: Array) -> Array:
        """The same without its padding."""
        rows, columns = self.oriented(self.sizes)
        return matrix[:rows, :columns]

    def oriented(self, sides: Sides) -> Sides:
        """Sides (of D, of d) in the update's orientation."""
        return sides[::-1] if self.transposed else sides

    def spec(self, index: Callable[..., Sides], sides: Sides | None = None) -> pl.BlockSpec:
        """Blocks of a matrix in the update's orientation; `index` gives those of D and d."""
        return pl.BlockSpec(self.oriented(sides or self.tile), lambda *grid: self.oriented(index(*grid)))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _padded(array: Array, *multiples: int) -> Array:
    """Zeros up to multiples of these sizes; the array itself where there is nothing to add."""
    return jnp.pad(array, [(0, -size % multiple) for size, multiple in zip(array.shape, multiples, strict=True)])


def _fold(
    weight: Array, operands: Operands, *, update: Update, result: np.dtype, target: str, interpret: bool
) -> Array:
    tiles = _Tiles(operands, update, target)
    (rows, columns), r, n = tiles.tile, tiles.r, tiles.n
    matrix = tiles.spec(lambda i, j, *k: (i, j))
    weight = tiles.padded(weight)
    options: dict[str, Any] = {
        "out_shape": jax.ShapeDtypeStruct(weight.shape, result),
        "out_specs": matrix,
        "interpret": interpret,
        "compiler_params": None if interpret else PARAMS[target],
    }
    if tiles.on_tpu:
        kernel = functools.partial(_fold_on_tpu, update=update)
        options |= {"grid": (*tiles.grid, r), "scratch_shapes": [pltpu.VMEM(tiles.tile, jnp.float32)]}
        specs = [
            pl.BlockSpec((None, 1, columns), lambda i, j, k: (k, 0, j)),
            pl.BlockSpec((None, rows, n), lambda i, j, k: (k, i, 0)),
            pl.BlockSpec((None, n, 1), lambda i, j, k: (k, 0, 0)),
            pl.BlockSpec((n, columns), lambda i, j, k: (0, j)),
        ]
    else:
        kernel = functools.partial(_fold_on_gpu, update=update, chunk=tiles.chunk)
        options |= {"grid": tiles.grid}
        specs = [
            pl.BlockSpec((r, columns), lambda i, j: (0, j)),
            pl.BlockSpec((rows, r, n), lambda i, j: (i, 0, 0)),
            pl.BlockSpec((r, n), lambda i, j: (0, 0)),
            pl.BlockSpec((n, columns), lambda i, j: (0, j)),
        ]
    call = pl.pallas_call(kernel, in_specs=[matrix, *specs], **options)
    return tiles.cut(call(weight, tiles.A, tiles.B, tiles.lam, tiles.gamma))


def _project(operands: Operands, grad: Array, *, update: Update, target: str, interpret: bool) -> FactorGrads:
    tiles = _Tiles(operands, update, target)
    (rows, columns), r, n, chunk = tiles.tile, tiles.r, tiles.n, tiles.chunk
    across = tiles.grid[1]
    options: dict[str, Any] = {"interpret": interpret, "compiler_params": None if interpret else PARAMS[target]}
    # The gradient of lambda is a sum over columns: a part from each tile of them.
    shapes = [(across, *tiles.lam.shape), tiles.gamma.shape]
    options["out_shape"] = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    if tiles.on_tpu:
        kernel = functools.partial(_project_on_tpu, update=update)
        options |= {"grid": (across, r, tiles.grid[0]), "scratch_shapes": [pltpu.VMEM((n, columns), jnp.float32)]}
        options["out_specs"] = [
            pl.BlockSpec((None, None, n, 1), lambda j, k, i: (j, k, 0, 0)),
            pl.BlockSpec((n, columns), lambda j, k, i: (0, j)),
        ]
        specs = [
            pl.BlockSpec((None, 1, columns), lambda j, k, i: (k, 0, j)),
            pl.BlockSpec((None, rows, n), lambda j, k, i: (k, i, 0)),
            pl.BlockSpec((None, n, 1), lambda j, k, i: (k, 0, 0)),
            pl.BlockSpec((n, columns), lambda j, k, i: (0, j)),
            tiles.spec(lambda j, k, i: (i, j)),
        ]
    else:
        long = tiles.B.shape[0]
        kernel = functools.partial(_project_on_gpu, update=update, rows=rows)
        options |= {"grid": (across, n // chunk)}
        options["out_specs"] = [
            pl.BlockSpec((None, r, chunk), lambda j, b: (j, 0, b)),
            pl.BlockSpec((chunk, columns), lambda j, b: (b, j)),
        ]
        specs = [
            pl.BlockSpec((r, columns), lambda j, b: (0, j)),
            pl.BlockSpec((long, r, chunk), lambda j, b: (0, 0, b)),
            pl.BlockSpec((r, chunk), lambda j, b: (0, b)),
            pl.BlockSpec((chunk, columns), lambda j, b: (b, j)),
            tiles.spec(lambda j, b: (0, j), (long, columns)),
        ]
    call = pl.pallas_call(kernel, in_specs=specs, **options)
    grad_lam, grad_gamma = call(tiles.A, tiles.B, tiles.lam, tiles.gamma, tiles.padded(grad))
    parts, (r, n), d = grad_lam.sum(0), operands.lam.shape, tiles.sizes[1]
    return FactorGrads(parts.reshape(r, -1)[:, :n], grad_gamma[:n, :d])
