"""RandLoRA, LoRA, AdaLoRA and full fine-tuning of a byte-level Llama, at equal numbers of trained parameters.

Run `python examples/12_compare_torch.py`. A small Llama learns the docstrings of Python's standard library. Then each
method adapts it to the library's source code: RandLoRA and AdaLoRA by randlora_torch, LoRA by PEFT. The learning rate
of each method and budget comes from one sweep on validation files; several seeds give the spread on test files.
About fifteen minutes on two idle CPU cores; the last line is

    wrote results.md, results.json and compare.png to runs/12_compare_torch
"""

import argparse
import ast
import copy
import json
import math
import os
import platform
import random
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM

import randlora_torch

TITLE = "A byte Llama, pretrained on docstrings of Python's library, adapted to its source code"
PACKAGES = ("torch", "transformers", "peft")
STATISTICS = {"median": np.median, "min": min, "max": max}
BUDGETS = {1: 48, 4: 9, 11: 3}  # rank of LoRA and AdaLoRA: r of RandLoRA that trains as much, within 1%
KINDS = {"RandLoRA, dense": {}, "RandLoRA, sparse": {"sparse": True}, "RandLoRA, very sparse": {"very_sparse": True}}
FULL, NAMES = "full fine-tuning", ["LoRA", *KINDS, "AdaLoRA"]
RATES, SWEEP_SEED = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1], 1000  # the sweep's seed is not reported
BATCH_SIZE, LENGTH = 4, 64


def main() -> None:
    """Train the base, adapt it by every method at every budget, write the numbers, the table and the picture."""
    options = parse_arguments()
    docstrings, training, validation, test = read_library()
    base = small_llama()
    for _ in train(base, docstrings, 4 * options.steps, rate=3e-3, seed=0):
        pass
    runs, timed = [], []
    for budget, name in [(0, FULL), *((budget, name) for budget in options.budgets for name in NAMES)]:
        r = options.budgets[budget] if name in KINDS else budget
        sweep = [fit(name, r, base, training, options.steps, rate, SWEEP_SEED) for rate in options.rates]
        losses = [held_out_loss(model, validation, options.batches) for model in sweep]
        rate = options.rates[int(np.argmin(losses))]
        models = [fit(name, r, base, training, options.steps, rate, seed) for seed in range(options.seeds)]
        run = {"method": name, "budget": budget, "r": r, "trainable": [count(model) for model in models], "rate": rate}
        scores = [held_out_loss(model, test, options.batches) for model in models]
        runs.append(run | {"sweep": losses, "scores": scores})
        model = make_model(name, r, base, options.steps, seed=0)
        timed.append(partial(next, train(model, training, options.steps, rate, seed=0), None))
        print(f"{name} {r}: rate {rate:g}, {np.median(runs[-1]['scores']):.3f} nats per byte", file=sys.stderr)
    for run, seconds in zip(runs, alternate(timed, min(10, options.steps)), strict=True):
        run["seconds"] = seconds
    unadapted = held_out_loss(base, test, options.batches)
    write(options.out, {"base": unadapted, "steps": options.steps, "rates": options.rates, "runs": runs})
    print(f"wrote results.md, results.json and compare.png to {options.out}")


