"""The whole way once: train an adapter in Flax, move it to torch, go on in 4 bits, and check that nothing was lost.

Run `make demo`, or `python examples/demo/demo.py [--model FOLDER] [--text FILE_OR_FOLDER]`. Without arguments it trains
a small byte-level Llama on the docstrings of Python's standard library and adapts it to the library's source code. With
them it adapts your Llama (a transformers folder) to your text. About four minutes on two CPU cores; the last line is

    wrote adapter, loss.png and report.md to runs/demo
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

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
from report import Run
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import interop
import randlora_jax
import randlora_torch

CONFIG = interop.RandLoraConfig(r=16, randlora_alpha=160, target_modules="all-linear", task_type="CAUSAL_LM")
LEARNING_RATE = {"RandLoRA": 2.5e-3, "LoRA": 1e-2, "full fine-tuning": 2e-3}  # best of a sweep in factors of 2
PROMPT = "    def read"
jax.config.update("jax_default_matmul_precision", "highest")  # on GPU, jax would use TF32, torch does not

compiled_loss = nnx.jit(next_token_loss)
compiled_logits = nnx.jit(Llama.__call__)


class Data(NamedTuple):
    """Tokens to train on, the same held-out batches (B, T+1) for every model, and the way to text and back."""

    training: np.ndarray
    held_out: list[np.ndarray]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def main() -> None:
    """Run the five parts of the demo."""
    options = parse_arguments()
    started = time.perf_counter()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    run = Run(trainable={}, curves={}, held_out={}, numbers={}, samples=[])

    raw = text.read_text(options.text) if options.text else text.source_code()
    say("1/5  base model")
    folder = Path(options.model) if options.model else out / "base_model"
    if not options.model:
        base_model.train_base(folder, steps=options.base_steps)
    data = load_data(raw, options, folder)

    say("2/5  fine-tuning in Flax")
    run.held_out["base model"] = jax_loss(load_llama(folder), data.held_out)
    config = dataclasses.replace(CONFIG, base_model_name_or_path=str(folder))
    model = randlora_jax.attach(load_llama(folder), config)
    fine_tune(run, "RandLoRA", model, randlora_jax.RandLoraParam, data, options)
    fine_tune(run, "LoRA", with_lora(load_llama(folder)), nnx.LoRAParam, data, options)
    fine_tune(run, "full fine-tuning", load_llama(folder), nnx.Param, data, options)

    say("3/5  from Flax to torch")
    torch_model = load_torch(folder)
    run.numbers["effect"] = largest_difference(model, torch_model, data.held_out[0])
    moved = interop.convert(model, to="torch")
    randlora_torch.load_adapter(torch_model, moved)
    run.numbers["difference"] = largest_difference(model, torch_model, data.held_out[0])
    run.numbers["largest logit"] = float(np.abs(compiled_logits(model, data.held_out[0])).max())
    say("     largest logit difference {difference:.2g}, of logits up to {largest logit:.3g}".format(**run.numbers))
    say("     (the adapter itself changes them by up to {effect:.3g})".format(**run.numbers))

    say("4/5  going on in 4 bits")
    quantized = randlora_torch.load_adapter(load_nf4(folder), moved, is_trainable=True)
    quantized.print_trainable_parameters()
    run.curves[report.IN_TORCH] = train_torch(quantized, data, options)
    run.held_out["RandLoRA, moved to the NF4 base"] = run.curves[report.IN_TORCH][0][1]
    run.held_out["RandLoRA, trained on there"] = run.curves[report.IN_TORCH][-1][1]
    quantized.save_pretrained(out / "adapter")
    in_flax = randlora_jax.attach(load_llama(folder), out / "adapter")
    in_torch = randlora_torch.load_adapter(load_torch(folder), out / "adapter")
    run.numbers["difference after"] = largest_difference(in_flax, in_torch, data.held_out[0])
    quantized.merge_adapter()
    run.held_out["merged into the NF4 base"] = torch_loss(quantized, data.held_out)
    run.samples.extend(sample(quantized, data))

    say("5/5  writing")
    run.numbers["seconds"] = time.perf_counter() - started
    report.write_plot(out / "loss.png", run)
    report.write_report(out / "report.md", run, adapter_folder=out / "adapter")
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


def load_data(raw: bytes, options: argparse.Namespace, folder: Path) -> Data:
    """Tokens of the text: by the model's tokenizer if its folder has one, else one per byte."""
    if any(folder.glob("tokenizer*")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encode = lambda string: tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
        tokens, decode = np.asarray(encode(raw.decode(errors="ignore"))), tokenizer.decode
    else:
        encode = lambda string: list(string.encode())  # noqa: E731
        tokens, decode = text.to_tokens(raw), lambda ids: bytes(ids).decode(errors="replace")
    training, held_out = text.split(tokens)
    crops = text.batches(held_out, batch_size=options.batch_size, length=options.length, seed=0)
    return Data(training, list(islice(crops, 12)), encode, decode)


def fine_tune(run: Run, name: str, model: Llama, kind: type, data: Data, options: argparse.Namespace) -> None:
    """Train the parameters of one kind with AdamW, and note their count and the held-out loss on the way."""
    run.trainable[name] = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, kind)))
    optimizer = nnx.Optimizer(model, optax.adamw(schedule(name, options.steps)), wrt=kind)

    @nnx.jit
    def step(model: Llama, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(next_token_loss, argnums=nnx.DiffState(0, kind))(model, tokens)
        optimizer.update(model, grads)
        return loss

    crops = text.batches(data.training, batch_size=options.batch_size, length=options.length, seed=1)
    train = lambda batch: step(model, optimizer, batch)  # noqa: E731
    evaluate = lambda: jax_loss(model, data.held_out)  # noqa: E731
    run.curves[name] = curve(name, train, evaluate, crops, options.steps)
    run.held_out[name] = run.curves[name][-1][1]


def curve(
    name: str, train: Callable, evaluate: Callable[[], float], batches: Iterable[np.ndarray], steps: int
) -> list[tuple[int, float]]:
    """Train on `steps` batches; (step, held-out loss) at the start, ten times on the way, and so at the end."""
    every = max(1, steps // 10)
    points = [(0, evaluate())]
    describe = lambda: f"{name}: held-out loss {points[-1][1]:.3f}"  # noqa: E731
    for count, batch in enumerate(progress(batches, total=steps, describe=describe, every=2 * every), start=1):
        train(batch)
        if count % every == 0:
            points.append((count, evaluate()))
    return points


def schedule(name: str, steps: int) -> optax.Schedule:
    """Warm-up over a tenth of the steps, then a cosine to zero."""
    return optax.warmup_cosine_decay_schedule(0, LEARNING_RATE[name], max(1, steps // 10), steps)


def with_lora(model: Llama) -> Llama:
    """Flax's own LoRA on the same layers, with ranks that train as many parameters in all as the RandLoRA does."""
    owed = 0  # what rounding the ranks of earlier layers left over
    for path, module in list(nnx.iter_modules(model)):
        for name, layer in list(vars(module).items()):
            if isinstance(layer, nnx.Linear) and name != "lm_head":
                sizes = layer.in_features, layer.out_features
                owed += interop.count_trainable(sizes, CONFIG.r)
                rank = max(1, round(owed / sum(sizes)))
                owed -= rank * sum(sizes)
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


def load_torch(folder: Path) -> torch.nn.Module:
    """The base in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def load_nf4(folder: Path) -> torch.nn.Module:
    """The base in NF4 with double quantization, on the GPU if there is one."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, device_map=device)


def train_torch(model: torch.nn.Module, data: Data, options: argparse.Namespace) -> list[tuple[int, float]]:
    """Go on training the adapter on the quantized base, in a plain torch loop at a lower learning rate."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE["RandLoRA"] / 5)

    def train(batch: np.ndarray) -> None:
        model.train()
        loss = base_model.next_token_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    crops = text.batches(data.training, batch_size=options.batch_size, length=options.length, seed=2)
    return curve(report.IN_TORCH, train, lambda: torch_loss(model, data.held_out), crops, options.steps // 2)


def sample(model: torch.nn.Module, data: Data) -> list[str]:
    """A few continuations of one prompt by the merged model."""
    torch.manual_seed(0)
    ids = torch.tensor([data.encode(PROMPT)], device=model.device)
    options = {"max_new_tokens": 80, "do_sample": True, "temperature": 0.6, "top_k": 20, "num_return_sequences": 3}
    drawn = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return [data.decode(row) for row in drawn.tolist()]


if __name__ == "__main__":
    main()
