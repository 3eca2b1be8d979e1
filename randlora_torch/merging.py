"""Merging: the updates of a layer's adapters added to its base weight, and taken out again.

What differs between kinds of base weight is how it is read, written and put back; the rest is here, once.
"""

import abc
from collections.abc import Iterable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from interop.blockwise import Rounding


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is torch's DTensor, of which each process holds a part."""
    return hasattr(tensor, "full_tensor")


class Mergeable(metaclass=abc.ABCMeta):
    """A layer whose adapters can be merged into the weight of its `base_layer`."""

    base_layer: Any  # an nn.Module with a weight: torch has no class that says so
    active_adapters: list[str]
    merged_adapters: list[str]
    tied = False  # whether another layer uses the same weight; merging then gives this one a weight of its own
    _kept: tuple[Any, ...] | None = None  # the base weight before merging, in a tuple: no parameter of this module

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the base weight."""
        return bool(self.merged_adapters)

    def merge(
        self, safe_merge: bool = False, adapter_names: Iterable[str] | None = None, *, keep_base: bool = True
    ) -> Rounding:
        """Add the update of the given adapters (default: the active ones) to the base weight.

        Args:
            safe_merge: Refuse to store a weight that is not finite.
            adapter_names: What to merge; names that are not on this layer, or merged already, are passed over.
            keep_base: Keep the base weight as it was, so that `unmerge` restores it bit for bit. Without it, no second
                copy of the weight is held, and unmerging rounds once more.

        Raises:
            ValueError: the weight cannot be written, or, with `safe_merge`, would not be finite; it is left as it was.
        """
        self.check_writable()
        if safe_merge:
            self.check_merge(adapter_names)
        names = self.to_merge(adapter_names)
        if not names:
            return Rounding(0.0, 0.0)
        base, delta = self._read_weight(), self._delta_weights(names)
        if (keep_base or self.tied) and not self.merged:
            self._kept = self._current()
        rounding = self._store(base + delta, delta)
        self.merged_adapters.extend(names)
        return rounding

    def unmerge(self) -> Rounding:
        """Take all merged adapters out of the base weight again: exactly if it was kept, else with one rounding."""
        rounding = Rounding(0.0, 0.0)
        if self._kept is not None:
            kept, self._kept = self._kept, None
            self._put_back(kept)
        elif self.merged:
            delta = self._delta_weights(self.merged_adapters)
            rounding = self._store(self._read_weight() - delta, delta)
        self.merged_adapters.clear()
        return rounding

    def check_merge(self, adapter_names: Iterable[str] | None = None, layer_name: str = "this layer") -> None:
        """Raise a ValueError if merging these adapters would give a weight that is not finite."""
        names = self.to_merge(adapter_names)
        if not names:
            return
        merged = (self._read_weight() + self._delta_weights(names)).to(self._weight_dtype())
        if not torch.isfinite(merged).all():
            raise ValueError(f"merging {names} would make the weight of {layer_name} not finite. Check the adapter.")

    def check_writable(self, layer_name: str = "this layer") -> None:
        """Raise a ValueError if nothing can be merged into the base weight."""
        weight = self.base_layer._parameters.get("weight")
        if weight is None:
            raise ValueError(
                f"nothing can be merged into {layer_name}: its weight is computed by a parametrization (weight_norm,"
                " pruning, ...). Call torch.nn.utils.parametrize.remove_parametrizations first, or do not merge."
            )
        if weight.device.type == "meta" or is_sharded(weight):
            where = "is on the meta device (offloaded or not loaded)" if weight.device.type == "meta" else "is sharded"
            raise ValueError(
                f"nothing can be merged into {layer_name}: its weight {where}. Load the whole model on one device, and"
                " merge there."
            )

    def to_merge(self, adapter_names: Iterable[str] | None) -> list[str]:
        """Those of the given adapters (default: the active ones) that are on this layer and not merged yet."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = dict.fromkeys(names)  # a name given twice is merged once
        return [name for name in names if self.holds(name) and name not in self.merged_adapters]

    @torch.no_grad()
    def _delta_weights(self, names: list[str]) -> Tensor:
        return cast(Tensor, sum(self.get_delta_weight(name) for name in names))  # of at least one

    @torch.no_grad()
    def _store(self, weight: Tensor, delta: Tensor) -> Rounding:
        self._write_weight(weight)
        error, tiny = torch.linalg.norm(self._read_weight() - weight), torch.finfo(torch.float32).tiny
        scales = (torch.linalg.norm(weight).clamp(min=tiny), torch.linalg.norm(delta).clamp(min=tiny))
        return Rounding(*((error / scale).item() for scale in scales))

    @abc.abstractmethod
    def holds(self, adapter_name: str) -> bool:
        """Whether an adapter is on this layer."""

    @abc.abstractmethod
    def get_delta_weight(self, adapter_name: str) -> Float[Tensor, "outputs inputs"]:
        """The update of an adapter in the (out, in) orientation of nn.Linear, in float32 or wider."""

    @abc.abstractmethod
    def _read_weight(self) -> Float[Tensor, "outputs inputs"]:
        """The base weight in float32 or wider, oriented (out, in)."""

    @abc.abstractmethod
    def _write_weight(self, weight: Float[Tensor, "outputs inputs"]) -> None:
        """Store a base weight that `_read_weight` would give back, as well as the storage can hold it."""

    @abc.abstractmethod
    def _weight_dtype(self) -> torch.dtype:
        """The dtype that `_write_weight` goes through."""

    @abc.abstractmethod
    def _current(self) -> tuple[Any, ...]:
        """The base weight as it is stored now; `_write_weight` must not change it any more."""

    @abc.abstractmethod
    def _put_back(self, kept: tuple[Any, ...]) -> None:
        """Store what `_current` gave, on the device where the layer is now."""
