"""`AdapterLayer`: a base layer plus any number of adapters, by name. What it is made of differs between methods.

A method (`randlora`, `adalora`) says what an adapter's parameters are and what update they make; `weights` and `bnb`
say how the weight of a kind of base layer is read and written. A layer class is one of each.
"""

import abc
import dataclasses
import threading
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interop.adalora import SVDFactors
from interop.delta import Factors
from randlora_torch.contraction import Quantized
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


class Frozen(NamedTuple):
    """What a base layer computes with: `x @ weight.T + bias` in `dtype`, and the result in `result_dtype`."""

    weight: Tensor | Quantized
    bias: Tensor | None
    dtype: torch.dtype
    result_dtype: torch.dtype


class AdapterLayer(Mergeable, nn.Module):
    """A frozen base layer and the adapters on it. Every property of an adapter is kept by its name.

    Attributes:
        base_layer: The layer that is adapted.
        out_features, in_features: Of the weight as a matrix, see `layer_shape`.
        scaling: What the update of each adapter is multiplied by.
        active_adapters: Names of those that are applied.
        merged_adapters: Names of those that are merged into the base weight.
        disable_adapters: Whether to compute as the base layer does.
    """

    adapter_layer_names: ClassVar[tuple[str, ...]]  # PEFT's names of the parameters, in the order of the factors
    dropout_name: ClassVar[str]

    rows: Rows | None = None  # of a mixed batch, while it is computed

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.out_features, self.in_features = layer_shape(base_layer)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        setattr(self, self.dropout_name, nn.ModuleDict())
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.active_adapters: list[str] = [adapter_name]
        self.merged_adapters: list[str] = []
        self.disable_adapters = False

    @property
    def parameter_dicts(self) -> tuple[nn.ParameterDict, ...]:
        """The parameters of all adapters, one dict for each part of the factors, by adapter name."""
        return tuple(getattr(self, name) for name in self.adapter_layer_names)

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters on this layer."""
        return list(self.parameter_dicts[0])

    def holds(self, adapter_name: str) -> bool:
        """Whether an adapter is on this layer."""
        return adapter_name in self.parameter_dicts[0]

    @abc.abstractmethod
    def factors(self, adapter_name: str) -> Factors | SVDFactors:
        """The parameters of an adapter."""

    @abc.abstractmethod
    def _update(self, adapter_name: str, x: Tensor) -> Tensor:
        """What an adapter adds to the output for x."""

    def _add_dropout(self, adapter_name: str, probability: float) -> None:
        dropout = nn.Dropout(probability) if probability else nn.Identity()
        getattr(self, self.dropout_name)[adapter_name] = dropout.train(self.training)

    def _dropped(self, adapter_name: str, x: Tensor) -> Tensor:
        return getattr(self, self.dropout_name)[adapter_name](x)

    def set_factors(self, adapter_name: str, factors: Factors | SVDFactors) -> None:
        """Replace the parameters of an adapter, on the device that the layer computes on; dtypes are kept."""
        device = compute_device(self.base_layer)
        for held, value in zip(self.parameter_dicts, factors, strict=True):
            held[adapter_name] = nn.Parameter(value.to(device))

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter, if it is on this layer; bases that it shares with other layers stay.

        Raises:
            ValueError: it is merged into the base weight.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged into the base weight: unmerge first.")
        for held in (self.r, self.scaling, getattr(self, self.dropout_name), *self.parameter_dicts):
            if adapter_name in held:
                del held[adapter_name]
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]

    def _frozen(self, x: Tensor) -> Frozen | None:
        """What the base layer computes with for x, or None if more happens in it than `x @ W.T + bias`."""
        return None

    @property
    def weight(self) -> Tensor:
        """The base weight, for code that reads it instead of calling the layer; see `PlainWeight.weight`."""
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

    def _add_by_row(self, result: Tensor, x: Tensor) -> Tensor:
        assert self.rows is not None
        names = self.rows.along(x)
        for name in dict.fromkeys(names):
            if self.holds(name):
                index = torch.tensor([i for i, row in enumerate(names) if row == name], device=x.device)
                result = result.index_add(0, index, self._update(name, x[index]).to(result.dtype))
        return result

    def _applied(self) -> list[str]:
        """The adapters that forward adds: active, on this layer, and not merged."""
        active = () if self.disable_adapters else self.active_adapters
        return [name for name in active if self.holds(name) and name not in self.merged_adapters]


def layer_shape(layer: Any) -> tuple[int, int]:
    """(out, in) of the weight of a layer of any kind that can be adapted.

    That of a convolution is (out, in * height * width), with the `in` of one group.
    """
    if isinstance(layer, Conv1D):
        in_features, out_features = layer.weight.shape
        return out_features, in_features
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.weight[0].numel()
    return layer.out_features, layer.in_features


def is_bare(layer: nn.Module) -> bool:
    """Whether calling the layer runs its class's `forward` and nothing else: no hooks, no method put over it."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in vars(layer) and not any(getattr(layer, name) for name in hooks)


def compute_device(layer: Any) -> torch.device:
    """Where a layer computes: where its weight is, unless that is on the meta device (offloaded, or not loaded)."""
    device = layer.weight.device
    if device.type != "meta":
        return device
    hook = getattr(layer, "_hf_hook", None)  # accelerate's, which brings offloaded weights in for each call
    return torch.device(getattr(hook, "execution_device", None) or "cpu")
