"""x times W + dW by the cheaper contraction plan (`interop.plans`), with hand-written gradients.

Backward keeps x and the arguments, from which it rebuilds the scaled A or W + dW: behind an optimization barrier, as
XLA would otherwise find that forward made the same and keep it. The forward rule learns which of x and W are being
differentiated, so nothing is computed for one that is not, also outside of jit.
"""

import dataclasses
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from interop.plans import ACCELERATOR_BALANCE, CPU_BALANCE, Contraction, Plan, check_plan, choose_plan
from interop.shapes import check_factor_shapes
from randlora_jax.gradients import check_kernels, fold, project
from randlora_jax.products import Operands, Update, operand_grads, product
from randlora_jax.scaling import compute_dtype, scale_bases


class _Static(NamedTuple):
    """What the rules are told besides arrays; see `adapted_linear`."""

    shape: tuple[int, int]  # (in, out)
    scaling: float
    plan: str
    keep_weight: bool
    dtype: np.dtype | None
    kernels: str

    @property
    def short_input(self) -> bool:
        """Whether dW is (d, D) as (in, out)."""
        return self.shape[0] <= self.shape[1]

    @property
    def update(self) -> Update:
        return Update(self.scaling, self.dtype, self.short_input, self.kernels)

    def choose(self, x: Any, weight: Any, operands: Operands, *, needs_input_grad: bool = True) -> Plan:
        """The plan of each pass, from shapes alone."""
        layer = Contraction(
            shape=self.shape[::-1],
            r=operands.lam.shape[0],
            tokens=math.prod(x.shape[:-1]),
            frozen=weight is not None,
            needs_input_grad=needs_input_grad,
            keeps_weight=self.keep_weight,
        )
        # Of the default device, not of the one that it will run on: the wrong choice costs time only.
        balance = CPU_BALANCE if jax.default_backend() == "cpu" else ACCELERATOR_BALANCE
        return choose_plan(self.plan, layer, itemsize=x.dtype.itemsize, balance=balance)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Backward:
    """What the forward rule decides about backward."""

    folds: bool
    needs_input: bool
    needs_weight: bool


class _Residuals(NamedTuple):
    """What is kept: the arguments, and W + dW if that was asked for."""

    x: Any
    weight: Any
    operands: Operands
    folded: Any
    backward: _Backward


def _last_with(axis: int, x: Array, weight: Array) -> Array:
    """The layer's own product, as `nnx.Linear` and `nn.Dense` write it."""
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (axis,)), ((), ())))


def _folded(x: Array, weight: Array | None, operands: Operands, static: _Static) -> Array:
    """W + dW in x's dtype; dW alone in that of the products, as `apply_delta` rounds nothing but its result."""
    products_dtype = static.dtype or compute_dtype(operands.lam, operands.gamma)
    return fold(weight, operands, static.update, products_dtype if weight is None else x.dtype)


def _times_folded(axis: int, x: Array, folded: Array) -> Array:
    return _last_with(axis, x.astype(folded.dtype), folded).astype(x.dtype)


def _rows(x: Array, dtype: np.dtype) -> Array:
    return x.reshape(-1, x.shape[-1]).astype(dtype)


def _weight_grad(x: Array, grad: Array) -> Array:
    """`x^T dy`, (in, out), summed in float32 or wider."""
    return product(_rows(x, x.dtype), _rows(grad, grad.dtype), (0, 0))


def _factored(x: Array, weight: Array | None, operands: Operands, static: _Static) -> Array:
    """`x W + (x U) B`, the branch beside the layer's own product."""
    A, B, lam, gamma = operands.computed(static.dtype)
    scaled_A, rows = scale_bases(A, lam, gamma), _rows(x, B.dtype)
    if static.short_input:  # y = (x U^T) B^T
        branch = product(product(rows, scaled_A, (1, 1)), B, (1, 1))
    else:  # y = (x B) U
        branch = product(product(rows, B, (1, 0)), scaled_A, (1, 0))
    branch = static.scaling * branch.reshape(*x.shape[:-1], static.shape[1])
    if weight is None:
        return branch.astype(x.dtype)
    y = _last_with(0, x, weight.astype(x.dtype))
    return (y.astype(jnp.promote_types(y.dtype, branch.dtype)) + branch).astype(y.dtype)


