"""Runs an example, a few steps of everything, in a process of its own as a user would run it."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name, *arguments, **environment):
    """The lines that an example prints; further variables of its environment may be given."""
    command = [sys.executable, EXAMPLES / name, "--smoke", *map(str, arguments)]
    # Models this small only wait for a second thread, all the longer if the machine has other work. The eight devices
    # of the tests are for meshes: an example has those that it makes itself.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": "", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def assert_tells_the_last_line(name, line, out):
    """The module docstring says what the last line is, with the default folder in it."""
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    assert line.replace(str(out), f"runs/{name.removesuffix('.py')}") in source.split('"""')[1]


def assert_is_short(name):
    """An example is read from top to bottom in one go, and its options at a glance."""
    lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150
    assert sum("add_argument(" in line for line in lines) <= 8
