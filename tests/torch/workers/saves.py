"""Saves two adapters into one folder in turns, without end: run by test_killed_save.py, which kills it.

python saves.py FOLDER
"""

import sys

import torch
from torch import nn

from randlora_torch import RandLoraConfig, get_peft_model


def adapted(turn):
    """A model with an adapter whose config, shapes and values depend on the turn."""
    torch.manual_seed(turn)
    targets = ["0", "1"] if turn else ["1"]
    config = RandLoraConfig(r=2 + turn, randlora_alpha=4 + turn, target_modules=targets, init_weights=False)
    return get_peft_model(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), config)


if __name__ == "__main__":
    models = [adapted(0), adapted(1)]
    print("saving", flush=True)
    while True:
        for model in models:
            model.save_pretrained(sys.argv[1])
