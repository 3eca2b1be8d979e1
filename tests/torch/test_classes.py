"""What class an adapted model has, and PEFT's ways of making one: classes, configs of its own, defaults, k-bit."""

import copy
import io

import pytest
import torch
from stacks import without_type_checks
from torch import nn
from transformers import BertForSequenceClassification, LlamaForCausalLM, PreTrainedModel

from interop import RandLoraConfig
from interop.targets import default_targets
from randlora_torch import (
    RandLoraLayer,
    RandLoraModel,
    extract,
    get_peft_model,
    load_adapter,
    prepare_model_for_kbit_training,
)
from tests.torch.conftest import (
    MLP,
    MODELS,
    TOKENS,
    X,
    assert_same,
    bert,
    config,
    every_model,
    layers_of,
    llama,
    load_llama,
    loss_of,
    mlp,
    output,
    randomize,
    trained,
)


@every_model
def test_the_class_attaches_and_its_instances_are_of_both_classes(kind):
    make, targets, count, _ = MODELS[kind]
    base = make()
    model = RandLoraModel(base, config(targets))
    assert model is base
    assert isinstance(model, RandLoraModel)
    assert isinstance(model, type(make()))
    assert type(model).__name__ == type(make()).__name__
    assert type(model).__module__ == type(make()).__module__
    assert isinstance(model, PreTrainedModel) == (kind != "MLP")
    assert len(layers_of(model)) == count
    assert not isinstance(make(), RandLoraModel)
    assert type(RandLoraModel(make(), config(targets), "other")) is type(model)
    assert model.get_base_model() is model


