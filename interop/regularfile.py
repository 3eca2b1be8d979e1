"""Opening what ought to be a file: in an untrusted folder it may be a pipe, on which `open` waits for ever."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_PIECE = 1 << 16  # bytes


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file, or a link to one, to read it.

    Raises:
        FileNotFoundError: there is none, or a folder, a pipe, a device, or a link to itself in its place.
    """
    try:
        handle = os.open(path, _FLAGS)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENODEV) or Path(path).is_dir():
            raise FileNotFoundError(f"{path} is not a regular file.") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise FileNotFoundError(f"{path} is not a regular file.")
        return open(handle, "rb", buffering=0)
    except BaseException:
        os.close(handle)
        raise


def read_at_most(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a regular file, cut after `limit` + 1 bytes, so that the caller sees that it is longer.

    Raises:
        FileNotFoundError: see `open_regular`.
    """
    parts, left = [], limit + 1
    with open_regular(path) as file:
        while left and (part := file.read(min(left, _PIECE))):
            parts.append(part)
            left -= len(part)
    return b"".join(parts)
