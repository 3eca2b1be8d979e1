"""Preparing a quantized model for training."""

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)
_PACKED = ("Params4bit", "Int8Params")


def prepare_model_for_kbit_training(
    model: Model,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> Model:
    """Freeze a model, hold what is not quantized in float32, and checkpoint activations; as PEFT's function does.

    It is a choice, not a need: RandLoRA layers train on bfloat16 and float16 models as they are, with less memory.

    Args:
        model: A transformers model, usually loaded in 8 or 4 bits, before adapters are attached.
        use_gradient_checkpointing: Whether a quantized model recomputes activations in the backward pass.
        gradient_checkpointing_kwargs: Options of `torch.utils.checkpoint`, such as `{"use_reentrant": False}`.

    Returns:
        The same model.
    """
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ not in _PACKED:
            parameter.data = parameter.data.float()
    whole: Any = model
    quantized = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    if quantized and use_gradient_checkpointing:
        options = dict(gradient_checkpointing_kwargs or {})
        if options.get("use_reentrant", True):  # it needs an input that requires gradients, and nothing else does
            whole.enable_input_require_grads()
        _enable_checkpointing(model, options)
    return model


def _enable_checkpointing(model: Any, options: dict[str, Any]) -> None:
    """By the name that this release of transformers does not call deprecated."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None and "activation_checkpointing_kwargs" in inspect.signature(enable).parameters:
        enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
