"""`randlora export-lora`: the closest LoRA, for servers that know only LoRA."""

import argparse
from pathlib import Path

from interop.commands.shared import add_json, add_recipe, show
from interop.compare import open_adapter
from interop.lora import FLOATS, export_lora
from interop.progress import progress

HELP = "write the closest PEFT LoRA of a rank, for servers that know only LoRA, and the relative error of each module"
EXAMPLES = """\
randlora export-lora adapter lora --rank 4
randlora export-lora adapter lora --rank 4 --dtype bfloat16 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("source", type=Path, help="the adapter folder")
    parser.add_argument("target", type=Path, help="the folder to write; it may hold an older LoRA")
    parser.add_argument("--rank", type=int, required=True, help="of the LoRA; RandLoRA itself has full rank")
    parser.add_argument("--dtype", choices=FLOATS, default="float32", help="what the LoRA is stored in")
    parser.add_argument("--adapter-name", help="of one that stands in a sub-folder of the source")
    add_recipe(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Write the LoRA and print the errors."""
    adapter = open_adapter(options.source, adapter_name=options.adapter_name, recipe=options.recipe)
    show(export_lora(adapter, options.target, rank=options.rank, dtype=options.dtype, progress=progress), options.json)
    return 0
