"""Adapted layers: a base layer plus any number of adapters, by name."""

import dataclasses
import threading
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interop.adapter import Factors
from interop.bases import Bases
from interop.shapes import factor_shapes
from randlora_torch.bases import BufferDict, LayerBases, layer_bases
from randlora_torch.gradients import UniqueBaseGrad, apply_delta, delta_weight, product_dtype
from randlora_torch.merging import Mergeable

BASE_ROWS = "__base__"  # in a mixed batch, the "adapter" of rows that no adapter changes


@dataclasses.dataclass
class Rows:
    """Which adapter computes each row of a mixed batch. One thread owns it, and with it the model.

    Attributes:
        names: One adapter per row of the model's inputs, `BASE_ROWS` for none.
        sizes: Rows, and tokens per row, of the inputs of the call that runs now; None until they are known.
    """

    names: list[str]
    sizes: tuple[int, int] | None = None
    thread: int = dataclasses.field(default_factory=threading.get_ident)

    def along(self, x: Tensor) -> list[str]:
        """The adapter of each entry on the first axis of x: rows of the batch, beams of each row, or their tokens.

        Raises:
            ValueError: x does not have the batch on its first axis.
            RuntimeError: another thread is at work on this model.
        """
        if self.thread != threading.get_ident():
            raise RuntimeError("another thread computes a mixed batch with this model: give each thread its own copy.")
        count, entries = len(self.names), x.shape[0]
        rows, tokens = self.sizes or (entries, 1)
        fits = entries == rows or (x.dim() == 2 and entries == rows * tokens)
        if not count or not fits or entries % count:
            raise ValueError(
                f"adapter_names has {count} entries, but a layer got an input of shape {tuple(x.shape)}, without the"
                " rows of the batch on its first axis (experts? time first?). Call the model once per adapter."
            )
        return [name for name in self.names for _ in range(entries // count)]


class ScaledBases(NamedTuple):
    """The two matrices whose product is one layer's update, before the scaling by alpha / r."""

    A: Float[Tensor, "r*n d"]
    B: Float[Tensor, "D n*r"]


class RandLoraLayer(Mergeable, nn.Module):
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

    rows: Rows | None = None  # of a mixed batch, while it is computed

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
        device = compute_device(self.base_layer)
        lam = torch.zeros(shape_lam, device=device) if init_weights else torch.randn(shape_lam, device=device)
        self.set_factors(adapter_name, Factors(lam, torch.full(shape_gamma, start, device=device)))

    def set_factors(self, adapter_name: str, factors: Factors) -> None:
        """Replace lambda and gamma of an adapter, on the device that the layer computes on; dtypes are kept."""
        device = compute_device(self.base_layer)
        self.randlora_lambda[adapter_name] = nn.Parameter(factors.lam.to(device))
        self.randlora_gamma[adapter_name] = nn.Parameter(factors.gamma.to(device))

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter, if it is on this layer; its bases stay in `randlora_A` and `randlora_B`.

        Raises:
            ValueError: it is merged into the base weight.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged into the base weight: unmerge first.")
        for held in (self.r, self.scaling, self.randlora_dropout, self.randlora_lambda, self.randlora_gamma):
            if adapter_name in held:
                del held[adapter_name]
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]

    def factors(self, adapter_name: str) -> Factors:
        """Lambda (r, n) and gamma (n, min(out, in)) of an adapter."""
        return Factors(self.randlora_lambda[adapter_name], self.randlora_gamma[adapter_name])

    def _bases(self, adapter_name: str, device: torch.device, dtype: torch.dtype | None = None) -> LayerBases:
        """This layer's part of the bases; B in `dtype`, or else as it is stored."""
        A, B = self.randlora_A[adapter_name], self.randlora_B[adapter_name]
        A = self.randlora_A.on(adapter_name, device, A.dtype)
        B = self.randlora_B.on(adapter_name, device, dtype or B.dtype)
        return layer_bases(Bases(A, B), (self.out_features, self.in_features))

    def get_scaled_bases(self, adapter_name: str, device: torch.device | None = None) -> ScaledBases:
        """A with lambda and gamma applied (r*n, d), and B (D, n*r); differentiable in lambda and gamma."""
        lam, gamma = self.factors(adapter_name)
        bases = self._bases(adapter_name, lam.device)
        scaled_A = UniqueBaseGrad.apply(bases.A[:, None].to(lam.dtype), lam, gamma)  # (r, n, d)
        scaled = ScaledBases(scaled_A.flatten(end_dim=1), bases.B.to(lam.dtype).flatten(start_dim=1))
        return scaled if device is None else ScaledBases(*(part.to(device) for part in scaled))

    def get_delta_weight(self, adapter_name: str) -> Float[Tensor, "outputs inputs"]:
        """The update of an adapter in the (out, in) orientation of nn.Linear, in float32 or wider."""
        factors = self.factors(adapter_name)
        bases = self._bases(adapter_name, factors.lam.device)
        delta = delta_weight(*bases, *factors, scaling=self.scaling[adapter_name])  # (long, short)
        return delta if self.out_features >= self.in_features else delta.T

    @property
    def weight(self) -> Tensor:
        """The base weight, for code that reads it instead of calling the layer; see `Linear.weight`."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base bias."""
        return self.base_layer.bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the update of each active adapter that is not merged, in the dtype of the base output."""
        result = self.base_layer(x, *args, **kwargs)
        if self.rows is not None:
            return self._add_by_row(result, x)
        for name in self._applied():
            result = result + self._update(name, x).to(result.dtype)
        return result

    def _update(self, adapter_name: str, x: Tensor) -> Tensor:
        lam, gamma = self.factors(adapter_name)
        return apply_delta(
            self.randlora_dropout[adapter_name](x),
            *self._bases(adapter_name, x.device, product_dtype(x)),
            lam.to(x.device),
            gamma.to(x.device),
            out_features=self.out_features,
            scaling=self.scaling[adapter_name],
        )

    def _add_by_row(self, result: Tensor, x: Tensor) -> Tensor:
        names = self.rows.along(x)
        for name in dict.fromkeys(names):
            if name in self.randlora_lambda:
                index = torch.tensor([i for i, row in enumerate(names) if row == name], device=x.device)
                result = result.index_add(0, index, self._update(name, x[index]).to(result.dtype))
        return result

    def _applied(self) -> list[str]:
        """The adapters that forward adds: active, on this layer, and not merged."""
        active = () if self.disable_adapters else self.active_adapters
        return [name for name in active if name in self.randlora_lambda and name not in self.merged_adapters]


class Linear(RandLoraLayer):
    """RandLoRA on `nn.Linear` or on transformers' `Conv1D`, whose weight is stored (in, out)."""

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, W + dW, for code that reads it instead of calling the layer.

        In a mixed batch there is no such weight: what is read has its dtype, device and shape, and is not a number.
        """
        if self.rows is not None:
            weight = self.base_layer.weight
            return weight.new_full((), torch.nan).expand(weight.shape)
        names = self._applied()
        if not names:
            return self.base_layer.weight
        weight = self._read_weight() + sum(self.get_delta_weight(name) for name in names)
        return self._stored(weight).to(self._weight_dtype())

    def _stored(self, weight: Tensor) -> Tensor:
        return weight.T if isinstance(self.base_layer, Conv1D) else weight

    def _read_weight(self) -> Tensor:
        weight = self.base_layer.weight
        return self._stored(weight.to(torch.promote_types(weight.dtype, torch.float32)))

    def _weight_dtype(self) -> torch.dtype:
        return self.base_layer.weight.dtype

    def _write_weight(self, weight: Tensor) -> None:
        old = self.base_layer.weight
        if self._kept is not None:
            stored = self._stored(weight).to(old.dtype).contiguous()
            self.base_layer.weight = nn.Parameter(stored, requires_grad=old.requires_grad)
        else:
            old.data.copy_(self._stored(weight))

    def _current(self) -> tuple[nn.Parameter]:
        return (self.base_layer.weight,)

    def _put_back(self, kept: tuple[nn.Parameter]) -> None:
        now, (before,) = self.base_layer.weight, kept
        if (before.device, before.dtype) != (now.device, now.dtype):  # the model was moved or converted meanwhile
            before = nn.Parameter(before.detach().to(now.device, now.dtype), requires_grad=now.requires_grad)
        self.base_layer.weight = before


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer of any kind that can be adapted."""
    if isinstance(layer, Conv1D):
        in_features, out_features = layer.weight.shape
        return out_features, in_features
    return layer.out_features, layer.in_features


def compute_device(layer: nn.Module) -> torch.device:
    """Where a layer computes: where its weight is, unless that is on the meta device (offloaded, or not loaded)."""
    device = layer.weight.device
    if device.type != "meta":
        return device
    hook = getattr(layer, "_hf_hook", None)  # accelerate's, which brings offloaded weights in for each call
    return torch.device(getattr(hook, "execution_device", None) or "cpu")
