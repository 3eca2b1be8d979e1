"""`randlora merge`: an adapter and its base's folder become the folder of a plain model."""

import argparse
import dataclasses
import json
from pathlib import Path

from interop.bases import RECIPES
from interop.files import load
from interop.merging import MergeReport, merge
from interop.modelfolder import FLOATS

HELP = "add an adapter's update to the weights of its base, for transformers to load without it"
EXAMPLES = """randlora merge adapter base merged
randlora merge adapter base merged --dtype bfloat16
randlora merge adapter base merged --requantize
randlora merge adapter base merged --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument("base", type=Path, help="folder of its base model, in safetensors")
    parser.add_argument("target", type=Path, help="folder to write; it must not exist, or be empty")
    parser.add_argument("--adapter-name", help="which of several adapters in the folder")
    parser.add_argument("--recipe", choices=RECIPES, help="of the bases, if the folder neither holds nor names them")
    parser.add_argument("--dtype", choices=list(FLOATS), help="store floating-point weights in it; by default as now")
    parser.add_argument("--requantize", action="store_true", help="keep a bitsandbytes base quantized, in its format")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(options: argparse.Namespace) -> int:
    """Merge, and print what was done."""
    adapter = load(options.adapter, adapter_name=options.adapter_name, recipe=options.recipe, lazy=True)
    quantized = "requantize" if options.requantize else "dequantize"
    report = merge(adapter, options.base, options.target, dtype=options.dtype, quantized=quantized)
    if options.json:
        rounding = {module: found._asdict() for module, found in report.rounding.items()}
        print(json.dumps({**dataclasses.asdict(report), "rounding": rounding}, indent=2))
    else:
        _print(report, options.target)
    return 0


def _print(report: MergeReport, target: Path) -> None:
    print(f"wrote {target}: {len(report.modules)} layers merged, {report.bytes_written:,d} bytes of weights")
    for what, names in (("replaced", report.replaced), ("added", report.added), ("left out", report.left_out)):
        if names:
            print(f"{what:<9} {', '.join(names)}")
    module, worst = max(report.rounding.items(), key=lambda item: item[1].of_update)
    print(f"rounding  at most {worst.of_weight:.1e} of W + dW and {worst.of_update:.1e} of dW ({module})")
