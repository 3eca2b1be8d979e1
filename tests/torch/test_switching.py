"""Which adapters of a model are in force: added, switched, trained or frozen, disabled and deleted, by PEFT's names."""

import pytest
import torch
from stacks import without_type_checks

from interop import RandLoraConfig
from randlora_torch import Linear, extract, get_peft_model, load_adapter
from tests.torch.conftest import (
    X,
    assert_close,
    assert_same,
    config,
    layers_of,
    mlp,
    output,
    randomize,
    trained,
)

SECOND = {  # what PEFT gets wrong for a second adapter: its bases, its rank, its size
    "sparse": {"sparse": True},
    "smaller r": {"r": 2},
    "larger r": {"r": 5},
    "another seed": {"projection_prng_key": 7},
    "fewer targets": {"targets": ["head"]},
}


@pytest.mark.parametrize("difference", SECOND)
def test_a_second_adapter_neither_disturbs_the_first_nor_differs_from_being_alone(difference, tmp_path):
    first, second = (
        trained(),
        randomize(get_peft_model(mlp(), config(**{"targets": ["up", "down"], **SECOND[difference]})), seed=1),
    )
    want_first, want_second = output(first), output(second)
    second.save_pretrained(tmp_path)
    model = load_adapter(first, tmp_path, "second")
    assert_same(output(model), want_first)
    model.set_adapter("second")
    assert_same(output(model), want_second)
    model.set_adapter("default")
    assert_same(output(model), want_first)
    model.save_pretrained(tmp_path / "both")
    assert_same(output(load_adapter(mlp(), tmp_path / "both" / "second")), want_second)
    assert_same(output(load_adapter(mlp(), tmp_path / "both")), want_first)


def test_a_second_new_adapter_becomes_the_active_one_and_starts_at_no_update():
    model = trained()
    get_peft_model(model, config(["up", "head"], r=2), "second")
    assert_same(output(model), output(mlp()))
    assert list(model.randlora_adapters) == ["default", "second"]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{layer}.randlora_{part}.second" for layer in ("up", "head") for part in ("lambda", "gamma")}


def test_active_adapters_add_up_and_set_adapter_says_which_of_them_train():
    model = load_adapter(trained(), extract(trained(r=2, sparse=True)), "b")
    assert {layer.active_adapters[0] for _, layer in layers_of(model)} == {"default"}
    model.set_adapter(["default", "b"])
    plain = mlp()
    for name, layer in layers_of(model):
        for adapter in ("default", "b"):
            plain.get_submodule(name).weight.data += layer.get_delta_weight(adapter).detach()
    assert_close(output(model), output(plain))
    assert {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad} == {"default", "b"}
    model.set_adapter("b")
    assert {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad} == {"b"}
    with pytest.raises(ValueError, match=r"adapter 'c' is not attached: the model has \['default', 'b'\]\."):
        model.set_adapter(["b", "c"])
    assert model.up.active_adapters == ["b"]


def test_a_later_adapter_stays_inactive_also_on_layers_that_the_first_does_not_adapt():
    model, base = mlp(), mlp()
    x = torch.randn(3, model.up.in_features)
    get_peft_model(model, RandLoraConfig(r=4, target_modules=["up"]))
    other = get_peft_model(mlp(), RandLoraConfig(r=4, target_modules=["down"], init_weights=False))
    load_adapter(model, extract(other), "second")
    torch.testing.assert_close(model(x), base(x))
    model.set_adapter("second")
    torch.testing.assert_close(model(x), other(x))


def two(**fields):
    """A model with the adapters "default" and "b", both with random values; "default" is active."""
    model = trained()
    model.add_adapter("b", config(["up", "head"], r=2, sparse=True, **fields))
    return randomize(model, "b", seed=1)


def training(model):
    """Names of the adapters whose factors train."""
    return {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}


def test_an_added_adapter_waits_frozen_whatever_the_order_of_its_arguments():
    model = trained()
    want = output(model)
    model.add_adapter("b", config(["head"]))
    with without_type_checks():
        model.add_adapter(config(["up"], r=2), "c")
    assert list(model.peft_config) == ["default", "b", "c"]
    assert [fields.r for fields in model.peft_config.values()] == [3, 3, 2]
    assert model.peft_config["c"].target_modules == ("up",)
    assert model.active_adapters == ["default"]
    assert training(model) == {"default"}
    assert_same(output(randomize(randomize(model, "b"), "c")), want)
    with pytest.raises(ValueError, match=r"adapter_name='b' is taken: the model has \['default', 'b', 'c'\]\."):
        model.add_adapter("b", config(["up"]))


def test_active_adapters_are_named_in_the_order_they_were_set():
    model = two()
    assert (model.active_adapter, model.active_adapters) == ("default", ["default"])
    model.set_adapter(["b", "default", "b"])
    assert (model.active_adapter, model.active_adapters) == ("b", ["b", "default"])
    model.active_adapters.clear()  # a copy
    assert model.active_adapters == ["b", "default"]
    model.set_adapter([])
    assert (model.active_adapter, model.active_adapters) == (None, [])
    assert training(model) == set()
    assert_same(output(model), output(mlp()))


def test_set_adapter_for_inference_activates_and_freezes():
    model = two()
    model.set_adapter("b")
    want = output(model)
    assert training(model) == {"b"}
    model.set_adapter("b", inference_mode=True)
    assert training(model) == set()
    assert_same(output(model), want)


def test_training_is_switched_adapter_by_adapter_whether_active_or_not():
    model = two()
    model.set_requires_grad("b")
    assert training(model) == {"default", "b"}
    assert model.active_adapters == ["default"]
    model.set_requires_grad(["default", "b"], False)
    assert training(model) == set()
    model.set_requires_grad("default", requires_grad=True)
    assert training(model) == {"default"}
    with pytest.raises(ValueError, match=r"adapter 'c' is not attached: the model has \['default', 'b'\]\."):
        model.set_requires_grad("c")


@pytest.mark.parametrize(
    ("off", "on"), [("disable_adapter_layers", "enable_adapter_layers"), ("disable_adapters", "enable_adapters")]
)
def test_disabled_adapters_stay_off_until_they_are_enabled(off, on):
    model = two()
    want, base = output(model), output(mlp())
    getattr(model, off)()
    assert_same(output(model), base)
    model.set_adapter("b")
    assert_same(output(model), base)
    randomize(get_peft_model(model, config(["down"]), "c"), "c")
    assert_same(output(model), base)
    with model.disable_adapter():
        assert_same(output(model), base)
    assert_same(output(model), base)
    model.set_adapter("default")
    getattr(model, on)()
    assert_same(output(model), want)


def test_a_deleted_adapter_is_gone_and_its_layers_without_adapters_are_plain_again():
    model, head = two(), mlp().head
    model.set_adapter("b")
    want = output(load_adapter(mlp(), extract(model, "default")))
    model.delete_adapter("b")
    assert list(model.peft_config) == list(model.randlora_A) == list(model.randlora_B) == ["default"]
    assert type(model.head) is type(head)
    assert_same(model.head.weight, head.weight)
    assert model.active_adapters == ["default"]
    assert_same(output(model), want)
    assert not any("randlora_lambda.b" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match=r"adapter 'b' is not attached: the model has \['default'\]\."):
        model.delete_adapter("b")
    model.add_adapter("b", config(["up"]))
    model.set_adapter("b")
    assert_same(output(model), output(mlp()))


def test_the_last_adapter_can_be_deleted_and_another_attached():
    model = trained()
    model.delete_adapter("default")
    assert not any(isinstance(module, Linear) for module in model.modules())
    assert (model.active_adapter, model.active_adapters, model.peft_config) == (None, [], {})
    assert_same(output(model), output(mlp()))
    load_adapter(model, extract(trained()), "again")
    assert_same(output(model), output(trained()))


