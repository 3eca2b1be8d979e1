"""Adapted layers: a base layer plus any number of adapters, by name.

What differs between kinds of base is how its weight is read and written back; everything else is `RandLoraLayer`.
"""

import abc
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interop.adapter import Factors
from interop.bases import Bases
from interop.shapes import factor_shapes
from randlora_torch.bases import BufferDict, LayerBases, layer_bases
from randlora_torch.gradients import UniqueBaseGrad, apply_delta, delta_weight


class ScaledBases(NamedTuple):
    """The two matrices whose product is one layer's update, before the scaling by alpha / r."""

    A: Float[Tensor, "r*n d"]
    B: Float[Tensor, "D n*r"]


class RandLoraLayer(nn.Module, abc.ABC):
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

    adapter_layer_names = ("randlora_lambda", "randlora_gamma")
    other_param_names = ("randlora_A", "randlora_B")

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
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = layer_shape(base_layer)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.randlora_dropout = nn.ModuleDict()
        self.randlora_lambda = nn.ParameterDict()
        self.randlora_gamma = nn.ParameterDict()
        self.randlora_A, self.randlora_B = randlora_A, randlora_B
        self.active_adapters: list[str] = [adapter_name]
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
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
        dropout = nn.Dropout(randlora_dropout) if randlora_dropout else nn.Identity()
        self.randlora_dropout[adapter_name] = dropout.train(self.training)
        start = 1 / max(shape_gamma) if init_weights else 1 / max(self.out_features, self.in_features)
        lam = torch.zeros(shape_lam) if init_weights else torch.randn(shape_lam)
        self.set_factors(adapter_name, Factors(lam, torch.full(shape_gamma, start)))

    def set_factors(self, adapter_name: str, factors: Factors) -> None:
        """Replace lambda and gamma of an adapter, on the device of the base weight; dtypes are kept."""
        device = self.base_layer.weight.device
        self.randlora_lambda[adapter_name] = nn.Parameter(factors.lam.to(device))
        self.randlora_gamma[adapter_name] = nn.Parameter(factors.gamma.to(device))

    def factors(self, adapter_name: str) -> Factors:
        """Lambda (r, n) and gamma (n, min(out, in)) of an adapter."""
        return Factors(self.randlora_lambda[adapter_name], self.randlora_gamma[adapter_name])

    def _bases(self, adapter_name: str) -> LayerBases:
        bases = Bases(self.randlora_A[adapter_name], self.randlora_B[adapter_name])
        return layer_bases(bases, (self.out_features, self.in_features))

    def get_scaled_bases(self, adapter_name: str) -> ScaledBases:
        """A with lambda and gamma applied (r*n, d), and B (D, n*r); differentiable in lambda and gamma."""
        bases, (lam, gamma) = self._bases(adapter_name), self.factors(adapter_name)
        scaled_A = UniqueBaseGrad.apply(bases.A[:, None].to(lam.dtype), lam, gamma)  # (r, n, d)
        return ScaledBases(scaled_A.flatten(end_dim=1), bases.B.to(lam.dtype).flatten(start_dim=1))

    def get_delta_weight(self, adapter_name: str) -> Float[Tensor, "outputs inputs"]:
        """The update of an adapter in the (out, in) orientation of nn.Linear, in float32 or wider."""
        delta = delta_weight(
            *self._bases(adapter_name), *self.factors(adapter_name), scaling=self.scaling[adapter_name]
        )  # (long, short)
        return delta if self.out_features >= self.in_features else delta.T

    @property
    def weight(self) -> Tensor:
        """The base weight, for code that reads it instead of calling the layer; see `Linear.weight`."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base bias."""
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the base weight."""
        return bool(self.merged_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the update of each active adapter that is not merged, in the dtype of the base output."""
        result = self.base_layer(x, *args, **kwargs)
        for name in self._applied():
            update = apply_delta(
                self.randlora_dropout[name](x),
                *self._bases(name),
                *self.factors(name),
                out_features=self.out_features,
                scaling=self.scaling[name],
            )
            result = result + update.to(result.dtype)
        return result

    def _applied(self) -> list[str]:
        """The adapters that forward adds: active, on this layer, and not merged."""
        active = () if self.disable_adapters else self.active_adapters
        return [name for name in active if name in self.randlora_lambda and name not in self.merged_adapters]

    def merge(self, safe_merge: bool = False, adapter_names: Iterable[str] | None = None) -> None:
        """Add the update of the given adapters (default: the active ones) to the base weight.

        Raises:
            ValueError: with `safe_merge`, the merged weight would not be finite; the layer is left as it was.
        """
        if safe_merge:
            self.check_merge(adapter_names)
        names = self._to_merge(adapter_names)
        if names:
            self._write_weight(self._merged_weight(names))
            self.merged_adapters += names

    def check_merge(self, adapter_names: Iterable[str] | None = None, layer_name: str = "this layer") -> None:
        """Raise a ValueError if merging these adapters would give a weight that is not finite."""
        names = self._to_merge(adapter_names)
        if names and not torch.isfinite(self._merged_weight(names).to(self._weight_dtype())).all():
            raise ValueError(f"merging {names} would make the weight of {layer_name} not finite. Check the adapter.")

    def _to_merge(self, adapter_names: Iterable[str] | None) -> list[str]:
        names = self.active_adapters if adapter_names is None else adapter_names
        names = dict.fromkeys(names)  # a name given twice is merged once
        return [name for name in names if name in self.randlora_lambda and name not in self.merged_adapters]

    @torch.no_grad()
    def _merged_weight(self, names: list[str]) -> Tensor:
        return self._read_weight() + sum(self.get_delta_weight(name) for name in names)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        if self.merged:
            with torch.no_grad():
                self._restore_weight(sum(self.get_delta_weight(name) for name in self.merged_adapters))
            self.merged_adapters = []

    @abc.abstractmethod
    def _read_weight(self) -> Float[Tensor, "outputs inputs"]:
        """The base weight in float32 or wider, oriented (out, in)."""

    @abc.abstractmethod
    def _write_weight(self, weight: Float[Tensor, "outputs inputs"]) -> None:
        """Store a base weight that `_read_weight` would give back, as well as the storage can hold it."""

    @abc.abstractmethod
    def _weight_dtype(self) -> torch.dtype:
        """The dtype that `_write_weight` rounds to."""

    def _restore_weight(self, delta: Float[Tensor, "outputs inputs"]) -> None:
        """Undo `_write_weight`, given the update that was merged."""
        self._write_weight(self._read_weight() - delta)


