"""The methods that an adapted torch model gains, and what they read from it."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from interop.adapter import Factors
from interop.bases import Bases
from interop.config import RandLoraConfig
from interop.files import save
from randlora_torch.adapter import RandLoraAdapter
from randlora_torch.bases import BufferDict
from randlora_torch.layer import RandLoraLayer


@dataclasses.dataclass(frozen=True)
class AttachedAdapter:
    """What a model remembers of an adapter besides the parameters in its layers."""

    config: RandLoraConfig
    recipe: str | None
    modules: tuple[str, ...]


class RandLoraMixin:
    """The methods that a model gains when an adapter is attached to it.

    Attributes:
        randlora_adapters: What is attached, by adapter name.
    """

    randlora_adapters: dict[str, AttachedAdapter]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (type(self).__mro__[2],), self.__dict__

    # The bases are submodules of the layers only: as children of the model they would join an nn.Sequential's chain.
    @property
    def randlora_A(self) -> BufferDict:
        """Bases (r, 1, min_dim) by adapter name, shared by all adapted layers."""
        return next(iter(adapted_layers(self).values())).randlora_A

    @property
    def randlora_B(self) -> BufferDict:
        """Bases (max_dim, n, r) by adapter name, shared by all adapted layers."""
        return next(iter(adapted_layers(self).values())).randlora_B

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line on trainable parameters, and the bytes of the shared frozen bases."""
        print(trainable_report(self))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        selected_adapters: str | Iterable[str] | None = None,
        is_main_process: bool = True,
        safe_serialization: bool = True,
    ) -> None:
        """Write the adapters in PEFT's format: "default" into the folder, others into sub-folders of their names.

        Raises:
            ValueError: an adapter in `selected_adapters` is not attached, or cannot be saved (see `interop.save`), or
                `safe_serialization` is False.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle: only safetensors files are written.")
        names = list(self.randlora_adapters) if selected_adapters is None else _names(selected_adapters)
        adapters = {name: extract(self, name).to_interop() for name in names}
        for name, adapter in adapters.items() if is_main_process else ():
            save(adapter, Path(save_directory) if name == "default" else Path(save_directory) / name)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Make these adapters the active ones: they are applied, and their factors train.

        Raises:
            ValueError: one of them is not attached, or another one is merged into the base weights.
        """
        names = _names(adapter_name)
        for name in names:
            find_attached(self, name)
        merged = {name for layer in adapted_layers(self).values() for name in layer.merged_adapters} - set(names)
        if merged:
            raise ValueError(f"adapters {sorted(merged)} are merged into the base weights: unmerge_adapter() first.")
        for layer in adapted_layers(self).values():
            layer.active_adapters = list(names)
            for name in layer.randlora_lambda:
                for parameter in layer.factors(name):
                    parameter.requires_grad_(name in names)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the model computes as the base model does, also if adapters are merged."""
        layers = adapted_layers(self).values()
        before = [(layer.disable_adapters, list(layer.merged_adapters)) for layer in layers]
        for layer in layers:
            layer.unmerge()
            layer.disable_adapters = True
        try:
            yield
        finally:
            for layer, (disabled, merged) in zip(layers, before, strict=True):
                layer.disable_adapters = disabled
                layer.merge(adapter_names=merged)

    def merge_adapter(self, adapter_names: str | list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the update of the given adapters (default: the active ones) to the base weights.

        Raises:
            ValueError: an adapter is not attached, adapters are disabled, a base weight cannot be written, or, with
                `safe_merge`, would not be finite. Nothing is merged then.
        """
        adapter_names = None if adapter_names is None else _names(adapter_names)
        for name in adapter_names or ():
            find_attached(self, name)
        layers = adapted_layers(self)
        for name, layer in layers.items():
            if layer.disable_adapters or "weight" not in layer.base_layer._parameters:
                reason = "adapters are disabled" if layer.disable_adapters else "its weight is parametrized"
                raise ValueError(f"nothing can be merged into {name}: {reason}.")
        for name, layer in layers.items() if safe_merge else ():  # all are checked before the first is changed
            layer.check_merge(adapter_names, name)
        for layer in layers.values():
            layer.merge(adapter_names=adapter_names)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights again."""
        for layer in adapted_layers(self).values():
            layer.unmerge()


def _names(names: str | Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(dict.fromkeys(names))


@functools.cache
def adapted_class(kind: type) -> type:
    """The subclass that an adapted model of this class becomes; it goes by the name of the class itself.

    Libraries look classes up by name (transformers' output recorders do), so the name must not change.
    """
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (RandLoraMixin, kind), names)


def _rebuild(kind: type) -> nn.Module:
    """An empty adapted model, for pickle and deepcopy to fill."""
    adapted = adapted_class(kind)
    return adapted.__new__(adapted)


def extract(model: nn.Module, adapter_name: str | None = None) -> RandLoraAdapter:
    """An adapter attached to `model`, with the current values of its factors (no copy is made).

    Args:
        model: A model with an adapter attached.
        adapter_name: Which one; may be left out if there is only one.

    Raises:
        ValueError: the model has no such adapter, or several and no name was given.
    """
    attached = getattr(model, "randlora_adapters", {})
    if adapter_name is None and len(attached) != 1:
        raise ValueError(f"the model has the adapters {list(attached)}: pass adapter_name to say which one.")
    name = adapter_name or next(iter(attached))
    info = find_attached(model, name)
    layers = adapted_layers(model)
    return RandLoraAdapter(
        factors={module: Factors(*(p.detach() for p in layers[module].factors(name))) for module in info.modules},
        bases=Bases(model.randlora_A[name], model.randlora_B[name]),
        config=info.config,
        shapes={module: (layers[module].out_features, layers[module].in_features) for module in info.modules},
        recipe=info.recipe,
    )


def trainable_report(model: nn.Module) -> str:
    """PEFT's line on trainable parameters (4-bit weights counted unpacked), and the bytes of the frozen bases."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    frozen = sum(buffer.nbytes for bases in (model.randlora_A, model.randlora_B) for buffer in bases.buffers())
    return (
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}\n"
        f"frozen bases: {frozen:,d} bytes, shared by {len(adapted_layers(model))} layers"
    )


def adapted_layers(model: nn.Module) -> dict[str, RandLoraLayer]:
    """The layers of a model that carry adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RandLoraLayer)}


def find_attached(model: Any, adapter_name: str) -> AttachedAdapter:
    """What the model remembers of an adapter.

    Raises:
        ValueError: no adapter of this name is attached.
    """
    attached = getattr(model, "randlora_adapters", {})
    if adapter_name not in attached:
        raise ValueError(f"adapter {adapter_name!r} is not attached: the model has {list(attached)}.")
    return attached[adapter_name]