def test_a_merged_adapter_is_not_deleted():
    model = two()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapter 'default' is merged into the base weights: unmerge_adapter\(\) fir"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"adapter 'default' is merged into the base weight: unmerge first\."):
        model.up.delete_adapter("default")
    model.delete_adapter("b")
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert_same(output(model), output(mlp()))


def test_an_adapter_that_becomes_active_by_a_deletion_trains_as_in_peft():
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(mlp(), peft.RandLoraConfig(r=3, target_modules=["up"]))
    theirs.add_adapter("b", peft.RandLoraConfig(r=3, target_modules=["up"]))
    theirs.delete_adapter("default")
    ours = trained()
    ours.add_adapter("b", config(["up"]))
    ours.delete_adapter("default")
    assert ours.active_adapters == ["b"]
    assert training(ours) == {name.rsplit(".", 1)[1] for name, p in theirs.named_parameters() if p.requires_grad}


def test_equal_bases_are_one_tensor_that_lives_as_long_as_one_of_its_adapters():
    model = trained()
    load_adapter(model, extract(randomize(trained(), seed=4)), "b")
    model.add_adapter("c", config(["up", "down"], projection_prng_key=1))
    for held in (model.randlora_A, model.randlora_B):
        assert held["b"] is held["default"]
        assert held["c"] is not held["default"]
    each = sum(basis.nbytes for basis in (model.randlora_A["c"], model.randlora_B["c"]))
    assert model.randlora_A.nbytes + model.randlora_B.nbytes == 2 * each
    model.set_adapter("b")
    want = output(model)
    model.delete_adapter("default")
    assert_same(output(model), want)
    model.delete_adapter("c")
    assert model.randlora_A.nbytes + model.randlora_B.nbytes == sum(
        held.stored("b").nbytes for held in (model.randlora_A, model.randlora_B)
    )


def test_only_the_adapter_that_is_active_gets_gradients():
    model = two()
    model.set_adapter("b")
    model(X).square().sum().backward()
    for name in ("default", "b"):
        for _, layer in layers_of(model, name):
            assert all((part.grad is None) == (name == "default") for part in layer.factors(name))


def test_an_adapter_trained_in_company_is_the_one_trained_alone():
    def train(model):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
        return extract(model, "b").to_interop().factors

    alone = get_peft_model(mlp(), config(["up", "head"], r=2, sparse=True), "b")
    company = two()
    company.delete_adapter("b")
    get_peft_model(company, config(["up", "head"], r=2, sparse=True), "b")
    want, got = train(alone), train(company)
    assert want.keys() == got.keys()
    for name in want:
        assert all((part == other).all() for part, other in zip(got[name], want[name], strict=True))


def test_a_new_adapter_that_cannot_become_active_is_not_attached():
    model = trained()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters \['default'\] are merged into the base weights"):
        get_peft_model(model, config(["head"]), "b")
    assert list(model.peft_config) == ["default"]
    assert not isinstance(model.head, Linear)


def test_switching_while_disabled_leaves_only_what_is_active_applied():
    model = two()
    model.merge_adapter()
    with model.disable_adapter():
        model.set_adapter("b")
    want = two()
    want.set_adapter("b")
    assert_close(output(model), output(want))


def test_an_adapter_without_biases_of_its_own_computes_with_those_of_the_base():
    model = trained(bias="all", modules_to_save=["head"])
    alone = randomize(get_peft_model(mlp(), config(["up"], r=2), "b"), "b")
    load_adapter(model, extract(alone), "b")
    model.set_adapter("b")
    assert_same(output(model), output(alone))
    model.set_adapter(["b", "default"])
    both = output(model)
    model.set_adapter(["default", "b"])
    assert_close(output(model), both)
