"""Folders quantized by bitsandbytes, written here by the format: what is read from them, and what is refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from interop.bnb import CODES, CheckpointFormatError, Weight4bit, Weight8bit, read_folder

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
NAME = "model.layers.0.self_attn.q_proj.weight"
PREFIX = NAME.removesuffix("weight")


def state_key(quant_type):
    return f"{NAME}.quant_state.bitsandbytes__{quant_type}"


def as_json(fields):
    return np.frombuffer(json.dumps(fields).encode(), np.uint8)


def four_bit(
    shape=(6, 32), quant_type="nf4", blocksize=32, *, nested=False, dtype="float32", storage=np.uint8, scale=1
):
    """The tensors of one 4-bit weight with random codes and scales."""
    rng = np.random.default_rng(0)
    count = int(np.prod(shape))
    blocks = -(-count // blocksize)
    fields = {"quant_type": quant_type, "blocksize": blocksize, "dtype": dtype, "shape": list(shape)}
    tensors = {
        NAME: rng.integers(0, 256, -(-count // 2), dtype=np.uint8).view(storage)[:, None],
        f"{NAME}.absmax": rng.random(blocks, dtype=np.float32) * np.float32(scale),
        f"{NAME}.quant_map": np.array(CODES[quant_type], np.float32),
    }
    if nested:
        fields |= {"nested_blocksize": 32, "nested_dtype": "float32", "nested_offset": 0.051960412412881851}
        tensors[f"{NAME}.absmax"] = rng.integers(0, 256, blocks, dtype=np.uint8)
        tensors[f"{NAME}.nested_absmax"] = rng.random(-(-blocks // 32), dtype=np.float32)
        tensors[f"{NAME}.nested_quant_map"] = np.linspace(-1, 1, 256, dtype=np.float32)
    return {**tensors, state_key(quant_type): as_json(fields)}


def eight_bit(shape=(6, 5)):
    rng = np.random.default_rng(0)
    return {
        NAME: rng.integers(-127, 128, shape, dtype=np.int8),
        f"{PREFIX}SCB": rng.random(shape[0], dtype=np.float32),
        f"{PREFIX}weight_format": np.array(0, np.uint8),
    }


def write(folder, tensors, config=None):
    save_file({key: np.array(value, order="C") for key, value in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_shards(folder, shards, weight_map=None):
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = weight_map or {key: name for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def one_by_one(tensors, quant_type):
    """The weight by the format's description, number by number; every operation is one float32 rounding."""
    fields = json.loads(tensors[state_key(quant_type)].tobytes())
    packed, absmax = tensors[NAME].reshape(-1).view(np.uint8), tensors[f"{NAME}.absmax"]
    values = []
    for i in range(int(np.prod(fields["shape"]))):
        code = packed[i // 2] // 16 if i % 2 == 0 else packed[i // 2] % 16
        block = i // fields["blocksize"]
        scale = absmax[block]
        if "nested_offset" in fields:
            inner = tensors[f"{NAME}.nested_absmax"][block // fields["nested_blocksize"]]
            scale = tensors[f"{NAME}.nested_quant_map"][scale] * inner + np.float32(fields["nested_offset"])
        values.append(tensors[f"{NAME}.quant_map"][code] * scale)
    assert {value.dtype for value in values} == {np.dtype(np.float32)}
    return np.array(values).reshape(fields["shape"]).astype(DTYPES[fields["dtype"]])


def assert_same_bits(got, want):
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    np.testing.assert_array_equal(np.ravel(got).view(np.uint8), np.ravel(want).view(np.uint8))


FOUR_BIT = {
    "nf4": {},
    "fp4": {"quant_type": "fp4"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16 so small that it is subnormal": {"dtype": "float16", "scale": 1e-6},
    "nested": {"nested": True, "shape": (40, 32)},
    "nested fp4 in bfloat16": {"nested": True, "quant_type": "fp4", "dtype": "bfloat16", "shape": (40, 32)},
    "stored as bfloat16": {"storage": ml_dtypes.bfloat16, "dtype": "bfloat16"},
    "stored as float32": {"storage": np.float32},
    "blocks across rows": {"shape": (4, 24)},
    "a last block that is not full": {"shape": (5, 9)},
    "one block that is not full": {"shape": (3, 5), "blocksize": 4096},
    "stacked experts": {"shape": (2, 3, 32)},
}


@pytest.mark.parametrize("case", FOUR_BIT)
def test_a_4_bit_weight_has_the_numbers_of_the_format(tmp_path, case):
    tensors = four_bit(**FOUR_BIT[case])
    quant_type = FOUR_BIT[case].get("quant_type", "nf4")
    weights = read_folder(write(tmp_path, tensors))
    assert list(weights) == [NAME]
    weight = weights[NAME]
    assert isinstance(weight, Weight4bit)
    assert (weight.quant_type, weight.absmax.dtype, weight.packed.dtype) == (quant_type, np.float32, np.uint8)
    assert weight.packed.ndim == weight.absmax.ndim == 1
    want = one_by_one(tensors, quant_type)
    assert weight.shape == want.shape
    assert_same_bits(weight.dequantize(), want)
    assert_same_bits(weight.dequantize(), want)  # the first time changed nothing


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (None, "float32"),
        ({}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "float32"),
    ],
)
def test_an_8_bit_weight_has_the_numbers_of_the_format_in_the_dtype_of_the_model(tmp_path, config, dtype):
    tensors = eight_bit((200, 5))  # enough rows for dividing by 127 to show in a last bit
    weight = read_folder(write(tmp_path, tensors, config))[NAME]
    assert isinstance(weight, Weight8bit)
    assert weight.shape == (200, 5)
    steps = [scale * np.float32(1 / 127) for scale in tensors[f"{PREFIX}SCB"]]
    want = [[np.float32(value) * step for value in row] for row, step in zip(tensors[NAME], steps, strict=True)]
    assert_same_bits(weight.dequantize(), np.array(want, np.float32).astype(DTYPES[dtype]))


def test_an_8_bit_weight_of_old_files_without_a_format_is_row_major(tmp_path):
    tensors = eight_bit()
    want = read_folder(write(tmp_path, tensors))[NAME].dequantize()
    del tensors[f"{PREFIX}weight_format"]
    assert_same_bits(read_folder(write(tmp_path, tensors))[NAME].dequantize(), want)


def plain_tensors():
    rng = np.random.default_rng(1)
    return {
        "embed.weight": rng.standard_normal((3, 4)).astype(np.float32),
        "norm.weight": rng.standard_normal(4).astype(ml_dtypes.bfloat16),
        "position_ids": np.arange(4),
        "mask": np.array([True, False]),
        "scalar": np.array(2.5, np.float16),
    }


def test_plain_tensors_are_read_as_they_are_beside_quantized_ones_and_without(tmp_path):
    for quantized in ({}, {**four_bit()}, {**eight_bit()}):
        weights = read_folder(write(tmp_path, {**plain_tensors(), **quantized}))
        assert len(weights) == 5 + bool(quantized)
        for name, want in plain_tensors().items():
            assert_same_bits(weights[name], want)


def test_a_weight_may_be_split_over_the_files_of_an_index(tmp_path):
    tensors = four_bit(nested=True, shape=(40, 32))
    halves = [dict(list(tensors.items())[:2]), {**dict(list(tensors.items())[2:]), **plain_tensors()}]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weights = read_folder(write_shards(tmp_path, dict(zip(names, halves, strict=True))))
    assert set(weights) == {NAME, *plain_tensors()}
    assert_same_bits(weights[NAME].dequantize(), one_by_one(tensors, "nf4"))


def edited_state(tensors, drop=(), **fields):
    state = json.loads(tensors[state_key("nf4")].tobytes()) | fields
    return {**tensors, state_key("nf4"): as_json({key: value for key, value in state.items() if key not in drop})}


def without(tensors, *pieces):
    return {key: value for key, value in tensors.items() if key not in {NAME + piece for piece in pieces}}


NESTED = {"nested": True, "shape": (40, 32)}
MALFORMED = {  # what is in the file, and what the message says
    "no absmax": (without(four_bit(), ".absmax"), r"q_proj\.weight: of its parts, \['absmax'\] are missing"),
    "no quant_map": (without(four_bit(), ".quant_map"), r"\['quant_map'\] are missing"),
    "no quant_state": (without(four_bit(), ".quant_state.bitsandbytes__nf4"), "has no quant_state: exactly one"),
    "no nested_absmax": (without(four_bit(**NESTED), ".nested_absmax"), r"\['nested_absmax'\] are missing"),
    "no nested_quant_map": (without(four_bit(**NESTED), ".nested_quant_map"), r"\['nested_quant_map'\] are missing"),
    "no weight": (without(four_bit(), ""), "the weight itself is missing"),
    "nothing but packed bytes": ({NAME: four_bit()[NAME]}, r"quantized \(uint8\), but .* missing: quant_state"),
    "two quant_states": ({**four_bit(), state_key("fp4"): as_json({})}, r"has \['quant_state.*fp4', .*exactly one"),
    "nested scales, not announced": (
        {**four_bit(), f"{NAME}.nested_absmax": np.ones(1, np.float32)},
        r"\[\] are missing and \['nested_absmax'\] left over",
    ),
    "4 and 8 bits": (
        {**four_bit(), f"{PREFIX}SCB": np.ones(6, np.float32)},
        r"\[\] are missing and \['absmax', .*left over",
    ),
    "unknown quant_type": (
        {**without(four_bit(), ".quant_state.bitsandbytes__nf4"), state_key("af4"): as_json({})},
        r"quant_state\.bitsandbytes__af4 is no known quant_type: \['nf4', 'fp4'\] are read",
    ),
    "another quant_type inside": (edited_state(four_bit(), quant_type="fp4"), r"holds \{'quant_type': 'fp4'\}"),
    "unknown blocksize": (edited_state(four_bit(), blocksize=48), r"holds \{'blocksize': 48\}"),
    "blocksize 0": (edited_state(four_bit(), blocksize=0), r"holds \{'blocksize': 0\}"),
    "unknown dtype": (edited_state(four_bit(), dtype="float64"), r"holds \{'dtype': 'float64'\}"),
    "dtype of another type": (edited_state(four_bit(), dtype=["float32"]), r"holds \{'dtype': \['float32'\]\}"),
    "shape with a zero": (edited_state(four_bit(), shape=[6, 0]), r"holds \{'shape': \[6, 0\]\}"),
    "shape of floats": (edited_state(four_bit(), shape=[6.0, 32]), r"holds \{'shape': \[6\.0, 32\]\}"),
    "no shape": (edited_state(four_bit(), drop=["shape"]), "has the fields .*'shape'"),
    "half of the nested fields": (edited_state(four_bit(**NESTED), drop=["nested_offset"]), "for nested scales all of"),
    "offset that is no number": (edited_state(four_bit(**NESTED), nested_offset=float("nan")), "NaN, which is no JSON"),
    "huge nested blocksize": (edited_state(four_bit(**NESTED), nested_blocksize=2**70), "'nested_blocksize': 1180"),
    "nested dtype": (edited_state(four_bit(**NESTED), nested_dtype="float16"), "'nested_dtype': 'float16'"),
    "an unknown field": (edited_state(four_bit(), order="column"), r"has the fields .*'order'"),
    "a list as quant_state": ({**four_bit(), state_key("nf4"): as_json([1])}, "holds a JSON list, not an object"),
    "no JSON": ({**four_bit(), state_key("nf4"): np.zeros(3, np.uint8)}, "is not valid JSON"),
    "a shape that needs more bytes": (
        edited_state(four_bit(), shape=[6, 34]),
        r"has 96 bytes, 102 are needed for shape \(6, 34\) in 4 bits",
    ),
    "a shape that needs fewer bytes": (edited_state(four_bit(), shape=[5, 32]), "has 96 bytes, 80 are needed"),
    "too few scales": (
        {**four_bit(), f"{NAME}.absmax": np.ones(5, np.float32)},
        r"absmax is float32 \(5,\), it must be float32 \(6,\)",
    ),
    "float16 scales": ({**four_bit(), f"{NAME}.absmax": np.ones(6, np.float16)}, r"must be float32 \(6,\)"),
    "scales of a repacked weight": (
        {**four_bit(), f"{NAME}.absmax": np.ones((1, 6), ml_dtypes.bfloat16)},
        "absmax is bfloat16: bitsandbytes repacked this weight in an eval forward .* save the model before any eval",
    ),
    "quantized scales, not announced": ({**four_bit(), f"{NAME}.absmax": np.ones(6, np.uint8)}, "absmax is uint8"),
    "too few nested scales": (
        {**four_bit(**NESTED), f"{NAME}.nested_absmax": np.ones(1, np.float32)},
        r"nested_absmax is float32 \(1,\), it must be float32 \(2,\)",
    ),
    "short nested_quant_map": (
        {**four_bit(**NESTED), f"{NAME}.nested_quant_map": np.ones(16, np.float32)},
        r"it must be float32 \(256,\)",
    ),
    "short quant_map": ({**four_bit(), f"{NAME}.quant_map": np.ones(15, np.float32)}, r"must be float32 \(16,\)"),
    "quant_map of another type": (
        {**four_bit(), f"{NAME}.quant_map": np.array(CODES["fp4"], np.float32)},
        "quant_map is not the table of nf4",
    ),
    "quant_map of nan": ({**four_bit(), f"{NAME}.quant_map": np.full(16, np.nan, np.float32)}, "not the table of nf4"),
    "int8 without scales": (without({NAME: eight_bit()[NAME]}), r"quantized \(int8\), but .* missing: SCB"),
    "int8 with a format only": (
        {key: value for key, value in eight_bit().items() if not key.endswith("SCB")},
        r"\['SCB'\] are missing",
    ),
    "int8 scales alone": (without(eight_bit(), ""), r"the weight itself is missing, while \['SCB', 'weight_format'\]"),
    "int8 scales of a float weight": (
        {**eight_bit(), NAME: np.ones((6, 5), np.float32)},
        r"has SCB, but is float32 \(6, 5\); an 8-bit weight is int8 \(out, in\)",
    ),
    "int8 scales by column": (
        {**eight_bit(), f"{PREFIX}SCB": np.ones(5, np.float32)},
        r"SCB is float32 \(5,\), it must be float32 \(6,\)",
    ),
    "int8 in tiles": ({**eight_bit(), f"{PREFIX}weight_format": np.array(2, np.uint8)}, "weight_format is 2; only 0"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_weights_are_refused_and_the_message_says_what_is_wrong(tmp_path, case):
    tensors, message = MALFORMED[case]
    write(tmp_path, {**plain_tensors(), **tensors})
    with pytest.raises(
        CheckpointFormatError, match=rf"(?s)malformed weights\. Save the model again.*{message}"
    ) as error:
        read_folder(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert NAME in str(error.value)


def test_all_malformed_weights_are_listed(tmp_path):
    tensors = {f"{i}.weight": np.zeros((2, 1), np.uint8) for i in range(10)}
    with pytest.raises(CheckpointFormatError) as error:
        read_folder(write(tmp_path, tensors))
    assert str(error.value).count("\n") == 9
    assert "... and 2 more" in str(error.value)


def test_the_error_is_a_value_error():
    assert issubclass(CheckpointFormatError, ValueError)


def test_a_dtype_of_the_model_that_cannot_be_is_refused_where_it_matters(tmp_path):
    write(tmp_path, eight_bit(), {"dtype": "float64"})
    with pytest.raises(
        CheckpointFormatError, match=r"config\.json gives the model the dtype 'float64', it must be one"
    ):
        read_folder(tmp_path)
    assert len(read_folder(write(tmp_path, plain_tensors()))) == 5


def test_other_quantizations_are_refused_by_name(tmp_path):
    write(tmp_path, plain_tensors(), {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(CheckpointFormatError, match=r"quantized by 'gptq'; only bitsandbytes' 4 and 8 bits .* torch"):
        read_folder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "[" * 100_000], ids=["cut", "list", "string", "deep"])
def test_a_malformed_config_or_index_is_refused(tmp_path, text):
    write(tmp_path, plain_tensors())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        CheckpointFormatError,
        match=r"config\.json (is not valid JSON|holds a JSON (list|str)|is nested more than 64 levels).* again",
    ):
        read_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        CheckpointFormatError,
        match=r"index\.json (is not valid JSON|holds a JSON (list|str)|is nested more than 64 levels)",
    ):
        read_folder(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", 3])
def test_an_index_may_only_name_files_in_its_folder(tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    write(tmp_path, plain_tensors())
    (inside / "a").mkdir()
    save_file(plain_tensors(), inside / "a" / "b.safetensors")
    write_shards(inside, {"x.safetensors": plain_tensors()}, weight_map={"mask": name})
    with pytest.raises(CheckpointFormatError, match="it may only name files in its own folder"):
        read_folder(inside)


def test_index_and_files_must_agree(tmp_path):
    write_shards(
        tmp_path, {"a.safetensors": plain_tensors()}, weight_map={"mask": "a.safetensors", "x": "a.safetensors"}
    )
    with pytest.raises(CheckpointFormatError, match=r"(?s)x: missing, .*embed\.weight: left over"):
        read_folder(tmp_path)
    write_shards(tmp_path, {"a.safetensors": plain_tensors()}, weight_map={"mask": "b.safetensors"})
    with pytest.raises(
        CheckpointFormatError, match=r"lacks b\.safetensors, which model\.safetensors\.index\.json names"
    ):
        read_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointFormatError, match="has no weight_map"):
        read_folder(tmp_path)


def test_files_that_are_cut_short_or_of_unknown_dtypes_are_refused(tmp_path):
    path = write(tmp_path, plain_tensors()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointFormatError, match="is not a valid safetensors file"):
        read_folder(tmp_path)
    write(tmp_path, {"x.weight": np.zeros(3, np.uint16)})
    with pytest.raises(CheckpointFormatError, match=r"x\.weight: dtype uint16 is not one of"):
        read_folder(tmp_path)


def test_a_folder_without_weights_says_what_it_should_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        read_folder(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(CheckpointFormatError, match=r"pytorch_model-00001-of-00002\.bin, a pickle, .* as safetensors"):
        read_folder(tmp_path)
