"""`verify` with the stacks and with models of both; and that PEFT loads what `export_lora` writes."""

import dataclasses
import json

import jax.numpy as jnp
import models
import numpy as np
import peft
import pytest
import torch
from llama_nnx import load_llama
from strategies import KEPT, draw_adalora, draw_adapter

import interop
import randlora_jax
import randlora_torch
from interop import diff, export_lora, verify

FIELDS = models.CASES["llama"][1]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    models.llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter():
    """On the tiny Llama, such that dW is about as large as W."""
    found = interop.convert(randlora_torch.get_peft_model(models.llama(), models.our_config(FIELDS)), to="peft")
    rng = np.random.default_rng(0)
    factors = {
        name: interop.Factors(
            np.float32(0.05) * rng.standard_normal(lam.shape, np.float32),
            gamma * (1 + np.float32(0.5) * rng.standard_normal(gamma.shape, np.float32)),  # else dW has rank r
        )
        for name, (lam, gamma) in found.factors.items()
    }
    return dataclasses.replace(found, factors=factors)


@pytest.mark.parametrize(
    "draw", [draw_adapter, lambda: draw_adapter(very_sparse=True), lambda: draw_adalora(kept=KEPT)]
)
def test_both_stacks_compute_the_update_of_the_definition(draw):
    found = verify(draw())
    assert found.passed
    for layer in found.layers:
        assert set(layer.errors) == {"jax", "torch"}
        assert max(layer.errors.values()) < 1e-6
    assert any(0 < layer.errors["torch"] for layer in found.layers)  # float32 against float64: something was computed


@pytest.mark.parametrize("stack", ["jax", "torch"])
def test_a_stack_that_computes_something_else_is_caught(monkeypatch, stack):
    kind = {"jax": randlora_jax, "torch": randlora_torch}[stack].RandLoraAdapter
    right = kind.delta_weight
    monkeypatch.setattr(kind, "delta_weight", lambda self, module: right(self, module) * 1.0001)
    found = verify(draw_adapter())
    assert not found.passed
    assert all((layer.errors[name] > 1e-5) == (name == stack) for layer in found.layers for name in layer.errors)


def test_models_of_both_stacks_are_verified_with_their_logits(base, adapter):
    in_torch = randlora_torch.load_adapter(models.llama(), adapter).eval()
    in_jax = randlora_jax.attach(load_llama(base), adapter)
    tokens = models.tokens().numpy()
    found = verify(in_torch, in_jax, models=(in_torch, in_jax), inputs=tokens)
    assert found.passed
    assert all(layer.identical for layer in found.layers)
    assert 0 < found.logits_error < 2e-6
    bare = load_llama(base)
    assert verify(in_torch, in_jax, stacks=(), models=(in_torch, bare), inputs=tokens).logits_error > 0.1


def peft_logits(folder):
    with torch.no_grad():
        return models.logits(peft.PeftModel.from_pretrained(models.llama(), folder).eval(), models.tokens()).numpy()


def test_peft_loads_an_exported_lora_of_full_rank_as_the_same_model(tmp_path, adapter):
    interop.save(adapter, tmp_path / "randlora")
    found = export_lora(adapter, tmp_path / "lora", rank=64)
    assert max(found.errors.values()) < 1e-6
    want = peft_logits(tmp_path / "randlora")
    with torch.no_grad():
        assert np.abs(want - models.logits(models.llama(), models.tokens()).numpy()).max() > 0.1
    np.testing.assert_allclose(peft_logits(tmp_path / "lora"), want, rtol=0, atol=2e-6)


def test_peft_loads_an_exported_lora_of_a_low_rank_with_the_error_reported(tmp_path, adapter):
    found = export_lora(adapter, tmp_path, rank=8, dtype="bfloat16")
    in_peft = peft.PeftModel.from_pretrained(models.llama(), tmp_path)
    layers = {name.removeprefix("base_model.model."): layer for name, layer in in_peft.named_modules()}
    for module, error in found.errors.items():
        delta = adapter.delta_weight(module)
        got = layers[module].get_delta_weight("default").detach().double().numpy()
        assert np.linalg.norm(got - delta) / np.linalg.norm(delta) == pytest.approx(error, rel=1e-3)
    assert min(found.errors.values()) > 0.1  # RandLoRA's updates have full rank


def test_an_adapter_trained_a_little_further_differs_by_a_little(tmp_path, adapter):
    factors = {name: interop.Factors(lam * np.float32(1.01), gamma) for name, (lam, gamma) in adapter.factors.items()}
    later = interop.convert(dataclasses.replace(adapter, factors=factors), to="jax")
    found = diff(adapter, later)
    assert [layer.relative for layer in found.layers] == pytest.approx([0.01 / 1.01] * len(found.layers), rel=1e-4)
    assert [layer.cosine for layer in found.layers] == pytest.approx([1.0] * len(found.layers))
    assert json.dumps(found.to_dict())
    assert isinstance(later.factors[found.layers[0].module].lam, jnp.ndarray)
