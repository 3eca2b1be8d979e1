"""Callbacks of transformers' Trainer: AdaLoRA's schedule of ranks, and W' made once per optimizer step."""

from typing import Any

from accelerate.state import GradientState
from torch import nn
from transformers import TrainerCallback

from randlora_torch.attach import find_attached
from randlora_torch.folding import begin_step, end_step
from randlora_torch.model import AdaLoraModel
from randlora_torch.step import Step


class AdaLoraCallback(TrainerCallback):
    """Calls `update_and_allocate` at every optimizer step: `Trainer(..., callbacks=[AdaLoraCallback()])`, TRL's alike.

    Steps count from 1, so the last step of a run of `total_step` steps is step `total_step`.
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Check that the run is long enough for the schedule.

        Raises:
            TypeError: the model carries no AdaLoRA adapter.
            ValueError: the run ends before the ranks have reached their target.
        """
        adapted = _adapted_part(model)
        for name in adapted._require_training():
            config = find_attached(adapted, name).adalora_config
            if config.last_allocation > state.max_steps:
                raise ValueError(
                    f"the Trainer makes {state.max_steps} steps, but adapter {name!r} reaches its ranks at step"
                    f" {config.last_allocation} (total_step={config.total_step}, tfinal={config.tfinal}): set"
                    f" total_step={state.max_steps} in its config."
                )

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """The moment between the optimizer's step and the clearing of the gradients."""
        _adapted_part(model).update_and_allocate(state.global_step + 1)


class FoldOnceCallback(TrainerCallback):
    """`fold_once` at every optimizer step: `Trainer(..., callbacks=[FoldOnceCallback()])`, TRL's trainers alike.

    For `gradient_accumulation_steps` above 1: all micro-batches of a step compute over one W' per layer. The gradients
    of lambda and gamma come at the end of the last backward, before they are clipped.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Forget a step that an exception broke off."""
        end_step(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Before the step's first micro-batch."""
        begin_step(model, Step(is_last=lambda: GradientState().sync_gradients))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After the optimizer's step."""
        end_step(model)


def _adapted_part(model: nn.Module | None) -> AdaLoraModel:
    """The model inside what the Trainer holds: compiled, or in a wrapper for several processes."""
    parts = () if model is None else model.modules()
    found = next((module for module in parts if isinstance(module, AdaLoraModel)), None)
    if found is None:
        raise TypeError(
            f"AdaLoraCallback: the Trainer's model, a {type(model).__name__}, carries no AdaLoRA adapter: attach one"
            " with randlora_torch.get_peft_model(model, AdaLoraConfig(...)), or drop the callback."
        )
    return found
