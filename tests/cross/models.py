"""Small base models for the comparisons with PEFT: built from configs, float32, the same numbers at every call."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import interop

VOCABULARY = 128


class AwkwardMLP(nn.Module):
    """Square, wide and tall layers with sides that common ranks do not divide, and more than one basis in each."""

    def __init__(self):
        super().__init__()
        self.wide, self.square, self.tall = nn.Linear(23, 10), nn.Linear(10, 10), nn.Linear(10, 37)

    def forward(self, input_ids):
        """Any integers in; logits out (so that all cases are called alike)."""
        x = torch.sin(input_ids[..., None] * torch.arange(1.0, 24.0))  # (B, T) -> (B, T, 23)
        return self.tall(torch.relu(self.square(torch.relu(self.wide(x)))))


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config).eval()


def mlp():
    torch.manual_seed(0)
    return AwkwardMLP().eval()


LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# name -> (base model, fields of the config); GPT-2's layers are Conv1D, whose weight is (in, out)
CASES = {
    "llama": (llama, {"r": 8, "target_modules": LLAMA_TARGETS}),
    "llama-sparse": (llama, {"r": 7, "target_modules": LLAMA_TARGETS, "sparse": True}),
    "gpt2": (gpt2, {"r": 6, "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "mlp": (mlp, {"r": 3, "target_modules": ["wide", "square", "tall"], "projection_prng_key": 2**40 + 3}),
    "mlp-large-r": (mlp, {"r": 64, "target_modules": ["wide", "square", "tall"], "very_sparse": True}),
}


def tokens(batch=3, length=11):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model, input_ids):
    out = model(input_ids=input_ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def our_config(fields):
    return interop.RandLoraConfig(randlora_alpha=fields["r"] * 0.5, **fields)


def peft_config(fields):
    from peft import RandLoraConfig

    return RandLoraConfig(randlora_alpha=fields["r"] * 0.5, **fields)


def randomize(parameters, *, seed=0):
    """Values as after some training, in place: lambda and gamma of PEFT's size away from their starting values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(parameters):
            scale = 0.3 if "lambda" in name else 1.0 / parameter.shape[-1]
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
