"""Reading and writing the adapter folder. Files by real PEFT: tests/cross/test_files_against_peft.py."""

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
from safetensors.numpy import load_file, save_file
from strategies import LAYERS, SHAPES, draw_adapter

from interop import (
    RECIPES,
    AdapterFormatError,
    Bases,
    Factors,
    RandLoraConfig,
    bases_digest,
    load,
    make_bases,
    save,
)
from interop.folder import CONFIG_NAME, WEIGHTS_NAME
from tests.interop.folders import both_files, digest_of, edit_config, rewrite, same_arrays, weights

KINDS = ({}, {"sparse": True}, {"very_sparse": True})


def as_by_peft(folder, *, canonical, per_layer):
    """Turn a folder of ours into one by PEFT: its metadata, and the bases once, in every layer, in both or nowhere."""
    tensors, _ = weights(folder)
    bases = {part: tensors.pop(f"base_model.randlora_{part}").astype(np.float32) for part in "AB"}
    if canonical:
        tensors |= {f"base_model.randlora_{part}": value for part, value in bases.items()}
    if per_layer:
        tensors |= {f"base_model.model.{name}.randlora_{part}": bases[part] for name in LAYERS for part in "AB"}
    save_file(tensors, folder / WEIGHTS_NAME, {"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    save(draw_adapter(), tmp_path / "adapter")
    return tmp_path / "adapter"


@given(
    seed=st.integers(0, 2**16),
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(KINDS),
    recipe=st.sampled_from(RECIPES),
    keep=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_load_is_the_exact_inverse_of_save(tmp_path_factory, seed, shape, kind, recipe, keep, dtype):
    folder = tmp_path_factory.mktemp("adapter")
    adapter = draw_adapter(seed, shapes={"a": shape, "b.c": (16, 16)}, recipe=recipe, save_projection=keep, **kind)
    factors = {name: Factors(*(part.astype(dtype) for part in pair)) for name, pair in adapter.factors.items()}
    adapter = dataclasses.replace(adapter, factors=factors)
    save(adapter, folder)
    back = load(folder)
    same_arrays(back.factors, adapter.factors)
    same_arrays({"bases": back.bases}, {"bases": adapter.bases})
    assert back.shapes == adapter.shapes
    assert back.recipe == recipe
    assert back.config == dataclasses.replace(adapter.config, inference_mode=True)
    first = both_files(folder)
    save(back, folder)
    assert both_files(folder) == first


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_saved_weights_come_back_under_their_keys(tmp_path, dtype):
    saved = {
        "base_model.model.head.weight": np.arange(6).reshape(2, 3).astype(dtype),
        "base_model.model.norm.bias": np.ones(3, dtype),
    }
    adapter = dataclasses.replace(draw_adapter(modules_to_save=["head"], bias="all"), saved_weights=saved)
    save(adapter, tmp_path)
    same_arrays({"x": [*load(tmp_path).saved_weights.values()]}, {"x": [*saved.values()]})
    assert load(tmp_path).saved_weights.keys() == saved.keys()


def test_saving_does_not_change_its_input(tmp_path):
    adapter = draw_adapter()
    before = [part.tobytes() for pair in (*adapter.factors.values(), adapter.bases) for part in pair]
    config, shapes = adapter.config, dict(adapter.shapes)
    save(adapter, tmp_path)
    assert [part.tobytes() for pair in (*adapter.factors.values(), adapter.bases) for part in pair] == before
    assert (adapter.config, adapter.shapes, adapter.saved_weights) == (config, shapes, {})
    assert adapter.config.inference_mode is False


def test_the_same_adapter_gives_the_same_bytes_in_every_folder(tmp_path):
    save(draw_adapter(3), tmp_path / "one")
    backwards = draw_adapter(3)
    backwards = dataclasses.replace(backwards, factors=dict(reversed(backwards.factors.items())))
    save(backwards, tmp_path / "deep" / "two")
    assert both_files(tmp_path / "one") == both_files(tmp_path / "deep" / "two")
    assert sorted(os.listdir(tmp_path / "one")) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]


def test_the_file_holds_pefts_keys_one_copy_of_the_bases_and_pt_metadata(folder):
    tensors, metadata = weights(folder)
    layers = {f"base_model.model.{name}.randlora_{part}" for name in LAYERS for part in ("lambda", "gamma")}
    assert set(tensors) == layers | {"base_model.randlora_A", "base_model.randlora_B"}
    assert metadata["format"] == "pt"
    assert set(metadata) == {"format", "randlora", "randlora_sha256"}
    assert metadata["randlora_sha256"] == hashlib.sha256(metadata["randlora"].encode()).hexdigest()
    adapter = draw_adapter()
    assert json.loads(metadata["randlora"]) == {
        "format_version": 1,
        "recipe": "torch>=2.12",
        "bases_sha256": bases_digest(adapter.bases),
        "max_dim": 12,
        "min_dim": 12,
        "shapes": {name: list(shape) for name, shape in LAYERS.items()},
        "config_sha256": hashlib.sha256((folder / CONFIG_NAME).read_bytes()).hexdigest(),
        "tensors_sha256": digest_of({key: tensors[key] for key in layers}),
    }
    header = (folder / WEIGHTS_NAME).read_bytes()[8:]
    assert header.startswith(b'{"__metadata__":{"format":"pt","randlora":"{')
    assert json.loads((folder / CONFIG_NAME).read_text())["inference_mode"] is True


def test_without_save_projection_the_file_holds_only_lambda_and_gamma(tmp_path):
    save(draw_adapter(save_projection=False), tmp_path)
    assert {key.rsplit("_", 1)[1] for key in weights(tmp_path)[0]} == {"lambda", "gamma"}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS, ids=["dense", "sparse", "very_sparse"])
def test_bases_that_were_left_out_are_rebuilt_by_the_recorded_recipe(tmp_path, recipe, kind):
    adapter = draw_adapter(recipe=recipe, save_projection=False, projection_prng_key=2**40 + 3, **kind)
    save(adapter, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = load(tmp_path)
    same_arrays({"bases": back.bases}, {"bases": adapter.bases})
    assert back.recipe == recipe


@pytest.mark.parametrize("field", [{"projection_prng_key": 1}, {"sparse": True}])
def test_an_edited_seed_is_found_by_the_hash_of_the_rebuilt_bases(tmp_path, field):
    save(draw_adapter(save_projection=False), tmp_path)
    edit_config(tmp_path, **field)
    message = (
        r"SHA-256 [0-9a-f]{64}, the file was written with [0-9a-f]{64}\. The seed or r in adapter_config\.json was"
    )
    with pytest.raises(AdapterFormatError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("key", ["base_model.randlora_A", "base_model.randlora_B"])
def test_a_flipped_byte_in_the_bases_is_found_by_their_hash(folder, key):
    path = folder / WEIGHTS_NAME
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    offsets = json.loads(content[8:start])[key]["data_offsets"]
    content[start + offsets[1] - 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        AdapterFormatError, match=r"adapter_model\.safetensors: the bases have SHA-256 .* was damaged or"
    ):
        load(folder)


@pytest.mark.parametrize("layout", ["both", "canonical", "per_layer"])
def test_every_layout_with_bases_gives_the_same_adapter(folder, layout):
    ours = load(folder)
    as_by_peft(folder, canonical=layout != "per_layer", per_layer=layout != "canonical")
    back = load(folder)
    same_arrays(back.factors, ours.factors)
    assert bases_digest(back.bases) == bases_digest(ours.bases)
    assert back.bases.A.dtype == back.bases.B.dtype == np.float32
    assert back.recipe == "torch>=2.12"
    assert back.shapes is None
    same_arrays({"x": [back.bind(LAYERS).delta_weight("block.0.up")]}, {"x": [ours.delta_weight("block.0.up")]})


def test_a_file_by_peft_without_bases_is_bound_to_a_model_and_warns_about_the_recipe(folder):
    ours = load(folder)
    as_by_peft(folder, canonical=False, per_layer=False)
    edit_config(folder, save_projection=False)
    message = (
        r"adapter_model\.safetensors neither holds its bases nor names their recipe: they will be rebuilt with"
        r" 'torch>=2\.12'\. .* under torch <= 2\.11 pass recipe='torch<=2\.11'; passing any recipe silences this\."
    )
    with pytest.warns(UserWarning, match=message) as caught:
        bare = load(folder)
    assert caught[0].filename == __file__
    assert (bare.bases, bare.recipe, bare.shapes) == (None, None, None)
    assert bases_digest(bare.bind(LAYERS).bases) == bases_digest(ours.bases)


@pytest.mark.parametrize("recipe", RECIPES)
def test_passing_a_recipe_silences_the_warning_and_is_used(folder, recipe):
    as_by_peft(folder, canonical=False, per_layer=False)
    edit_config(folder, save_projection=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound = load(folder, recipe=recipe).bind(LAYERS)
    assert bound.recipe == recipe
    assert bases_digest(bound.bases) == bases_digest(make_bases(bound.config, max_dim=12, min_dim=12, recipe=recipe))


@pytest.mark.parametrize("kind", KINDS[1:], ids=["sparse", "very_sparse"])
def test_ternary_bases_need_no_recipe_and_no_warning(tmp_path, kind):
    save(draw_adapter(**kind), tmp_path)
    want = load(tmp_path).bases
    as_by_peft(tmp_path, canonical=False, per_layer=False)
    edit_config(tmp_path, save_projection=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bases_digest(load(tmp_path).bind(LAYERS).bases) == bases_digest(want)


def test_bases_that_the_config_promises_must_be_in_the_file_unless_a_recipe_is_given(folder):
    as_by_peft(folder, canonical=False, per_layer=False)
    message = (
        r"adapter_config\.json says save_projection=True, but the file holds no bases \(base_model\.randlora_A and"
        r" base_model\.randlora_B are missing\)\. If they come from the seed, pass recipe= one of \['torch>=2\.12'"
    )
    with pytest.raises(AdapterFormatError, match=message):
        load(folder)
    assert load(folder, recipe="torch<=2.11").bind(LAYERS).recipe == "torch<=2.11"


def test_conflicting_copies_of_a_basis_are_listed(folder):
    as_by_peft(folder, canonical=True, per_layer=True)
    tensors, metadata = weights(folder)
    key = "base_model.model.block.1.mix.randlora_B"
    tensors[key][0, 0, 0] += 1
    save_file(tensors, folder / WEIGHTS_NAME, metadata)
    with pytest.raises(
        AdapterFormatError, match=rf"{re.escape(key)}: differs from another copy of basis B in the same"
    ):
        load(folder)


def test_copies_of_a_basis_that_differ_in_shape_or_dtype_conflict(folder):
    as_by_peft(folder, canonical=True, per_layer=False)
    A = weights(folder)[0]["base_model.randlora_A"]
    key = "base_model.model.block.1.mix.randlora_A"
    rewrite(folder, add={key: A.astype(np.float16)}, metadata={})
    with pytest.raises(AdapterFormatError, match="differs from another copy of basis A"):
        load(folder)
    rewrite(folder, add={key: A.reshape(1, *A.shape[::2])}, metadata={})
    with pytest.raises(AdapterFormatError, match="differs from another copy of basis A"):
        load(folder)


LAM = "base_model.model.block.0.up.randlora_lambda"
GAMMA = "base_model.model.block.0.up.randlora_gamma"
CHANGES = {
    "lambda missing": ({"drop": [LAM]}, rf"is not a complete RandLoRA adapter:\n  - {re.escape(LAM)}: missing$"),
    "gamma missing": ({"drop": [GAMMA]}, rf"{re.escape(GAMMA)}: missing"),
    "A missing": ({"drop": ["base_model.randlora_A"]}, r"base_model\.randlora_A: missing, the other basis is there"),
    "B missing": ({"drop": ["base_model.randlora_B"]}, r"base_model\.randlora_B: missing, the other basis is there"),
    "left over": (
        {"add": {"base_model.model.head.weight": np.ones(2, np.float32)}},
        r"base_model\.model\.head\.weight: left over; no tensor of RandLoRA, nor named by bias or modules_to_save",
    ),
    "lambda of no module": (
        {"add": {"base_model.randlora_lambda": np.ones((4, 2), np.float32)}},
        r"base_model\.randlora_lambda: left over; lambda and gamma belong to a module",
    ),
    "named adapter": ({"add": {LAM + ".default": np.ones((4, 2), np.float32)}}, r"randlora_lambda\.default: left over"),
    "lora": (
        {"add": {"base_model.model.q.lora_A.weight": np.ones(2, np.float32)}},
        r"lora_A\.weight: left over; no tensor of RandLoRA",
    ),
    "float64": (
        {"add": {LAM: np.ones((4, 2), np.float64)}},
        r"block\.0\.up\.lam is float64: store it as float32, bfloat16 or float16",
    ),
    "misshaped lambda": (
        {"add": {LAM: np.ones((4, 3), np.float32)}},
        r"safetensors: the adapter is inconsistent:\n  - block\.0\.up: lambda \(4, 3\) and gamma \(2, 6\)",
    ),
    "misshaped gamma": ({"add": {GAMMA: np.ones((2, 7), np.float32)}}, r"gamma \(2, 7\) does not fit a layer of shape"),
    "misshaped A": (
        {"add": {"base_model.randlora_A": np.ones((4, 1, 13), np.float32)}},
        r"bases A \(4, 1, 13\) and B \(12, 3, 4\) do not fit r=4: expected",
    ),
    "misshaped B": ({"add": {"base_model.randlora_B": np.ones((12, 3, 5), np.float32)}}, r"do not fit r=4: expected"),
    "shape of an unknown layer": ({"notes": {"shapes": {"x": [4, 4]}}}, r"have factors or a shape, but not both"),
    "other shape": (
        {"notes": {"shapes": {**LAYERS, "block.1.mix": [8, 9999]}}},
        r"block\.1\.mix: its long side 9999 exceeds that of the bases, 12",
    ),
    "unknown recipe": (
        {"notes": {"recipe": "torch>=9"}},
        r"made by the unknown recipe 'torch>=9'\. Upgrade randlora\.",
    ),
    "newer version": (
        {"notes": {"format_version": 2}},
        r"has format_version 2, this release reads up to 1: upgrade randlora\.",
    ),
    "no version": (
        {"metadata": {"randlora": "{}"}},
        r"metadata entry 'randlora' is malformed \(KeyError\('format_version",
    ),
    "version of a wrong type": (
        {"notes": {"format_version": "1"}},
        r"metadata entry 'randlora' is malformed \(TypeError",
    ),
    "no JSON": (
        {"metadata": {"randlora": "{"}},
        r"metadata entry 'randlora' is malformed \(JSONError\('is not valid JSON",
    ),
    "no object": (
        {"metadata": {"randlora": "[1]"}},
        r"metadata entry 'randlora' is malformed \(JSONError\('holds a JSON list",
    ),
    "no hash": (
        {"notes": {"bases_sha256": None}},
        r"the file was written with None\. The file was damaged or edited\.",
    ),
    "other hash": ({"notes": {"bases_sha256": "0" * 64}}, r"the file was written with 0{64}\. The file was damaged"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_file_is_refused_and_says_what_is_wrong(folder, case):
    change, message = CHANGES[case]
    rewrite(folder, **change)
    with pytest.raises(AdapterFormatError, match=message) as caught:
        load(folder)
    assert str(folder / WEIGHTS_NAME) in str(caught.value)


MALFORMED_NOTES = [
    {"shapes": {"block.0.up": 5}},
    {"shapes": {**LAYERS, "block.0.up": [12]}},
    {"shapes": {**LAYERS, "block.0.up": [12, 6, 1]}},
    {"shapes": {**LAYERS, "block.0.up": ["a", "b"]}},
    {"shapes": [1]},
    {"recipe": ["torch>=2.12"]},
    {"config_sha256": 5},
    {"tensors_sha256": 5},
    {"format_version": 0},
    {"format_version": True},
    {"shapes": {"block.0.up": [12, 2**24 + 1]}},
]


@pytest.mark.parametrize("notes", MALFORMED_NOTES, ids=str)
def test_metadata_of_a_wrong_type_is_malformed_not_a_crash(folder, notes):
    rewrite(folder, notes=notes)
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.safetensors"):
        load(folder)


@pytest.mark.parametrize("notes", [{"max_dim": "x"}, {"min_dim": -3}, {"max_dim": 4}, {"min_dim": [1]}], ids=str)
def test_metadata_that_sizes_the_bases_wrongly_is_malformed_not_a_crash(tmp_path, notes):
    save(draw_adapter(save_projection=False), tmp_path)
    rewrite(tmp_path, notes=notes)
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.safetensors"):
        load(tmp_path)


def test_all_findings_are_listed_and_a_long_list_is_cut(folder):
    rewrite(folder, drop=[LAM], add={f"extra{i}": np.ones(1, np.float32) for i in range(9)})
    with pytest.raises(AdapterFormatError) as caught:
        load(folder)
    lines = str(caught.value).split("\n")
    assert len(lines) == 1 + 8 + 1
    assert lines[-1] == "  - ... and 2 more"


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused_with_a_remedy(folder, cut):
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(
        AdapterFormatError, match=r"is not a valid safetensors file \(.*\)\. Copy or download it again\."
    ):
        load(folder)


CONFIG_TEXTS = {
    "no JSON": ("{", r"adapter_config\.json is not a valid config of an adapter: "),
    "no object": ("[]", r"is not a valid config of an adapter: holds a JSON list, not an object"),
    "null": ("null", r"holds a JSON NoneType, not an object"),
    "LoRA": (
        '{"peft_type": "LORA"}',
        r"peft_type='LORA' is not a RandLoRA or AdaLoRA adapter: only 'RANDLORA' and 'ADALORA' can be read here\.",
    ),
    "r=0": ('{"r": 0}', r"r=0: must be at least 1"),
    "r of a wrong type": ('{"r": "8"}', r"r='8': must be an int"),
    "huge alpha": ('{"randlora_alpha": 1' + 400 * "0" + "}", r"must be a finite number"),
    "not a number": ('{"randlora_alpha": NaN}', r"is not a valid config of an adapter: holds NaN, which is no JSON"),
    "deep": ("[" * 100_000, r"is not a valid config of an adapter"),
    "not UTF-8": (b"\xff\xfe{}", r"is not a valid config of an adapter: is not valid JSON \('utf-8' codec"),
}


@pytest.mark.parametrize("case", CONFIG_TEXTS)
def test_a_bad_config_is_refused_by_file_and_reason(folder, case):
    text, message = CONFIG_TEXTS[case]
    (folder / CONFIG_NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AdapterFormatError, match=message) as caught:
        load(folder)
    assert str(folder / CONFIG_NAME) in str(caught.value)


def test_an_r_that_the_tensors_contradict_is_refused(folder):
    edit_config(folder, r=8)
    with pytest.raises(AdapterFormatError, match=r"block\.1\.mix: lambda \(4, 2\) and gamma \(2, 8\) do not fit r=8"):
        load(folder)


def test_unknown_config_keys_survive_load_and_save(folder):
    edit_config(folder, new_in_peft={"a": [1]})
    save(load(folder), folder)
    assert json.loads((folder / CONFIG_NAME).read_text())["new_in_peft"] == {"a": [1]}


def test_a_missing_folder_or_file_is_named(tmp_path, folder):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere is not a folder\. Pass the folder that holds adapter_config\."
    ):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"is not a folder\. Pass the folder that holds adapter_config\.json"):
        load(folder / CONFIG_NAME)
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter holds no adapter_model\.safetensors\.$"):
        load(folder)


def test_sub_folders_that_hold_adapters_are_suggested(tmp_path):
    save(draw_adapter(), tmp_path / "second")
    save(draw_adapter(), tmp_path / "first")
    (tmp_path / "empty").mkdir()
    message = (
        r"holds no adapter_config\.json\. Its sub-folders \['first', 'second'\] do, one per adapter name: pass"
        r" adapter_name, or one of them\."
    )
    with pytest.raises(FileNotFoundError, match=message):
        load(tmp_path)


def test_a_pickle_is_never_read(folder):
    (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin")
    message = (
        r"holds adapter_model\.bin, a pickle, which can run code when it is read\. Load it with PEFT and write it again"
        r" with model\.save_pretrained\(folder, safe_serialization=True\)\."
    )
    with pytest.raises(AdapterFormatError, match=message):
        load(folder)


def test_a_recipe_argument_must_be_known_and_must_not_contradict_the_file(folder):
    with pytest.raises(ValueError, match=r"recipe='torch' is not known: choose one of \['torch>=2\.12'"):
        load(folder, recipe="torch")
    message = r"the file names the recipe 'torch>=2\.12', but recipe='torch<=2\.11' was passed\. Drop the argument\."
    with pytest.raises(AdapterFormatError, match=message):
        load(folder, recipe="torch<=2.11")
    assert load(folder, recipe="torch>=2.12").recipe == "torch>=2.12"


def test_trained_biases_and_modules_to_save_are_kept_and_nothing_else(folder):
    norm, head = (
        {"base_model.model.norm.bias": np.ones(2, np.float32)},
        {"base_model.model.head.weight": np.ones(3, np.float32)},
    )
    rewrite(folder, add=norm | head)
    edit_config(folder, bias="all", modules_to_save=["head"])
    assert load(folder).saved_weights.keys() == {*norm, *head}
    edit_config(folder, bias="none")
    with pytest.raises(AdapterFormatError, match=r"norm\.bias: left over"):
        load(folder)
    edit_config(folder, bias="randlora_only", modules_to_save=["hea"])  # PEFT means any name that ends so
    with pytest.raises(AdapterFormatError, match=r"head\.weight: left over"):
        load(folder)


def foreign_adapter():
    """An adapter whose bases no recipe makes."""
    adapter = draw_adapter()
    rounded = Bases(*(basis.astype(np.float32) * np.float32(1.5) for basis in adapter.bases))
    return dataclasses.replace(adapter, bases=rounded, recipe=None)


def test_bases_from_elsewhere_are_kept_but_cannot_be_left_out(tmp_path):
    adapter = foreign_adapter()
    save(adapter, tmp_path / "kept")
    back = load(tmp_path / "kept")
    assert back.recipe is None
    same_arrays({"bases": back.bases}, {"bases": adapter.bases})
    bare = dataclasses.replace(back, config=dataclasses.replace(back.config, save_projection=False))
    with pytest.raises(
        ValueError, match=r"no recipe rebuilds the bases .* so they would be lost: .*save_projection=True"
    ):
        save(bare, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_a_recipe_argument_is_not_believed_about_bases_that_the_file_holds(tmp_path):
    save(foreign_adapter(), tmp_path)
    with pytest.raises(
        AdapterFormatError, match=r"recipe='torch>=2\.12' does not give the bases in the file; None does"
    ):
        load(tmp_path, recipe="torch>=2.12")


def test_bases_that_are_not_known_cannot_be_saved(tmp_path):
    bare = dataclasses.replace(draw_adapter(), bases=None)
    with pytest.raises(
        ValueError, match=r"save_projection=True, but the bases .* not known: bind it to its model first"
    ):
        save(bare, tmp_path)
    assert os.listdir(tmp_path) == []


def test_an_adapter_that_was_never_bound_keeps_what_it_knows(tmp_path):
    bare = dataclasses.replace(draw_adapter(save_projection=False, recipe="torch<=2.11"), bases=None, shapes=None)
    save(bare, tmp_path)
    back = load(tmp_path)
    assert (back.bases, back.shapes, back.recipe) == (None, None, "torch<=2.11")
    assert bases_digest(back.bind(LAYERS).bases) == bases_digest(
        make_bases(RandLoraConfig(r=4), max_dim=12, min_dim=12, recipe="torch<=2.11")
    )


@pytest.mark.parametrize("dtype", [np.float64, np.int32])
def test_a_dtype_that_cannot_be_read_back_is_refused_before_anything_is_written(tmp_path, dtype):
    factors = {name: Factors(*(part.astype(dtype) for part in pair)) for name, pair in draw_adapter().factors.items()}
    with pytest.raises((ValueError, TypeError), match=f"{np.dtype(dtype).name}|{np.dtype(dtype).char}"):
        save(dataclasses.replace(draw_adapter(), factors=factors), tmp_path / "x")


def test_saving_again_replaces_the_adapter_and_nothing_else(folder):
    (folder / "README.md").write_text("mine")
    save(draw_adapter(99), folder)
    same_arrays(load(folder).factors, draw_adapter(99).factors)
    assert sorted(os.listdir(folder)) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]


def test_loading_does_not_keep_the_file_open_or_mapped(folder):
    adapter = load(folder)
    gamma = adapter.factors["block.0.up"].gamma.copy()
    path = folder / WEIGHTS_NAME
    path.write_bytes(b"\0" * path.stat().st_size)
    np.testing.assert_array_equal(adapter.factors["block.0.up"].gamma, gamma)


def test_module_names_of_any_characters_survive(tmp_path):
    names = {"größe.0": (4, 6), "a b": (6, 4), 'quo"te': (4, 4)}
    save(draw_adapter(shapes=names), tmp_path)
    assert load(tmp_path).modules == tuple(sorted(names))
    assert set(load_file(tmp_path / WEIGHTS_NAME)) >= {f"base_model.model.{name}.randlora_gamma" for name in names}
