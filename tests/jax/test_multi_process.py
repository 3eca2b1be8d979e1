"""A run in two processes with two devices each, its checkpoint, and the run that goes on from it, again in two.

`workers/two_processes.py` trains; the tests look at what its processes found.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import interop
from randlora_jax import init
from randlora_jax.checkpoint import AdapterCheckpoints
from randlora_jax.provenance import kernel_checksums
from tests.jax.workers import two_processes as run

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120  # seconds for both processes together
NOISE = {"rtol": 1e-4, "atol": 1e-6}  # sums over devices come in another order


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(folder, phase):
    """Run both processes to their end. Whatever happens, none of them is left, and both logs are shown."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    port, deadline = free_port(), time.monotonic() + PATIENCE
    logs = [folder / f"{phase}-{rank}.log" for rank in range(2)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, run.__file__, str(port), str(rank), str(folder), phase]
            with log.open("w") as output:
                processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        codes = [None, None]
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.1)
            codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    shown = "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in logs)
    assert codes == [0, 0], f"exit codes {codes} (None: killed after {PATIENCE} s or when the other failed)\n{shown}"
    return [dict(np.load(folder / f"{phase}-{rank}.npz")) for rank in range(2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder, and by phase what each of the two processes found."""
    folder = tmp_path_factory.mktemp("two_processes")
    return folder, {phase: launch(folder, phase) for phase in ("start", "resume")}


@pytest.fixture(scope="module")
def alone():
    """The adapter, losses and factors of one process with one device on the same batches."""
    params = jax.tree.map(jnp.asarray, run.host_params())
    adapter = init(run.CONFIG, params)
    step, losses = run.make_step(), []
    trainable = jax.tree.map(jnp.copy, adapter.trainable)
    state = run.OPTIMIZER.init(trainable)
    for index in range(run.STEPS):
        trainable, state, loss = step(trainable, state, adapter, params, run.host_batch(index))
        losses.append(float(loss))
    return params, adapter.with_trainable(trainable), losses


def test_two_processes_train_as_one_does(found, alone):
    _, adapter, losses = alone
    for process in found[1]["start"]:
        np.testing.assert_allclose(process["losses"], losses, rtol=1e-5)
        for name, pair in adapter.trainable.items():
            for field, want in pair._asdict().items():
                np.testing.assert_allclose(process[f"at the end[0]['{name}'].{field}"], want, **NOISE)
    assert losses[-1] < losses[0] - 0.05


def test_resuming_in_two_processes_equals_the_uninterrupted_run_bit_for_bit(found):
    for uninterrupted, resumed in zip(found[1]["start"], found[1]["resume"], strict=True):
        assert (uninterrupted["first"], resumed["first"]) == (0, run.MIDDLE)
        np.testing.assert_array_equal(resumed["losses"], uninterrupted["losses"][run.MIDDLE :])
        names = [name for name in uninterrupted if name.startswith("at the end")]
        assert len(names) > 12  # lambda and gamma of two layers, their moments, and a random key
        for name in names:
            np.testing.assert_array_equal(resumed[name], uninterrupted[name], err_msg=name)


def test_a_checkpoint_of_two_processes_is_read_by_one(found, alone):
    folder, phases = found
    params, adapter, _ = alone
    with AdapterCheckpoints(folder / "checkpoints", adapter, params) as checkpoints:
        state = run.OPTIMIZER.init(adapter.trainable)
        step, trainable, (state, _) = checkpoints.restore(adapter.trainable, (state, jax.random.key(0)))
    assert step == run.MIDDLE
    for path, leaf in jax.tree_util.tree_leaves_with_path((trainable, state)):
        np.testing.assert_array_equal(leaf, phases["start"][0][f"at the checkpoint{jax.tree_util.keystr(path)}"])
    counts = optax.tree_utils.tree_get_all_with_path(state, "count")
    assert {int(count) for _, count in counts} == {run.MIDDLE}


def test_checksums_of_kernels_spread_over_processes_are_those_of_one_device(found, alone):
    want = kernel_checksums(alone[0], ("up", "down"))
    for process in [*found[1]["start"], *found[1]["resume"]]:
        assert {name: str(process[f"checksum {name}"]) for name in want} == want


def test_two_processes_write_one_adapter_in_peft_format(found):
    folder, phases = found
    for phase in phases:
        saved = interop.load(folder / f"adapter-{phase}")
        assert saved.modules == ("down", "up")
        for name, pair in saved.factors.items():
            for field, got in pair._asdict().items():
                np.testing.assert_array_equal(got, phases[phase][1][f"at the end[0]['{name}'].{field}"])
