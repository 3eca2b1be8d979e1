"""Gradient accumulation that makes W + dW once per optimizer step, measured against two other ways to the same step.

Run `python examples/05_accumulate_gradients.py`. The model is a function of a pytree of arrays; its adapter is trained
on micro-batches by `accumulate_gradients`. Then one step is made in three ways: on the large batch in one go, from
micro-batches that each make W + dW, and as in the training. The gradients must be equal; memory and time are printed.
It needs `pip install "randlora[jax]"`, and takes about a minute on two CPU cores; the last line is

    the reloaded adapter gives the same loss; it is in runs/05_accumulate_gradients/adapter
"""

import argparse
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from randlora_jax import (
    RandLoraAdapter,
    RandLoraConfig,
    accumulate_gradients,
    effective_params,
    init,
    load_adapter,
    print_trainable_parameters,
)

CONFIG = RandLoraConfig(r=16, randlora_alpha=160, target_modules="all-linear")
MICRO_BATCHES, LENGTH = 16, 64  # one sequence each; a width of 128 has 64 tokens as one of 4096 has 2048
TOLERANCE = 1e-4  # of the largest gradient of a factor: float32, summed in another order
jax.config.update("jax_default_matmul_precision", "highest")  # on GPU, jax would use TF32
Way = Callable[[Callable, RandLoraAdapter, Any, jax.Array], tuple[jax.Array, Any]]


# A stand-in for your model and your data: a decoder for bytes, the manual of Python and the sources of its library.
LIBRARY, LAYERS, WIDTH, HEADS = Path(sysconfig.get_path("stdlib")), 2, 128, 4
SHAPES = {name: (WIDTH, WIDTH) for name in ("query", "key", "value", "out")}
SHAPES |= {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}


