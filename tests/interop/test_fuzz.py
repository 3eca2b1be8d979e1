"""Mutated adapter folders, ours and PEFT's: `load` gives what the files say, or raises `AdapterFormatError`."""

import dataclasses
import signal
import time
import tracemalloc
import warnings

import ml_dtypes
import numpy as np
import pytest
from strategies import KEPT, draw_adalora, draw_adapter

from interop import AdapterFormatError, Factors, load, save
from interop import folder as module
from interop.folder import CONFIG_NAME, WEIGHTS_NAME
from tests.conftest import ROOT
from tests.interop import fuzzing
from tests.interop.folders import same_arrays, weights

GOLDEN = ROOT / "tests" / "golden" / "peft-0.21.2"
SECONDS, BYTES = 20, 50e6  # of one load; measured, they are 5 ms and 1 MB
NO_RECIPE = r".*neither holds its bases nor names their recipe"
HALF = np.dtype(ml_dtypes.bfloat16)


def in_half(adapter):
    factors = {name: Factors(*(part.astype(HALF) for part in pair)) for name, pair in adapter.factors.items()}
    saved = {"base_model.model.head.weight": np.arange(6, dtype=np.float16).reshape(2, 3)}
    return dataclasses.replace(adapter, factors=factors, saved_weights=saved)


OURS = {
    "one": (draw_adapter(1), "one"),
    "none": (draw_adapter(2, recipe="torch<=2.11"), "none"),
    "per-layer": (draw_adapter(3), "per-layer"),
    "bfloat16": (in_half(draw_adapter(4, modules_to_save=["head"], bias="all")), "one"),
    "sparse": (draw_adapter(5, sparse=True, r=3), "one"),
    "very-sparse": (draw_adapter(6, very_sparse=True, base_model_name_or_path="org/base"), "none"),
    "adalora": (draw_adalora(7, kept=KEPT), None),
    "adalora-whole": (draw_adalora(8, dtype=np.float16, task_type="CAUSAL_LM"), None),
}
PEFTS = ("copies", "canonical", "per-layer", "none", "bfloat16", "float16", "adalora", "two", "two/other")


def files_of(folder):
    return {"config": (folder / CONFIG_NAME).read_bytes(), "weights": (folder / WEIGHTS_NAME).read_bytes()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The files of all folders by name, and by their notes the adapters that the sealed ones of ours hold."""
    found, sealed = {f"peft/{name}": files_of(GOLDEN / name) for name in PEFTS}, {}
    for name, (adapter, bases) in OURS.items():
        folder = tmp_path_factory.mktemp(name)
        save(adapter, folder, bases=bases, model_card=False)
        found[f"ours/{name}"] = files_of(folder)
        sealed[weights(folder)[1]["randlora"]] = load(folder)
    return found, sealed


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0)


@pytest.fixture(autouse=True)
def _no_hanging():
    def interrupt(*_):
        raise TimeoutError(f"not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def measured():
    """Memory is counted, at the price of twice the time."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


def read(files, folder, *, lazy):
    """The adapter, or None if it is refused; everything else about the call is asserted."""
    (folder / CONFIG_NAME).write_bytes(files["config"])
    (folder / WEIGHTS_NAME).write_bytes(files["weights"])
    if tracemalloc.is_tracing():
        tracemalloc.reset_peak()
    before, start = tracemalloc.get_traced_memory()[0], time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", NO_RECIPE, UserWarning)
            return load(folder, lazy=lazy)
    except AdapterFormatError as error:
        check_message(str(error), folder)
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert tracemalloc.get_traced_memory()[1] - before < BYTES
        assert time.monotonic() - start < SECONDS


def check_message(message, folder):
    assert str(folder) in message
    assert len(message) < 6000
    assert message.replace("\n", "").isprintable()


def check(seed, folders, folder):
    """One mutation; returns whether it was read."""
    found, originals = folders
    files, resealed = fuzzing.mutate(seed, found)
    adapter = read(files, folder, lazy=seed % 4 == 0)
    if adapter is None:
        return False
    fuzzing.check_reading(adapter, files, folder / "scratch")
    notes = weights(folder)[1] or {}
    if "randlora" in notes and not resealed:  # then nothing but the config can be another
        original = originals[notes["randlora"]]
        same_arrays({name: [*map(np.asarray, parts)] for name, parts in adapter.factors.items()}, original.factors)
        same_arrays({"bases": adapter.bases or ()}, {"bases": original.bases or ()})
        assert (adapter.shapes, adapter.recipe) == (original.shapes, original.recipe)
        assert adapter.saved_weights.keys() == original.saved_weights.keys()
    return True


def check_all(seeds, folders, folder):
    read_ones = 0
    for seed in seeds:
        try:
            read_ones += check(seed, folders, folder)
        except Exception as error:
            raise AssertionError(f"mutation {seed} of test_fuzz.py: {type(error).__name__}: {error}") from error
    assert 0.02 < read_ones / len(seeds) < 0.5, "the mutations are too weak or too strong to say much"


@pytest.mark.usefixtures("measured")
def test_what_is_not_mutated_passes_the_checks(folders, tmp_path):
    for files in folders[0].values():
        for lazy in (False, True):
            adapter = read(files, tmp_path, lazy=lazy)
            fuzzing.check_reading(adapter, files, tmp_path / "scratch")


@pytest.mark.parametrize("block", range(5))
def test_a_mutated_folder_is_read_as_what_it_says_or_refused(folders, tmp_path, block):
    check_all(range(block * 100, block * 100 + 100), folders, tmp_path)


@pytest.mark.usefixtures("measured")
@pytest.mark.slow
@pytest.mark.parametrize("block", range(1, 11))
def test_ten_thousand_mutated_folders_are_read_as_what_they_say_or_refused(folders, tmp_path, block):
    check_all(range(block * 1000, block * 1000 + 1000), folders, tmp_path)


def files_with(content, bit, config):
    content = bytearray(content)
    content[bit // 8] ^= 1 << bit % 8
    return {"config": config, "weights": bytes(content)}


def flipped_bits_that_are_read(folder, bits):
    files = files_of(folder)
    return [bit for bit in bits if read(files_with(files["weights"], bit, files["config"]), folder, lazy=False)]


TINY = {
    "RandLoRA": draw_adapter(shapes={"a": (2, 3)}, r=2),
    "AdaLoRA": draw_adalora(shapes={"a": (2, 3)}, kept={"a": (False, True, True, False)}),
}


@pytest.mark.parametrize("method", TINY)
def test_every_flipped_bit_of_every_tensor_is_found(tmp_path, method):
    save(TINY[method], tmp_path, model_card=False)
    content = (tmp_path / WEIGHTS_NAME).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert flipped_bits_that_are_read(tmp_path, range(8 * start, 8 * len(content))) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", TINY)
def test_every_flipped_bit_of_the_header_is_found_but_in_the_entry_that_says_nothing(tmp_path, method):
    save(TINY[method], tmp_path, model_card=False)
    content = (tmp_path / WEIGHTS_NAME).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    says_nothing = content.index(b'"format":"pt"')
    read_ones = {bit // 8 - says_nothing for bit in flipped_bits_that_are_read(tmp_path, range(8 * start))}
    assert read_ones <= {*range(1, 7), 10, 11}
