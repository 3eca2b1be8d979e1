"""`randlora verify`: that nothing was lost between two adapter folders, by three independent computations."""

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np

from interop.adapter import Adapter
from interop.commands.shared import add_json, add_open_questions, open_source, show
from interop.convert import STACKS, stack_inference
from interop.modelfolder import CONFIG_NAME, read_json
from interop.progress import progress
from interop.verify import TOLERANCE, verify

HELP = "check that two adapter folders are the same update in numpy, JAX and torch: exit code 0 if so, 1 if not"
EXAMPLES = """\
randlora verify adapter rewritten
randlora verify adapter rewritten --stacks none --json           numpy alone
randlora verify adapter rewritten --stacks torch --logits base   the logits of a model, too
"""
TOKENS = (2, 32)  # batch, length


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("a", type=Path, metavar="A", help="what is right: an adapter folder")
    parser.add_argument(
        "b", type=Path, metavar="B", nargs="?", help="what it became: another one; by default A, for the stacks alone"
    )
    choices = (*STACKS, "none")
    parser.add_argument("--stacks", nargs="+", choices=choices, help="what computes besides numpy; by default all")
    text = "compare logits in torch, with the base model in this folder"
    parser.add_argument("--logits", type=Path, metavar="BASE", help=text)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"of relative errors; {TOLERANCE:.0e}")
    add_open_questions(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    stacks = None if options.stacks is None else [name for name in options.stacks if name != "none"]
    a = open_source(options, options.a)
    b = None if options.b is None else open_source(options, options.b)
    logits = {} if options.logits is None else _logits(options.logits, a, a if b is None else b)
    found = verify(a, b, stacks=stacks, tolerance=options.tolerance, progress=progress, **logits)
    show(found, options.json)
    return 0 if found.passed else 1


def _logits(base: Path, *adapters: Adapter) -> dict[str, Any]:
    """Models, each loaded when it is called, and token ids that no tokenizer is needed for."""
    call = stack_inference("torch").adapted_logits
    vocabulary = read_json(base / CONFIG_NAME).get("vocab_size")
    if not isinstance(vocabulary, int):
        raise ValueError(f"{base / CONFIG_NAME} gives no vocab_size: logits are compared for language models only.")
    inputs = np.random.default_rng(0).integers(0, vocabulary, TOKENS)
    return {"models": [functools.partial(call, base, adapter) for adapter in adapters], "inputs": inputs}
