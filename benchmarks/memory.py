"""Memory of one training step: what XLA compiled in JAX, and in torch what is kept for backward, and of the bases.

Run `python benchmarks/memory.py`. Claims in torch, on Llama-shaped models with all linear layers adapted: no more bytes
are kept for backward than by PEFT's LoRA, and of the bases at most 1/2.6 of PEFT's bytes are held. That is in float32,
as the CPU multiplies; on GPUs and in half precision they take half of it, and ternary bases a quarter.

Claims in JAX: on a scanned and rematerialized model, computing W + dW where the kernel is
read (`lazy_params`, and attached NNX models in `bound_bases`) takes at most 1.05 times the temporary memory of full
fine-tuning, and the same over kernels that stay packed in 4 bits. `effective_params`, which makes all W + dW before the
model runs, and layers that are not scanned are measured for comparison, and what `rebuild_weights` saves in a scan that
is not rematerialized otherwise. Gradients of full fine-tuning are results, not
temporaries: they and the optimizer's moments, three times the kernels with Adam, come on top of its figure.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import llama
import measure
import numpy as np
import torch
from flax import linen, nnx

from interop.bnb import NF4, Weight4bit
from randlora_jax import (
    Layout,
    RandLoraConfig,
    RandLoraParam,
    attach,
    bound_bases,
    effective_params,
    init,
    lazy_params,
    quantized,
    rebuild_weights,
)

CONFIG = RandLoraConfig(r=32, target_modules=["dense"])
BOUND = 1.05


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the model is made of; by default the reference model."""

    layers: int = 8
    width: int = 512
    tokens: int = 1024


class Layer(linen.Module):
    """A residual layer."""

    width: int

    @linen.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """One step of the scan."""
        return x + jnp.tanh(linen.Dense(self.width, use_bias=False, name="dense")(x)), None


