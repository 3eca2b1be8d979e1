"""Every Python block of the README runs, and prints what the README says it prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"```python\n(?P<code>.*?)```(?:\n\n?```text\n(?P<output>.*?)```)?", re.DOTALL)


def test_the_blocks_of_the_readme_print_what_it_says(tmp_path, monkeypatch):
    """One namespace and one working directory for all blocks, in order: later ones build on earlier ones."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    blocks = list(BLOCK.finditer(README.read_text(encoding="utf-8")))
    assert len(blocks) >= 3
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block["code"], "README.md", "exec"), namespace)  # the README is ours
        if block["output"] is not None:
            assert printed.getvalue() == block["output"], block["code"]


def test_the_first_screen_names_the_paper_the_commands_and_the_installation():
    lines = README.read_text(encoding="utf-8").splitlines()
    for word, within in (("2502.00987", 10), ("pip install", 20), ("make demo", 20), ("make test", 20)):
        assert any(word in line for line in lines[:within]), word


@pytest.mark.parametrize("result", ["accumulation", "checkpoint", "model_step"])
def test_every_measured_table_of_the_readme_is_one_that_a_benchmark_wrote(result):
    written = (README.parent / "benchmarks" / "results" / f"{result}.md").read_text(encoding="utf-8")
    table = [line for line in written.splitlines() if line.startswith("|")]
    assert len(table) >= 4
    for line in table:
        assert line in README.read_text(encoding="utf-8")
