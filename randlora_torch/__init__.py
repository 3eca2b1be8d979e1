"""RandLoRA (arXiv:2502.00987) for PyTorch: adapters attached in place to plain and 4-bit models, in PEFT's format."""

from interop.config import RandLoraConfig
from randlora_torch.adapter import RandLoraAdapter
from randlora_torch.bases import BufferDict, layer_bases, make_bases
from randlora_torch.gradients import UniqueBaseGrad, apply_delta, delta_weight
from randlora_torch.layer import Linear, RandLoraLayer
from randlora_torch.mixin import RandLoraMixin, extract
from randlora_torch.model import get_peft_model, load_adapter

__all__ = [
    "BufferDict",
    "Linear",
    "RandLoraAdapter",
    "RandLoraConfig",
    "RandLoraLayer",
    "RandLoraMixin",
    "UniqueBaseGrad",
    "apply_delta",
    "delta_weight",
    "extract",
    "get_peft_model",
    "layer_bases",
    "load_adapter",
    "make_bases",
]
