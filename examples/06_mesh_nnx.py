"""Train an adapter of an NNX model on a mesh of all devices, with every kernel sharded over it; save, reload, check.

Run `python examples/06_mesh_nnx.py`. Kernels are split in two ways, FSDP by TP; `attach` puts the adapter beside them.
On a machine without accelerators, eight devices are made of its CPU. The same training on one device must give the same
losses. It needs `pip install "randlora[jax]"`, and takes about a minute on two CPU cores; the last line is

    the mesh gives the losses of one device; the adapter is in runs/06_mesh_nnx/adapter
"""

import argparse
import os
import sys
import sysconfig
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

# Before jax is imported. It splits the CPU only: where there are accelerators, the mesh is made of those.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from randlora_jax import RandLoraConfig, RandLoraParam, attach, extract, print_trainable_parameters
from randlora_jax.sharding import shardings_of

CONFIG = RandLoraConfig(r=16, randlora_alpha=160, target_modules="all-linear")
IN_OUT = {"o_proj": P("tp", "fsdp"), "down_proj": P("tp", "fsdp")}  # they gather what tp has split; others split
TOLERANCE = 1e-4  # of a loss of a few nats: sums over devices come in another order, and Adam goes on from there
jax.config.update("jax_default_matmul_precision", "highest")  # on GPU, jax would use TF32


# A stand-in for your model and your data: a decoder for bytes, the manual of Python and the sources of its library.
LAYERS, WIDTH, HEADS, BATCH_SIZE, LENGTH = 2, 128, 4, 8, 128


class Layer(nnx.Module):
    """Causal self-attention, then feed-forward, each on a normalized copy and added to the stream (B, T, D)."""

    def __init__(self, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.attention_norm, self.mlp_norm = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(WIDTH, WIDTH) for _ in range(4))
        self.up_proj, self.down_proj = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        """One layer of the stream."""
        normed = self.attention_norm(x)
        q, k, v = (linear(normed) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.reshape(*x.shape[:2], HEADS, -1) for part in (q, k, v))  # (B, T, D) -> (B, T, N, H)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.reshape(x.shape))  # (B, T, N, H) -> (B, T, D)
        return x + self.down_proj(nnx.gelu(self.up_proj(self.mlp_norm(x))))


class Decoder(nnx.Module):
    """Bytes (B, T) to logits (B, T, 256)."""

    def __init__(self, rngs: nnx.Rngs):
        self.tokens, self.positions = nnx.Embed(256, WIDTH, rngs=rngs), nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])
        self.norm, self.lm_head = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, 256, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The logits of the byte that follows each position."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def next_token_loss(model: Decoder, batch: jax.Array) -> jax.Array:
    """Mean cross entropy, in nats per byte, of a batch (B, T+1)."""
    return optax.softmax_cross_entropy_with_integer_labels(model(batch[:, :-1]), batch[:, 1:]).mean()


def batches_of(data: bytes, count: int) -> list[np.ndarray]:
    """Random crops (B, T+1)."""
    tokens, rng = np.frombuffer(data, np.uint8), np.random.default_rng(0)
    starts = rng.integers(len(tokens) - LENGTH, size=(count, BATCH_SIZE, 1))
    return list(tokens[starts + np.arange(LENGTH + 1)].astype(np.int32))


def main() -> None:
    """Train on the mesh and on one device, compare, save, reload."""
    options = parse_arguments()
    mesh, one = make_mesh(jax.devices()), make_mesh(jax.devices()[:1])
    base = on_mesh(Decoder(nnx.Rngs(0)), mesh)
    train("base model", base, nnx.Param, batches_of("".join(topics.values()).encode(), options.base_steps), mesh)

    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    batches = batches_of(b"".join(file.read_bytes() for file in library), options.steps)
    model = attach(nnx.clone(base), CONFIG)
    print_trainable_parameters(extract(model), base)
    print_placement(model, mesh)
    losses = train("mesh", model, RandLoraParam, batches, mesh)
    alone = attach(on_mesh(nnx.clone(base), one), CONFIG)
    losses_alone = train("one device", alone, RandLoraParam, batches, one)
    print(f"loss {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last")
    difference = np.abs(np.subtract(losses, losses_alone)).max()
    print(f"largest difference to one device: {difference:.2g}")
    if not difference < TOLERANCE:
        sys.exit("the mesh does not train as one device does")

    extract(model).save_pretrained(options.out / "adapter")  # gathers what is spread
    again = attach(nnx.clone(base), options.out / "adapter")
    evaluate = nnx.jit(next_token_loss)
    want, got = (float(evaluate(each, split_batch(batches[0], mesh))) for each in (model, again))
    if got != want or want == losses[0]:
        sys.exit(f"the reloaded adapter gives the loss {got}, the trained one {want}, a new one {losses[0]}")
    print(f"the mesh gives the losses of one device; the adapter is in {options.out / 'adapter'}")


