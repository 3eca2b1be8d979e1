"""`save(bases=, adapter_name=)`, `adapter_names`, and what a save refuses; what PEFT makes of it: tests/cross."""

import dataclasses
import json
import os
import re

import numpy as np
import pytest
from strategies import KEPT, LAYERS, draw_adalora, draw_adapter

from interop import AdapterFormatError, Bases, Factors, SVDFactors, bases_digest, load, save
from interop.files import BASES, adapter_names
from interop.folder import CONFIG_NAME, WEIGHTS_NAME
from tests.interop.folders import both_files, edit_config, same_arrays, weights

KINDS = ({}, {"sparse": True}, {"very_sparse": True})


def keys_of_bases(folder):
    return {key for key in weights(folder)[0] if re.search(r"randlora_[AB]$", key)}


ONE = {"base_model.randlora_A", "base_model.randlora_B"}
COPIES = {
    "none": set(),
    "one": ONE,
    "per-layer": ONE | {f"base_model.model.{name}.randlora_{part}" for name in LAYERS for part in "AB"},
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("bases", BASES)
def test_every_option_round_trips_to_the_same_adapter_and_the_same_bytes(tmp_path, bases, keep, kind):
    adapter = draw_adapter(save_projection=keep, **kind)
    save(adapter, tmp_path, bases=bases)
    assert keys_of_bases(tmp_path) == COPIES[bases]
    tensors, _ = weights(tmp_path)
    for key in keys_of_bases(tmp_path):
        assert tensors[key].tobytes() == tensors[f"base_model.{key.rpartition('.')[2]}"].tobytes()
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["save_projection"] is (bases != "none")
    back = load(tmp_path)
    same_arrays(back.factors, adapter.factors)
    same_arrays({"bases": back.bases}, {"bases": adapter.bases})
    assert (back.recipe, back.shapes) == (adapter.recipe, adapter.shapes)
    first = both_files(tmp_path)
    save(back, tmp_path, bases=bases)
    assert both_files(tmp_path) == first


def test_by_default_the_config_says_how_many_copies_there_are(tmp_path):
    for keep, bases in ((True, "one"), (False, "none")):
        save(draw_adapter(save_projection=keep), tmp_path / "default")
        save(draw_adapter(save_projection=keep), tmp_path / "said", bases=bases)
        assert both_files(tmp_path / "default") == both_files(tmp_path / "said")


def test_copies_per_layer_become_one_again(tmp_path):
    save(draw_adapter(), tmp_path / "copies", bases="per-layer")
    save(load(tmp_path / "copies"), tmp_path / "again")
    save(draw_adapter(), tmp_path / "one")
    assert both_files(tmp_path / "again") == both_files(tmp_path / "one")


def test_the_option_does_not_change_its_input(tmp_path):
    adapter = draw_adapter()
    save(adapter, tmp_path, bases="none")
    assert adapter.config.save_projection is True


@pytest.mark.parametrize("bases", ["two", "", "One", "per_layer", True, 1])
def test_an_unknown_option_is_refused(tmp_path, bases):
    for adapter in (draw_adapter(), draw_adalora()):
        with pytest.raises(ValueError, match=r"bases=.* is not known: choose one of \['one', 'none', 'per-layer'\]\."):
            save(adapter, tmp_path / "x", bases=bases)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("bases", ["one", "per-layer"])
def test_adalora_has_no_bases_to_write(tmp_path, bases):
    with pytest.raises(ValueError, match=rf"bases='{bases}': an AdaLoRA adapter has no bases\. Drop the argument\."):
        save(draw_adalora(), tmp_path / "x", bases=bases)
    assert not (tmp_path / "x").exists()
    for option in (None, "none"):
        save(draw_adalora(kept=KEPT), tmp_path / str(option), bases=option)
    assert both_files(tmp_path / "None") == both_files(tmp_path / "none")


@pytest.mark.parametrize("bases", ["one", "per-layer"])
def test_bases_that_are_not_known_cannot_be_written(tmp_path, bases):
    bare = dataclasses.replace(draw_adapter(save_projection=False), bases=None)
    with pytest.raises(ValueError, match=r"the bases of this adapter are not known: bind it to its model first"):
        save(bare, tmp_path / "x", bases=bases)
    assert not (tmp_path / "x").exists()


def test_bases_that_no_recipe_gives_cannot_be_left_out(tmp_path):
    adapter = draw_adapter()
    foreign = dataclasses.replace(
        adapter, bases=Bases(*(np.float32(1.5) * basis.astype(np.float32) for basis in adapter.bases)), recipe=None
    )
    with pytest.raises(ValueError, match=r"no recipe rebuilds the bases of this adapter, so they would be lost"):
        save(foreign, tmp_path / "x", bases="none")
    save(foreign, tmp_path / "copies", bases="per-layer")
    back = load(tmp_path / "copies")
    assert (bases_digest(back.bases), back.recipe) == (bases_digest(foreign.bases), None)


def test_a_file_that_was_edited_to_keep_its_bases_says_so(tmp_path):
    save(draw_adapter(), tmp_path, bases="none")
    edit_config(tmp_path, save_projection=True)
    save(load(tmp_path), tmp_path)
    assert keys_of_bases(tmp_path) == ONE


# Several adapters in one folder


def test_each_name_has_its_folder_as_peft_has_it(tmp_path):
    adapters = {None: draw_adapter(1), "b": draw_adapter(2, r=2), "a b": draw_adalora(3, kept=KEPT)}
    for name, adapter in adapters.items():
        save(adapter, tmp_path, adapter_name=name)
    assert adapter_names(tmp_path) == ("default", "a b", "b")
    for name, adapter in adapters.items():
        same_arrays(load(tmp_path, adapter_name=name).factors, adapter.factors)
        save(adapter, tmp_path / "alone" / str(name))
        folder = tmp_path if name is None else tmp_path / name
        assert both_files(folder) == both_files(tmp_path / "alone" / str(name))
    same_arrays(load(tmp_path, adapter_name="default").factors, adapters[None].factors)
    assert adapter_names(tmp_path / "b") == ("default",)


def test_the_default_name_is_that_of_the_folder_itself(tmp_path):
    save(draw_adapter(), tmp_path, adapter_name="default")
    assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]


