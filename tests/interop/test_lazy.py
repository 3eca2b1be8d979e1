"""`load(lazy=True)`: the same adapter, its numbers left in the file until they are asked for."""

import dataclasses
import os
import shutil
import threading
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from strategies import KEPT, LAYERS, draw_adalora, draw_adapter

from interop import AdapterFormatError, Factors, load, save
from interop.commands.inspect import Summary
from interop.folder import CONFIG_NAME, WEIGHTS_NAME
from interop.tensorfile import LazyTensor, TensorFileError
from tests.interop.folders import both_files, rewrite, same_arrays

CASES = {
    "one": (draw_adapter(), {"bases": "one"}),
    "none": (draw_adapter(), {"bases": "none"}),
    "per-layer": (draw_adapter(), {"bases": "per-layer"}),
    "sparse": (draw_adapter(sparse=True), {}),
    "adalora": (draw_adalora(kept=KEPT), {}),
    "head": (
        dataclasses.replace(
            draw_adapter(modules_to_save=["head"]),
            saved_weights={"base_model.model.head.weight": np.ones((3, 2), "<f2")},
        ),
        {},
    ),
}


def arrays(adapter):
    return {name: [*map(np.asarray, parts)] for name, parts in adapter.factors.items()}


@pytest.fixture(params=CASES)
def folder(request, tmp_path):
    adapter, options = CASES[request.param]
    save(adapter, tmp_path / "adapter", model_card=False, **options)
    return tmp_path / "adapter"


def test_it_equals_the_adapter_that_is_read_at_once(folder):
    lazy, eager = load(folder, lazy=True), load(folder)
    parts = [part for factors in lazy.factors.values() for part in factors] + [*lazy.saved_weights.values()]
    assert {type(part) for part in parts} == {LazyTensor}
    same_arrays(arrays(lazy), eager.factors)
    same_arrays({"bases": lazy.bases or ()}, {"bases": eager.bases or ()})
    assert {key: np.asarray(value).tobytes() for key, value in lazy.saved_weights.items()} == {
        key: value.tobytes() for key, value in eager.saved_weights.items()
    }
    assert (lazy.config, lazy.shapes, lazy.recipe, lazy.modules) == (
        *(eager.config, eager.shapes, eager.recipe, eager.modules),
    )
    assert lazy.num_trainable == eager.num_trainable
    assert Summary(lazy, (), True).to_dict() == Summary(eager, (), True).to_dict()
    for name in LAYERS:
        np.testing.assert_array_equal(lazy.delta_weight(name), eager.delta_weight(name), strict=True)
    same_arrays(arrays(lazy.bind(LAYERS)), eager.bind(LAYERS).factors)


def test_it_stays_readable_when_the_folder_is_replaced_or_removed(folder):
    lazy, want = load(folder, lazy=True), load(folder)
    save(draw_adapter(99, r=2), folder)
    same_arrays(arrays(lazy), want.factors)
    shutil.rmtree(folder)
    same_arrays(arrays(lazy), want.factors)


@pytest.mark.parametrize("case", CASES)
def test_it_can_be_saved_onto_its_own_folder_and_elsewhere_to_the_same_bytes(tmp_path, case):
    adapter, options = CASES[case]
    save(adapter, tmp_path / "adapter", model_card=False, **options)
    before = both_files(tmp_path / "adapter")
    lazy = load(tmp_path / "adapter", lazy=True)
    for name in ("other", "adapter", "adapter"):
        save(lazy, tmp_path / name, model_card=False, **options)
        assert both_files(tmp_path / name) == before


def test_everything_is_checked_at_once(folder):
    path = folder / WEIGHTS_NAME
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(AdapterFormatError, match=r"SHA-256|differs from another copy|inf or nan"):
        load(folder, lazy=True)


def test_memory_is_that_of_one_layer_at_a_time(tmp_path):
    """Sixteen layers of 4 MB each; no step needs two of them."""
    rng = np.random.default_rng(0)
    shapes = {f"layer{i:02}": (1024, 1024) for i in range(16)}
    factors = {
        name: Factors(rng.standard_normal((1, 1024), np.float32), rng.standard_normal((1024, 1024), np.float32))
        for name in shapes
    }
    adapter = draw_adapter(shapes={"x": (1024, 1024)}, r=1, save_projection=False)
    adapter = dataclasses.replace(adapter, factors=factors, shapes=shapes, bases=None)
    save(adapter, tmp_path)
    size = (tmp_path / WEIGHTS_NAME).stat().st_size
    assert size > 64e6
    tracemalloc.start()
    lazy = load(tmp_path, lazy=True)
    loaded = tracemalloc.get_traced_memory()
    total = sum(float(np.asarray(gamma)[0, 0]) for _, gamma in lazy.factors.values())
    walked = tracemalloc.get_traced_memory()
    save(lazy, tmp_path / "again", model_card=False)
    saved = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == sum(float(gamma[0, 0]) for _, gamma in factors.values())
    assert loaded[0] < 1e6
    assert loaded[1] < 12e6  # a piece of a file and what its check takes; measured 6e6
    assert walked[1] < 14e6
    assert saved[1] < 20e6
    assert both_files(tmp_path / "again") == both_files(tmp_path)


def test_threads_may_read_it_at_the_same_time(tmp_path):
    save(draw_adapter(), tmp_path)
    lazy, want, wrong = load(tmp_path, lazy=True), load(tmp_path), []

    def read():
        for _ in range(50):
            wrong.extend(
                name
                for name, parts in lazy.factors.items()
                if any(np.asarray(a).tobytes() != b.tobytes() for a, b in zip(parts, want.factors[name], strict=True))
            )

    threads = [threading.Thread(target=read) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []


def test_a_file_that_is_cut_later_is_named(tmp_path):
    save(draw_adapter(), tmp_path)
    lazy = load(tmp_path, lazy=True)
    os.truncate(tmp_path / WEIGHTS_NAME, 100)
    with pytest.raises(
        TensorFileError, match=r"adapter_model\.safetensors, the adapter's file, cannot be read any more"
    ):
        lazy.delta_weight("block.0.up")


def test_the_file_is_closed_with_the_last_tensor(tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    save(draw_adapter(), tmp_path)
    path = str(tmp_path / WEIGHTS_NAME)
    lazy = load(tmp_path, lazy=True)
    assert path in opened()
    tensor = lazy.factors["block.0.up"].gamma
    del lazy
    assert path in opened()
    del tensor
    assert path not in opened()
    rewrite(tmp_path, add={"x": np.ones(1, np.float32)})
    with pytest.raises(AdapterFormatError):
        load(tmp_path, lazy=True)
    assert path not in opened()


def opened():
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return [os.readlink(link) for link in links if os.path.islink(link)]


def test_a_file_by_peft_is_read_lazily_too(tmp_path):
    save(draw_adapter(), tmp_path, model_card=False)
    rewrite(tmp_path, metadata={"format": "pt"})
    same_arrays(arrays(load(tmp_path, lazy=True)), load(tmp_path).factors)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_stays_what_it_is(tmp_path, dtype):
    adapter = draw_adapter()
    factors = {name: Factors(*(part.astype(dtype) for part in pair)) for name, pair in adapter.factors.items()}
    save(dataclasses.replace(adapter, factors=factors), tmp_path)
    same_arrays(arrays(load(tmp_path, lazy=True)), factors)
    assert (tmp_path / CONFIG_NAME).exists()
