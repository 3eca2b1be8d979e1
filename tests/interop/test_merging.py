"""Adapters merged into folders of models, written here: numbers, names, files, refusals, memory."""

import dataclasses
import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import oracle
import pytest
from safetensors.numpy import load_file, save_file
from strategies import KEPT, LAYERS, draw_adalora, draw_adapter

import interop
from interop import AdapterFormatError, merge
from interop.blockwise import rounded
from interop.bnb import CheckpointFormatError, read_folder
from interop.commands import merge as command
from tests.interop.test_bnb import eight_bit, four_bit

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FORMAT = {"format": "pt"}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def oracle_delta(adapter, module):
    factors = adapter.factors[module]
    if isinstance(factors, interop.SVDFactors):
        return oracle.svd_delta_weight(*factors, scaling=adapter.config.scaling)
    shape = adapter.shapes[module]
    return oracle.delta_weight(*adapter.bases, *factors, scaling=adapter.config.scaling, shape=shape)


def base_tensors(dtype=np.float32, prefix="", layers=LAYERS):
    rng = np.random.default_rng(5)
    tensors = {f"{prefix}{name}.weight": rng.standard_normal(shape).astype(dtype) for name, shape in layers.items()}
    tensors[f"{prefix}norm.weight"] = rng.standard_normal(7).astype(dtype)
    tensors[f"{prefix}block.0.up.bias"] = rng.standard_normal(12).astype(dtype)
    tensors[f"{prefix}ids"] = np.arange(3)
    return tensors


