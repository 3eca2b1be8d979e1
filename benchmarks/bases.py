"""Seed to bases: `interop.make_bases` (numpy) against PEFT (torch), which must give the same bits.

Run `python benchmarks/bases.py`. Claim: numpy takes at most three times as long as torch, once per adapter.
"""

from functools import partial

import measure
import numpy as np
import torch
from peft import RandLoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn

import interop

SIZES = ((1024, 1024), (4096, 1024), (4096, 4096))
KINDS = {"dense": {}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}


def main() -> None:
    """Measure all kinds and sizes, and check the claim."""
    rows: list[tuple[str, ...]] = [("bases", "size", "ours, ms", "PEFT, ms", "ours / PEFT")]
    bars: dict[str, list[tuple[float, float, float]]] = {}
    for kind, flags in KINDS.items():
        for long, short in SIZES:
            ours = partial(interop.make_bases, interop.RandLoraConfig(r=32, **flags), max_dim=long, min_dim=short)
            theirs = partial(peft_bases, long, short, flags)
            for mine, other in zip(ours(), theirs(), strict=True):
                assert np.array_equal(mine.astype(np.float32), other.float().numpy()), "the bits differ"
            seconds = measure.alternate({"ours": ours, "peft": theirs}, rounds=5)
            ratio = measure.ratio(seconds, "ours", "peft")
            bars.setdefault(kind, []).append(measure.bar(measure.ratios(seconds, "ours", "peft")))
            rows.append((kind, f"{long} x {short}", *map(measure.spread, seconds.values()), f"{ratio:.2f}"))
            assert ratio < 3, f"{kind} {long}x{short}: {ratio:.2f} times PEFT's time"
    measure.write("bases", "Seed to bases, r = 32", rows, packages=("numpy", "torch", "peft"))
    sizes = [f"{long} x {short}" for long, short in SIZES]
    measure.draw("bases", "Seed to bases, r = 32: numpy beside torch", sizes, bars, "time relative to PEFT")


def peft_bases(long: int, short: int, flags: dict[str, bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """What PEFT draws for one layer of this size (includes wrapping that layer)."""
    layer = nn.Sequential(nn.Linear(short, long, bias=False))
    model = get_peft_model(layer, PeftConfig(r=32, target_modules=["0"], **flags))
    return model.base_model.randlora_A["default"], model.base_model.randlora_B["default"]


if __name__ == "__main__":
    main()
