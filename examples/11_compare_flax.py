"""RandLoRA, LoRA, AdaLoRA and full fine-tuning of a vision transformer, at equal numbers of trained parameters.

Run `python examples/11_compare_flax.py`. A small ViT learns scikit-learn's handwritten digits. Then each method adapts
it to digits turned by 90 degrees, white on black, from 200 images. The learning rate of each method and budget comes
from one sweep on validation images; several seeds, trained at once by `jax.vmap`, give the spread on test images.
About ten minutes on two idle CPU cores; the last line is

    wrote results.md, results.json and compare.png to runs/11_compare_flax
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from interop.bases import Bases
from randlora_jax import RandLoraConfig, adalora, effective_params, infer_layouts, init

TARGETS = ["query", "key", "value", "out", "up", "down"]  # all kernels of the blocks
TITLE = "A ViT, pretrained on digits, adapted to 200 turned and inverted ones"
PACKAGES = ("jax", "flax", "optax", "scikit-learn")
STATISTICS = {"median": np.median, "min": min, "max": max}
LAYERS = 2
BUDGETS = {1: 32, 4: 6, 11: 2}  # rank of LoRA and AdaLoRA: r of RandLoRA that trains as much, within 1%
KINDS = {"RandLoRA, dense": {}, "RandLoRA, sparse": {"sparse": True}, "RandLoRA, very sparse": {"very_sparse": True}}
FULL, NAMES = "full fine-tuning", ["LoRA", *KINDS, "AdaLoRA"]
RATES, SWEEP_SEED, BATCH_SIZE = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1], 1000, 16  # the sweep's seed is not reported


class Method(NamedTuple):
    """What one seed trains, what it keeps frozen, the variables that they make, and for AdaLoRA, the adapter."""

    start: Any
    frozen: Any
    variables: Callable[[Any, Any], Any] = lambda variables, _: variables
    adapter: adalora.AdaLoraAdapter | None = None


class Block(nn.Module):
    """Attention, then feed-forward, each on a normalized copy and added to the stream."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """One layer of the stream (B, T, D): the carry, and nothing to stack."""
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(4 * x.shape[-1], name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="down")(hidden), None


class ViT(nn.Module):
    """Patches of 2 x 2 pixels, blocks whose kernels are stacked, the mean over the patches, ten logits."""

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Images (B, 8, 8) to logits (B, 10)."""
        grid = pixels.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3)  # (B, 8, 8) -> (B, 4, 2, 4, 2) -> (B, 4, 4, 2, 2)
        x = nn.Dense(64, name="patches")(grid.reshape(-1, 16, 4))  # (B, 4, 4, 2, 2) -> (B, T=16, 4) -> (B, T, D)
        x = x + self.param("positions", nn.initializers.normal(0.02), (16, 64))
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(blocks(name="blocks")(x, None)[0]).mean(1))


def main() -> None:
    """Train the base, adapt it by every method at every budget, write the numbers, the table and the picture."""
    options = parse_arguments()
    upright, training, validation, test = load_images()
    fresh = jax.jit(ViT().init)(jax.random.key(0), upright[0][:1])
    whole = Method(fresh, ())
    train, score = trainer(whole, upright, 10 * options.steps)(lambda seed: whole, [0], [2e-3])
    trained, _ = train()
    base, unadapted = jax.tree.map(itemgetter(0), jax.device_get(trained)), score(trained, test)[0]
    layouts, prepare, runs, again = infer_layouts(ViT().apply, base, upright[0][:1]), {}, [], []
    for budget, name in [(0, FULL), *((budget, name) for budget in options.budgets for name in NAMES)]:
        r = options.budgets[budget] if name in KINDS else budget
        make = partial(make_method, name, r, base, layouts, options.steps)
        program = "RandLoRA" if name in KINDS else name, budget  # bases of all kinds are arguments of one
        if program not in prepare:
            prepare[program] = trainer(make(0), training, options.steps)
        train, score = prepare[program](make, [SWEEP_SEED] * len(options.rates), options.rates)
        sweep = score(train()[0], validation)
        rate = options.rates[int(np.argmax(sweep))]
        train, score = prepare[program](make, range(options.seeds), [rate] * options.seeds)
        trees, states = train()
        run = {"method": name, "budget": budget, "r": r, "trainable": counts(make(0).adapter, trees, states)}
        runs.append(run | {"rate": rate, "sweep": sweep, "scores": score(trees, test)})
        again.append(partial(train, min(10, options.steps)))
        print(f"{name} {r}: rate {rate:g}, {np.median(runs[-1]['scores']):.1f}%", file=sys.stderr)
    for run, seconds in zip(runs, alternate(again), strict=True):
        run["seconds"] = seconds
    write(options.out, {"base": unadapted, "steps": options.steps, "rates": options.rates, "runs": runs})
    print(f"wrote results.md, results.json and compare.png to {options.out}")


