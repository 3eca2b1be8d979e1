"""The wheel as a stranger gets it: built from the sdist of the tracked sources, in an environment of its own."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import documents
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = documents.ROOT
NAME = "randlora"
ROADS = {"flax": "Flax", "torch": "PyTorch", "moving": "both"}  # the word that the README puts beside `pip install`
_INSTALL = re.compile(r"""^pip install .*\brandlora\[""")
# Blocks run in one interpreter of the road's environment, as pasted into a session, in an empty directory.
_FOLLOW = """
import pathlib, runpy, sys
documents, page = runpy.run_path(sys.argv[1]), pathlib.Path(sys.argv[2])
namespace = {"__name__": "__main__"}
for block in documents["blocks"](page):
    if sys.argv[3] in block.roads and "pip install" not in block.code:  # that is done already
        documents["run"](block, page, namespace)
"""


class Built(NamedTuple):
    """The two files that a release uploads."""

    sdist: Path
    wheel: Path


def sources():
    """Paths of the project's files: those that git knows or would add; in an unpacked sdist, those of the sdist."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    else:
        listed = (ROOT / f"{NAME}.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines()
        listed = [path for path in listed if ".egg-info/" not in path]
    return sorted(path for path in listed if (ROOT / path).is_file())


def build(folder):
    """Build the sdist from a clean copy of the sources and the wheel from the sdist, as `python -m build` does."""
    for path in sources():
        (folder / "copy" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / "copy" / path)
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    _run([sys.executable, "-I", "-c", code, folder], cwd=folder / "copy")
    (sdist,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-I", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    _run([*pip, "--wheel-dir", folder, sdist], cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return Built(sdist, wheel)


class Environment:
    """A fresh virtual environment with the wheel, and with nothing else that its requirements do not name."""

    def __init__(self, folder, wheel, requirements=(NAME,), *, from_index=False):
        """Install the wheel for `requirements`, such as "randlora[jax]".

        Without the index, the distributions in the closure of the requirements are linked from this environment.
        """
        scheme = {"base": str(folder), "platbase": str(folder)}
        self.bin = Path(sysconfig.get_path("scripts", "venv", scheme))
        self.site = Path(sysconfig.get_path("purelib", "venv", scheme))
        self.python = self.bin / "python"
        _run([sys.executable, "-I", "-m", "venv", *([] if from_index else ["--without-pip"]), folder])
        if from_index:
            given = [text.replace(NAME, str(wheel), 1) if text.startswith(NAME) else text for text in requirements]
            cpu_only = [] if shutil.which("nvidia-smi") else ["--constraint", ROOT / "constraints.txt"]
            _run([self.python, "-I", "-m", "pip", "install", *given, *cpu_only], timeout=3600)
        else:
            pip = [sys.executable, "-I", "-m", "pip", "--python", self.python, "install", "--no-index", "--no-deps"]
            _run([*pip, wheel])
            for distribution in closure(requirements, self.site):
                _link(distribution, self.site)

    def run(self, *command, cwd):
        """Run a program of the environment, as in a shell that knows nothing of this one; its completed process."""
        return _run([self.bin / command[0], *command[1:]], cwd=cwd, env=self._variables(), check=False)

    def follow(self, page, road, cwd):
        """Run the blocks of a page that belong to a road, in order; each must print what the page says."""
        blocks = [block for block in documents.blocks(page) if road in block.roads]
        assert {block.language for block in blocks} <= {"python", "bash"}, f"{page.name}, road {road}: only these run"
        shown = any(block.output is not None for block in blocks)
        assert shown, f"{page.name} has no block with output that is marked <!-- road: {road} -->"
        done = self.run("python", "-c", _FOLLOW, documents.__file__, page, road, cwd=cwd)
        assert done.returncode == 0, f"{page.name}, road {road}:\n{done.stdout}\n{done.stderr[-5000:]}"

    def _variables(self):
        ours = ("PYTHON", "JAX_", "XLA_", "PYTEST_", "VIRTUAL_ENV")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return kept | {"PATH": os.pathsep.join([str(self.bin), kept["PATH"]])}


def install_requirements(page, road):
    """What the page tells the users of a road to install: the words after `pip install` in the road's line."""
    found = {}
    for block in documents.blocks(page):
        said = ""
        for line in block.code.splitlines() if block.language in ("", "bash") else ():
            if line.startswith("#"):
                said = line
            elif _INSTALL.match(line):
                beside = line.partition("  #")[2] or said
                named = [name for name, word in ROADS.items() if re.search(rf"\b{word}\b", beside)]
                found |= dict.fromkeys(named[-1:] if "moving" in named else named, line)  # "both Flax and PyTorch"
    assert road in found, f"{page.name}: no `pip install` line with the comment '{ROADS[road]}', for the road {road}"
    return shlex.split(found[road], comments=True)[2:]


def closure(requirements, site):
    """The distributions of this environment that requirements need, markers evaluated; randlora is the one in `site`.

    An AssertionError names a requirement that this environment does not meet.
    """
    found, seen, todo = {}, set(), [Requirement(text) for text in requirements]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if (name, *sorted(wanted.extras)) in seen:
            continue
        seen.add((name, *sorted(wanted.extras)))
        path = [str(site)] if name == NAME else sys.path
        distribution = next(iter(importlib.metadata.distributions(name=name, path=path)), None)
        assert distribution is not None, f"{wanted} is required, and not installed"
        assert wanted.specifier.contains(distribution.version, prereleases=True), f"{wanted}: {distribution.version}"
        if name != NAME:
            found[name] = distribution
        for further in map(Requirement, distribution.requires or ()):
            if further.marker is None or any(further.marker.evaluate({"extra": e}) for e in ("", *wanted.extras)):
                todo.append(further)
    return list(found.values())


def _link(distribution, site):
    """Link what a distribution has at the top of its site-packages; namespace packages come whole."""
    for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        if not (site / name).exists():
            (site / name).symlink_to(Path(distribution.locate_file(name)).resolve())


def _run(command, *, check=True, timeout=600, **options):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=timeout, check=False, **options
    )
    assert done.returncode == 0 or not check, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done
