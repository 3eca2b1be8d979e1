"""Merging on whole models: what it rounds and reports, unmerging bit for bit, and the plain model given back."""

import copy
import logging

import pytest
import torch
from stacks import without_type_checks
from tolerances import TOLERANCE
from torch import nn

from randlora_torch import Rounding, extract, get_peft_model, load_adapter
from tests.torch.conftest import (
    MODELS,
    X,
    assert_close,
    assert_same,
    config,
    every_model,
    layers_of,
    llama,
    mlp,
    output,
    randomize,
    trained,
)

HALF = [torch.bfloat16, torch.float16]


@every_model
def test_a_merged_model_computes_the_same_and_unmerging_restores_it(kind):
    model = trained(kind)
    want = output(model)
    weights = {name: layer.base_layer.weight.clone() for name, layer in layers_of(model)}
    model.merge_adapter()
    assert all(layer.merged for _, layer in layers_of(model))
    assert_close(output(model), want)
    model.merge_adapter()
    assert_close(output(model), want)
    model.unmerge_adapter()
    for name, layer in layers_of(model):
        torch.testing.assert_close(layer.base_layer.weight.data, weights[name], **TOLERANCE["float32", "merge"])
    assert_close(output(model), want)


def test_a_safe_merge_that_fails_in_one_layer_leaves_every_layer_as_it_was():
    model = trained()
    last = layers_of(model)[-1][0]
    model.get_submodule(last).factors("default").gamma.data[0, 0] = float("nan")
    weights = {name: layer.base_layer.weight.clone() for name, layer in layers_of(model)}
    with pytest.raises(ValueError, match=rf"merging \['default'\] would make the weight of {last} not finite"):
        model.merge_adapter(safe_merge=True)
    for name, layer in layers_of(model):
        assert not layer.merged
        assert_same(layer.base_layer.weight.data, weights[name])


def test_merging_an_adapter_that_is_not_attached_is_refused():
    model = trained()
    with pytest.raises(ValueError, match=r"adapter 'b' is not attached: the model has \['default'\]\."):
        model.merge_adapter(["default", "b"])
    assert not model.up.merged


@pytest.mark.parametrize("merged", [False, True])
def test_with_the_adapter_disabled_the_model_computes_as_the_base_model(merged):
    model = trained()
    want = output(model)
    if merged:
        model.merge_adapter()
    with model.disable_adapter():
        assert_close(output(model), output(mlp()))
    assert model.up.merged is merged
    assert_close(output(model), want)


def test_an_exception_while_disabled_still_enables_the_adapter_again():
    model = trained()
    want = output(model)
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert_same(output(model), want)


def weights(model):
    return {name: layer.base_layer.weight.detach().clone() for name, layer in layers_of(model)}


