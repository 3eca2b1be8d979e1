"""Runs an example, a few steps of everything, in a process of its own as a user would run it."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name, folder, *arguments, **environment):
    """The lines that a copy of an example prints, made and run in an empty folder; it writes to its default --out."""
    shutil.copy(EXAMPLES / name, folder)
    return run_in_place(Path(folder, name), *arguments, cwd=folder, **environment)


def run_in_place(path, *arguments, cwd=None, **environment):
    """The lines that a program prints; further variables of its environment may be given."""
    command = [sys.executable, path, "--smoke", *map(str, arguments)]
    # Models this small only wait for a second thread, all the longer if the machine has other work. The eight devices
    # of the tests are for meshes: an example has those that it makes itself. What a copy imports is this checkout's.
    root = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": "", "PYTHONPATH": root, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def docstring(name):
    """What an example says about itself."""
    return ast.get_docstring(ast.parse((EXAMPLES / name).read_text(encoding="utf-8")), clean=False) or ""
