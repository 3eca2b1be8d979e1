"""The Llama-shaped models of the benchmarks, and how each method trains them. Imported by them, measures nothing."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft import RandLoraConfig as PeftConfig
from peft import get_peft_model as peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import randlora_torch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, LENGTH, VOCABULARY = 32, 512, 256


def base(hidden: int) -> LlamaForCausalLM:
    """Two layers of random weights, the same at each call."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 21 // 8, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=VOCABULARY))


def in_nf4(folder: str) -> LlamaForCausalLM:
    """A saved model with all linear layers but the head in 4 bits, computing in float32."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


def ours(model: Any, **fields: Any) -> Any:
    """RandLoRA by this package."""
    return randlora_torch.get_peft_model(model, randlora_torch.RandLoraConfig(r=RANK, target_modules=TARGETS, **fields))


def pefts(model: Any, **fields: Any) -> Any:
    """RandLoRA by PEFT."""
    return peft_model(model, PeftConfig(r=RANK, target_modules=TARGETS, **fields))


def lora(model: Any) -> Any:
    """LoRA by PEFT, of the same rank as one basis."""
    return peft_model(model, LoraConfig(r=RANK, target_modules=TARGETS))


METHODS: dict[str, Callable[[Any], Any]] = {
    "ours": ours,
    "PEFT RandLoRA": pefts,
    "PEFT LoRA": lora,
    "full fine-tuning": lambda model: model,
}


def batches(count: int, rows: int) -> torch.Tensor:
    """Random tokens (count, rows, LENGTH)."""
    return torch.randint(VOCABULARY, (count, rows, LENGTH), generator=torch.Generator().manual_seed(1))


def optimizer_of(model: Any, lr: float = 1e-4) -> torch.optim.Optimizer:
    """AdamW on what trains."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The language model's loss on one batch (rows, LENGTH)."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss
