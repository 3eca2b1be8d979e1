"""AdaLoRA's config. Its adapters: test_adalora_adapter.py; its files: test_adalora_files.py."""

import dataclasses
import json
import re
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import adalora_configs, configs

from interop import AdaLoraConfig, RandLoraConfig
from interop.fields import AdapterConfig

PEFT_DEFAULTS = {
    "target_r": 8,
    "init_r": 12,
    "tinit": 0,
    "tfinal": 0,
    "deltaT": 1,
    "beta1": 0.85,
    "beta2": 0.85,
    "orth_reg_weight": 0.5,
    "total_step": 10,  # PEFT has None, and refuses it
    "rank_pattern": None,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "init_lora_weights": True,
    "r": 8,
    "target_modules": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "task_type": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": False,
    "auto_mapping": None,
    "peft_version": None,
    "peft_type": "ADALORA",
}
# What PEFT 0.21.2 writes besides: LoRA's fields, here with their defaults.
LORA_FIELDS = {
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config")),
    **dict.fromkeys(("layer_replication", "lora_ga_config", "megatron_config", "monteclora_config", "use_bdlora")),
    **dict.fromkeys(("target_parameters", "trainable_token_indices", "velora_config")),
    **dict.fromkeys(("ensure_weight_tying", "lora_bias", "use_dora", "use_qalora", "use_rslora"), False),
    "alpha_pattern": {},
    "loftq_config": {},
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}

INTS = ("r", "init_r", "target_r", "tinit", "tfinal", "deltaT")
PATTERN_RULE = r"is not the name of a lora_E with a list of True or False\."
WRONG_TYPES = [
    *[({name: 4.0}, rf"{name}=4\.0: must be an int\.") for name in INTS],
    ({"init_r": True}, r"init_r=True: must be an int\."),
    ({"tinit": None}, r"tinit=None: must be an int\."),
    ({"total_step": 10.0}, r"total_step=10\.0: must be an int\."),
    ({"total_step": "10"}, r"total_step='10': must be an int\."),
    ({"total_step": True}, r"total_step=True: must be an int\."),
    ({"init_lora_weights": 1}, r"init_lora_weights=1: must be True or False\."),
    ({"init_lora_weights": None}, r"init_lora_weights=None: must be True or False\."),
    ({"fan_in_fan_out": 1}, r"fan_in_fan_out=1: must be True or False\."),
    ({"inference_mode": 0}, r"inference_mode=0: must be True or False\."),
    ({"target_modules": 3}, r"target_modules=3: must be None, a string or a list of non-empty strings\."),
    ({"rank_pattern": [True]}, r"rank_pattern=\[True\]: must be None or a dict of lists of True and False\."),
    ({"rank_pattern": "x.lora_E"}, r"rank_pattern='x\.lora_E': must be None or a dict"),
    ({"rank_pattern": {"x": [True] * 12}}, rf"rank_pattern: 'x': \[True, .* {PATTERN_RULE}"),
    ({"rank_pattern": {"x.lora_A": [True] * 12}}, rf"rank_pattern: 'x\.lora_A': .* {PATTERN_RULE}"),
    ({"rank_pattern": {"lora_E": [True] * 12}}, rf"rank_pattern: 'lora_E': .* {PATTERN_RULE}"),
    ({"rank_pattern": {"x.lora_E.a.b": [True] * 12}}, rf"rank_pattern: 'x\.lora_E\.a\.b': .* {PATTERN_RULE}"),
    ({"rank_pattern": {3: [True] * 12}}, rf"rank_pattern: 3: .* {PATTERN_RULE}"),
    ({"rank_pattern": {"x.lora_E": [1] * 12}}, rf"rank_pattern: 'x\.lora_E': \[1, .* {PATTERN_RULE}"),
    ({"rank_pattern": {"x.lora_E": "yes"}}, rf"rank_pattern: 'x\.lora_E': 'yes' {PATTERN_RULE}"),
    ({"rank_pattern": {"x.lora_E": 4}}, rf"rank_pattern: 'x\.lora_E': 4 {PATTERN_RULE}"),
    ({"rank_pattern": {"x.lora_E": None}}, rf"rank_pattern: 'x\.lora_E': None {PATTERN_RULE}"),
    ({"rank_pattern": {"x.lora_E": np.ones((12, 1), bool)}}, PATTERN_RULE),
    ({"rank_pattern": {"x.lora_E": np.bool_(True)}}, PATTERN_RULE),
]

