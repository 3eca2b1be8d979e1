"""The JAX examples, a few steps of everything, each in a process of its own as a user would run it."""

import re

import numpy as np
import pytest
import torch
from flax import serialization
from transformers import LlamaConfig, LlamaForCausalLM

import interop
from interop.bnb import read_folder
from tests.examples import running
from tests.examples.running import assert_is_short, assert_tells_the_last_line

NAMES = ["vit_linen.py", "llama_mesh.py", "accumulate_gradients.py", "train_4bit_jax.py"]


def run(name, *arguments):
    return running.run(name, *arguments, JAX_DISABLE_MOST_OPTIMIZATIONS="1")  # to compile faster


def trained_modules(folder):
    """Names of the weights of a saved adapter; both factors of each have left their starting values."""
    adapter = interop.load(folder)
    assert all(lam.any() for lam, _ in adapter.factors.values())
    assert all(np.ptp(gamma) > 0 for _, gamma in adapter.factors.values())
    return adapter.modules


@pytest.fixture
def folder(tmp_path):
    """A transformers folder of a Llama with one layer."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    model.save_pretrained(tmp_path / "given")
    return tmp_path / "given"


def test_a_scanned_linen_vit_is_adapted_layer_by_layer(tmp_path):
    lines = run("vit_linen.py", "--out", tmp_path)
    assert lines[-1] == f"the reloaded model and adapter give the same logits; they are in {tmp_path}"
    assert_tells_the_last_line("vit_linen.py", lines[-1], tmp_path)
    kernels = [f"attention.{name}" for name in ("query", "key", "value", "out")] + ["up", "down"]
    want = {"head", *(f"encoder.{name}.{layer}" for name in kernels for layer in range(4))}
    assert set(trained_modules(tmp_path / "adapter")) == want
    variables = serialization.msgpack_restore((tmp_path / "model.msgpack").read_bytes())
    assert variables["params"]["encoder"]["up"]["kernel"].shape == (4, 64, 256)
    assert len(re.findall(r"^(?:0 to 4|5 to 9): [\d.]+%", "\n".join(lines), re.MULTILINE)) == 4


def test_a_llama_on_a_mesh_trains_as_on_one_device_and_its_file_holds_whole_arrays(folder, tmp_path):
    before = (folder / "model.safetensors").read_bytes()
    lines = run("llama_mesh.py", "--model", folder, "--out", tmp_path)
    assert lines[-1] == f"the mesh gives the losses of one device; the adapter is in {tmp_path / 'adapter'}"
    assert_tells_the_last_line("llama_mesh.py", lines[-1], tmp_path)
    assert (folder / "model.safetensors").read_bytes() == before
    text = "\n".join(lines)
    assert "mesh {'fsdp': 4, 'tp': 2}" in text
    assert "kernel (64, 128): (16, 64)" in text  # an eighth on each device
    assert "bases B (128, 4, 16): (32, 4, 16)" in text
    assert len(trained_modules(tmp_path / "adapter")) == 7
    adapter = interop.load(tmp_path / "adapter")
    assert adapter.factors["model.layers.0.mlp.up_proj"].gamma.shape == (4, 64)


def test_accumulated_gradients_of_a_llama_need_less_memory_than_the_large_batch(folder, tmp_path):
    lines = run("accumulate_gradients.py", "--model", folder, "--out", tmp_path)
    assert lines[-1] == f"the reloaded adapter gives the same loss; it is in {tmp_path / 'adapter'}"
    assert_tells_the_last_line("accumulate_gradients.py", lines[-1], tmp_path)
    shares = dict(re.findall(r"^ *(\w+): [\d.]+ MiB \((\d+)%\)", "\n".join(lines), re.MULTILINE))
    assert shares.keys() == {"large_batch", "naive", "accumulate_gradients"}
    assert int(shares["accumulate_gradients"]) < int(shares["large_batch"]) == 100
    assert len(trained_modules(tmp_path / "adapter")) == 7


def test_an_adapter_trained_in_jax_over_nf4_has_the_same_loss_in_torch(tmp_path):
    lines = run("train_4bit_jax.py", "--out", tmp_path)
    assert lines[-1] == f"torch and JAX give the same loss; the adapter is in {tmp_path / 'adapter'}"
    assert_tells_the_last_line("train_4bit_jax.py", lines[-1], tmp_path)
    weights = read_folder(tmp_path / "nf4")
    packed = {name.removesuffix(".weight") for name, weight in weights.items() if not isinstance(weight, np.ndarray)}
    assert len(packed) == 28
    assert set(trained_modules(tmp_path / "adapter")) == packed
    losses = re.findall(r"^held-out loss in (\w+): ([\d.]+) .* ([\d.]+) with", "\n".join(lines), re.MULTILINE)
    (_, *in_jax), (_, *in_torch) = losses
    np.testing.assert_allclose(np.float64(in_jax), np.float64(in_torch), atol=2e-5)
    assert float(in_jax[1]) < float(in_jax[0]) - 0.1


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_has_few_options(name):
    assert_is_short(name)
