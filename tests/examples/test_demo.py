"""The demo, a few steps of everything, in a process of its own as a user would run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import interop

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"


def run(*arguments):
    done = subprocess.run([sys.executable, DEMO, "--smoke", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, run("--out", out)


def test_the_demo_writes_adapter_picture_and_report(finished):
    out, done = finished
    assert done.stdout.splitlines()[-1] == f"wrote adapter, loss.png and report.md to {out}"
    adapter = interop.load(out / "adapter")
    assert len(adapter.modules) == 28
    assert any(part.any() for part in (lam for lam, _ in adapter.factors.values()))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.md").read_text(encoding="utf-8")
    assert f"| RandLoRA | {adapter.num_trainable:,d} |" in report


def test_the_two_stacks_agree_in_the_demo(finished):
    report = (finished[0] / "report.md").read_text(encoding="utf-8")
    differences = [
        float(line.split(": ")[1].split()[0].rstrip(".")) for line in report.splitlines() if "n Flax" in line
    ]
    differences += [
        float(line.split(": ")[1].rstrip(".")) for line in report.splitlines() if "The same after going on" in line
    ]
    assert len(differences) == 2
    assert max(differences) < 1e-5


def test_the_demo_takes_a_users_own_model_and_text(finished, tmp_path):
    out, _ = finished
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "mine.txt").write_text("my own text, once more; " * 300, encoding="utf-8")
    run("--model", out / "base_model", "--text", tmp_path / "text", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(out / "base_model")
    assert not (tmp_path / "out" / "base_model").exists()
