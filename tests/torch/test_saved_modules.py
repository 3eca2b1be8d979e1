"""What an adapter trains besides lambda and gamma: copies of whole modules, and biases."""

import copy
import dataclasses
import io

import numpy as np
import pytest
import torch
from torch import nn

import interop
from interop import AdapterFormatError
from randlora_torch import ModulesToSaveWrapper, extract, get_peft_model, load_adapter
from tests.torch.conftest import (
    MODELS,
    X,
    assert_close,
    assert_same,
    bert,
    config,
    llama,
    load_llama,
    loss_of,
    mlp,
    output,
    randomize,
    relative_error,
    trained,
)

FIELDS = {  # kind of model, fields of the config, what trains besides lambda and gamma
    "all biases": ("MLP", {"bias": "all"}, ["up.base_layer.bias", "norm.bias", "head.bias"]),
    "adapted biases": ("MLP", {"bias": "randlora_only"}, ["up.base_layer.bias"]),
    "a head": ("MLP", {"modules_to_save": ["head"]}, ["head.weight", "head.bias"]),
    "both": (
        "MLP",
        {"modules_to_save": ["head", "norm"], "bias": "all"},
        ["head.weight", "head.bias", "norm.weight", "norm.bias", "up.base_layer.bias"],
    ),
    "embeddings": (
        "Llama",
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        ["model.embed_tokens.weight", "lm_head.weight"],
    ),
    "a classifier": ("BERT", {"task_type": "SEQ_CLS"}, ["classifier.weight", "classifier.bias"]),
    "a classifier of tokens": ("BERT", {"task_type": "TOKEN_CLS"}, ["classifier.weight", "classifier.bias"]),
}
every_kind = pytest.mark.parametrize("what", FIELDS)


def make(what):
    return MODELS[FIELDS[what][0]][0]().eval()


def adapted(what, name="default", model=None):
    kind, fields, _ = FIELDS[what]
    return get_peft_model(model or make(what), config(MODELS[kind][1], **fields), name).eval()


@every_kind
def test_a_new_adapter_computes_as_the_base_and_trains_what_was_asked_for(what):
    model = adapted(what)
    assert_same(output(model), output(make(what)))
    assert set(extract(model).saved_weights) == {f"base_model.model.{name}" for name in FIELDS[what][2]}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = {key: value.clone() for key, value in extract(model).saved_weights.items()}
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    after = extract(model).saved_weights
    assert all(not torch.equal(before[key], after[key]) for key in before)
    changed = output(model)
    assert not torch.equal(changed, output(make(what)))
    with model.disable_adapter():
        assert_same(output(model), output(make(what)))
    assert_same(output(model), changed)
    model.disable_adapter_layers()
    assert_same(output(model), output(make(what)))
    model.enable_adapter_layers()
    assert_same(output(model), changed)


@every_kind
@pytest.mark.parametrize("is_trainable", [False, True])
def test_saving_and_loading_gives_the_same_bits(what, tmp_path, is_trainable):
    model = randomize(adapted(what))
    model.save_pretrained(tmp_path)
    saved = interop.load(tmp_path).saved_weights
    for key, value in extract(model).saved_weights.items():
        np.testing.assert_array_equal(saved[key], value.numpy())
    again = load_adapter(make(what), tmp_path, is_trainable=is_trainable)
    assert_same(output(again), output(model))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == (trains if is_trainable else set())
    with again.disable_adapter():
        assert_same(output(again), output(make(what)))


@every_kind
def test_each_of_two_adapters_has_copies_of_its_own(what, tmp_path):
    model, want = randomize(adapted(what)), {}
    want["default"] = output(model)
    other = randomize(adapted(what, "b"), "b", seed=5)
    want["b"] = output(other)
    model.load_adapter(extract(other), "b", is_trainable=True)
    parameters = {}
    for name in ("b", "default", "b", "default", "b"):
        model.set_adapter(name)
        assert_same(output(model), want[name])
        # The parameters that an optimizer knows are the ones in force, each time.
        training = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
        assert parameters.setdefault(name, training) == training
        model.disable_adapter_layers()
        assert_same(output(model), output(make(what)))
        model.enable_adapter_layers()
    assert set(parameters["default"]).isdisjoint(parameters["b"])
    with pytest.raises(ValueError, match=r"the adapters \['default', 'b'\] train the same modules or biases: only one"):
        model.set_adapter(["default", "b"])
    assert model.active_adapters == ["b"]
    model.save_pretrained(tmp_path)
    assert_same(output(load_adapter(make(what), tmp_path)), want["default"])
    assert_same(output(load_adapter(make(what), tmp_path / "b", "b")), want["b"])
    model.delete_adapter("b")
    assert_same(output(model), want["default"])
    model.delete_adapter("default")
    assert_same(output(model), output(make(what)))
    assert not any(isinstance(module, ModulesToSaveWrapper) for module in model.modules())
    assert_same(dict(model.state_dict()), dict(make(what).state_dict()))


@every_kind
def test_a_merged_and_unloaded_model_keeps_what_was_trained(what):
    model = randomize(adapted(what))
    want, keys = output(model), set(make(what).state_dict())
    trained_values = dict(extract(model).saved_weights)
    plain = model.merge_and_unload()
    assert_close(output(plain), want)
    assert set(plain.state_dict()) == keys
    for key, value in trained_values.items():
        name = key.removeprefix("base_model.model.").replace(".base_layer", "")
        assert_same(plain.state_dict()[name], value)


@every_kind
def test_an_unloaded_model_has_its_own_modules_and_biases(what):
    model = randomize(adapted(what))
    model.merge_adapter()
    assert_same(dict(model.unload().state_dict()), dict(make(what).state_dict()))


@every_kind
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_model_switches_on_its_own(what, how):
    model = randomize(adapted(what))
    want = output(model)
    twin = copy.deepcopy(model)
    if how == "pickle":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    twin.disable_adapter_layers()
    assert_same(output(twin), output(make(what)))
    assert_same(output(model), want)
    twin.enable_adapter_layers()
    assert_same(output(twin), want)
    randomize(twin, seed=9)
    assert not torch.equal(output(twin), want)
    assert_same(output(model), want)


def test_a_trained_module_reads_as_the_one_in_force():
    model = trained(modules_to_save=["head"])
    head = model.head
    assert isinstance(head, ModulesToSaveWrapper)
    assert (head.in_features, head.out_features) == (6, 3)
    assert head.weight is head.modules_to_save["default"].weight
    assert head.active == "default"
    assert_same(head(X[:, :6]), nn.functional.linear(X[:, :6], head.weight, head.bias))
    with model.disable_adapter():
        assert head.weight is head.original_module.weight
    with pytest.raises(AttributeError, match="nonsense"):
        head.nonsense  # noqa: B018


def test_a_model_with_trained_embeddings_generates_and_gives_its_embeddings():
    model = randomize(adapted("embeddings"))
    assert model.get_input_embeddings() is model.model.embed_tokens
    ids = torch.tensor([[1, 2, 3]])
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert_same(tokens[:, 3:], model(tokens[:, :-1]).logits[:, 2:].argmax(-1))


