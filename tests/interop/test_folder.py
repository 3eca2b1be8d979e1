"""The pair of files in a folder: failures while it is replaced, savers and readers at once, edits, leftovers."""

import functools
import itertools
import json
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from strategies import draw_adapter

from interop import folder as module
from interop import load
from interop import save as save_with_card
from interop.folder import BACKUP_NAME, CONFIG_NAME, WEIGHTS_NAME, digest, replace_pair

OLD = draw_adapter(1)
NEW = draw_adapter(2, shapes={"a": (8, 8), "b.c": (16, 4)}, r=2, randlora_alpha=3, save_projection=False)
save = functools.partial(save_with_card, model_card=False)  # the card is no part of the pair
BOTH = [CONFIG_NAME, WEIGHTS_NAME]


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def written(adapter, folder):
    """The files of an adapter, as a save to an empty folder writes them."""
    save(adapter, folder)
    return files(folder)


@pytest.fixture
def old(tmp_path):
    return written(OLD, tmp_path / "old")


@pytest.fixture
def new(tmp_path):
    return written(NEW, tmp_path / "new")


@pytest.fixture
def folder(tmp_path):
    save(OLD, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def without_lock(monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)


def holds(folder, *adapters):
    """Whether `load` gives one of these."""
    got = load(folder)
    return any(is_same(got, adapter) for adapter in adapters)


def is_same(got, adapter):
    if got.factors.keys() != adapter.factors.keys() or got.config.randlora_alpha != adapter.config.randlora_alpha:
        return False
    pairs = ((got.factors[name], pair) for name, pair in adapter.factors.items())
    return all(np.array_equal(x, y) for parts in pairs for x, y in zip(*parts, strict=True))


def failing_at(call, number, *, forever=False):
    """The function `os.<call>`, failing when it is called for the `number`-th time, and perhaps ever after."""
    real, calls = getattr(os, call), []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == number or (forever and len(calls) > number):
            raise OSError("disk full")
        return real(*arguments)

    return fails


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize(
    ("call", "number", "outcome"),
    [("fsync", 1, OLD), ("fsync", 2, OLD), ("replace", 1, OLD), ("replace", 2, OLD), ("replace", 3, NEW)],
)
def test_a_save_that_fails_leaves_one_adapter_whole_and_nothing_else(
    folder, monkeypatch, call, number, outcome, locked
):
    if not locked:
        monkeypatch.setattr(module, "fcntl", None)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing_at(call, number))
        with pytest.raises(OSError, match="disk full"):
            save(NEW, folder)
    assert sorted(os.listdir(folder)) == BOTH
    assert holds(folder, outcome)
    assert json.loads((folder / CONFIG_NAME).read_text())["r"] == outcome.config.r


@pytest.mark.parametrize(("number", "outcome"), [(1, OLD), (2, OLD), (3, NEW)])
def test_a_disk_that_fails_for_good_leaves_what_load_and_the_next_save_understand(folder, monkeypatch, number, outcome):
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing_at("replace", number, forever=True))
        with pytest.raises(OSError, match="disk full"):
            save(NEW, folder)
    assert holds(folder, outcome)
    save(draw_adapter(3), folder)
    assert holds(folder, draw_adapter(3))
    assert sorted(os.listdir(folder)) == BOTH