def parse_arguments() -> argparse.Namespace:
    """The command line; `--smoke` makes every part a few steps long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default="runs/11_compare_flax", help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=6, help="trainings that are reported (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, as a test")
    options = parser.parse_args()
    options.rates, options.budgets = RATES, BUDGETS
    if options.smoke:
        options.steps, options.seeds, options.rates, options.budgets = 6, 2, RATES[1:3], {4: BUDGETS[4]}
    return options


def load_images() -> list[tuple[np.ndarray, np.ndarray]]:
    """(images, digits): upright for the base; turned to train on, to choose the rate by, and to test on."""
    data = load_digits()
    upright = (data.images / 16).astype(np.float32)
    turned = 1 - np.rot90(upright, axes=(1, 2))
    parts = (upright, slice(1297)), (turned, slice(597, 797)), (turned, slice(797, 1297)), (turned, slice(1297, None))
    return [(images[part], data.target[part]) for images, part in parts]


def make_method(name: str, r: int, base: Any, layouts: Any, steps: int, seed: int) -> Method:
    """A method before training; the seed draws RandLoRA's bases, and what LoRA and AdaLoRA start from."""
    if name == FULL:
        return Method(base, ())
    if name == "AdaLoRA":  # starts with half as many ranks again and ends, on average, with r
        schedule = {"tinit": steps // 10, "tfinal": steps // 3, "total_step": steps}
        ranks = {"init_r": r + r // 2 + 1, "target_r": r, "lora_alpha": 2 * (r + r // 2 + 1)}
        config = adalora.AdaLoraConfig(**ranks, **schedule, target_modules=TARGETS)
        adapter = adalora.init(config, base, layouts=layouts, key=jax.random.key(seed))
        variables = lambda factors, _: effective_params(base, adapter.with_trainable(factors))  # noqa: E731
        return Method(adapter.trainable, (), variables, adapter)
    fields = {"r": r, "randlora_alpha": 10 * r, "projection_prng_key": seed, **KINDS.get(name, {})}
    adapter = init(RandLoraConfig(**fields, target_modules=TARGETS), base, layouts=layouts)
    if name == "LoRA":  # A starts at random and B at zero, as in PEFT, here in the orientation of Flax: W + 2 A B
        rng, start = np.random.default_rng(seed), {}
        for kernel, (out, inputs) in adapter.shapes:
            A = rng.uniform(-1, 1, (LAYERS, inputs, r)).astype(np.float32) / inputs**0.5
            start[kernel] = A, np.zeros((LAYERS, r, out), np.float32)
        return Method(start, (), partial(with_lora, base))
    put = lambda factors, bases: dataclasses.replace(adapter, factors=factors, bases=Bases(*bases))  # noqa: E731
    variables = lambda factors, bases: effective_params(base, put(factors, bases))  # noqa: E731
    bases = tuple(np.asarray(basis, np.float32) for basis in adapter.bases)  # as bfloat16 or codes they are the same
    return Method(adapter.trainable, bases, variables)


def with_lora(base: Any, factors: dict[str, tuple[jax.Array, jax.Array]], _: tuple) -> Any:
    """The variables with W + 2 A B in place of each adapted W."""
    flat = flatten_dict(base, sep=".")
    for name, (A, B) in factors.items():
        kernel = flat[f"params.{name}.kernel"]
        flat[f"params.{name}.kernel"] = kernel + 2 * (A @ B).reshape(kernel.shape)  # (layers, in, out) -> with heads
    return unflatten_dict(flat, sep=".")


def trainer(method: Method, images: tuple[np.ndarray, np.ndarray], steps: int) -> Callable:
    """A function from what makes methods like this, seeds and learning rates to two.

    One trains them all at once, one scores what was trained.
    """
    shape = optax.warmup_cosine_decay_schedule(0, 1, max(1, steps // 10), steps)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, 0, 0, None))
    def train(start: Any, frozen: Any, rate: jax.Array, rows: jax.Array, count: int) -> tuple[Any, Any]:
        optimizer = optax.adam(lambda step: rate * shape(step))
        if method.adapter is not None:
            optimizer = adalora.rank_allocator(optimizer, method.adapter)

        def loss(tree: Any, pixels: jax.Array, digits: jax.Array) -> jax.Array:
            logits = ViT().apply(method.variables(tree, frozen), pixels)
            value = optax.softmax_cross_entropy_with_integer_labels(logits, digits).mean()
            if method.adapter is None:
                return value
            return value + adalora.orthogonal_loss(method.adapter.with_trainable(tree))

        def step(index: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            batch = (jnp.asarray(array)[rows[index]] for array in images)
            updates, state = optimizer.update(jax.grad(loss)(carry[0], *batch), carry[1], carry[0])
            return optax.apply_updates(carry[0], updates), state

        return jax.lax.fori_loop(0, count, step, (start, optimizer.init(start)))

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, None))
    def predict(tree: Any, frozen: Any, pixels: jax.Array) -> jax.Array:
        return ViT().apply(method.variables(tree, frozen), pixels)

    def prepare(make: Callable[[int], Method], seeds: Sequence[int], rates: Sequence[float]) -> tuple:
        made = [make(seed)[:2] for seed in seeds]
        start, frozen = jax.tree.map(lambda *leaves: np.stack(leaves), *made)
        rows = [np.random.default_rng(seed).integers(len(images[1]), size=(steps, BATCH_SIZE)) for seed in seeds]
        run = partial(train, start, frozen, np.float32(rates), np.stack(rows))

        def score(trees: Any, images: tuple[np.ndarray, np.ndarray]) -> list[float]:
            told = np.asarray(predict(trees, frozen, images[0])).argmax(-1)  # (seeds, N)
            return [100 * float(right.mean()) for right in told == images[1]]

        return lambda count=steps: jax.block_until_ready(run(count)), score

    return prepare


def counts(adapter: adalora.AdaLoraAdapter | None, trees: Any, states: Any) -> list[int]:
    """What each seed trains; of AdaLoRA, the triplets that the allocator has left in the end."""
    leaves = jax.tree.leaves(trees)  # (seeds, ...)
    seeds = len(leaves[0])
    if adapter is None:
        return [sum(leaf.size for leaf in leaves) // seeds] * seeds
    masks = {name: np.asarray(mask) for name, mask in states.mask.items()}  # (seeds, layers, rank)
    return [sum(int(masks[name][i].sum()) * (sum(shape) + 1) for name, shape in adapter.shapes) for i in range(seeds)]


def alternate(runs: list[Callable[[], Any]]) -> list[list[float]]:
    """Seconds of each, in rounds in which all take their turn: a busy machine slows them alike."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(5):
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
    setting = f"Test accuracy in percent, of {len(result['runs'][0]['scores'])} seeds, {result['steps']} steps each."
    head = ["method", "rank or r", "trained parameters", "learning rate", *STATISTICS, "time of a step, of LoRA's"]
    lines = [f"# {TITLE}", "", machine, "", setting, "", head, ["---"] * len(head)]
    lines.append(["base, not adapted", "", "0", "", f"{result['base']:.1f}", "", "", ""])
    lora = {run["budget"]: run["seconds"] for run in result["runs"] if run["method"] == "LoRA"}
    lora[0] = lora[min(lora)]  # of the smallest rank, for full fine-tuning
    for run in result["runs"]:
        cells = [run["method"], str(run["r"] or ""), f"{np.median(run['trainable']):,.0f}", f"{run['rate']:g}"]
        cells += [f"{statistic(run['scores']):.1f}" for statistic in STATISTICS.values()]
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
    """Accuracy against trained parameters; the methods of one budget stand side by side."""
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
    axes.plot([], [], " ", label=f"base, not adapted: {result['base']:.1f}%")
    ticks = [[run for run in runs if run["method"] == name] for name in ("LoRA", "RandLoRA, dense")]
    places = [run["trainable"][0] for run in ticks[0]]
    ranks = [f"rank {lora['r']}\nr = {dense['r']}" for lora, dense in zip(*ticks, strict=True)]
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:,}\n{rank}" for place, rank in zip(places, ranks, strict=True)])
    axes.minorticks_off()
    seeds = f"median, minimum and maximum of {len(full['scores'])} seeds"
    axes.set_title(f"{TITLE}\n{seeds}; each at the best of {len(result['rates'])} learning rates")
    axes.set_xlabel("trained parameters, on a log scale (rank of LoRA, and of AdaLoRA on average; r of RandLoRA)")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


if __name__ == "__main__":
    main()
