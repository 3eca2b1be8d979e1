"""A training step of a Llama-shaped model, plain and in NF4: RandLoRA here and in PEFT, LoRA, full fine-tuning.

Run `python benchmarks/model_step.py`. Claims, float32, r = 32, all linear layers, AdamW: RandLoRA takes at most 1.10
times the time of PEFT's LoRA at hidden size 512 (8 x 512 tokens), and at most 1.40 times at 1024 (4 x 512 tokens). In
20 steps, its losses are PEFT's within 1e-5 by every plan.
"""

import math
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import llama
import measure
import torch

import randlora_torch

ROUNDS = 6
SIZES = ((512, 8), (1024, 4))
BOUNDS = {("512", "ours"): 1.10, ("1024", "ours, very_sparse, keep_weight"): 1.40}
STEPS = 20


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    """One optimizer step over one batch."""
    llama.loss_of(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad()


def stepping(models: dict[str, Any], rows: int) -> dict[str, Callable[[], None]]:
    """One step of each model on the same batch."""
    ids = llama.batches(1, rows)[0]
    return {name: partial(step, model, llama.optimizer_of(model), ids) for name, model in models.items()}


def keeping(model: Any, **fields: Any) -> Any:
    """Ours, with W' kept from forward for backward."""
    model = llama.ours(model, **fields)
    randlora_torch.set_plan(model, keep_weight=True)
    return model


METHODS = {
    **llama.METHODS,
    "ours, keep_weight": keeping,
    "ours, very_sparse, keep_weight": partial(keeping, very_sparse=True),
}


def plain(hidden: int) -> dict[str, Any]:
    """The model in float32 by each method; where tokens are few for its width, also by the options that help then."""
    methods = METHODS if hidden > 512 else llama.METHODS
    return {name: method(llama.base(hidden)) for name, method in methods.items()}


def in_nf4(hidden: int) -> dict[str, Any]:
    """The model in 4 bits by each method that can train it."""
    with tempfile.TemporaryDirectory() as folder:
        llama.base(hidden).save_pretrained(folder)
        methods = {name: method for name, method in llama.METHODS.items() if name != "full fine-tuning"}
        return {name: method(llama.in_nf4(folder)) for name, method in methods.items()}


def main() -> None:
    """Measure both sizes and the 4-bit model, and check the claims."""
    check_losses()
    names = list(METHODS)
    rows: list[tuple[str, ...]] = [("model", "tokens", "method", "time, ms", "of PEFT LoRA's")]
    found, bars = {}, {name: [] for name in names}
    for label, make, hidden, count in (
        *((str(hidden), plain, hidden, count) for hidden, count in SIZES),
        ("512, NF4", in_nf4, *SIZES[0]),
    ):
        seconds = measure.alternate(stepping(make(hidden), count), rounds=ROUNDS)
        found[label] = {name: measure.ratio(seconds, name, "PEFT LoRA") for name in seconds}
        for name in names:
            bars[name].append(
                measure.bar(measure.ratios(seconds, name, "PEFT LoRA") if name in seconds else [math.nan])
            )
        for name, times in seconds.items():
            model = f"hidden {label}", f"{count} x {llama.LENGTH}"
            rows.append((*model, name, measure.spread(times), f"{found[label][name]:.2f}"))
    title = f"A training step of a Llama of 2 layers, all linear layers adapted, r = {llama.RANK}, float32"
    measure.write("model_step", title, rows, packages=("torch", "transformers", "peft", "bitsandbytes"))
    measure.draw("model_step", title, [f"hidden {label}" for label in found], bars, "time relative to PEFT's LoRA")
    for (label, name), bound in BOUNDS.items():
        assert found[label][name] <= bound, found


def check_losses(hidden: int = 128) -> None:
    """20 steps by every plan, and once per step, against PEFT's."""
    ids = llama.batches(1, 2)[:, :, :64].expand(STEPS, -1, -1)  # one batch again and again, to be learned
    want = losses(llama.pefts(llama.base(hidden)), ids, once=False)
    assert want[0] - want[-1] > 0.1, want
    for plan in (*("factored", "folded", "auto"), "once"):
        model = llama.ours(llama.base(hidden))
        randlora_torch.set_plan(model, "auto" if plan == "once" else plan)
        worst = max(abs(a - b) for a, b in zip(losses(model, ids, once=plan == "once"), want, strict=True))
        print(f"largest difference of {STEPS} losses from PEFT's, {plan}: {worst:.1e}")
        assert worst < 1e-5, (plan, worst)


def losses(model: Any, ids: torch.Tensor, *, once: bool) -> list[float]:
    """The losses of one step per batch; once: over two micro-batches that share W'."""
    optimizer, found = llama.optimizer_of(model, lr=1e-3), []
    for batch in ids:
        if once:
            with randlora_torch.fold_once(model):
                parts = [llama.loss_of(model, part) / 2 for part in batch.split(1)]
                for part in parts:
                    part.backward()
            found.append(sum(part.item() for part in parts))
        else:
            loss = llama.loss_of(model, batch)
            loss.backward()
            found.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return found


if __name__ == "__main__":
    main()
