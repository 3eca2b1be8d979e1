"""How far a loop has come: a bar where somebody watches, a log line every n steps where nobody does."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(iterable: Iterable[Item], *, total: int, describe: Callable[[], str], every: int) -> Iterator[Item]:
    """The first `total` items of `iterable`; every `every` steps, `describe()` is asked how it goes, for stderr."""
    watched = sys.stderr.isatty()
    with tqdm(total=total, ascii=True, disable=not watched) as bar:
        for step, item in zip(range(1, total + 1), iterable, strict=False):
            yield item
            bar.update()
            if step % every and step != total:
                continue
            if watched:
                bar.set_postfix_str(describe())
            else:
                print(f"step {step:>5}/{total}  {describe()}", file=sys.stderr, flush=True)
