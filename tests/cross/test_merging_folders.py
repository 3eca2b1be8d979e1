"""Folders merged without a framework, loaded by transformers: the logits of PEFT's merge, and of ours in torch."""

import dataclasses
import warnings

import models
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from strategies import draw_adalora
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.utils.logging import disable_progress_bar

import interop
import randlora_torch
from interop.bnb import read_folder

bitsandbytes = pytest.importorskip("bitsandbytes")

SHARD = "60KB"  # of a few hundred
TOLERANCE = {"rtol": 0, "atol": 2e-6}
QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def llama():
    """All in_features are multiples of 64: where they are not, bitsandbytes' AVX512 kernel is wrong."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**models.llama().config.to_dict(), "intermediate_size": 128})).eval()


BASES = {"llama": llama, "gpt2": models.gpt2}


@pytest.fixture(scope="module", params=BASES)
def case(request, tmp_path_factory):
    """The base's and the adapter's folder, both written by others; the base's name."""
    disable_progress_bar()
    make, (_, fields) = BASES[request.param], models.CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make().save_pretrained(folder / "base", max_shard_size=SHARD)
    model = peft.get_peft_model(make(), models.peft_config(fields))
    models.randomize((name, value) for name, value in model.named_parameters() if "randlora_" in name)
    model.save_pretrained(folder / "adapter")
    return folder, request.param


def logits_of(folder, kind=AutoModelForCausalLM, **arguments):
    model, info = kind.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(info.values()), info  # nothing missing, nothing left over
    with torch.no_grad():
        return model.eval()(input_ids=models.tokens()).logits.numpy()


def merged_by_peft(base, adapter):
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()(models.tokens()).logits.numpy()


def test_a_merged_folder_has_the_logits_of_pefts_merge(case, tmp_path):
    folder, name = case
    report = interop.merge(folder / "adapter", folder / "base", tmp_path / "merged")
    assert len(report.files) > 3
    assert report.left_out == ()
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        path.name for path in (folder / "base").iterdir()
    }
    got, base = logits_of(tmp_path / "merged"), BASES[name]()
    want = merged_by_peft(base, folder / "adapter")
    np.testing.assert_allclose(got, want, **TOLERANCE)
    assert np.abs(got - logits_of(folder / "base")).max() > 0.1


def test_pruned_adalora_likewise(tmp_path):
    base = models.llama()
    base.save_pretrained(tmp_path / "base", max_shard_size=SHARD)
    targets = {name: layer for name, layer in base.named_modules() if name.endswith(("q_proj", "v_proj", "down_proj"))}
    kept = {
        name: [(True, False, True, False), (False,) * 4, (True,) * 4][i % 3] for i, name in enumerate(sorted(targets))
    }
    adapter = draw_adalora(shapes={name: tuple(layer.weight.shape) for name, layer in targets.items()}, kept=kept)
    small = {name: factors._replace(E=np.float32(0.01) * factors.E) for name, factors in adapter.factors.items()}
    interop.save(dataclasses.replace(adapter, factors=small), tmp_path / "adapter")
    interop.merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    got = logits_of(tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about fields it does not use
        want = merged_by_peft(models.llama(), tmp_path / "adapter")
    np.testing.assert_allclose(got, want, **TOLERANCE)
    assert np.abs(got - logits_of(tmp_path / "base")).max() > 0.01


def test_a_classifier_trained_on_files_of_the_bare_model_gets_its_head(tmp_path):
    """The files lack the prefix `model.` of the adapted model's names, and the head."""
    models.llama().model.save_pretrained(tmp_path / "base", max_shard_size=SHARD)
    arguments = {"num_labels": 3, "pad_token_id": 0}
    torch.manual_seed(1)
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", **arguments)
    config = peft.RandLoraConfig(
        r=8, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["norm"], bias="all"
    )
    model = peft.get_peft_model(base, config)
    models.randomize((n, value) for n, value in model.named_parameters() if "randlora_" in n or "norm.modules_to" in n)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        want = model.merge_and_unload().eval()(models.tokens()).logits.numpy()
    report = interop.merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert "norm.weight" in report.replaced
    assert report.added == ("score.weight",)
    got = logits_of(tmp_path / "merged", AutoModelForSequenceClassification, **arguments)
    np.testing.assert_allclose(got, want, **TOLERANCE)


@pytest.fixture(scope="module", params=QUANTIZED)
def quantized(request, case, tmp_path_factory):
    folder, _ = case
    how = {"quantization_config": BitsAndBytesConfig(**QUANTIZED[request.param]), "device_map": "cpu"}
    target = tmp_path_factory.mktemp(request.param)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", **how)
    model.save_pretrained(target, max_shard_size=SHARD)
    return target, folder / "adapter"


def in_torch(folder, adapter):
    """The quantized model with the adapter, in training mode, in which 8-bit layers do not quantize activations."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    return randlora_torch.load_adapter(model, adapter).train()


@torch.no_grad()
def test_a_quantized_base_is_dequantized_into_the_model_that_was_trained(quantized, tmp_path):
    base, adapter = quantized
    interop.merge(adapter, base, tmp_path / "merged")
    got = logits_of(tmp_path / "merged")
    want = in_torch(base, adapter)(input_ids=models.tokens()).logits.numpy()
    np.testing.assert_allclose(got, want, **TOLERANCE)


@torch.no_grad()
def test_a_quantized_base_is_quantized_again_as_merging_in_torch_does(quantized, tmp_path):
    base, adapter = quantized
    report = interop.merge(adapter, base, tmp_path / "merged", quantized="requantize")
    model = in_torch(base, adapter)
    by_torch = {name: layer.merge() for name, layer in model.named_modules() if name in report.modules}
    for name, rounding in by_torch.items():
        assert report.rounding[name] == pytest.approx(rounding, rel=1e-3)
    want = model(input_ids=models.tokens()).logits.numpy()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu").train()
    got = merged(input_ids=models.tokens()).logits.numpy()
    # Both round the same W + dW, but for a few numbers on a boundary: torch's is in float32.
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-3
    own = {name.removesuffix(".weight"): value for name, value in read_folder(tmp_path / "merged").items()}
    for name in report.modules:
        exact = layer_weight(model.get_submodule(name))
        assert (np.abs(own[name].dequantize() - exact) > 1e-6).mean() < 1e-3, name
    old, new = files_of(base), files_of(tmp_path / "merged")
    assert old.keys() == new.keys()
    untouched = [key for key in old if not any(key.startswith(f"{module}.") for module in report.modules)]
    assert all(old[key].tobytes() == new[key].tobytes() for key in untouched)


def layer_weight(layer):
    return layer._read_weight().numpy()


def files_of(folder):
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}
