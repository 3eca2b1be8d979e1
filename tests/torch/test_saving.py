"""Adapters written to folders and read again, taken out of models, and set to saved values in place."""

import copy
import dataclasses

import pytest
import torch
from stacks import without_type_checks
from torch import nn

import interop
from interop import DEFAULT_RECIPE, Adapter, AdapterFormatError
from randlora_torch import RandLoraAdapter, extract, get_peft_model, load_adapter
from tests.torch.conftest import (
    MODELS,
    X,
    assert_same,
    config,
    every_model,
    layers_of,
    mlp,
    output,
    randomize,
    trained,
)


@every_model
def test_save_and_load_give_bit_equal_logits(kind, tmp_path):
    model = trained(kind)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = load_adapter(MODELS[kind][0](), tmp_path)
    assert_same(output(again), output(model))
    assert extract(again).recipe == extract(model).recipe == DEFAULT_RECIPE


def test_a_named_adapter_is_saved_in_a_folder_of_its_name(tmp_path):
    model = trained()
    load_adapter(model, extract(trained(r=2, sparse=True)), "other")
    model.save_pretrained(tmp_path)
    for folder, name in ((tmp_path, "default"), (tmp_path / "other", "other")):
        alone = load_adapter(mlp(), folder, name)
        model.set_adapter(name)
        assert_same(output(alone), output(model))
    model.save_pretrained(tmp_path / "selected", selected_adapters=["other"])
    assert [path.name for path in (tmp_path / "selected").iterdir()] == ["other"]
    model.save_pretrained(tmp_path / "worker", is_main_process=False)
    assert not (tmp_path / "worker").exists()


def test_saving_changes_nothing_and_refuses_adapters_that_are_not_attached(tmp_path):
    model = trained()
    want, before = output(model), copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path)
    assert_same(output(model), want)
    assert_same(dict(model.state_dict()), dict(before))
    with pytest.raises(ValueError, match=r"adapter 'nope' is not attached: the model has \['default'\]\."):
        model.save_pretrained(tmp_path / "none", selected_adapters=["default", "nope"])
    assert not (tmp_path / "none").exists()


def test_what_is_saved_does_not_depend_on_what_is_in_force(tmp_path):
    model = trained(bias="all", modules_to_save=["head"])

    def saved():
        model.save_pretrained(tmp_path, selected_adapters=["default"])
        return (tmp_path / "adapter_model.safetensors").read_bytes()

    want = saved()
    get_peft_model(model, config(["up"]), "b")
    for change in (
        model.disable_adapter_layers,
        model.enable_adapter_layers,
        lambda: model.set_adapter("default"),
        model.merge_adapter,
        model.eval,
    ):
        change()
        assert saved() == want


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_keep_their_dtype_through_save_and_load(dtype, tmp_path):
    model = trained().to(dtype)
    model.save_pretrained(tmp_path)
    again = load_adapter(mlp().to(dtype), tmp_path)
    assert {part.dtype for part in layers_of(again)[0][1].factors("default")} == {dtype}
    with torch.no_grad():
        assert_same(again(X.to(dtype)), model(X.to(dtype)))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_loaded_adapter_trains_only_if_asked_to(is_trainable):
    model = load_adapter(mlp(), extract(trained()), is_trainable=is_trainable)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == (4 if is_trainable else 0)
    assert model.randlora_adapters["default"].recipe == DEFAULT_RECIPE


