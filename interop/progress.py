"""A progress bar for the command line, without a dependency: on stderr, and only where somebody looks at it."""

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
Progress = Callable[[Collection[Any], str], Iterable[Any]]  # items, and what is done to them -> the items
WIDTH, INTERVAL = 30, 0.1  # characters, seconds between two looks


def no_progress(items: Collection[Item], what: str) -> Collection[Item]:
    """The items."""
    return items


def progress(items: Collection[Item], what: str) -> Iterator[Item]:
    """Go through items, with a bar that says how many are done and how long the rest will take."""
    shown = sys.stderr.isatty() and len(items) > 1
    started, last = time.monotonic(), -INTERVAL
    for done, item in enumerate(items):
        now = time.monotonic()
        if shown and now - last >= INTERVAL:
            last = now
            _draw(what, done, len(items), now - started)
        yield item
    if shown:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _draw(what: str, done: int, total: int, seconds: float) -> None:
    bar = "#" * (WIDTH * done // total)
    left = f", {seconds / done * (total - done):.0f} s left" if done else ""
    print(f"\r\x1b[K{what} [{bar:<{WIDTH}}] {done}/{total}{left}", end="", file=sys.stderr, flush=True)