class Linear(RandLoraLayer):
    """RandLoRA on `nn.Linear` or on transformers' `Conv1D`, whose weight is stored (in, out).

    Merging changes the weight in place, unless it is tied to another layer's: then this layer gets a weight of its own
    until it is unmerged.
    """

    tied = False
    _tied_weight: tuple[nn.Parameter] | None = None  # in a tuple, so that it is no parameter of this module

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, W + dW, for code that reads it instead of calling the layer."""
        names = self._applied()
        if not names:
            return self.base_layer.weight
        weight = self._read_weight() + sum(self.get_delta_weight(name) for name in names)
        return self._stored(weight).to(self._weight_dtype())

    def _stored(self, weight: Tensor) -> Tensor:
        return weight.T if isinstance(self.base_layer, Conv1D) else weight

    def _read_weight(self) -> Tensor:
        weight = self.base_layer.weight.to(torch.promote_types(self.base_layer.weight.dtype, torch.float32))
        return weight.T if isinstance(self.base_layer, Conv1D) else weight

    def _weight_dtype(self) -> torch.dtype:
        return self.base_layer.weight.dtype

    def _write_weight(self, weight: Tensor) -> None:
        if "weight" not in self.base_layer._parameters:
            raise ValueError(
                "the base weight is computed by a parametrization (weight_norm, pruning, ...), so nothing can be merged"
                " into it. Call torch.nn.utils.parametrize.remove_parametrizations first, or do not merge."
            )
        if self.tied and self._tied_weight is None:
            self._tied_weight = (self.base_layer.weight,)
            stored = self._stored(weight).to(self._weight_dtype()).contiguous()
            self.base_layer.weight = nn.Parameter(stored, requires_grad=False)
        else:
            self.base_layer.weight.data.copy_(self._stored(weight))

    def _restore_weight(self, delta: Tensor) -> None:
        if self._tied_weight is None:
            super()._restore_weight(delta)
        else:
            (self.base_layer.weight,), self._tied_weight = self._tied_weight, None


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer of any kind that can be adapted."""
    if isinstance(layer, Conv1D):
        in_features, out_features = layer.weight.shape
        return out_features, in_features
    return layer.out_features, layer.in_features
