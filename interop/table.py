"""Tables in plain text, for people and terminals."""

from collections.abc import Iterable, Sequence

from interop.errors import legible


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column, of names that are untrusted, to the left, the others to the right.

    >>> table(["module", "rank"], [["q_proj", "8"], ["mlp.up", "16"]])
    ['module  rank', 'q_proj     8', 'mlp.up    16']
    """
    cells = [list(titles), *([legible(row[0]), *row[1:]] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            [f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]


def size(shape: Sequence[int] | None) -> str:
    """A shape as a cell."""
    return "x".join(map(str, shape)) if shape else "?"
