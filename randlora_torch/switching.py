"""Which adapters of a model are in force: switching, disabling, deleting, merging, and rows of a mixed batch."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interop.blockwise import Rounding
from interop.fields import AdapterConfig
from randlora_torch.attach import Attached, AttachedAdapter, biases_outside, detach_layers, find_attached
from randlora_torch.layer import BASE_ROWS, AdapterLayer, Rows
from randlora_torch.merging import is_sharded
from randlora_torch.structure import adapted_layers, wrapped_modules

logger = logging.getLogger(__name__)
Names = str | Iterable[str]


if TYPE_CHECKING:
    ModelMixin = nn.Module  # whose methods it uses, as it is mixed into a class of models
else:
    ModelMixin = object


class AdapterSwitching(ModelMixin):
    """The methods by which an adapted model changes which adapters are in force. The names are PEFT's."""

    _randlora: Attached

    @property
    def randlora_adapters(self) -> dict[str, AttachedAdapter]:
        """What is attached, by adapter name."""
        return self._randlora.adapters

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """The config of each attached adapter, by name."""
        return {name: info.config for name, info in self._randlora.adapters.items()}

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters in force."""
        return list(self._randlora.active)

    @property
    def active_adapter(self) -> str | None:
        """Name of the first adapter in force, or None."""
        return next(iter(self._randlora.active), None)

    def set_adapter(self, adapter_name: Names, inference_mode: bool = False) -> None:
        """Make these adapters the active ones: they are applied, and train unless `inference_mode` is set.

        Raises:
            ValueError: one of them is not attached, another one is merged into the base weights, or two of them train
                the same module or biases.
        """
        names = as_names(adapter_name)
        infos = [find_attached(self, name) for name in names]
        check_unmerged(self, except_for=names)
        modules = [module for info in infos for module in info.extras.modules]
        if len(set(modules)) < len(modules) or sum(info.extras.biases is not None for info in infos) > 1:
            raise ValueError(f"the adapters {names} train the same modules or biases: only one of them can be active.")
        self._randlora.active = list(names)
        self._put_in_force()
        for name in self._randlora.adapters:
            self.set_requires_grad(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: Names, requires_grad: bool = True) -> None:
        """Switch the training of adapters on or off, whether they are active or not.

        Raises:
            ValueError: one of them is not attached.
        """
        for name in as_names(adapter_names):
            info = find_attached(self, name)
            for layer in adapted_layers(self).values():
                for parameter in layer.factors(name) if layer.holds(name) else ():
                    parameter.requires_grad_(requires_grad)
            for wrapper in wrapped_modules(self).values():
                if name in wrapper.modules_to_save:
                    wrapper.modules_to_save[name].requires_grad_(requires_grad)
            for _, _, parameter in info.extras.biases.items() if info.extras.biases is not None else ():
                parameter.requires_grad_(requires_grad)

    def _trains(self, adapter_name: str) -> bool:
        """Whether the parameters of an adapter's layers require gradients."""
        layers: Iterable[Any] = map(self.get_submodule, find_attached(self, adapter_name).modules)
        return any(part.requires_grad for layer in layers for part in layer.factors(adapter_name))

    def _put_in_force(self) -> None:
        """Bring layers, trained modules and biases in line with what is active and whether adapters are disabled."""
        state = self._randlora
        active = [] if state.disabled else state.active
        for layer in adapted_layers(self).values():
            layer.active_adapters, layer.disable_adapters = list(state.active), state.disabled
        for wrapper in wrapped_modules(self).values():
            wrapper.active = next((name for name in active if name in wrapper.modules_to_save), None)
        trained = {name: info.extras.biases for name, info in state.adapters.items() if info.extras.biases is not None}
        for biases in trained.values():  # all out first: two adapters may own the same bias
            biases.swap(inside=False)
        for name in active:
            if name in trained:
                trained[name].swap(inside=True)

    def disable_adapter_layers(self) -> None:
        """Compute as the base model from now on. Merged adapters are unmerged."""
        self.unmerge_adapter()
        self._randlora.disabled = True
        self._put_in_force()

    def enable_adapter_layers(self) -> None:
        """Apply the active adapters again."""
        self._randlora.disabled = False
        self._put_in_force()

    disable_adapters, enable_adapters = disable_adapter_layers, enable_adapter_layers  # transformers' names

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the model computes as the base model does, also if adapters are merged."""
        state = self._randlora
        disabled, active = state.disabled, list(state.active)
        merged = {layer: list(layer.merged_adapters) for layer in adapted_layers(self).values()}
        kept = {layer: layer._kept is not None for layer in merged}
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if hasattr(self, "_randlora"):  # or the model was unloaded meanwhile
                state.disabled = disabled
                self._put_in_force()
                # Of what was merged, what the context did not switch off is merged again.
                names = set(state.adapters) if state.active == active else set(state.active)
                for layer, before in merged.items():
                    layer.merge(adapter_names=[name for name in before if name in names], keep_base=kept[layer])

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter and free its memory. If it alone was active, the first of the others becomes active.

        Raises:
            ValueError: it is not attached, or merged into the base weights, or the model is sharded.
        """
        info, state = find_attached(self, adapter_name), self._randlora
        if adapter_name in merged_into(self):
            raise ValueError(f"adapter {adapter_name!r} is merged into the base weights: unmerge_adapter() first.")
        if any(map(is_sharded, self.parameters())):
            raise ValueError(
                "the model is sharded, and its processes hold parts of every adapter: none can be deleted."
            )
        if info.extras.biases is not None:
            info.extras.biases.swap(inside=False)
        layers = adapted_layers(self)
        trained = self._trains(adapter_name)
        for held in (state.adapters, state.bases_A, state.bases_B):
            held.pop(adapter_name, None)
        left = [name for name in state.active if name != adapter_name]
        successor = not left and adapter_name in state.active
        state.active = list(state.adapters)[:1] if successor else left
        state.disabled = state.disabled and bool(state.adapters)
        for layer in layers.values():
            layer.delete_adapter(adapter_name)
        for wrapper in wrapped_modules(self).values():
            if adapter_name in wrapper.modules_to_save:
                del wrapper.modules_to_save[adapter_name]
        detach_layers(self, empty_only=True)
        self._put_in_force()
        if trained and successor:
            self.set_requires_grad(state.active)

    def merge_adapter(
        self, adapter_names: Names | None = None, safe_merge: bool = False, *, keep_base: bool = True
    ) -> dict[str, Rounding]:
        """Add the update of the given adapters (default: the active ones) to the base weights.

        Args:
            adapter_names: What to merge.
            safe_merge: Refuse weights that would not be finite.
            keep_base: Keep the base weights as they were, so that `unmerge_adapter` restores them bit for bit; costs a
                second copy of the adapted weights (half a byte each if they are in 4 bits).

        Returns:
            By changed layer, the error that storing the sum in the format of the base weight adds; it is logged too.

        Raises:
            ValueError: an adapter is not attached, adapters are disabled, a base weight cannot be written, or, with
                `safe_merge`, would not be finite. Nothing is merged then.
        """
        names = None if adapter_names is None else as_names(adapter_names)
        layers = self._mergeable_layers(names, safe_merge)
        roundings = {
            name: layer.merge(adapter_names=names, keep_base=keep_base)
            for name, layer in layers.items()
            if layer.to_merge(names)
        }
        _log("merging", roundings)
        return roundings

    def _mergeable_layers(self, names: list[str] | None, safe_merge: bool) -> dict[str, AdapterLayer]:
        """All adapted layers, after checking, before the first is changed, that these adapters can be merged."""
        for name in names or ():
            find_attached(self, name)
        if self._randlora.disabled:
            raise ValueError("nothing can be merged while adapters are disabled: enable_adapter_layers() first.")
        layers = adapted_layers(self)
        for name, layer in layers.items():
            layer.check_writable(name)
            if safe_merge:
                layer.check_merge(names, name)
        return layers

    def unmerge_adapter(self) -> dict[str, Rounding]:
        """Take all merged adapters out of the base weights: bit for bit if they were kept, else with one rounding.

        Returns:
            By changed layer, the error that storing the base weight again adds; it is logged too.
        """
        roundings = {name: layer.unmerge() for name, layer in adapted_layers(self).items() if layer.merged}
        _log("unmerging", roundings)
        return roundings

    @contextlib.contextmanager
    def _by_row(self, adapter_names: list[str], inputs: Iterable[Any]) -> Iterator[None]:
        """Within this context, each row of a batch is computed with its own adapter."""
        if isinstance(adapter_names, str):  # type: ignore[unreachable] # not by its type
            raise TypeError(f"adapter_names={adapter_names!r}: pass a list with one name per row.")
        sizes = input_sizes(inputs)
        if sizes is not None and sizes[0] != len(adapter_names):
            count = len(adapter_names)
            raise ValueError(f"adapter_names has {count} entries for a batch of {sizes[0]} rows: pass one per row.")
        for name in dict.fromkeys(adapter_names):
            if name != BASE_ROWS and find_attached(self, name).extras.biases is not None:
                raise ValueError(f"adapter {name!r} trains biases, which cannot differ between the rows of a batch.")
        state, layers = self._randlora, adapted_layers(self).values()
        if self.training or state.disabled or any(layer.merged for layer in layers):
            raise ValueError(
                "adapter_names works for inference with adapters enabled and unmerged: call model.eval(),"
                " enable_adapter_layers() and unmerge_adapter() first."
            )
        if state.rows is not None:
            raise RuntimeError("a mixed batch runs with this model already: give each thread its own copy.")
        with rows_of([*layers, *wrapped_modules(self).values()], Rows(list(adapter_names), sizes)) as state.rows:
            try:
                with biases_outside(state):
                    yield
            finally:
                state.rows = None


@contextlib.contextmanager
def rows_of(holders: Iterable[Any], rows: Rows) -> Iterator[Rows]:
    """Within this context, these layers and modules compute a mixed batch."""
    holders, fast = list(holders), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoder's reads weights instead of calling layers
    for holder in holders:
        holder.rows = rows
    try:
        yield rows
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for holder in holders:
            holder.rows = None


def input_sizes(inputs: Iterable[Any]) -> tuple[int, int] | None:
    """Rows, and tokens per row, of a model's inputs, as the first of them that is a tensor has them."""
    batch = next((value for value in inputs if isinstance(value, Tensor) and value.dim()), None)
    return None if batch is None else (batch.shape[0], batch.shape[1] if batch.dim() > 1 else 1)


def merged_into(model: nn.Module) -> set[str]:
    """Names of the adapters that are merged into base weights."""
    return {name for layer in adapted_layers(model).values() for name in layer.merged_adapters}


def check_unmerged(model: nn.Module, except_for: Iterable[str] = ()) -> None:
    """Raise a ValueError if adapters other than these are merged: no other one could become active."""
    merged = merged_into(model) - set(except_for)
    if merged:
        raise ValueError(f"adapters {sorted(merged)} are merged into the base weights: unmerge_adapter() first.")


def as_names(names: Names) -> list[str]:
    """One name or several as a list, each once."""
    return [names] if isinstance(names, str) else list(dict.fromkeys(names))


def _log(what: str, roundings: dict[str, Rounding]) -> None:
    """Say what a change of stored weights cost, if it cost more than float32's own rounding."""
    if roundings and max(rounding.of_weight for rounding in roundings.values()) > 1e-6:
        worst = max(roundings, key=lambda name: roundings[name].of_update)
        mean = [sum(part) / len(roundings) for part in zip(*roundings.values(), strict=True)]
        logger.warning(
            "%s rounded %d weights to their storage format: mean error %.2g of the weight and %.2g of the update; worst"
            " in %s, %.2g of the update. Unmerged adapters are exact.",
            *(what, len(roundings), *mean, worst, roundings[worst].of_update),
        )
