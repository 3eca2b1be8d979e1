"""Train an adapter of an NNX Llama on a mesh of all devices, with every kernel sharded over it; save, reload, check.

Run `python examples/llama_mesh.py [--model FOLDER]`. Kernels are split in two ways, FSDP by TP; `attach` puts the
adapter beside them. On a machine without accelerators, eight devices are made of its CPU. The same training on one
device must give the same losses. Without --model, a small byte-level Llama is trained first. About two minutes on
two CPU cores; the last line is

    the mesh gives the losses of one device; the adapter is in runs/llama_mesh/adapter
"""

import argparse
import os
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

# Before jax is imported. It splits the CPU only: where there are accelerators, the mesh is made of those.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import base_model
import jax
import numpy as np
import optax
import text
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from llama_nnx import Llama, load_llama, next_token_loss
from progress import progress

from randlora_jax import RandLoraConfig, RandLoraParam, attach, extract
from randlora_jax.sharding import shardings_of

CONFIG = RandLoraConfig(r=16, randlora_alpha=160, target_modules="all-linear", task_type="CAUSAL_LM")
IN_OUT = {"o_proj": P("tp", "fsdp"), "down_proj": P("tp", "fsdp")}  # they gather what tp has split; others split
TOLERANCE = 1e-4  # of a loss of a few nats: sums over devices come in another order, and Adam goes on from there
jax.config.update("jax_default_matmul_precision", "highest")  # on GPU, jax would use TF32
BATCH_SIZE, LENGTH = 8, 128


def main() -> None:
    """Train on the mesh and on one device, compare, save, reload."""
    options = parse_arguments()
    out = Path(options.out)
    folder = Path(options.model) if options.model else out / "base_model"
    if options.smoke and not options.model:
        base_model.small_llama(seed=0).save_pretrained(folder)
    elif not options.model:
        base_model.train_base(folder, steps=options.base_steps)
    tokens = text.to_tokens(text.source_code(limit=200_000))
    batches = list(islice(text.batches(tokens, batch_size=BATCH_SIZE, length=LENGTH, seed=1), options.steps))

    mesh, one = make_mesh(jax.devices()), make_mesh(jax.devices()[:1])
    model = attach(load_sharded(folder, mesh), CONFIG)
    print_placement(model, mesh)
    losses = train(model, batches, mesh)
    losses_alone = train(attach(load_sharded(folder, one), CONFIG), batches, one)
    print(f"loss {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last")
    difference = np.abs(np.subtract(losses, losses_alone)).max()
    print(f"largest difference to one device: {difference:.2g}")
    if not difference < TOLERANCE:
        sys.exit("the mesh does not train as one device does")

    extract(model).save_pretrained(out / "adapter")  # gathers what is spread
    again = attach(load_sharded(folder, mesh), out / "adapter")
    evaluate = nnx.jit(next_token_loss)
    want, got = (float(evaluate(each, on_mesh(batches[0], mesh))) for each in (model, again))
    if got != want or want == losses[0]:
        sys.exit(f"the reloaded adapter gives the loss {got}, the trained one {want}, a new one {losses[0]}")
    print(f"the mesh gives the losses of one device; the adapter is in {out / 'adapter'}")


def parse_arguments() -> argparse.Namespace:
    """The command line; `--smoke` makes every part a few steps long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a byte-level Llama, as base_model.py writes (default: train one)")
    parser.add_argument("--out", default="runs/llama_mesh", help="where to write (default: %(default)s)")
    parser.add_argument("--base-steps", type=int, default=base_model.STEPS, help="steps of the base model")
    parser.add_argument("--steps", type=int, default=30, help="steps of each fine-tuning (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a model of random weights, as a test")
    options = parser.parse_args()
    options.steps = 4 if options.smoke else options.steps
    return options


def make_mesh(devices: list[jax.Device]) -> Mesh:
    """The devices, in pairs for tensor parallelism if they are even in number."""
    shape = (len(devices) // 2, 2) if len(devices) % 2 == 0 else (len(devices), 1)
    return jax.make_mesh(shape, ("fsdp", "tp"), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def load_sharded(folder: Path, mesh: Mesh) -> Llama:
    """The Llama with its matrices split over the mesh; the norms are on every device."""
    model = load_llama(folder)
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        spec = IN_OUT.get(path[-2], P("fsdp", "tp")) if param.ndim == 2 else P()
        param.set_value(jax.device_put(param.get_value(), NamedSharding(mesh, spec)))
    return model


def train(model: Llama, batches: list[np.ndarray], mesh: Mesh) -> list[float]:
    """Train the adapter, and nothing else, on batches that are split over fsdp; the loss of each step."""
    graph, adapter, frozen = nnx.split(model, RandLoraParam, ...)
    optimizer = optax.adamw(2.5e-3)
    with jax.set_mesh(mesh):  # what the optimizer makes is on the mesh, too
        state = optimizer.init(adapter)

        # Without out_shardings, XLA puts the new factors where it likes, and step 2 is compiled anew for them.
        @partial(jax.jit, out_shardings=(shardings_of(adapter), shardings_of(state), None))
        def step(adapter: Any, state: Any, frozen: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
            loss = lambda adapter: next_token_loss(nnx.merge(graph, adapter, frozen), tokens)  # noqa: E731
            value, grads = jax.value_and_grad(loss)(adapter)
            updates, state = optimizer.update(grads, state, adapter)
            return optax.apply_updates(adapter, updates), state, value

        losses: list[float] = []
        describe = lambda: f"{mesh.size} device(s): loss {np.mean(losses[-10:]):.3f}"  # noqa: E731
        for batch in progress(batches, total=len(batches), describe=describe, every=10):
            adapter, state, value = step(adapter, state, frozen, on_mesh(batch, mesh))
            losses.append(float(value))
    if mesh.size > 1 and step._cache_size() != 1:
        sys.exit(f"the step was compiled {step._cache_size()} times")
    nnx.update(model, adapter)
    return losses


def on_mesh(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """A batch with its sequences split over fsdp."""
    return jax.device_put(batch, NamedSharding(mesh, P("fsdp")))


def print_placement(model: Llama, mesh: Mesh) -> None:
    """How one kernel and its adapter lie on the mesh."""
    print(f"mesh {dict(mesh.shape)}; of the first up_proj, on each device:")
    kernel = model.model.layers[0].mlp.up_proj.kernel
    adapter = kernel.adapters["default"]
    parts = {"kernel": kernel.base, "lambda": adapter.randlora_lambda, "gamma": adapter.randlora_gamma}
    parts |= {"bases A": adapter.randlora_A, "bases B": adapter.randlora_B}
    for name, part in parts.items():
        print(f"{name:>10} {part.shape}: {part.sharding.shard_shape(part.shape)}")


if __name__ == "__main__":
    main()
