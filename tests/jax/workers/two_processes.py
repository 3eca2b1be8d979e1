"""One of two processes that train an adapter on one mesh: `two_processes.py PORT RANK FOLDER start|resume`.

`start` trains STEPS steps and writes a checkpoint after MIDDLE of them; `resume` goes on from it. Also the model that
`test_multi_process.py` trains in one process, so that all of them train the same.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from interop import RandLoraConfig
from randlora_jax import effective_params, init
from randlora_jax.checkpoint import AdapterCheckpoints
from randlora_jax.provenance import kernel_checksums
from randlora_jax.sharding import shardings_of

CONFIG = RandLoraConfig(r=4, randlora_alpha=8, target_modules=["up", "down"])
SPECS = {"up": P("fsdp", "tp"), "down": P("tp", "fsdp")}
STEPS, MIDDLE = 6, 3
OPTIMIZER = optax.adamw(optax.cosine_decay_schedule(0.05, STEPS))


def host_params():
    rng = np.random.default_rng(0)
    shapes = {"up": (16, 24), "down": (24, 8)}
    return {name: {"kernel": rng.standard_normal(shape, np.float32) / 3} for name, shape in shapes.items()}


def host_batch(step):
    return np.random.default_rng(100 + step).standard_normal((8, 16), np.float32)


def loss_of(params, x):
    return ((jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"] - 1) ** 2).mean()


def make_step(**jit_options):
    @functools.partial(jax.jit, donate_argnums=(0, 1), **jit_options)
    def step(trainable, state, adapter, params, x):
        loss = lambda trainable: loss_of(effective_params(params, adapter.with_trainable(trainable)), x)  # noqa: E731
        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, state = OPTIMIZER.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    return step


def numbers(tree):
    """Every array whole, on each process, by its path."""
    whole = multihost_utils.process_allgather(tree, tiled=True)
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(whole)}


def main(port, rank, folder, phase):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 2, 4)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    replicated = NamedSharding(mesh, P())
    place = lambda array, spec: jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), array.__getitem__)  # noqa: E731
    params = {name: {"kernel": place(host_params()[name]["kernel"], spec)} for name, spec in SPECS.items()}
    adapter = init(CONFIG, params)
    trainable = jax.tree.map(jnp.copy, adapter.trainable)  # as the step donates them
    state = OPTIMIZER.init(trainable)  # each process makes counters of its own, as nothing says where they belong
    pinned = jax.tree.map(lambda sharding: sharding if sharding.num_devices > 1 else replicated, shardings_of(state))
    step = make_step(out_shardings=(shardings_of(trainable), pinned, replicated))
    rows = NamedSharding(mesh, P("fsdp"))
    found = {f"checksum {name}": text for name, text in kernel_checksums(params, adapter.modules).items()}
    with AdapterCheckpoints(folder / "checkpoints", adapter, params) as checkpoints:
        first, trainable, (state, key) = checkpoints.restore(trainable, (state, jax.random.key(0)))
        state = jax.device_put(state, pinned)
        found["first"], losses = first, []
        for index in range(first, STEPS):
            x = jax.make_array_from_callback((8, 16), rows, host_batch(index).__getitem__)
            trainable, state, loss = step(trainable, state, adapter, params, x)
            losses.append(float(loss))
            key = jax.random.fold_in(key, index)  # each process has this one for itself
            if index + 1 == MIDDLE:
                assert checkpoints.save(MIDDLE, trainable, (state, key))
                found |= {f"at the checkpoint{name}": leaf for name, leaf in numbers((trainable, state)).items()}
    found |= {f"at the end{name}": leaf for name, leaf in numbers((trainable, state)).items()}
    found["at the end key"] = jax.random.key_data(key)
    adapter.with_trainable(trainable).save_pretrained(folder / f"adapter-{phase}")
    np.savez(folder / f"{phase}-{rank}.npz", losses=losses, **found)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
