"""Models on the meta device: adapters attached before the weights exist, and materialized with them."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from randlora_torch import extract, get_peft_model, load_adapter
from tests.torch.conftest import (
    X,
    assert_close,
    assert_same,
    config,
    gpt2,
    layers_of,
    llama,
    load_llama,
    loss_of,
    mlp,
    output,
    randomize,
    trained,
)

TARGETS = ["up", "down"]


def on_meta(**fields):
    return get_peft_model(mlp().to("meta"), config(TARGETS, **fields))


def emptied(model, state):
    model.to_empty(device="cpu")
    return model.load_state_dict(state, strict=True)


def assigned(model, state):
    return model.load_state_dict(state, strict=True, assign=True)


every_way = pytest.mark.parametrize("fill", [emptied, assigned])


@every_way
@pytest.mark.parametrize("fields", [{}, {"sparse": True}, {"modules_to_save": ["head"]}], ids=str)
def test_a_model_adapted_on_the_meta_device_is_once_filled_the_one_built_normally(fill, fields):
    source = trained(**fields)
    model = on_meta(**fields)
    assert {parameter.device.type for name, parameter in model.named_parameters() if "randlora" not in name} == {"meta"}
    fill(model, source.state_dict())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert_same(output(model), output(source))
    for held, wanted in ((model.randlora_A, source.randlora_A), (model.randlora_B, source.randlora_B)):
        assert_same(held["default"], wanted["default"])


@every_way
def test_a_model_filled_with_its_factors_lost_is_restored_from_a_folder(fill, tmp_path):
    source = trained()
    source.save_pretrained(tmp_path)
    model = on_meta()
    fill(model, randomize(trained(), seed=9).state_dict())
    model.restore_adapter(tmp_path)
    assert_same(output(model), output(source))


def test_a_saved_adapter_loads_onto_the_meta_device_with_its_values(tmp_path):
    source = trained()
    source.save_pretrained(tmp_path)
    model = load_adapter(mlp().to("meta"), tmp_path)
    base = {re.sub(r"^(up|down)\.", r"\1.base_layer.", name): value for name, value in mlp().state_dict().items()}
    missing, unexpected = model.load_state_dict(base, strict=False, assign=True)
    assert unexpected == []
    assert {name.split(".")[1] for name in missing} == {"randlora_lambda", "randlora_gamma"}
    assert_same(output(model), output(source))
    again = extract(model).to_interop()
    for name, pair in extract(source).to_interop().factors.items():
        assert all((a == b).all() for a, b in zip(again.factors[name], pair, strict=True))


@every_way
def test_a_filled_model_trains_merges_saves_and_unloads(fill, tmp_path):
    source, model = trained(), on_meta()
    fill(model, source.state_dict())
    for each in (source, model):
        each.set_adapter("default")
        each(X).square().sum().backward()
    for (_, layer), (_, other) in zip(layers_of(model), layers_of(source), strict=True):
        assert_same(layer.factors("default").lam.grad, other.factors("default").lam.grad)
    model.save_pretrained(tmp_path)
    assert_same(output(load_adapter(mlp(), tmp_path)), output(source))
    model.merge_adapter()
    assert_close(output(model), output(source))
    assert_same(dict(model.unload().state_dict()), dict(mlp().state_dict()))


def test_a_round_trip_over_the_meta_device_loses_no_basis():
    model = trained()
    want, state = output(model), {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta")
    emptied(model, state)
    assert_same(output(model), want)


@pytest.mark.parametrize("make", [llama, gpt2], ids=["Llama", "GPT-2"])
def test_shapes_are_inferred_on_the_meta_device(make):
    target = "q_proj" if make is llama else "c_attn"
    model = get_peft_model(make().to("meta"), config([target]))
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    model.to("meta")
    assert model(ids).logits.shape == (2, 5, 40)


def test_an_adapter_is_attached_within_the_context_of_the_meta_device():
    with torch.device("meta"):
        model = get_peft_model(mlp(), config(TARGETS))
    source = trained()
    emptied(model, source.state_dict())
    assert_same(output(model), output(source))


def test_the_bases_of_a_meta_model_do_not_depend_on_the_device_they_are_made_under():
    model = on_meta()
    assert model.randlora_B["default"].device.type == "cpu"
    assert_same(model.randlora_B["default"], trained().randlora_B["default"])


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_quantized_layers_on_the_meta_device_are_adapted_and_refuse_to_merge(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    with torch.device("meta"):
        layer = (
            bitsandbytes.nn.Linear4bit(64, 64)
            if kind != "int8"
            else bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        )
    model = get_peft_model(nn.ModuleDict({"layer": layer}), config(["layer"]))
    with pytest.raises(ValueError, match=r"nothing can be merged into layer: its weight is on the meta device"):
        model.merge_adapter()


def test_a_model_that_accelerate_offloads_computes_and_trains_with_its_adapter(tmp_path, llama_folder):
    pytest.importorskip("accelerate")
    whole = randomize(get_peft_model(load_llama(llama_folder), config(["q_proj", "down_proj"], r=16)), scale=1 / 15)
    want, adapter = output(whole), extract(whole)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.norm": "cpu", "lm_head": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        llama_folder, device_map={**places, "model.rotary_emb": "cpu"}, offload_folder=tmp_path, dtype=torch.float32
    )
    assert offloaded.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    model = load_adapter(offloaded, adapter, is_trainable=True)
    assert_same(output(model), want)
    loss_of(model).backward()
    loss_of(whole).backward()
    for (_, layer), (_, other) in zip(layers_of(model), layers_of(whole), strict=True):
        for got, expected in zip(layer.factors("default"), other.factors("default"), strict=True):
            assert_same(got.grad, expected.grad)
    with pytest.raises(
        ValueError, match=r"q_proj: its weight is on the meta device \(offloaded or not loaded\)\. Load th"
    ):
        model.merge_adapter()
