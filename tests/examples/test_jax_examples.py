"""The JAX examples, a few steps of everything, each in a process of its own as a user would run it."""

import re

import numpy as np
from flax import serialization

import interop
from interop.bnb import read_folder
from tests.examples import running
from tests.examples.running import docstring


def run(name, folder):
    """The lines of an example and the folder that it writes to; its docstring says what the last line is."""
    lines = running.run(name, folder, JAX_DISABLE_MOST_OPTIMIZATIONS="1")  # to compile faster
    assert f"\n    {lines[-1]}\n" in docstring(name) + "\n"
    return lines, folder / "runs" / name.removesuffix(".py")


def trained_modules(folder):
    """Names of the weights of a saved adapter; both factors of each have left their starting values."""
    adapter = interop.load(folder)
    assert all(lam.any() for lam, _ in adapter.factors.values())
    assert all(np.ptp(gamma) > 0 for _, gamma in adapter.factors.values())
    return set(adapter.modules)


def test_a_scanned_linen_vit_is_adapted_layer_by_layer(tmp_path):
    lines, out = run("04_vit_linen.py", tmp_path)
    kernels = [f"attention.{name}" for name in ("query", "key", "value", "out")] + ["up", "down"]
    assert trained_modules(out / "adapter") == {"head", *(f"encoder.{name}.{i}" for name in kernels for i in range(4))}
    variables = serialization.msgpack_restore((out / "model.msgpack").read_bytes())
    assert variables["params"]["encoder"]["up"]["kernel"].shape == (4, 64, 256)
    assert len(re.findall(r"^(?:0 to 4|5 to 9): [\d.]+%", "\n".join(lines), re.MULTILINE)) == 4


def test_accumulated_gradients_need_less_memory_than_the_large_batch(tmp_path):
    lines, out = run("05_accumulate_gradients.py", tmp_path)
    shares = dict(re.findall(r"^ *(\w+): [\d.]+ MiB \((\d+)%\)", "\n".join(lines), re.MULTILINE))
    assert shares.keys() == {"large_batch", "naive", "accumulate_gradients"}
    assert int(shares["accumulate_gradients"]) < int(shares["large_batch"]) == 100
    names = ("query", "key", "value", "out", "up", "down")
    assert trained_modules(out / "adapter") == {f"layers.{i}.{name}" for name in names for i in range(2)}


def test_a_model_on_a_mesh_trains_as_on_one_device_and_its_file_holds_whole_arrays(tmp_path):
    lines, out = run("06_mesh_nnx.py", tmp_path)
    text = "\n".join(lines)
    assert "mesh {'fsdp': 4, 'tp': 2}" in text
    assert "kernel (128, 512): (32, 256)" in text  # an eighth on each device
    assert "bases B (512, 8, 16): (128, 8, 16)" in text
    assert len(trained_modules(out / "adapter")) == 12
    assert interop.load(out / "adapter").factors["layers.0.up_proj"].gamma.shape == (8, 128)


def test_an_adapter_trained_in_jax_over_nf4_has_the_same_loss_in_torch(tmp_path):
    lines, out = run("07_4bit_jax.py", tmp_path)
    weights = read_folder(out / "nf4")
    packed = {name.removesuffix(".weight") for name, weight in weights.items() if not isinstance(weight, np.ndarray)}
    assert len(packed) == 28
    assert trained_modules(out / "adapter") == packed
    losses = re.findall(r"^held-out loss in (\w+): ([\d.]+) .* ([\d.]+) with", "\n".join(lines), re.MULTILINE)
    (_, *in_jax), (_, *in_torch) = losses
    np.testing.assert_allclose(np.float64(in_jax), np.float64(in_torch), atol=2e-5)
    assert float(in_jax[1]) < float(in_jax[0]) - 0.1
