"""`randlora convert`: an adapter folder rewritten, with the same numbers, in the layout that a reader needs."""

import argparse
from pathlib import Path

from interop.commands.shared import add_source, open_source
from interop.files import BASES, save

HELP = "rewrite an adapter folder: PEFT's copies of the bases become one, or none, or one per layer again"
EXAMPLES = """\
randlora convert adapter rewritten                      one copy of the bases
randlora convert adapter small --bases none             the seed is enough, and checked by its hash
randlora convert adapter wide --bases per-layer         for transformers' model.load_adapter
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    add_source(parser)
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--bases", choices=BASES, help="how many copies to write; by default as the adapter says")


def run(options: argparse.Namespace) -> int:
    """Write the folder."""
    save(open_source(options, options.source), options.target, bases=options.bases)
    print(f"wrote {options.target}")
    return 0
