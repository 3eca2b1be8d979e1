"""What the README promises besides its blocks, which test_documents.py runs."""

from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


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
