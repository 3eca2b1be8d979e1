"""Every block of the README and of the guides runs, and prints what the page says it prints."""

import json

import documents
import pytest
import yaml

RUN = {"python", "bash"}
PARSED = {"json": json.loads, "yaml": yaml.safe_load}
SHOWN = {""}  # formulas and the like
INSTALLING = ("pip install", "make ", "git clone")  # test_wheel.py and CI itself run these


@pytest.mark.parametrize("page", documents.PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_and_print_what_it_says(page, tmp_path, monkeypatch):
    """One namespace and one working directory for all blocks of a page, in order: later ones build on earlier ones."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for block in documents.blocks(page):
        if block.language in PARSED:
            assert PARSED[block.language](block.code), block
        elif block.language in RUN and not block.code.startswith(INSTALLING):
            documents.run(block, page, namespace)
        else:
            assert block.language in SHOWN or block.code.startswith(INSTALLING), f"{page.name}, line {block.line}"


def test_a_block_that_prints_something_else_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n\n```bash\necho 1\n```\n\nBut:\n\n```text\n2\n```\n")
    python, shell = documents.blocks(page)
    assert (python.output, shell.output) == ("2\n", None)
    with pytest.raises(AssertionError, match=r"page\.md, line 2"):
        documents.run(python, page, {})
    documents.run(shell, page, {})
