"""`x (W + dW)^T` of one layer, factored or folded: see `interop.plans` for the plans and what they cost.

Backward keeps x, lambda and gamma. What else it needs it makes again: the scaled A, or W' = W + dW.
"""

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import linear

from interop.plans import ACCELERATOR_BALANCE, CPU_BALANCE, Contraction, Plan, choose_plan
from interop.shapes import check_factor_shapes
from randlora_torch.fused import fold, on_gpu
from randlora_torch.gradients import Operands, add_product, no_autocast, product_dtype
from randlora_torch.packed import Packed4bit, Rows8bit
from randlora_torch.sparse import PRODUCT_PRICE, SparseBasis, is_sparse_usable


@runtime_checkable
class Quantized(Protocol):
    """A frozen weight that is no matrix of floating point numbers as it is stored."""

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "outputs inputs"]:
        """The weight in a new tensor, which the caller may change."""

    def packed(self) -> Packed4bit | Rows8bit:
        """The weight as Triton's kernels read it."""


class _Call(NamedTuple):
    """What a call is told besides tensors.

    Attributes:
        tall: Whether dW has at least as many rows (outputs) as columns (inputs).
        scaling: What dW is multiplied by.
        dtype: Of the products, and so of the result.
        plan: Where W' is made.
        quantized: The frozen weight, if it is no tensor.
        sparse: B once more, if it is mostly zeros.
    """

    tall: bool
    scaling: float
    dtype: torch.dtype
    plan: Plan
    quantized: Quantized | None = None
    sparse: SparseBasis | None = None

    def frozen(self, weight: Tensor | None) -> Tensor | None:
        """The frozen weight in floating point."""
        return weight if self.quantized is None else self.quantized.dense(self.dtype)

    def fold(self, weight: Tensor | None, operands: Operands) -> Tensor:
        """W' (out, in)."""

        def by_torch(lam: Tensor, gamma: Tensor) -> Tensor:
            drawn, frozen = operands._replace(lam=lam, gamma=gamma), self.frozen(weight)
            if self.sparse is not None and is_sparse_usable(self.dtype):
                return self.sparse.add_product(frozen, drawn.scaled_A(self.scaling, self.dtype), self.tall)
            left, right = drawn.matrices(self.scaling, self.dtype, self.tall)
            return add_product(frozen, left, right, in_place=self.quantized is not None)

        if not on_gpu(operands.lam):
            return by_torch(operands.lam, operands.gamma)
        stored = weight if self.quantized is None else self.quantized.packed()
        options: dict[str, Any] = {"out_features": operands.side(self.tall), "scaling": self.scaling}
        return fold(stored, *operands, **options, dtype=self.dtype, torch_way=by_torch)