def test_a_file_that_cannot_be_removed_does_not_fail_a_save_that_is_done(folder, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", failing_at("unlink", 1, forever=True))
        save(NEW, folder)
    assert holds(folder, NEW)
    assert BACKUP_NAME in os.listdir(folder)
    save(NEW, folder)
    assert sorted(os.listdir(folder)) == BOTH


def half_of_it():
    yield b"half of it"
    raise KeyboardInterrupt


def test_an_interrupt_while_writing_leaves_the_old_files_and_no_other(folder, old):
    with pytest.raises(KeyboardInterrupt):
        replace_pair(folder, b"{}", half_of_it())
    assert files(folder) == old


def interrupt_at_line(number):
    """Trace function that presses Ctrl-C before the `number`-th line that runs in interop/folder.py."""
    lines = []

    def trace(frame, event, _):
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            lines.append(frame.f_lineno)
            if len(lines) == number:
                raise KeyboardInterrupt
        return trace

    return trace


def interrupted(adapter, folder, number):
    """Whether a save got as far as that line. In a thread of its own, for an interrupt may confuse a traced one."""

    def traced():
        sys.settrace(interrupt_at_line(number))
        save(adapter, folder)

    with ThreadPoolExecutor(1) as pool:
        return isinstance(pool.submit(traced).exception(), KeyboardInterrupt)


def test_an_interrupt_at_any_line_of_a_save_leaves_the_old_adapter_or_the_new_one(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    outcomes = []
    for number in itertools.count(1):
        target = shutil.copytree(folder, tmp_path / str(number))
        if not interrupted(NEW, target, number):
            break
        outcomes.append(holds(target, NEW))
        assert outcomes[-1] or holds(target, OLD)
        again = shutil.copytree(target, tmp_path / "again", dirs_exist_ok=True)
        save(OLD, again)
        assert sorted(os.listdir(again)) == BOTH
    assert holds(target, NEW)
    assert len(outcomes) > 50
    assert set(outcomes) == {True, False}
    assert outcomes == sorted(outcomes), "no way back"


def test_a_lock_that_is_never_released_delays_a_save_but_does_not_stop_it(folder, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    save(NEW, folder)
    os.close(handle)
    assert holds(folder, NEW)
    assert sorted(os.listdir(folder)) == BOTH


@pytest.mark.parametrize("moment", ["_write", "_sync"])
def test_a_signal_handler_may_save_in_the_middle_of_a_save(folder, monkeypatch, moment):
    adapter = draw_adapter(3, randlora_alpha=5)
    monkeypatch.setattr(module, "PATIENCE", 10)
    saves_before(moment, monkeypatch, folder, [adapter])
    start = time.monotonic()
    save(NEW, folder)
    assert time.monotonic() - start < 9, "it waited for itself"
    assert holds(folder, NEW if moment == "_write" else adapter)
    assert sorted(os.listdir(folder)) == BOTH


def test_threads_that_save_to_one_folder_take_turns(folder, old, new):
    errors = []

    def saves(adapter):
        try:
            for _ in range(20):
                save(adapter, folder)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=saves, args=(adapter,)) for adapter in (OLD, NEW, OLD, NEW)]
    for thread in threads:
        thread.start()
    loads = 0
    while any(thread.is_alive() for thread in threads):
        assert holds(folder, OLD, NEW)
        loads += 1
    assert errors == []
    assert loads > 0
    assert files(folder) in (old, new)


@pytest.mark.usefixtures("without_lock")
def test_without_a_lock_threads_that_save_to_one_folder_leave_one_adapter_or_an_error(folder, old, new):
    errors = []

    def save_once(adapter, barrier):
        barrier.wait()
        try:
            save(adapter, folder)
        except OSError as error:
            errors.append(error)

    for _ in range(40):
        errors.clear()
        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=save_once, args=(adapter, barrier)) for adapter in (OLD, NEW)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        left = {name: content for name, content in files(folder).items() if name in BOTH}
        assert left in (old, new) or errors


@pytest.mark.parametrize("locked", [True, False], ids=["in a signal handler", "without a lock"])
def test_a_mixed_pair_is_an_error_of_the_last_saver(folder, monkeypatch, locked):
    if not locked:
        monkeypatch.setattr(module, "fcntl", None)
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == 3:  # between the weights and the config of one save, another one runs
            save(draw_adapter(3, randlora_alpha=5), folder)
        real(source, target)

    message = (
        r"adapter was saved to by two processes at once, and now holds the weights of one and the config of the other,"
        r" as they could not take turns\. Save the adapter again, from one process\."
    )
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(OSError, match=message):
            save(NEW, folder)
    save(NEW, folder)
    assert holds(folder, NEW)


def saves_before(function, monkeypatch, folder, adapters):
    """Let a save of the next adapter finish just before each call of a function of the module."""
    real, turns = getattr(module, function), iter(adapters)

    def called(*arguments):
        with monkeypatch.context() as patched:
            patched.setattr(module, function, real)
            adapter = next(turns, None)
            if adapter is not None:
                save(adapter, folder)
        return real(*arguments)

    monkeypatch.setattr(module, function, called)


