"""RandLoRA and AdaLoRA for PyTorch: adapters in place on plain, 8-bit and 4-bit models, in PEFT's format."""

import importlib
from typing import TYPE_CHECKING, Any

try:
    import jaxtyping  # noqa: F401
    import safetensors  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(f"{error.name} is not installed. Run: pip install 'randlora[torch]'", name=error.name) from error

from interop.adalora import AdaLoraConfig
from interop.blockwise import Rounding
from interop.config import RandLoraConfig
from randlora_torch.adalora import AdaLoraLayer, SVDConv2d, SVDLinear
from randlora_torch.adapter import AdaLoraAdapter, RandLoraAdapter
from randlora_torch.bases import BufferDict, layer_bases, make_bases
from randlora_torch.contraction import adapted_linear, apply_delta, folded_weight
from randlora_torch.extracting import extract
from randlora_torch.folding import fold_once, set_plan
from randlora_torch.gradients import UniqueBaseGrad, delta_weight
from randlora_torch.kbit import prepare_model_for_kbit_training
from randlora_torch.kernel_choice import kernel_choices, set_kernels
from randlora_torch.model import AdaLoraModel, RandLoraModel, get_peft_model, load_adapter
from randlora_torch.randlora import Linear, RandLoraLayer
from randlora_torch.rank_allocator import RankAllocator
from randlora_torch.saved import ModulesToSaveWrapper

__all__ = [
    "AdaLoraAdapter",
    "AdaLoraConfig",
    "AdaLoraLayer",
    "AdaLoraModel",
    "BufferDict",
    "Linear",
    "ModulesToSaveWrapper",
    "RandLoraAdapter",
    "RandLoraConfig",
    "RandLoraLayer",
    "RandLoraModel",
    "RankAllocator",
    "Rounding",
    "SVDConv2d",
    "SVDLinear",
    "UniqueBaseGrad",
    "adapted_linear",
    "apply_delta",
    "delta_weight",
    "extract",
    "fold_once",
    "folded_weight",
    "get_peft_model",
    "kernel_choices",
    "layer_bases",
    "load_adapter",
    "make_bases",
    "prepare_model_for_kbit_training",
    "set_kernels",
    "set_plan",
]

# What needs an optional package, or is slow to import, is imported when it is asked for.
_OPTIONAL = {
    **dict.fromkeys(("Linear4bit", "Linear8bitLt", "SVDLinear4bit", "SVDLinear8bitLt"), "bnb"),
    **dict.fromkeys(("AdaLoraCallback", "FoldOnceCallback"), "callback"),
    "accelerate_peft": "peft_host",
}


if TYPE_CHECKING:
    from randlora_torch.bnb import Linear4bit as Linear4bit
    from randlora_torch.bnb import Linear8bitLt as Linear8bitLt
    from randlora_torch.bnb import SVDLinear4bit as SVDLinear4bit
    from randlora_torch.bnb import SVDLinear8bitLt as SVDLinear8bitLt
    from randlora_torch.callback import AdaLoraCallback as AdaLoraCallback
    from randlora_torch.callback import FoldOnceCallback as FoldOnceCallback
    from randlora_torch.peft_host import accelerate_peft as accelerate_peft


def __getattr__(name: str) -> Any:
    if name in _OPTIONAL:
        return getattr(importlib.import_module(f"{__name__}.{_OPTIONAL[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_OPTIONAL]
