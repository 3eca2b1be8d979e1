"""`kill -9` at any moment of a save, and several savers at once: the folder holds one adapter, the old or the new."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from strategies import draw_adapter

from interop import load, save
from interop.folder import CONFIG_NAME, WEIGHTS_NAME, replace_pair

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 and fork are POSIX's")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("saving_process.py")
ADAPTERS = {
    "old": draw_adapter(1),
    "new": draw_adapter(2, shapes={"a": (8, 8), "b.c": (16, 4)}, r=2, randlora_alpha=3, save_projection=False),
    "newest": draw_adapter(3, shapes={"z": (5, 4)}, r=3, randlora_alpha=7),
    "values": draw_adapter(4),  # differs from `old` in values only
}
NAMES = {CONFIG_NAME, WEIGHTS_NAME}


def contents(folder):
    """All files by name, with the random part of a name left out."""
    return {re.sub(r"\.[0-9a-f]{16}\.", ".*.", path.name): path.read_bytes() for path in sorted(folder.iterdir())}


def identity(adapter):
    """All that an adapter is, comparable and hashable."""
    arrays = [("bases", adapter.bases), *sorted(adapter.factors.items())]
    parts = tuple((name, part.shape, str(part.dtype), part.tobytes()) for name, pair in arrays for part in pair)
    return adapter.config.to_json(), parts


def found(folder):
    """Which adapter the folder holds for `load`; None if none."""
    before = contents(folder)
    try:
        adapter = load(folder)
    except FileNotFoundError:
        adapter = None
    assert contents(folder) == before, "load is read-only"
    return adapter and identity(adapter)


def pair(folder):
    """What a reader sees who looks for the two files and knows nothing of a save; None if one is missing."""
    files = contents(folder)
    return tuple(files[name] for name in sorted(NAMES)) if files.keys() >= NAMES else None


@pytest.fixture
def sources(tmp_path):
    """A folder for each adapter."""
    for name, adapter in ADAPTERS.items():
        save(adapter, tmp_path / "sources" / name)
    return tmp_path / "sources"


def process(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def killed_saves(tasks):
    """For each (old, new), the distinct folders that saves of `new` over `old` leave when killed at each line."""
    outcomes = [start.with_name(f"{start.name}, killed") for start, _ in tasks]
    lines = [[str(path) for path in (*task, outcome)] for task, outcome in zip(tasks, outcomes, strict=True)]
    running = process("lines", json.dumps(lines))
    errors = running.communicate(timeout=60)[1]
    assert running.returncode == 0, errors
    for outcome in outcomes:
        folders = sorted(outcome.iterdir())
        assert len(folders) > 30, "the trace saw the save"
        yield distinct(folders)


def distinct(folders):
    first = {}
    for folder in folders:
        first.setdefault(str(contents(folder)), folder)
    return list(first.values())


def by_peft(folder):
    """Take our notes from the weights: PEFT writes none."""
    save_file(load_file(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME, {"format": "pt"})


def edited(folder):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"randlora_alpha": 11}))


def without_weights(folder):
    (folder / WEIGHTS_NAME).unlink()


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


STARTS = {
    "by us": (lambda folder: None, "new"),
    "by PEFT": (by_peft, "new"),
    "edited by hand": (edited, "new"),
    "edited by hand, then saved as before": (edited, "values"),
    "with the same config": (lambda folder: None, "values"),
    "without weights": (without_weights, "new"),
    "empty": (empty, "new"),
}


def assert_old_or_new(folders, old, new):
    """The law: each folder is one of the two for `load`, both occur, and in order; PEFT finds the same or no config."""
    whole = {found(old): pair(old), found(new): pair(new)}
    results = [found(folder) for folder in folders]
    assert set(results) == whole.keys()
    assert results == sorted(results, key=list(whole).index), "no way back"
    for folder, result in zip(folders, results, strict=True):
        assert pair(folder) in (None, whole[result])


def assert_cleaned_up_by_a_save(folders, sources):
    for folder in folders:
        save(ADAPTERS["values"], folder)
        assert contents(folder) == contents(sources / "values")


def start_of(case, sources, folder):
    """The folder that a case starts from, and the one with what is saved over it."""
    change, source = STARTS[case]
    shutil.copytree(sources / "old", folder)
    change(folder)
    return folder, sources / source


def test_a_save_killed_at_any_line_leaves_the_old_adapter_or_the_new_one(tmp_path, sources):
    cases = ("by us", "by PEFT", "with the same config")
    tasks = [start_of(case, sources, tmp_path / case) for case in cases]
    for (old, new), folders in zip(tasks, killed_saves(tasks), strict=True):
        assert_old_or_new(folders, old, new)
        assert_cleaned_up_by_a_save(folders, sources)


def kills(adapter, folder, copies):
    """What kills at each line of a save would leave in the folder: distinct copies of it, taken while it runs."""

    def trace(frame, event, _):
        if frame.f_code.co_filename != replace_pair.__code__.co_filename:
            return None
        if event == "line":
            shutil.copytree(folder, copies / f"{len(os.listdir(copies)):03d}")
        return trace

    copies.mkdir()
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        save(adapter, folder)
    finally:
        sys.settrace(before)
    return distinct(sorted(copies.iterdir()))


OFTEN = ("by PEFT", "edited by hand, then saved as before", "without weights", "empty")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in OFTEN else pytest.mark.slow) for case in STARTS]
)
def test_a_second_kill_while_the_next_save_cleans_up_loses_nothing_either(tmp_path, sources, case, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what was written, the kernel keeps
    monkeypatch.setattr("interop.folder.PAUSE", 0)
    old, new = start_of(case, sources, tmp_path / "start")
    once = kills(load(new), shutil.copytree(old, tmp_path / "once"), tmp_path / "once_killed")
    assert_old_or_new(once, old, new)
    first = found(old)
    for number, folder in enumerate(once):
        before = old if found(folder) == first else new
        twice = kills(ADAPTERS["newest"], folder, tmp_path / f"twice_killed_{number}")
        assert_old_or_new(twice, before, sources / "newest")
        assert_cleaned_up_by_a_save(twice, sources)


def test_a_process_that_saves_by_turns_and_is_killed_at_random_leaves_one_of_its_adapters(tmp_path, sources):
    pick = random.Random(0)
    folder = tmp_path / "adapter"
    want = {found(sources / name): pair(sources / name) for name in ("old", "new")}
    for _ in range(8):
        running = process("turns", folder, sources / "old", sources / "new")
        assert running.stdout.readline() == "saving\n", running.stderr.read()
        time.sleep(pick.uniform(0, 0.05))
        running.kill()
        running.communicate()
        assert pair(folder) in (None, want[found(folder)])
    save(ADAPTERS["newest"], folder)
    assert contents(folder) == contents(sources / "newest")


def test_while_processes_save_to_one_folder_every_load_gives_one_of_their_adapters(tmp_path, sources):
    folder = tmp_path / "adapter"
    names = ("old", "new", "newest")
    savers = [process("turns", folder, *(sources / name for name in names)) for _ in range(2)]
    try:
        assert [saver.stdout.readline() for saver in savers] == ["saving\n"] * 2
        seen, end = [], time.monotonic() + 1.5
        while time.monotonic() < end:
            seen.append(identity(load(folder)))
    finally:
        for saver in savers:
            saver.kill()
            saver.communicate()
    assert len(set(seen)) > 1
    assert set(seen) <= {found(sources / name) for name in names}
    assert pair(folder) in {None, *(pair(sources / name) for name in names)}
    save(ADAPTERS["values"], folder)
    assert contents(folder) == contents(sources / "values")
