"""Adapters taken out of PEFT's models: what its file would hold, also where PEFT's own saving goes wrong."""

import copy
import warnings

import numpy as np
import peft
import pytest
import torch
from torch import nn

import interop
import randlora_torch
from interop import AdapterFormatError, convert

SHAPES = {"up": (20, 12), "down": (12, 20), "mix": (12, 12)}
SCHEDULE = {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 2, "total_step": 8}


class Net(nn.Module):
    """Three layers of different orientation, a normalization with a bias and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.mix = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.norm(self.mix(self.down(torch.tanh(self.up(x))))))


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of save_projection=False and of a second adapter
        yield


def config(**fields):
    return peft.RandLoraConfig(**{"r": 5, "randlora_alpha": 5, "target_modules": list(SHAPES), **fields})


def adalora_config(**fields):
    return peft.AdaLoraConfig(**{**SCHEDULE, "target_modules": list(SHAPES), **fields})


def randomized(model):
    """Every trainable number and every factor moved away from its start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.normal_()
    return model


def trained(config, **options):
    return randomized(peft.get_peft_model(Net(), config, **options))


def bits(array):
    return array.dtype, array.shape, array.tobytes()


def assert_same(got, want):
    """All that is in an adapter, but for the order of the targets, which PEFT keeps as a set."""
    configs = [adapter.config.to_dict() for adapter in (got, want)]
    targets = [set(fields.pop("target_modules")) for fields in configs]
    assert (configs[0], targets[0]) == (configs[1], targets[1])
    assert (got.modules, got.shapes, got.recipe) == (want.modules, want.shapes, want.recipe)
    for name in got.modules:
        assert [*map(bits, got.factors[name])] == [*map(bits, want.factors[name])], name
    held = [{key: bits(value) for key, value in adapter.saved_weights.items()} for adapter in (got, want)]
    assert held[0] == held[1]
    assert (got.bases is None) == (want.bases is None)
    if got.bases is not None:
        assert interop.bases_digest(got.bases) == interop.bases_digest(want.bases)


KINDS = [
    {"very_sparse": True},
    {"save_projection": False, "projection_prng_key": -17},
    {"bias": "all"},
    {"bias": "randlora_only", "modules_to_save": ["head"], "save_projection": False},
]


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_a_model_gives_what_its_file_holds_with_our_layers_as_well(tmp_path, fields):
    model = trained(config(**fields))
    model.save_pretrained(tmp_path)
    recipe = None if fields.get("save_projection", True) else interop.DEFAULT_RECIPE
    want = interop.load(tmp_path, recipe=recipe).bind(SHAPES)
    got = convert(model, to="peft")
    assert_same(got, want)
    assert_same(convert(randlora_torch.accelerate_peft(model), to="peft"), want)


def test_further_training_does_not_change_what_was_converted():
    model = trained(config())
    adapter, extracted = convert(model, to="peft"), randlora_torch.extract(model)
    before = bits(adapter.factors["up"].lam)
    randomized(model)
    assert bits(adapter.factors["up"].lam) == bits(extracted.factors["up"].lam.numpy()) == before
    assert bits(convert(model, to="peft").factors["up"].lam) != before


@pytest.mark.parametrize("inside", ["the tuner", "the base model"])
@pytest.mark.parametrize("make", [config, adalora_config])
def test_the_parts_of_a_peft_model_give_the_same_adapter(make, inside):
    model = trained(make(task_type="FEATURE_EXTRACTION"))
    part = {"the tuner": model.base_model, "the base model": model.get_base_model()}[inside]
    assert_same(convert(part, to="peft"), convert(model, to="peft"))


def test_a_compiled_model_gives_the_same_adapter():
    model = trained(config())
    assert_same(convert(torch.compile(model), to="peft"), convert(model, to="peft"))


@pytest.mark.parametrize("model", [None, "accelerated"])
def test_of_several_adapters_one_must_be_named(model):
    adapted = trained(config())
    adapted = adapted if model is None else randlora_torch.accelerate_peft(adapted)
    adapted.add_adapter("b", config(target_modules=["mix"]))
    randomized(adapted)
    with pytest.raises(ValueError, match=r"the model has the adapters \['default', 'b'\]: pass adapter_name to say"):
        convert(adapted, to="jax")
    with pytest.raises(ValueError, match=r"adapter 'c' is not attached: the model has \['default', 'b'\]\."):
        convert(adapted, to="jax", adapter_name="c")
    assert convert(adapted, to="peft", adapter_name="default").modules == ("down", "mix", "up")
    other = convert(adapted, to="peft", adapter_name="b")
    live = adapted.base_model.model.mix.randlora_lambda["b"].detach().numpy()
    assert bits(other.factors["mix"].lam) == bits(live)
    assert other.modules == ("mix",)


def outputs(model, x):
    with torch.no_grad():
        return model.eval()(x)


def test_bases_that_peft_made_larger_for_an_earlier_adapter_are_cut_to_size(tmp_path):
    """PEFT itself saves them whole, and cannot load what it saved (R7)."""
    model = trained(config())
    model.add_adapter("b", config(target_modules=["mix"]))
    randomized(model).set_adapter("b")
    adapter = convert(model, to="peft", adapter_name="b")
    assert (adapter.bases.A.shape, adapter.bases.B.shape) == ((5, 1, 12), (12, 3, 5))
    assert adapter.recipe is None
    interop.save(adapter, tmp_path)
    x = torch.randn(4, 12)
    alone = peft.PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(outputs(alone, x), outputs(model, x))
    assert (outputs(alone, x) - outputs(Net(), x)).abs().max() > 0.01


def test_bases_that_peft_took_from_an_earlier_adapter_are_those_that_count(tmp_path):
    """A sparse adapter beside a dense one computes with dense bases (R6); without them, its file would be another's."""
    model = trained(config())
    model.add_adapter("b", config(sparse=True))
    adapter = convert(randomized(model), to="peft", adapter_name="b")
    assert adapter.recipe is None
    assert len(np.unique(adapter.bases.A)) > 3
    first = convert(model, to="peft", adapter_name="default")
    assert interop.bases_digest(adapter.bases) == interop.bases_digest(first.bases)
    model.set_adapter("b")
    interop.save(adapter, tmp_path)
    x = torch.randn(4, 12)
    torch.testing.assert_close(outputs(peft.PeftModel.from_pretrained(Net(), tmp_path), x), outputs(model, x))


def test_an_adapter_that_peft_cannot_compute_with_is_refused():
    """Of another r than the first one, whose bases it was given (R8)."""
    model = trained(config())
    model.add_adapter("b", config(r=2))
    with pytest.raises(AdapterFormatError, match=r"(?s)'b' of the PeftModel: the adapter is inconsistent.* r=2"):
        convert(model, to="peft", adapter_name="b")


@pytest.mark.parametrize("name", ["up", "mix", "lora_E", "lora_A"])
def test_an_adapter_may_be_called_as_a_part_of_the_model_is(name):
    """PEFT looks for names of adapters anywhere in keys, and cannot save such models (A6)."""
    pattern = {"up.lora_E": [True, False, False, True]}
    for make, fields in ((config, {}), (adalora_config, {"rank_pattern": pattern})):
        model = peft.get_peft_model(Net(), make(**fields, bias="all"), adapter_name=name)
        model.add_adapter("default", make(inference_mode=True))
        adapter = convert(randomized(model), to="peft", adapter_name=name)
        assert adapter.modules == ("down", "mix", "up")
        assert len(adapter.saved_weights) == 5
        assert adapter.config.bias == "all"
        if fields:
            assert [adapter.config.rank(module) for module in adapter.modules] == [4, 4, 2]


