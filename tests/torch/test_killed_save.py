"""`kill -9` during `model.save_pretrained`; tests/interop/test_files_killed.py kills the save at every line."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import interop
from randlora_torch import extract
from tests.torch.workers.saves import adapted

WORKER = Path(__file__).parent / "workers" / "saves.py"
REPOSITORY = Path(__file__).parents[2]


def same(one, other):
    parts = [(one.bases, other.bases), *((one.factors[name], other.factors[name]) for name in one.factors)]
    return all(np.array_equal(a, b) for pair in parts for a, b in zip(*pair, strict=True))


def test_a_killed_save_pretrained_leaves_one_adapter_or_the_other(tmp_path):
    wanted = {model.peft_config["default"].r: extract(model).to_interop() for model in (adapted(0), adapted(1))}
    for seed in range(3):
        worker = subprocess.Popen(
            [sys.executable, WORKER, tmp_path],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        assert worker.stdout.readline() == b"saving\n"
        time.sleep(0.1 + random.Random(seed).random() / 10)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        found = interop.load(tmp_path)
        want = wanted[found.config.r]
        assert found.modules == want.modules
        assert found.config.randlora_alpha == want.config.randlora_alpha
        assert same(found, want)