def new_params() -> dict[str, Any]:
    """Random weights; what is called "kernel" is (in, out), and can be adapted."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(0, 0.6 / WIDTH**0.5, shape), jnp.float32)  # noqa: E731
    layers = [{name: {"kernel": normal(*shape)} for name, shape in SHAPES.items()} for _ in range(LAYERS)]
    head = {"kernel": normal(WIDTH, 256)}
    return {"tokens": normal(256, WIDTH), "positions": normal(LENGTH, WIDTH), "layers": layers, "lm_head": head}


def next_token_loss(params: dict[str, Any], batch: jax.Array) -> jax.Array:
    """Mean cross entropy, in nats per byte, of a batch (B, T+1)."""
    norm = lambda x: x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)  # noqa: E731
    tokens, targets = batch[:, :-1], batch[:, 1:]
    x = params["tokens"][tokens] + params["positions"][: tokens.shape[1]]  # (B, T, D)
    for layer in params["layers"]:
        q, k, v = (norm(x) @ layer[name]["kernel"] for name in ("query", "key", "value"))
        q, k, v = (part.reshape(*tokens.shape, HEADS, -1) for part in (q, k, v))  # (B, T, D) -> (B, T, N, H)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.reshape(x.shape) @ layer["out"]["kernel"]  # (B, T, N, H) -> (B, T, D)
        x = x + jax.nn.gelu(norm(x) @ layer["up"]["kernel"]) @ layer["down"]["kernel"]
    logits = norm(x) @ params["lm_head"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def batches_of(data: bytes) -> Iterator[np.ndarray]:
    """Endless random crops, as micro-batches (M, B, T+1)."""
    tokens, rng = np.frombuffer(data, np.uint8), np.random.default_rng(0)
    while True:
        starts = rng.integers(len(tokens) - LENGTH, size=(MICRO_BATCHES, 1, 1))
        yield tokens[starts + np.arange(LENGTH + 1)].astype(np.int32)


# The three ways to the loss of one optimizer step and its gradients.
def large_batch(loss: Callable, adapter: RandLoraAdapter, params: Any, batches: jax.Array) -> tuple[jax.Array, Any]:
    """All micro-batches in one go: the reference."""
    batch = batches.reshape(-1, batches.shape[-1])  # (M, B, T+1) -> (M*B, T+1)
    adapted = lambda factors: loss(effective_params(params, adapter.with_trainable(factors)), batch)  # noqa: E731
    return jax.value_and_grad(adapted)(adapter.trainable)


def naive(loss: Callable, adapter: RandLoraAdapter, params: Any, batches: jax.Array) -> tuple[jax.Array, Any]:
    """One after the other, each with its own W + dW and its own way back from there to lambda and gamma."""
    start = jax.tree.map(jnp.zeros_like, (jnp.float32(0), adapter.trainable))
    add = lambda sums, batch: (jax.tree.map(jnp.add, sums, large_batch(loss, adapter, params, batch)), None)  # noqa: E731
    sums, _ = jax.lax.scan(add, start, batches)
    return jax.tree.map(lambda total: total / len(batches), sums)


WAYS = (large_batch, naive, accumulate_gradients)


def main() -> None:
    """Train, compare three ways to one step, save, reload."""
    options = parse_arguments()
    manual = batches_of("".join(topics.values()).encode())
    library = batches_of(b"".join(file.read_bytes() for file in sorted(LIBRARY.glob("*.py"))))
    whole = lambda params, _, batch: jax.value_and_grad(next_token_loss)(params, batch[:, 0])  # noqa: E731
    params = train("base model", whole, new_params(), None, manual, options.base_steps)

    adapter = init(CONFIG, params)
    print_trainable_parameters(adapter, params)
    accumulated = lambda factors, frozen, batches: accumulate_gradients(  # noqa: E731
        next_token_loss, frozen[0].with_trainable(factors), frozen[1], batches
    )
    factors = train("adapter", accumulated, adapter.trainable, (adapter, params), library, options.steps)
    adapter = adapter.with_trainable(factors)
    batches = next(library)
    compare({way.__name__: measure(way, adapter, params, batches) for way in WAYS})

    adapter.save_pretrained(options.out / "adapter")
    again = load_adapter(options.out / "adapter", params)
    evaluate = jax.jit(lambda adapter: next_token_loss(effective_params(params, adapter), batches[0]))
    if evaluate(again) != evaluate(adapter):
        sys.exit("the reloaded adapter gives another loss")
    print(f"the reloaded adapter gives the same loss; it is in {options.out / 'adapter'}")


def parse_arguments() -> argparse.Namespace:
    """The command line; `--smoke` makes every part a few steps long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default="runs/05_accumulate_gradients", help="where to write")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, as a test")
    options = parser.parse_args()
    options.steps, options.base_steps = (2, 0) if options.smoke else (options.steps, 300)
    return options


def train(name: str, gradients: Callable, weights: Any, frozen: Any, batches: Iterator[np.ndarray], steps: int) -> Any:
    """`weights` after some steps of AdamW on `gradients(weights, frozen, batch)`, which gives the loss, too."""
    optimizer = optax.adamw(2.5e-3)

    @jax.jit
    def step(weights: Any, state: Any, frozen: Any, batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = gradients(weights, frozen, batch)
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, value

    state = optimizer.init(weights)
    for count, batch in zip(range(1, steps + 1), batches, strict=False):
        weights, state, value = step(weights, state, frozen, batch)
        if count % 25 == 0:
            print(f"{name}: step {count}/{steps}, loss {value:.3f}", file=sys.stderr)
    return weights


class Measured(NamedTuple):
    """Loss and gradients of one step, the memory that it takes beyond its arguments, and its time."""

    result: tuple[jax.Array, Any]
    temporary_bytes: int
    seconds: float


def measure(way: Way, adapter: RandLoraAdapter, params: Any, batches: np.ndarray) -> Measured:
    """Compile and run one way; its time is the shortest of three."""
    compiled = jax.jit(partial(way, next_token_loss)).lower(adapter, params, batches).compile()
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
        line = f"{name:>20}: {temporary_bytes / 2**20:.1f} MiB ({memory:.0%}), {seconds:.3f} s ({duration:.0%}),"
        print(f"{line} largest difference of a gradient {worst:.1g}")
        if not worst < TOLERANCE:
            sys.exit(f"{name} does not give the gradients of the large batch")


if __name__ == "__main__":
    main()