DROPOUT_RULE = r"must be a probability in \[0, 1\); 0 switches dropout off\."
ALPHA_RULE = r"must be above 0; the update is scaled by lora_alpha / init_r\."
ORTHOGONAL_RULE = r"must be at least 0; 0 switches the regularization off\."
NAN = float("nan")
WRONG_VALUES = [
    *[({name: 0}, rf"{name}=0: must be at least 1\.") for name in ("init_r", "target_r", "deltaT", "total_step")],
    *[({name: -1}, rf"{name}=-1: must be at least 0\.") for name in ("tinit", "tfinal")],
    *[
        ({name: value}, rf"{name}={value}: must lie between 0 and 1\.")
        for name in ("beta1", "beta2")
        for value in (0, 1, 1.5, -0.5, NAN, None, True)
    ],
    *[({"orth_reg_weight": value}, f"orth_reg_weight={value!r}: {ORTHOGONAL_RULE}") for value in (-0.1, NAN, "0.5")],
    *[
        ({"lora_alpha": value}, f"lora_alpha={value!r}: {ALPHA_RULE}")
        for value in (0, -1, NAN, float("inf"), "8", None)
    ],
    *[({"lora_dropout": value}, f"lora_dropout={value!r}: {DROPOUT_RULE}") for value in (1, -0.1, NAN, "0")],
    ({"bias": "randlora_only"}, r"bias='randlora_only': must be one of \('none', 'all', 'lora_only'\)\."),
    ({"target_modules": []}, r"target_modules=\(\): is empty, so nothing would be adapted"),
    (
        {"rank_pattern": {"x.lora_E": [True] * 11}},
        r"rank_pattern=.*: the entry for 'x\.lora_E' has 11 triplets, not init_r=12",
    ),
    ({"rank_pattern": {"x.lora_E": []}}, r"the entry for 'x\.lora_E' has 0 triplets, not init_r=12\."),
    (
        {"rank_pattern": {"x.lora_E": [True] * 12, "x.lora_E.default": [False] * 12}},
        r"rank_pattern: 'x\.lora_E\.default' is one of two entries for 'x\.lora_E'\. Keep one of them\.",
    ),
]

NO_SCHEDULE = [
    ({"total_step": None}, r"total_step=None: set it to the number of optimizer steps of the training\."),
    ({"target_r": 12}, r"target_r=12: must be below init_r=12: ranks only fall\. Lower it, or raise init_r\."),
    ({"target_r": 13}, r"target_r=13: must be below init_r=12"),
    (
        {"tinit": 4, "tfinal": 6},
        r"total_step=10: tinit=4 and tfinal=6 leave no step in which ranks could fall\. Raise total_step, or lower",
    ),
    ({"tinit": 10}, r"total_step=10: tinit=10 and tfinal=0 leave no step"),
    ({"tfinal": 11}, r"total_step=10: tinit=0 and tfinal=11 leave no step"),
]

UNSUPPORTED = {
    "use_dora": True,
    "loftq_config": {"loftq_bits": 4},
    "layer_replication": [[0, 2], [1, 3]],
    "target_parameters": ["experts.down_proj"],
    "trainable_token_indices": [1, 2],
}


def config(**fields):
    return AdaLoraConfig(**{"total_step": 10, **fields})


def test_defaults_and_field_names_are_those_of_peft():
    assert config().to_dict() == PEFT_DEFAULTS
    assert AdaLoraConfig(inference_mode=True).total_step is None


