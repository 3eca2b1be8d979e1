"""`randlora convert`: an adapter folder rewritten, with the same numbers, in the layout that a reader needs."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from interop.commands.shared import add_json, add_source, open_source, show
from interop.files import BASES, save
from interop.folder import WEIGHTS_NAME

HELP = "rewrite an adapter folder: PEFT's copies of the bases become one, or none, or one per layer again"
EXAMPLES = """\
randlora convert adapter rewritten                      one copy of the bases
randlora convert adapter small --bases none             the seed is enough, and checked by its hash
randlora convert adapter wide --bases per-layer         for transformers' model.load_adapter
randlora convert adapter rewritten --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    add_source(parser)
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--bases", choices=BASES, help="how many copies to write; by default as the adapter says")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Write the folder."""
    adapter = open_source(options, options.source)
    save(adapter, options.target, bases=options.bases)
    size = (options.target / WEIGHTS_NAME).stat().st_size
    show(Written(str(options.target), len(adapter.modules), size), options.json)
    return 0


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written: the folder, how many layers it adapts, and the bytes of its tensors' file."""

    folder: str
    modules: int
    bytes_written: int

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-compatible values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """One line."""
        return f"wrote {self.folder}: {self.modules} layers, {self.bytes_written:,d} bytes"
