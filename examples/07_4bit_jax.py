"""Train in JAX over the 4-bit checkpoint of a torch user, then give the adapter back: the same loss in both stacks.

Run `python examples/07_4bit_jax.py [--model FOLDER]`. transformers and bitsandbytes write an NF4 folder of a Llama (by
default, of a small one). It is read without torch, and a linen Llama trains an adapter over the very same 4-bit
weights: they stay packed, a scan unpacks one layer at a time. Then randlora_torch loads it on the 4-bit torch model. It
needs `pip install "randlora[jax,bnb]" accelerate`, and takes about two minutes on two CPU cores; the last line is

    torch and JAX give the same loss; the adapter is in runs/07_4bit_jax/adapter
"""

import argparse
import json
import sys
import sysconfig
from collections import namedtuple
from functools import partial
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import linen as nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import randlora_torch
from randlora_jax import RandLoraConfig, infer_layouts, init, lazy_params, load_adapter, print_trainable_parameters
from randlora_jax.quantized import is_quantized, load_quantized, stack

CONFIG = RandLoraConfig(r=16, randlora_alpha=160, target_modules="all-linear", task_type="CAUSAL_LM")
NAMES = [  # of the stacked kernels in adapter files: those that transformers' Llama has
    {"kernel": "layers/([qkvo]_proj)", "modules": r"model.layers.{i}.self_attn.\1"},
    {"kernel": "layers/((gate|up|down)_proj)", "modules": r"model.layers.{i}.mlp.\1"},
]
OPTIMIZER = optax.adamw(2.5e-3)
TOLERANCE = 1e-5  # of a loss of a few nats: both compute in float32, in another order
jax.config.update("jax_default_matmul_precision", "highest")  # on GPU, jax would use TF32


FIELDS = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
Sizes = namedtuple("Sizes", FIELDS + " rms_norm_eps rope_theta")  # what of config.json decides what a Llama computes


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Turn channels i and i + H/2 of (B, T, N, H) by an angle that grows with the position."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] * theta ** (-jnp.arange(half) / half)  # (T, 1, H/2)
    (a, b), cos, sin = jnp.split(x, 2, -1), jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


class Layer(nn.Module):
    """Causal self-attention, then feed-forward, each on a normalized copy and added to the stream (B, T, D)."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """One layer of the stream: the carry, and nothing to stack."""
        dense, norm = partial(nn.Dense, use_bias=False), partial(nn.RMSNorm, epsilon=self.sizes.rms_norm_eps)
        queries, head_dim = x.shape[-1], x.shape[-1] // self.sizes.num_attention_heads
        keys, heads = self.sizes.num_key_value_heads * head_dim, (*x.shape[:2], -1, head_dim)
        h = norm(name="input_layernorm")(x)
        q = rotate(dense(queries, name="q_proj")(h).reshape(heads), self.sizes.rope_theta)  # (B, T, D) -> (B, T, N, H)
        k = rotate(dense(keys, name="k_proj")(h).reshape(heads), self.sizes.rope_theta)  # (B, T, K*H) -> (B, T, K, H)
        v = dense(keys, name="v_proj")(h).reshape(heads)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + dense(queries, name="o_proj")(mixed.reshape(x.shape))  # (B, T, N, H) -> (B, T, D)
        h = norm(name="post_attention_layernorm")(x)
        gate, up = (dense(self.sizes.intermediate_size, name=name)(h) for name in ("gate_proj", "up_proj"))
        return x + dense(queries, name="down_proj")(nn.silu(gate) * up), None


class Llama(nn.Module):
    """Tokens (B, T) to logits (B, T, V). The scan rematerializes: backward keeps no unpacked kernel of forward."""

    sizes: Sizes

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The logits of the token that follows each position."""
        sizes, options = self.sizes, {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x = nn.Embed(sizes.vocab_size, sizes.hidden_size, name="embed_tokens")(tokens)
        x, _ = nn.scan(nn.remat(Layer), length=sizes.num_hidden_layers, **options)(sizes, name="layers")(x, None)
        x = nn.RMSNorm(sizes.rms_norm_eps, name="norm")(x)
        return nn.Dense(sizes.vocab_size, use_bias=False, name="lm_head")(x)


def load_llama(folder: Path) -> tuple[Llama, dict[str, Any]]:
    """The model of a transformers folder, and its variables, in which packed kernels stay packed."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama" or config.get("tie_word_embeddings"):
        sys.exit(f"{folder}: this example reads Llama models whose lm_head is a weight of its own, and no other")
    config["rope_theta"] = config.get("rope_parameters", config)["rope_theta"]  # where version 5, or 4, writes it
    model = Llama(Sizes(*(config[field] for field in Sizes._fields)))
    weights, layers, first = load_quantized(folder), {}, "model.layers.0."
    for name in (name.removeprefix(first) for name in weights if name.startswith(first)):
        parts = [weights[f"model.layers.{i}.{name}"] for i in range(model.sizes.num_hidden_layers)]
        layers[name.split(".")[-2]] = {"scale": jnp.stack(parts)} if "norm" in name else {"kernel": stack(parts)}
    params = {"embed_tokens": {"embedding": weights["model.embed_tokens.weight"]}, "layers": layers}
    params |= {"norm": {"scale": weights["model.norm.weight"]}, "lm_head": {"kernel": weights["lm_head.weight"].T}}
    return model, {"params": params}


def main() -> None:
    """Quantize in torch, train in JAX, compare in torch."""
    options = parse_arguments()
    folder = options.model or quantize(options.out, options.base_steps)
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    batches = crops(b"".join(file.read_bytes() for file in library))
    held_out = np.concatenate(list(islice(batches, 4)))
    model, variables = load_llama(folder)
    layouts = infer_layouts(model.apply, variables, held_out).named(NAMES)
    adapter = init(CONFIG, variables, layouts=layouts)
    kernels = [leaf for leaf in jax.tree.leaves(variables, is_leaf=is_quantized) if is_quantized(leaf)]
    print(f"{sum(k.nbytes for k in kernels):,d} bytes of kernels, {sum(4 * k.size for k in kernels):,d} if unpacked")
    print_trainable_parameters(adapter, variables)

    def loss(trainable: Any, adapter: Any, variables: Any, batch: jax.Array) -> jax.Array:
        logits = model.apply(lazy_params(variables, adapter.with_trainable(trainable)), batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    @jax.jit
    def step(trainable: Any, state: Any, adapter: Any, variables: Any, batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(trainable, adapter, variables, batch)
        updates, state = OPTIMIZER.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    jax_loss = lambda ours: float(jax.jit(loss)(ours.trainable, ours, variables, held_out))  # noqa: E731
    before = {"JAX": jax_loss(adapter), "torch": torch_loss(load_torch(folder), held_out).item()}
    trainable, state = adapter.trainable, OPTIMIZER.init(adapter.trainable)
    for count, batch in zip(range(1, options.steps + 1), batches, strict=False):
        trainable, state, value = step(trainable, state, adapter, variables, batch)
        if count % 20 == 0:
            print(f"adapter: step {count}/{options.steps}, loss {value:.3f}", file=sys.stderr)
    adapter = adapter.with_trainable(trainable)
    adapter.save_pretrained(options.out / "adapter")
    again = load_adapter(options.out / "adapter", variables, layouts=layouts)
    in_torch = randlora_torch.load_adapter(load_torch(folder), options.out / "adapter")
    after = {"JAX": jax_loss(again), "torch": torch_loss(in_torch, held_out).item()}
    for name in before:
        print(f"held-out loss in {name}: {before[name]:.6f} of the 4-bit base, {after[name]:.6f} with the adapter")
    if after["JAX"] != jax_loss(adapter) or not all(abs(x["JAX"] - x["torch"]) < TOLERANCE for x in (before, after)):
        sys.exit("the reloaded adapter gives another loss, or torch gives another one than JAX")
    print(f"torch and JAX give the same loss; the adapter is in {options.out / 'adapter'}")


def parse_arguments() -> argparse.Namespace:
    """The command line; `--smoke` makes every part a few steps long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a Llama that bitsandbytes quantized (default: make one)")
    parser.add_argument("--out", type=Path, default="runs/07_4bit_jax", help="where to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="steps of the fine-tuning (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, as a test")
    options = parser.parse_args()
    options.steps, options.base_steps = (4, 2) if options.smoke else (options.steps, 300)
    return options


def load_torch(folder: Path, **options: Any) -> torch.nn.Module:
    """The torch model in training mode: in eval mode, bitsandbytes repacks 4-bit weights on some CPUs and rounds."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options).train()


def torch_loss(model: torch.nn.Module, batch: np.ndarray) -> torch.Tensor:
    """Mean cross entropy, in nats per token, of a batch (B, T+1)."""
    tokens = torch.from_numpy(batch).long()
    return model(input_ids=tokens, labels=tokens).loss


# A stand-in for your data and your model: bytes, and a small Llama that torch trains on the manual of Python.
def crops(data: bytes) -> Any:
    """Endless random crops, int32 (B, T+1)."""
    tokens, rng = np.frombuffer(data, np.uint8), np.random.default_rng(0)
    while True:
        yield tokens[rng.integers(len(tokens) - 128, size=(8, 1)) + np.arange(129)].astype(np.int32)


def quantize(out: Path, steps: int) -> Path:
    """What a torch user does: train a model, load it in NF4 with double quantization, save it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _, batch in zip(range(steps), crops("".join(topics.values()).encode()), strict=False):
        torch_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out / "base_model")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    load_torch(out / "base_model", quantization_config=nf4).save_pretrained(out / "nf4")
    return out / "nf4"


if __name__ == "__main__":
    main()
