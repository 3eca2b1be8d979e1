"""Models with adapters: `get_peft_model`, `load_adapter`, and what a model can do by the method of its adapters."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from interop.adalora import AdaLoraConfig
from interop.bases import DEFAULT_RECIPE
from interop.config import RandLoraConfig
from interop.fields import AdapterConfig
from randlora_torch.adalora import AdaLoraLayer
from randlora_torch.adapted import AdapterModel, rows_of_call
from randlora_torch.attach import attached_to, find_attached
from randlora_torch.bases import BufferDict
from randlora_torch.loading import Source, attach_new, attach_saved
from randlora_torch.rank_allocator import Allocation, RankAllocator, require_whole
from randlora_torch.structure import adapted_layers, floating_dtype
from randlora_torch.svd import distances_from_orthogonal
from randlora_torch.switching import ModelMixin, check_unmerged
from randlora_torch.trainer import support_trainer
from randlora_torch.training_state import save_state


class _Attaches:
    """The name of a method as a function: `RandLoraModel(model, config)`; subclasses are classes of adapted models."""

    _base_class: Any
    _method: type

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """`RandLoraModel(...)` attaches; the class of an adapted model makes an empty object, for `__init__`."""
        return super().__new__(cls) if hasattr(cls, "_base_class") else get_peft_model(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self._base_class, self._method), self.__getstate__()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """`RandLoraModel.from_pretrained(model, folder, adapter_name="default", ...)`: see `load_adapter`."""
        if not hasattr(cls, "_base_class"):
            return load_adapter(*args, **kwargs)
        return cls._base_class.from_pretrained(*args, **kwargs)


class RandLoraModel(_Attaches, AdapterModel):
    """What a model becomes when a RandLoRA adapter is attached to it; `RandLoraModel(model, config)` attaches one.

    Args:
        model: Any module with linear layers.
        config: What to adapt and how.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Leave lambda and gamma on the meta device, for `restore_adapter` to fill.
    """

    config_class_of_adapters = RandLoraConfig

    @property
    def randlora_A(self) -> BufferDict:
        """Bases (r, 1, min_dim) by adapter name, shared by all adapted layers, as far as these use them."""
        return self._randlora.bases_A

    @property
    def randlora_B(self) -> BufferDict:
        """Bases (max_dim, n, r) by adapter name, shared by all adapted layers, as far as these use them."""
        return self._randlora.bases_B

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line on trainable parameters, and the bytes of the shared frozen bases."""
        super().print_trainable_parameters()
        frozen = self.randlora_A.nbytes + self.randlora_B.nbytes
        print(f"frozen bases: {frozen:,d} bytes, shared by {len(adapted_layers(self))} layers")


