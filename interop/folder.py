"""The two files of an adapter folder as one: a kill at any moment of a save leaves the old pair or the new one.

A save that changes the config goes by steps, and what is missing from a folder tells how far a killed one came:
  1. both new files are written beside their places, as `.<name>.<token>.new`;
  2. the old config moves to `.adapter_config.json.old`: PEFT, which knows nothing of this, finds no mixed adapter;
  3. the new weights move into place;  4. so does the new config;  5. the old config is removed.
If the config stays the same, only the weights move. The weights record the hash of their config, as a second witness.
"""

import contextlib
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from interop.errors import AdapterFormatError, legible
from interop.regularfile import read_at_most
from interop.strictjson import MAX_BYTES, JSONError, parse_object
from interop.tensorfile import TensorFile, TensorFileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
NAMES = (CONFIG_NAME, WEIGHTS_NAME)
BACKUP_NAME = f".{CONFIG_NAME}.old"
NOTES_KEY, CONFIG_HASH = "randlora", "config_sha256"  # where in the metadata weights know their config by its hash
LOOKS, SURE, PAUSE = 50, 3, 0.01  # looks at a folder, looks that make sure of what seems wrong, seconds between them
PATIENCE, STALE = 600.0, 3600.0  # seconds to wait for another saver, and after which its files count as forgotten

_this_thread = threading.local()


class ConfigFile(NamedTuple):
    """A config as it was read, and where."""

    path: Path
    content: bytes


def digest(config: bytes) -> str:
    """The SHA-256 by which weights know the config they were saved with."""
    return hashlib.sha256(config).hexdigest()


def replace_pair(directory: Path, config: bytes, weights: Iterable[Any]) -> None:
    """Put a config and the buffers of a weights file in the place of the folder's pair. Savers take turns, if they can.

    An exception leaves the old pair, or the new one if it comes after step 3, and nothing else.

    Raises:
        OSError: a file cannot be written; or two savers could not take turns and left a mixed pair.
    """
    token = secrets.token_hex(8)
    new_config, new_weights = (directory / _new(name, token) for name in NAMES)
    with _only_saver(directory) as alone:
        if alone:
            _settle(directory, alone, token)
        try:
            _write(new_weights, weights)
            if _content(directory / CONFIG_NAME) == config:
                os.replace(new_weights, directory / WEIGHTS_NAME)
            else:
                _write(new_config, [config])
                with contextlib.suppress(FileNotFoundError):  # the folder had none
                    os.replace(directory / CONFIG_NAME, directory / BACKUP_NAME)
                os.replace(new_weights, directory / WEIGHTS_NAME)
                os.replace(new_config, directory / CONFIG_NAME)
            _sync(directory)
        finally:
            _settle(directory, alone, token)
        _require_pair(directory)


@contextlib.contextmanager
def open_pair(directory: Path) -> Iterator[tuple[TensorFile, ConfigFile]]:
    """Open the weights and read the config that belongs to them, also while a save replaces both or after its kill.

    While the weights stay the same, the config in place is theirs, or one edited by hand: see the steps above. But
    inode and time may repeat by chance or come from a cache, and a config may move while one looks for it: so another
    hash or no config at all is believed only when these weights have shown it several times.

    Raises:
        FileNotFoundError: the folder or one of its two files does not exist.
        AdapterFormatError: the only weights are a pickle.
        TensorFileError: the weights are no valid safetensors file.
        OSError: saves go on so fast that no look at the folder falls between two of them.
    """
    path = directory / WEIGHTS_NAME
    doubted: list[tuple[int, ...]] = []
    for _ in range(LOOKS):
        if not path.is_file():
            raise _missing(directory, WEIGHTS_NAME if (directory / CONFIG_NAME).is_file() else CONFIG_NAME)
        with TensorFile(path) as file:
            before, recorded = _version(file.fileno()), _recorded_hash(file)
            config = _config_of(directory, recorded)
            as_expected = config is not None and recorded in (None, digest(config.content))
            if _version(path) == before and (as_expected or doubted.count(before) + 1 >= SURE):
                if config is None:
                    raise _missing(directory, CONFIG_NAME)
                yield file, config
                return
        doubted.append(before)
        time.sleep(PAUSE)
    raise OSError(
        f"{directory} was saved to {LOOKS} times while it was read: it must rest for a moment to be read. Load it again"
        " when the process that saves there is done."
    )


def _config_of(directory: Path, recorded: str | None) -> ConfigFile | None:
    """The config in place, else the one that a killed save left for the weights in place, which recorded this hash."""
    place = directory / CONFIG_NAME
    content = _content(place)
    if content is not None:
        return ConfigFile(place, content)
    tokens = {name: {path.name.split(".")[-2] for path in _new_files(directory, name)} for name in NAMES}
    for token in sorted(tokens[CONFIG_NAME] - tokens[WEIGHTS_NAME]):  # killed between steps 3 and 4
        path = directory / _new(CONFIG_NAME, token)
        content = _content(path)
        if content is not None and digest(content) == recorded:
            return ConfigFile(path, content)
    path = directory / BACKUP_NAME
    content = _content(path)
    # Weights without a hash are PEFT's, hence old; with another hash, their config was edited by hand since. But if no
    # new weights wait beside them, step 3 was done, and the config that belongs to them is lost.
    if content is not None and (recorded in (None, digest(content)) or tokens[CONFIG_NAME] & tokens[WEIGHTS_NAME]):
        return ConfigFile(path, content)
    return None


