"""The fenced blocks of a Markdown page, and how to run them."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
_ROADS = re.compile(r"^<!-- road: (?P<names>[\w ]+?) -->\s*\Z", re.MULTILINE)  # on a line of its own before a fence


class Block(NamedTuple):
    """A block with its line in the page, the output that the page shows in a `text` block right after it, its roads."""

    language: str
    code: str
    line: int
    output: str | None
    roads: tuple[str, ...] = ()


def blocks(page):
    """All blocks of a page in order, except those of output."""
    text = page.read_text(encoding="utf-8")
    found = list(_FENCE.finditer(text))
    for match, following in zip(found, [*found[1:], None], strict=True):
        if match["language"] == "text":
            continue
        shown = following is not None and following["language"] == "text"
        follows = shown and not text[match.end() : following.start()].strip()
        line = text.count("\n", 0, match.start()) + 2
        roads = _ROADS.search(text, 0, match.start())
        names = tuple(roads["names"].split()) if roads else ()
        yield Block(match["language"], match["code"], line, following["code"] if follows else None, names)


def run(block, page, namespace):
    """Run a block of Python or shell in the working directory; it prints what the page says that it prints."""
    printed = _python(block, page, namespace) if block.language == "python" else _shell(block.code)
    if block.output is not None:
        assert printed == block.output, f"{page.name}, line {block.line}"


def _python(block, page, namespace):
    printed = io.StringIO()
    code = "\n" * (block.line - 1) + block.code  # so that a traceback names the line of the page
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(page), "exec"), namespace)  # the pages are ours
    return printed.getvalue()


def _shell(code):
    """What a shell prints, with this environment's programs first on its path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=300)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout
