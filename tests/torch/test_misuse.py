"""Odd orders of calls, odd models, several threads: right, or refused by name; never silently wrong."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import interop
from randlora_torch import RandLoraModel, extract, get_peft_model, load_adapter
from tests.torch.conftest import (
    MODELS,
    TOKENS,
    X,
    assert_close,
    assert_same,
    config,
    llama,
    mlp,
    output,
    randomize,
    trained,
)


def two(kind="MLP", targets=None):
    """Adapters "default" (active) and "b" with other values on one model."""
    model = trained(kind)
    model.add_adapter("b", config(targets or MODELS[kind][1], projection_prng_key=3))
    return randomize(model, "b", seed=5).eval()


def test_threads_that_share_a_model_get_right_rows_or_an_error():
    model = two("Llama")
    wanted = {name: output(model, adapter_names=[name] * 2) for name in ("default", "b", "__base__")}
    outcomes = []

    def serve(name):
        for _ in range(15):
            try:
                outcomes.append(torch.equal(output(model, adapter_names=[name] * 2), wanted[name]))
            except RuntimeError as error:
                outcomes.append("give each thread its own copy" in str(error))

    threads = [threading.Thread(target=serve, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 45
    assert all(outcomes)
    assert_same(output(model, adapter_names=["b"] * 2), wanted["b"])


def test_a_plain_call_beside_a_mixed_one_of_another_thread_is_refused():
    model = two()
    seen = []

    def call():
        try:
            output(model)
        except RuntimeError as error:
            seen.append(str(error))

    with model._by_row(["b"] * 4, [X]):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert seen == ["another thread computes a mixed batch with this model: give each thread its own copy."]


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def test_the_fast_path_of_transformer_encoders_does_not_pass_over_the_rows():
    model = randomize(get_peft_model(encoder(), config(["linear1", "linear2"])))
    model.add_adapter("b", config(["linear1"], projection_prng_key=3))
    randomize(model, "b", seed=5).eval()
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixed = model(x, adapter_names=["b", "__base__"])
        model.set_adapter("b")
        assert_close(mixed[:1], model(x[:1]))
        with model.disable_adapter():
            assert_close(mixed[1:], model(x[1:]))
    assert torch.backends.mha.get_fastpath_enabled()


class Reads(nn.Module):
    """Computes with a layer's weight instead of calling the layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 6)

    def forward(self, x):
        return x @ self.up.weight.T


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.up(x.transpose(0, 1)).transpose(0, 1))


def test_code_that_computes_with_a_weight_gets_no_numbers_in_a_mixed_batch():
    model = randomize(get_peft_model(Reads(), config(["up"]))).eval()
    assert model(X, adapter_names=["default"] * 4).isnan().all()
    assert_close(model(X).detach(), X @ model.up.weight.T.detach())


def test_a_layer_that_gets_the_batch_on_another_axis_is_refused_in_a_mixed_batch():
    model = randomize(get_peft_model(TimeFirst(), config(["up"]))).eval()
    x = torch.randn(2, 4, 6)
    with pytest.raises(ValueError, match=r"a layer got an input of shape \(4, 2, 6\), without the rows of the batch"):
        model(x, adapter_names=["default", "__base__"])
    assert model(x).shape == (2, 4, 3)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 6)

    def forward(self, x):
        return (self.up(x),)


class ReturnsTuples(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block = nn.Linear(6, 6), Block()

    def forward(self, x):
        return self.block(self.first(x))[0]


def test_a_trained_module_that_returns_a_tuple_is_refused_in_a_mixed_batch():
    model = get_peft_model(ReturnsTuples(), config(["first"], modules_to_save=["block"])).eval()
    with pytest.raises(
        ValueError, match=r"a mixed batch needs trained modules that return one tensor.* a Block does not"
    ):
        model(X, adapter_names=["default"] * 4)


def test_embeddings_are_not_saved_with_an_update_merged_into_them(tmp_path):
    model = randomize(get_peft_model(llama(), config(["lm_head", "q_proj"])))
    want = output(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['lm_head'\] hold merged adapters, and are no base weights now: unmerge"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert_same(output(load_adapter(llama(seed=0), tmp_path)), want)
    merged = randomize(get_peft_model(llama(), config(["lm_head"]), "other"), "other")
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"\['lm_head'\] hold merged adapters"):
        load_adapter(merged, tmp_path)
    assert list(merged.peft_config) == ["other"]


def test_disabling_for_a_while_merges_again_what_was_merged_active_or_not():
    model = two()
    model.merge_adapter(["b"])  # beside the active "default"
    want = output(model)
    with model.disable_adapter():
        assert_same(output(model), output(mlp()))
    assert_same(output(model), want)
    assert {tuple(layer.merged_adapters) for layer in (model.up, model.down)} == {("b",)}


def test_unloading_within_disable_adapter_is_no_error():
    model = two()
    with model.disable_adapter():
        plain = model.unload()
    assert not isinstance(plain, RandLoraModel)
    assert_same(output(plain), output(mlp()))


def test_merging_for_good_keeps_the_modules_and_biases_of_the_adapters_named():
    model = trained()
    other = randomize(get_peft_model(mlp(), config(["up"], modules_to_save=["head"], bias="all")), seed=7)
    load_adapter(model, extract(other), "b")
    model.set_adapter("b")
    want = output(model)
    model.set_adapter("default")
    assert_close(output(model.merge_and_unload(adapter_names=["b"])), want)


def test_adapters_that_come_after_the_last_was_deleted_while_disabled_are_applied(tmp_path):
    model = trained()
    want = output(model)
    model.save_pretrained(tmp_path)
    model.disable_adapter_layers()
    model.delete_adapter("default")
    assert_same(output(load_adapter(model, tmp_path)), want)


def test_deleting_an_inactive_adapter_activates_no_other():
    model = two()
    model.set_adapter([])
    want = output(model)
    model.delete_adapter("b")
    assert model.active_adapters == []
    assert_same(output(model), want)


def test_models_with_adapters_of_peft_are_left_to_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"'base_model\.model.*q_proj' is a layer of PEFT: unload PEFT's adapters"):
        get_peft_model(model, config("all-linear"))
    assert type(model) is peft.PeftModel


