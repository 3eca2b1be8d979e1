import dataclasses
import json

import pytest
from hypothesis import given
from strategies import EDGE_SEEDS, configs

from interop import RandLoraConfig

PEFT_DEFAULTS = {
    "r": 32,
    "randlora_alpha": 640,
    "target_modules": None,
    "projection_prng_key": 0,
    "save_projection": True,
    "sparse": False,
    "very_sparse": False,
    "randlora_dropout": 0.0,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "init_weights": True,
    "layers_to_transform": None,
    "layers_pattern": None,
    "task_type": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": False,
    "auto_mapping": None,
    "peft_version": None,
    "peft_type": "RANDLORA",
}

WRONG_TYPES = [
    ({"r": 4.0}, r"r=4\.0: must be an int\."),
    ({"r": True}, r"r=True: must be an int\."),
    ({"r": "4"}, r"r='4': must be an int\."),
    ({"projection_prng_key": 1.0}, r"projection_prng_key=1\.0: must be an int\."),
    ({"projection_prng_key": False}, r"projection_prng_key=False: must be an int\."),
    ({"projection_prng_key": None}, r"projection_prng_key=None: must be an int\."),
    *[
        ({name: 1}, rf"{name}=1: must be True or False\.")
        for name in ("save_projection", "sparse", "very_sparse", "fan_in_fan_out", "init_weights", "inference_mode")
    ],
    ({"target_modules": 3}, r"target_modules=3: must be None, a string or a list of non-empty strings\."),
    ({"target_modules": [1]}, r"target_modules=\(1,\): must be None, a string or a list of non-empty strings\."),
    ({"target_modules": ["q", ""]}, r"target_modules=\('q', ''\): must be .* list of non-empty strings\."),
    ({"exclude_modules": {"a": 1}}, r"exclude_modules=\{'a': 1\}: must be None, a string or a list"),
    ({"layers_pattern": 7}, r"layers_pattern=7: must be None, a string or a list"),
    ({"modules_to_save": "head"}, r"modules_to_save='head': must be None or a list of module names\."),
    ({"modules_to_save": [None]}, r"modules_to_save=\(None,\): must be None or a list of module names\."),
    ({"layers_to_transform": "0"}, r"layers_to_transform='0': must be None, an int or a list of ints\."),
    ({"layers_to_transform": [0, "1"]}, r"layers_to_transform=\(0, '1'\): must be None, an int or a list of ints\."),
    ({"layers_to_transform": True}, r"layers_to_transform=True: must be None, an int or a list of ints\."),
]

SEED_RULE = (
    r"must lie in -9223372036854775808\.\.18446744073709551615 \(int64 or uint64\), as torch's generator demands"
)
ALPHA_RULE = r"must be a finite number; the update is scaled by randlora_alpha / r \(PEFT's default is 640\)\."
DROPOUT_RULE = r"must be a probability in \[0, 1\); 0 switches dropout off\."
WRONG_VALUES = [
    ({"r": 0}, r"r=0: must be at least 1\. A smaller r trains more parameters; try 32\."),
    ({"r": -1}, r"r=-1: must be at least 1\."),
    ({"projection_prng_key": 2**64}, rf"projection_prng_key=18446744073709551616: {SEED_RULE}"),
    ({"projection_prng_key": -(2**63) - 1}, rf"projection_prng_key=-9223372036854775809: {SEED_RULE}"),
    ({"randlora_alpha": float("nan")}, f"randlora_alpha=nan: {ALPHA_RULE}"),
    ({"randlora_alpha": float("inf")}, f"randlora_alpha=inf: {ALPHA_RULE}"),
    ({"randlora_alpha": "640"}, f"randlora_alpha='640': {ALPHA_RULE}"),
    ({"randlora_alpha": True}, f"randlora_alpha=True: {ALPHA_RULE}"),
    ({"randlora_alpha": None}, f"randlora_alpha=None: {ALPHA_RULE}"),
    ({"randlora_alpha": 10**400}, ALPHA_RULE),
    ({"randlora_dropout": 1}, rf"randlora_dropout=1: {DROPOUT_RULE}"),
    ({"randlora_dropout": -0.1}, rf"randlora_dropout=-0\.1: {DROPOUT_RULE}"),
    ({"randlora_dropout": float("nan")}, rf"randlora_dropout=nan: {DROPOUT_RULE}"),
    ({"bias": "lora_only"}, r"bias='lora_only': must be one of \('none', 'all', 'randlora_only'\)\."),
    ({"bias": None}, r"bias=None: must be one of \('none', 'all', 'randlora_only'\)\."),
    ({"target_modules": []}, r"target_modules=\(\): is empty, so nothing would be adapted\. .* use 'all-linear'"),
    ({"target_modules": ""}, r"target_modules='': is empty, so nothing would be adapted"),
]


