"""FORMAT.md against the code: its Python is executed and compared, its tables hold the code's names and numbers."""

import contextlib
import io
import json
import re

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import KEPT, LAYERS, SHAPES, draw_adalora, draw_adapter, seeds

from interop import RECIPES, AdapterFormatError, Bases, RandLoraConfig, adalora, bases_digest, load, make_bases, save
from interop import fields as config_fields
from interop.adalora import AdaLoraConfig
from interop.card import CARD_NAME
from interop.contents import PARTS
from interop.files import BASES
from interop.folder import BACKUP_NAME, NAMES, NOTES_KEY
from interop.integrity import tensors_digest
from interop.notes import FORMAT_VERSION, KEYS, SEAL_KEY
from interop.shapes import MAX_BASIS, MAX_SIDE, bases_shapes, shared_dims
from interop.strictjson import MAX_BYTES, MAX_DEPTH, MAX_DIGITS, MAX_MARKS
from interop.tensorfile import DTYPES, MAX_AXES, MAX_COUNT, MAX_NAME, MAX_PARTS, MAX_SIZE
from tests.conftest import ROOT
from tests.interop.folders import rewrite, weights

TEXT = (ROOT / "FORMAT.md").read_text(encoding="utf-8")


def table(header):
    """The rows of the table under this header row, as lists of cells."""
    lines = TEXT[TEXT.index(f"| {header} |\n") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(text):
    return re.findall(r"`([^`]+)`", text)


@pytest.fixture(scope="module")
def spec():
    """The functions that the document defines; and what it prints, under `printed`."""
    scope, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in re.findall(r"(?ms)^```python\n(.*?)^```$", TEXT):
            exec(block, scope)
    return {**scope, "printed": printed.getvalue()}


def test_it_is_plain_ascii_and_linked_from_the_readme():
    assert TEXT.isascii()
    assert "(FORMAT.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_python_prints_what_it_says(spec):
    assert re.findall(r"(?ms)^```text\n(.*?)^```$", TEXT) == [spec["printed"]]


def test_the_sums_are_the_codes_sums(spec, rng):
    assert spec["tensors_sha256"](spec["tensors"]) == tensors_digest(spec["tensors"])
    arrays = {
        "scalar": np.float32(3).reshape(()),
        "größe": rng.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.float16),
        **{code: np.zeros(3, dtype) for code, dtype in DTYPES.items()},
    }
    assert spec["tensors_sha256"](arrays) == tensors_digest(arrays)
    bases = draw_adapter().bases
    assert spec["bases_sha256"](*bases) == bases_digest(bases)


@given(seed=st.integers(0, 2**16), shape=st.sampled_from(SHAPES), r=st.sampled_from([1, 2, 3, 5]))
def test_the_update_is_the_codes_and_the_oracles(spec, seed, shape, r):
    adapter = draw_adapter(seed, shapes={"a": shape, "b": (16, 16)}, r=r)
    lam, gamma = adapter.factors["a"]
    arguments = [array.astype(np.float64) for array in (*adapter.bases, lam, gamma)]
    got = spec["delta_weight"](*arguments, adapter.config.scaling, shape)
    np.testing.assert_allclose(got, adapter.delta_weight("a"), rtol=1e-9, atol=1e-9)
    want = oracle.delta_weight(*arguments, scaling=adapter.config.scaling, shape=shape)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


@given(
    seed=seeds,
    r=st.sampled_from([1, 2, 3, 4, 7]),
    dims=st.sampled_from([(8, 8), (12, 12), (20, 8), (33, 17), (40, 9)]),
    recipe=st.sampled_from(RECIPES),
    kind=st.sampled_from([{}, {"sparse": True}, {"very_sparse": True}, {"sparse": True, "very_sparse": True}]),
)
def test_the_bases_of_a_seed_are_the_codes_bit_for_bit(spec, seed, r, dims, recipe, kind):
    config = RandLoraConfig(r=r, projection_prng_key=seed, **kind)
    try:
        made = make_bases(config, max_dim=dims[0], min_dim=dims[1], recipe=recipe)
    except ValueError:
        return  # they do not exist
    for got, want in zip(spec["bases"](seed, r, *dims, recipe, **kind), made, strict=True):
        assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())


@pytest.mark.parametrize("row", table("seed | r | max_dim | min_dim | kind | recipe | bases_sha256"), ids=str)
def test_the_test_vectors_of_the_bases(row):
    seed, r, max_dim, min_dim = map(int, row[:4])
    kind = {} if row[4] == "dense" else {row[4]: True}
    config = RandLoraConfig(r=r, projection_prng_key=seed, **kind)
    for recipe in RECIPES if row[5] == "`any`" else names(row[5]):
        assert names(row[6]) == [bases_digest(make_bases(config, max_dim=max_dim, min_dim=min_dim, recipe=recipe))]


def test_every_recipe_is_named_and_has_a_test_vector():
    vectors = table("seed | r | max_dim | min_dim | kind | recipe | bases_sha256")
    assert {names(row[5])[0] for row in vectors} == {*RECIPES, "any"}
    section = TEXT[TEXT.index("## 5.") : TEXT.index("## 6.")]
    assert set(RECIPES) <= set(names(section))


