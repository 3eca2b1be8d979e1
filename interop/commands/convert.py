"""`randlora convert`: an adapter folder rewritten, with the same numbers, in the layout that a reader needs."""

import argparse
from pathlib import Path

from interop.commands.shared import add_recipe
from interop.files import BASES, load, save

HELP = "rewrite an adapter folder: PEFT's copies of the bases become one, or none, or one per layer again"
EXAMPLES = """\
randlora convert adapter rewritten                      one copy of the bases
randlora convert adapter small --bases none             the seed is enough, and checked by its hash
randlora convert adapter wide --bases per-layer         for transformers' model.load_adapter
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("source", type=Path, help="the adapter folder to read, by PEFT or by randlora")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--adapter-name", help="of one that stands in a sub-folder of the source")
    parser.add_argument("--bases", choices=BASES, help="how many copies to write; by default as the adapter says")
    add_recipe(parser)


def run(options: argparse.Namespace) -> int:
    """Write the folder."""
    adapter = load(options.source, adapter_name=options.adapter_name, recipe=options.recipe, lazy=True)
    save(adapter, options.target, bases=options.bases)
    print(f"wrote {options.target}")
    return 0
