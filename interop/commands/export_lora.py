"""`randlora export-lora`: the closest LoRA, for servers that know only LoRA."""

import argparse
from pathlib import Path

from interop.commands.shared import add_json, add_source, open_source, show
from interop.lora import FLOATS, export_lora
from interop.progress import progress

HELP = "write the closest PEFT LoRA of a rank, for servers that know only LoRA, and the relative error of each module"
EXAMPLES = """\
randlora export-lora adapter lora --rank 4
randlora export-lora adapter lora --rank 4 --dtype bfloat16 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    add_source(parser)
    parser.add_argument("target", type=Path, help="the folder to write; it may hold an older LoRA")
    parser.add_argument("--rank", type=int, required=True, help="of the LoRA; RandLoRA itself has full rank")
    parser.add_argument("--dtype", choices=FLOATS, default="float32", help="what the LoRA is stored in")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Write the LoRA and print the errors."""
    adapter = open_source(options, options.source)
    show(export_lora(adapter, options.target, rank=options.rank, dtype=options.dtype, progress=progress), options.json)
    return 0