def test_defaults_and_field_names_are_those_of_peft():
    assert RandLoraConfig().to_dict() == PEFT_DEFAULTS


@pytest.mark.parametrize(("fields", "message"), WRONG_TYPES, ids=lambda value: str(value)[:40])
def test_a_wrong_type_is_named_at_construction(fields, message):
    with pytest.raises(TypeError, match=message):
        RandLoraConfig(**fields)


@pytest.mark.parametrize(("fields", "message"), WRONG_VALUES, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_named_with_its_rule_and_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        RandLoraConfig(**fields)


@pytest.mark.parametrize("seed", EDGE_SEEDS)
def test_every_int64_and_uint64_is_a_seed(seed):
    assert RandLoraConfig(projection_prng_key=seed).to_dict()["projection_prng_key"] == seed


def test_positional_fields_and_misspelled_fields_are_refused():
    with pytest.raises(TypeError, match="positional"):
        RandLoraConfig(4)
    with pytest.raises(TypeError, match="lora_alpha"):
        RandLoraConfig(lora_alpha=4)


@given(config=configs())
def test_json_and_back_is_the_same_config(config):
    back = RandLoraConfig.from_dict(json.loads(config.to_json()))
    assert back == config
    assert hash(back) == hash(config)
    assert back.to_json() == config.to_json()


def test_json_has_sorted_keys_two_spaces_and_lists_as_peft_writes_it():
    text = RandLoraConfig(target_modules=("b", "a"), layers_to_transform=(1, 0)).to_json()
    fields = json.loads(text)
    assert text == json.dumps(fields, indent=2, sort_keys=True)
    assert fields["target_modules"] == ["b", "a"]
    assert fields["layers_to_transform"] == [1, 0]
    assert fields["peft_type"] == "RANDLORA"


def test_exclude_modules_is_written_only_if_set_because_peft_does_not_know_it():
    assert "exclude_modules" not in RandLoraConfig().to_dict()
    assert RandLoraConfig(exclude_modules=["head"]).to_dict()["exclude_modules"] == ["head"]


def test_keys_of_a_newer_peft_are_kept_and_written_back():
    fields = {"r": 4, "peft_type": "RANDLORA", "use_new_thing": {"deep": [1, None]}, "zeta": "x"}
    config = RandLoraConfig.from_dict(fields)
    assert config.unknown_fields == {"use_new_thing": {"deep": [1, None]}, "zeta": "x"}
    assert config.to_dict() == {**PEFT_DEFAULTS, **fields}
    assert dataclasses.replace(config, r=8).to_dict()["zeta"] == "x"


def test_reading_a_config_leaves_the_given_dict_alone():
    fields = {"r": 4, "peft_type": "RANDLORA", "target_modules": ["q"], "zeta": [1]}
    before = json.dumps(fields)
    RandLoraConfig.from_dict(fields)
    assert json.dumps(fields) == before


@pytest.mark.parametrize("peft_type", ["LORA", "ADALORA", None, "randlora"])
def test_another_kind_of_adapter_is_refused_by_name(peft_type):
    with pytest.raises(ValueError, match=rf"peft_type={peft_type!r} is not a RandLoRA adapter: only 'RANDLORA' can be"):
        RandLoraConfig.from_dict({"peft_type": peft_type})


def test_lists_become_tuples_and_sets_are_sorted_so_that_equal_sets_give_equal_files():
    config = RandLoraConfig(target_modules={"v", "q", "k"}, modules_to_save=["b", "a"], layers_to_transform={3, 1})
    assert config.target_modules == ("k", "q", "v")
    assert config.modules_to_save == ("b", "a")
    assert config.layers_to_transform == (1, 3)
    assert RandLoraConfig(exclude_modules=frozenset("ba")).exclude_modules == ("a", "b")


def test_a_config_is_frozen_and_hashable_with_dicts_inside():
    config = RandLoraConfig(auto_mapping={"a": 1}, unknown_fields={"b": []})
    assert {config: 1}[RandLoraConfig(auto_mapping={"a": 1}, unknown_fields={"b": []})] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3


@pytest.mark.parametrize(("r", "alpha", "scaling"), [(32, 640, 20.0), (4, 640, 160.0), (3, 1, 1 / 3), (5, -2.5, -0.5)])
def test_scaling_is_alpha_over_r(r, alpha, scaling):
    assert RandLoraConfig(r=r, randlora_alpha=alpha).scaling == scaling


def test_a_config_is_written_to_a_folder_and_read_back(tmp_path):
    config = RandLoraConfig(r=3, target_modules=["a", "b"], sparse=True, unknown_fields={"later": 1})
    config.save_pretrained(tmp_path / "new")
    assert RandLoraConfig.from_pretrained(tmp_path / "new") == config
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        RandLoraConfig.from_pretrained(tmp_path)
