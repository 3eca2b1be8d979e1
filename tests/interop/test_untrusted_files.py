"""Adapter folders made to harm: each is refused in one clear `AdapterFormatError`, in bounded memory and time.

What headers and JSON can hold is in test_tensorfile.py and test_strictjson.py, random damage in test_fuzz.py.
"""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file
from strategies import KEPT, LAYERS, draw_adalora, draw_adapter

from interop import AdapterFormatError, RandLoraConfig, load, save
from interop.cli import main
from interop.files import adapter_names
from interop.folder import CONFIG_NAME, WEIGHTS_NAME
from interop.modelfolder import INDEX_NAME, CheckpointFormatError, ModelFolder
from tests.conftest import ROOT
from tests.interop.folders import edit_config, rewrite, same_arrays, weights

SECONDS = 5


@pytest.fixture
def folder(tmp_path):
    save(draw_adapter(), tmp_path / "adapter", model_card=False)
    return tmp_path / "adapter"


@pytest.fixture
def adalora(tmp_path):
    save(draw_adalora(kept=KEPT), tmp_path / "adalora", model_card=False)
    return tmp_path / "adalora"


def refused(folder, message, **arguments):
    """Assert that a folder is refused in time, in a message that is short, names a file, and shows no raw bytes."""
    start = time.process_time()
    with pytest.raises(AdapterFormatError, match=message) as caught:
        load(folder, **arguments)
    assert time.process_time() - start < SECONDS
    assert type(caught.value) is AdapterFormatError
    text = str(caught.value)
    assert str(folder) in text
    assert len(text) < 6000
    assert text.replace("\n", "").isprintable()


NO_FILES = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "link to itself": lambda path: os.symlink(path.name, path),
    "links in a circle": lambda path: [os.symlink(f"{path.name}2", path), os.symlink(path.name, f"{path}2")],
    "link to nothing": lambda path: os.symlink("nowhere", path),
    "device": lambda path: os.symlink("/dev/zero", path),
    "link to a folder": lambda path: os.symlink(".", path),
}


@pytest.mark.parametrize("what", NO_FILES)
@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_what_stands_in_the_place_of_a_file_is_not_waited_for(folder, name, what):
    (folder / name).unlink()
    NO_FILES[what](folder / name)
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(name)} is not a regular file, nor a link to one\.$"):
        load(folder)
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("what", NO_FILES)
def test_a_save_does_not_wait_either(folder, what):
    for name in (CONFIG_NAME, WEIGHTS_NAME, "README.md", f".{CONFIG_NAME}.old"):
        (folder / name).unlink(missing_ok=True)
        if what not in ("folder",):  # which cannot be replaced by a file
            NO_FILES[what](folder / name)
    save(draw_adapter(7), folder)
    same_arrays(load(folder).factors, draw_adapter(7).factors)


def test_a_link_to_a_file_is_followed_as_the_cache_of_the_hub_has_it(folder):
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (folder / name).rename(blobs / name)
        (folder / name).symlink_to(f"../blobs/{name}")
    same_arrays(load(folder).factors, draw_adapter().factors)