def test_an_adapter_of_any_form_loads_alike(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    adapter = extract(model)
    hub = adapter.to_interop()
    bare = dataclasses.replace(hub, bases=None, shapes=None)
    for source in (adapter, hub, bare, tmp_path, str(tmp_path), RandLoraAdapter.from_interop(hub)):
        assert_same(output(load_adapter(mlp(), source)), output(model))


@pytest.mark.parametrize("wrong", [None, 3, {"r": 4}])
def test_loading_something_else_is_a_type_error(wrong):
    message = r"dir_or_adapter is a (NoneType|int|dict): pass an adapter folder or an adapter\."
    with without_type_checks(), pytest.raises(TypeError, match=message):
        load_adapter(mlp(), wrong)


def test_extract_gives_the_current_factors_and_what_the_adapter_was_made_with():
    model = trained()
    adapter = extract(model)
    assert adapter.modules == ("down", "up")
    assert adapter.shapes == {"down": (6, 12), "up": (12, 6)}
    assert adapter.config.r == 3
    for name, layer in layers_of(model):
        assert_same(adapter.delta_weight(name), layer.get_delta_weight("default").detach())
        assert all(not part.requires_grad for part in adapter.factors[name])
    randomize(model, seed=5)
    assert_same(adapter.factors["up"].lam, model.up.factors("default").lam.detach())
    assert isinstance(adapter.to_interop(), Adapter)


def test_extract_needs_a_name_if_there_are_several_adapters_or_none():
    with pytest.raises(ValueError, match=r"no adapter is attached to this MLP\. Attach one first\."):
        extract(mlp())
    model = load_adapter(trained(), extract(trained()), "b")
    with pytest.raises(ValueError, match=r"the model has the adapters \['default', 'b'\]: pass adapter_name"):
        extract(model)
    with pytest.raises(ValueError, match=r"adapter 'c' is not attached: the model has \['default', 'b'\]\."):
        extract(model, "c")
    assert extract(model, "b").modules == ("down", "up")


def test_the_recipe_of_the_bases_can_be_chosen_and_is_remembered(tmp_path):
    fields = {"save_projection": False}
    model = randomize(get_peft_model(mlp(), config(["up"], **fields), recipe="torch<=2.11"))
    assert extract(model).recipe == "torch<=2.11"
    model.save_pretrained(tmp_path)
    assert_same(output(load_adapter(mlp(), tmp_path)), output(model))
    assert_same(output(load_adapter(mlp(), tmp_path, recipe="torch<=2.11")), output(model))


def test_an_adapter_for_another_model_is_refused_and_the_model_stays_as_it_was():
    other = nn.ModuleDict({"up": nn.Linear(6, 13)})
    with pytest.raises(AdapterFormatError, match=r"the model lacks these adapted layers .*:\n  - down$"):
        load_adapter(other, extract(trained()))
    only_up = extract(randomize(get_peft_model(mlp(), config(["up"]))))
    with pytest.raises(AdapterFormatError, match=r"up: the model has \(13, 6\), the adapter was made for \(12, 6\)"):
        load_adapter(other, only_up)
    assert type(other) is nn.ModuleDict
    assert type(other["up"]) is nn.Linear


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_adapter(mlp(), tmp_path / "nowhere")


def test_state_dicts_of_two_models_with_equal_adapters_are_interchangeable():
    model, other = trained(), get_peft_model(mlp(1), config(["up", "down"]))
    other.load_state_dict(model.state_dict())
    assert_same(output(other), output(model))


def test_values_of_a_gathered_state_dict_are_written_in_place_of_the_models(tmp_path):
    model, other = trained(), randomize(trained(), seed=5)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert_same(output(load_adapter(mlp(), tmp_path)), output(other))
    partial = {name: value for name, value in other.state_dict().items() if name.startswith("up.")}
    model.save_pretrained(tmp_path, state_dict=partial)
    saved = interop.load(tmp_path).factors
    for name, source in (("up", other), ("down", model)):
        assert (saved[name].lam == source.get_submodule(name).factors("default").lam.detach().numpy()).all()


def test_a_gathered_state_dict_also_gives_the_trained_modules(tmp_path):
    fields = {"modules_to_save": ["head"]}
    model, other = trained(**fields), randomize(trained(**fields), seed=5)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert_same(output(load_adapter(mlp(), tmp_path)), output(other))


def test_arguments_for_whole_models_mean_nothing_and_unknown_ones_are_refused(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "a", max_shard_size="1GB", save_peft_format=True, token=None)
    assert_same(output(load_adapter(mlp(), tmp_path / "a")), output(model))
    message = r"save_pretrained got \['selected', 'wrong'\], which saving an adapter does not know\. Drop them\."
    with pytest.raises(TypeError, match=message):
        model.save_pretrained(tmp_path / "b", selected="default", wrong=1)
    with pytest.raises(ValueError, match=r"safe_serialization=False would write a pickle: only safetensors files"):
        model.save_pretrained(tmp_path / "b", safe_serialization=False)
    assert not (tmp_path / "b").exists()


def test_saving_a_model_whose_adapters_were_all_deleted_is_refused(tmp_path):
    model = trained()
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="no adapter"):
        model.save_pretrained(tmp_path)


def everything_trained(**fields):
    return trained(**{"bias": "all", "modules_to_save": ["head"], **fields})


def test_restoring_sets_the_same_parameters_so_that_an_optimizer_goes_on(tmp_path):
    model = everything_trained()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    want = output(model)
    model.save_pretrained(tmp_path)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    assert not torch.equal(output(model), want)
    model.restore_adapter(tmp_path)
    assert_same(output(model), want)
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in parameters]
    model(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(output(model), want)


def test_restoring_changes_no_other_adapter_and_takes_adapters_of_any_form():
    model, source = trained(), extract(randomize(trained(), seed=3))
    load_adapter(model, extract(model), "b")
    want, other = output(load_adapter(mlp(), source)), output(model)
    for form in (source, source.to_interop()):
        randomize(model, "b", seed=8)
        model.restore_adapter(form, "b")
        model.set_adapter("b")
        assert_same(output(model), want)
        model.set_adapter("default")
        assert_same(output(model), other)


OTHER_KINDS = {
    "r": (r"r: 3 is attached, 2 is saved", {"r": 2}),
    "alpha": (r"randlora_alpha: 3 is attached, 6 is saved", {"randlora_alpha": 6}),
    "layers": (r"layers: \['down'\] are in one of them only", {"targets": ["up"]}),
    "seed": (r"bases: they are not the same \(another seed, sparsity or recipe\)", {"projection_prng_key": 1}),
    "sparsity": (r"bases: they are not the same", {"sparse": True}),
    "modules": (r"trained modules and biases: \['base_model\.model\.head\.bias'", {"modules_to_save": ["head"]}),
    "biases": (r"trained modules and biases: \['base_model\.model\.up\.base_layer\.bias'\]", {"bias": "randlora_only"}),
}


@pytest.mark.parametrize("difference", OTHER_KINDS)
def test_an_adapter_of_another_kind_is_not_restored_and_what_differs_is_listed(difference, tmp_path):
    message, fields = OTHER_KINDS[difference]
    other = get_peft_model(mlp(), config(**{"targets": ["up", "down"], **fields}))
    other.save_pretrained(tmp_path)
    model = trained()
    want = output(model)
    with pytest.raises(ValueError, match=rf"(?s)adapter 'default' cannot be set to the saved values:.*{message}"):
        model.restore_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"adapter 'b' is not attached: the model has \['default'\]\."):
        model.restore_adapter(tmp_path, "b")
    assert_same(output(model), want)


@pytest.mark.parametrize("labels", [1, 5])
def test_trained_modules_of_another_shape_are_not_restored(labels):
    other = mlp()
    other.head = nn.Linear(6, labels)
    other = randomize(get_peft_model(other, config(["up", "down"], modules_to_save=["head"])), seed=4)
    model = trained(modules_to_save=["head"])
    want = output(model)
    with pytest.raises(ValueError, match=r"cannot be set to the saved values"):
        model.restore_adapter(extract(other))
    assert_same(output(model), want)


def test_a_merged_adapter_is_not_restored():
    model = trained()
    model.merge_adapter(keep_base=False)
    with pytest.raises(ValueError, match="unmerge"):
        model.restore_adapter(extract(randomize(trained(), seed=3)))


def test_a_loaded_adapter_may_ask_for_little_memory():
    model = load_adapter(mlp(), extract(trained()), low_cpu_mem_usage=True)
    assert_same(output(model), output(trained()))
    model.load_adapter(extract(randomize(trained(), seed=3)), "b", low_cpu_mem_usage=True, is_trainable=True)
    assert {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad} == {"b"}


def test_low_cpu_mem_usage_leaves_the_factors_on_the_meta_device():
    model = get_peft_model(mlp(), config(["up"]), low_cpu_mem_usage=True)
    model.add_adapter("b", config(["down"]), low_cpu_mem_usage=True)
    kinds = {name: parameter.device.type for name, parameter in model.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == "meta"} == {name for name in kinds if "randlora_" in name}


def test_factors_left_on_the_meta_device_are_filled_by_restoring(tmp_path):
    source = trained()
    source.save_pretrained(tmp_path)
    model = get_peft_model(mlp(), config(["up", "down"]), low_cpu_mem_usage=True)
    model.restore_adapter(tmp_path)
    assert_same(output(model), output(source))
    assert all(part.requires_grad for _, layer in layers_of(model) for part in layer.factors("default"))
