"""What the tests of real JAX models share: tiny models in transformers folders, and adapters by PEFT for them."""

import copy
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers

# Logits are below 1. PEFT's and ours are each 2e-7 to 7e-7 away from PEFT's in float64.
LOGITS = {"rtol": 0, "atol": 2e-6}
VOCABULARY, BATCH, LENGTH, WINDOW, THETA = 128, 4, 12, 8, 1_000_000
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEFAULT = None  # PEFT's default for all families: q_proj and v_proj, so one of two weights in Tunix's Gemma3 kv kernel

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


def llama_config(rope_theta=THETA, **options):
    return transformers.LlamaConfig(rope_theta=rope_theta, **{**SIZES, **options})


def qwen2_config(rope_theta=THETA, **options):
    return transformers.Qwen2Config(rope_theta=rope_theta, tie_word_embeddings=False, **{**SIZES, **options})


def qwen3_config(rope_theta=THETA, **options):
    return transformers.Qwen3Config(rope_theta=rope_theta, tie_word_embeddings=False, **{**SIZES, **options})


def gemma3_config(**options):
    return transformers.Gemma3TextConfig(sliding_window=WINDOW, query_pre_attn_scalar=16, **{**SIZES, **options})


class Folder(NamedTuple):
    """A transformers folder, and the torch model that was saved in it."""

    path: Any
    model: transformers.PreTrainedModel


def save_model(config, path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # norms are created at one or zero, biases at zero: a converter could ignore them
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(path)
    return Folder(path, model)


def tokens():
    return np.random.default_rng(1).integers(1, VOCABULARY, (BATCH, LENGTH), dtype=np.int32)


@torch.no_grad()
def torch_logits(model):
    return model(input_ids=torch.from_numpy(tokens()).long()).logits.numpy()


def adapted_by_peft(folder, target_modules, path):
    """PEFT's model with a random adapter, as after training, which is also saved at `path`.

    lambda is such that dW is about as large as W. Attention saturates much above that, and rounding errors grow.
    """
    config = peft.RandLoraConfig(r=6, randlora_alpha=12, target_modules=target_modules, projection_prng_key=3)
    model = peft.get_peft_model(copy.deepcopy(folder.model), config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "randlora_lambda" in name:
                parameter.normal_(0, 0.05, generator=generator)
            elif "randlora_gamma" in name:
                parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    return model


def adapted_by_adalora(folder, target_modules, path):
    """As `adapted_by_peft`, with an adapter of AdaLoRA."""
    config = peft.AdaLoraConfig(init_r=6, target_r=3, total_step=10, lora_alpha=12, target_modules=target_modules)
    model = peft.get_peft_model(copy.deepcopy(folder.model), config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.12, generator=generator)
    model.save_pretrained(path)
    return model


def assert_peft_has(model, folder, path):
    """The adapter at `path` is that of PEFT's `model`, number by number."""
    again = peft.PeftModel.from_pretrained(copy.deepcopy(folder.model), path).eval()
    expected, got = model.state_dict(), again.state_dict()
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=0, msg=key)
