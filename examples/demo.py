"""The whole way once: train an adapter in Flax, move it to torch, go on in 4 bits, and check that nothing was lost.

Run `make demo`, or `python examples/demo.py [--model FOLDER] [--text FILE_OR_FOLDER]`. Without arguments it trains a
small byte-level Llama on the docstrings of Python's standard library and adapts it to the library's source code. With
them it adapts your Llama (a transformers folder) to your text. About four minutes on two CPU cores; the last line is

    wrote adapter, loss.png and report.md to runs/demo
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import base_model
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import text
import torch
from flax import nnx
from llama_nnx import Llama, load_llama, next_token_loss
from progress import progress
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import interop
import randlora_jax
import randlora_torch

CONFIG = interop.RandLoraConfig(r=16, randlora_alpha=160, target_modules="all-linear", task_type="CAUSAL_LM")
LEARNING_RATE = {"RandLoRA": 1e-2, "LoRA": 1e-2, "full fine-tuning": 1e-3}  # the best of a sweep in factors of about 2
PROMPT = "    def read"


compiled_loss = nnx.jit(next_token_loss)
compiled_logits = nnx.jit(Llama.__call__)


class Data(NamedTuple):
    """Token arrays, and the way back to text."""

    training: np.ndarray
    held_out: np.ndarray
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]

    def batches(self, options: argparse.Namespace, *, seed: int) -> Iterator[np.ndarray]:
        """Endless training batches (B, T+1)."""
        return text.batches(self.training, batch_size=options.batch_size, length=options.length, seed=seed)

    def held_out_batches(self, options: argparse.Namespace) -> list[np.ndarray]:
        """A few batches the training never sees, the same for every model."""
        crops = text.batches(self.held_out, batch_size=options.batch_size, length=options.length, seed=0)
        return list(islice(crops, 16))


def main() -> None:
    """Run the five parts of the demo."""
    options = parse_arguments()
    started = time.perf_counter()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {}
    curves: dict[str, list[float]] = {}

    say("1/5  base model")
    folder = Path(options.model) if options.model else out / "base_model"
    if not options.model:
        facts["base"] = base_model.train_base(folder, steps=options.base_steps)
    data = load_data(options, folder)

    say("2/5  fine-tuning in Flax")
    batches = data.held_out_batches(options)
    facts["held out before"] = jax_loss(load_llama(folder), batches)
    config = dataclasses.replace(CONFIG, base_model_name_or_path=str(folder))
    model = randlora_jax.attach(load_llama(folder), config)
    curves["RandLoRA"] = train_flax(model, randlora_jax.RandLoraParam, "RandLoRA", data, options)
    adapter = randlora_jax.extract(model)
    facts["trainable"] = {"RandLoRA": randlora_jax.count_trainable(adapter)}
    facts["held out"] = {"RandLoRA": jax_loss(model, batches)}
    for name, kind, make in (("LoRA", nnx.LoRAParam, with_lora), ("full fine-tuning", nnx.Param, lambda base: base)):
        reference = make(load_llama(folder))
        facts["trainable"][name] = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(reference, kind)))
        curves[name] = train_flax(reference, kind, name, data, options)
        facts["held out"][name] = jax_loss(reference, batches)

    say("3/5  from Flax to torch")
    moved = interop.convert(adapter, to="torch")
    torch_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    facts["effect"] = largest_difference(model, torch_model, batches[0])
    randlora_torch.load_adapter(torch_model, moved)
    facts["difference"] = largest_difference(model, torch_model, batches[0])
    say(f"     largest logit difference {facts['difference']:.2g}; the adapter changes logits by {facts['effect']:.2g}")

    say("4/5  going on in 4 bits")
    quantized = load_nf4(folder)
    randlora_torch.load_adapter(quantized, moved, is_trainable=True)
    quantized.print_trainable_parameters()
    facts["held out"]["RandLoRA, on the NF4 base"] = torch_loss(quantized, batches)
    curves["RandLoRA in torch, NF4 base"] = train_torch(quantized, data, options)
    facts["held out"]["RandLoRA, trained on there"] = torch_loss(quantized, batches)
    quantized.save_pretrained(out / "adapter")
    back = randlora_jax.attach(load_llama(folder), out / "adapter")
    torch_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    randlora_torch.load_adapter(torch_model, out / "adapter")
    facts["difference back"] = largest_difference(back, torch_model, batches[0])
    quantized.merge_adapter()
    facts["held out"]["merged into the NF4 base"] = torch_loss(quantized, batches)
    facts["samples"] = sample(quantized, data)

    say("5/5  writing")
    facts["seconds"] = time.perf_counter() - started
    report.write_plot(out / "loss.png", curves, before=facts["held out before"])
    report.write_report(out / "report.md", facts, adapter_folder=out / "adapter")
    print(f"wrote adapter, loss.png and report.md to {out}")


def parse_arguments() -> argparse.Namespace:
    """The command line; `--smoke` makes every part a few steps long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a Llama saved by transformers (default: train a small one)")
    parser.add_argument("--text", help="text file or folder to adapt to (default: the standard library's code)")
    parser.add_argument("--out", default="runs/demo", help="where to write (default: %(default)s)")
    parser.add_argument("--base-steps", type=int, default=base_model.STEPS, help="steps of the base model")
    parser.add_argument("--steps", type=int, default=200, help="steps of each fine-tuning in Flax; torch takes half")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, as a test")
    options = parser.parse_args()
    options.batch_size, options.length = 4, 256
    if options.smoke:
        options.base_steps, options.steps, options.batch_size, options.length = 4, 4, 2, 64
    return options