DEEP = "[" * 100 + "]" * 100
CONFIGS = {
    "empty": ("", r"adapter_config\.json is not a valid config of an adapter: is not valid JSON"),
    "a pickle": ("\x80\x04.", r"is not valid JSON"),
    "NUL": ('{"r": 4}\0', r"is not valid JSON \(Extra data"),
    "a key twice": ('{"r": 4, "r": 8}', r"adapter: has the key 'r' twice"),
    "a key twice in a field nobody knows": ('{"x": {"y": 1, "y": 2}}', r"has the key 'y' twice"),
    "deep": ("[" * 10**6, r"is nested more than 64 levels deep"),
    "deep in a field nobody knows": (f'{{"x": {DEEP}}}', r"is nested more than 64 levels deep"),
    "a million lists": ('{"x": [' + "[]," * 10**6 + "0]}", r"has 2,000,002 commas and brackets, 1,048,576 are allowed"),
    "NaN in a field nobody knows": ('{"x": [NaN]}', r"holds NaN, which is no JSON"),
    "infinity by overflow": ('{"x": 1e400}', r"holds 1e400, which is too large for a float"),
    "a lone surrogate": ('{"x": "\\ud800"}', r"holds the text '\\ud800', which is not valid Unicode"),
    "r of thousands of digits": ('{"r": 1' + "0" * 5000 + "}", r"holds an integer of 5,001 digits"),
    "method of a wrong type": ('{"peft_type": ["RANDLORA"]}', r"peft_type=\['RANDLORA'\] is not a RandLoRA or"),
    "method nobody knows": ('{"peft_type": "\\u001b[2J"}', r"peft_type='\\x1b\[2J' is not a RandLoRA or AdaLoRA"),
    "long text in a wrong place": ('{"r": "' + "x" * 10**6 + '"}', r"r='xxx.* \.\.\. .*must be an int\.$"),
}
FIELDS = {
    "r": ([True, 4.0, "4", None, [4], 10**3000, -1, 0], r"r=|lambda \(4, "),
    "randlora_alpha": ([True, "1", None, [], 10**309], r"randlora_alpha=.*must be a finite number"),
    "randlora_dropout": ([1, -0.1, "0", None, [0], True], r"randlora_dropout=.*must be a probability"),
    "projection_prng_key": ([1.0, "0", None, 2**64, -(2**63) - 1], r"projection_prng_key=.*must"),
    "save_projection": ([1, None, "true", []], r"save_projection=.*must be True or False"),
    "target_modules": ([5, {}, [5], [""], [], "", [["a"]]], r"target_modules=.*(must be None, a string|is empty)"),
    "modules_to_save": (
        [5, "head", {"a": 1}, [[]], ["m"] * 1001],
        r"modules_to_save=.*must (be None or a list|name at)",
    ),
    "layers_to_transform": (["0", [True], [0.0], {}], r"layers_to_transform=.*must be None, an int"),
    "bias": ([None, True, [], "lora_only"], r"bias=.*must be one of"),
    "task_type": ([5, ["CAUSAL_LM"], {}], r"task_type=.*must be None or a string"),
    "base_model_name_or_path": ([5, ["x"], False], r"base_model_name_or_path=.*must be None or a string"),
    "revision": ([5, []], r"revision=.*must be None or a string"),
    "peft_version": ([0.21, []], r"peft_version=.*must be None or a string"),
    "auto_mapping": ([5, "x", ["a"]], r"auto_mapping=.*must be None or a dict"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_malicious_config_is_refused(folder, case):
    text, message = CONFIGS[case]
    (folder / CONFIG_NAME).write_bytes(text.encode("latin-1"))
    refused(folder, message)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_a_wrong_type_or_value_is_refused(folder, field):
    values, message = FIELDS[field]
    for value in values:
        edit_config(folder, **{field: value})
        refused(folder, message)


def test_what_a_config_may_hold_is_loaded_and_saved_again(folder):
    edit_config(folder, auto_mapping={"a": [{}]}, unknown={"unknown_fields": [1]}, unknown_fields={"r": 5}, zeta=None)
    save(load(folder), folder)
    fields = json.loads((folder / CONFIG_NAME).read_text())
    assert (fields["unknown"], fields["unknown_fields"]) == ({"unknown_fields": [1]}, {"r": 5})


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*" * 20 + "x", "(", "a{1000000000}"])
def test_a_regular_expression_is_not_evaluated_by_load_or_save(tmp_path, pattern):
    adapter = draw_adapter(shapes={"a" * 60 + "!": (6, 4)}, target_modules=["x"])
    save(adapter, tmp_path)
    edit_config(tmp_path, target_modules=pattern, exclude_modules=pattern, layers_pattern=pattern)
    start = time.process_time()
    save(load(tmp_path), tmp_path / "again")
    assert time.process_time() - start < SECONDS


ADALORA = {
    "ranks beyond memory": ({"init_r": 10**12, "rank_pattern": None}, r"do not fit 1000000000000 triplets"),
    "ranks beyond 64 bits": ({"init_r": 10**30, "rank_pattern": None}, r"do not fit 10{30} triplets"),
    "a pattern of another length": ({"init_r": 10**12}, r"has 4 triplets, not init_r=1000000000000"),
    "a long pattern": ({"rank_pattern": {"block.0.up.lora_E": [True] * 10**5}}, r"has 100000 triplets, not init_r=4"),
    "many patterns": (
        {"rank_pattern": {f"m{i}.lora_E": [False] * 4 for i in range(5000)}},
        r"rank_pattern names \['m0\.lora_E', .*, which are not adapted",
    ),
    "a pattern of a text": (
        {"rank_pattern": {"block.0.up.lora_E": "1001"}},
        r"is not the name of a lora_E with a list",
    ),
    "a pattern of numbers": ({"rank_pattern": {"block.0.up.lora_E": [1, 0, 0, 1]}}, r"with a list of True or False"),
    "a pattern as a list": ({"rank_pattern": [True]}, r"rank_pattern=\[True\]: must be None or a dict"),
    "a name of dots": ({"rank_pattern": {"." * 100_000: [True] * 4}}, r"is not the name of a lora_E"),
    "two patterns for one layer": (
        {"rank_pattern": {"a.lora_E": [True] * 4, "a.lora_E.default": [True] * 4}},
        r"is one of two entries for 'a\.lora_E'",
    ),
    "steps of thousands of digits": ({"total_step": 10**3999, "tinit": -(10**3998)}, r"tinit=-10+ \.\.\. 0+: must be"),
    "alpha beyond floats": ({"lora_alpha": 10**400}, r"lora_alpha=10+.*must be above 0"),
}


@pytest.mark.parametrize("case", ADALORA)
def test_a_malicious_config_of_adalora_is_refused(adalora, case):
    fields, message = ADALORA[case]
    edit_config(adalora, **fields)
    refused(adalora, message)


def test_layers_of_adalora_without_triplets_have_sizes_of_layers(adalora):
    down = "base_model.model.block.0.down"
    rewrite(adalora, notes={"shapes": None}, add={f"{down}.lora_A": np.zeros((0, 2**24 + 1), np.float32)})
    refused(adalora, r"block\.0\.down: lora_A \(0, 16777217\), .* do not fit 0 triplets")


NOTES = {
    "deep": (f'{{"format_version": 1, "x": {DEEP}}}', r"metadata entry 'randlora' is malformed .*levels deep"),
    "a key twice": ('{"format_version": 1, "format_version": 1}', r"has the key 'format_version' twice"),
    "a huge version": ('{"format_version": 1' + "0" * 3000 + "}", r"has format_version 10+ \.\.\. 0+, this release"),
    "a version of no integer": ('{"format_version": 1.0}', r"format_version must be a positive integer"),
    "NaN": ('{"format_version": NaN}', r"holds NaN, which is no JSON"),
    "a text": ('"x"', r"holds a JSON str, not an object"),
    "nothing": ("", r"is not valid JSON"),
    "escape sequences": ('{"format_version": 1, "\\u001b[2J": 0}', r"are missing or unknown; version 1 has"),
}
NOTED = {
    **{f"shapes={value!r}": ({"shapes": value}, r"shapes must be an object") for value in (False, 0, "", [], "ab")},
    "no shape for any layer": ({"shapes": {}}, r"have factors or a shape, but not both"),
    "a shape of 1e9": ({"shapes": {**LAYERS, "block.0.up": [10**9, 6]}}, r"sizes must be integers from 1 to 16777216"),
    "a shape of floats": ({"shapes": {**LAYERS, "block.0.up": [12.0, 6]}}, r"sizes must be integers from 1"),
    "a shape of 0": ({"shapes": {**LAYERS, "block.0.up": [0, 6]}}, r"sizes must be integers from 1"),
    "sizes of thousands of digits": ({"max_dim": 10**3998}, r"sizes must be integers from 1"),
    "an unknown recipe": ({"recipe": "\x1b[2J" * 500}, r"made by the unknown recipe '\\x1b\[2J.* \.\.\. .*Upgrade"),
    "a sum of a wrong type": ({"bases_sha256": ["0" * 64]}, r"the recipe and SHA-256 sums must be strings"),
    "a long sum": ({"bases_sha256": "0" * 10**6}, r"the file was written with 0+ \.\.\. 0+\. The file was damaged"),
    "a key more": ({"x": None}, r"\['x'\] are missing or unknown; version 1 has \['format_version', "),
}


@pytest.mark.parametrize("case", NOTES)
def test_malicious_notes_are_refused(folder, case):
    text, message = NOTES[case]
    rewrite(folder, metadata={"randlora": text})
    refused(folder, message)


@pytest.mark.parametrize("case", NOTED)
def test_malicious_notes_of_the_right_form_are_refused(folder, case):
    notes, message = NOTED[case]
    rewrite(folder, notes=notes)
    refused(folder, message)


@pytest.mark.parametrize("key", ["format_version", "recipe", "max_dim", "shapes", "config_sha256", "tensors_sha256"])
def test_notes_without_one_of_their_keys_are_refused(folder, key):
    metadata = weights(folder)[1]
    notes = json.loads(metadata["randlora"])
    del notes[key]
    rewrite(folder, metadata={"randlora": json.dumps(notes)})
    refused(folder, rf"metadata entry 'randlora' is malformed .*{key}")


def test_notes_are_sealed_by_their_sum(folder):
    tensors, metadata = weights(folder)
    damaged = {
        "other notes": {**metadata, "randlora": metadata["randlora"].replace("[12, 6]", "[11, 6]")},
        "no sum": {"randlora": metadata["randlora"]},
        "no notes": {"randlora_sha256": metadata["randlora_sha256"]},
        "another name": {"sandlora": metadata["randlora"], "randlora_sha256": metadata["randlora_sha256"]},
    }
    for change in damaged.values():
        save_file(tensors, folder / WEIGHTS_NAME, change)
        refused(folder, r"metadata entry 'randlora' was damaged or edited, by its SHA-256 under 'randlora_sha256'\.")


REBUILT = [
    {"max_dim": 2**24, "min_dim": 2**24},
    {"max_dim": 2**24, "min_dim": 1},
    {"max_dim": 1, "min_dim": 2**24},
    {"max_dim": 2**16 + 1, "min_dim": 2**16 + 1},
]


@pytest.mark.parametrize("dims", REBUILT, ids=str)
def test_bases_beyond_any_model_are_not_rebuilt(tmp_path, dims):
    save(draw_adapter(save_projection=False), tmp_path, model_card=False)
    rewrite(tmp_path, notes={**dims, "shapes": None})
    refused(tmp_path, r"its bases cannot be rebuilt: |its notes contradict each other")
    rewrite(tmp_path, notes={**dims, "shapes": {**LAYERS, "block.0.up": [2**24, 6]}})
    refused(tmp_path, r"its notes contradict each other")


COPIES = {
    "a bit": lambda basis: (basis.view(np.uint16) ^ np.eye(1, basis.size, 0, np.uint16).reshape(basis.shape)).view(
        basis.dtype
    ),
    "the last bit": lambda basis: (
        basis.view(np.uint16) ^ np.eye(1, basis.size, basis.size - 1, np.uint16).reshape(basis.shape)
    ).view(basis.dtype),
    "dtype": lambda basis: basis.astype(np.float32),
    "dtype of the same size": lambda basis: basis.view(np.float16),
    "shape": lambda basis: basis.reshape(-1),
    "order of axes": lambda basis: np.ascontiguousarray(basis.T),
    "one row less": lambda basis: basis[:-1],
}


@pytest.mark.parametrize("case", COPIES)
@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("place", ["base_model", "base_model.model.block.1.mix"])
def test_copies_of_a_basis_that_differ_in_anything_conflict(tmp_path, case, part, place):
    save(draw_adapter(), tmp_path, bases="per-layer", model_card=False)
    key = f"{place}.randlora_{part}"
    changed = COPIES[case](weights(tmp_path)[0][key])
    rewrite(tmp_path, add={key: np.nan_to_num(changed, nan=0)})
    refused(tmp_path, rf"randlora_{part}: differs from another copy of basis {part} in the same file")


def test_zeros_of_either_sign_conflict(tmp_path):
    save(draw_adapter(sparse=True), tmp_path, bases="per-layer", model_card=False)
    key = "base_model.model.block.1.mix.randlora_A"
    A = weights(tmp_path)[0][key]
    assert (A == 0).any()
    rewrite(tmp_path, add={key: np.where(A == 0, np.float32(-0.0), A)})
    refused(tmp_path, r"mix\.randlora_A: differs from another copy of basis A")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_inf_and_nan_are_refused_wherever_they_are(folder, value, dtype):
    up, head = "base_model.model.block.0.up.randlora_gamma", "base_model.model.head.weight"
    edit_config(folder, modules_to_save=["head"])
    for key, array in {
        up: np.ones((2, 6)),
        head: np.ones((2, 3)),
        "base_model.randlora_A": np.ones((4, 1, 12)),
    }.items():
        array[-1, -1] = value
        rewrite(folder, add={key: array.astype(dtype)})
        for lazy in (False, True):
            refused(folder, rf"{re.escape(key)}: holds inf or nan", lazy=lazy)
        rewrite(
            folder, drop=[head] if key == head else [], add={} if key == head else {key: np.ones(array.shape, dtype)}
        )


def test_names_of_tensors_cannot_write_on_the_terminal(folder, capsys):
    name = "base_model.model.\x1b[2J\n\0\u202e\u0085.randlora_lambda"
    rewrite(folder, add={name: np.ones((4, 2), np.float32)})
    refused(folder, r"base_model\.model\.\\x1b\[2J\\n\\x00\\u202e\\x85\.randlora_gamma: missing")
    save(draw_adapter(shapes={"a\x1b[2J\nb": (6, 4)}), folder, model_card=False)
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert r"  a\x1b[2J\nb " in out
    assert out.replace("\n", "").isprintable()


def test_long_names_and_many_findings_give_a_short_message(folder):
    extra = {f"{'x' * 900}.{i}.{'y' * 100}": np.ones(1, np.float32) for i in range(500)}
    rewrite(folder, add=extra)
    refused(folder, r"(?s)x{200,} \.\.\. .*and 492 more$")


# Names that lead elsewhere

TRAVERSAL = ["..", ".", "", "../other", "a/b", "/etc", "a\\b", "..\\other", "C:", "C:\\x", "a\0b", "./x", "x/"]


@pytest.mark.parametrize("name", TRAVERSAL)
def test_the_name_of_an_adapter_is_no_path(folder, name):
    with pytest.raises(ValueError, match=r"adapter_name=.* cannot be the name of a sub-folder: leave out"):
        load(folder / "x", adapter_name=name)
    with pytest.raises(ValueError, match=r"adapter_name=.* cannot be the name of a sub-folder: leave out"):
        save(draw_adapter(), folder / "x", adapter_name=name)
    assert not (folder / "x").exists()


def test_a_sub_folder_that_is_a_link_is_not_followed(folder, tmp_path):
    save(draw_adapter(), tmp_path / "elsewhere", model_card=False)
    before = (tmp_path / "elsewhere" / WEIGHTS_NAME).read_bytes()
    (folder / "evil").symlink_to(tmp_path / "elsewhere")
    message = r"evil is a link to another folder, which is not followed\. Pass the folder that it leads to itself\."
    refused(folder, message, adapter_name="evil")
    with pytest.raises(AdapterFormatError, match=message):
        save(draw_adapter(9), folder, adapter_name="evil")
    assert (tmp_path / "elsewhere" / WEIGHTS_NAME).read_bytes() == before
    assert adapter_names(folder) == ("default",)
    same_arrays(load(folder / "evil").factors, draw_adapter().factors)  # asked for by its path, it is the caller's


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", 5, None, ["x"]]
)
def test_the_index_of_a_model_names_files_beside_it_only(tmp_path, name):
    (tmp_path / "m").mkdir()
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    (tmp_path / "m" / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointFormatError, match=r"it may only name files in its own folder\. Do not trust it\."):
        ModelFolder(tmp_path / "m")


# The worst, in a process that may take neither much memory nor much time.


def sparse_config(folder):
    os.truncate(folder / CONFIG_NAME, 2**36)


def sparse_weights(folder):
    os.truncate(folder / WEIGHTS_NAME, 2**40)


def header_of_lists(folder):
    text = b'{"a":[' + b"[]," * 500_000 + b"0]}"
    (folder / WEIGHTS_NAME).write_bytes(len(text).to_bytes(8, "little") + text)


def header_that_goes_on(folder):
    (folder / WEIGHTS_NAME).write_bytes((2**40).to_bytes(8, "little") + b"{}")
    os.truncate(folder / WEIGHTS_NAME, 2**41)


def bases_of_8_gigabytes(folder):
    save(draw_adapter(save_projection=False), folder, model_card=False)
    rewrite(folder, notes={"max_dim": 2**16, "min_dim": 2**16, "shapes": None})


def names_of_many_parts(folder):
    key = "base_model.model" + ".a" * 60
    tensors = {f"{key}{i}.x": np.zeros(0, np.float32) for i in range(5000)}
    rewrite(folder, add=tensors)
    edit_config(folder, modules_to_save=["m" * 100 + str(i) for i in range(1000)])


def ranks_beyond_memory(folder):
    save(draw_adalora(), folder, model_card=False)
    edit_config(folder, init_r=10**10)


WORST = (sparse_config, sparse_weights, header_of_lists, header_that_goes_on, bases_of_8_gigabytes)
WORST += (names_of_many_parts, ranks_beyond_memory)
PROGRAM = """
import resource, sys, time
from interop import AdapterFormatError, load
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600_000_000,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for folder in sys.argv[1:]:
    start = time.process_time()
    try:
        load(folder)
    except AdapterFormatError as error:
        assert len(str(error)) < 6000
        print(time.process_time() - start < 20)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's limits of memory")
def test_the_worst_files_are_refused_in_little_memory_and_time(tmp_path):
    for number, harm in enumerate(WORST):
        save(draw_adapter(), tmp_path / str(number), model_card=False)
        harm(tmp_path / str(number))
    folders = [str(tmp_path / str(number)) for number in range(len(WORST))]
    command = [sys.executable, "-c", PROGRAM, *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * len(WORST)


def test_the_config_of_a_folder_without_weights_is_read_as_strictly(tmp_path):
    (tmp_path / CONFIG_NAME).write_text('{"r": 4, "r": 8}')
    with pytest.raises(ValueError, match="has the key 'r' twice"):
        RandLoraConfig.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text("[" * 10**5)
    with pytest.raises(ValueError, match="is nested more than 64 levels deep"):
        RandLoraConfig.from_pretrained(tmp_path)
