"""`AdapterModel`: the methods that a model gains when an adapter is attached to it, whatever the method.

As torch's `fully_shard` does, attaching swaps the model's class for a subclass of itself and of a subclass of this one,
so that `isinstance(model, PreTrainedModel)` still holds and `model.save_pretrained` writes the adapter.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from interop.bases import DEFAULT_RECIPE
from interop.fields import AdapterConfig
from interop.files import save
from randlora_torch.attach import detach_layers
from randlora_torch.extracting import extract
from randlora_torch.extras import has_new_tokens
from randlora_torch.loading import Source, attach_new, attach_saved
from randlora_torch.restoring import restore
from randlora_torch.structure import bnb_layers
from randlora_torch.switching import AdapterSwitching, Names, as_names, input_sizes, merged_into
from randlora_torch.trainer import support_trainer

# Arguments with which transformers and PEFT save whole models; they say nothing about an adapter.
_OF_WHOLE_MODELS = {"max_shard_size", "save_function", "save_peft_format", "save_original_format", "variant", "token"}


class AdapterModel(AdapterSwitching):
    """What a model becomes when an adapter is attached to it."""

    _base_class: Any  # the class that the model had before

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # all that the model has by that class

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """`type(model)(...)` constructs a model of the class that the adapted one had before."""
        if "_randlora" not in self.__dict__:
            self.__class__ = self._base_class
            self.__init__(*args, **kwargs)  # type: ignore[misc] # of the class from now on

    def __call__(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Call the model; `adapter_names` gives each row of the batch its own adapter ("__base__" for none).

        The choice is kept on the model while it computes: serve one model from one thread at a time.
        """
        if self._randlora.rows is not None:  # within generate
            self._randlora.rows.sizes = input_sizes((*args, *kwargs.values()))
        with rows_of_call(self, adapter_names, args, kwargs):
            return super().__call__(*args, **kwargs)

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """What transformers asks before it trains a quantized model or checkpoints activations."""
        return bool(self._randlora.adapters)

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`; 4-bit weights that bitsandbytes repacked for inference are unpacked again."""
        if (bnb := bnb_layers()) is not None:
            bnb.protect_from_repacking(self)
        return super().train(mode)

    def set_requires_grad(self, adapter_names: Names, requires_grad: bool = True) -> None:
        """See `AdapterSwitching.set_requires_grad`."""
        super().set_requires_grad(adapter_names, requires_grad)
        support_trainer(self, AdapterModel, wanted=requires_grad)

    def get_base_model(self) -> nn.Module:
        """The model itself: adapters are attached in place."""
        return self

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: AdapterConfig,
        *,
        recipe: str = DEFAULT_RECIPE,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Attach a further adapter, with its own r, seed, sparsity and targets; it waits for `set_adapter`.

        Transformers' order, `add_adapter(config, name)`, is understood too.

        Raises:
            ValueError: see `get_peft_model`.
        """
        if isinstance(peft_config, str):
            adapter_name, peft_config = peft_config, adapter_name
        attach_new(self, peft_config, adapter_name, recipe, meta=low_cpu_mem_usage)
        self.set_requires_grad(adapter_name, False)

    def load_adapter(
        self,
        dir_or_adapter: Source,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        recipe: str | None = None,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Attach a saved adapter beside the others; see `randlora_torch.load_adapter`."""
        attach_saved(self, dir_or_adapter, adapter_name, recipe, to_train=is_trainable)
        self._after_loading(adapter_name, is_trainable)

    def _after_loading(self, adapter_name: str, is_trainable: bool) -> None:
        if len(self._randlora.adapters) == 1:
            self.set_adapter(adapter_name)
        self.set_requires_grad(adapter_name, is_trainable)

    def restore_adapter(self, dir_or_adapter: Source, adapter_name: str = "default") -> None:
        """Set an attached adapter to saved values, in place, so that an optimizer goes on with its parameters.

        Raises:
            ValueError: the adapter is not attached, or the saved one is of another kind: what differs is listed.
        """
        restore(self, dir_or_adapter, adapter_name)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Names | None = None,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_embedding_layers: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        """Write the adapters in PEFT's format: "default" into the folder, others into sub-folders of their names.

        Args:
            save_directory: The folder; each adapter in it is replaced at once or not at all.
            safe_serialization: Must be True: pickles are not written.
            selected_adapters: Which to write; all by default.
            is_main_process: Whether to write. Every process must call this if parameters are sharded.
            state_dict: The model's gathered parameters, where a trainer has them; lambda and gamma are taken from it.
            save_embedding_layers: Whether to write the base's embeddings and output head along; "auto" does if tokens
                were added since the model was loaded from its folder.
            **kwargs: What transformers passes for whole models is accepted and has no meaning here.

        Raises:
            ValueError: an adapter is not attached, or cannot be saved (see `interop.save`), or pickles are asked for.
            TypeError: an argument is unknown.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle: only safetensors files are written.")
        unknown = kwargs.keys() - _OF_WHOLE_MODELS
        if unknown:
            raise TypeError(f"save_pretrained got {sorted(unknown)}, which saving an adapter does not know. Drop them.")
        names = list(self._randlora.adapters) if selected_adapters is None else as_names(selected_adapters)
        if not names:
            raise ValueError("the model has no adapter to save: attach one first.")
        embeddings = has_new_tokens(self) if save_embedding_layers == "auto" else bool(save_embedding_layers)
        found = {name: extract(self, name, state_dict=state_dict, with_embeddings=embeddings) for name in names}
        adapters = {name: adapter.to_interop() for name, adapter in found.items()}
        for name, adapter in adapters.items() if is_main_process else ():
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            self._save_training_state(name, folder)
            save(adapter, folder)

    def _save_training_state(self, adapter_name: str, folder: Path) -> None:
        """Write what training needs beyond the adapter's files; most methods need nothing."""

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Names | None = None
    ) -> nn.Module:
        """Merge adapters (default: the active ones) into the base weights for good, and give the plain model back.

        Modules and biases that these adapters trained stay in the model. `progressbar` is PEFT's, and shows none.

        Raises:
            ValueError: see `merge_adapter`.
        """
        if adapter_names is not None:  # so that the modules and biases that stay are theirs
            self._mergeable_layers(as_names(adapter_names), safe_merge)
            self.set_adapter(as_names((*as_names(adapter_names), *sorted(merged_into(self)))))
        self.merge_adapter(adapter_names, safe_merge, keep_base=False)
        return self._unload(keep_saved=True)

    def unload(self) -> nn.Module:
        """Take all adapters off and give the base model back, with its own weights (and embeddings a file brought)."""
        self.disable_adapter_layers()
        return self._unload(keep_saved=False)

    def _unload(self, *, keep_saved: bool) -> nn.Module:
        detach_layers(self, keep_saved=keep_saved)
        del self._randlora
        self.__class__ = self._base_class
        return self

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Counts of trainable and of all parameters; packed ones are counted unpacked, ones split by ZeRO-3 whole."""
        trainable = total = 0
        for parameter in self.parameters():
            count = getattr(parameter, "ds_numel", parameter.numel())
            if type(parameter).__name__ == "Params4bit":
                count *= 2 * parameter.element_size()
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line on trainable parameters, and the bytes of the shared frozen bases."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")


def rows_of_call(
    model: Any, adapter_names: list[str] | None, args: Any, kwargs: Any
) -> contextlib.AbstractContextManager[None]:
    """The context of a call: a mixed batch, if the rows' adapters are named."""
    return (
        contextlib.nullcontext() if adapter_names is None else model._by_row(adapter_names, (*args, *kwargs.values()))
    )
