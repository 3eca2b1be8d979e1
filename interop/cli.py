"""The `randlora` command: look into an adapter folder, and rewrite one, without any framework."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interop.adalora import AdaLoraConfig, SVDFactors
from interop.adapter import Adapter
from interop.bases import RECIPES, bases_digest
from interop.config import RandLoraConfig
from interop.errors import legible
from interop.files import load, save

EXAMPLES = """examples:
  randlora inspect runs/demo/adapter
  randlora inspect runs/demo/adapter --json
  randlora convert peft_adapter rewritten        PEFT's copies of the bases become one
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 1 with one line on stderr if the adapter cannot be read."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at exit
        return 0
    except (OSError, ValueError) as error:
        print(f"randlora {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="randlora",
        description="RandLoRA and AdaLoRA adapters in PEFT's format.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    inspect = commands.add_parser("inspect", help="show what an adapter folder holds")
    inspect.add_argument("folder", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON instead of text")
    inspect.set_defaults(run=_inspect)
    convert = commands.add_parser("convert", help="rewrite an adapter folder, with one copy of the bases")
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path)
    convert.set_defaults(run=_convert)
    for command in (inspect, convert):
        command.add_argument(
            "--recipe", choices=RECIPES, help="of the bases, if the folder neither holds nor names them"
        )
    return parser


def summary(adapter: Adapter) -> dict[str, Any]:
    """What an adapter holds, as JSON-compatible values."""
    config, parts = adapter.config, [part for factors in adapter.factors.values() for part in factors]
    return {
        "method": config.METHOD,
        **(_of_adalora(config) if isinstance(config, AdaLoraConfig) else _of_randlora(adapter)),
        "trainable_parameters": adapter.num_trainable,
        "trainable_bytes": sum(part.nbytes for part in parts),
        "other_tensors": sorted(adapter.saved_weights),
        "modules": {
            name: {
                "shape": None if adapter.shapes is None else list(adapter.shapes[name]),
                **(
                    {"rank": len(factors.E)}
                    if isinstance(factors, SVDFactors)
                    else {"short_side": factors.gamma.shape[1], "num_bases": factors.gamma.shape[0]}
                ),
                "parameters": sum(part.size for part in factors),
                "dtype": str(factors[0].dtype),
            }
            for name, factors in adapter.factors.items()
        },
    }


def _of_randlora(adapter: Adapter) -> dict[str, Any]:
    config, bases = adapter.config, adapter.bases
    return {
        "r": config.r,
        "randlora_alpha": config.randlora_alpha,
        "bases": _kind(config),
        "seed": config.projection_prng_key,
        "recipe": adapter.recipe,
        "bases_sha256": None if bases is None else bases_digest(bases),
        "bases_shapes": None if bases is None else {"A": list(bases.A.shape), "B": list(bases.B.shape)},
        "bases_bytes": None if bases is None else sum(array.nbytes for array in bases),
    }


def _of_adalora(config: AdaLoraConfig) -> dict[str, Any]:
    fields = ("init_r", "target_r", "lora_alpha", "tinit", "tfinal", "total_step")
    return {**{name: getattr(config, name) for name in fields}, "pruned": config.rank_pattern is not None}


def _kind(config: RandLoraConfig) -> str:
    return "very_sparse" if config.very_sparse else "sparse" if config.sparse else "dense"


def _inspect(options: argparse.Namespace) -> None:
    facts = summary(load(options.folder, recipe=options.recipe))
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    modules = facts.pop("modules")
    for name, value in facts.items():
        grouped = type(value) is int and "seed" not in name
        print(f"{name:<21} {value:,d}" if grouped else f"{name:<21} {value}")
    print(f"{'modules':<21} {len(modules)}")
    modules = {legible(name): module for name, module in modules.items()}
    width = max(map(len, modules))
    for name, module in modules.items():
        size = "x".join(map(str, module["shape"])) if module["shape"] else f"short side {module['short_side']}"
        units = f"rank {module['rank']:>4}" if "rank" in module else f"{module['num_bases']:>4} bases"
        counts = f"{units}  {module['parameters']:>11,d} {module['dtype']}"
        print(f"  {name:<{width}}  {size:>13}  {counts}")


def _convert(options: argparse.Namespace) -> None:
    save(load(options.source, recipe=options.recipe), options.target)
    print(f"wrote {options.target}")