def in_dtype(kind, dtype):
    """A model of this kind in another dtype, with an adapter of random float32 values."""
    make, targets, _, _ = MODELS[kind]
    return randomize(get_peft_model(make().to(dtype), config(targets)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_unmerging_restores_the_kept_weights_bit_for_bit(dtype):
    model = in_dtype("Llama", dtype)
    want, before = output(model), weights(model)
    model.merge_adapter()
    assert all(not torch.equal(value, before[name]) for name, value in weights(model).items())
    assert set(model.unmerge_adapter().values()) == {Rounding(0.0, 0.0)}
    assert_same(weights(model), before)
    assert_same(output(model), want)


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_merging_reports_by_layer_what_the_stored_sum_lost(dtype, keep_base):
    model = in_dtype("GPT-2", dtype)
    before = weights(model)
    exact, deltas = {}, {}
    for name, layer in layers_of(model):
        deltas[name] = layer.get_delta_weight("default").detach().T  # a Conv1D stores (in, out)
        exact[name] = before[name].float() + deltas[name]
    roundings = model.merge_adapter(keep_base=keep_base)
    assert roundings.keys() == before.keys()
    for name, merged in weights(model).items():
        assert merged.dtype == dtype
        error = (merged.double() - exact[name].double()).norm().item()
        want = (error / exact[name].norm().item(), error / deltas[name].norm().item())
        torch.testing.assert_close(tuple(roundings[name]), want, rtol=1e-4, atol=1e-7)
        assert (error > 0) == (dtype != torch.float32)
    assert model.merge_adapter() == {}


@pytest.mark.parametrize("dtype", HALF)
def test_without_the_base_kept_weights_are_merged_in_place_and_unmerging_reports_its_own_rounding(dtype):
    model = in_dtype("MLP", dtype)
    before = weights(model)
    places = {name: layer.base_layer.weight for name, layer in layers_of(model)}
    model.merge_adapter(keep_base=False)
    merged = weights(model)
    roundings = model.unmerge_adapter()
    for name, layer in layers_of(model):
        assert layer.base_layer.weight is places[name]
        delta = layer.get_delta_weight("default").detach()
        exact = merged[name].float() - delta
        got = weights(model)[name]
        assert_same(got, exact.to(dtype))
        assert not torch.equal(got, before[name])
        error = (got.float() - exact).norm()
        want = ((error / exact.norm()).item(), (error / delta.norm()).item())
        torch.testing.assert_close(tuple(roundings[name]), want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_warning_says_what_merging_cost_if_it_cost_anything(dtype, caplog):
    model = in_dtype("MLP", dtype)
    with caplog.at_level(logging.INFO, logger="randlora_torch"):
        roundings = model.merge_adapter()
        model.merge_adapter()
        model.unmerge_adapter()
    records = [record for record in caplog.records if record.name.startswith("randlora_torch")]
    if dtype == torch.float32:
        assert records == []
        return
    (record,) = records
    assert record.levelno == logging.WARNING
    worst = max(roundings, key=lambda name: roundings[name].of_update)
    mean = [sum(part) / len(part) for part in zip(*roundings.values(), strict=True)]
    assert record.getMessage() == (
        f"merging rounded 2 weights to their storage format: mean error {mean[0]:.2g} of the weight and {mean[1]:.2g}"
        f" of the update; worst in {worst}, {roundings[worst].of_update:.2g} of the update."
        " Unmerged adapters are exact."
    )


def test_the_warning_counts_only_the_weights_that_were_merged_into(caplog):
    model = in_dtype("MLP", torch.bfloat16)
    randomize(get_peft_model(model, config(["up"], r=2), "b"), "b")
    model.merge_adapter("b")
    assert "merging rounded 1 weights" in caplog.text


@pytest.mark.parametrize("how", ["dtype", "deepcopy"])
def test_a_merged_model_that_was_converted_or_copied_unmerges_to_its_base(how):
    model = trained()
    base = mlp()
    model.merge_adapter()
    if how == "dtype":
        model, base = model.bfloat16(), base.bfloat16()
    else:
        model = copy.deepcopy(model)
    model.unmerge_adapter()
    for name, layer in layers_of(model):
        assert_same(layer.base_layer.weight.data, base.get_submodule(name).weight.data)


def test_disabling_adapters_for_good_unmerges_and_nothing_merges_meanwhile():
    model = trained()
    model.merge_adapter()
    model.disable_adapter_layers()
    assert not any(layer.merged for _, layer in layers_of(model))
    assert_same(output(model), output(mlp()))
    message = r"nothing can be merged while adapters are disabled: enable_adapter_layers\(\) first\."
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=message):
            merge()
    model.enable_adapter_layers()
    assert_same(output(model), output(trained()))


@pytest.mark.parametrize("keep_base", [True, False])
def test_after_a_while_of_disabled_adapters_they_are_merged_as_before(keep_base):
    model = trained()
    model.merge_adapter(keep_base=keep_base)
    merged = weights(model)
    with model.disable_adapter():
        assert_close(output(model), output(mlp()))
    torch.testing.assert_close(weights(model), merged, **TOLERANCE["float32", "merge"])
    assert (model.up._kept is not None) == keep_base


@every_model
def test_the_merged_and_unloaded_model_is_a_plain_one_with_w_plus_dw(kind):
    model = trained(kind)
    want, keys = output(model), set(MODELS[kind][0]().state_dict())
    deltas = {name: layer.get_delta_weight("default").detach() for name, layer in layers_of(model)}
    plain = model.merge_and_unload()
    assert plain is model
    assert type(plain) is type(MODELS[kind][0]())
    assert set(plain.state_dict()) == keys
    assert not hasattr(plain, "_randlora")
    base = MODELS[kind][0]()
    for name, delta in deltas.items():
        weight = base.get_submodule(name).weight
        weight.data += delta.T if kind == "GPT-2" else delta
    torch.testing.assert_close(dict(plain.state_dict()), dict(base.state_dict()), **TOLERANCE["float32", "merge"])
    assert_close(output(plain), want)


@every_model
@pytest.mark.parametrize("merged", [False, True])
def test_an_unloaded_model_is_the_base_model_bit_for_bit(kind, merged):
    model, base = trained(kind, bias="all"), MODELS[kind][0]()
    if merged:
        model.merge_adapter()
    plain = model.unload()
    assert plain is model
    assert type(plain) is type(base)
    assert_same(dict(plain.state_dict()), dict(base.state_dict()))
    assert_same(output(plain), output(base))
    get_peft_model(plain, config(MODELS[kind][1]))
    assert_same(output(plain), output(base))


def test_chosen_adapters_are_merged_and_a_safe_merge_refuses_what_is_not_finite():
    model = trained()
    randomize(get_peft_model(model, config(["head"], r=2), "b"), "b")
    want = output(model)
    broken = copy.deepcopy(model)
    broken.head.factors("b").lam.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"merging \['b'\] would make the weight of head not finite"):
        broken.merge_and_unload(safe_merge=True)
    assert_same(broken.head.base_layer.weight.data, mlp().head.weight.data)
    assert type(broken) is type(model)
    plain = model.merge_and_unload(progressbar=True, adapter_names=["b"])
    assert_close(output(plain), want)
    assert_same(plain.up.weight.data, mlp().up.weight.data)


def test_an_adapter_under_a_missing_or_computed_weight_is_not_merged():
    parametrized = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Linear(8, 3))
    model = randomize(get_peft_model(parametrized, config(["0", "1"])))
    want, before = model(X), model[1].base_layer.weight.detach().clone()
    message = (
        r"nothing can be merged into 0: its weight is computed by a parametrization \(weight_norm, pruning, \.\.\.\)"
    )
    with pytest.raises(ValueError, match=rf"{message}\. Call torch\.nn\.utils\.parametrize\.remove_parametrizations"):
        model.merge_adapter()
    assert_same(model(X), want)
    assert_same(model[1].base_layer.weight.data, before)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 8)).to("meta"), config(["0"]))
    with pytest.raises(
        ValueError, match=r"into 0: its weight is on the meta device \(offloaded or not loaded\)\. Load"
    ):
        model.merge_adapter()


