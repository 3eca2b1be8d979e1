"""Trained modules and biases beside other adapters, under conversions, and in models that own odd biases."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from randlora_torch import extract, get_peft_model, load_adapter
from tests.torch.conftest import TOKENS, X, assert_same, bert, config, mlp, output, randomize, trained

BOTH = {"bias": "all", "modules_to_save": ["head"]}


@pytest.mark.parametrize("fields", [{"modules_to_save": ["head"]}, {"bias": "all"}], ids=str)
def test_a_second_new_adapter_starts_from_the_base_whatever_is_active(fields):
    model = trained(**fields)
    get_peft_model(model, config(["up"], **fields), "b")
    assert_same(output(model), output(mlp()))
    model.set_adapter("default")
    assert_same(output(model), output(trained(**fields)))


CONVERSIONS = {"bfloat16": nn.Module.bfloat16, "double": nn.Module.double}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("when", ["in force", "disabled"])
def test_a_converted_model_still_switches_its_biases(dtype, when):
    model, twin = trained(**BOTH), trained(**BOTH)
    if when == "disabled":
        model.disable_adapter_layers()
    model.to(dtype)
    for enabled in (True, False, True):
        (model.enable_adapter_layers if enabled else model.disable_adapter_layers)()
        (twin.enable_adapter_layers if enabled else twin.disable_adapter_layers)()
        with torch.no_grad():
            got = model(X.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), output(twin), rtol=5e-2, atol=5e-2)


def test_a_converted_model_still_switches_its_modules():
    model = trained(modules_to_save=["head"]).bfloat16()
    for enabled in (True, False, True):
        (model.enable_adapter_layers if enabled else model.disable_adapter_layers)()
        with torch.no_grad():
            assert model(X.bfloat16()).dtype == torch.bfloat16


def test_what_one_adapter_adapts_another_cannot_train_in_full():
    model = trained()
    want = output(model)
    with pytest.raises(ValueError, match=r"modules_to_save: 'up' cannot be trained in full, because 'up' is adapted\."):
        get_peft_model(model, config(["down"], modules_to_save=["up"]), "b")
    assert_same(output(model), want)


def test_what_one_adapter_trains_in_full_another_cannot_adapt():
    model = trained(modules_to_save=["head"])
    want = output(model)
    with pytest.raises(ValueError, match=r"It matches 'head', which is not a linear layer"):
        get_peft_model(model, config(["head"]), "b")
    assert_same(output(model), want)


class Attending(nn.Module):
    """PEFT trains and saves the biases that are named "bias", and so not `attn.in_proj_bias`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.rnn, self.out = nn.MultiheadAttention(6, 2), nn.GRU(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.out(self.rnn(self.attn(x, x, x)[0])[0])


def test_biases_of_other_names_are_left_alone_as_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(Attending(), peft.RandLoraConfig(r=3, target_modules=["out"], bias="all"))
    model = get_peft_model(Attending(), config(["out"], bias="all"))
    wanted = {name.removeprefix("base_model.model.") for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    randomize(model).save_pretrained(tmp_path)
    assert_same(load_adapter(Attending(), tmp_path)(X), model(X))


def test_a_tied_bias_stays_tied():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForMaskedLM(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes)).eval()
    head = model.cls.predictions
    assert head.bias is head.decoder.bias
    get_peft_model(model, config(["query"], bias="all"))
    assert head.bias is head.decoder.bias
    model(TOKENS).logits.square().sum().backward()
    assert (head.bias.grad != 0).any()


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.tail = nn.Linear(6, 12), nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 3))

    def forward(self, x):
        return self.tail(torch.relu(self.first(x)))


def test_a_module_with_buffers_keeps_them_through_files(tmp_path):
    model = get_peft_model(Normalized(), config(["first"], modules_to_save=["tail"]))
    for _ in range(3):
        model(X)  # moves the running statistics of the copy, not of the original
    randomize(model)
    assert model.tail.original_module[0].num_batches_tracked == 0
    assert model.tail.current[0].num_batches_tracked == 3
    model.save_pretrained(tmp_path)
    again = load_adapter(Normalized(), tmp_path).eval()
    assert again.tail.current[0].num_batches_tracked == 3
    assert again.tail.current[0].num_batches_tracked.dtype == torch.int64
    assert_same(again(X), model.eval()(X))


def test_a_model_whose_names_repeat_wraps_each_module_that_an_entry_means():
    model = get_peft_model(bert(), config(["query"], modules_to_save=["attention.output.LayerNorm"]))
    assert extract(model).saved_weights.keys() == {
        f"base_model.model.bert.encoder.layer.{i}.attention.output.LayerNorm.{part}"
        for i in range(2)
        for part in ("weight", "bias")
    }


def test_a_full_name_in_modules_to_save_means_that_module():
    model = nn.Sequential(nn.Linear(6, 12), nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 3)))
    get_peft_model(model, config(["0"], modules_to_save=["1"]))
    assert set(extract(model).saved_weights) == {
        f"base_model.model.1.{i}.{part}" for i in "01" for part in ("weight", "bias")
    }


def test_an_extracted_adapter_holds_its_trained_values_and_a_conversion_copies_them():
    model = trained(**BOTH)
    hub = extract(model).to_interop()
    before = {key: value.copy() for key, value in hub.saved_weights.items()}
    randomize(model, seed=7)
    for key, value in hub.saved_weights.items():
        np.testing.assert_array_equal(value, before[key])
    assert_same(output(load_adapter(mlp(), hub)), output(trained(**BOTH)))


@pytest.mark.parametrize("fields", [{"modules_to_save": ["head"]}, {"bias": "all"}], ids=str)
def test_of_adapters_merged_for_good_the_modules_and_biases_stay_and_no_others(fields):
    for chosen, other in (("b", "default"), ("default", "b")):
        model = trained(**fields)
        randomize(get_peft_model(model, config(["up"], r=2, **fields), "b"), "b", seed=3)
        want = output(load_adapter(mlp(), extract(model, chosen)))
        model.set_adapter(other)
        torch.testing.assert_close(output(model.merge_and_unload(adapter_names=[chosen])), want, rtol=1e-4, atol=1e-5)
    plain = trained(**fields)
    get_peft_model(plain, config(["up"], r=2), "b")
    want = output(load_adapter(mlp(), extract(randomize(plain, "b"), "b")))
    plain.set_adapter("default")
    torch.testing.assert_close(output(plain.merge_and_unload(adapter_names="b")), want, rtol=1e-4, atol=1e-5)


def test_a_refused_merge_for_good_leaves_the_active_adapter_as_it_was():
    model = trained()
    randomize(get_peft_model(model, config(["up"], r=2), "b"), "b")
    model.up.factors("b").lam.data[0, 0] = float("inf")
    model.set_adapter("default")
    want = output(model)
    with pytest.raises(ValueError, match=r"merging \['b'\] would make the weight of up not finite"):
        model.merge_and_unload(adapter_names=["b"], safe_merge=True)
    assert model.active_adapters == ["default"]
    assert_same(output(model), want)
