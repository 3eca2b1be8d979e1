"""What several commands ask for, and how they print."""

import argparse
import json
from typing import Any

from interop.bases import RECIPES


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The option that says how bases were made which a file neither holds nor names."""
    parser.add_argument("--recipe", choices=RECIPES, help="of the bases, if the folder neither holds nor names them")


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