def _forward(x: Array, weight: Array | None, operands: Operands, static: _Static) -> tuple[Array, Array | None]:
    """y, and W + dW if it was made."""
    if not static.choose(x, weight, operands).fold_forward:
        return _factored(x, weight, operands, static), None
    folded = _folded(x, weight, operands, static)
    return _times_folded(0, x, folded), folded


def _fwd(x: Any, weight: Any, operands: Operands, static: _Static) -> tuple[Array, _Residuals]:
    needs = _Backward(False, x.perturbed, weight is not None and weight.perturbed)
    x, weight, operands = jax.tree.map(lambda leaf: leaf.value, (x, weight, operands), is_leaf=_is_primal)
    plan = static.choose(x, weight, operands, needs_input_grad=needs.needs_input)
    y, folded = _forward(x, weight, operands, static)
    kept = folded if static.keep_weight and plan.fold_backward and needs.needs_input else None
    return y, _Residuals(x, weight, operands, kept, dataclasses.replace(needs, folds=plan.fold_backward))


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _bwd(static: _Static, kept: _Residuals, grad: Array) -> tuple[Array | None, Array | None, Operands]:
    # Not the bases, which all layers share: what is made of them alone may be made once.
    lam, gamma, grad = jax.lax.optimization_barrier((kept.operands.lam, kept.operands.gamma, grad))
    kept = kept._replace(operands=kept.operands._replace(lam=lam, gamma=gamma))
    return (_folded_grads if kept.backward.folds else _factored_grads)(static, kept, grad)


def _folded_grads(static: _Static, kept: _Residuals, grad: Array) -> tuple[Array | None, Array | None, Operands]:
    x, weight, operands, folded, needs = kept
    grad_weight = _weight_grad(x, grad)
    grads = Operands(None, None, *project(operands, grad_weight, static.update))
    grad_x = None
    if needs.needs_input:
        grad_x = _times_folded(1, grad, _folded(x, weight, operands, static) if folded is None else folded)
    return grad_x, grad_weight.astype(weight.dtype) if needs.needs_weight else None, grads


def _factored_grads(static: _Static, kept: _Residuals, grad: Array) -> tuple[Array | None, Array | None, Operands]:
    x, weight, operands, _, needs = kept
    A, B, lam, gamma = operands.computed(static.dtype)
    scaled_A = scale_bases(A, lam, gamma)
    rows_x, rows_g = _rows(x, B.dtype), _rows(grad, B.dtype)
    if static.short_input:  # y = (x U^T) B^T
        hidden, back = product(rows_g, B, (1, 0)), (scaled_A, (1, 0))  # hidden: (T, n*r)
        grad_scaled_A = product(hidden, rows_x, (0, 0))
    else:  # y = (x B) U
        hidden, back = product(rows_g, scaled_A, (1, 1)), (B, (1, 1))
        grad_scaled_A = product(product(rows_x, B, (1, 0)), rows_g, (0, 0))
    grads = Operands(None, None, *operand_grads(operands, static.scaling * grad_scaled_A))
    grad_x = grad_weight = None
    if needs.needs_input:
        grad_x = static.scaling * product(hidden, *back)
        if weight is not None:
            grad_x = grad_x + _last_with(1, _rows(grad, x.dtype), weight.astype(x.dtype))
        grad_x = grad_x.reshape(x.shape).astype(x.dtype)
    if needs.needs_weight:
        grad_weight = _weight_grad(x, grad).astype(weight.dtype)
    return grad_x, grad_weight, grads


_linear = jax.custom_vjp(lambda *arguments: _forward(*arguments)[0], nondiff_argnums=(3,))
_linear.defvjp(_fwd, _bwd, symbolic_zeros=True)


