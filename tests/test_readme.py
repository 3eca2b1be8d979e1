"""What the README promises besides its blocks, which test_documents.py and test_wheel.py run."""

import re

from documents import ROOT, blocks

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
LINES = TEXT.splitlines()


def test_the_first_screen_names_the_paper_the_installation_and_a_program_with_its_output():
    assert any("2502.00987" in line for line in LINES[:10])
    assert sum(line.startswith("pip install") for line in LINES[:15]) == 3
    program = next(block for block in blocks(README) if block.language == "python")
    assert program.output
    assert LINES.index(program.output.splitlines()[-1]) < 30
    for command in ("make demo", "make test"):
        assert any(line.startswith(command) for line in LINES), command


def test_the_measured_table_is_the_one_that_the_benchmark_wrote():
    written = (ROOT / "benchmarks" / "results" / "summary.md").read_text(encoding="utf-8")
    title, _, machine, *table = written.splitlines()
    shown = [line for line in table if line.startswith("|")]
    assert len(shown) >= 6
    for line in (title.removeprefix("# "), machine, *shown):
        assert line in TEXT, line


def test_every_file_that_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []
