"""Forward and backward of one layer d x d, float32: RandLoRA here and in PEFT, LoRA, full fine-tuning.

Run `python benchmarks/layer_step.py`. Claims, of ours against PEFT's RandLoRA, r = 32: at d = 1024 at most 0.55 times
its time with 4096 tokens and its own time with 256; from 256 tokens on nowhere more than 1.05 times, and with 32, where
making the scaled A again in backward counts, nowhere more than 1.25 times. And with `very_sparse` bases, at most 0.8
times the time with dense ones, at 1024 tokens and d = 1024.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import measure
import torch
from peft import LoraConfig
from peft import RandLoraConfig as PeftConfig
from peft import get_peft_model as peft_model
from torch import nn

import randlora_torch

WIDTHS, TOKENS = (512, 1024, 2048), (32, 256, 1024, 4096)
RANK, ROUNDS = 32, 9
TARGET = {"r": RANK, "target_modules": ["layer"]}


class Layer(nn.Module):
    """One layer with a name that can be targeted."""

    def __init__(self, width: int):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, width) in, the same out."""
        return self.layer(x)


def ours(width: int, **fields: Any) -> nn.Module:
    """RandLoRA by this package."""
    return randlora_torch.get_peft_model(Layer(width), randlora_torch.RandLoraConfig(**TARGET, **fields))


def competitors(width: int) -> dict[str, nn.Module]:
    """The same layer by each method."""
    return {
        "ours": ours(width),
        "PEFT RandLoRA": peft_model(Layer(width), PeftConfig(**TARGET)),
        "PEFT LoRA": peft_model(Layer(width), LoraConfig(**TARGET)),
        "full fine-tuning": Layer(width),
    }


def step(model: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> None:
    """Forward and backward; x wants its gradient, as inside a model."""
    x.grad = None
    model(x).backward(upstream)


def steps(models: dict[str, nn.Module], width: int, tokens: int) -> dict[str, Callable[[], None]]:
    """One step of each model on the same inputs."""
    x, upstream = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    return {name: partial(step, model, x, upstream) for name, model in models.items()}


def rounds_for(width: int, tokens: int) -> int:
    """More where a step is short."""
    return 3 * ROUNDS if width * tokens < 2**20 else ROUNDS


def main() -> None:
    """Measure the grid and the kinds of bases, and check the claims."""
    rows: list[tuple[str, ...]] = [("d", "tokens", *(f"{name}, ms" for name in competitors(8)), "ours / PEFT RandLoRA")]
    found, bars, groups = {}, {}, []
    for width in WIDTHS:
        models = competitors(width)
        for tokens in TOKENS:
            seconds = measure.alternate(steps(models, width, tokens), rounds=rounds_for(width, tokens))
            found[width, tokens] = measure.ratio(seconds, "ours", "PEFT RandLoRA")
            rows.append(
                (str(width), str(tokens), *map(measure.spread, seconds.values()), f"{found[width, tokens]:.2f}")
            )
            groups.append(f"{width} wide\n{tokens} tokens")
            for name in models:
                bars.setdefault(name, []).append(measure.bar(measure.ratios(seconds, name, "PEFT RandLoRA")))
    title = f"Forward and backward of one square layer, r = {RANK}, float32"
    measure.write("layer_step", title, rows, packages=("torch", "peft"))
    measure.draw("layer_step", title, groups, bars, "time relative to PEFT's RandLoRA")
    kinds_of_bases()
    assert found[1024, 4096] <= 0.55, found
    assert found[1024, 256] <= 1.0, found
    assert all(value <= (1.05 if tokens >= 256 else 1.25) for (_, tokens), value in found.items()), found


def kinds_of_bases(width: int = 1024) -> None:
    """Dense, sparse and very sparse bases on one layer."""
    models = {"dense": ours(width), "sparse": ours(width, sparse=True), "very_sparse": ours(width, very_sparse=True)}
    rows: list[tuple[str, ...]] = [("tokens", *(f"{name}, ms" for name in models), "very_sparse / dense")]
    found, bars = {}, {}
    for tokens in TOKENS:
        seconds = measure.alternate(steps(models, width, tokens), rounds=rounds_for(width, tokens))
        found[tokens] = measure.ratio(seconds, "very_sparse", "dense")
        rows.append((str(tokens), *map(measure.spread, seconds.values()), f"{found[tokens]:.2f}"))
        for name in models:
            bars.setdefault(name, []).append(measure.bar(measure.ratios(seconds, name, "dense")))
    title = f"Forward and backward of a layer {width} wide, by kind of bases, r = {RANK}, float32"
    measure.write("layer_step_bases", title, rows, packages=("torch",))
    measure.draw(
        "layer_step_bases", title, [f"{tokens} tokens" for tokens in TOKENS], bars, "time relative to dense bases"
    )
    assert found[1024] <= 0.8, found


if __name__ == "__main__":
    main()