def write(folder, tensors, config=None, *, shards=1):
    """A model's folder, with other files beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", "hidden": 3} if config is None else config))
    (folder / "tokenizer.json").write_text("{}")
    tensors = {key: np.array(value, order="C") for key, value in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", FORMAT)
        return folder
    names = sorted(tensors)
    parts = {SHARDS[0]: names[::2], SHARDS[1]: names[1::2]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file, FORMAT)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {
        "metadata": {"total_size": size, "total_parameters": 9},
        "weight_map": {key: file for file, keys in parts.items() for key in keys},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder):
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def assert_nothing_left(folder, *, allowed):
    assert sorted(path.name for path in folder.iterdir()) == sorted(allowed)


def same_bits(got, want):
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


def nearest(exact, dtype):
    """Float64 to `dtype` by search among all its numbers: the nearest, of two the even one."""
    if dtype == np.float32:
        return exact.astype(np.float32)
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        values = every[np.isfinite(every)]
    values = np.unique(values.astype(np.float64)).astype(dtype)
    wide = values.astype(np.float64)
    middles = (wide[:-1] + wide[1:]) / 2
    index = np.searchsorted(middles, exact)
    tie = exact == middles[np.minimum(index, middles.size - 1)]
    return values[index + (tie & (values.view(np.uint16)[index] % 2 == 1))]


ADAPTERS = {
    "randlora": draw_adapter,
    "sparse": lambda: draw_adapter(sparse=True, r=5),
    "adalora": draw_adalora,
    "adalora, pruned": lambda: draw_adalora(kept=KEPT),
}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_each_weight_becomes_w_plus_dw_rounded_once_and_all_else_stays(tmp_path, kind, dtype, shards):
    adapter, tensors = ADAPTERS[kind](), base_tensors(dtype)
    base = write(tmp_path / "base", tensors, shards=shards)
    report = merge(adapter, base, tmp_path / "merged")
    got = read(tmp_path / "merged")
    assert got.keys() == tensors.keys()
    for name in adapter.modules:
        exact = tensors[f"{name}.weight"].astype(np.float64) + oracle_delta(adapter, name)
        same_bits(got[f"{name}.weight"], nearest(exact, np.dtype(dtype)))
        error = np.linalg.norm(got[f"{name}.weight"].astype(np.float64) - exact)
        assert report.rounding[name].of_weight == pytest.approx(error / np.linalg.norm(exact), rel=1e-6)
        update = np.linalg.norm(oracle_delta(adapter, name))
        if update:
            assert report.rounding[name].of_update == pytest.approx(error / update, rel=1e-6)
    for key in tensors.keys() - {f"{name}.weight" for name in adapter.modules}:
        same_bits(got[key], tensors[key])
    assert report.modules == adapter.modules
    assert report.files == (("model.safetensors",) if shards == 1 else SHARDS)
    written = [path.name for path in (tmp_path / "merged").iterdir()]
    assert sorted(written) == sorted(path.name for path in base.iterdir())
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    for file in report.files:
        assert (tmp_path / "merged" / file).stat().st_size - (base / file).stat().st_size in range(-64, 65)
    assert report.bytes_written == sum((tmp_path / "merged" / file).stat().st_size for file in report.files)
    if shards == 2:
        before, after = (folder / "model.safetensors.index.json" for folder in (base, tmp_path / "merged"))
        assert json.loads(after.read_text()) == json.loads(before.read_text())


def test_rounding_to_16_bits_is_rounding_once():
    rng = np.random.default_rng(0)
    for dtype, unit in ((BFLOAT16, 2.0**-8), (np.dtype(np.float16), 2.0**-11)):
        ties = 1 + unit * (2 * np.arange(8) + 1)  # halfway between neighbors
        values = np.concatenate([ties, ties + 2.0**-40, ties - 2.0**-40, -ties - 2.0**-40, rng.standard_normal(64)])
        same_bits(rounded(values, dtype), nearest(values, dtype))


@pytest.mark.parametrize("block", [1, 7, 60, 1 << 20])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_blocks_are_the_update_whatever_their_size(kind, block):
    adapter = ADAPTERS[kind]()
    for module in adapter.modules:
        got = np.full(adapter.shapes[module], np.nan)
        for index, values in adapter.delta_blocks(module, size=block):
            assert np.isnan(got[index]).all()
            got[index] = values
        np.testing.assert_allclose(got, oracle_delta(adapter, module), rtol=1e-12, atol=1e-12)


def test_an_adapter_folder_without_bases_or_shapes_is_bound_to_the_base(tmp_path):
    adapter, tensors = draw_adapter(save_projection=False, sparse=True), base_tensors()
    interop.save(adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path), path, FORMAT)  # as PEFT leaves it: no notes
    assert interop.load(tmp_path / "adapter").bases is None
    merge(tmp_path / "adapter", write(tmp_path / "base", tensors), tmp_path / "merged")
    for name in LAYERS:
        want = tensors[f"{name}.weight"] + oracle_delta(adapter, name)
        np.testing.assert_allclose(read(tmp_path / "merged")[f"{name}.weight"], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("own", "files"), [("", "transformer."), ("transformer.", ""), ("model.", "")])
def test_one_prefix_more_or_less_in_the_base_is_the_same_model(tmp_path, own, files):
    layers = {f"{own}{name}": shape for name, shape in LAYERS.items()}
    saved = {f"base_model.model.{own}block.0.up.base_layer.bias": np.full(12, 2, np.float32)}
    adapter = dataclasses.replace(draw_adapter(shapes=layers, bias="all"), saved_weights=saved)
    tensors = base_tensors(prefix=files)
    report = merge(adapter, write(tmp_path / "base", tensors), tmp_path / "merged")
    got = read(tmp_path / "merged")
    assert got.keys() == tensors.keys()
    for name in LAYERS:
        want = tensors[f"{files}{name}.weight"] + oracle_delta(adapter, own + name)
        np.testing.assert_allclose(got[f"{files}{name}.weight"], want, rtol=1e-6, atol=1e-6)
    assert report.replaced == (f"{files}block.0.up.bias",)
    same_bits(got[f"{files}block.0.up.bias"], np.full(12, 2, np.float32))


def test_names_that_fit_twice_or_not_at_all_are_listed(tmp_path):
    tensors = base_tensors(prefix="a.") | base_tensors(prefix="b.")
    with pytest.raises(ValueError, match=r"fit more than one part of the base:\n  - .* -> a\.block\.0\.down\.weight\n"):
        merge(draw_adapter(), write(tmp_path / "twice", tensors), tmp_path / "merged")
    with pytest.raises(ValueError, match=r"(?s)lacks these adapted layers, .*'other\.weight'.*\n  - block\.0\.down\.w"):
        merge(draw_adapter(), write(tmp_path / "other", {"other.weight": np.ones((2, 2))}), tmp_path / "merged")
    tensors = base_tensors()
    del tensors["block.1.mix.weight"]
    with pytest.raises(ValueError, match=r"\):\n  - block\.1\.mix\.weight$"):
        merge(draw_adapter(), write(tmp_path / "less", tensors), tmp_path / "merged")
    assert_nothing_left(tmp_path, allowed=["twice", "other", "less"])


@pytest.mark.parametrize("how", ["by the flag", "by the kind of model", "recorded shapes, a linear layer among them"])
def test_conv1d_weights_are_stored_in_out_also_square_ones(tmp_path, how):
    names = {"h.c_attn": (12, 6), "h.c_fc": (8, 8), "lm_head": (10, 6)}
    flag = how != "by the kind of model"
    adapter = draw_adapter(shapes=names, fan_in_fan_out=flag)
    config = {} if flag else {"model_type": "gpt2"}
    rng = np.random.default_rng(2)
    plain = {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in names.items()}
    stored = {key: value if "lm_head" in key else np.ascontiguousarray(value.T) for key, value in plain.items()}
    merge(adapter, write(tmp_path / "base", stored, config), tmp_path / "merged")
    got = read(tmp_path / "merged")
    for name in names:
        want = plain[f"{name}.weight"] + oracle_delta(adapter, name)
        value = got[f"{name}.weight"] if name == "lm_head" else got[f"{name}.weight"].T
        np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-6)


def test_convolutions_take_adaloras_update_as_rows(tmp_path):
    adapter = draw_adalora(shapes={"conv": (6, 4 * 3 * 2)})
    weight = np.random.default_rng(0).standard_normal((6, 4, 3, 2)).astype(np.float32)
    merge(adapter, write(tmp_path / "base", {"conv.weight": weight}), tmp_path / "merged")
    want = weight + oracle_delta(adapter, "conv").reshape(weight.shape)
    np.testing.assert_allclose(read(tmp_path / "merged")["conv.weight"], want, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"conv\.weight has the shape \(6, 4, 3, 2\): RandLoRA adapts matrices\. Is"):
        merge(draw_adapter(shapes={"conv": (6, 24)}), tmp_path / "base", tmp_path / "other")


def with_saved(saved, **fields):
    return dataclasses.replace(
        draw_adapter(**fields), saved_weights={f"base_model.model.{k}": v for k, v in saved.items()}
    )


def test_trained_weights_replace_the_bases_in_its_dtype_and_new_heads_are_added(tmp_path):
    rng = np.random.default_rng(1)
    saved = {
        "norm.weight": rng.standard_normal(7).astype(np.float32),
        "block.0.up.base_layer.bias": rng.standard_normal(12).astype(np.float32),
        "score.weight": rng.standard_normal((2, 6)).astype(np.float32),
    }
    adapter = with_saved(saved, modules_to_save=["norm", "score"], bias="all")
    base = write(tmp_path / "base", base_tensors(BFLOAT16), shards=2)
    report = merge(adapter, base, tmp_path / "merged")
    got = read(tmp_path / "merged")
    same_bits(got["norm.weight"], saved["norm.weight"].astype(BFLOAT16))
    same_bits(got["block.0.up.bias"], saved["block.0.up.base_layer.bias"].astype(BFLOAT16))
    same_bits(got["score.weight"], saved["score.weight"])
    assert (report.replaced, report.added) == (("block.0.up.bias", "norm.weight"), ("score.weight",))
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["score.weight"] == SHARDS[1]
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in got.values()), "total_parameters": 9 + 12}


SAVED_THAT_DO_NOT_FIT = {
    "a bias that no layer has": ({"block.1.mix.bias": np.ones(8, np.float32)}, {"bias": "all"}, "no place for these"),
    "another shape": (
        {"norm.weight": np.ones(8, np.float32)},
        {"modules_to_save": ["norm"]},
        r"norm\.weight: the base has \(7,\), the adapter \(8,\)$",
    ),
    "another vocabulary": (
        {"ids": np.ones((9, 2), np.float32)},
        {"modules_to_save": ["ids"]},
        r"\(model\.resize_token_embeddings in transformers",
    ),
    "floats for integers": ({"ids": np.ones(3, np.float32)}, {"modules_to_save": ["ids"]}, "has int64, the adapter fl"),
}


@pytest.mark.parametrize("case", SAVED_THAT_DO_NOT_FIT)
def test_trained_weights_that_do_not_fit_are_refused(tmp_path, case):
    saved, fields, message = SAVED_THAT_DO_NOT_FIT[case]
    with pytest.raises(ValueError, match=message):
        merge(with_saved(saved, **fields), write(tmp_path / "base", base_tensors()), tmp_path / "merged")
    assert_nothing_left(tmp_path, allowed=["base"])


TIED = {"architectures": ["TinyForCausalLM"], "tie_word_embeddings": True}
HEAD = {"lm_head": (10, 6), "mlp": (6, 6)}


def test_tied_output_embeddings_are_untied_if_trained_and_refused_if_they_cannot_be(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {key: rng.standard_normal((10, 6)).astype(np.float32) for key in ("embed_tokens.weight", "head")}
    tensors["mlp.weight"] = rng.standard_normal((6, 6)).astype(np.float32)
    head = tensors.pop("head")
    base = write(tmp_path / "base", tensors, TIED)
    with pytest.raises(ValueError, match=r"lm_head: it is tied to the input embeddings, .* untie the two"):
        merge(draw_adapter(shapes=HEAD), base, tmp_path / "merged")
    alone = with_saved({"embed_tokens.weight": head}, shapes={"mlp": (6, 6)}, modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match=r"ties its output to these embeddings, .*untie.*\n  - embed_tokens\.weight$"):
        merge(alone, base, tmp_path / "merged")
    assert_nothing_left(tmp_path, allowed=["base"])
    adapter = with_saved({"lm_head.base_layer.weight": head}, shapes=HEAD)
    report = merge(adapter, base, tmp_path / "merged")
    assert report.added == ("lm_head.weight",)
    got = read(tmp_path / "merged")
    np.testing.assert_allclose(got["lm_head.weight"], head + oracle_delta(adapter, "lm_head"), rtol=1e-6, atol=1e-6)
    same_bits(got["embed_tokens.weight"], tensors["embed_tokens.weight"])
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == {**TIED, "tie_word_embeddings": False}


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("start", [np.float32, BFLOAT16, np.float64])
def test_all_floating_point_weights_are_stored_in_the_dtype_asked_for_rounded_once(tmp_path, start, name):
    adapter, tensors, dtype = draw_adapter(), base_tensors(start), interop.merging.FLOATS[name]
    config = {"dtype": "x", "text_config": {"torch_dtype": "x"}, "vision_config": {"dtype": None}}
    merge(adapter, write(tmp_path / "base", tensors, config), tmp_path / "merged", dtype=name)
    got = read(tmp_path / "merged")
    same_bits(got["ids"], tensors["ids"])
    same_bits(got["norm.weight"], nearest(tensors["norm.weight"].astype(np.float64), dtype))
    for module in LAYERS:
        exact = tensors[f"{module}.weight"].astype(np.float64) + adapter.delta_weight(module)
        same_bits(got[f"{module}.weight"], nearest(exact, dtype))
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == {
        "dtype": name,
        "text_config": {"torch_dtype": name},
        "vision_config": {"dtype": None},
    }


def test_numbers_that_are_not_finite_in_the_end_are_refused(tmp_path):
    tensors = base_tensors()
    tensors["norm.weight"][0] = 1e5
    base = write(tmp_path / "base", tensors)
    with pytest.raises(ValueError, match=r"norm\.weight: holds numbers that are too large for float16\. Choose bfloat"):
        merge(draw_adapter(), base, tmp_path / "merged", dtype="float16")
    tensors["block.1.mix.weight"][3, 3] = np.nan
    base = write(tmp_path / "base", tensors)
    with pytest.raises(ValueError, match=r"block\.1\.mix, block\.1\.mix\.weight: W \+ dW is not finite in float32"):
        merge(draw_adapter(), base, tmp_path / "merged")
    assert_nothing_left(tmp_path, allowed=["base"])


def test_adapters_pickles_other_weights_and_sub_folders_are_left_out_and_named(tmp_path):
    base = write(tmp_path / "base", base_tensors())
    left = ["adapter_config.json", "flax_model.msgpack", "optimizer.pt", "other.safetensors", "pytorch_model.bin"]
    for name in [*left, "vocab.txt", "modeling_tiny.py", "README.md"]:
        (base / name).write_text(name)
    (base / "onnx").mkdir()
    (base / "linked.txt").symlink_to(base / "vocab.txt")
    report = merge(draw_adapter(), base, tmp_path / "merged")
    assert sorted(report.left_out) == sorted([*left, "onnx/"])
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {path.name for path in base.iterdir()} - {*left, "onnx"}
    assert (tmp_path / "merged" / "linked.txt").read_text() == "vocab.txt"
    assert not (tmp_path / "merged" / "linked.txt").is_symlink()


def test_the_target_must_be_another_folder_and_empty(tmp_path):
    base = write(tmp_path / "base", base_tensors())
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(ValueError, match="is the base itself, which is not changed"):
        merge(draw_adapter(), base, tmp_path / "base" / ".." / "base")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match=r"full is not empty: nothing is overwritten\. Remove it first, or name"):
        merge(draw_adapter(), base, tmp_path / "full")
    with pytest.raises(FileExistsError, match="is a file"):
        merge(draw_adapter(), base, tmp_path / "full" / "notes")
    (tmp_path / "empty").mkdir()
    merge(draw_adapter(), base, tmp_path / "empty")
    merge(draw_adapter(), base, tmp_path / "deep" / "down")
    assert read(tmp_path / "empty").keys() == read(tmp_path / "deep" / "down").keys() == base_tensors().keys()
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert_nothing_left(tmp_path, allowed=["base", "full", "empty", "deep"])


def test_an_exception_at_any_step_leaves_nothing_and_a_whole_folder_or_none_is_seen(tmp_path):
    base = write(tmp_path / "base", base_tensors(), shards=2)
    count = len(base_tensors())
    for stop in range(count + 1):

        def interrupted(steps, what, stop=stop):
            assert (len(steps), what) == (count, "merging")
            for number, step in enumerate(steps):
                assert not (tmp_path / "deep").exists() or os.listdir(tmp_path / "deep") != ["merged"]
                if number == stop:
                    raise KeyboardInterrupt
                yield step

        if stop == count:
            merge(draw_adapter(), base, tmp_path / "deep" / "merged", progress=interrupted)
        else:
            with pytest.raises(KeyboardInterrupt):
                merge(draw_adapter(), base, tmp_path / "deep" / "merged", progress=interrupted)
            assert_nothing_left(tmp_path, allowed=["base"])
    assert_nothing_left(tmp_path / "deep", allowed=["merged"])


ARGUMENTS = {
    "dtype": (
        {"dtype": "float64"},
        r"dtype='float64' is not known: choose one of \['float32', 'float16', 'bfloat16'\]",
    ),
    "quantized": ({"quantized": "keep"}, r"quantized='keep' is not known: choose one of"),
    "both": ({"dtype": "float32", "quantized": "requantize"}, r"quantized weights have their own\. Drop one"),
    "not quantized": ({"quantized": "requantize"}, r"quantized='requantize', but .*base is not quantized\. Drop the"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_are_not_allowed_are_refused(tmp_path, case):
    arguments, message = ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        merge(draw_adapter(), write(tmp_path / "base", base_tensors()), tmp_path / "merged", **arguments)
    assert_nothing_left(tmp_path, allowed=["base"])


def test_another_base_model_is_refused(tmp_path):
    tensors = base_tensors(layers={**LAYERS, "block.0.up": (14, 6)})
    with pytest.raises(
        AdapterFormatError, match=r"block\.0\.up: the model has \(14, 6\), the adapter was made for \(12"
    ):
        merge(draw_adapter(), write(tmp_path / "base", tensors), tmp_path / "merged")
    tensors = base_tensors() | {"block.1.mix.weight": np.ones((8, 8), np.int32)}
    with pytest.raises(ValueError, match=r"block\.1\.mix\.weight is int32: an update can only be added to floating"):
        merge(draw_adapter(), write(tmp_path / "base", tensors), tmp_path / "merged")
    write(tmp_path / "base", tensors, {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(CheckpointFormatError, match="quantized by 'gptq'"):
        merge(draw_adapter(), tmp_path / "base", tmp_path / "merged")


FOUR_BIT = {"shape": (40, 32)}
QUANTIZED = {
    "nf4": four_bit(**FOUR_BIT),
    "fp4 in bfloat16": four_bit(**FOUR_BIT, quant_type="fp4", dtype="bfloat16"),
    "nested": four_bit(**FOUR_BIT, nested=True),
    "stored as bfloat16": four_bit(**FOUR_BIT, storage=ml_dtypes.bfloat16),
    "int8": eight_bit((40, 32)),
}
MODULE = "model.layers.0.self_attn.q_proj"
TWIN = MODULE.replace("q_proj", "k_proj")


def quantized_base(folder, case, *, shards=1):
    tensors = QUANTIZED[case]
    tensors = tensors | {key.replace("q_proj", "k_proj"): value for key, value in tensors.items()}
    tensors |= {"norm.weight": np.ones(3, np.float32)}
    config = {"dtype": "float16", "quantization_config": {"quant_method": "bitsandbytes"}, "x": 1}
    return write(folder, tensors, config, shards=shards)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("case", QUANTIZED)
def test_a_quantized_base_becomes_a_plain_model_in_its_own_dtype(tmp_path, case, shards):
    adapter = draw_adapter(shapes={MODULE: (40, 32)})
    base = quantized_base(tmp_path / "base", case, shards=shards)
    merge(adapter, base, tmp_path / "merged")
    old, got = read_folder(base), read(tmp_path / "merged")
    assert got.keys() == old.keys() == {f"{MODULE}.weight", f"{TWIN}.weight", "norm.weight"}
    same_bits(got[f"{TWIN}.weight"], old[f"{TWIN}.weight"].dequantize())
    before = old[f"{MODULE}.weight"]
    exact = oracle_delta(adapter, MODULE) + (
        before.values * before.scales[:, None].astype(np.float64) if case == "int8" else before.dequantize()
    )
    same_bits(got[f"{MODULE}.weight"], nearest(exact, before.dtype))
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == {"dtype": "float16", "x": 1}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("case", QUANTIZED)
def test_requantizing_keeps_the_format_and_every_byte_that_no_adapter_touches(tmp_path, case, shards):
    adapter = draw_adapter(shapes={MODULE: (40, 32)})
    base = quantized_base(tmp_path / "base", case, shards=shards)
    report = merge(adapter, base, tmp_path / "merged", quantized="requantize")
    old, new = read(base), read(tmp_path / "merged")
    assert new.keys() == old.keys()
    constant = ("quant_map", "nested_quant_map", "weight_format")
    for key in old:
        if not key.startswith(MODULE) or key.endswith(constant) or (case != "nested" and "quant_state" in key):
            same_bits(new[key], old[key])
        elif "quant_state" not in key:
            assert (new[key].dtype, new[key].shape) == (old[key].dtype, old[key].shape)
            assert new[key].tobytes() != old[key].tobytes()
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    exact = read_folder(base)[f"{MODULE}.weight"].dequantize().astype(np.float64) + oracle_delta(adapter, MODULE)
    got = read_folder(tmp_path / "merged")[f"{MODULE}.weight"].dequantize().astype(np.float64)
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert report.rounding[MODULE].of_weight == pytest.approx(error, rel=0.02)  # int8: float16 in `dequantize`
    assert error < (0.02 if case == "int8" else 0.2)


def test_malformed_quantized_weights_are_found_whether_adapted_or_not(tmp_path):
    base = quantized_base(tmp_path / "base", "nf4")
    tensors = read(base)
    del tensors[f"{TWIN}.weight.quant_state.bitsandbytes__nf4"]
    write(tmp_path / "base", tensors)
    adapter = draw_adapter(shapes={MODULE: (40, 32)})
    with pytest.raises(
        CheckpointFormatError,
        match=r"k_proj\.weight: has no quant_state: exactly one quant_state\.bitsandbytes__nf4\|fp4 is needed",
    ):
        merge(adapter, base, tmp_path / "merged")
    tensors = read(quantized_base(tmp_path / "base", "nf4"))
    tensors[f"{MODULE}.weight.absmax"] = np.ones(3, np.float32)
    write(tmp_path / "base", tensors)
    with pytest.raises(
        CheckpointFormatError, match=r"q_proj\.weight: the base's weight is malformed: absmax is float32"
    ):
        merge(adapter, base, tmp_path / "merged")
    assert_nothing_left(tmp_path, allowed=["base"])


def test_memory_holds_the_bases_and_one_layer_whatever_the_model_has(tmp_path):
    shapes = {f"layers.{i}.up": (1024, 512) for i in range(12)}
    interop.save(draw_adapter(shapes=shapes, r=32), tmp_path / "adapter")
    rng = np.random.default_rng(0)
    weights = {
        f"{name}.weight": rng.standard_normal(shape, np.float32).astype(BFLOAT16) for name, shape in shapes.items()
    }
    base = write(tmp_path / "base", weights, shards=2)
    adapter = interop.load(tmp_path / "adapter", lazy=True)
    bases = sum(basis.nbytes for basis in adapter.bases)
    tracemalloc.start()
    merge(adapter, base, tmp_path / "merged")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    blocks = 5 * 8 * interop.blockwise.BLOCK  # float64 arrays of a block at a time
    assert peak < bases + weights["layers.0.up.weight"].nbytes + blocks


def run_command(*arguments):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_merges_and_says_what_it_did(tmp_path, monkeypatch, capsys):
    interop.save(
        with_saved({"score.weight": np.ones((2, 6), np.float32)}, modules_to_save=["score"]), tmp_path / "adapter"
    )
    write(tmp_path / "base", base_tensors())
    (tmp_path / "base" / "old.bin").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert run_command("adapter", "base", "merged", "--dtype", "bfloat16") == 0
    out = capsys.readouterr().out
    assert out.startswith("3 layers merged, ")
    assert "\nadded     score.weight\nleft out  old.bin\nrounding  at most " in out
    assert run_command("adapter", "base", "again", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["modules"] == sorted(LAYERS)
    assert set(report["rounding"]["block.0.up"]) == {"of_weight", "of_update"}
    assert report["left_out"] == ["old.bin"]
    with pytest.raises(ValueError, match="is not quantized"):
        run_command("adapter", "base", "third", "--requantize")
