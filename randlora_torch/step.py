"""W' = W + dW of each layer for a whole optimizer step: made once, its gradient summed and projected once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from randlora_torch.contraction import Quantized, folded_weight
from randlora_torch.gradients import Operands, no_autocast
from randlora_torch.sparse import SparseBasis


class Update(NamedTuple):
    """One adapter's dW of one layer: bases and factors on the device where the layer computes."""

    operands: Operands
    scaling: float
    out_features: int
    sparse: SparseBasis | None = None  # B once more, if it is mostly zeros

    @property
    def options(self) -> dict[str, Any]:
        """What functions of an update are told besides its operands."""
        return {"scaling": self.scaling, "out_features": self.out_features, "sparse": self.sparse}


class Step:
    """The weights of one optimizer step, made where a layer first asks for them.

    Args:
        is_last: Asked in every backward pass, whether it is the step's last: after that, gradients are projected. By
            default nobody is asked, and `project` is called.
    """

    def __init__(self, is_last: Callable[[], bool] | None = None) -> None:
        self._is_last = is_last
        self._weights: dict[Any, StepWeight] = {}
        self._queued = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def linear(self, key: Any, x: Tensor, make: Callable[[], "StepWeight"], bias: Tensor | None) -> Tensor:
        """`x @ W'.T + bias`, over the weight that `make` gives for the first x that comes with this key."""
        if key not in self._weights:
            with torch.inference_mode(False), torch.enable_grad():
                self._weights[key] = make()
        shared = self._weights[key]
        with no_autocast(x):
            rows, bias = x.to(shared.weight.dtype), None if bias is None else bias.to(shared.weight.dtype)
            if torch.is_grad_enabled() and shared.trains:
                return _StepLinear.apply(rows, torch.zeros((), requires_grad=True), bias, shared, self)
            return linear(rows, shared.weight, bias)

    def project(self) -> None:
        """Turn the summed gradients of all W' into gradients of lambda and gamma, and forget the W'.

        Raises:
            RuntimeError: lambda or gamma changed since W' was made.
        """
        weights, self._weights, self._queued = self._weights, {}, False
        tensors, grads = [], []
        for shared in weights.values():
            for tensor, grad in shared.gradients():
                tensors.append(tensor)
                grads.append(grad)
        if tensors:
            torch.autograd.backward(tensors, grads)

    def after_backward(self) -> None:
        """Project at the end of the backward pass that runs now, if it is the last."""
        if self._is_last is not None and self._is_last() and not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self.project)


class StepWeight:
    """W' (out, in) of one layer, and the sum of its gradients in float32 or wider.

    Args:
        weight: The frozen W, or None for dW alone.
        updates: One for each adapter.
        dtype: Of the products.
    """

    def __init__(self, weight: Tensor | Quantized | None, updates: list[Update], dtype: torch.dtype) -> None:
        with torch.no_grad():
            for update in updates:
                weight = folded_weight(weight, *update.operands, **update.options, dtype=dtype)
        assert isinstance(weight, Tensor), "no updates"
        self.weight = weight
        self._updates = updates
        self._versions = self._current_versions()
        self._grad: Tensor | None = None

    @property
    def trains(self) -> bool:
        """Whether the factors of any update want a gradient."""
        return any(part.requires_grad for update in self._updates for part in update.operands)

    def add(self, grad: Tensor, x: Tensor) -> None:
        """Add the gradient of W' for outputs' gradient (T, out) and inputs (T, in)."""
        if self._grad is None:
            self._grad = (grad.T @ x).to(torch.promote_types(x.dtype, torch.float32))
        elif self._grad.dtype == x.dtype:
            self._grad.addmm_(grad.T, x)
        else:
            self._grad += grad.T @ x

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Lambda and gamma of each update with their gradients; nothing if W' got none."""
        if self._grad is None:
            return []
        if self._versions != self._current_versions():
            raise RuntimeError("lambda or gamma changed since W' was made: call optimizer.step() after the block.")
        found: list[tuple[Tensor, Tensor]] = []
        for operands, scaling, out_features, sparse in self._updates:
            with torch.no_grad(), no_autocast(self._grad):
                tall = out_features == operands.bases_B.shape[0]
                grads = operands.project(self._grad, scaling, tall, sparse)
            found += zip((operands.lam, operands.gamma), grads, strict=True)
        return [(tensor, grad) for tensor, grad in found if tensor.requires_grad]

    def _current_versions(self) -> list[int]:
        return [part._version for update in self._updates for part in update.operands[2:]]


class _StepLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, bias: Tensor | None, shared: StepWeight, step: Step) -> Tensor:
        """`token` wants a gradient, so that backward comes here whether or not x does."""
        ctx.shared, ctx.step = shared, step
        ctx.save_for_backward(x)
        return linear(x, shared.weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), shared = ctx.saved_tensors, ctx.shared
        rows = grad.reshape(-1, grad.shape[-1])  # (T, out)
        with no_autocast(x):
            shared.add(rows, x.reshape(-1, x.shape[-1]))
            grad_x = grad @ shared.weight if ctx.needs_input_grad[0] else None
        ctx.step.after_backward()
        return grad_x, None, rows.sum(0) if ctx.needs_input_grad[2] else None, None, None