def test_merging_into_a_tied_head_unties_it_also_without_keeping_the_base():
    model = randomize(get_peft_model(llama(tie_word_embeddings=True), config(["lm_head"])))
    embedding = model.model.embed_tokens.weight
    before, want = embedding.detach().clone(), output(model)
    model.merge_adapter(keep_base=False)
    assert_close(output(model), want)
    assert_same(embedding.data, before)
    model.unmerge_adapter()
    assert model.lm_head.base_layer.weight is embedding


def test_a_tied_head_merged_for_good_survives_saving_and_loading(tmp_path):
    model = randomize(get_peft_model(llama(tie_word_embeddings=True), config(["lm_head"])))
    want = output(model)
    plain = model.merge_and_unload()
    assert_close(output(plain), want)
    plain.save_pretrained(tmp_path)
    assert_close(output(type(plain).from_pretrained(tmp_path).eval()), want)


def test_another_adapter_may_be_added_and_merged_while_one_is_merged():
    model = trained()
    other = extract(randomize(get_peft_model(mlp(), config(["up", "head"], r=2)), seed=2))
    model.merge_adapter()
    load_adapter(model, other, "b")
    with without_type_checks():
        model.merge_adapter(("b",))
    model.set_adapter(["default", "b"])
    merged = output(model)
    model.unmerge_adapter()
    assert_close(output(model), merged)
    assert_same(model.up.base_layer.weight.data, mlp().up.weight.data)
