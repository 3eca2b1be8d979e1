"""Serve several adapters on one base model: a batch whose rows each ask for another one, and switching between them.

Run `python examples/09_serve_adapters_torch.py [--model FOLDER] [--nf4]`. Three adapters of different r, sparsity and
targets learn to write in three ways, are saved, and are loaded together onto one base, in 4 bits with --nf4. Without
--model, a small byte-level Llama is trained first. It needs `pip install "randlora[torch]"`, with --nf4
`"randlora[bnb]" accelerate`, and takes about two minutes on two CPU cores; the last line is

    every row of the mixed batch is that of its adapter alone; the adapters are in runs/09_serve_adapters_torch
"""

import argparse
import contextlib
import sys
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import randlora_torch
from randlora_torch import RandLoraConfig

MLP = ["gate_proj", "up_proj", "down_proj"]
CONFIGS = {  # a smaller r trains more parameters
    "code": RandLoraConfig(r=16, randlora_alpha=160, target_modules="all-linear"),
    "capitals": RandLoraConfig(r=32, randlora_alpha=320, target_modules=MLP, sparse=True),
    "leet": RandLoraConfig(r=8, randlora_alpha=80, target_modules=["q_proj", "v_proj", *MLP], projection_prng_key=7),
}
LEET = bytes.maketrans(b"aeiost", b"431057")
BASE = "__base__"  # stands for no adapter in `adapter_names`
PROMPT, TOKENS = b"    Return the ", 32


class Generated(NamedTuple):
    """Tokens (B, N) and the logits (B, N, V) they were chosen by."""

    tokens: torch.Tensor
    logits: torch.Tensor
    seconds: float


def main() -> None:
    """Train and save three adapters, then serve them."""
    options = parse_arguments()
    out, folder = options.out, options.model or options.out / "base_model"
    if not options.model:
        train_base(folder, options.base_steps)
    train_adapters(load_base(folder), options.steps).save_pretrained(out)  # each into a folder of its name

    server = load_base(folder, nf4=options.nf4).eval()
    print(f"{server.num_parameters():,d} weights in the base", end="; ")
    for name in CONFIGS:
        randlora_torch.load_adapter(server, out / name, name)
    print(f"{adapter_bytes(server):,d} bytes in {len(CONFIGS)} adapters")

    rows = ["code", "capitals", BASE, "leet"]
    mixed = generate(server, len(rows), adapter_names=rows)
    for name, line in zip(rows, mixed.tokens.tolist(), strict=True):
        print(f"{name:>10}: {bytes(line).decode(errors='replace')!r}")

    seconds = 0.0
    for i, name in enumerate(rows):
        if name != BASE:
            server.set_adapter(name)
        with server.disable_adapter() if name == BASE else contextlib.nullcontext():
            alone = generate(server, 1)
        seconds += alone.seconds
        check_equal(mixed, i, alone)
    print(f"one mixed batch took {mixed.seconds:.2f} s, its rows one after the other {seconds:.2f} s")

    server.delete_adapter("leet")  # its memory is free; the others do not notice
    server.set_adapter("capitals")
    check_equal(mixed, rows.index("capitals"), generate(server, 1))
    print(f"{adapter_bytes(server):,d} bytes left after one was deleted: {', '.join(server.peft_config)}")
    print(f"every row of the mixed batch is that of its adapter alone; the adapters are in {out}")


def parse_arguments() -> argparse.Namespace:
    """The command line; `--smoke` makes every part a few steps long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a byte-level Llama (default: train a small one)")
    parser.add_argument("--out", type=Path, default="runs/09_serve_adapters_torch", help="where to write")
    parser.add_argument("--steps", type=int, default=100, help="steps of each adapter (default: %(default)s)")
    parser.add_argument("--nf4", action="store_true", help="serve on the base in 4 bits")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, as a test")
    options = parser.parse_args()
    options.steps, options.base_steps = (2, 4) if options.smoke else (options.steps, 300)
    return options


def load_base(folder: Path, *, nf4: bool = False) -> torch.nn.Module:
    """The base in float32 or in 4 bits."""
    if not nf4:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)


def train_adapters(model: torch.nn.Module, steps: int) -> torch.nn.Module:
    """All adapters on one model, trained one after the other: only the active one computes and gets gradients."""
    manual = "".join(topics.values()).encode()
    library = b"".join(file.read_bytes() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    ways = {"code": library, "capitals": manual.upper(), "leet": manual.translate(LEET)}
    for name, config in CONFIGS.items():
        randlora_torch.get_peft_model(model, config, name)  # in place, and active
        train(name, model, ways[name], [p for p in model.parameters() if p.requires_grad], steps)
    return model


def generate(model: torch.nn.Module, count: int, **options: list[str]) -> Generated:
    """The likeliest continuations of `count` copies of the prompt."""
    ids = torch.tensor([list(PROMPT)] * count, device=model.device)  # (B, T)
    options |= {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    started = time.perf_counter()
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return Generated(made.sequences[:, ids.shape[1] :], torch.stack(made.logits, 1), time.perf_counter() - started)


def check_equal(mixed: Generated, row: int, alone: Generated) -> None:
    """Stop unless a row of the mixed batch is what one adapter made alone, up to rounding, and no other row is."""
    distances = (mixed.logits - alone.logits).abs().amax((1, 2))  # (B,)
    if not torch.equal(mixed.tokens[row], alone.tokens[0]) or distances[row] > 1e-3 or distances.argmin() != row:
        sys.exit(f"row {row} of the mixed batch is not what its adapter makes alone: {distances.tolist()}")


def adapter_bytes(model: torch.nn.Module) -> int:
    """Memory of all adapters: their factors, and the bases that all layers share."""
    factors = sum(p.nbytes for name, p in model.named_parameters() if "randlora_" in name)
    return factors + model.randlora_A.nbytes + model.randlora_B.nbytes


# A stand-in for your model: a Llama of 0.9 million parameters that reads bytes, trained on the manual of Python.
def train_base(folder: Path, steps: int) -> None:
    """Train it for some steps and save it; bitsandbytes wants sizes that are multiples of 64."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"vocab_size": 256, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None))
    train("base model", model, "".join(topics.values()).encode(), model.parameters(), steps)
    model.save_pretrained(folder)


def train(name: str, model: torch.nn.Module, text: bytes, parameters: Iterable[torch.Tensor], steps: int) -> None:
    """Train some parameters on random crops of a text, one token per byte."""
    model.train()
    optimizer, tokens = torch.optim.AdamW(parameters, lr=2.5e-3), torch.tensor(list(text))
    for step in range(1, steps + 1):
        batch = tokens[torch.randint(len(tokens) - 128, (8, 1)) + torch.arange(128)]  # (B, T)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"{name}: step {step}/{steps}, loss {loss.item():.3f}", file=sys.stderr)


if __name__ == "__main__":
    main()
