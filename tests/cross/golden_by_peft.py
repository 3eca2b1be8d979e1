"""How tests/golden/peft-0.21.2 was made: tiny folders written by PEFT 0.21.2 under torch 2.13, in all its layouts.

    PYTHONPATH=.:tests python tests/cross/golden_by_peft.py

They are kept as they were written: a change here is a new folder for a new version, never another content.
"""

import shutil
import sys
import warnings
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

TARGETS = ["up", "down", "mix"]
SHAPES = {"up": (9, 6), "down": (6, 9), "mix": (6, 6)}
SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 8, "lora_alpha": 8}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.mix = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.mix(self.down(torch.tanh(self.up(x)))))


def adapted(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    config = peft.RandLoraConfig(**{"r": 4, "randlora_alpha": 6, "target_modules": TARGETS, **fields})
    model = peft.get_peft_model(Net().to(dtype), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def pruned():
    """AdaLoRA, trained until its ranks have fallen."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), peft.AdaLoraConfig(target_modules=TARGETS, **SCHEDULE))
    optimizer, x = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1), torch.randn(8, 6)
    for step in range(1, SCHEDULE["total_step"] + 1):
        loss = (model(x) ** 2).mean()
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


def save(model, folder):
    model.save_pretrained(folder)
    for path in folder.glob("**/README.md"):
        path.unlink()


def keeping(source, folder, keep):
    """A folder with only some of the copies of the bases: what PEFT's main branch and others write."""
    shutil.copytree(source, folder)
    path = folder / "adapter_model.safetensors"
    tensors = {key: value for key, value in load_file(path).items() if "randlora_" not in key or keep(key)}
    save_file(tensors, path, {"format": "pt"})


def write(root):
    save(adapted(), root / "copies")
    keeping(root / "copies", root / "canonical", lambda key: key[-1] not in "AB" or key.count(".") == 1)
    keeping(root / "copies", root / "per-layer", lambda key: key.startswith("base_model.model."))
    save(adapted(save_projection=False), root / "none")
    save(adapted(torch.bfloat16, sparse=True, modules_to_save=["head"]), root / "bfloat16")
    save(adapted(torch.float16, very_sparse=True, bias="all", save_projection=False, r=2), root / "float16")
    save(pruned(), root / "adalora")
    two = adapted(r=6)
    two.add_adapter("other", peft.RandLoraConfig(r=6, target_modules=TARGETS))
    save(two, root / "two")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    assert peft.__version__ == "0.21.2", peft.__version__
    sys.exit(write(Path(__file__).resolve().parent.parent / "golden" / "peft-0.21.2"))
