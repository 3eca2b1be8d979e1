"""Adapters that PEFT saved under torch 2.11 without their bases: their updates, from the seed, on any machine."""

import hashlib
import warnings

import numpy as np
import pytest

import interop
from tests.interop.golden import FOLDER, KINDS, LEGACY, SHAPES, golden

# Never updated: these folders are what a user of that day has.
SHA256 = {
    "dense/adapter_config.json": "7e0cbd01f50032c1695eb37717dfda00a1335e96da2b338930abc636700abc2f",
    "dense/adapter_model.safetensors": "0550ca5fc088111e1977bd2ffb950b72252d4375f9b8fe43bb589acab7703d05",
    "dense/delta_weights.safetensors": "0c5122c1d1848c18b287ddf67af7f55edd6e58b97889172dc71555c9f7b150a5",
    "sparse/adapter_config.json": "e5fe183a9eb4d1c868d2f771c56304171b0fc6c27c9c4fe38d0bb7a93e121ec9",
    "sparse/adapter_model.safetensors": "0550ca5fc088111e1977bd2ffb950b72252d4375f9b8fe43bb589acab7703d05",
    "sparse/delta_weights.safetensors": "13511868f2d5747a1de401d05e6ac634053431f60101fd9364811bb345ca99c1",
}


def relative_error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_the_golden_files_are_those_that_were_made():
    found = {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in FOLDER.rglob("*") if path.is_file()}
    assert {name: hashlib.sha256(content).hexdigest() for name, content in found.items()} == SHA256
    assert sum(map(len, found.values())) < 100_000


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_legacy_recipe_the_updates_are_those_of_then(kind):
    deltas, notes = golden(kind)
    assert notes["torch"] == "2.11.0"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = interop.load(FOLDER / kind, recipe=LEGACY)
    assert adapter.bases is None
    adapter = adapter.bind(SHAPES)
    assert interop.bases_digest(adapter.bases) == notes["bases_sha256"]
    assert set(adapter.modules) == set(deltas) == set(SHAPES)
    for name, want in deltas.items():
        assert adapter.delta_weight(name).shape == SHAPES[name]
        assert relative_error(adapter.delta_weight(name), want) < 3e-7  # `want` is in float32


def test_with_todays_recipe_dense_updates_are_others_and_a_warning_says_so():
    deltas, _ = golden("dense")
    with pytest.warns(UserWarning, match=r"saved under torch <= 2\.11 pass recipe='torch<=2\.11'"):
        adapter = interop.load(FOLDER / "dense")
    for name, want in deltas.items():
        assert relative_error(adapter.bind(SHAPES).delta_weight(name), want) > 0.5


def test_sparse_bases_are_the_same_under_every_recipe():
    deltas, notes = golden("sparse")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = interop.load(FOLDER / "sparse").bind(SHAPES)
    assert interop.bases_digest(adapter.bases) == notes["bases_sha256"]
    for name, want in deltas.items():
        assert relative_error(adapter.delta_weight(name), want) < 3e-7


@pytest.mark.parametrize("kind", KINDS)
def test_saved_again_with_bases_the_updates_need_no_recipe(kind, tmp_path):
    interop.save(interop.load(FOLDER / kind, recipe=LEGACY).bind(SHAPES), tmp_path, bases="one")
    deltas, _ = golden(kind)
    assert interop.load(tmp_path).recipe == LEGACY
    for name, want in deltas.items():
        assert relative_error(interop.load(tmp_path).delta_weight(name), want) < 3e-7


def test_there_is_a_wide_a_square_and_a_tall_layer_with_several_bases():
    assert {np.sign(out - inp) for out, inp in SHAPES.values()} == {-1, 0, 1}
    assert all(min(shape) > 2 * 4 and min(shape) % 4 for shape in SHAPES.values())
