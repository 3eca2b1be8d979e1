"""`randlora diff`: what two adapters adapt differently, and by how much."""

import argparse
from pathlib import Path

from interop.commands.shared import add_json, add_open_questions, open_source, show
from interop.diff import diff
from interop.progress import progress

HELP = "compare two adapter folders, module by module: exit code 0 if they are the same update, 1 if not"
EXAMPLES = """\
randlora diff adapter other
randlora diff adapter other --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("a", type=Path, metavar="A", help="an adapter folder")
    parser.add_argument("b", type=Path, metavar="B", help="another one; of any method, rank and seed")
    add_open_questions(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the differences."""
    found = diff(open_source(options, options.a), open_source(options, options.b), progress=progress)
    show(found, options.json)
    return 0 if found.same else 1
