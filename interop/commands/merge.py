"""`randlora merge`: an adapter and its base's folder become the folder of a plain model."""

import argparse
from pathlib import Path

from interop.commands.shared import add_json, add_source, open_source, show
from interop.merging import merge
from interop.modelfolder import FLOATS
from interop.progress import progress

HELP = "add an adapter's update to the weights of its base, plain or quantized, shard by shard"
EXAMPLES = """\
randlora merge adapter base merged
randlora merge adapter base merged-16 --dtype bfloat16 --json
randlora merge adapter base-4bit merged-4bit --requantize     a 4-bit or 8-bit base stays one
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    add_source(parser, "adapter", base=False)
    parser.add_argument("base", type=Path, help="the folder of its base model, in safetensors")
    parser.add_argument("target", type=Path, help="the folder to write; it must not exist, or be empty")
    parser.add_argument("--dtype", choices=list(FLOATS), help="store floating-point weights in it; by default as now")
    parser.add_argument("--requantize", action="store_true", help="keep a bitsandbytes base quantized, in its format")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Merge, and print what was done."""
    adapter = open_source(options, options.adapter)
    quantized = "requantize" if options.requantize else "dequantize"
    found = merge(adapter, options.base, options.target, dtype=options.dtype, quantized=quantized, progress=progress)
    show(found, options.json)
    return 0
