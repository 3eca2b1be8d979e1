"""Temporary memory of one training step, as XLA compiled it: RandLoRA against full fine-tuning.

Run `python benchmarks/memory.py`. Claim: on a scanned and rematerialized model, computing W + dW where the kernel is
read (`lazy_params`, and attached NNX models in `bound_bases`) takes at most 1.05 times the temporary memory of full
fine-tuning. `effective_params`, which makes all W + dW before the model runs, is measured for comparison.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import measure
from flax import linen, nnx

from randlora_jax import (
    Layout,
    RandLoraConfig,
    RandLoraParam,
    attach,
    bound_bases,
    effective_params,
    init,
    lazy_params,
)

LAYERS, WIDTH, TOKENS = 8, 512, 1024
CONFIG = RandLoraConfig(r=32, target_modules=["dense"])
LAYOUTS = {"layers.dense": Layout(in_axes=(1,), out_axes=(2,), stack_axes=(0,))}
BOUND = 1.05
X = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)


class Layer(linen.Module):
    """A residual layer."""

    @linen.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """One step of the scan."""
        return x + jnp.tanh(linen.Dense(WIDTH, use_bias=False, name="dense")(x)), None


class Model(linen.Module):
    """The reference model: layers scanned, and rematerialized or not."""

    remat: bool

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The mean of squares, a scalar."""
        layer = linen.remat(Layer) if self.remat else Layer
        scanned = linen.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return (scanned(name="layers")(x, None)[0] ** 2).mean()


class NnxModel(nnx.Module):
    """The same model in NNX."""

    def __init__(self, remat: bool):
        self.remat = remat
        make = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs), in_axes=0, out_axes=0)
        self.layers = nnx.Dict({"dense": make(nnx.Rngs(0).split(LAYERS))})

    def __call__(self, x: jax.Array) -> jax.Array:
        """The mean of squares, a scalar."""

        def layer(x: jax.Array, dense: nnx.Linear) -> jax.Array:
            return x + jnp.tanh(dense(x))

        step = nnx.remat(layer) if self.remat else layer
        return (nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers["dense"]) ** 2).mean()


def temporary_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """What the compiled function needs beyond its arguments and results."""
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def linen_bytes(remat: bool) -> dict[str, int]:
    """Full fine-tuning and the two ways of RandLoRA on the linen model."""
    model = Model(remat)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros(X.shape))
    adapter = init(CONFIG, params, layouts=LAYOUTS)

    def loss_with(adapted: Callable[..., Any]) -> Callable[..., Any]:
        def loss(trainable: Any, adapter: Any, params: Any, x: jax.Array) -> jax.Array:
            return model.apply(adapted(params, adapter.with_trainable(trainable)), x)

        return jax.grad(loss)

    arguments = (adapter.trainable, adapter, params, X)
    return {
        "full fine-tuning": temporary_bytes(jax.grad(model.apply), params, X),
        "linen, lazy_params": temporary_bytes(loss_with(lazy_params), *arguments),
        "linen, effective_params": temporary_bytes(loss_with(effective_params), *arguments),
    }


def nnx_bytes(remat: bool) -> dict[str, int]:
    """Full fine-tuning and RandLoRA on the NNX model."""

    def gradients(kind: type, bound: bool) -> tuple[Callable[..., Any], Any]:
        model = NnxModel(remat)
        if bound:
            attach(model, CONFIG, layouts=LAYOUTS)
        graph, trainable, rest = nnx.split(model, kind, ...)

        def loss(trainable: Any, rest: Any, x: jax.Array) -> jax.Array:
            merged = nnx.merge(graph, trainable, rest, copy=True)
            if not bound:
                return merged(x)
            with bound_bases(merged):
                return merged(x)

        return jax.grad(loss), (trainable, rest)

    full, full_arguments = gradients(nnx.Param, bound=False)
    ours, arguments = gradients(RandLoraParam, bound=True)
    return {
        "full fine-tuning, NNX": temporary_bytes(full, *full_arguments, X),
        "NNX, attach and bound_bases": temporary_bytes(ours, *arguments, X),
    }


def main() -> None:
    """Measure with and without rematerialization, and check the claim."""
    rows: list[tuple[str, ...]] = [("model", "method", "temporary MiB", "of full fine-tuning")]
    for remat in (True, False):
        for measured in (linen_bytes(remat), nnx_bytes(remat)):
            full = next(iter(measured.values()))
            for method, size in measured.items():
                rows.append(("scan + remat" if remat else "scan", method, f"{size / 2**20:.2f}", f"{size / full:.3f}"))
                if remat and "effective" not in method:
                    assert size <= BOUND * full, f"{method}: {size / full:.3f} times full fine-tuning's memory"
    title = f"Compiled temporary memory, {LAYERS} layers of {WIDTH} x {WIDTH}, {TOKENS} tokens, float32, r = 32"
    measure.write("memory", title, rows, packages=("jax", "flax"))


if __name__ == "__main__":
    main()
