"""Models called with numpy arrays, for what compares stacks without knowing them."""

import os
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from randlora_torch.bases import to_torch
from randlora_torch.model import load_adapter


def call(model: nn.Module, inputs: np.ndarray) -> Any:
    """The model's output for token ids, or other inputs, without gradients; logits come as float32 on the CPU."""
    device = next((parameter.device for parameter in model.parameters()), None)
    given = to_torch(np.asarray(inputs))
    with torch.no_grad():
        output = model((given.long() if given.dtype == torch.int32 else given).to(device))
    logits = getattr(output, "logits", output)
    return logits.float().cpu() if isinstance(logits, torch.Tensor) else output


def adapted_logits(base: str | os.PathLike[str], adapter: str | os.PathLike[str], inputs: np.ndarray) -> Any:
    """Logits of the language model in a folder with the adapter in another."""
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True).eval()
    load_adapter(model, adapter)
    return call(model, inputs)