@pytest.mark.parametrize(("fields", "message"), WRONG_TYPES, ids=lambda value: str(value)[:40])
def test_a_wrong_type_is_named_at_construction(fields, message):
    with pytest.raises(TypeError, match=message):
        config(**fields)


@pytest.mark.parametrize(("fields", "message"), WRONG_VALUES, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_a_wrong_value_is_refused_with_the_rule(fields, message, inference_mode):
    with pytest.raises(ValueError, match=message):
        config(**fields, inference_mode=inference_mode)


@pytest.mark.parametrize(("fields", "message"), NO_SCHEDULE, ids=str)
def test_a_schedule_in_which_ranks_cannot_fall_is_refused_for_training_and_accepted_for_inference(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)
    frozen = config(**fields, inference_mode=True)
    with pytest.raises(ValueError, match=message):
        frozen.require_schedule()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(frozen, inference_mode=False)


def test_one_step_in_which_ranks_fall_is_enough():
    assert config(tinit=4, tfinal=5, target_r=11).last_allocation == 5


def test_the_last_allocation_needs_to_know_the_length_of_the_training():
    assert config(tfinal=3).last_allocation == 7
    with pytest.raises(ValueError, match=r"total_step=None: set it to the number of optimizer steps"):
        _ = AdaLoraConfig(inference_mode=True).last_allocation


def test_lora_s_r_has_no_meaning_and_says_so_where_it_is_set():
    message = r"r=4 has no meaning in AdaLoRA: set init_r\. r=8 silences this\."
    with pytest.warns(UserWarning, match=message) as caught:
        AdaLoraConfig(r=4, total_step=10)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config(r=4, inference_mode=True).r == 4
        assert config(r=8) == config()


def test_numbers_of_numpy_become_python_s():
    numbers = {name: np.int64(3) for name in ("target_r", "tinit", "tfinal", "deltaT")}
    floats = {name: np.float32(0.5) for name in ("beta1", "beta2", "orth_reg_weight", "lora_alpha", "lora_dropout")}
    found = AdaLoraConfig(**numbers, **floats, total_step=np.int64(99), init_r=np.int32(4))
    assert {type(getattr(found, name)) for name in (*numbers, "total_step", "init_r")} == {int}
    assert {type(getattr(found, name)) for name in floats} == {float}
    assert AdaLoraConfig.from_dict(json.loads(found.to_json())) == found


@pytest.mark.parametrize("make", [list, tuple, np.array, lambda mask: [np.bool_(kept) for kept in mask]])
@pytest.mark.parametrize("name", ["", ".default", ".größe"])
def test_a_rank_pattern_loses_its_adapter_s_name_and_becomes_tuples(make, name):
    mask = (True, False, True)
    found = config(init_r=3, target_r=1, rank_pattern={f"a.lora_E.b.lora_E{name}": make(mask)})
    assert found.rank_pattern == {"a.lora_E.b.lora_E": mask}
    assert {type(kept) for kept in found.rank_pattern["a.lora_E.b.lora_E"]} == {bool}
    assert found.to_dict()["rank_pattern"] == {"a.lora_E.b.lora_E": [True, False, True]}


def test_an_empty_rank_pattern_is_none():
    assert config(rank_pattern={}) == config(rank_pattern=None) == config()
    assert config(rank_pattern={}).to_dict()["rank_pattern"] is None


def test_reading_a_rank_pattern_leaves_the_given_dict_alone():
    pattern = {"x.lora_E.default": [True] * 12}
    config(rank_pattern=pattern)
    assert pattern == {"x.lora_E.default": [True] * 12}


@given(drawn=adalora_configs())
def test_json_and_back_is_the_same_config(drawn):
    fields = json.loads(drawn.to_json())
    assert fields["peft_type"] == "ADALORA"
    for kind in (AdaLoraConfig, AdapterConfig):
        back = kind.from_dict(fields)
        assert type(back) is AdaLoraConfig
        assert back == drawn
        assert hash(back) == hash(drawn)
        assert back.to_json() == drawn.to_json()


@given(drawn=configs() | adalora_configs())
def test_the_peft_type_says_which_config_it_is(drawn):
    assert AdapterConfig.from_dict(drawn.to_dict()) == drawn


def test_without_a_peft_type_the_config_is_of_the_class_that_reads_it():
    fields = {"total_step": 10}
    assert AdaLoraConfig.from_dict(fields) == config()
    assert type(AdapterConfig.from_dict({})) is RandLoraConfig


@pytest.mark.parametrize("peft_type", ["LORA", "RANDLORA", None, "adalora"])
def test_another_kind_of_adapter_is_refused_by_name(peft_type):
    message = rf"peft_type={peft_type!r} is not an AdaLoRA adapter: only 'ADALORA' can be read here\."
    with pytest.raises(ValueError, match=message):
        AdaLoraConfig.from_dict({"total_step": 10, "peft_type": peft_type})


def test_what_lora_has_besides_is_kept_and_written_back():
    fields = {**PEFT_DEFAULTS, **LORA_FIELDS, "zeta": [1, None]}
    found = AdaLoraConfig.from_dict(fields)
    assert found.unknown_fields == {**LORA_FIELDS, "zeta": [1, None]}
    assert found.to_dict() == fields
    assert dataclasses.replace(found, init_r=13).to_dict()["zeta"] == [1, None]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_field_of_lora_that_adapts_something_else_is_refused(name):
    value = UNSUPPORTED[name]
    fields = {**PEFT_DEFAULTS, **LORA_FIELDS, name: value}
    message = re.escape(f"{name}={value!r} is not supported with AdaLoRA. Leave it out.")
    with pytest.raises(ValueError, match=f"^{message}$"):
        AdaLoraConfig.from_dict(fields)


def test_the_exclusions_are_written_as_peft_knows_them():
    assert config(exclude_modules={"b", "a"}).to_dict()["exclude_modules"] == ["a", "b"]


def test_a_config_is_frozen_and_hashable_with_dicts_inside():
    fields = {"rank_pattern": {"x.lora_E": [True] * 12}, "unknown_fields": {"b": []}}
    assert {config(**fields): 1}[config(**fields)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().init_r = 3


@pytest.mark.parametrize(("init_r", "alpha"), [(12, 8), (1, 1), (3, 0.5)])
def test_scaling_is_alpha_over_the_initial_rank_whatever_is_left(init_r, alpha):
    found = config(init_r=init_r, lora_alpha=alpha, inference_mode=True)
    assert found.scaling == alpha / (init_r + 1e-5)
    assert found.with_kept({"x": [False] * init_r}).scaling == found.scaling
    assert config(lora_dropout=0.25).dropout == 0.25


def test_what_is_kept_is_all_unless_the_pattern_says_otherwise():
    found = config(init_r=4, target_r=1, rank_pattern={"a.b.lora_E": [True, False, False, True]})
    assert found.kept("a.b") == (True, False, False, True)
    assert (found.rank("a.b"), found.rank("b"), config().rank("b")) == (2, 4, 12)
    assert found.kept("b") == (True,) * 4


@given(data=st.data(), init_r=st.sampled_from([1, 3]), names=st.sets(st.sampled_from("abc"), min_size=1))
def test_with_kept_is_read_back_by_kept(data, init_r, names):
    mask = st.lists(st.booleans(), min_size=init_r, max_size=init_r)
    kept = {name: data.draw(mask) for name in sorted(names)}
    before = config(init_r=init_r, inference_mode=True)
    after = before.with_kept({name: np.array(mask) for name, mask in kept.items()})
    assert {name: list(after.kept(name)) for name in kept} == kept
    assert (after.rank_pattern is None) == all(all(mask) for mask in kept.values())
    assert after.with_kept({name: [True] * init_r for name in kept}) == before


def test_with_kept_refuses_a_mask_of_another_length():
    with pytest.raises(ValueError, match=r"the entry for 'x\.lora_E' has 3 triplets, not init_r=12\."):
        config().with_kept({"x": [True, True, False]})
