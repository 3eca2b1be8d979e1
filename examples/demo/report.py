"""What the demo leaves behind: a picture of the losses and a page with the numbers."""

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IN_TORCH = "RandLoRA, going on in torch on the NF4 base"
STYLE = {
    "full fine-tuning": ("tab:gray", "-"),
    "LoRA": ("tab:blue", "-"),
    "RandLoRA": ("tab:red", "-"),
    IN_TORCH: ("tab:red", "--"),
}


class Run(NamedTuple):
    """What the parts of the demo find out; losses are held-out cross entropies in nats per token."""

    trainable: dict[str, int]
    curves: dict[str, list[tuple[int, float]]]
    held_out: dict[str, float]
    numbers: dict[str, float]
    samples: list[str]


def write_plot(path: Path, run: Run) -> None:
    """Draw the held-out losses, the torch part after the Flax part."""
    boundary = run.curves["RandLoRA"][-1][0]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, (color, line) in STYLE.items():
        steps, losses = zip(*run.curves[name], strict=True)
        count = f" ({run.trainable[name]:,d} parameters)" if name in run.trainable else ""
        shifted = [step + boundary * (name == IN_TORCH) for step in steps]
        axes.plot(shifted, losses, line, color=color, linewidth=2, marker=".", label=name + count)
    axes.axvline(boundary, color="black", linewidth=0.8)
    top = axes.get_ylim()[1]
    axes.text(boundary, top, "Flax  ", ha="right", va="top")
    axes.text(boundary, top, "  torch, 4-bit base", ha="left", va="top")
    axes.set(xlabel="optimizer step", ylabel="held-out loss (nats per token)")
    axes.set_title("One RandLoRA adapter: trained in Flax, moved to torch, trained on over a 4-bit base")
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_report(path: Path, run: Run, *, adapter_folder: Path) -> None:
    """Write the numbers of a run as a page of Markdown."""
    counts = {"base model": "-", **{name: f"{count:,d}" for name, count in run.trainable.items()}}
    size = sum(file.stat().st_size for file in adapter_folder.iterdir())
    lines = [
        "# Demo report",
        "",
        "![held-out losses](loss.png)",
        "",
        "| model | trainable parameters | held-out loss (nats per token) |",
        "|---|---|---|",
        *(f"| {name} | {counts.get(name, 'same adapter')} | {loss:.4f} |" for name, loss in run.held_out.items()),
        "",
        f"- Largest logit difference between Flax and torch, adapter trained in Flax: {run.numbers['difference']:.3g}"
        f" (logits reach {run.numbers['largest logit']:.3g};"
        f" the adapter changes them by up to {run.numbers['effect']:.3g}).",
        f"- The same after going on in 4 bits, saved and loaded in both stacks: {run.numbers['difference after']:.3g}.",
        f"- Adapter folder in PEFT's format: {size:,d} bytes.",
        f"- The whole run took {run.numbers['seconds']:.0f} s.",
        "",
        "## Samples from the merged 4-bit model",
        "",
        *(f"```\n{line}\n```" for line in run.samples),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
