"""The fenced blocks of a Markdown page, and how to run them."""

import contextlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
_RESULTS = ROOT / "docs" / "comparison"  # tables that comparison.md shows
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent != _RESULTS)]
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
    for match, following in itertools.pairwise([*found, None]):
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


_CLUSTER_TOOLS = {"export", "gcloud", "kubectl", "sbatch"}  # where nothing of ours is named, no more can be checked


def commands(block):
    """The commands of a `console` block, which is shown and not run: its lines after "$ ", with continued lines."""
    lines = block.code.replace("\\\n", "").splitlines()
    found = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    assert found, f'line {block.line}: no line of this console block begins with "$ ".'
    return found


def check_command(command):
    """A shown command names files that exist, and gives our examples, and `accelerate`, options that they take."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=";&|<>")  # operators are words of their own
    lexer.whitespace_split = True
    words = list(lexer)
    ours = False
    for index, word in enumerate(words):
        if " " in word and "examples/" in word:  # a command for another host
            check_command(word)
            ours = True
        elif word.startswith("examples/"):
            assert (ROOT / word).is_file(), f"{command!r}: there is no {word}"
            ours = True
            _check_options(word, _arguments(words[index + 1 :]), command)
        elif words[index : index + 2] == ["accelerate", "launch"]:
            _check_launch(_arguments(words[index + 2 :]), command)
    assert ours or words[0] in _CLUSTER_TOOLS, f"{command!r}: nothing of this can be checked"


def _arguments(words):
    """The words up to the next operator of the shell."""
    operators = (index for index, word in enumerate(words) if re.fullmatch(r"[&|;<>]+", word))
    return words[: next(operators, len(words))]


def _check_options(file, arguments, command):
    """A script takes the options that are in its source; one of Slurm hands them to the example that it starts."""
    source = (ROOT / file).read_text(encoding="utf-8")
    if file.endswith(".sh"):
        source = (ROOT / re.search(r"examples/\w+\.py", source)[0]).read_text(encoding="utf-8")
    if not file.endswith((".py", ".sh")):
        return
    known = set(re.findall(r'add_argument\("(--[\w-]+)"', source))
    unknown = {word.partition("=")[0] for word in arguments if word.startswith("--")} - known
    assert not unknown, f"{command!r}: {file} does not take {sorted(unknown)}"


def _check_launch(arguments, command):
    from accelerate.commands.launch import launch_command_parser

    try:
        launch_command_parser().parse_args(arguments)
    except SystemExit:
        raise AssertionError(f"{command!r}: accelerate does not take these options") from None
