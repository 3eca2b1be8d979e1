"""Gradient accumulation that builds W + dW once per optimizer step, measured against two other ways to the same step.

Run `python examples/accumulate_gradients.py [--model FOLDER]`. An adapter of an NNX Llama is trained on micro-batches
by `accumulate_gradients`. Then one step is made in three ways: on the large batch in one go, from micro-batches that
each build W + dW, and as before. The gradients must be equal; memory and time are printed. Without --model, a small
byte-level Llama is trained first. About two minutes on two CPU cores; the last line is

    the reloaded adapter gives the same loss; it is in runs/accumulate_gradients/adapter
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import base_model
import jax
import jax.numpy as jnp
import numpy as np
import optax
import text
from flax import nnx
from llama_nnx import load_llama, next_token_loss
from progress import progress

import randlora_jax
from randlora_jax import RandLoraAdapter, RandLoraConfig, accumulate_gradients, effective_params

CONFIG = RandLoraConfig(r=16, randlora_alpha=160, target_modules="all-linear", task_type="CAUSAL_LM")
MICRO_BATCHES, LENGTH = 16, 64  # one sequence each; a width of 128 has 64 tokens as one of 4096 has 2048
TOLERANCE = 1e-4  # of the largest gradient of a factor: float32, summed in another order
jax.config.update("jax_default_matmul_precision", "highest")  # on GPU, jax would use TF32
Way = Callable[[Callable, RandLoraAdapter, Any, jax.Array], tuple[jax.Array, Any]]


class Measured(NamedTuple):
    """Loss and gradients of one step, the memory that it takes beyond its arguments, and its time."""

    result: tuple[jax.Array, Any]
    temporary_bytes: int
    seconds: float


def large_batch(loss: Callable, adapter: RandLoraAdapter, params: Any, batches: jax.Array) -> tuple[jax.Array, Any]:
    """All micro-batches in one go: the reference."""
    batch = batches.reshape(-1, batches.shape[-1])  # (M, B/M, T+1) -> (B, T+1)
    adapted = lambda factors: loss(effective_params(params, adapter.with_trainable(factors)), batch)  # noqa: E731
    return jax.value_and_grad(adapted)(adapter.trainable)


def naive(loss: Callable, adapter: RandLoraAdapter, params: Any, batches: jax.Array) -> tuple[jax.Array, Any]:
    """One after the other, each with its own W + dW and its own way back from there to lambda and gamma."""
    start = jax.tree.map(jnp.zeros_like, (jnp.float32(0), adapter.trainable))
    add = lambda sums, batch: (jax.tree.map(jnp.add, sums, large_batch(loss, adapter, params, batch)), None)  # noqa: E731
    sums, _ = jax.lax.scan(add, start, batches)
    return jax.tree.map(lambda total: total / len(batches), sums)


def main() -> None:
    """Train, compare three ways to one step, save, reload."""
    options = parse_arguments()
    out = Path(options.out)
    folder = Path(options.model) if options.model else out / "base_model"
    if options.smoke and not options.model:
        base_model.small_llama(seed=0).save_pretrained(folder)
    elif not options.model:
        base_model.train_base(folder, steps=options.base_steps)
    graph, params = nnx.split(load_llama(folder), nnx.Param)
    loss = lambda params, batch: next_token_loss(nnx.merge(graph, params), batch)  # noqa: E731
    adapter = randlora_jax.init(CONFIG, params)
    tokens = text.to_tokens(text.source_code(limit=200_000))
    crops = text.batches(tokens, batch_size=MICRO_BATCHES, length=LENGTH, seed=1)
    micro_batches = (crop.reshape(MICRO_BATCHES, -1, LENGTH + 1) for crop in crops)  # (B, T+1) -> (M, B/M, T+1)

    adapter = train(adapter, params, micro_batches, loss, options.steps)
    batches, ways = next(micro_batches), (large_batch, naive, accumulate_gradients)
    found = {way.__name__: measure(way, loss, adapter, params, batches) for way in ways}
    compare(found)

    adapter.save_pretrained(out / "adapter")
    again = randlora_jax.load_adapter(out / "adapter", params)
    evaluate = jax.jit(lambda adapter: loss(effective_params(params, adapter), batches[0]))
    if evaluate(again) != evaluate(adapter):
        sys.exit("the reloaded adapter gives another loss")
    print(f"the reloaded adapter gives the same loss; it is in {out / 'adapter'}")


def parse_arguments() -> argparse.Namespace:
    """The command line; `--smoke` makes every part a few steps long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a byte-level Llama, as base_model.py writes (default: train one)")
    parser.add_argument("--out", default="runs/accumulate_gradients", help="where to write (default: %(default)s)")
    parser.add_argument("--base-steps", type=int, default=base_model.STEPS, help="steps of the base model")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a model of random weights, as a test")
    options = parser.parse_args()
    options.steps = 2 if options.smoke else options.steps
    return options


def train(adapter: RandLoraAdapter, params: Any, batches: Any, loss: Callable, steps: int) -> RandLoraAdapter:
    """The adapter after some optimizer steps of all micro-batches each."""
    optimizer = optax.adamw(2.5e-3)

    @jax.jit
    def step(adapter: RandLoraAdapter, state: Any, params: Any, batches: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = accumulate_gradients(loss, adapter, params, batches)
        updates, state = optimizer.update(grads, state, adapter.trainable)
        return adapter.with_trainable(optax.apply_updates(adapter.trainable, updates)), state, value

    state, losses = optimizer.init(adapter.trainable), []
    describe = lambda: f"loss {np.mean(losses[-10:]):.3f}"  # noqa: E731
    for batch in progress(batches, total=steps, describe=describe, every=10):
        adapter, state, value = step(adapter, state, params, batch)
        losses.append(float(value))
    return adapter


def measure(way: Way, loss: Callable, adapter: RandLoraAdapter, params: Any, batches: jax.Array) -> Measured:
    """Compile and run one way; its time is the shortest of three."""
    compiled = jax.jit(partial(way, loss)).lower(adapter, params, batches).compile()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = jax.block_until_ready(compiled(adapter, params, batches))
        seconds.append(time.perf_counter() - started)
    return Measured(result, compiled.memory_analysis().temp_size_in_bytes, min(seconds))


def compare(found: dict[str, Measured]) -> None:
    """Print what each way takes, and stop unless its loss and gradients are those of the large batch."""
    want = found["large_batch"]
    for name, (result, temporary_bytes, seconds) in found.items():
        memory, duration = temporary_bytes / want.temporary_bytes, seconds / want.seconds
        errors = jax.tree.map(lambda got, want: abs(got - want).max() / abs(want).max(), result, want.result)
        worst = max(map(float, jax.tree.leaves(errors)))
        print(
            f"{name:>20}: {temporary_bytes / 2**20:.1f} MiB ({memory:.0%}), {seconds:.3f} s ({duration:.0%}),", end=" "
        )
        print(f"largest difference of a gradient {worst:.1g}")
        if not worst < TOLERANCE:
            sys.exit(f"{name} does not give the gradients of the large batch")


if __name__ == "__main__":
    main()
