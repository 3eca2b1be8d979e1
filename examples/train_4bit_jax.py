"""Train in JAX over the 4-bit checkpoint of a torch user, then give the adapter back: the same loss in both stacks.

Run `python examples/train_4bit_jax.py [--model FOLDER]`. transformers and bitsandbytes write an NF4 folder; it is read
without torch, and an NNX Llama trains an adapter over the very same 4-bit weights, which stay packed in memory.
randlora_torch then loads that adapter on the 4-bit torch model. --model is such a folder; without it, a small
byte-level Llama is trained and quantized first. About three minutes on two CPU cores; the last line is

    torch and JAX give the same loss; the adapter is in runs/train_4bit_jax/adapter
"""

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import base_model
import jax
import numpy as np
import optax
import text
import torch
from flax import nnx
from llama_nnx import Llama, load_llama, next_token_loss
from progress import progress
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import randlora_torch
from randlora_jax import RandLoraConfig, RandLoraParam, attach, extract, print_trainable_parameters
from randlora_jax.quantized import is_quantized, load_quantized

CONFIG = RandLoraConfig(r=16, randlora_alpha=160, target_modules="all-linear", task_type="CAUSAL_LM")
TOLERANCE = 1e-5  # of a loss of a few nats: both compute in float32, in another order
jax.config.update("jax_default_matmul_precision", "highest")  # on GPU, jax would use TF32
BATCH_SIZE, LENGTH = 4, 256


def main() -> None:
    """Quantize in torch, train in JAX, compare in torch."""
    options = parse_arguments()
    out = Path(options.out)
    folder = Path(options.model) if options.model else quantize(out, options)
    training, held_out = text.split(text.to_tokens(text.source_code(limit=400_000)))
    batches = text.batches(training, batch_size=BATCH_SIZE, length=LENGTH, seed=1)
    held_out = list(islice(text.batches(held_out, batch_size=BATCH_SIZE, length=LENGTH, seed=0), options.held_out))

    weights = load_quantized(folder)
    print_sizes(weights)
    model = attach(load_4bit(folder, weights), CONFIG)
    print_trainable_parameters(extract(model), weights)
    before = {"JAX": jax_loss(model, held_out), "torch": torch_loss(load_torch(folder), held_out)}
    train(model, batches, options.steps)

    extract(model).save_pretrained(out / "adapter")
    again = attach(load_4bit(folder, weights), out / "adapter")
    in_torch = randlora_torch.load_adapter(load_torch(folder), out / "adapter")
    after = {"JAX": jax_loss(again, held_out), "torch": torch_loss(in_torch, held_out)}
    for stack in before:
        print(f"held-out loss in {stack}: {before[stack]:.6f} of the 4-bit base, {after[stack]:.6f} with the adapter")
    if after["JAX"] != jax_loss(model, held_out):
        sys.exit("the reloaded adapter gives another loss")
    differences = [abs(losses["JAX"] - losses["torch"]) for losses in (before, after)]
    if not max(differences) < TOLERANCE:
        sys.exit(f"torch and JAX differ by {differences[0]:.2g} before and {differences[1]:.2g} after training")
    print(f"torch and JAX give the same loss; the adapter is in {out / 'adapter'}")


def parse_arguments() -> argparse.Namespace:
    """The command line; `--smoke` makes every part a few steps long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a byte-level Llama that bitsandbytes quantized (default: make one)")
    parser.add_argument("--out", default="runs/train_4bit_jax", help="where to write (default: %(default)s)")
    parser.add_argument("--base-steps", type=int, default=base_model.STEPS, help="steps of the base model")
    parser.add_argument("--steps", type=int, default=100, help="steps of the fine-tuning (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a model of random weights, as a test")
    options = parser.parse_args()
    options.steps, options.held_out = (4, 1) if options.smoke else (options.steps, 8)
    return options


def quantize(out: Path, options: argparse.Namespace) -> Path:
    """What a torch user does: load a model in NF4 with double quantization, and save it."""
    if options.smoke:
        base_model.small_llama(seed=0).save_pretrained(out / "base_model")
    else:
        base_model.train_base(out / "base_model", steps=options.base_steps)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    load_torch(out / "base_model", quantization_config=nf4).save_pretrained(out / "nf4")
    return out / "nf4"


def load_4bit(folder: Path, weights: dict[str, Any]) -> Llama:
    """The NNX Llama on 4-bit kernels, rematerialized so that backward keeps none of the kernels of forward.

    How many exist at a time is up to XLA: on CPU it dequantizes the kernels of an unrolled model ahead, all of them.
    Only a scan over stacked layers (`randlora_jax.quantized.stack`) prevents that everywhere.
    """
    model = load_llama(folder, weights=weights)
    model.model.remat = True
    return model


def load_torch(folder: Path, **options: Any) -> torch.nn.Module:
    """The torch model in training mode: in eval mode, bitsandbytes repacks 4-bit weights on some CPUs and rounds."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options).train()


def train(model: Llama, batches: Any, steps: int) -> None:
    """Train the adapter, and nothing else."""
    optimizer = nnx.Optimizer(model, optax.adamw(2.5e-3), wrt=RandLoraParam)

    @nnx.jit
    def step(model: Llama, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(next_token_loss, argnums=nnx.DiffState(0, RandLoraParam))(model, tokens)
        optimizer.update(model, grads)
        return loss

    losses: list[float] = []
    describe = lambda: f"loss {np.mean(losses[-20:]):.3f}"  # noqa: E731
    for batch in progress(batches, total=steps, describe=describe, every=20):
        losses.append(float(step(model, optimizer, batch)))


compiled_loss = nnx.jit(next_token_loss)


def jax_loss(model: Llama, batches: list[np.ndarray]) -> float:
    """Mean loss of the NNX model over some batches."""
    return float(np.mean([compiled_loss(model, batch) for batch in batches]))


@torch.no_grad()
def torch_loss(model: torch.nn.Module, batches: list[np.ndarray]) -> float:
    """The same of the torch model."""
    return float(np.mean([base_model.next_token_loss(model, batch).item() for batch in batches]))


def print_sizes(weights: dict[str, Any]) -> None:
    """How many bytes the quantized kernels take, and would take."""
    kernels = [leaf for leaf in weights.values() if is_quantized(leaf)]
    packed, unpacked = (sum(sizes) for sizes in zip(*((k.nbytes, 4 * k.size) for k in kernels), strict=True))
    print(f"{len(kernels)} kernels in {packed:,d} bytes, in float32 they would take {unpacked:,d}")


if __name__ == "__main__":
    main()