class _AdaptedLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        bases_A: Tensor,
        bases_B: Tensor,
        lam: Tensor,
        gamma: Tensor,
        call: _Call,
    ) -> Tensor:
        operands = Operands(bases_A, bases_B, lam, gamma)
        with no_autocast(x):
            rows, bias = x.to(call.dtype), None if bias is None else bias.to(call.dtype)
            if call.plan.fold_forward:
                return linear(rows, call.fold(weight, operands), bias)
            left, right = operands.matrices(call.scaling, call.dtype, call.tall)
            hidden, frozen = rows @ right.T, call.frozen(weight)
            if frozen is None:
                return linear(hidden, left, bias)
            return _plus_product(linear(rows, frozen.to(call.dtype), bias), hidden, left.T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, *operands, ctx.call = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, *operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *operands = ctx.saved_tensors
        call: _Call = ctx.call
        backward = _folded_backward if call.plan.fold_backward else _factored_backward
        needs_x, needs_weight, needs_bias, _, _, *needs_factors, _ = ctx.needs_input_grad
        needs = _Needs(needs_x, needs_weight, any(needs_factors))
        with no_autocast(x):
            rows_x = x.reshape(-1, x.shape[-1]).to(call.dtype)  # (T, in)
            rows_g = grad.reshape(-1, grad.shape[-1]).to(call.dtype)  # (T, out)
            grads = backward(rows_x, rows_g, weight, Operands(*operands), call, needs)
            grad_x = None if grads.x is None else grads.x.reshape(x.shape).to(x.dtype)
            grad_weight = grads.weight.to(weight.dtype) if needs_weight and grads.weight is not None else None
            grad_bias = rows_g.sum(0).to(ctx.bias_dtype) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None, *grads.factors, None


class _Needs(NamedTuple):
    x: bool
    weight: bool
    factors: bool


class _Grads(NamedTuple):
    x: Tensor | None
    weight: Tensor | None
    factors: tuple[Tensor | None, Tensor | None]


def _folded_backward(
    x: Tensor, grad: Tensor, weight: Tensor | None, operands: Operands, call: _Call, needs: _Needs
) -> _Grads:
    grad_x = grad @ call.fold(weight, operands) if needs.x else None
    if not (needs.weight or needs.factors):
        return _Grads(grad_x, None, (None, None))
    grad_weight = grad.T @ x  # (out, in)
    return _Grads(grad_x, grad_weight, operands.project(grad_weight, call.scaling, call.tall, call.sparse))


def _factored_backward(
    x: Tensor, grad: Tensor, weight: Tensor | None, operands: Operands, call: _Call, needs: _Needs
) -> _Grads:
    left, right = operands.matrices(call.scaling, call.dtype, call.tall)
    grad_x: Tensor | None = None
    factors: tuple[Tensor | None, Tensor | None] = (None, None)
    if needs.x or call.tall:
        hidden = grad @ left  # (T, k)
    if needs.x:
        grad_x, frozen = hidden @ right, call.frozen(weight)
        grad_x = grad_x if frozen is None else _plus_product(grad_x, grad, frozen.to(call.dtype))
    if needs.factors:  # y = (x U^T) B^T, or (x B) U
        grad_scaled_A = hidden.T @ x if call.tall else (x @ right.T).T @ grad
        factors = operands.grads(grad_scaled_A, call.scaling)
    return _Grads(grad_x, grad.T @ x if needs.weight else None, factors)


def _plus_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`total + left @ right`, in place of a total that nobody else has, where it can be."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or total.numel() == 0:
        return total + left @ right
    return total.view(-1, total.shape[-1]).addmm_(left.reshape(-1, left.shape[-1]), right).view(total.shape)


class _FoldedWeight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor | None, bases_A: Tensor, bases_B: Tensor, lam: Tensor, gamma: Tensor, call: _Call
    ) -> Tensor:
        with no_autocast(lam):
            return call.fold(weight, Operands(bases_A, bases_B, lam, gamma))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, *operands, ctx.call = inputs
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        with no_autocast(grad):
            factors = Operands(*ctx.saved_tensors).project(grad, call.scaling, call.tall, call.sparse)
        grad_weight = grad.to(ctx.weight_dtype) if ctx.needs_input_grad[0] else None
        return grad_weight, None, None, *factors, None


