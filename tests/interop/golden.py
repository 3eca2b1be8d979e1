"""Where the golden adapters are, and what is known of them; made by tests/golden/make_legacy_adapter.py."""

from pathlib import Path

from safetensors import safe_open

FOLDER = Path(__file__).parents[1] / "golden" / "peft-0.21.2-torch-2.11"
DELTAS = "delta_weights.safetensors"
KINDS = ("dense", "sparse")
LEGACY = "torch<=2.11"
SHAPES = {"wide": (10, 23), "square": (13, 13), "tall": (29, 11)}  # (out, in)


def golden(kind):
    """PEFT's `get_delta_weight` by layer, in float32, and what was noted when they were made."""
    with safe_open(FOLDER / kind / DELTAS, framework="numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
