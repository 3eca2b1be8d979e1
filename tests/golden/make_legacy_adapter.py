"""Make the golden adapters in `peft-0.21.2-torch-2.11`: by PEFT's own `save_pretrained`, without their bases.

PEFT draws the bases from the seed with torch, and torch 2.12 draws others. So this ran once, on a CPU, under torch
2.11.0 and peft 0.21.2 (it refuses others), and what it made is never made again: the tests only read it.

    python tests/golden/make_legacy_adapter.py

Beside PEFT's two files, each folder holds `delta_weights.safetensors`: PEFT's own `get_delta_weight` of every layer, in
float32; and in its metadata, the SHA-256 of the bases, as `interop.bases_digest` takes it, and the versions.
"""

import hashlib
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import nn

FOLDER = Path(__file__).resolve().parent / "peft-0.21.2-torch-2.11"
SIDES = {"wide": (10, 23), "square": (13, 13), "tall": (29, 11)}  # (out, in); r divides none
KINDS = {"dense": {}, "sparse": {"sparse": True}}


class Layers(nn.Module):
    """Layers without a meaning, one of each kind."""

    def __init__(self):
        super().__init__()
        for name, (out, inp) in SIDES.items():
            setattr(self, name, nn.Linear(inp, out, bias=False))


def digest(*bases):
    """SHA-256 of the shapes and float32 values."""
    total = hashlib.sha256()
    for basis in bases:
        total.update(repr(tuple(basis.shape)).encode())
        total.update(basis.detach().numpy().astype("<f4").tobytes())
    return total.hexdigest()


def make(kind, fields):
    """Write one adapter and its updates."""
    torch.manual_seed(0)
    config = peft.RandLoraConfig(
        r=4, randlora_alpha=6, target_modules=list(SIDES), projection_prng_key=11, save_projection=False, **fields
    )
    model = peft.get_peft_model(Layers(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "randlora_" in name:
                parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(FOLDER / kind)
    (FOLDER / kind / "README.md").unlink()
    layers = {name: model.base_model.model.get_submodule(name) for name in SIDES}
    deltas = {name: layer.get_delta_weight("default").detach().float().contiguous() for name, layer in layers.items()}
    layer = layers["square"]
    notes = {"bases_sha256": digest(layer.randlora_A["default"], layer.randlora_B["default"])}
    notes |= {"torch": torch.__version__.split("+")[0], "peft": peft.__version__}
    save_file(deltas, FOLDER / kind / "delta_weights.safetensors", notes)


if __name__ == "__main__":
    if not torch.__version__.startswith("2.11.0") or peft.__version__ != "0.21.2":
        raise SystemExit(f"torch {torch.__version__} and peft {peft.__version__}: needs torch 2.11.0 and peft 0.21.2.")
    for kind, fields in KINDS.items():
        make(kind, fields)