def test_an_adapter_in_training_gives_the_triplets_that_peft_would_save_and_stays_as_it_is(tmp_path):
    model = peft.get_peft_model(Net(), adalora_config())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, y = torch.randn(16, 12), torch.randint(3, (16,))
    for step in range(1, 6):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    before = copy.deepcopy(model.peft_config["default"]), {k: v.clone() for k, v in model.state_dict().items()}
    adapter = convert(model, to="peft")
    assert model.peft_config["default"] == before[0]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[1][key], rtol=0, atol=0)
    assert 3 <= sum(len(factors.E) for factors in adapter.factors.values()) < 12
    model.save_pretrained(tmp_path)
    assert_same(adapter, interop.load(tmp_path))


def test_a_convolution_of_adalora_counts_as_a_matrix():
    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, (2, 3))

    model = randomized(peft.get_peft_model(Image(), adalora_config(target_modules=["conv"])))
    adapter = convert(model, to="peft")
    assert adapter.shapes == {"conv": (5, 18)}
    moved = randlora_torch.load_adapter(Image(), adapter)
    assert_same(convert(moved, to="peft"), adapter)


def test_what_is_not_of_these_methods_is_refused_by_name():
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["mix"]))
    with pytest.raises(ValueError, match=r"peft_type=.*LORA.* is not a RandLoRA or AdaLoRA adapter"):
        convert(model, to="peft")


def test_a_tensor_of_an_adapter_that_is_none_of_its_method_is_not_dropped():
    model = trained(adalora_config())
    model.base_model.model.up.lora_embedding_A["default"] = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(AdapterFormatError, match=r"model\.up\.lora_embedding_A: left over; no tensor of AdaLoRA"):
        convert(model, to="peft")


def test_a_missing_tensor_is_not_made_up():
    model = trained(config())
    del model.base_model.model.up.randlora_gamma["default"]
    with pytest.raises(AdapterFormatError, match=r"base_model\.model\.up\.randlora_gamma: missing"):
        convert(model, to="peft")


def test_layers_with_different_bases_are_refused():
    model = trained(config())
    layer = model.base_model.model.up
    layer.randlora_A = copy.deepcopy(layer.randlora_A)
    layer.randlora_A["default"] += 1
    with pytest.raises(AdapterFormatError, match=r"randlora_A: differs from another copy of basis A"):
        convert(model, to="peft")


def test_an_adapter_without_values_is_refused():
    model = peft.get_peft_model(Net(), adalora_config(), low_cpu_mem_usage=True)
    with pytest.raises(AdapterFormatError, match=r"lora_A is on the meta device and has no values: load the adapter"):
        convert(model, to="peft")


@pytest.mark.parametrize("arguments", [{"state_dict": {}}, {"with_embeddings": True}], ids=str)
def test_what_extract_can_only_do_with_models_of_ours_is_refused(arguments):
    with pytest.raises(ValueError, match=r"state_dict and with_embeddings are not for PEFT's models: leave them out"):
        randlora_torch.extract(trained(config()), **arguments)


class OnlyLinears(nn.Module):
    def __init__(self, layer, wrapped):
        super().__init__()
        self.layer = layer
        self.is_loaded_in_4bit = wrapped


def test_adapters_that_peft_nested_are_both_there_under_the_names_of_the_model():
    """As it does by adding a second one to a quantized layer (R3); its own file then names a layer that is none."""
    bnb = pytest.importorskip("bitsandbytes")
    base = OnlyLinears(bnb.nn.Linear4bit(64, 32, bias=True), True)
    base.layer.to("cpu")
    model = peft.get_peft_model(base, config(target_modules=["layer"], bias="randlora_only"))
    model.add_adapter("b", config(target_modules=["layer"]))
    randomized(model)
    outer = model.base_model.model.layer
    assert hasattr(outer.base_layer, "randlora_lambda")
    for name, layer in (("default", outer.base_layer), ("b", outer)):
        adapter = convert(model, to="peft", adapter_name=name)
        assert adapter.shapes == {"layer": (32, 64)}
        assert bits(adapter.factors["layer"].lam) == bits(layer.randlora_lambda[name].detach().numpy())
        assert [*adapter.saved_weights] == ["base_model.model.layer.base_layer.bias"] * (name == "default")
