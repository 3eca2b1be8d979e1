"""What several commands ask for, and how they print."""

import argparse
import json
from pathlib import Path
from typing import Any

from interop.adapter import Adapter
from interop.bases import RECIPES
from interop.files import load
from interop.mergeplan import bind_to_folder


def add_source(parser: argparse.ArgumentParser, name: str = "source", *, base: bool = True) -> None:
    """The adapter folder to read, and what its file may leave open."""
    parser.add_argument(name, type=Path, help="the adapter folder, by PEFT or by randlora")
    parser.add_argument("--adapter-name", metavar="NAME", help="of one that stands in a sub-folder")
    add_open_questions(parser, base=base)


def add_open_questions(parser: argparse.ArgumentParser, *, base: bool = True) -> None:
    """Options for what a file without bases leaves open: how they are drawn, and for layers of which size."""
    parser.add_argument("--recipe", choices=RECIPES, help="of the bases, if the file neither holds nor names them")
    if base:
        text = "a folder of the base model, to size the bases by, if the file does not say"
        parser.add_argument("--base-model", type=Path, metavar="BASE", help=text)


def open_source(options: argparse.Namespace, folder: Path) -> Adapter:
    """The adapter in a folder, read layer by layer, with what the options say of it."""
    name = getattr(options, "adapter_name", None)
    adapter = load(folder, adapter_name=name, recipe=options.recipe, lazy=True)
    base = getattr(options, "base_model", None)
    return adapter if base is None else bind_to_folder(adapter, base)


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option to print for programs."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def show(found: Any, as_json: bool) -> None:
    """Print what has a `to_dict` and a `str`, in one of the two forms.

    Names in files are untrusted: control characters, which could rewrite what stands on a terminal, are spelled out.
    """
    print(json.dumps(found.to_dict(), indent=2) if as_json else printable(str(found)))


def printable(text: str) -> str:
    """The text with all but printable characters and line ends spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
