"""The notebooks are the examples of the same names, run from the first cell to the last."""

import os

import jupytext
import nbclient
import nbformat
import pytest

from tests.examples.running import EXAMPLES

NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
SMOKE = 'import sys; sys.argv.append("--smoke")'


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_two_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["01_first_adapter_flax", "02_first_adapter_torch"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_its_example_without_output(path):
    notebook = nbformat.read(path, as_version=4)
    assert cells(notebook) == cells(jupytext.read(EXAMPLES / f"{path.stem}.py", fmt="py:percent")), "run make notebooks"
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_the_first_cell_to_the_last(path, tmp_path, monkeypatch):
    """In a kernel of its own, a few steps of everything."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SMOKE))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(output.text for output in notebook.cells[-1].outputs if output.output_type == "stream")
    assert printed.splitlines()[-1] == f"the reloaded adapter gives the same logits; it is in runs/{path.stem}"
    assert (tmp_path / "runs" / path.stem / "adapter_model.safetensors").exists()
