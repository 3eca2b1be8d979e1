"""`export_lora`: the best LoRA of a rank. That PEFT loads it: tests/cross/test_lora_in_peft.py."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from strategies import KEPT, LAYERS, draw_adalora, draw_adapter

from interop import Factors, export_lora, save
from interop.folder import CONFIG_NAME, WEIGHTS_NAME
from interop.lora import EXACT_UP_TO, _of_dense


def updates(folder):
    """B A of each layer of a LoRA, by the safetensors library."""
    tensors = {key: value.astype(np.float64) for key, value in load_file(folder / WEIGHTS_NAME).items()}
    config = json.loads((folder / CONFIG_NAME).read_text())
    names = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in tensors if ".lora_" in key}
    prefix = "base_model.model."
    pairs = {n: (tensors[f"{prefix}{n}.lora_A.weight"], tensors[f"{prefix}{n}.lora_B.weight"]) for n in names}
    assert {len(A) for A, _ in pairs.values()} == {config["r"]}
    return {n: config["lora_alpha"] / config["r"] * B @ A for n, (A, B) in pairs.items()}


@pytest.mark.parametrize("rank", [1, 3, 6, 20])
def test_each_layer_is_the_best_update_of_its_rank_and_the_error_is_the_one_reported(tmp_path, rank):
    adapter = draw_adapter()
    found = export_lora(adapter, tmp_path, rank=rank)
    written = updates(tmp_path)
    assert written.keys() == LAYERS.keys() == found.errors.keys()
    for module in LAYERS:
        delta = adapter.delta_weight(module)
        tail = np.linalg.svd(delta, compute_uv=False)[rank:]
        best = np.linalg.norm(tail) / np.linalg.norm(delta)  # Eckart and Young
        real = np.linalg.norm(delta - written[module]) / np.linalg.norm(delta)
        np.testing.assert_allclose(real, best, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.errors[module], real, rtol=1e-4, atol=2e-7)
    assert (max(found.errors.values()) < 1e-6) == (rank >= 8)  # the largest short side is 8


@pytest.mark.parametrize("kept", [None, KEPT])
def test_adalora_is_exact_from_the_rank_on_that_is_left(tmp_path, kept):
    adapter = draw_adalora(kept=kept)
    found = export_lora(adapter, tmp_path, rank=4)
    assert max(found.errors.values()) < 1e-6
    for module, update in updates(tmp_path).items():
        np.testing.assert_allclose(update, adapter.delta_weight(module), rtol=1e-4, atol=1e-5)
    if kept is not None:
        assert found.errors["block.0.down"] == 0  # rank 0 is left: zero is exact


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_the_error_counts_what_storing_rounds(tmp_path, dtype, bound):
    found = export_lora(draw_adapter(), tmp_path, rank=8, dtype=dtype)
    assert bound / 100 < max(found.errors.values()) < bound
    kinds = {str(value.dtype) for value in load_file(tmp_path / WEIGHTS_NAME).values()}
    assert kinds == {dtype}


def test_a_large_layer_is_decomposed_from_a_subspace_nearly_as_well(rng):
    rows, columns, rank = EXACT_UP_TO + 40, EXACT_UP_TO + 60, 8
    spectrum = 1 / np.arange(1, 65)
    left = np.linalg.qr(rng.standard_normal((rows, 64)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, 64)))[0]
    U, S, V = _of_dense(((left * spectrum) @ right.T).astype(np.float32), rank)
    np.testing.assert_allclose(S[:rank], spectrum[:rank], rtol=1e-4)
    error = np.linalg.norm((left * spectrum) @ right.T - (U[:, :rank] * S[:rank]) @ V[:rank])
    np.testing.assert_allclose(error, np.linalg.norm(spectrum[rank:]), rtol=1e-3)


def test_the_config_is_a_lora_of_the_same_layers_with_what_else_was_trained(tmp_path):
    saved = {
        "base_model.model.head.weight": np.ones((2, 2), np.float32),
        "base_model.model.x.bias": np.ones(2, np.float32),
    }
    adapter = dataclasses.replace(
        draw_adapter(modules_to_save=["head"], bias="randlora_only", task_type="CAUSAL_LM"), saved_weights=saved
    )
    export_lora(adapter, tmp_path, rank=2)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert (config["peft_type"], config["bias"], config["task_type"]) == ("LORA", "lora_only", "CAUSAL_LM")
    assert config["modules_to_save"] == ["head"]
    assert config["target_modules"] == sorted(LAYERS)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    for key, value in saved.items():
        np.testing.assert_array_equal(tensors[key], value)


def test_an_update_of_zero_has_no_error(tmp_path):
    adapter = draw_adapter()
    zero = {name: Factors(np.zeros_like(lam), gamma) for name, (lam, gamma) in adapter.factors.items()}
    found = export_lora(dataclasses.replace(adapter, factors=zero), tmp_path, rank=2)
    assert set(found.errors.values()) == {0.0}


def test_the_same_adapter_gives_the_same_bytes_and_replaces_an_older_lora_only(tmp_path):
    save(draw_adapter(), tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "one", rank=2)
    export_lora(draw_adapter(1), tmp_path / "two", rank=3)
    export_lora(tmp_path / "adapter", tmp_path / "two", rank=2)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    before = (tmp_path / "adapter" / WEIGHTS_NAME).read_bytes()
    with pytest.raises(ValueError, match="adapter holds an adapter of type 'RANDLORA', which would be lost"):
        export_lora(draw_adapter(), tmp_path / "adapter", rank=2)
    assert (tmp_path / "adapter" / WEIGHTS_NAME).read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank=0: must be at least 1"), ({"rank": 2, "dtype": "int8"}, "dtype='int8' is not known")],
)
def test_impossible_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_lora(draw_adapter(), tmp_path, **options)
