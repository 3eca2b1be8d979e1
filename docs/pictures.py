"""The pictures of the guides, each computed from the package itself.

Run `python docs/pictures.py`; it writes docs/pictures/*.svg in seconds. `--out FOLDER` writes elsewhere.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

import interop
from interop.plans import Contraction, Work
from interop.shapes import num_bases

FROZEN, TRAINED, RESULT = "#c3d0de", "#f2a65a", "#8fbf8f"
RANDLORA, LORA, OTHER = "#d9691e", "#2f6f9f", "#666666"
Formula = Callable[[Contraction], Work]
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "randlora",  # the same names of parts in every run
}


def main() -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures", help="default: %(default)s")
    parser.add_argument("--format", default="svg", choices=("svg", "png"), help="default: %(default)s")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    matplotlib.use("agg")
    plt.rcParams.update(STYLE)
    for name, draw in PICTURES.items():
        figure = draw()
        metadata = {"Date": None} if options.format == "svg" else None
        figure.savefig(options.out / f"{name}.{options.format}", dpi=110, bbox_inches="tight", metadata=metadata)
        plt.close(figure)


# The equation.


class Block(NamedTuple):
    """A matrix of the equation: what it is called, its size on paper, its shape, its color, and what kind it is."""

    name: str
    width: float
    height: float
    shape: str
    color: str
    diagonal: bool = False
    copies: int = 1


def equation() -> Figure:
    """The update as a product of blocks, to scale, with the shape of each."""
    long, short, rank = 3.2, 2.2, 0.62
    blocks = [
        Block(r"$\Delta W$", short, long, "D x d", RESULT),
        Block(r"$B_i$", rank, long, "D x r", FROZEN, copies=3),
        Block(r"diag($\lambda_i$)", rank, rank, "r x r", TRAINED, diagonal=True, copies=3),
        Block(r"$A$", short, rank, "r x d", FROZEN),
        Block(r"diag($\gamma_i$)", short, short, "d x d", TRAINED, diagonal=True, copies=3),
    ]
    signs = {0: r"$= \; s \; \sum_{i=1}^{n}$", 1: "", 2: "", 3: ""}
    figure, axes = plt.subplots(figsize=(11, 5.3))
    x = 0.0
    for position, block in enumerate(blocks):
        draw_block(axes, block, x, middle=0.0)
        x += block.width + 0.55
        if signs.get(position):
            axes.text(x + 0.35, 0, signs[position], ha="center", va="center", fontsize=20)
            x += 1.35
    axes.set_title(
        "RandLoRA's update of one layer: n products of rank r, whose sum has the full rank d", fontsize=13, pad=14
    )
    legend = [
        Patch(facecolor=FROZEN, edgecolor="black", label="random and frozen, the same for every layer"),
        Patch(facecolor=TRAINED, edgecolor="black", label="trained, of each layer: n (r + d) numbers in all"),
        Patch(facecolor=RESULT, edgecolor="black", label="the update, added to the frozen weight"),
    ]
    axes.legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, fontsize=10)
    notes = "d, D: the short and the long side of the weight    n = ceil(d / r) bases    s = alpha / r"
    axes.text(x / 2 - 0.3, -2.45, notes, ha="center", va="center", fontsize=11, color="#333333")
    axes.set(xlim=(-0.3, x), ylim=(-2.65, 2.25), aspect="equal")
    axes.axis("off")
    return figure


def draw_block(axes: Axes, block: Block, x: float, middle: float) -> None:
    """One matrix, the name on or above it, the shape below; several copies one behind the other."""
    bottom, step = middle - block.height / 2, 0.09
    for behind in reversed(range(block.copies)):
        corner = (x + behind * step, bottom + behind * step)
        face = "white" if block.diagonal else block.color
        axes.add_patch(Rectangle(corner, block.width, block.height, facecolor=face, edgecolor="black", lw=1))
    if block.diagonal:
        frame = Rectangle((x, bottom), block.width, block.height, fill=False, edgecolor="black", lw=1)
        axes.add_patch(frame)
        (diagonal,) = axes.plot([x, x + block.width], [bottom + block.height, bottom], color=block.color, lw=6)
        diagonal.set_clip_path(frame)
    top = bottom + block.height + (block.copies - 1) * step
    axes.text(x + block.width / 2, top + 0.14, block.name, ha="center", va="bottom", fontsize=15)
    axes.text(x + block.width / 2, bottom - 0.12, block.shape, ha="center", va="top", fontsize=11)
    if block.copies > 1:
        note = "n of them"
        axes.text(x + block.width / 2, bottom - 0.42, note, ha="center", va="top", fontsize=10, color="#555555")
    elif block.name == "$A$":
        axes.text(x + block.width / 2, bottom - 0.42, "one", ha="center", va="top", fontsize=10, color="#555555")


# The pairing of flat indices.


def pairing(r: int = 2, n: int = 3) -> Figure:
    """Which row of the scaled A meets which column of B, for a small r and n."""
    figure, axes = plt.subplots(figsize=(9.5, 5))
    rows, columns = plt.get_cmap("Oranges")(np.linspace(0.25, 0.6, r)), plt.get_cmap("Blues")(np.linspace(0.2, 0.6, n))
    for q in range(r * n):
        y = -q
        k, b = divmod(q, n)  # of the scaled A
        basis, rank = divmod(q, r)  # of B
        draw_cell(axes, 1.0, y, 3.2, rf"$\lambda_{{{k},{b}}} \;\, A_{{{k}}} \odot \gamma_{{{b}}}$", rows[k])
        draw_cell(axes, 6.6, y, 2.6, rf"$B[:, {basis}, {rank}]$", columns[basis])
        axes.text(0.75, y, f"q = {q}", ha="right", va="center", fontsize=11)
        axes.text(9.45, y, f"q = {q}", ha="left", va="center", fontsize=11)
        axes.annotate("", (6.55, y), (4.25, y), arrowprops={"arrowstyle": "<->", "color": "#555555"})
        same = (basis, rank) == (b, k)
        note = "as in the paper" if same else f"the paper: $B[:, {b}, {k}]$"
        axes.text(5.4, y + 0.08, note, ha="center", va="bottom", fontsize=9, color="#777777")
    axes.text(2.6, 0.95, "rows of the scaled A", ha="center", fontsize=12, weight="bold")
    axes.text(2.6, 0.6, "(k, b), b runs faster:  q = k n + b", ha="center", fontsize=10)
    axes.text(7.9, 0.95, "columns of B", ha="center", fontsize=12, weight="bold")
    axes.text(7.9, 0.6, "(basis, rank), rank runs faster:  q = basis r + rank", ha="center", fontsize=10)
    title = f"Adapter files pair by the flat index q, here with r = {r} and n = {n}:\n"
    title += r"$\Delta W = s \sum_q \;$ (column q of B) $\times$ (row q of the scaled A)"
    axes.set_title(title, fontsize=12.5, pad=10)
    axes.set(xlim=(-0.4, 10.6), ylim=(-(r * n) + 0.4, 1.4))
    axes.axis("off")
    return figure


def draw_cell(axes: Axes, x: float, y: float, width: float, text: str, color: str) -> None:
    """A labeled cell, vertically centered on y."""
    axes.add_patch(Rectangle((x, y - 0.36), width, 0.72, facecolor=color, edgecolor="black", lw=0.8))
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=12)


# Contraction plans.


def plans(side: int = 4096, r: int = 32) -> Figure:
    """Multiply-adds of both plans over the number of tokens, by the formula that layers choose by."""
    figure, (forward, backward) = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    tokens = np.unique(np.logspace(1, 5, 200).astype(int))
    for axes, name, factored, folded in (
        (forward, "forward", Contraction.factored_forward, Contraction.folded_forward),
        (backward, "backward", Contraction.factored_backward, Contraction.folded_backward),
    ):
        of_factored = products(factored, tokens, side, r)
        of_folded = products(folded, tokens, side, r)
        alone = tokens * side**2 * (1 if name == "forward" else 2)
        axes.loglog(tokens, alone, color=OTHER, ls=":", label="full fine-tuning: no adapter at all")
        axes.loglog(tokens, of_factored, color=LORA, label="factored: multiply x by the factors of dW")
        axes.loglog(tokens, of_folded, color=RANDLORA, label="folded: make W + dW first, multiply once")
        crossing = next(count for count in range(1, tokens[-1]) if is_less(folded, factored, count, side, r))
        axes.axvline(crossing, color="black", lw=0.8, ls="--")
        axes.text(crossing * 1.15, 2e9, f"folded is less work\nfrom {crossing:,d} tokens on", fontsize=10)
        axes.set(xlabel="tokens in the batch", title=f"{name} pass")
    forward.set_ylabel("multiply-adds")
    figure.suptitle(f"Work of one RandLoRA layer of {side} x {side}, r = {r}", fontsize=13)
    handles, labels = forward.get_legend_handles_labels()
    figure.tight_layout()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.01), ncols=3, fontsize=10)
    return figure


def is_less(one: Formula, other: Formula, tokens: int, side: int, r: int) -> bool:
    """Whether one way takes fewer multiply-adds than another."""
    layer = Contraction((side, side), r=r, tokens=tokens)
    return one(layer).products < other(layer).products


def products(formula: Formula, tokens: np.ndarray, side: int, r: int) -> np.ndarray:
    """The multiply-adds of a pass for each number of tokens."""
    return np.array([formula(Contraction((side, side), r=r, tokens=int(count))).products for count in tokens])


# Trainable parameters.


def trainable(side: int = 4096) -> Figure:
    """Trainable numbers against r, of RandLoRA and of LoRA."""
    figure, axes = plt.subplots(figsize=(8, 5))
    ranks = 2 ** np.arange(int(np.log2(side)) + 1)
    of_randlora = np.array([interop.count_trainable((side, side), int(r)) for r in ranks])
    of_lora = 2 * side * ranks
    shown = of_lora <= 2 * side**2
    axes.loglog(ranks, of_randlora, color=RANDLORA, marker="o", ms=4, base=2, label="RandLoRA: n (r + d), n = d / r")
    axes.loglog(ranks[shown], of_lora[shown], color=LORA, marker="s", ms=4, base=2, label="LoRA: r (d + D)")
    axes.axhline(side**2, color=OTHER, ls=":", label=f"full fine-tuning: {side**2:,d}")
    axes.set_yscale("log", base=10)
    for r in (2, 8, 256):
        count = interop.count_trainable((side, side), r)
        label = f"r = {r}: {count:,d}"
        axes.annotate(label, (r, count), (8, 4), textcoords="offset points", color=RANDLORA)
    axes.set_xticks(ranks[::2], [str(r) for r in ranks[::2]])
    axes.set(xlabel="r", ylabel="trainable numbers of one layer")
    axes.set_title(
        f"A smaller r trains more in RandLoRA, and less in LoRA\n(one layer of {side} x {side})", fontsize=12.5
    )
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.26), ncols=3, fontsize=9.5)
    return figure


# Singular values of a fitted update.


def singular_values(side: int = 120, r: int = 8) -> Figure:
    """Both methods fitted to one random matrix with exactly as many trained numbers."""
    count = interop.count_trainable((side, side), r)
    lora_rank = count // (2 * side)
    assert lora_rank * 2 * side == count, "choose side and r so that both methods can train equally many"
    target = np.random.default_rng(0).standard_normal((side, side))
    u, sizes, v = np.linalg.svd(target)
    of_lora = (u[:, :lora_rank] * sizes[:lora_rank]) @ v[:lora_rank]  # the best of this rank
    of_randlora = fit_randlora(target, r)
    figure, axes = plt.subplots(figsize=(8.2, 5))
    index = np.arange(1, side + 1)
    axes.plot(index, sizes, color=OTHER, ls=":", lw=2, label="the target, a random matrix")
    for name, update, color in (
        (f"RandLoRA, r = {r}", of_randlora, RANDLORA),
        (f"LoRA, rank {lora_rank}", of_lora, LORA),
    ):
        values = np.linalg.svd(update, compute_uv=False)
        rank = int(np.linalg.matrix_rank(update))
        error = np.linalg.norm(update - target) / np.linalg.norm(target)
        axes.plot(index, values, color=color, lw=2, label=f"{name}: rank {rank} of {side}, relative error {error:.2f}")
    axes.set(xlabel="number of the singular value", ylabel="singular value of dW", xlim=(0, side + 1), ylim=(0, None))
    title = f"Singular values of an update of {side} x {side}, fitted with {count:,d} trained numbers:\n"
    title += "LoRA spends them on a few directions, RandLoRA spreads them over all"
    axes.set_title(title, fontsize=12)
    axes.legend(loc="upper right", fontsize=10)
    return figure


def fit_randlora(target: np.ndarray, r: int, sweeps: int = 60) -> np.ndarray:
    """The update of an adapter whose lambda and gamma were fitted to a matrix, in turns, each by least squares."""
    side = len(target)
    n = num_bases(side, r)
    config = interop.RandLoraConfig(r=r, randlora_alpha=r, target_modules=["layer"])
    adapter = interop.init_adapter(config, {"layer": target.shape})
    A = adapter.bases.A[:, 0].astype(np.float64)
    B = adapter.bases.B.reshape(side, -1).astype(np.float64)  # column q, see the picture of the pairing
    gamma = np.random.default_rng(1).standard_normal((n, side))
    for _ in range(sweeps):
        rows = (A[:, None] * gamma).reshape(-1, side)  # of the scaled A without lambda
        normal = (B.T @ B) * (rows @ rows.T)
        lam = np.linalg.solve(normal, np.einsum("iq,ij,qj->q", B, target, rows, optimize=True)).reshape(r, n)
        columns = B.reshape(side, r, n)  # the pairs (k, b) of the flat index q
        for j in range(side):
            design = np.einsum("ikb,kb,k->ib", columns, lam, A[:, j])
            gamma[:, j] = np.linalg.lstsq(design, target[:, j])[0]
    factors = interop.Factors(lam.astype(np.float32), gamma.astype(np.float32))
    fitted = interop.Adapter(config=config, factors={"layer": factors}, bases=adapter.bases, shapes=adapter.shapes)
    return fitted.delta_weight("layer")


PICTURES: dict[str, Callable[[], Figure]] = {
    "equation": equation,
    "pairing": pairing,
    "plans": plans,
    "trainable": trainable,
    "singular_values": singular_values,
}

if __name__ == "__main__":
    main()
