"""Train an adapter in Flax with as many processes as there are hosts: the same script on a laptop and on a cluster.

It shows `jax.distributed`, a mesh from the environment, a base model that is split over it, batches of which each
process reads its share, Orbax checkpoints of base and adapter, and one adapter file in PEFT's format.

    python examples/13_multi_host_flax.py                                            # one process, all its devices
    MESH=fsdp=8,tp=2 srun python examples/13_multi_host_flax.py --out /shared/run    # in a Slurm job

Slurm, TPU pods and GKE are detected; elsewhere COORDINATOR_ADDRESS=host:port, NUM_PROCESSES and PROCESS_ID say who
takes part (docs/clusters.md). The base is trained on Python's documentation, the adapter on Python's source code. With
more --steps, a second run goes on from the last checkpoint, on any mesh. Two minutes on two CPU cores; the last line is

    the reloaded adapter gives the same loss; it is in runs/13_multi_host_flax/adapter
"""

import argparse
import os
import sys
import sysconfig
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from randlora_jax import RandLoraConfig, RandLoraParam, attach, extract
from randlora_jax.checkpoint import AdapterCheckpoints

CONFIG = RandLoraConfig(r=16, randlora_alpha=160, target_modules="all-linear")
WIDTH, HEADS, LAYERS, LENGTH, BATCH_SIZE = 128, 4, 2, 128, 16  # the batch of all processes together


def main() -> None:
    """Train, save, reload, check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/13_multi_host_flax", help="folder that all processes see (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="steps of the adapter, in all (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="at most 8 steps of everything, as a test")
    options = parser.parse_args()
    base_steps, steps = (8, min(8, options.steps)) if options.smoke else (200, options.steps)
    connect()
    mesh, out = mesh_from_environment(), Path(options.out).absolute()
    say(f"{jax.process_count()} process(es), {jax.device_count()} device(s), mesh {dict(mesh.shape)}")
    prose = "\n".join(topics[name] for name in sorted(topics)).encode()
    code = b"\n".join(file.read_bytes() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    held_out = batch(code[-100_000:], mesh, 0)

    if not (out / "base").exists():
        base = base_model(mesh)
        train(base, nnx.Param, prose, mesh, base_steps)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(out / "base", nnx.state(base))  # each process writes what its devices hold
    model = attach(base_model(mesh, out / "base"), CONFIG)  # beside the kernels
    measure = nnx.jit(next_byte_loss)
    before = float(measure(model, held_out))
    with AdapterCheckpoints(out / "checkpoints", extract(model), model, save_interval_steps=10) as checkpoints:
        losses = train(model, RandLoraParam, code[:-100_000], mesh, steps, checkpoints)
    after = float(measure(model, held_out))
    say(f"held-out loss {before:.4f} before, {after:.4f} after {steps} steps")

    extract(model).save_pretrained(out / "adapter")  # in every process: all take part, the first one writes
    again = attach(base_model(mesh, out / "base"), out / "adapter")
    reloaded = float(measure(again, held_out))
    if reloaded != after or after == before:
        sys.exit(f"the reloaded adapter gives the loss {reloaded}, the trained one {after}, a new one {before}")
    if jax.process_index() == 0:
        np.savetxt(out / "losses.txt", losses)
    say(f"the reloaded adapter gives the same loss; it is in {Path(options.out) / 'adapter'}")


def connect() -> None:
    """Join the other processes, if there are any: those that the environment names, or those of a known cluster."""
    names = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
    address, count, index = given = [os.environ.get(name, "") for name in names]
    if not any(given):
        try:
            jax.distributed.initialize()
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):
                raise
        return  # or jax knows of no cluster here, and this process is alone
    shown = ", ".join(map("{}={}".format, names, given))
    if not (":" in address and count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        sys.exit(f"{shown}: give host:port of process 0, how many there are, and 0 to that - 1; or none of the three.")
    jax.distributed.initialize(address, int(count), int(index))


def mesh_from_environment() -> Mesh:
    """MESH, such as "fsdp=4,tp=2", over all devices of all processes; by default, all of them on fsdp."""
    text = os.environ.get("MESH") or f"fsdp={jax.device_count()}"
    pairs = [pair.partition("=") for pair in text.split(",")]
    sizes = {name: int(size) for name, _, size in pairs if name in ("fsdp", "tp") and size.isdecimal()}
    fsdp, tp = sizes.get("fsdp", 1), sizes.get("tp", 1)
    if len(sizes) != len(pairs):
        sys.exit(f"MESH={text}: give the sizes of fsdp and tp, or of one of them, as in MESH=fsdp=4,tp=2.")
    if fsdp * tp != jax.device_count():
        sys.exit(f"MESH={text} takes {fsdp * tp} devices, but the processes have {jax.device_count()} in all.")
    if BATCH_SIZE % fsdp or WIDTH % (fsdp * tp):
        sys.exit(f"MESH={text}: fsdp must divide the batch of {BATCH_SIZE}, and fsdp * tp the width, {WIDTH}.")
    return jax.make_mesh((fsdp, tp), ("fsdp", "tp"), axis_types=(AxisType.Auto, AxisType.Auto))


class Block(nnx.Module):
    """Causal attention, then a feed-forward layer, each on a normalized copy and added to the stream."""

    def __init__(self, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.norm_1, self.norm_2 = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.query, self.key, self.value, self.out = (linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The stream (B, T, D), one layer on."""
        heads = (*x.shape[:2], HEADS, -1)  # (B, T, D) -> (B, T, H, D/H)
        q, k, v = (project(self.norm_1(x)).reshape(heads) for project in (self.query, self.key, self.value))
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.norm_2(x))))