def test_a_compiled_model_is_refused_before_and_understood_after():
    with pytest.raises(ValueError, match=r"because it is compiled: attach to model\._orig_mod\."):
        get_peft_model(torch.compile(mlp()), config(["up"]))
    model = trained()
    assert extract(torch.compile(model)).modules == extract(model).modules
    assert interop.convert(torch.compile(model), to="peft").modules == extract(model).modules


def test_a_config_for_inference_trains_nothing():
    model = get_peft_model(mlp(), config(["up"], inference_mode=True))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_adapter("default")
    assert any(parameter.requires_grad for parameter in model.parameters())


class Locked(nn.Module):
    """Leaves out of its state what cannot be copied."""

    def __init__(self):
        super().__init__()
        self.up, self.lock = nn.Linear(6, 6), threading.Lock()

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "lock"}

    def forward(self, x):
        return self.up(x)


def test_a_class_with_a_state_of_its_own_is_copied_by_its_own_rule():
    model = randomize(get_peft_model(Locked(), config(["up"])))
    assert_same(copy.deepcopy(model)(X), model(X))


def test_what_carries_the_adapter_inside_is_told_where_it_is():
    outer = nn.Sequential(nn.Linear(6, 6), trained())
    with pytest.raises(ValueError, match=r"no adapter is attached to this Sequential\. Its part '1' has one\."):
        extract(outer)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda model: get_peft_model(model, config(["up"]), 5), TypeError, "adapter_name=5: pass a string"),
        (lambda model: model(X, adapter_names="default"), TypeError, "adapter_names='default': pass a list"),
    ],
    ids=["name", "names"],
)
def test_wrong_types_are_named(call, error, message):
    from stacks import without_type_checks

    with without_type_checks(), pytest.raises(error, match=message):
        call(trained().eval())


def hosted(**fields):
    peft = pytest.importorskip("peft")
    from randlora_torch import accelerate_peft

    given = {"r": 3, "randlora_alpha": 3, "target_modules": ["q_proj", "lm_head"], "init_weights": False}
    torch.manual_seed(1)
    return accelerate_peft(peft.get_peft_model(llama(), peft.RandLoraConfig(**{**given, **fields}))).eval()


def test_a_hosted_model_can_be_pickled():
    model = hosted()
    again = pickle.loads(pickle.dumps(model))
    assert_same(again(TOKENS).logits, model(TOKENS).logits)
    assert type(again.base_model.model.lm_head) is type(model.base_model.model.lm_head)


def test_a_hosted_model_takes_an_adapter_after_its_last_was_deleted():
    model = hosted()
    want, its_config = model(TOKENS).logits, copy.copy(model.peft_config["default"])
    model.delete_adapter("default")
    torch.manual_seed(1)
    model.add_adapter("default", its_config)
    model.set_adapter("default")
    assert model(TOKENS).logits.shape == want.shape


@pytest.mark.parametrize(
    ("fields", "names", "message", "training"),
    [
        ({}, ["default"], r"the batch has 2 rows", False),
        ({}, ["default"] * 2, r"mixing is for inference", True),
        ({"modules_to_save": ["model.norm"]}, ["default"] * 2, "which are not mixed here", False),
        ({}, ["c"] * 2, r"\['c'\] are not attached, \['default'\] are", False),
    ],
)
def test_a_hosted_model_refuses_a_batch_that_it_cannot_mix(fields, names, message, training):
    with pytest.raises(ValueError, match=message):
        hosted(**fields).train(training)(input_ids=TOKENS, adapter_names=names)