def test_a_name_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    save(draw_adapter(), tmp_path, adapter_name="b")
    save(draw_adapter(), tmp_path, adapter_name="a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter 'c': it has \['a', 'b'\]\."):
        load(tmp_path, adapter_name="c")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json\. Its sub-folders \['a', 'b'\] do"):
        load(tmp_path)
    assert adapter_names(tmp_path) == ("a", "b")


def test_a_folder_without_adapters_has_no_names(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"holds no adapter: neither adapter_config\.json nor a sub-folder"):
            adapter_names(path)


# Inf and nan


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["RandLoRA", "AdaLoRA"])
def test_a_number_that_is_none_is_not_saved_and_an_earlier_save_stays(tmp_path, method, value):
    adapter = draw_adapter() if method == "RandLoRA" else draw_adalora(kept=KEPT)
    save(adapter, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kind = Factors if method == "RandLoRA" else SVDFactors
    for index, field in enumerate(kind._fields):
        broken = {name: kind(*(part.copy() for part in parts)) for name, parts in adapter.factors.items()}
        broken["block.1.mix"][index][-1, -1] = value
        with pytest.raises(
            ValueError, match=r"an earlier save stays.*:\n  - base_model\.model\.block\.1\.mix\..* holds inf"
        ):
            save(dataclasses.replace(adapter, factors=broken), tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, field


def test_other_trained_tensors_are_looked_at_too(tmp_path):
    adapter = draw_adapter(modules_to_save=["head"])
    saved = {"base_model.model.head.weight": np.array([1, np.nan], np.float16)}
    with pytest.raises(ValueError, match=r"Training diverged:\n  - base_model\.model\.head\.weight holds inf or nan$"):
        save(dataclasses.replace(adapter, saved_weights=saved), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_largest_finite_numbers_are_saved(tmp_path):
    adapter = draw_adapter()
    for dtype in (np.float16, np.float32):
        top = np.finfo(dtype).max
        factors = {
            name: Factors(np.full(lam.shape, -top, dtype), np.full(gamma.shape, top, dtype))
            for name, (lam, gamma) in adapter.factors.items()
        }
        save(dataclasses.replace(adapter, factors=factors), tmp_path)
        same_arrays(load(tmp_path).factors, factors)


def test_a_malformed_second_adapter_does_not_hide_the_first(tmp_path):
    save(draw_adapter(), tmp_path)
    save(draw_adapter(), tmp_path, adapter_name="broken")
    (tmp_path / "broken" / WEIGHTS_NAME).write_bytes(b"x")
    same_arrays(load(tmp_path).factors, draw_adapter().factors)
    with pytest.raises(AdapterFormatError, match=r"broken/adapter_model\.safetensors is not a valid safetensors file"):
        load(tmp_path, adapter_name="broken")