def _settle(directory: Path, alone: bool, token: str) -> None:
    """Finish an interrupted save, or undo it if its weights were not in place yet, and remove what is left of it.

    Where another process may be saving, its unfinished business is left to it, and its new files until they are stale.
    """
    place = directory / CONFIG_NAME
    if not place.exists() and (alone or (directory / _new(CONFIG_NAME, token)).exists()):
        config = _config_of(directory, _hash_in(directory / WEIGHTS_NAME))
        if config is not None:
            os.replace(config.path, place)
    for path in [path for name in NAMES for path in _new_files(directory, name)]:
        if alone or token in path.name or _is_stale(path):
            _remove(path)
    if place.exists():
        _remove(directory / BACKUP_NAME)


@contextlib.contextmanager
def _only_saver(directory: Path) -> Iterator[bool]:
    """Wait until no other thread or process saves here; False where there is no lock, or its owner does not let go.

    A kill ends the lock. This thread never waits for itself: a signal handler may save in the middle of a save, and an
    interrupt may have kept an earlier save from letting go.
    """
    handle, alone = None, False
    try:
        if not getattr(_this_thread, "saves", False):
            with contextlib.suppress(OSError):  # Windows; some network file systems; a folder that may not be listed
                handle = os.open(directory, os.O_RDONLY)
                alone = _this_thread.saves = _locked(handle)
        yield alone
    finally:
        if handle is not None:
            if alone and fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough if a child was forked meanwhile
                _this_thread.saves = False
            os.close(handle)


def _locked(handle: int) -> bool:
    if fcntl is None:
        return False  # type: ignore[unreachable] # where mypy runs, it is there
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(PAUSE)


def _require_pair(directory: Path) -> None:
    """The last of several savers sees what is left in the end, so a mixed pair never goes unnoticed."""
    recorded, content = _hash_in(directory / WEIGHTS_NAME), _content(directory / CONFIG_NAME)
    if recorded and content is not None and recorded != digest(content):
        raise OSError(
            f"{directory} was saved to by two processes at once, and now holds the weights of one and the config of the"
            " other, as they could not take turns. Save the adapter again, from one process."
        )


def _new(name: str, token: str) -> str:
    return f".{name}.{token}.new"


def _new_files(directory: Path, name: str) -> list[Path]:
    return list(directory.glob(_new(name, "*")))


def _write(path: Path, parts: Iterable[Any]) -> None:
    with open(path, "xb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Bring renames to the disk, where directories can be synchronized."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # the pair is complete without this; the next save tries again
        os.unlink(path)


def _is_stale(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > STALE
    except FileNotFoundError:
        return False


def _content(path: Path) -> bytes | None:
    try:
        return read_at_most(path, MAX_BYTES)  # `parse_object` refuses what is longer
    except FileNotFoundError:
        return None


def _version(file: Path | int) -> tuple[int, ...]:
    """What tells a file from another one in its place."""
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _hash_in(weights: Path) -> str | None:
    try:
        with TensorFile(weights) as file:
            return _recorded_hash(file)
    except (FileNotFoundError, TensorFileError):
        return None


def _recorded_hash(file: TensorFile) -> str | None:
    """The config's hash in the weights' notes; None for PEFT's weights. What is malformed is for `load` to refuse."""
    try:
        recorded = parse_object(file.metadata[NOTES_KEY].encode())[CONFIG_HASH]
    except (JSONError, KeyError):
        return None
    return recorded if isinstance(recorded, str) else None


def adapter_folders(directory: Path) -> list[str]:
    """Names of the sub-folders that hold an adapter: PEFT writes one for each adapter that is not called "default"."""
    inside = (child for child in directory.iterdir() if not child.is_symlink())
    return sorted(child.name for child in inside if (child / CONFIG_NAME).is_file())


def _missing(directory: Path, name: str) -> Exception:
    if not directory.is_dir():
        return FileNotFoundError(f"{directory} is not a folder. Pass the folder that holds {CONFIG_NAME}.")
    if name == WEIGHTS_NAME and (directory / "adapter_model.bin").exists():
        return AdapterFormatError(
            f"{directory} holds adapter_model.bin, a pickle, which can run code when it is read. Load it with PEFT and"
            " write it again with model.save_pretrained(folder, safe_serialization=True)."
        )
    if os.path.lexists(directory / name):
        return FileNotFoundError(f"{directory / name} is not a regular file, nor a link to one.")
    inside = adapter_folders(directory)
    hint = (
        f" Its sub-folders {legible(inside)} do, one per adapter name: pass adapter_name, or one of them."
        if inside
        else ""
    )
    return FileNotFoundError(f"{directory} holds no {name}.{hint}")