class Model(linen.Module):
    """The reference model: layers scanned or one after the other, rematerialized or not."""

    sizes: Sizes
    remat: bool
    scan: bool = True
    policy: Callable[..., bool] | None = None

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The mean of squares, a scalar."""
        layers, width = self.sizes.layers, self.sizes.width
        layer = linen.remat(Layer, policy=self.policy) if self.remat else Layer
        if self.scan:
            scanned = linen.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=layers)
            return (scanned(width, name="layers")(x, None)[0] ** 2).mean()
        for i in range(layers):
            x, _ = layer(width, name=f"layers_{i}")(x, None)
        return (x**2).mean()


class NnxModel(nnx.Module):
    """The scanned model in NNX."""

    def __init__(self, sizes: Sizes, remat: bool):
        width, self.remat = sizes.width, remat
        make = nnx.vmap(lambda rngs: nnx.Linear(width, width, use_bias=False, rngs=rngs), in_axes=0, out_axes=0)
        self.layers = nnx.Dict({"dense": make(nnx.Rngs(0).split(sizes.layers))})

    def __call__(self, x: jax.Array) -> jax.Array:
        """The mean of squares, a scalar."""

        def layer(x: jax.Array, dense: nnx.Linear) -> jax.Array:
            return x + jnp.tanh(dense(x))

        step = nnx.remat(layer) if self.remat else layer
        return (nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers["dense"]) ** 2).mean()


def inputs(sizes: Sizes) -> jax.ShapeDtypeStruct:
    """One batch."""
    return jax.ShapeDtypeStruct((sizes.tokens, sizes.width), jnp.float32)


def layouts(scan: bool) -> dict[str, Layout]:
    """Of the scanned kernels; the others are (in, out)."""
    return {"layers.dense": Layout(in_axes=(1,), out_axes=(2,), stack_axes=(0,))} if scan else {}


def temporary_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """What the compiled function needs beyond its arguments and results."""
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def in_4_bits(shape: tuple[int, int]) -> quantized.Quantized4bit:
    """A kernel of random codes, as `quantized.load_quantized` gives them."""
    rng, count = np.random.default_rng(0), shape[0] * shape[1]
    packed, absmax = rng.integers(0, 256, count // 2, dtype=np.uint8), rng.random(count // 64, dtype=np.float32)
    code = tuple(np.array(NF4, np.float32).tolist())
    return quantized.from_bnb(Weight4bit(packed, absmax, code, 64, shape[::-1], np.dtype(np.float32), "nf4"))


def packed(params: Any, sizes: Sizes) -> Any:
    """The parameters with every kernel in 4 bits, stacked where they are scanned."""
    kernel = in_4_bits((sizes.width, sizes.width))
    stacked = quantized.stack([kernel] * sizes.layers)
    return jax.tree.map(lambda leaf: stacked if leaf.ndim == 3 else kernel, params)


def linen_bytes(
    sizes: Sizes, *, remat: bool, scan: bool = True, policy: Callable[..., bool] | None = None
) -> dict[str, tuple[int, int]]:
    """Bytes of the frozen kernels and of temporaries: full fine-tuning and the ways of RandLoRA on the linen model."""
    model, x = Model(sizes, remat, scan, policy), inputs(sizes)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros(x.shape))
    adapter = init(CONFIG, params, layouts=layouts(scan))

    def gradients(adapted: Callable[..., Any]) -> Callable[..., Any]:
        def loss(trainable: Any, adapter: Any, params: Any, x: jax.Array) -> jax.Array:
            return model.apply(adapted(params, adapter.with_trainable(trainable)), x)

        return jax.grad(loss)

    def with_adapter(adapted: Callable[..., Any], params: Any) -> tuple[int, int]:
        frozen = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        return frozen, temporary_bytes(gradients(adapted), adapter.trainable, adapter, params, x)

    return {
        "full fine-tuning": (0, temporary_bytes(jax.grad(model.apply), params, x)),
        "linen, lazy_params": with_adapter(lazy_params, params),
        "linen, lazy_params, nf4": with_adapter(lazy_params, packed(params, sizes)),
        "linen, effective_params": with_adapter(effective_params, params),
    }


def nnx_bytes(sizes: Sizes, *, remat: bool) -> dict[str, tuple[int, int]]:
    """The same of full fine-tuning and RandLoRA on the NNX model."""

    def gradients(kind: type, bound: bool) -> tuple[int, int]:
        model = NnxModel(sizes, remat)
        if bound:
            attach(model, CONFIG, layouts=layouts(scan=True))
        frozen = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.All(nnx.Param, nnx.Not(kind)))))
        graph, trainable, rest = nnx.split(model, kind, ...)

        def loss(trainable: Any, rest: Any, x: jax.Array) -> jax.Array:
            merged = nnx.merge(graph, trainable, rest, copy=True)
            if not bound:
                return merged(x)
            with bound_bases(merged):
                return merged(x)

        return frozen, temporary_bytes(jax.grad(loss), trainable, rest, inputs(sizes))

    return {
        "full fine-tuning, NNX": gradients(nnx.Param, bound=False),
        "NNX, attach and bound_bases": gradients(RandLoraParam, bound=True),
    }


def bases_of(model: Any) -> list[torch.Tensor]:
    """The frozen bases of a model with RandLoRA by this package or by PEFT, as they are stored."""
    if hasattr(model, "_randlora"):
        return [bases.stored(name) for bases in (model.randlora_A, model.randlora_B) for name in bases]
    tuner = getattr(model, "base_model", None)
    return [*tuner.randlora_A.values(), *tuner.randlora_B.values()] if hasattr(tuner, "randlora_A") else []


def kept_bytes(model: Any, ids: torch.Tensor) -> int:
    """What the forward pass keeps for backward, without parameters, buffers and bases, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = llama.loss_of(model, ids)
    assert loss.requires_grad
    for tensor in (*model.parameters(), *model.buffers(), *bases_of(model)):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def in_torch() -> None:
    """Bytes kept for backward by each method, and bytes of the bases, and check the claims."""
    rows: list[tuple[str, ...]] = [("model", "tokens", "method", "kept for backward, MiB", "bases, MiB")]
    found, bases, bars = {}, {}, {name: [] for name in llama.METHODS}
    for hidden, count in ((512, 8), (1024, 4)):
        ids = llama.batches(1, count)[0]
        for name, method in llama.METHODS.items():
            model = method(llama.base(hidden))
            found[hidden, name] = kept_bytes(model, ids) / 2**20
            bases[hidden, name] = sum(basis.nbytes for basis in bases_of(model)) / 2**20
            numbers = f"{found[hidden, name]:.1f}", f"{bases[hidden, name]:.1f}" if bases[hidden, name] else "-"
            rows.append((f"hidden {hidden}", f"{count} x {llama.LENGTH}", name, *numbers))
            bars[name].append((found[hidden, name],) * 3)
    title = f"Memory in torch: Llama of 2 layers, all linear layers adapted, r = {llama.RANK}, float32"
    measure.write("memory_torch", title, rows, packages=("torch", "transformers", "peft"))
    measure.draw("memory_torch", title, ["hidden 512", "hidden 1024"], bars, "MiB kept for backward")
    for hidden in (512, 1024):
        assert found[hidden, "ours"] <= found[hidden, "PEFT LoRA"], found
        assert bases[hidden, "ours"] <= bases[hidden, "PEFT RandLoRA"] / 2.6, bases


def main() -> None:
    """Measure in both stacks, and check the claims."""
    in_torch()
    in_jax()


def in_jax() -> None:
    """Measure with and without scan and rematerialization, and check the claim."""
    parser = argparse.ArgumentParser(description=__doc__)
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help="default: %(default)s")
    sizes = Sizes(**vars(parser.parse_args()))
    measured = {
        "scan + remat": linen_bytes(sizes, remat=True),
        "scan + remat, NNX": nnx_bytes(sizes, remat=True),
        "scan": linen_bytes(sizes, remat=False),
        "scan, NNX": nnx_bytes(sizes, remat=False),
        "scan + rebuild_weights": linen_bytes(sizes, remat=True, policy=rebuild_weights),
        "remat": linen_bytes(sizes, remat=True, scan=False),
    }
    rows: list[tuple[str, ...]] = [("model", "method", "frozen kernels, MiB", "temporary, MiB", "of full fine-tuning")]
    above = []
    for model, methods in measured.items():
        _, full = next(iter(methods.values()))
        for method, (frozen, temporary) in methods.items():
            share = temporary / full
            rows.append((model, method, f"{frozen / 2**20:.2f}", f"{temporary / 2**20:.2f}", f"{share:.3f}"))
            if "scan + remat" in model and "effective" not in method and share > BOUND:
                above.append(method)
    name = "memory" if sizes == Sizes() else f"memory_{sizes.width}"
    shape = f"{sizes.layers} layers of {sizes.width} x {sizes.width}, {sizes.tokens} tokens"
    title = f"Compiled memory of a step, {shape}, float32, r = 32"
    measure.write(name, title, rows, packages=("jax", "flax"))
    assert not above, f"more than {BOUND} times full fine-tuning's memory: {above}"


if __name__ == "__main__":
    main()