class AdaLoraModel(_Attaches, AdapterModel):
    """What a model becomes when an AdaLoRA adapter is attached to it; `AdaLoraModel(model, config)` attaches one.

    While it trains, the loss that it returns includes `orthogonal_loss`, and `update_and_allocate` must be called at
    every step: by `AdaLoraCallback` in transformers' `Trainer`, or by the training loop.

    Args:
        model: Any module with linear layers or 2-D convolutions.
        config: What to adapt and how.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Leave the parameters on the meta device, for `restore_adapter` to fill.
    """

    config_class_of_adapters = AdaLoraConfig

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model. In training, `orthogonal_loss` is added to the loss of its output, if that has one.

        A model that returns a tuple, or no loss, leaves this to the training loop. Where the Trainer gives
        `num_items_in_batch`, a micro-batch gets its share, so that all of a step's together get it once.
        """
        output = super().__call__(*args, **kwargs)
        if self.training and torch.is_grad_enabled() and isinstance(getattr(output, "loss", None), Tensor):
            output.loss = output.loss + _share_of_step(kwargs) * self.orthogonal_loss().to(output.loss)
        return output

    def orthogonal_loss(self) -> Tensor:
        """How far the A and B of the adapters in training are from orthogonal, times their `orth_reg_weight`.

        The mean over all A and B of the Frobenius norms of A A^T - I and B^T B - I (equation 4 of arXiv:2303.10512,
        without the square, as in PEFT); with several adapters, the sum of theirs.
        """
        total = torch.zeros(())
        for name in self._in_training():
            layers = {path: layer for path, layer in _adalora_layers(self).items() if layer.holds(name)}
            require_whole(layers, name)
            factors = (layer.factors(name) for layer in layers.values())
            distances = [distance for parts in factors for distance in distances_from_orthogonal(parts)]
            mean = torch.stack([distance.to(distances[0].device) for distance in distances]).mean()
            total = total.to(mean.device) + find_attached(self, name).adalora_config.orth_reg_weight * mean
        return total

    def update_and_allocate(self, global_step: int) -> dict[str, Allocation]:
        """Let the ranks of the adapters in training follow their schedule.

        Call it at every optimizer step, after `optimizer.step()` and before the gradients are cleared:

            loss.backward()
            optimizer.step()
            model.update_and_allocate(step)  # 1 at the first step
            optimizer.zero_grad()

        Args:
            global_step: Number of the optimizer step just made.

        Returns:
            By adapter, the budget, and the triplets that its layers keep if they were chosen anew.

        Raises:
            ValueError: no adapter trains, there are no gradients, or importance was never measured.
        """
        return {name: self._allocate(name, global_step) for name in self._require_training()}

    def _allocate(self, name: str, global_step: int) -> Allocation:
        allocator = self._allocator(name)
        allocation = allocator.update_and_allocate(self, global_step)
        if allocation.kept is not None:
            info = find_attached(self, name)
            self._randlora.adapters[name] = dataclasses.replace(info, config=info.config_keeping(allocation.kept))
        return allocation

    def _allocator(self, name: str) -> RankAllocator:
        info = find_attached(self, name)
        if info.allocator is not None:
            return info.allocator
        allocator = RankAllocator(self, info.adalora_config, name)
        self._randlora.adapters[name] = dataclasses.replace(info, allocator=allocator)
        return allocator

    @property
    def rankallocator(self) -> RankAllocator:
        """The allocator of the first adapter in training.

        Raises:
            ValueError: no adapter is in training.
        """
        return self._allocator(self._require_training()[0])

    def ranks(self, adapter_name: str | None = None) -> dict[str, int]:
        """How many triplets an adapter (default: the first active one) has left in each layer.

        Raises:
            ValueError: the adapter is not attached, or none is active.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        if name is None:
            raise ValueError("no adapter is active: pass the name of one.")
        info = find_attached(self, name)
        return {module: sum(info.rows_kept(module)) for module in info.modules}

    def _save_training_state(self, adapter_name: str, folder: Path) -> None:
        info, trains = find_attached(self, adapter_name), self._trains(adapter_name)
        config = info.adalora_config
        if trains and info.allocator is None and config.init_lora_weights and config.rank_pattern is None:
            layers = _adalora_layers(self)
            if any(layers[name].lora_E[adapter_name].any() for name in info.modules):
                warnings.warn(
                    f"the ranks of adapter {adapter_name!r} were never allocated, so all are {config.init_r}: give"
                    " the Trainer callbacks=[AdaLoraCallback()], or call model.update_and_allocate(step) in your loop."
                    f" model.set_requires_grad({adapter_name!r}, False) before saving silences this.",
                    stacklevel=3,
                )
        save_state(self, adapter_name, info if trains else dataclasses.replace(info, allocator=None), folder)

    def _require_training(self) -> list[str]:
        names = self._in_training()
        if not names:
            raise ValueError("no adapter is in training: make one active and trainable with model.set_adapter(name).")
        return names

    def _in_training(self) -> list[str]:
        active = () if self._randlora.disabled else self._randlora.active
        return [name for name in active if self._trains(name)]


def _adalora_layers(model: nn.Module) -> dict[str, AdaLoraLayer]:
    return {name: layer for name, layer in adapted_layers(model).items() if isinstance(layer, AdaLoraLayer)}


def _share_of_step(inputs: Mapping[str, Any]) -> Tensor | float:
    """How much of an optimizer step's loss a micro-batch is, by its labels, if the step's number of them is known."""
    labels, total = inputs.get("labels"), inputs.get("num_items_in_batch")
    if labels is None or total is None:
        return 1.0
    counted = labels[..., 1:] if labels.dim() > 1 else labels  # the first token of a text is not predicted
    return counted.ne(-100).sum() / total


class _Generates(ModelMixin):
    """`generate` of an adapted model that has it, with rows of a batch for different adapters."""

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The model's own `generate`; `adapter_names` gives each row of the batch its own adapter."""
        with rows_of_call(self, adapter_names, args, kwargs):
            return super().generate(*args, **kwargs)  # type: ignore[misc] # of the class that it is mixed with


