"""What holds for every numbered example, of whatever stack: one short file that says how to run it."""

import ast
import re
import sys

import pytest

from tests.examples.running import EXAMPLES, docstring

NAMES = sorted(path.name for path in EXAMPLES.glob("[0-9]*.py"))
OWN = {path.stem for path in EXAMPLES.rglob("*.py")}  # what an example must not import: it would not come along
MAX_LINES, MAX_OPTIONS = 200, 8
THIRD_PARTIES = {
    "jax",
    "flax",
    "optax",
    "torch",
    "transformers",
    "numpy",
    "sklearn",
    "matplotlib",
    "peft",
    "accelerate",
}
ALLOWED = {*sys.stdlib_module_names, *THIRD_PARTIES, "interop", "randlora_jax", "randlora_torch"}


def problems(name, source, says):
    """What is wrong with an example, given its source and its docstring."""
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." if node.level else node.module.split(".")[0])
    options, lines, stem = source.count("add_argument("), len(source.splitlines()), name.removesuffix(".py")
    shown = [line for line in says.splitlines() if line.startswith("    ")]  # commands and output
    if imported & OWN or imported - ALLOWED:
        yield f"imports {sorted(imported & OWN | imported - ALLOWED)}"
    if lines > MAX_LINES or options > MAX_OPTIONS:
        yield f"{lines} lines, {options} options"
    if '"--smoke"' not in source:
        yield "has no --smoke"
    if '"--out"' in source and f'"runs/{stem}"' not in source:
        yield f"writes elsewhere than to runs/{stem} by default"
    if not any(f"examples/{name}" in line for line in shown):
        yield "does not show its command"
    if not any(f"examples/{name}" not in line for line in shown):
        yield "does not show its last line"
    if not re.search(r"\babout\s+\S+(\s+\S+)?\s+(seconds?|minutes?)\s+on\s+two\s+CPU\s+cores\b", says):
        yield "does not say how long it takes"


def test_there_are_examples_and_they_are_numbered_without_gaps():
    assert len(NAMES) >= 7
    numbers = [int(name[:2]) for name in NAMES]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_one_short_file_that_says_how_to_run_it_and_what_comes_out(name):
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    assert list(problems(name, source, docstring(name))) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_list_of_examples_names_each_one(name):
    assert f"[{name}]({name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda source: source.replace("import argparse", "import argparse, text"), "imports ['text']"),
        (lambda source: source.replace("import argparse", "from . import text"), "imports ['.']"),
        (lambda source: source.replace("import argparse", "import tqdm"), "imports ['tqdm']"),
        (lambda source: source + "\n" * 200, "lines, "),
        (lambda source: source.replace('"--smoke"', '"--quick"'), "has no --smoke"),
        (lambda source: source.replace('"runs/04_vit_linen"', '"out"'), "writes elsewhere"),
        (lambda source: source.replace("    python examples/04", "    python 04"), "does not show its command"),
        (lambda source: source.replace("    the reloaded", "the reloaded", 1), "does not show its last line"),
        (lambda source: source.replace("on two CPU cores", "on my machine", 1), "does not say how long"),
    ],
)
def test_the_rules_find_what_they_forbid(edit, found):
    source = edit((EXAMPLES / "04_vit_linen.py").read_text(encoding="utf-8"))
    (problem,) = problems("04_vit_linen.py", source, ast.get_docstring(ast.parse(source)))
    assert found in problem