def test_the_class_loads_adapters_from_folders_as_peft_does(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    for options in ({}, {"is_trainable": True}, {"adapter_name": "b", "is_trainable": True}):
        again = RandLoraModel.from_pretrained(mlp(), tmp_path, **options)
        assert isinstance(again, RandLoraModel)
        assert_same(output(again), output(model))
        assert again.active_adapter == options.get("adapter_name", "default")
        assert any(p.requires_grad for p in again.parameters()) == options.get("is_trainable", False)


def test_the_class_of_an_adapted_model_makes_plain_models(tmp_path):
    model = trained("Llama")
    kind = type(model)
    torch.manual_seed(0)
    plain = kind(model.config)
    assert type(plain) is LlamaForCausalLM
    assert not isinstance(plain, RandLoraModel)
    assert_same(output(plain.eval()), output(llama()))
    llama().save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    assert_same(output(loaded), output(llama()))
    assert type(kind._from_config(model.config)) is LlamaForCausalLM
    assert type(type(trained())()) is MLP
    assert issubclass(kind, LlamaForCausalLM)


@pytest.mark.parametrize("kind", ["MLP", "Llama"])
@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle"])
def test_copies_are_adapted_models_of_the_same_class(kind, how):
    model = trained(kind)
    if how == "pickle":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    else:
        twin = getattr(copy, how)(model)
    assert type(twin) is type(model)
    assert_same(output(twin), output(model))
    assert list(twin.peft_config) == ["default"]
    assert type(twin.merge_and_unload()) is type(MODELS[kind][0]())


def test_the_config_of_each_adapter_is_remembered_as_it_was_completed():
    model = llama()
    model.config._name_or_path = model.name_or_path = "some/base"
    given = RandLoraConfig(r=3, projection_prng_key=5)
    get_peft_model(model, given)
    kept = model.peft_config["default"]
    assert (kept.r, kept.projection_prng_key, kept.base_model_name_or_path) == (3, 5, "some/base")
    assert kept.target_modules == ("q_proj", "v_proj")
    assert given.target_modules is None
    with pytest.raises(AttributeError):
        model.peft_config = {}


DEFAULTS = {"Llama": ("q_proj", "v_proj"), "GPT-2": ("c_attn",), "BERT": ("query", "value")}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_without_targets_those_that_peft_has_for_the_model_type_are_adapted(kind):
    make = MODELS[kind][0]
    model = get_peft_model(make(), RandLoraConfig(r=3))
    assert {name.rsplit(".", 1)[-1] for name, _ in layers_of(model)} == set(DEFAULTS[kind])
    assert default_targets(make().config.model_type) == DEFAULTS[kind]
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(make(), peft.RandLoraConfig(r=3))
    names = {name.removeprefix("base_model.model.") for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names


def test_without_targets_a_model_of_no_known_type_is_refused():
    with pytest.raises(ValueError, match=r"target_modules=None: name the layers to adapt, or use 'all-linear'\."):
        get_peft_model(mlp(), RandLoraConfig(r=3))


def test_pefts_own_config_is_understood(tmp_path):
    peft = pytest.importorskip("peft")
    fields = {"r": 3, "randlora_alpha": 6, "sparse": True, "bias": "all", "projection_prng_key": 9}
    theirs = peft.RandLoraConfig(**fields, target_modules={"query", "value"}, task_type=peft.TaskType.SEQ_CLS)
    ours = RandLoraConfig(**fields, target_modules=("query", "value"), task_type="SEQ_CLS")
    with without_type_checks():
        model = get_peft_model(bert(), theirs)
        model.add_adapter("b", theirs)
    twin = get_peft_model(bert(), ours)
    added = {name for name in twin.state_dict() if ".default" in name}
    assert set(model.state_dict()) - set(twin.state_dict()) == {name.replace(".default", ".b") for name in added}
    model.delete_adapter("b")
    assert_same(output(randomize(model)), output(randomize(twin)))
    model.save_pretrained(tmp_path)
    assert_same(output(load_adapter(bert(), tmp_path)), output(model))
    with without_type_checks(), pytest.raises(ValueError, match=r"'LORA'.* is not a RandLoRA or AdaLoRA adapter"):
        get_peft_model(mlp(), peft.LoraConfig(target_modules=["up"]))
    with without_type_checks(), pytest.raises(TypeError, match=r"peft_config is a dict: pass a RandLoraConfig or"):
        get_peft_model(mlp(), {"r": 3})


@every_model
def test_counts_of_parameters_are_the_sums(kind):
    model = trained(kind)
    trainable, total = model.get_nb_trainable_parameters()
    assert total == sum(p.numel() for p in model.parameters())
    assert trainable == sum(part.numel() for _, layer in layers_of(model) for part in layer.factors("default"))
    model.set_requires_grad("default", False)
    assert model.get_nb_trainable_parameters() == (0, total)


def test_parameters_that_zero_3_has_split_are_counted_whole():
    model = trained("MLP")
    want = model.get_nb_trainable_parameters()
    for parameter in model.parameters():  # as DeepSpeed leaves them between uses
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    assert model.get_nb_trainable_parameters() == want


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
@pytest.mark.parametrize("options", [{}, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_a_quantized_model_prepared_for_training_checkpoints_and_trains_in_float32(llama_folder, kind, options):
    pytest.importorskip("bitsandbytes")
    model = load_llama(llama_folder, kind, torch.bfloat16)
    packed = {name: p.dtype for name, p in model.named_parameters() if not p.is_floating_point()}
    assert prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options) is model
    assert not any(p.requires_grad for p in model.parameters())
    kept = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtype for name, dtype in kept.items() if name not in packed} == {torch.float32}
    assert {name: kept[name] for name in packed} == packed
    assert model.is_gradient_checkpointing
    twin = load_llama(llama_folder, kind, torch.bfloat16)
    prepare_model_for_kbit_training(twin, use_gradient_checkpointing=False)
    assert not twin.is_gradient_checkpointing
    gradients = []
    for each in (model, twin):
        randomize(get_peft_model(each, config(["q_proj", "down_proj"], r=16)), scale=1 / 15)
        loss_of(each.train()).backward()
        gradients.append([p.grad for p in each.parameters() if p.requires_grad])
    assert all(isinstance(grad, torch.Tensor) and (grad != 0).any() for grad in gradients[0])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_a_plain_model_is_only_frozen_and_cast_by_the_preparation():
    model = llama().half()
    prepare_model_for_kbit_training(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.is_gradient_checkpointing


def test_the_preparation_leaves_what_pefts_leaves(llama_folder):
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    for kind in ("nf4-double", "int8"):
        ours, theirs = (load_llama(llama_folder, kind, torch.bfloat16) for _ in range(2))
        prepare_model_for_kbit_training(ours)
        peft.prepare_model_for_kbit_training(theirs)
        for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert (name, p.dtype, p.requires_grad) == (other, q.dtype, q.requires_grad)
        assert_same(output(ours.train()), output(theirs.train()))


def test_a_class_with_a_metaclass_or_arguments_of_its_own_can_be_adapted():
    import abc

    class Abstract(nn.Module, abc.ABC):
        @abc.abstractmethod
        def name(self): ...

    class Net(Abstract):
        def __init__(self, size):
            super().__init__()
            torch.manual_seed(0)
            self.up = nn.Linear(6, size)

        def name(self):
            return "net"

        def forward(self, x):
            return self.up(x)

    model = randomize(get_peft_model(Net(4), config(["up"])))
    assert (model.name(), model(X).shape) == ("net", (4, 4))
    assert type(type(model)(5)) is Net
    assert_same(copy.deepcopy(model)(X), model(X))
    assert type(model.unload()) is Net


def test_a_model_adapted_twice_over_is_adapted_once_and_extracted_by_name():
    model = trained("BERT")
    get_peft_model(model, config(["query"]), "b")
    assert type(model).__mro__.count(RandLoraModel) == 1
    assert isinstance(model, BertForSequenceClassification)
    assert not any(isinstance(layer.base_layer, RandLoraLayer) for _, layer in layers_of(model))
    assert extract(model, "b").modules == tuple(name for name, _ in layers_of(model, "b"))
    with torch.no_grad():
        assert model(TOKENS).logits.shape == (2, 2)