def folded_weight(
    weight: Float[Tensor, "outputs inputs"] | Quantized | None,
    bases_A: Float[Tensor, "r d"],
    bases_B: Shaped[Tensor, "D n r"],
    lam: Float[Tensor, "r n"],
    gamma: Float[Tensor, "n d"],
    *,
    out_features: int,
    scaling: float,
    dtype: torch.dtype,
    sparse: SparseBasis | None = None,
) -> Float[Tensor, "outputs inputs"]:
    """`W' = W + dW` (out, in) in `dtype`, in one buffer; None for W gives dW. Differentiable in W, lambda and gamma.

    Backward keeps lambda and gamma, and takes the gradient of W' in any dtype: that of a sum over micro-batches may be
    wider than W'.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    check_factor_shapes(bases_A.shape, bases_B.shape, lam.shape, gamma.shape)
    if out_features not in (bases_B.shape[0], bases_A.shape[-1]):
        raise ValueError(f"out_features={out_features}: the bases are for {bases_B.shape[0]} or {bases_A.shape[-1]}.")
    call = _Call(out_features == bases_B.shape[0], scaling, dtype, Plan(True, True), sparse=sparse)
    weight, call = _split(weight, call)
    return _FoldedWeight.apply(weight, bases_A, bases_B, lam, gamma, call)


def adapted_linear(
    x: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "outputs inputs"] | Quantized | None,
    bias: Float[Tensor, " outputs"] | None,
    bases_A: Float[Tensor, "r d"],
    bases_B: Shaped[Tensor, "D n r"],
    lam: Float[Tensor, "r n"],
    gamma: Float[Tensor, "n d"],
    *,
    out_features: int,
    scaling: float,
    plan: str = "auto",
    keep_weight: bool = False,
    dtype: torch.dtype | None = None,
    sparse: SparseBasis | None = None,
) -> Float[Tensor, "*batch outputs"]:
    """`x @ (W + dW).T + bias`; without W, the update alone. Differentiable in all but the bases.

    Args:
        x: Inputs; T rows in all.
        weight: The frozen W. A float32 W meets dW before it is rounded to a narrower `dtype`.
        bias: Added to the result, or None.
        bases_A: See `layer_bases`; so is bases_B.
        bases_B: May be stored in any dtype, also as integers; it is converted to `dtype` where it is multiplied.
        lam: Applied to A in float32 or wider, as gamma is.
        gamma: See lam.
        out_features: Rows of W.
        scaling: `config.scaling`, times `LayerBases.scale`.
        plan: "factored" multiplies x by the factors of dW, in O(T d^2); "folded" by W' = W + dW, which is as fast as W
            alone once it is made, in O(D d^2). "auto" takes what costs less, in forward and in backward each
            (`interop.plans`); in `torch.export`, whose graph is for any number of rows, "factored".
        keep_weight: Keep a W' made in forward for backward: one product less, D d numbers more.
        dtype: Of the products and the result; by default that of x, or autocast's.
        sparse: B once more, for sparse products where W' is made (`sparse_basis`).

    Raises:
        ValueError: the shapes do not fit each other, x is not floating point, or the plan is unknown.
    """
    check_factor_shapes(bases_A.shape, bases_B.shape, lam.shape, gamma.shape)
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: pass floating point inputs.")
    in_features, long, short = x.shape[-1], bases_B.shape[0], bases_A.shape[-1]
    if (in_features, out_features) not in ((short, long), (long, short)):
        raise ValueError(
            f"a layer of shape ({out_features}, {in_features}) does not fit bases for a {long} x {short} layer:"
            " slice them with layer_bases(bases, (out, in))."
        )
    dtype = dtype or product_dtype(x)
    operands = Operands(bases_A, bases_B, lam, gamma)
    product: dict[str, Any] = {"out_features": out_features, "sparse": sparse, "dtype": dtype}
    chosen = plan_for(x, operands, plan=plan, keep_weight=keep_weight, frozen=weight is not None, **product)
    if keep_weight and chosen == Plan(True, True):
        with no_autocast(x):
            kept = folded_weight(weight, *operands, scaling=scaling, **product)
            return linear(x.to(dtype), kept, None if bias is None else bias.to(dtype))
    call = _Call(out_features >= in_features, scaling, dtype, chosen, sparse=sparse)
    weight, call = _split(weight, call)
    return _AdaptedLinear.apply(x, weight, bias, *operands, call)


def apply_delta(
    x: Float[Tensor, "*batch inputs"],
    bases_A: Float[Tensor, "r d"],
    bases_B: Shaped[Tensor, "D n r"],
    lam: Float[Tensor, "r n"],
    gamma: Float[Tensor, "n d"],
    *,
    out_features: int,
    scaling: float,
    plan: str = "auto",
) -> Float[Tensor, "*batch outputs"]:
    """`x @ dW.T` for a layer with weight (out, in): `adapted_linear` without the layer's own product.

    Raises:
        ValueError: the shapes do not fit each other, x is not floating point, or the plan is unknown.
    """
    options: dict[str, Any] = {"out_features": out_features, "scaling": scaling, "plan": plan}
    return adapted_linear(x, None, None, bases_A, bases_B, lam, gamma, **options)


def plan_for(
    x: Tensor,
    operands: Operands,
    *,
    out_features: int,
    plan: str,
    dtype: torch.dtype,
    keep_weight: bool = False,
    frozen: bool = True,
    sparse: SparseBasis | None = None,
) -> Plan:
    """The plan of `adapted_linear` for these arguments; `frozen`, whether it has a weight."""
    layer = Contraction(
        shape=(out_features, x.shape[-1]),
        r=operands.bases_A.shape[0],
        tokens=x.numel() // x.shape[-1],
        frozen=frozen,
        needs_input_grad=x.requires_grad,
        keeps_weight=keep_weight,
        product_price=1.0 if sparse is None or dtype != torch.float32 else PRODUCT_PRICE,
    )
    balance = CPU_BALANCE if x.device.type == "cpu" else ACCELERATOR_BALANCE
    choose = choose_plan if torch.compiler.is_compiling() else _choose_once
    if plan == "auto" and _is_exporting():
        plan = "factored"
    return choose(plan, layer, itemsize=dtype.itemsize, balance=balance)


_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch >= 2.7
_choose_once = functools.lru_cache(maxsize=4096)(choose_plan)  # a token's way through a model meets each shape often


def _split(weight: Tensor | Quantized | None, call: _Call) -> tuple[Tensor | None, _Call]:
    """A weight as a tensor for autograd to know, or as a part of the call."""
    if weight is None or isinstance(weight, Tensor):
        return weight, call
    return None, call._replace(quantized=weight)
