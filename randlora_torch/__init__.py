"""RandLoRA (arXiv:2502.00987) for PyTorch: adapters in place on plain, 8-bit and 4-bit models, in PEFT's format."""

import importlib
from typing import Any

from interop.config import RandLoraConfig
from randlora_torch.adapter import RandLoraAdapter
from randlora_torch.attach import extract
from randlora_torch.bases import BufferDict, layer_bases, make_bases
from randlora_torch.gradients import UniqueBaseGrad, apply_delta, delta_weight
from randlora_torch.kbit import prepare_model_for_kbit_training
from randlora_torch.layer import Linear, RandLoraLayer
from randlora_torch.merging import Rounding
from randlora_torch.model import RandLoraModel, get_peft_model, load_adapter
from randlora_torch.saved import ModulesToSaveWrapper

__all__ = [
    "BufferDict",
    "Linear",
    "ModulesToSaveWrapper",
    "RandLoraAdapter",
    "RandLoraConfig",
    "RandLoraLayer",
    "RandLoraModel",
    "Rounding",
    "UniqueBaseGrad",
    "apply_delta",
    "delta_weight",
    "extract",
    "get_peft_model",
    "layer_bases",
    "load_adapter",
    "make_bases",
    "prepare_model_for_kbit_training",
]

# What needs an optional package is imported when it is asked for.
_OPTIONAL = {"Linear4bit": "bnb", "Linear8bitLt": "bnb", "accelerate_peft": "peft_host"}


def __getattr__(name: str) -> Any:
    if name in _OPTIONAL:
        return getattr(importlib.import_module(f"{__name__}.{_OPTIONAL[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_OPTIONAL]
