"""Folders of ours in PEFT, in transformers' own `load_adapter` and on the hub; tiny folders by PEFT, kept for good."""

import dataclasses
import warnings

import golden_by_peft
import models
import numpy as np
import peft
import pytest
import torch
from huggingface_hub import ModelCard
from strategies import draw_adalora, draw_adapter
from transformers import AutoModelForCausalLM

import interop
from interop.card import CARD_NAME
from interop.files import BASES, adapter_names
from randlora_torch.layer import layer_shape
from tests.conftest import ROOT

TARGETS = ["q_proj", "v_proj", "down_proj"]
GOLDEN = ROOT / "tests" / "golden" / "peft-0.21.2"


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of keys that it then makes
        yield


def shapes(model):
    named = ((name, layer) for name, layer in model.named_modules() if name.rpartition(".")[2] in TARGETS)
    return {name: layer_shape(layer) for name, layer in named}


def for_llama(method="RandLoRA", **fields):
    make = draw_adapter if method == "RandLoRA" else draw_adalora
    fields = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/tiny", **fields}
    return make(5, shapes=shapes(models.llama()), **fields)


def logits_by_peft(adapter, folder, **options):
    interop.save(adapter, folder, **options)
    model = peft.PeftModel.from_pretrained(models.llama(), folder).eval()
    return models.logits(model, models.tokens()).detach()


@pytest.fixture(scope="module")
def want(tmp_path_factory):
    """What PEFT computes with one copy of the bases, away from the base model's logits, and what we do."""
    adapter = for_llama(randlora_alpha=1)
    logits = logits_by_peft(adapter, tmp_path_factory.mktemp("want"))
    assert (logits - models.logits(models.llama(), models.tokens())).abs().max() > 0.1
    model = models.llama()
    with torch.no_grad():
        for name in adapter.modules:
            model.get_submodule(name).weight += torch.from_numpy(adapter.delta_weight(name)).float()
    torch.testing.assert_close(logits, models.logits(model, models.tokens()), rtol=1e-3, atol=1e-4)
    return logits


@pytest.mark.parametrize("bases", BASES)
def test_peft_computes_the_same_with_every_option_of_the_writer(tmp_path, want, bases):
    assert torch.equal(logits_by_peft(for_llama(randlora_alpha=1), tmp_path, bases=bases), want)


def test_transformers_own_load_adapter_reads_copies_per_layer(tmp_path, want):
    """With bases that no seed gives, as transformers draws them itself where it finds none in a layer."""
    adapter = for_llama(randlora_alpha=1)
    foreign = interop.Bases(*(np.ascontiguousarray(basis[..., ::-1]).astype(np.float32) for basis in adapter.bases))
    adapter = dataclasses.replace(adapter, bases=foreign, recipe=None)
    by_peft = logits_by_peft(adapter, tmp_path / "one")
    assert (by_peft - want).abs().max() > 1e-3
    interop.save(adapter, tmp_path / "per-layer", bases="per-layer")
    found = {}
    for name in ("one", "per-layer"):
        model = models.llama()
        model.load_adapter(str(tmp_path / name))
        found[name] = models.logits(model.eval(), models.tokens()).detach()
    torch.testing.assert_close(found["per-layer"], by_peft, rtol=0, atol=1e-6)
    assert (found["one"] - by_peft).abs().max() > 1e-3, "transformers reads one copy by now: tell the documentation"


def test_an_adapter_by_its_name_is_what_peft_loads_from_the_sub_folder(tmp_path, want):
    interop.save(for_llama(r=2), tmp_path)
    interop.save(for_llama(randlora_alpha=1), tmp_path, adapter_name="other")
    model = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "other").eval()
    assert torch.equal(models.logits(model, models.tokens()).detach(), want)


@pytest.mark.parametrize("method", ["RandLoRA", "AdaLoRA"])
@pytest.mark.parametrize("fields", [{}, {"base_model_name_or_path": "/a/path"}, {"base_model_name_or_path": None}])
def test_the_front_matter_of_a_card_is_what_the_hub_reads(tmp_path, method, fields):
    interop.save(for_llama(method, **fields), tmp_path)
    card = ModelCard.load(tmp_path / CARD_NAME)
    assert card.data.base_model == ("org/tiny" if not fields else None)
    assert card.data.library_name == "peft"
    assert set(card.data.tags) == {method.lower(), "randlora"}
    assert ModelCard(str(card)).text == card.text


def test_the_snippet_of_a_card_runs(tmp_path, want):
    base = tmp_path / "base"
    models.llama().save_pretrained(base)
    interop.save(for_llama(randlora_alpha=1, base_model_name_or_path=str(base)), tmp_path / "adapter")
    text = (tmp_path / "adapter" / CARD_NAME).read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "adapter"))
    assert AutoModelForCausalLM.__name__ in code
    scope = {}
    exec(code, scope)
    got = models.logits(scope["model"].eval(), models.tokens()).detach()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("to", "method"), [("jax", "RandLoRA"), ("torch", "RandLoRA"), ("torch", "AdaLoRA")])
def test_a_lazy_adapter_moves_to_either_stack(tmp_path, to, method):
    adapter = for_llama(method)
    interop.save(adapter, tmp_path)
    back = interop.convert(interop.convert(interop.load(tmp_path, lazy=True), to=to), to="peft")
    for name, parts in adapter.factors.items():
        for a, b in zip(parts, back.factors[name], strict=True):
            np.testing.assert_array_equal(a, b, strict=True)


# Files by PEFT 0.21.2


@pytest.mark.parametrize("name", ["copies", "canonical", "none", "bfloat16", "float16", "adalora", "two", "two/other"])
def test_a_kept_folder_by_peft_has_the_update_that_peft_computes(name):
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)
    model = peft.PeftModel.from_pretrained(golden_by_peft.Net().to(dtype), GOLDEN / name, autocast_adapter_dtype=False)
    adapter = interop.load(GOLDEN / name).bind(golden_by_peft.SHAPES)
    for layer in golden_by_peft.TARGETS:
        module = getattr(model.base_model.model, layer)
        want = module.get_delta_weight("default").detach().float().numpy()
        tolerance = 1e-4 if dtype is torch.float32 else 0.1
        np.testing.assert_allclose(adapter.delta_weight(layer), want, rtol=tolerance, atol=tolerance)


def test_copies_per_layer_alone_are_the_same_adapter_as_with_the_canonical_ones():
    found = [interop.load(GOLDEN / name) for name in ("copies", "canonical", "per-layer")]
    for layer in golden_by_peft.TARGETS:
        shape = golden_by_peft.SHAPES[layer]
        assert len({adapter.delta_weight(layer, shape).tobytes() for adapter in found}) == 1
    assert adapter_names(GOLDEN / "two") == ("default", "other")
