"""Saves two adapters into one folder in turns and is killed, more than once: run by test_killed_save.py.

python saves.py FOLDER SECONDS... saves to FOLDER/adapter, kills after so many seconds, copies what is left to
FOLDER/<number>, and goes on from there.
"""

import itertools
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from randlora_torch import RandLoraConfig, get_peft_model


def adapted(turn):
    """A model with an adapter whose config, shapes and values depend on the turn."""
    torch.manual_seed(turn)
    targets = ["0", "1"] if turn else ["1"]
    config = RandLoraConfig(r=2 + turn, randlora_alpha=4 + turn, target_modules=targets, init_weights=False)
    return get_peft_model(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), config)


def save_by_turns_until_killed(models, folder, seconds):
    """Fork a process that saves without end, and kill it so many seconds after its first save."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        for number, model in enumerate(itertools.cycle(models)):
            model.save_pretrained(folder)
            if number == 0:
                os.write(write, b"saved")
    os.close(write)  # so that the read ends if the child does
    assert os.read(read, 5) == b"saved"
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


if __name__ == "__main__":
    folder, models = Path(sys.argv[1]), [adapted(0), adapted(1)]
    for number, seconds in enumerate(sys.argv[2:]):
        save_by_turns_until_killed(models, folder / "adapter", float(seconds))
        shutil.copytree(folder / "adapter", folder / str(number))