def language_model() -> nnx.Sequential:
    """Bytes (B, T) to logits (B, T, 256) of the bytes that follow; the causal mask alone tells positions apart."""
    rngs = nnx.Rngs(0)
    layers = [nnx.Embed(256, WIDTH, rngs=rngs), *(Block(rngs) for _ in range(LAYERS)), nnx.RMSNorm(WIDTH, rngs=rngs)]
    return nnx.Sequential(*layers, nnx.Linear(WIDTH, 256, rngs=rngs))


def next_byte_loss(model: nnx.Module, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy, in nats, of the last T of the bytes (B, T + 1)."""
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()


def base_model(mesh: Mesh, folder: Path | None = None) -> nnx.Sequential:
    """The base, new or as saved in a folder: every device makes, or reads, what it holds and no more."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        gathers = any(f"'{name}'" in jax.tree_util.keystr(path) for name in ("out", "down"))  # what tp has split
        return NamedSharding(mesh, P() if leaf.ndim < 2 else P("tp", "fsdp") if gathers else P("fsdp", "tp"))

    graph, state = nnx.split(nnx.eval_shape(language_model))
    shardings = jax.tree_util.tree_map_with_path(sharding, state)
    if folder is None:
        return nnx.merge(graph, jax.jit(lambda: nnx.state(language_model()), out_shardings=shardings)())
    target = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), state, shardings)
    return nnx.merge(graph, ocp.StandardCheckpointer().restore(folder, target))


def batch(text: bytes, mesh: Mesh, step: int) -> jax.Array:
    """Crops (B, T + 1) of the text, split over fsdp; of these, this process reads those that its devices hold."""
    sharding, shape = NamedSharding(mesh, P("fsdp")), (BATCH_SIZE, LENGTH + 1)
    indices = sharding.addressable_devices_indices_map(shape).values()
    rows = sorted({row for rows, _ in indices for row in range(BATCH_SIZE)[rows]})
    starts = [np.random.default_rng((step, row)).integers(len(text) - LENGTH) for row in rows]
    crops = [np.frombuffer(text, np.uint8, LENGTH + 1, offset=start) for start in starts]
    return jax.make_array_from_process_local_data(sharding, np.stack(crops).astype(np.int32), shape)


def train(model: Any, kind: type, text: bytes, mesh: Mesh, steps: int, checkpoints: Any = None) -> list[float]:
    """Train the parameters of a kind in place, from the last checkpoint on; the losses of the steps made here."""
    graph, trained, rest = nnx.split(model, kind, ...)
    optimizer = optax.adamw(3e-3)
    state, everywhere = optimizer.init(trained), NamedSharding(mesh, P())
    places = jax.tree.map(lambda x: x.sharding if x.sharding.num_devices > 1 else everywhere, (trained, state))
    trained, state = jax.device_put((trained, state), places)  # the optimizer's counters, too, are on the mesh now

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*places, everywhere))
    def update(trained: Any, state: Any, rest: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss = lambda trained: next_byte_loss(nnx.merge(graph, trained, rest), tokens)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    first, trained, state = checkpoints.restore(trained, state) if checkpoints else (0, trained, state)
    losses = []
    for step in range(first, steps):
        trained, state, loss = update(trained, state, rest, batch(text, mesh, step))
        losses.append(float(loss))
        if step in (first, steps - 1) or step % 20 == 19:
            say(f"step {step + 1}: loss {losses[-1]:.4f}")
        if checkpoints:
            checkpoints.save(step + 1, trained, state, force=step + 1 == steps)
    nnx.update(model, trained)
    return losses


def say(line: str) -> None:
    """Print it once."""
    if jax.process_index() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
