"""RandLoRA's layer: lambda and gamma of each adapter, and bases that it shares with all other layers."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interop.bases import Bases
from interop.delta import Factors
from interop.shapes import factor_shapes
from randlora_torch.bases import BufferDict, LayerBases, layer_bases
from randlora_torch.contraction import adapted_linear, plan_for
from randlora_torch.gradients import Operands, UniqueBaseGrad, delta_weight, product_dtype
from randlora_torch.layer import AdapterLayer, Frozen, compute_device
from randlora_torch.sparse import SparseBasis
from randlora_torch.step import Step, StepWeight, Update
from randlora_torch.weights import PlainWeight


class ScaledBases(NamedTuple):
    """The two matrices whose product is one layer's update, before the scaling by alpha / r."""

    A: Float[Tensor, "r*n d"]
    B: Float[Tensor, "D n*r"]


class RandLoraLayer(AdapterLayer):
    """A frozen base layer and the RandLoRA adapters on it (arXiv:2502.00987).

    Parameters stand under PEFT's names: `randlora_lambda[adapter_name]` (r, n) and `randlora_gamma[adapter_name]`
    (n, min(out, in)); `randlora_A` and `randlora_B` are shared by all layers of a model. Every property of an adapter
    is kept by its name, so adapters on one layer may differ in r, seed and sparsity.

    Args:
        base_layer: The layer to adapt.
        adapter_name: Name of the first adapter.
        randlora_A: The model's bases (r, 1, min_dim) by adapter name.
        randlora_B: The model's bases (max_dim, n, r) by adapter name.
        r: Rank of one basis; a smaller r trains more parameters.
        randlora_alpha: The update is scaled by randlora_alpha / r.
        randlora_dropout: Probability of zeroing an input of the adapter branch while training.
        init_weights: True starts at dW = 0, False at a random update.
    """

    plan: str = "auto"  # see `set_plan`
    keep_weight: bool = False
    step: Step | None = None  # see `fold_once`

    adapter_layer_names = ("randlora_lambda", "randlora_gamma")
    other_param_names = ("randlora_A", "randlora_B")
    dropout_name = "randlora_dropout"
    randlora_lambda: nn.ParameterDict
    randlora_gamma: nn.ParameterDict
    randlora_dropout: nn.ModuleDict

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        randlora_A: BufferDict,
        randlora_B: BufferDict,
        r: int = 32,
        randlora_alpha: int | float = 640,
        randlora_dropout: float = 0.0,
        init_weights: bool = True,
    ) -> None:
        super().__init__(base_layer, adapter_name)
        self.randlora_A, self.randlora_B = randlora_A, randlora_B
        self.update_layer(adapter_name, r, randlora_alpha, randlora_dropout, init_weights)

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        randlora_alpha: int | float,
        randlora_dropout: float = 0.0,
        init_weights: bool = True,
    ) -> None:
        """Add an adapter with PEFT's starting values; its bases must be in `randlora_A` and `randlora_B` already."""
        shape_lam, shape_gamma = factor_shapes((self.out_features, self.in_features), r)
        self.r[adapter_name], self.scaling[adapter_name] = r, randlora_alpha / r
        self._add_dropout(adapter_name, randlora_dropout)
        start = 1 / max(shape_gamma) if init_weights else 1 / max(self.out_features, self.in_features)
        device = compute_device(self.base_layer)
        lam = torch.zeros(shape_lam, device=device) if init_weights else torch.randn(shape_lam, device=device)
        self.set_factors(adapter_name, Factors(lam, torch.full(shape_gamma, start, device=device)))

    def factors(self, adapter_name: str) -> Factors:
        """Lambda (r, n) and gamma (n, min(out, in)) of an adapter."""
        return Factors(self.randlora_lambda[adapter_name], self.randlora_gamma[adapter_name])

    def _bases(self, adapter_name: str, device: torch.device, dtype: torch.dtype | None = None) -> LayerBases:
        """This layer's part of the bases for products in `dtype`, as stored: views of what all layers share."""
        bases = Bases(self.randlora_A.on(adapter_name, device), self.randlora_B.on(adapter_name, device, dtype))
        prefix = layer_bases(bases, (self.out_features, self.in_features))
        return LayerBases(*prefix, self.randlora_B.scale(adapter_name))

    def get_scaled_bases(self, adapter_name: str, device: torch.device | None = None) -> ScaledBases:
        """A with lambda and gamma applied (r*n, d), and B (D, n*r); differentiable in lambda and gamma."""
        lam, gamma = self.factors(adapter_name)
        bases = self._bases(adapter_name, lam.device)
        scaled_A = UniqueBaseGrad.apply(bases.A[:, None].to(lam.dtype), lam, gamma)  # (r, n, d)
        B = bases.B.to(lam.dtype) * bases.scale
        scaled = ScaledBases(scaled_A.flatten(end_dim=1), B.flatten(start_dim=1))
        return scaled if device is None else ScaledBases(*(part.to(device) for part in scaled))

    def get_delta_weight(self, adapter_name: str) -> Float[Tensor, "outputs inputs"]:
        """The update of an adapter in the (out, in) orientation of nn.Linear, in float32 or wider."""
        factors = self.factors(adapter_name)
        A, B, scale = self._bases(adapter_name, factors.lam.device)
        delta = delta_weight(A, B, *factors, scaling=self.scaling[adapter_name] * scale)  # (long, short)
        return delta if self.out_features >= self.in_features else delta.T

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See `AdapterLayer.forward`; where `plan` folds, updates are added to the weight instead of the output."""
        names = self._applied()
        if not names or self.rows is not None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        frozen = None if self._drops(names) else self._frozen(x)
        if self.step is not None:
            return self._step_forward(self.step, x, frozen, names)
        if frozen is None:
            return super().forward(x)
        update = self._update_of(names[0], x.device, frozen.dtype)
        if not self._joins(update, x, frozen):
            return super().forward(x)
        options = {**self._options(update), "dtype": frozen.dtype}
        result = adapted_linear(x, frozen.weight, frozen.bias, *update.operands, **options).to(frozen.result_dtype)
        for name in names[1:]:
            result = result + self._update(name, x).to(result.dtype)
        return result

    def _step_forward(self, step: Step, x: Tensor, frozen: Frozen | None, names: list[str]) -> Tensor:
        """Over the W' that all passes of an optimizer step share, or over dW where the base layer must be called."""

        def over(x: Tensor, weight: Any, bias: Tensor | None, names: list[str], dtype: torch.dtype) -> Tensor:
            def make() -> StepWeight:
                return StepWeight(weight, [self._update_of(name, x.device, dtype) for name in names], dtype)

            return step.linear((self, weight is None, *names, dtype, x.device), x, make, bias)

        if frozen is not None:
            return over(x, frozen.weight, frozen.bias, names, frozen.dtype).to(frozen.result_dtype)
        result = self.base_layer(x)
        for name in names:
            result = result + over(self._dropped(name, x), None, None, [name], product_dtype(x)).to(result.dtype)
        return result

    def _drops(self, adapter_names: list[str]) -> bool:
        dropouts = (self.randlora_dropout[name] for name in adapter_names)
        return any(dropout.training and not isinstance(dropout, nn.Identity) for dropout in dropouts)

    def _joins(self, update: Update, x: Tensor, frozen: Frozen) -> bool:
        """Whether the base's product is a part of the update's: where W' is made, or one product is added to the other.

        Not with plan="factored": as in PEFT, the base layer is called, and the update added to what it gives.
        """
        if self.plan == "auto" and torch.is_grad_enabled() and isinstance(frozen.weight, Tensor):
            return True
        options: dict[str, Any] = {"plan": self.plan, "keep_weight": self.keep_weight, "sparse": update.sparse}
        plan = plan_for(x, update.operands, out_features=update.out_features, dtype=frozen.dtype, **options)
        return plan.fold_forward or (plan.fold_backward and torch.is_grad_enabled())

    def _update_of(self, adapter_name: str, device: torch.device, dtype: torch.dtype) -> Update:
        factors = (part.to(device) for part in self.factors(adapter_name))
        A, B, scale = self._bases(adapter_name, device, dtype)
        sparse = self._sparse_basis(adapter_name, B) if device.type == "cpu" else None
        return Update(Operands(A, B, *factors), self.scaling[adapter_name] * scale, self.out_features, sparse)

    def _sparse_basis(self, adapter_name: str, codes: Tensor) -> SparseBasis | None:
        return self.randlora_B.sparse_basis(adapter_name, codes)

    def _options(self, update: Update) -> dict[str, Any]:
        return {**update.options, "plan": self.plan, "keep_weight": self.keep_weight}

    def _update(self, adapter_name: str, x: Tensor) -> Tensor:
        update = self._update_of(adapter_name, x.device, product_dtype(x))
        return adapted_linear(self._dropped(adapter_name, x), None, None, *update.operands, **self._options(update))


class Linear(PlainWeight, RandLoraLayer):
    """RandLoRA on `nn.Linear` or on transformers' `Conv1D`, whose weight is stored (in, out)."""
