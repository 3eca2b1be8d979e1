"""Shared by the benchmarks: competitors take turns in one process, and results are written with the machine's name.

Machines are noisy, so a claim is about a ratio within one run: `ratio` compares two competitors round by round.
"""

import math
import os
import platform
import re
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import matplotlib
import numpy
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"


def alternate(competitors: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call; every round runs all competitors once, so that a noisy moment hits them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds + 1):
        for name, run in competitors.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}  # the first round warms up


def spread(seconds: list[float]) -> str:
    """Median in milliseconds with the range."""
    middle, low, high = (1e3 * value for value in bar(seconds))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def bar(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest and largest, as `draw` takes them."""
    return statistics.median(values), min(values), max(values)


def ratios(seconds: Mapping[str, list[float]], one: str, other: str) -> list[float]:
    """By how much `one` takes longer than `other`, in each round."""
    return [mine / theirs for mine, theirs in zip(seconds[one], seconds[other], strict=True)]


def ratio(seconds: Mapping[str, list[float]], one: str, other: str) -> float:
    """The median of `ratios`."""
    return statistics.median(ratios(seconds, one, other))


def write(
    name: str, title: str, rows: list[tuple[str, ...]], *, packages: tuple[str, ...], accelerator: str = ""
) -> None:
    """Print a Markdown table (first row: its head) and store it under results/, with hardware and versions.

    What was measured on an accelerator goes into a file of its own; name it if it is not jax's device.
    """
    accelerator = accelerator or _accelerator()
    text = table(title, rows, packages=packages, accelerator=accelerator)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{_file_name(name, accelerator)}.md").write_text(text, encoding="utf-8")
    print(text)


def table(title: str, rows: list[tuple[str, ...]], *, packages: tuple[str, ...], accelerator: str = "") -> str:
    """What `write` writes."""
    machine = f"{_cpu()}, {os.cpu_count()} cores" + f", {accelerator}" * bool(accelerator)
    lines = [f"# {title}", "", f"{machine}, Python {platform.python_version()}, "]
    lines[-1] += ", ".join(f"{package} {version(package)}" for package in packages) + "."
    head, *body = rows
    return "\n".join([*lines, "", *(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *body)), ""])


def draw(
    name: str,
    title: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    unit: str,
    *,
    accelerator: str = "",
) -> None:
    """Store a picture beside the table: for each group one bar per series, with the range of its rounds.

    `unit` says in words what the bars are. If it is relative to something, a line marks 1. A series that a group does
    not have is nan there.
    """
    matplotlib.use("Agg")
    wide = min(14.0, max(8.0, 0.3 * len(groups) * (len(series) + 1) + 3))
    figure, axes = pyplot.subplots(figsize=(wide, 4.5), layout="constrained")
    width, crowded = 0.8 / len(series), len(groups) * len(series) > 24
    there = [[name for name, bars in series.items() if not math.isnan(bars[place][0])] for place in range(len(groups))]
    for label, bars in series.items():
        places = [place for place, names in enumerate(there) if label in names]
        centers = [place + (there[place].index(label) - (len(there[place]) - 1) / 2) * width for place in places]
        middle, low, high = zip(*(bars[place] for place in places), strict=True)
        errors = numpy.abs(numpy.subtract([low, high], [middle, middle]))
        line = {"linewidth": 0.8 if errors.any() else 0}
        drawn = axes.bar(centers, middle, width, yerr=errors, label=label, capsize=2 * errors.any(), error_kw=line)
        if not crowded:
            numbers = [f"{value:.3g}" if value >= 10 else f"{value:.2f}" for value in middle]
            axes.bar_label(drawn, numbers, padding=2, fontsize="small")  # above the line of the rounds
    if "relative" in unit:
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xticks(range(len(groups)), groups, fontsize="small" if crowded else "medium")
    axes.set(title=textwrap.fill(title, int(10 * wide)), ylabel=f"{unit} (less is better)")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if any(low < high for bars in series.values() for _, low, high in bars):
        figure.supxlabel("bars: medians; lines: from the lowest to the highest of the rounds", fontsize="small")
    if len(series) > 1:
        figure.legend(loc="outside upper center", ncols=min(len(series), 3 if wide < 12 else 6), fontsize="small")
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{_file_name(name, accelerator or _accelerator())}.png", dpi=110)
    pyplot.close(figure)


def _file_name(name: str, accelerator: str) -> str:
    return name + ("." + re.sub(r"\W+", "-", accelerator) if accelerator else "")


def _accelerator() -> str:
    """Name of the device that jax computes on, if the benchmark uses jax and it is not the CPU."""
    devices = sys.modules["jax"].devices() if "jax" in sys.modules else []
    return devices[0].device_kind if devices and devices[0].platform != "cpu" else ""


def _cpu() -> str:
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0].split(":")[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