@functools.cache
def adapted_class(kind: type, method: type) -> type:
    """The subclass that a model of this class becomes by a method; it goes by the name of the class itself.

    Libraries look classes up by name (transformers' output recorders do), so the name must not change.
    """
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    mixins = (method, _Generates) if hasattr(kind, "generate") else (method,)
    return type(kind.__name__, (*mixins, kind), {**names, "_base_class": kind, "_method": method})


def _rebuild(kind: Any, method: type) -> nn.Module:
    """An empty adapted model, for pickle and deepcopy to fill."""
    model = kind.__new__(adapted_class(kind, method))
    support_trainer(model, AdapterModel, wanted=True)
    return model


@overload
def get_peft_model(
    model: nn.Module,
    peft_config: RandLoraConfig,
    adapter_name: str = ...,
    *,
    recipe: str = ...,
    autocast_adapter_dtype: bool = ...,
    low_cpu_mem_usage: bool = ...,
) -> RandLoraModel: ...


@overload
def get_peft_model(
    model: nn.Module,
    peft_config: AdaLoraConfig,
    adapter_name: str = ...,
    *,
    recipe: str = ...,
    autocast_adapter_dtype: bool = ...,
    low_cpu_mem_usage: bool = ...,
) -> AdaLoraModel: ...


@overload
def get_peft_model(
    model: nn.Module,
    peft_config: AdapterConfig,
    adapter_name: str = ...,
    *,
    recipe: str = ...,
    autocast_adapter_dtype: bool = ...,
    low_cpu_mem_usage: bool = ...,
) -> AdapterModel: ...


def get_peft_model(
    model: nn.Module,
    peft_config: AdapterConfig,
    adapter_name: str = "default",
    *,
    recipe: str = DEFAULT_RECIPE,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
) -> AdapterModel:
    """Attach a new adapter to `model`, in place, freeze everything else, and return the model.

    Args:
        model: Any module with linear layers: nn.Linear, transformers' Conv1D, bitsandbytes' Linear8bitLt, Linear4bit.
        peft_config: What to adapt and how, by RandLoRA or AdaLoRA; PEFT's own configs are understood too.
        adapter_name: Name of the adapter.
        recipe: How the bases are drawn, see `interop.RECIPES`.
        autocast_adapter_dtype: Train in float32; otherwise in the dtype of the model.
        low_cpu_mem_usage: Leave the parameters on the meta device, for `model.restore_adapter` to fill.

    Raises:
        ValueError: a target matches nothing or no linear layer, the name is taken or not usable, or a module of
            modules_to_save cannot be trained.
    """
    dtype = None if autocast_adapter_dtype else floating_dtype(model)
    check_unmerged(model)
    attach_new(model, peft_config, adapter_name, recipe, dtype=dtype, meta=low_cpu_mem_usage)
    adapted = _make_adapted(model)
    adapted.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
    return adapted


def load_adapter(
    model: nn.Module,
    dir_or_adapter: Source,
    adapter_name: str = "default",
    is_trainable: bool = False,
    *,
    recipe: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> AdapterModel:
    """Attach a saved or converted adapter to `model`, in place, and return the model.

    The first adapter of a model becomes active; later ones wait for `model.set_adapter`.

    Args:
        model: The base model that the adapter was made for.
        dir_or_adapter: A folder in PEFT's format, or an adapter of any stack.
        adapter_name: Name to attach it under.
        is_trainable: Whether to go on training it, with what an unfinished AdaLoRA training left in the folder;
            otherwise its parameters are frozen too.
        recipe: The recipe of the bases, for a folder that neither holds them nor names it.
        low_cpu_mem_usage: PEFT's option; here, weights that the file replaces are never initialized anyway.

    Raises:
        FileNotFoundError, AdapterFormatError: see `interop.load`; or the adapter was made for another model.
        ValueError: the adapter name is taken or not usable.
        TypeError: `dir_or_adapter` is no folder and no adapter.
    """
    attach_saved(model, dir_or_adapter, adapter_name, recipe, to_train=is_trainable)
    adapted = _make_adapted(model)
    adapted._after_loading(adapter_name, is_trainable)
    return adapted


def _make_adapted(model: nn.Module) -> AdapterModel:
    """Swap the class of a model that carries adapters."""
    if not isinstance(model, AdapterModel):
        (info,) = attached_to(model).values()
        methods = (RandLoraModel, AdaLoraModel)
        method: type = next(kind for kind in methods if kind.config_class_of_adapters is type(info.config))
        kind: type = type(model)
        model.__class__ = adapted_class(kind, method)
    return cast(AdapterModel, model)
