"""Forward and backward of one layer in JAX by contraction plan, beside full fine-tuning and LoRA.

Run `python benchmarks/jax_step.py`; about a minute. Claims: for 4096 tokens the folded plan takes at most 0.65 times as
long as the factored one, which is PEFT's; "auto" is never above 1.10 times the better of both; and with the bases as
arguments of the jitted function no first call, compilation included, takes 5 seconds.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import measure

from interop.adapter import Factors
from randlora_jax import RandLoraConfig, adapted_linear, effective_params, init, layer_bases

WIDTH, RANK, TOKENS = 1024, 32, (256, 1024, 4096)
FOLDED_BOUND, AUTO_BOUND, FIRST_CALL_BOUND = 0.65, 1.10, 5.0
PLANS = ("factored", "folded", "auto")

Step = Callable[[], Any]


def differentiated(forward: Callable[..., jax.Array], trainable: Any, x: jax.Array, *frozen: Any) -> Step:
    """The jitted value and gradients, of x and of what is trained."""

    def loss(trainable: Any, x: jax.Array, *frozen: Any) -> jax.Array:
        return (forward(trainable, x, *frozen) ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return lambda: jax.block_until_ready(step(trainable, x, *frozen))


def competitors(tokens: int) -> dict[str, Step]:
    """A step of each method on one square layer."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (tokens, WIDTH))
    params = {"layer": {"kernel": jax.random.normal(keys[1], (WIDTH, WIDTH)) / WIDTH**0.5}}
    config = RandLoraConfig(r=RANK, target_modules=["layer"], init_weights=False)
    adapter = init(config, params, key=keys[2])
    kernel, factors = params["layer"]["kernel"], adapter.factors["layer"]
    bases = layer_bases(adapter.bases, (WIDTH, WIDTH))

    def planned(factors: Factors, x: jax.Array, kernel: jax.Array, bases: Any, **options: Any) -> jax.Array:
        return adapted_linear(x, kernel, *bases, *factors, scaling=config.scaling, **options)

    def adapted(**options: Any) -> Step:
        return differentiated(partial(planned, **options), factors, x, kernel, bases)

    def effective(trainable: Any, x: jax.Array, params: Any, adapter: Any) -> jax.Array:
        return x @ effective_params(params, adapter.with_trainable(trainable))["layer"]["kernel"]

    def full(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return x @ kernel

    def lora(factors: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
        down, up = factors
        return x @ kernel + (x @ down) @ up

    low_rank = (jnp.ones((WIDTH, RANK)) / WIDTH, jnp.ones((RANK, WIDTH)) / RANK)
    return {
        **{plan: adapted(plan=plan) for plan in PLANS},
        "folded, keep_weight": adapted(plan="folded", keep_weight=True),
        "effective_params": differentiated(effective, adapter.trainable, x, params, adapter),
        "full fine-tuning": differentiated(full, kernel, x),
        "LoRA": differentiated(lora, low_rank, x, kernel),
    }


def first_call(step: Step) -> float:
    """Seconds, compilation included."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    """Measure all methods for all numbers of tokens, and check the claims."""
    first, seconds = {}, {}
    for tokens in TOKENS:
        steps = competitors(tokens)
        first[tokens] = {name: first_call(step) for name, step in steps.items()}
        seconds[tokens] = measure.alternate(steps, rounds=7)
    names = list(seconds[TOKENS[0]])
    rows: list[tuple[str, ...]] = [
        ("method", *(f"{tokens} tokens, ms" for tokens in TOKENS), "of factored, each", "first calls, s")
    ]
    median = {tokens: {name: statistics.median(times[name]) for name in names} for tokens, times in seconds.items()}
    for name in names:
        ratios = ", ".join(f"{median[tokens][name] / median[tokens]['factored']:.2f}" for tokens in TOKENS)
        calls = f"{max(first[tokens][name] for tokens in TOKENS):.1f} at most"
        rows.append((name, *(measure.spread(seconds[tokens][name]) for tokens in TOKENS), ratios, calls))
    title = f"Forward and backward of one {WIDTH} x {WIDTH} layer in JAX, float32, r = {RANK}"
    measure.write("jax_step", title, rows, packages=("jax",))
    measure.draw(
        "jax_step",
        title,
        [f"{tokens} tokens" for tokens in TOKENS],
        {name: [milliseconds(seconds[tokens][name]) for tokens in TOKENS] for name in names},
        "milliseconds",
    )
    check(median, first)


def milliseconds(seconds: list[float]) -> tuple[float, float, float]:
    """Median, least and most."""
    return tuple(1e3 * value for value in (statistics.median(seconds), min(seconds), max(seconds)))


def check(median: dict[int, dict[str, float]], first: dict[int, dict[str, float]]) -> None:
    """The claims."""
    ratio = median[TOKENS[-1]]["folded"] / median[TOKENS[-1]]["factored"]
    assert ratio <= FOLDED_BOUND, f"folded takes {ratio:.2f} times as long as factored"
    for tokens, times in median.items():
        ratio = times["auto"] / min(times["factored"], times["folded"])
        assert ratio <= AUTO_BOUND, f"{tokens} tokens: auto takes {ratio:.2f} times as long as the better plan"
        slow = {name: calls for name, calls in first[tokens].items() if calls >= FIRST_CALL_BOUND}
        assert not slow, f"{tokens} tokens: first calls took {slow} seconds"


if __name__ == "__main__":
    main()