def adapted_linear(
    x: Float[Array, "*batch inputs"],
    kernel: Float[Array, "inputs outputs"],
    bases_A: Float[Array, "r d"],
    bases_B: Num[Array, "D n r"],
    lam: Float[Array, "r n"],
    gamma: Float[Array, "n d"],
    *,
    scaling: float,
    plan: str = "auto",
    keep_weight: bool = False,
    dtype: DTypeLike | None = None,
    kernels: str = "xla",
) -> Float[Array, "*batch outputs"]:
    """`x @ (W + dW)` for a kernel (in, out), as Flax stores it, in x's dtype; differentiable in all but the bases.

        A, B = layer_bases(bases, (out_features, in_features))
        y = adapted_linear(x, kernel, A, B, *factors, scaling=config.scaling)

    Args:
        x: Inputs; the layer's own product is computed in their dtype.
        kernel: The frozen W, perhaps in another dtype than x. Its gradient `x.T @ dy` is computed if asked for.
        bases_A: See `layer_bases`; so is bases_B. Pass them to jitted functions as arguments.
        bases_B: See bases_A.
        lam: See `delta_weight`; so is gamma.
        gamma: See lam.
        scaling: `config.scaling`.
        plan: "factored" multiplies x with the bases beside W, cheaper for few rows of x; "folded" makes W + dW first,
            cheaper for many. "auto" takes for forward and for backward what costs less by the shapes, as this function
            sees them: inside `jax.vmap` the rows of one example, on a mesh those of all devices. Results are the same
            up to rounding.
        keep_weight: Keep a W + dW that forward made for backward, instead of making it again: less time, more memory.
        dtype: What the factors of the products with the bases are rounded to, see `delta_weight`.
        kernels: What makes W + dW and its gradients where that is the plan, see `delta_weight`.

    Raises:
        ValueError: the shapes do not fit each other, x or the kernel has an unfit dtype, the plan or the kernels are
            not known, or kernels="pallas" is given float64.
    """
    if x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"x has {x.shape[-1]} features, but a kernel of shape {kernel.shape}, which is (in, out), takes"
            f" {kernel.shape[0]}: pass the transposed kernel if it is (out, in)."
        )
    check_holds_update(kernel)
    shape = cast(tuple[int, int], kernel.shape)
    static = _Static(shape, scaling, plan, keep_weight, None if dtype is None else np.dtype(dtype), kernels)
    return _checked_linear(x, kernel, Operands(bases_A, bases_B, lam, gamma), static)


def apply_delta(
    x: Float[Array, "*batch inputs"],
    bases_A: Float[Array, "r d"],
    bases_B: Num[Array, "D n r"],
    lam: Float[Array, "r n"],
    gamma: Float[Array, "n d"],
    *,
    out_features: int,
    scaling: float,
    plan: str = "auto",
) -> Float[Array, "*batch outputs"]:
    """`x @ dW.T` for a layer with weight (out, in), without its own product; see `adapted_linear` for the plan.

    The result has the dtype of x; the products are summed in float32 or wider, as `delta_weight` with dtype=None.

    Raises:
        ValueError: the shapes do not fit each other, x is not floating point, or the plan is not known.
    """
    static = _Static((x.shape[-1], out_features), scaling, plan, keep_weight=False, dtype=None, kernels="xla")
    return _checked_linear(x, None, Operands(bases_A, bases_B, lam, gamma), static)


def _checked_linear(x: Array, weight: Array | None, operands: Operands, static: _Static) -> Array:
    check_factor_shapes(*(part.shape for part in operands))
    check_plan(static.plan)
    check_kernels(static.kernels, operands)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}: pass floating point inputs.")
    long, short = operands.bases_B.shape[0], operands.bases_A.shape[-1]
    if sorted(static.shape) != [short, long]:
        raise ValueError(
            f"a layer of shape {static.shape[::-1]} does not fit bases for a {long} x {short} layer:"
            " slice them with layer_bases(bases, (out, in))."
        )
    return _linear(x, weight, operands, static)


def check_holds_update(kernel: Any) -> None:
    """Raise a ValueError if a kernel is not of a floating point dtype of at least 16 bits."""
    if not jnp.issubdtype(kernel.dtype, jnp.floating) or kernel.dtype.itemsize < 2:
        raise ValueError(f"a kernel of dtype {kernel.dtype} cannot hold W + dW: dequantize it to float first.")
