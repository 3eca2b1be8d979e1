"""Shared by the benchmarks: competitors take turns in one process, and results are written with the machine's name."""

import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

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
    low, middle, high = (1e3 * value for value in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def write(
    name: str, title: str, rows: list[tuple[str, ...]], *, packages: tuple[str, ...], accelerator: str = ""
) -> None:
    """Print a Markdown table (first row: its head) and store it under results/, with hardware and versions.

    What was measured on an accelerator goes into a file of its own; name it if it is not jax's device.
    """
    accelerator = accelerator or _accelerator()
    name += "." + re.sub(r"\W+", "-", accelerator) if accelerator else ""
    text = table(title, rows, packages=packages, accelerator=accelerator)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def table(title: str, rows: list[tuple[str, ...]], *, packages: tuple[str, ...], accelerator: str = "") -> str:
    """What `write` writes."""
    machine = f"{_cpu()}, {os.cpu_count()} cores" + f", {accelerator}" * bool(accelerator)
    lines = [f"# {title}", "", f"{machine}, Python {platform.python_version()}, "]
    lines[-1] += ", ".join(f"{package} {version(package)}" for package in packages) + "."
    head, *body = rows
    return "\n".join([*lines, "", *(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *body)), ""])


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
