"""The third example, which moves an adapter; the first two run as notebooks (test_notebooks.py)."""

import re

import interop
from tests.examples.running import run


def test_an_adapter_moves_between_the_stacks_and_is_served(tmp_path):
    lines = run("03_move_an_adapter.py", tmp_path)
    out = "runs/03_move_an_adapter"
    assert lines[-1] == f"Flax and torch give the same logits; the adapters are in {out}"
    assert "verified: True {'head': True, 'up': True}" in lines
    first, last = (interop.load(tmp_path / out / name) for name in ("from_flax", "adapter"))
    assert set(first.modules) == set(last.modules) == {"up", "head"}
    assert not interop.verify(first, last).passed  # it went on training in torch
    missed = [int(found) for found in re.findall(r"'(\d+)%'", "\n".join(lines))]
    assert len(missed) == 2
    assert max(missed) > 10  # a full-rank update is not a LoRA's
    assert (tmp_path / out / "as_lora" / "adapter_config.json").exists()
