"""The benchmark of a GPU runs: at tiny sizes on the CPU, where no kernel is chosen; without a GPU it says so."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(monkeypatch, *options):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", *options])
    runpy.run_path(str(BENCHMARKS / "gpu_step.py"), run_name="__main__")


def test_every_method_takes_a_step_on_the_cpu(monkeypatch, capsys):
    stored = sorted((BENCHMARKS / "results").iterdir())
    run(monkeypatch, "--smoke", "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    rows = [
        tuple(cell.strip() for cell in line.split("|")[1:4]) for line in lines if line.startswith(("| bf16", "| nf4"))
    ]
    methods = ["LoRA (PEFT)", "RandLoRA, ours", "RandLoRA, PEFT"]
    assert rows == [("bf16", "32", name) for name in (*methods, "full fine-tuning")] + [
        ("nf4", "32", name) for name in methods
    ]
    assert lines[-2:] == ["| --- | --- | --- | --- | --- | --- | --- | --- |", ""]  # no choices
    assert sorted((BENCHMARKS / "results").iterdir()) == stored


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_it_asks_for_a_gpu(monkeypatch):
    with pytest.raises(SystemExit, match=r"torch finds no CUDA device\. `--smoke --device cpu` runs without one"):
        run(monkeypatch)
    with pytest.raises(SystemExit, match="add --smoke to see whether the script runs"):
        run(monkeypatch, "--device", "cpu")
