"""An optimizer step over four micro-batches: with W' made once per step, once per micro-batch, and LoRA.

Run `python benchmarks/accumulation.py`. Claim, Llama-shaped, hidden size 1024, 4 x 512 tokens a micro-batch, float32,
r = 32: with `fold_once`, RandLoRA takes at most 1.30 times the time of PEFT's LoRA. The gradients are those of the
large batch.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import llama
import measure
import torch

import randlora_torch

HIDDEN, MICRO_BATCHES, ROWS, ROUNDS = 1024, 4, 4, 3
BOUND = 1.30


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, fold: Callable[[Any], Any]) -> None:
    """One optimizer step over micro-batches (count, rows, LENGTH)."""
    accumulate(model, ids, fold)
    optimizer.step()
    optimizer.zero_grad()


def accumulate(model: Any, ids: torch.Tensor, fold: Callable[[Any], Any]) -> None:
    """The gradients of the mean loss."""
    with fold(model):
        for part in ids:
            (llama.loss_of(model, part) / len(ids)).backward()


def main() -> None:
    """Measure, and check the claims."""
    check_gradients()
    once, each = randlora_torch.fold_once, contextlib.nullcontext
    ways = {
        "ours, fold_once": (llama.ours, once),
        "ours, each micro-batch": (llama.ours, each),
        "PEFT LoRA": (llama.lora, each),
        "full fine-tuning": (lambda model: model, each),
    }
    ids, competitors = llama.batches(MICRO_BATCHES, ROWS), {}
    for name, (method, fold) in ways.items():
        model = method(llama.base(HIDDEN))
        competitors[name] = partial(step, model, llama.optimizer_of(model), ids, fold)
    seconds = measure.alternate(competitors, rounds=ROUNDS)
    found = {name: measure.ratios(seconds, name, "PEFT LoRA") for name in ways}
    rows: list[tuple[str, ...]] = [("method", "time, ms", "of PEFT LoRA's")]
    rows += [(name, measure.spread(seconds[name]), f"{measure.bar(found[name])[0]:.2f}") for name in ways]
    title = (
        f"An optimizer step of {MICRO_BATCHES} micro-batches of {ROWS} x {llama.LENGTH} tokens, hidden {HIDDEN}, r = 32"
    )
    measure.write("accumulation", title, rows, packages=("torch", "transformers", "peft"))
    bars = {name: [measure.bar(values)] for name, values in found.items()}
    measure.draw("accumulation", title, [f"hidden {HIDDEN}"], bars, "time relative to PEFT's LoRA")
    assert measure.bar(found["ours, fold_once"])[0] <= BOUND, found


def check_gradients(hidden: int = 128) -> None:
    """Micro-batches over one W' give the large batch's gradients, in float64."""
    ids, found = llama.batches(MICRO_BATCHES, 1)[:, :, :32], []
    for parts, fold in ((ids, randlora_torch.fold_once), (ids.reshape(1, -1, 32), contextlib.nullcontext)):
        torch.manual_seed(0)
        model = llama.ours(llama.base(hidden), init_weights=False).double()
        accumulate(model, parts, fold)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    error = ((found[0] - found[1]).norm() / found[1].norm()).item()
    print(f"gradients of micro-batches against the large batch's, relative error: {error:.1e}")
    assert error < 1e-12, error


if __name__ == "__main__":
    main()