def test_adapters_that_train_different_modules_can_be_active_together():
    model = randomize(get_peft_model(mlp(), config(["up"], modules_to_save=["head"])))
    randomize(get_peft_model(model, config(["down"], modules_to_save=["norm"]), "b"), "b")
    model.set_adapter(["default", "b"])
    plain = mlp()
    for name, module in (("head", model.head.modules_to_save["default"]), ("norm", model.norm.modules_to_save["b"])):
        plain.set_submodule(name, copy.deepcopy(module))
    for name, adapter in (("up", "default"), ("down", "b")):
        layer = model.get_submodule(name)
        plain.get_submodule(name).weight.data += layer.get_delta_weight(adapter).detach()
    assert_close(output(model), output(plain))


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
@pytest.mark.parametrize(
    "fields", [{"bias": "all"}, {"modules_to_save": ["lm_head"], "bias": "randlora_only"}], ids=str
)
def test_quantized_models_train_biases_and_modules_too(tmp_path, tmp_path_factory, kind, fields):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "attention_bias": True}
    base = llama(**sizes)
    for module in base.modules():
        if getattr(module, "bias", None) is not None:
            module.bias.data.normal_(generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("biased")
    base.save_pretrained(folder)
    make = lambda: load_llama(folder, kind)  # noqa: E731
    model = randomize(get_peft_model(make(), config(["q_proj", "down_proj"], r=16, **fields)), scale=1 / 15)
    loss_of(model.train()).backward()
    biases = [p for name, p in model.named_parameters() if "bias" in name and p.requires_grad]
    assert len(biases) == (4 if fields["bias"] == "all" else 1)
    assert all((p.grad != 0).any() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    again = load_adapter(make(), tmp_path)
    assert_same(output(again.train()), output(model))
    with model.disable_adapter():
        assert_same(output(model), output(get_peft_model(make(), config(["q_proj"])).train()))
    assert relative_error(output(again), output(get_peft_model(make(), config(["q_proj"])).train())) > 0.01


def damaged(change):
    """An adapter that trains a head and biases, with its tensors changed."""
    hub = extract(trained(modules_to_save=["head"], bias="all")).to_interop()
    weights = dict(hub.saved_weights)
    change(weights)
    return interop.Adapter(**{**vars(hub), "saved_weights": weights})


HEAD = "base_model.model.head.weight"
DAMAGES = {
    "a tensor is missing": (lambda w: w.pop(HEAD), rf"{HEAD}: missing"),
    "a tensor is left over": (
        lambda w: w.update({"base_model.model.tail.bias": np.zeros(3, np.float32)}),
        r"base_model\.model\.tail\.bias: the model has no such place",
    ),
    "a tensor has another shape": (
        lambda w: w.update({HEAD: np.zeros((1, 6), np.float32)}),
        rf"{HEAD}: has shape \(1, 6\), the model's is \(3, 6\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_trained_modules_that_do_not_fit_are_refused_and_the_model_stays_as_it_was(damage):
    change, message = DAMAGES[damage]
    model = mlp()
    with pytest.raises(AdapterFormatError, match=rf"trained modules and biases do not fit the model:\n  - {message}"):
        load_adapter(model, damaged(change))
    assert list(model.state_dict()) == list(mlp().state_dict())
    assert type(model) is type(mlp())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_all_tensors_that_do_not_fit_are_listed_at_once():
    def change(weights):
        for _, (damage, _) in DAMAGES.items():
            damage(weights)
        weights.pop("base_model.model.norm.bias")

    with pytest.raises(
        AdapterFormatError, match=r"(?s)norm\.bias: missing.*tail\.bias: the model has no.*head\.weight: "
    ):
        load_adapter(mlp(), damaged(change))


def test_of_a_module_and_its_parts_the_module_is_trained():
    model = get_peft_model(bert(), config(["query"], modules_to_save=["pooler.dense", "pooler"]))
    assert [name for name, part in model.named_modules() if isinstance(part, ModulesToSaveWrapper)] == ["bert.pooler"]
    names = {f"base_model.model.bert.pooler.dense.{part}" for part in ("weight", "bias")}
    assert set(extract(model).saved_weights) == names


def test_a_layer_cannot_be_adapted_and_trained_in_full_by_one_adapter():
    hub = extract(trained()).to_interop()
    hub = dataclasses.replace(hub, config=dataclasses.replace(hub.config, modules_to_save=("up",)))
    model = mlp()
    with pytest.raises(ValueError, match=r"'up' cannot be trained in full, because 'up' is adapted\. Leave one out\."):
        load_adapter(model, hub)
    assert type(model) is type(mlp())


def test_a_quantized_module_cannot_be_trained_in_full(llama_folder):
    pytest.importorskip("bitsandbytes")
    for kind in ("nf4", "int8"):
        model = load_llama(llama_folder, kind)
        message = (
            r"modules_to_save: 'model\.layers\.0\.mlp\.up_proj' cannot be trained in full, because .* is quantized"
        )
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, config(["q_proj"], modules_to_save=["up_proj"]))
