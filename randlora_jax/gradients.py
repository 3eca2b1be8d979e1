"""The update with hand-written gradients: backward keeps lambda and gamma, never the scaled bases, which it rebuilds.

A and B are frozen: their cotangent is a symbolic zero, so XLA never computes a gradient for them. The forward rules
call the plain formulas, so that forward mode works on top of reverse mode: `jax.hessian`, `jax.jvp` of a gradient.
"""

import functools
import importlib
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from interop.shapes import check_factor_shapes
from randlora_jax import products
from randlora_jax.products import Operands, Update
from randlora_jax.scaling import FactorGrads, compute_dtype

KERNELS = ("xla", "pallas")


def fold(weight: Array | None, operands: Operands, update: Update, result: np.dtype | None = None) -> Array:
    """`products.fold`, by the kernels of the update."""
    if update.kernels == "xla":
        return products.fold(weight, operands, update, result)
    return _pallas_fold(weight, operands, update, result or np.dtype(np.float32))


def project(operands: Operands, grad: Array, update: Update) -> FactorGrads:
    """`products.project`, by the kernels of the update."""
    return (products.project if update.kernels == "xla" else _pallas_project)(operands, grad, update)


def _pallas_kernels() -> Any:
    """The kernels' module: importing Pallas takes half a second, which others need not wait."""
    return importlib.import_module("randlora_jax.pallas_kernels")


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _pallas_fold(weight: Array | None, operands: Operands, update: Update, result: np.dtype) -> Array:
    return _pallas_kernels().fold(weight, operands, update, result)


@_pallas_fold.defjvp
def _pallas_fold_jvp(update: Update, result: np.dtype, primals: Any, tangents: Any) -> tuple[Array, Any]:
    formula = functools.partial(products.fold, update=update, result=result)
    return _pallas_fold(*primals, update, result), jax.jvp(formula, primals, tangents)[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _pallas_project(operands: Operands, grad: Array, update: Update) -> FactorGrads:
    grads = _pallas_kernels().project(operands, grad, update)
    return FactorGrads(grads.lam.astype(operands.lam.dtype), grads.gamma.astype(operands.gamma.dtype))


@_pallas_project.defjvp
def _pallas_project_jvp(update: Update, primals: Any, tangents: Any) -> tuple[FactorGrads, Any]:
    formula = functools.partial(products.project, update=update)
    return _pallas_project(*primals, update), jax.jvp(formula, primals, tangents)[1]


def check_kernels(kernels: str, operands: Operands) -> None:
    """Raise a ValueError if these are no kernels, or cannot compute with these operands."""
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r} is not known: choose one of {list(KERNELS)}.")
    if kernels == "pallas" and compute_dtype(operands.lam, operands.gamma) != np.float32:
        raise ValueError("kernels='pallas' computes in float32, but lambda or gamma is float64: use kernels='xla'.")


def _delta_weight_fwd(operands: Operands, update: Update) -> tuple[Array, Operands]:
    return fold(None, operands, update), operands


def _delta_weight_bwd(update: Update, operands: Operands, grad: Array) -> tuple[Operands]:
    return (Operands(None, None, *project(operands, grad, update)),)


_delta_weight = jax.custom_vjp(lambda operands, update: fold(None, operands, update), nondiff_argnums=(1,))
_delta_weight.defvjp(_delta_weight_fwd, _delta_weight_bwd)


def delta_weight(
    bases_A: Float[Array, "r d"],
    bases_B: Num[Array, "D n r"],
    lam: Float[Array, "r n"],
    gamma: Float[Array, "n d"],
    *,
    scaling: float,
    dtype: DTypeLike | None = None,
    transposed: bool = False,
    kernels: str = "xla",
) -> Float[Array, "rows columns"]:
    """Dense update `scaling * B (lam * A * gamma)`, long side first, in PEFT's pairing of flat indices.

    Row q of the scaled A, counted as `k*n + b`, meets column q of B, counted as `basis*r + rank`: the sum of
    arXiv:2502.00987 up to a fixed shuffle of random columns. Costs O(D n r d) time and a (D, d) result, in float32 or
    wider. Differentiable in lam and gamma.

    Args:
        bases_A: See `layer_bases`; so is bases_B.
        bases_B: May be stored in any dtype, such as int8.
        lam: Applied to A in float32 or wider, as gamma is.
        gamma: See lam.
        scaling: `config.scaling`.
        dtype: What the factors of the large product are rounded to; it is summed in float32 or wider all the same.
            None: what jax rounds float32 operands to (`jax.default_matmul_precision`), nothing on CPU.
        transposed: Give (d, D) instead, straight from the product.
        kernels: "pallas" never writes the scaled A to memory, forward or backward (`pallas_kernels`), but no GPU or TPU
            has run it yet. "xla", the default, is a scaling and a matrix product.

    Raises:
        ValueError: the shapes do not fit each other, or the kernels are not known or cannot take float64.
    """
    operands = Operands(bases_A, bases_B, lam, gamma)
    check_factor_shapes(*(part.shape for part in operands))
    check_kernels(kernels, operands)
    return _delta_weight(operands, Update(scaling, None if dtype is None else np.dtype(dtype), transposed, kernels))
