"""AdaLoRA's folders: laws, strictness, the command line and `convert`. By real PEFT: tests/cross.

What folders of all methods share (atomic saves, notes, damaged files) is in test_files.py.
"""

import dataclasses
import hashlib
import json
import os
import re
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from strategies import KEPT, LAYERS, SHAPES, draw_adalora, draw_adapter

from interop import RECIPES, AdapterFormatError, convert, load, save
from interop.cli import main
from interop.folder import CONFIG_NAME, WEIGHTS_NAME
from tests.interop.folders import both_files, digest_of, edit_config, rewrite, same_arrays, weights

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


@pytest.fixture
def folder(tmp_path):
    """An adapter that lost some triplets of one layer and all of another."""
    save(draw_adalora(kept=KEPT), tmp_path / "adapter")
    return tmp_path / "adapter"


@given(
    seed=st.integers(0, 2**16),
    shape=st.sampled_from(SHAPES),
    masks=st.none() | st.tuples(*[st.lists(st.booleans(), min_size=4, max_size=4)] * 2),
    dtype=st.sampled_from(DTYPES),
)
def test_load_is_the_exact_inverse_of_save(tmp_path_factory, seed, shape, masks, dtype):
    folder = tmp_path_factory.mktemp("adapter")
    kept = masks and dict(zip(("a", "b.c"), masks, strict=True))
    adapter = draw_adalora(seed, shapes={"a": shape, "b.c": (16, 16)}, kept=kept, dtype=dtype)
    save(adapter, folder)
    back = load(folder)
    same_arrays(back.factors, adapter.factors)
    assert (back.bases, back.recipe, back.shapes) == (None, None, adapter.shapes)
    assert back.config == dataclasses.replace(adapter.config, inference_mode=True)
    first = both_files(folder)
    save(back, folder)
    assert both_files(folder) == first


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_weights_come_back_under_their_keys(tmp_path, dtype):
    saved = {
        "base_model.model.block.0.up.base_layer.bias": np.ones(12, dtype),
        "base_model.model.head.weight": np.arange(6).reshape(2, 3).astype(dtype),
    }
    adapter = draw_adalora(kept=KEPT, modules_to_save=["head"], bias="lora_only")
    save(dataclasses.replace(adapter, saved_weights=saved), tmp_path)
    back = load(tmp_path)
    same_arrays({"x": [*back.saved_weights.values()]}, {"x": [*saved.values()]})
    assert back.saved_weights.keys() == saved.keys()
    same_arrays(back.factors, adapter.factors)


def test_saving_does_not_change_its_input(tmp_path):
    adapter = draw_adalora(kept=KEPT)
    before = [part.tobytes() for parts in adapter.factors.values() for part in parts]
    config, shapes = adapter.config, dict(adapter.shapes)
    save(adapter, tmp_path)
    assert [part.tobytes() for parts in adapter.factors.values() for part in parts] == before
    assert (adapter.config, adapter.shapes, adapter.saved_weights) == (config, shapes, {})
    assert adapter.config.inference_mode is False


def test_the_file_holds_pefts_keys_pefts_pattern_and_no_bases(folder):
    tensors, metadata = weights(folder)
    ranks = {"block.0.up": 2, "block.0.down": 0, "block.1.mix": 4}
    assert {key: value.shape for key, value in tensors.items()} == {
        f"base_model.model.{name}.{part}": shape
        for name, (out, inp) in LAYERS.items()
        for part, shape in [
            ("lora_A", (ranks[name], inp)),
            ("lora_E", (ranks[name], 1)),
            ("lora_B", (out, ranks[name])),
        ]
    }
    assert metadata["format"] == "pt"
    assert json.loads(metadata["randlora"]) == {
        "format_version": 1,
        "recipe": None,
        "bases_sha256": None,
        "max_dim": None,
        "min_dim": None,
        "shapes": {name: list(shape) for name, shape in LAYERS.items()},
        "config_sha256": hashlib.sha256((folder / CONFIG_NAME).read_bytes()).hexdigest(),
        "tensors_sha256": digest_of(tensors),
    }
    fields = json.loads((folder / CONFIG_NAME).read_text())
    assert (fields["peft_type"], fields["inference_mode"]) == ("ADALORA", True)
    assert fields["rank_pattern"] == {f"{name}.lora_E": list(mask) for name, mask in KEPT.items()}
    assert sorted(os.listdir(folder)) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]


