"""Every block of the README and of the guides runs, and prints what the page says it prints."""

import json
import logging

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
    monkeypatch.setattr(logging.root.manager, "disable", 0)  # what a page silences is silent for that page only
    namespace = {"__name__": page.stem}
    for block in documents.blocks(page):
        if block.language in PARSED:
            assert PARSED[block.language](block.code), block
        elif block.language == "console":  # for clusters
            for command in documents.commands(block):
                documents.check_command(command)
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


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python examples/99_nothing.py", "there is no examples/99_nothing.py"),
        ("srun python examples/13_multi_host_flax.py --step 3", r"13_multi_host_flax\.py does not take \['--step'\]"),
        ("gcloud ssh --command='python examples/13_multi_host_flax.py --x'", r"does not take \['--x'\]"),
        ("sbatch examples/configs/slurm_flax.sh --gpus 3", r"slurm_flax\.sh does not take \['--gpus'\]"),
        ("accelerate launch --machines 2 examples/14_multi_node_torch.py", "accelerate does not take these options"),
        ("python examples/13_multi_host_flax.py --x& wait", r"does not take \['--x'\]"),
        ("rm -r runs", "nothing of this can be checked"),
    ],
)
def test_a_shown_command_that_does_not_fit_is_found(command, message, capsys):
    with pytest.raises(AssertionError, match=message):
        documents.check_command(command)


def test_the_commands_of_a_console_block_are_its_prompts_with_continued_lines(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```console\n$ export A=1\n$ A=2 python \\\n    x.py & wait\nprinted\n```\n")
    (block,) = documents.blocks(page)
    assert documents.commands(block) == ["export A=1", "A=2 python     x.py & wait"]