def say(line: str) -> None:
    """A headline, in order with the progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def load_data(options: argparse.Namespace, folder: Path) -> Data:
    """Tokens of the text: by the model's tokenizer if its folder has one, else one per byte."""
    raw = text.read_text(options.text) if options.text else text.source_code()
    if any(folder.glob("tokenizer*")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(raw.decode(), add_special_tokens=False, verbose=False)["input_ids"]
        return Data(*text.split(np.asarray(ids)), lambda s: tokenizer(s)["input_ids"], tokenizer.decode)
    to_text = lambda ids: bytes(ids).decode(errors="replace")  # noqa: E731
    return Data(*text.split(text.to_tokens(raw)), lambda string: list(string.encode()), to_text)


def schedule(name: str, steps: int) -> optax.Schedule:
    """Warm-up over a tenth of the steps, then a cosine to zero."""
    return optax.warmup_cosine_decay_schedule(0, LEARNING_RATE[name], max(1, steps // 10), steps)


def train_flax(model: Llama, kind: type, name: str, data: Data, options: argparse.Namespace) -> list[float]:
    """Train the parameters of one kind, with AdamW; returns the loss of each step."""
    optimizer = nnx.Optimizer(model, optax.adamw(schedule(name, options.steps)), wrt=kind)

    @nnx.jit
    def step(model: Llama, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(next_token_loss, argnums=nnx.DiffState(0, kind))(model, tokens)
        optimizer.update(model, grads)
        return loss

    losses: list[float] = []
    crops = data.batches(options, seed=1)
    for batch in progress(crops, total=options.steps, describe=lambda: f"{name} loss {np.mean(losses[-20:]):.3f}", every=20):
        losses.append(float(step(model, optimizer, batch)))
    return losses


def with_lora(model: Llama) -> Llama:
    """Flax's own LoRA on the same layers, with the rank that trains about as many parameters as the RandLoRA does."""
    for path, module in list(nnx.iter_modules(model)):
        for name, layer in list(vars(module).items()):
            if isinstance(layer, nnx.Linear) and name != "lm_head":
                sizes = layer.in_features, layer.out_features
                rank = max(1, round(interop.count_trainable(sizes, CONFIG.r) / sum(sizes)))
                rngs = nnx.Rngs(len(path) + len(name))
                setattr(module, name, nnx.LoRA(sizes[0], rank, sizes[1], base_module=layer, rngs=rngs))
    return model


def jax_loss(model: Llama, batches: list[np.ndarray]) -> float:
    """Mean loss of the Flax model over some batches."""
    return float(np.mean([compiled_loss(model, batch) for batch in batches]))


@torch.no_grad()
def torch_loss(model: torch.nn.Module, batches: list[np.ndarray]) -> float:
    """Mean loss of the torch model over some batches."""
    model.eval()
    return float(np.mean([base_model.next_token_loss(model, batch).item() for batch in batches]))


def largest_difference(flax_model: Llama, torch_model: torch.nn.Module, batch: np.ndarray) -> float:
    """The largest difference between the logits of the two stacks, on one batch."""
    flax_logits = np.asarray(compiled_logits(flax_model, jnp.asarray(batch)))
    with torch.no_grad():
        torch_logits = torch_model.eval()(torch.from_numpy(batch).long()).logits.numpy()
    return float(np.abs(flax_logits - torch_logits).max())


def load_nf4(folder: Path) -> torch.nn.Module:
    """The base in NF4 with double quantization, on the GPU if there is one."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, device_map=device)


def train_torch(model: torch.nn.Module, data: Data, options: argparse.Namespace) -> list[float]:
    """Go on training the adapter on the quantized base, in a plain torch loop at a tenth of the learning rate."""
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE["RandLoRA"] / 10)
    losses: list[float] = []
    crops = data.batches(options, seed=2)
    total = options.steps // 2
    for batch in progress(crops, total=total, describe=lambda: f"NF4 loss {np.mean(losses[-20:]):.3f}", every=20):
        loss = base_model.next_token_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sample(model: torch.nn.Module, data: Data) -> list[str]:
    """A few continuations of one prompt by the merged model."""
    torch.manual_seed(0)
    ids = torch.tensor([data.encode(PROMPT)], device=model.device)
    options = {"max_new_tokens": 80, "do_sample": True, "temperature": 0.6, "top_k": 20, "num_return_sequences": 3}
    drawn = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return [data.decode(row) for row in drawn.tolist()]


if __name__ == "__main__":
    main()
