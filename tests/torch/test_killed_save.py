"""`kill -9` during `model.save_pretrained`; tests/interop/test_files_killed.py kills the save at every line."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import interop
from randlora_torch import extract
from tests.torch.workers.saves import adapted

WORKER = Path(__file__).parent / "workers" / "saves.py"
REPOSITORY = Path(__file__).parents[2]


def same(one, other):
    parts = [(one.bases, other.bases), *((one.factors[name], other.factors[name]) for name in one.factors)]
    return all(np.array_equal(a, b) for pair in parts for a, b in zip(*pair, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 and fork are POSIX's")
def test_a_killed_save_pretrained_leaves_one_adapter_or_the_other(tmp_path):
    wanted = {model.peft_config["default"].r: extract(model).to_interop() for model in (adapted(0), adapted(1))}
    moments = [str(random.Random(seed).random() / 10) for seed in range(5)]
    # A fork is safe only while torch has started no threads.
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, WORKER, tmp_path, *moments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for number in range(len(moments)):
        found = interop.load(tmp_path / str(number))
        want = wanted[found.config.r]
        assert found.modules == want.modules
        assert found.config.randlora_alpha == want.config.randlora_alpha
        assert same(found, want)
