"""What holds for every numbered example, of whatever stack: one short file that says how to run it."""

import ast
import re

import pytest

from tests.examples.running import EXAMPLES, docstring

NAMES = sorted(path.name for path in EXAMPLES.glob("[0-9]*.py"))
OURS = {path.stem for path in EXAMPLES.rglob("*.py")}  # what an example must not import: it would not come along
MAX_LINES, MAX_OPTIONS = 200, 8
EXPERIMENTS = {"11_compare_flax.py", "12_compare_torch.py"}  # half of them is tables and pictures
RUN_TIME = re.compile(r"\b\w+ (seconds?|minutes?) on two (idle )?CPU cores\b")


def problems(name, source, says):
    """What is wrong with an example, given its source and its docstring."""
    siblings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            siblings |= OURS & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            siblings |= {"."} if node.level else OURS & {node.module.split(".")[0]}
    options, lines, stem = source.count("add_argument("), len(source.splitlines()), name.removesuffix(".py")
    output = [line for line in says.splitlines() if line.startswith("    ") and f"examples/{name}" not in line]
    if siblings:
        yield f"imports {sorted(siblings)}"
    if lines > MAX_LINES * (1 + (name in EXPERIMENTS)) or options > MAX_OPTIONS:
        yield f"{lines} lines, {options} options"
    if '"--smoke"' not in source:
        yield "has no --smoke"
    if f"runs/{stem}" not in source.replace(says, ""):
        yield f"writes elsewhere than to runs/{stem} by default"
    if f"python examples/{name}" not in says:
        yield "does not show its command"
    if not output:
        yield "does not show its last line"
    if not RUN_TIME.search(" ".join(says.split())):
        yield "does not say how long it takes"


def test_no_two_examples_have_one_number():
    numbers = [name[:2] for name in NAMES]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_one_short_file_that_says_how_to_run_it_and_what_comes_out(name):
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    assert list(problems(name, source, docstring(name))) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_list_of_examples_names_each_one(name):
    assert f"[{name}]({name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("import argparse", "import argparse, text", "imports ['text']"),
        ("import argparse", "from text import batches", "imports ['text']"),
        ("import argparse", "from . import text", "imports ['.']"),
        ("import argparse", "import argparse" + "\n" * 100, "lines, "),
        ('"--smoke"', '"--quick"', "has no --smoke"),
        ('"runs/04_vit_linen"', '"out"', "writes elsewhere than to runs/04_vit_linen"),
        ("python examples/04", "python 04", "does not show its command"),
        ("\n    the reloaded", "\nthe reloaded", "does not show its last line"),
        ("on two CPU cores", "on my machine", "does not say how long"),
    ],
)
def test_the_rules_find_what_they_forbid(old, new, found):
    source = (EXAMPLES / "04_vit_linen.py").read_text(encoding="utf-8").replace(old, new, 1)
    (problem,) = problems("04_vit_linen.py", source, ast.get_docstring(ast.parse(source), clean=False))
    assert found in problem