def test_a_file_without_our_notes_gives_the_same_adapter(folder):
    ours = load(folder)
    save_file(weights(folder)[0], folder / WEIGHTS_NAME, {"format": "pt"})
    back = load(folder)
    same_arrays(back.factors, ours.factors)
    assert back.shapes == ours.shapes == LAYERS


def test_reading_for_inference_warns_of_nothing(folder):
    edit_config(folder, r=64, total_step=None, target_r=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(folder).config.r == 64


def test_a_config_that_does_not_say_what_it_is_for_is_read_for_inference(folder):
    fields = json.loads((folder / CONFIG_NAME).read_text())
    del fields["inference_mode"], fields["total_step"]
    (folder / CONFIG_NAME).write_text(json.dumps(fields))
    assert load(folder).config.inference_mode is True


UP = "base_model.model.block.0.up"
DOWN = "base_model.model.block.0.down"
ONES = np.ones((2, 2), np.float32)
LEFT_OVER = r"left over; no tensor of AdaLoRA, nor named by bias or modules_to_save"
CHANGES = {
    **{
        f"{part} missing": (
            {"drop": [f"{UP}.{part}"]},
            rf"is not a complete AdaLoRA adapter:\n  - {re.escape(f'{UP}.{part}')}: missing$",
        )
        for part in ("lora_A", "lora_E", "lora_B")
    },
    "a layer missing": (
        {"drop": [f"{UP}.lora_{part}" for part in "AEB"]},
        r"\['block\.0\.up'\] have factors or a shape, but not both",
    ),
    "left over": ({"add": {"base_model.model.head.weight": ONES}}, rf"head\.weight: {LEFT_OVER}"),
    "ranknum": ({"add": {f"{UP}.ranknum": ONES[0]}}, rf"up\.ranknum: {LEFT_OVER}"),
    "of LoRA": ({"add": {f"{UP}.lora_A.weight": ONES}}, rf"up\.lora_A\.weight: {LEFT_OVER}"),
    "of a named adapter": ({"add": {f"{UP}.lora_E.default": ONES}}, rf"up\.lora_E\.default: {LEFT_OVER}"),
    "of RandLoRA": ({"add": {f"{UP}.randlora_lambda": ONES}}, rf"up\.randlora_lambda: {LEFT_OVER}"),
    "bases": ({"add": {"base_model.randlora_A": ONES}}, rf"base_model\.randlora_A: {LEFT_OVER}"),
    "of no module": (
        {"add": {"base_model.lora_E": ONES}},
        r"base_model\.lora_E: left over; lora_A and lora_E and lora_B belong to a module",
    ),
    "float64": (
        {"add": {f"{UP}.lora_A": np.ones((2, 6))}},
        r"block\.0\.up\.A is float64: store it as float32, bfloat16 or float16",
    ),
    "not pruned": (
        {"add": {f"{DOWN}.lora_E": np.ones((4, 1), np.float32)}},
        r"block\.0\.down: lora_A \(0, 12\), lora_E \(4, 1\) and lora_B \(6, 0\) do not fit 0 triplets",
    ),
    "another layer": (
        {"add": {f"{UP}.lora_B": np.ones((13, 2), np.float32)}},
        r"block\.0\.up: lora_A \(2, 6\) and lora_B \(13, 2\) do not fit a layer of shape \(12, 6\)",
    ),
    "other shape": (
        {"notes": {"shapes": {**LAYERS, "block.0.down": [6, 13]}}},
        r"block\.0\.down: lora_A \(0, 12\) and lora_B \(6, 0\) do not fit a layer of shape \(6, 13\)",
    ),
    "recipe": ({"notes": {"recipe": RECIPES[0]}}, r"an AdaLoRA adapter has no bases and no recipe"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_file_is_refused_and_says_what_is_wrong(folder, case):
    change, message = CHANGES[case]
    rewrite(folder, **change)
    with pytest.raises(AdapterFormatError, match=message) as caught:
        load(folder)
    assert str(folder / WEIGHTS_NAME) in str(caught.value)


CONTRADICTIONS = {
    "no pattern": ({"rank_pattern": None}, r"block\.0\.up: lora_A \(2, 6\), .* do not fit 4 triplets"),
    "another rank": (
        {"rank_pattern": {f"{name}.lora_E": [True, False, False, False] for name in LAYERS}},
        r"block\.0\.down: lora_A \(0, 12\), .* do not fit 1 triplets .*\n  - block\.0\.up: .*\n  - block\.1\.mix: ",
    ),
    "a layer more": (
        {"rank_pattern": {f"{name}.lora_E": list(mask) for name, mask in {**KEPT, "head": [False] * 4}.items()}},
        r"rank_pattern names \['head\.lora_E'\], which are not adapted",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_pattern_that_the_tensors_contradict_is_refused(folder, case):
    fields, message = CONTRADICTIONS[case]
    edit_config(folder, **fields)
    with pytest.raises(AdapterFormatError, match=message):
        load(folder)


BAD_CONFIGS = {
    "masks of another length": (
        {"init_r": 5},
        r"the entry for 'block\.0\.down\.lora_E' has 4 triplets, not init_r=5\.",
    ),
    "pattern of numbers": ({"rank_pattern": {"block.0.up": 2}}, r"rank_pattern: 'block\.0\.up': 2 is not the name of"),
    "DoRA": ({"use_dora": True}, r"use_dora=True is not supported with AdaLoRA\. Leave it out\."),
    "no schedule to train by": ({"inference_mode": False, "total_step": None}, r"total_step=None: set it to"),
    "LoRA": ({"peft_type": "LORA"}, r"peft_type='LORA' is not a RandLoRA or AdaLoRA adapter"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_is_refused_by_file_and_reason(folder, case):
    fields, message = BAD_CONFIGS[case]
    edit_config(folder, **fields)
    with pytest.raises(AdapterFormatError, match=rf"adapter_config\.json is not a valid config .*{message}"):
        load(folder)


def test_the_tensors_of_one_method_are_not_read_with_the_config_of_the_other(folder, tmp_path):
    save(draw_adapter(), tmp_path / "randlora")
    configs = {path: (path / CONFIG_NAME).read_bytes() for path in (folder, tmp_path / "randlora")}
    (folder / CONFIG_NAME).write_bytes(configs[tmp_path / "randlora"])
    (tmp_path / "randlora" / CONFIG_NAME).write_bytes(configs[folder])
    with pytest.raises(AdapterFormatError, match=r"(?s)is not a complete RandLoRA adapter:.*down\.lora_A: left over"):
        load(folder)
    message = r"(?s)is not a complete AdaLoRA adapter:.*randlora_gamma: left over.*base_model\.randlora_A: left over"
    with pytest.raises(AdapterFormatError, match=message):
        load(tmp_path / "randlora")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_argument_has_nothing_to_say_about_adalora(folder, recipe):
    message = rf"it is an AdaLoRA adapter and has no bases for recipe={recipe!r}\. Drop the argument\."
    with pytest.raises(AdapterFormatError, match=rf"adapter_model\.safetensors: {message}$"):
        load(folder, recipe=recipe)


@pytest.mark.parametrize("fields", [{"target_modules": name} for name in ("all-linear", "All-Linear")], ids=str)
@pytest.mark.parametrize("excluded", [None, ["head"]])
def test_the_file_names_the_adapted_layers_where_peft_might_choose_others(tmp_path, fields, excluded):
    adapter = draw_adalora(kept=KEPT, exclude_modules=excluded, layers_to_transform=[0], **fields)
    save(adapter, tmp_path)
    written = load(tmp_path).config
    assert written.target_modules == tuple(sorted(LAYERS))
    assert (written.exclude_modules, written.layers_to_transform) == (None, None)
    assert written.rank_pattern == adapter.config.rank_pattern


def test_names_and_regular_expressions_are_written_as_they_are(tmp_path):
    for targets in (("up", "down", "mix"), r"block\..*"):
        save(draw_adalora(target_modules=targets), tmp_path)
        assert load(tmp_path).config.target_modules == targets


def test_unknown_config_keys_survive_load_and_save(folder):
    edit_config(folder, new_in_peft={"a": [1]}, use_dora=False, loftq_config={})
    save(load(folder), folder)
    fields = json.loads((folder / CONFIG_NAME).read_text())
    assert (fields["new_in_peft"], fields["use_dora"], fields["loftq_config"]) == ({"a": [1]}, False, {})


def test_an_adapter_replaces_one_of_the_other_method(folder):
    save(draw_adapter(), folder)
    assert load(folder).config.METHOD == "RandLoRA"
    save(draw_adalora(kept=KEPT), folder)
    same_arrays(load(folder).factors, draw_adalora(kept=KEPT).factors)


def test_module_names_of_any_characters_survive(tmp_path):
    names = {"größe.0": (4, 6), "a b": (6, 4), "x.lora_E.y": (4, 4)}
    kept = {name: [True, False, True, False] for name in names}
    save(draw_adalora(shapes=names, kept=kept), tmp_path)
    back = load(tmp_path)
    assert back.modules == tuple(sorted(names))
    assert {back.config.kept(name) for name in names} == {(True, False, True, False)}


def test_inspect_prints_the_rank_and_count_of_every_module(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    facts = {line.split()[0]: line.split()[1] for line in out.splitlines() if not line.startswith("  ")}
    assert facts == {
        "method": "AdaLoRA",
        "base_model": "None",
        "adapters": "['default']",
        "tensors_sha256": digest_of(weights(folder)[0]),
        "init_r": "4",
        "target_r": "2",
        "lora_alpha": "8",
        "tinit": "1",
        "tfinal": "2",
        "total_step": "10",
        "pruned": "True",
        "trainable_parameters": "106",
        "trainable_bytes": "424",
        "other_tensors": "[]",
        "modules": "3",
    }
    rows = [line.split() for line in out.splitlines() if line.startswith("  ")]
    assert rows == [
        ["block.0.down", "6x12", "rank", "0", "0", "float32"],
        ["block.0.up", "12x6", "rank", "2", "38", "float32"],
        ["block.1.mix", "8x8", "rank", "4", "68", "float32"],
    ]


def test_inspect_as_json_holds_the_same_facts(folder, capsys):
    assert main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["modules"]["block.0.up"] == {"shape": [12, 6], "rank": 2, "parameters": 38, "dtype": "float32"}
    assert facts["trainable_parameters"] == load(folder).num_trainable
    assert (facts["method"], facts["init_r"], facts["pruned"]) == ("AdaLoRA", 4, True)


def test_inspect_tells_an_adapter_that_lost_nothing(tmp_path, capsys):
    save(draw_adalora(dtype=ml_dtypes.bfloat16), tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["pruned"] is False
    assert {module["rank"] for module in facts["modules"].values()} == {4}
    assert {module["dtype"] for module in facts["modules"].values()} == {"bfloat16"}


def test_the_command_convert_rewrites_a_folder_to_the_same_bytes(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "again")]) == 0
    size = (folder / WEIGHTS_NAME).stat().st_size
    assert capsys.readouterr().out == f"wrote {tmp_path / 'again'}: 3 layers, {size:,d} bytes\n"
    assert both_files(tmp_path / "again") == both_files(folder)


def test_a_recipe_on_the_command_line_is_refused_in_one_line(folder, capsys):
    assert main(["inspect", str(folder), "--recipe", RECIPES[0]]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("Drop the argument.\n")


def test_convert_takes_a_folder_or_an_adapter_to_peft(folder):
    adapter = load(folder)
    assert convert(adapter, to="peft") is adapter
    same_arrays(convert(str(folder), to="peft").factors, adapter.factors)
    same_arrays(convert(folder, to="peft").factors, adapter.factors)