def parse_arguments() -> argparse.Namespace:
    """The command line; `--smoke` makes every part a few steps long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default="runs/06_mesh_nnx", help="where to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="steps of each fine-tuning (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, as a test")
    options = parser.parse_args()
    options.steps, options.base_steps = (4, 0) if options.smoke else (options.steps, 200)
    return options


def make_mesh(devices: list[jax.Device]) -> Mesh:
    """The devices, in pairs for tensor parallelism if they are even in number."""
    shape = (len(devices) // 2, 2) if len(devices) % 2 == 0 else (len(devices), 1)
    return jax.make_mesh(shape, ("fsdp", "tp"), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def on_mesh(model: Decoder, mesh: Mesh) -> Decoder:
    """The model with its matrices split over the mesh; the norms are on every device."""
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        spec = IN_OUT.get(path[-2], P("fsdp", "tp")) if param.ndim == 2 else P()
        param.set_value(jax.device_put(param.get_value(), NamedSharding(mesh, spec)))
    return model


def split_batch(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """A batch with its sequences split over fsdp."""
    return jax.device_put(batch, NamedSharding(mesh, P("fsdp")))


def train(name: str, model: Decoder, kind: type, batches: list[np.ndarray], mesh: Mesh) -> list[float]:
    """Train the parameters of one kind, and nothing else; the loss of each step."""
    graph, trained, frozen = nnx.split(model, kind, ...)
    optimizer = optax.adamw(2.5e-3)
    with jax.set_mesh(mesh):  # what the optimizer makes is on the mesh, too
        state = optimizer.init(trained)

        # Without out_shardings, XLA puts what is trained where it likes, and step 2 is compiled anew for that.
        @partial(jax.jit, out_shardings=(shardings_of(trained), shardings_of(state), None))
        def step(trained: Any, state: Any, frozen: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
            loss = lambda trained: next_token_loss(nnx.merge(graph, trained, frozen), tokens)  # noqa: E731
            value, grads = jax.value_and_grad(loss)(trained)
            updates, state = optimizer.update(grads, state, trained)
            return optax.apply_updates(trained, updates), state, value

        losses = []
        for count, batch in enumerate(batches, start=1):
            trained, state, value = step(trained, state, frozen, split_batch(batch, mesh))
            losses.append(float(value))
            if count % 10 == 0:
                print(f"{name}: step {count}/{len(batches)}, loss {losses[-1]:.3f}", file=sys.stderr)
    if mesh.size > 1 and step._cache_size() > 1:
        sys.exit(f"the step was compiled {step._cache_size()} times")
    nnx.update(model, trained)
    return losses


def print_placement(model: Decoder, mesh: Mesh) -> None:
    """How one kernel and its adapter lie on the mesh."""
    print(f"mesh {dict(mesh.shape)}; of the first up_proj, on each device:")
    kernel = model.layers[0].up_proj.kernel
    adapter = kernel.adapters["default"]
    parts = {"kernel": kernel.base, "lambda": adapter.randlora_lambda, "gamma": adapter.randlora_gamma}
    parts |= {"bases A": adapter.randlora_A, "bases B": adapter.randlora_B}
    for name, part in parts.items():
        print(f"{name:>10} {part.shape}: {part.sharding.shard_shape(part.shape)}")


if __name__ == "__main__":
    main()