def parse_arguments() -> argparse.Namespace:
    """The command line; `--smoke` makes every part a few steps long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default="runs/12_compare_torch", help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="steps of each training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings that are reported (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, as a test")
    options = parser.parse_args()
    options.rates, options.budgets, options.batches = RATES, BUDGETS, 64
    if options.smoke:
        options.steps, options.seeds, options.batches = 6, 2, 4
        options.rates, options.budgets = RATES[1:3], {4: BUDGETS[4]}
    return options


def read_library() -> list[torch.Tensor]:
    """Bytes: the docstrings of some files of the standard library, and the code of these and of two other parts."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    random.Random(0).shuffle(files)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings, code = [], []
    for file in files:
        source = file.read_text(encoding="utf-8")
        nodes = [
            node for node in ast.walk(ast.parse(source)) if isinstance(node, documented) and ast.get_docstring(node)
        ]
        docstrings.append("\n\n".join(map(ast.get_docstring, nodes)))
        cut = {line for node in nodes for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
        code.append("\n".join(line for number, line in enumerate(source.split("\n"), 1) if number not in cut))
    first, second = round(0.8 * len(files)), round(0.9 * len(files))
    parts = docstrings[:first], code[:first], code[first:second], code[second:]
    return [torch.frombuffer(bytearray("\n\n".join(part).encode()), dtype=torch.uint8) for part in parts]


def small_llama() -> LlamaForCausalLM:
    """0.3 million parameters; a token is a byte."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256, max_position_embeddings=LENGTH))


def make_model(name: str, r: int, base: torch.nn.Module, steps: int, seed: int) -> torch.nn.Module:
    """The base under a method; the seed draws RandLoRA's bases, and what LoRA and AdaLoRA start from."""
    torch.manual_seed(seed)
    model, targets = copy.deepcopy(base), {"target_modules": "all-linear"}  # all but the output layer
    if name == "LoRA":
        return peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=2 * r, **targets))
    if name == "AdaLoRA":  # starts with half as many ranks again and ends, on average, with r
        schedule = {"tinit": steps // 10, "tfinal": steps // 3, "total_step": steps}
        ranks = {"init_r": r + r // 2 + 1, "target_r": r, "lora_alpha": 2 * (r + r // 2 + 1)}
        return randlora_torch.get_peft_model(model, randlora_torch.AdaLoraConfig(**ranks, **schedule, **targets))
    if name in KINDS:
        fields = {"r": r, "randlora_alpha": 10 * r, "projection_prng_key": seed, **KINDS[name]}
        return randlora_torch.get_peft_model(model, randlora_torch.RandLoraConfig(**fields, **targets))
    return model


def train(model: torch.nn.Module, tokens: torch.Tensor, steps: int, rate: float, seed: int) -> Iterator[None]:
    """Train with Adam, step by step; the rate rises for a tenth of the steps and falls along a cosine to zero."""
    allocates, rng = hasattr(model, "update_and_allocate"), np.random.default_rng(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    shape = lambda step: min((step + 1) / (steps // 10 + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    for step in range(1, steps + 1):
        loss = next_token_loss(model, crops(tokens, rng))
        if allocates:
            loss = loss + model.orthogonal_loss()
        loss.backward()
        optimizer.step()
        schedule.step()
        if allocates:
            model.update_and_allocate(step)
        optimizer.zero_grad()
        yield


def fit(name: str, r: int, base: torch.nn.Module, tokens: torch.Tensor, steps: int, rate: float, seed: int) -> Any:
    """The trained model."""
    model = make_model(name, r, base, steps, seed)
    for _ in train(model, tokens, steps, rate, seed):
        pass
    return model


def crops(tokens: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Random crops (B, T+1) of the text."""
    starts = torch.from_numpy(rng.integers(len(tokens) - LENGTH, size=BATCH_SIZE))
    return tokens[starts[:, None] + torch.arange(LENGTH + 1)].long()  # (B, 1) + (T+1,) -> (B, T+1)


def next_token_loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, in nats per byte, of a batch (B, T+1)."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits  # (B, T, V)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())  # (B*T, V), (B*T,)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokens: torch.Tensor, batches: int) -> float:
    """Mean loss over some batches, the same for every model."""
    rng = np.random.default_rng(0)
    return float(np.mean([next_token_loss(model.eval(), crops(tokens, rng)).item() for _ in range(batches)]))


def count(model: torch.nn.Module) -> int:
    """What is trained; of AdaLoRA, what is left of it in the end."""
    if hasattr(model, "update_and_allocate"):
        return randlora_torch.extract(model).to_interop().num_trainable
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def alternate(runs: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of each, in rounds in which all take their turn: a busy machine slows them alike."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for times, run in zip(seconds, runs, strict=True):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    return seconds


def write(out: Path, result: dict[str, Any]) -> None:
    """results.json, results.md with the machine and a table, and compare.png."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result).savefig(out / "compare.png", dpi=130)
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    machine = f"{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}."
    setting = f"Test loss in nats per byte, of {len(result['runs'][0]['scores'])} seeds, {result['steps']} steps each."
    head = ["method", "rank or r", "trained parameters", "learning rate", *STATISTICS, "time of a step, of LoRA's"]
    lines = [f"# {TITLE}", "", machine, "", setting, "", head, ["---"] * len(head)]
    lines.append(["base, not adapted", "", "0", "", f"{result['base']:.3f}", "", "", ""])
    lora = {run["budget"]: run["seconds"] for run in result["runs"] if run["method"] == "LoRA"}
    lora[0] = lora[min(lora)]  # of the smallest rank, for full fine-tuning
    for run in result["runs"]:
        cells = [run["method"], str(run["r"] or ""), f"{np.median(run['trainable']):,.0f}", f"{run['rate']:g}"]
        cells += [f"{statistic(run['scores']):.3f}" for statistic in STATISTICS.values()]
        ratio = np.median(np.divide(run["seconds"], lora[run["budget"]]))
        lines.append([*cells, f"{ratio:.2f}"])
    text = "\n".join(line if isinstance(line, str) else f"| {' | '.join(line)} |" for line in lines) + "\n"
    (out / "results.md").write_text(text, encoding="utf-8")
    print(text)


def cpu_name() -> str:
    """As Linux tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def draw(result: dict[str, Any]) -> Figure:
    """Loss against trained parameters; the methods of one budget stand side by side."""
    figure = Figure(figsize=(9.5, 6), layout="constrained")
    axes, (full, *runs) = figure.subplots(), result["runs"]
    for index, name in enumerate(NAMES):
        own = [run for run in runs if run["method"] == name]
        middle = np.array([np.median(run["scores"]) for run in own])
        errors = np.abs(np.array([(min(run["scores"]), max(run["scores"])) for run in own]).T - middle)
        places = [np.median(run["trainable"]) * 1.06 ** (index - 2) for run in own]
        axes.errorbar(places, middle, errors, label=name, marker="osD^v"[index], capsize=3)
    label = f"{FULL}, {full['trainable'][0]:,} parameters"
    axes.axhline(np.median(full["scores"]), color="black", linestyle="--", label=label)
    axes.axhspan(min(full["scores"]), max(full["scores"]), color="black", alpha=0.08)
    axes.plot([], [], " ", label=f"base, not adapted: {result['base']:.3f} nats per byte")
    ticks = [[run for run in runs if run["method"] == name] for name in ("LoRA", "RandLoRA, dense")]
    places = [run["trainable"][0] for run in ticks[0]]
    ranks = [f"rank {lora['r']}\nr = {dense['r']}" for lora, dense in zip(*ticks, strict=True)]
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:,}\n{rank}" for place, rank in zip(places, ranks, strict=True)])
    axes.minorticks_off()
    seeds = f"median, minimum and maximum of {len(full['scores'])} seeds"
    axes.set_title(f"{TITLE}\n{seeds}; each at the best of {len(result['rates'])} learning rates")
    axes.set_xlabel("trained parameters, on a log scale (rank of LoRA, and of AdaLoRA on average; r of RandLoRA)")
    axes.set_ylabel("test loss, nats per byte")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


if __name__ == "__main__":
    main()