@pytest.mark.parametrize("blind", [False, True], ids=["seen by the version", "seen by the hash"])
def test_a_save_between_the_weights_and_the_config_of_a_load_is_noticed(folder, monkeypatch, blind):
    if blind:
        monkeypatch.setattr(module, "_version", lambda _: (0,))
    saves_before("_config_of", monkeypatch, folder, [NEW])
    assert holds(folder, NEW)


def test_a_save_over_files_by_peft_while_they_are_read_is_noticed(folder, monkeypatch):
    save_file(load_file(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME, {"format": "pt"})
    saves_before("_config_of", monkeypatch, folder, [draw_adapter(3, randlora_alpha=5)])
    assert holds(folder, draw_adapter(3, randlora_alpha=5))


def test_a_config_that_moves_while_one_looks_for_it_is_found_after_all(folder, monkeypatch):
    """Two looks are overtaken by saves; the third sees the config neither in place nor beside it."""
    saves_before("_config_of", monkeypatch, folder, [NEW, OLD])
    saving, looks = module._config_of, []

    def look(*arguments):
        looks.append(saving(*arguments))
        return None if len(looks) == 3 else looks[-1]

    monkeypatch.setattr(module, "_config_of", look)
    assert holds(folder, OLD)
    assert len(looks) == 4


def test_a_load_that_never_finds_rest_says_so(folder, monkeypatch):
    monkeypatch.setattr(module, "LOOKS", 4)
    saves_before("_config_of", monkeypatch, folder, [NEW, OLD] * 4)
    message = (
        r"adapter was saved to 4 times while it was read: it must rest for a moment to be read\. Load it again when the"
        r" process that saves there is done\."
    )
    with pytest.raises(OSError, match=message):
        load(folder)


def test_a_config_edited_by_hand_is_the_one_that_counts(folder):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"randlora_alpha": 11}))
    assert load(folder).config.randlora_alpha == 11
    save(load(folder), folder)
    assert load(folder).config.randlora_alpha == 11


def test_weights_record_the_hash_of_the_config_text_beside_them(folder):
    (_, config), (_, weights) = files(folder).items()
    assert f'config_sha256\\": \\"{digest(config)}\\"'.encode() in weights


def test_the_config_of_other_weights_is_not_taken_for_a_lost_one(folder, old, new):
    """Weights of a save that was killed, whose new config someone has removed since."""
    (folder / CONFIG_NAME).rename(folder / BACKUP_NAME)
    (folder / WEIGHTS_NAME).write_bytes(new[WEIGHTS_NAME])
    with pytest.raises(FileNotFoundError, match=r"adapter holds no adapter_config\.json\.$"):
        load(folder)
    (folder / WEIGHTS_NAME).write_bytes(old[WEIGHTS_NAME])
    assert holds(folder, OLD)
    save(NEW, folder)
    assert files(folder) == new


LEFTOVERS = [f".{name}.0123456789abcdef.new" for name in BOTH]
FOREIGN = [".adapter_config.json.swp", "adapter_config.json.old", "adapter_config.json.new", ".adapter_config.json.new"]


def test_a_save_removes_what_a_killed_one_left_and_nothing_else(folder):
    for name in (*LEFTOVERS, *FOREIGN, BACKUP_NAME):
        (folder / name).write_text(name)
    save(NEW, folder)
    assert sorted(os.listdir(folder)) == sorted([*BOTH, *FOREIGN])


def test_what_a_killed_save_left_is_gone_before_a_save_needs_its_space(folder):
    for name in LEFTOVERS:
        (folder / name).write_text(name)

    def parts():
        assert not {*LEFTOVERS} & {*os.listdir(folder)}
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        replace_pair(folder, b"{}", parts())


@pytest.mark.usefixtures("without_lock")
def test_without_a_lock_new_files_of_others_stay_until_they_are_an_hour_old(folder):
    for name, minutes in zip(LEFTOVERS, (50, 70), strict=True):
        (folder / name).write_text(name)
        os.utime(folder / name, (time.time() - 60 * minutes,) * 2)
    save(NEW, folder)
    assert sorted(os.listdir(folder)) == [LEFTOVERS[0], *BOTH]


def test_new_files_have_ordinary_permissions(folder):
    ordinary = folder / "ordinary"
    ordinary.write_bytes(b"")
    save(NEW, folder)
    assert {(folder / name).stat().st_mode for name in BOTH} == {ordinary.stat().st_mode}
