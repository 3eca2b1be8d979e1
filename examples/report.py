"""What the demo leaves behind: a picture of the losses and a page with the numbers."""

from pathlib import Path
from typing import Any

import numpy as np

COLORS = {"RandLoRA": "tab:red", "RandLoRA in torch, NF4 base": "tab:red", "LoRA": "tab:blue"}


def write_plot(path: Path, curves: dict[str, list[float]], *, before: float) -> None:
    """Draw the loss curves, the torch part after the Flax part; each is smoothed, its raw values stay faint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    boundary = len(curves["RandLoRA"])
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.axhline(before, color="black", linewidth=0.8, linestyle=":", label=f"base model, held out ({before:.2f})")
    for name, losses in curves.items():
        in_torch = "torch" in name
        steps = np.arange(len(losses)) + 1 + (boundary if in_torch else 0)
        color = COLORS.get(name, "tab:gray")
        axes.plot(steps, losses, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(steps, smoothed(losses), color=color, linestyle="--" if in_torch else "-", linewidth=2, label=name)
    axes.axvline(boundary + 0.5, color="black", linewidth=0.8)
    axes.text(boundary, axes.get_ylim()[1], "Flax  ", ha="right", va="top")
    axes.text(boundary + 1, axes.get_ylim()[1], "  torch, same adapter", ha="left", va="top")
    axes.set(xlabel="optimizer step", ylabel="training loss (nats per token)")
    axes.set_title("One RandLoRA adapter, trained in Flax and then on a 4-bit base in torch")
    axes.legend(frameon=False, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def smoothed(losses: list[float], *, decay: float = 0.85) -> np.ndarray:
    """Exponential moving average, corrected for its start."""
    total = weight = 0.0
    out = []
    for loss in losses:
        total, weight = decay * total + (1 - decay) * loss, decay * weight + (1 - decay)
        out.append(total / weight)
    return np.asarray(out)


def write_report(path: Path, facts: dict[str, Any], *, adapter_folder: Path) -> None:
    """Write the numbers of a run as a page of Markdown."""
    trainable, held_out = facts["trainable"], facts["held out"]
    rows = [("base model, before", "-", facts["held out before"])]
    counts = {name: f"{count:,d}" for name, count in trainable.items()}
    rows += [(name, counts.get(name, "same adapter"), loss) for name, loss in held_out.items()]
    size = sum(file.stat().st_size for file in adapter_folder.iterdir())
    lines = [
        "# Demo report",
        "",
        "![training losses](loss.png)",
        "",
        "| model | trainable parameters | held-out loss (nats per token) |",
        "|---|---|---|",
        *(f"| {name} | {count} | {loss:.4f} |" for name, count, loss in rows),
        "",
        f"- Largest logit difference between Flax and torch, adapter trained in Flax: {facts['difference']:.3g}"
        f" (the adapter itself changes the logits by up to {facts['effect']:.3g}).",
        f"- The same after training on in 4 bits, saved, and loaded in both stacks: {facts['difference back']:.3g}.",
        f"- Adapter folder in PEFT's format: {size:,d} bytes.",
        f"- The whole run took {facts['seconds']:.0f} s.",
        "",
        "## Samples from the merged 4-bit model",
        "",
        *(f"```\n{line}\n```" for line in facts["samples"]),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