def test_the_shapes_of_the_bases_are_the_codes():
    rows = {names(key)[0]: names(shape)[0] for key, shape, _ in table("key | shape |")}
    assert set(rows) == {
        *(f"base_model.model.<module>.{part}" for part in next(iter(PARTS.values()))),
        *(f"base_model.randlora_{part}" for part in "AB"),
    }
    for dims, r in ((shared_dims(LAYERS.values()), 4), (shared_dims([(20, 7)]), 3)):
        ceil = lambda x: -int(-x // 1)  # noqa: E731
        scope = {**dims._asdict(), "r": r, "ceil": ceil}
        want = tuple(eval(rows[f"base_model.randlora_{part}"], scope) for part in "AB")
        assert bases_shapes(dims, r) == want


def test_the_keys_and_shapes_of_adalora_are_the_codes():
    rows = {names(key)[0].rpartition(".")[2]: names(shape)[0] for key, shape in table("key | shape")}
    assert tuple(rows) == tuple(list(PARTS.values())[1])
    want = tuple(eval(shape, {"rank": 3, "in": 5, "out": 7, "inp": 5}) for shape in map(no_keyword, rows.values()))
    assert tuple(adalora.factor_shapes(3, (7, 5))) == want


def no_keyword(shape):
    return shape.replace("in)", "inp)")


def test_the_config_fields_exist_and_mean_the_scaling_that_is_said():
    known = {"RandLoRA": RandLoraConfig(), "AdaLoRA": AdaLoraConfig(inference_mode=True)}
    for fields, method, meaning in table("field | method | meaning"):
        for name in names(fields):
            for kind in known if method == "both" else [method]:
                assert name in known[kind].to_dict(), name
        if "s = " in meaning:
            config = known[method]
            assert eval(names(meaning)[0].removeprefix("s = "), config.to_dict()) == config.scaling


LIMITS = {
    "bytes of a JSON text": MAX_BYTES,
    "levels of nesting": MAX_DEPTH,
    "commas and opening brackets in a JSON text": MAX_MARKS,
    "digits of an integer": MAX_DIGITS,
    "axes of a tensor": MAX_AXES,
    "length of an axis": MAX_SIZE,
    "product of the axes that are not 0": MAX_COUNT,
    "characters of a tensor's name": MAX_NAME,
    "parts of a tensor's name, between dots": MAX_PARTS,
    "a side of a layer": MAX_SIDE,
    "numbers in B, to be rebuilt": MAX_BASIS,
    "entries of `modules_to_save`": config_fields.MAX_MODULES_TO_SAVE,
}


def test_the_limits_are_the_codes():
    assert {what: int(limit.replace(",", "")) for what, limit in table("what | at most")} == LIMITS


def test_the_dtypes_are_the_codes():
    listed = re.search(r"dtypes of tensors are (.*?)\. A", " ".join(TEXT.split()))[1]
    assert set(re.findall(r"[A-Z]+\d*", listed)) == set(DTYPES)


def test_the_notes_have_the_keys_that_are_said(tmp_path):
    rows = {names(key)[0]: (value, meaning) for key, value, meaning in table("key | value | meaning")}
    assert set(rows) == set(KEYS)
    assert rows["format_version"][0] == f"`{FORMAT_VERSION}`"
    assert [names(row[0])[0] for row in table("entry |")] == [NOTES_KEY, SEAL_KEY]
    save(draw_adapter(), tmp_path / "randlora")
    save(draw_adalora(kept=KEPT), tmp_path / "adalora")
    types = {"`1`": 1, "text": "", "integer": 1, "object": {}}
    for method in ("randlora", "adalora"):
        metadata = weights(tmp_path / method)[1]
        notes = json.loads(metadata["randlora"])
        assert set(notes) == set(rows)
        assert set(metadata) == {"format", NOTES_KEY, SEAL_KEY}
        for key, value in notes.items():
            allowed = [type(types[kind]) for kind in rows[key][0].split(" or ") if kind != "null"]
            assert type(value) in allowed or (value is None and "or null" in rows[key][0])
            if "or null" in rows[key][0] and key in ("tensors_sha256", "config_sha256"):
                rewrite(tmp_path / method, notes={key: None})
                load(tmp_path / method)


def test_names_of_files_and_layouts_are_the_codes():
    files = [names(row[0])[0] for row in table("file |")]
    assert files == [*NAMES, CARD_NAME, "adalora_state.safetensors", "adapter_model.bin"]
    assert BACKUP_NAME in names(TEXT[TEXT.index("## 8.") :])
    assert len(table("layout | keys | written by")) == 4
    assert all(f'`bases="{option}"`' in TEXT for option in BASES if option != "one")


def test_an_independent_reader_of_the_document_gets_the_adapter(spec, tmp_path):
    """With nothing but the safetensors library, json and the functions of the document."""
    adapter = draw_adapter(3, recipe="torch<=2.11", projection_prng_key=-5, save_projection=False)
    save(adapter, tmp_path)
    tensors, metadata = weights(tmp_path)
    config, notes = json.loads((tmp_path / NAMES[0]).read_text()), json.loads(metadata["randlora"])
    assert spec["tensors_sha256"](tensors) == notes["tensors_sha256"]
    dims = notes["max_dim"], notes["min_dim"]
    A, B = spec["bases"](config["projection_prng_key"], config["r"], *dims, notes["recipe"])
    assert spec["bases_sha256"](A, B) == notes["bases_sha256"]
    for name, shape in notes["shapes"].items():
        lam, gamma = (tensors[f"base_model.model.{name}.randlora_{part}"] for part in ("lambda", "gamma"))
        parts = [array.astype(np.float64) for array in Bases(A, B)] + [lam, gamma]
        got = spec["delta_weight"](*parts, config["randlora_alpha"] / config["r"], shape)
        np.testing.assert_allclose(got, adapter.delta_weight(name), rtol=1e-5, atol=1e-5)


def test_a_later_version_is_refused(tmp_path):
    save(draw_adapter(), tmp_path)
    rewrite(tmp_path, notes={"format_version": FORMAT_VERSION + 1})
    with pytest.raises(AdapterFormatError, match="format_version 2, this release reads up to 1: upgrade randlora"):
        load(tmp_path)
