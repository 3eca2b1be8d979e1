"""The `randlora` command: adapters looked into, rewritten, compared, merged and exported, without a framework."""

import argparse
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from interop.commands import convert, diff, export_lora, inspect, merge, verify
from interop.commands.shared import printable

COMMANDS: dict[str, ModuleType] = {
    "inspect": inspect,
    "convert": convert,
    "verify": verify,
    "diff": diff,
    "merge": merge,
    "export-lora": export_lora,
}
SAME, DIFFERENT, TROUBLE = 0, 1, 2
EXIT_CODES = "exit codes: 0 done, or the same; 1 verify and diff: not the same; 2 it could not be done, see stderr"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, see `EXIT_CODES`."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _complain(options.command, f"warning: {message}")
            return options.run(options)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at exit
        return SAME
    except KeyboardInterrupt:
        _complain(options.command, "interrupted")
    except MemoryError:
        _complain(options.command, "there is not enough memory for this adapter")
    except (OSError, ValueError, ImportError, Warning) as error:
        _complain(options.command, str(error))
    return TROUBLE


class _Version(argparse.Action):
    """Looked up only when asked for: commands also run from sources that are not installed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"randlora {importlib.metadata.version('randlora')}")
        parser.exit()


def _complain(command: str, text: str) -> None:
    print(printable(f"randlora {command}: {text}"), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="randlora",
        description="RandLoRA and AdaLoRA adapters in PEFT's format.",
        epilog=f"{EXIT_CODES}\n\n`randlora COMMAND --help` has examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version of the package, and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.HELP,
            description=f"{command.HELP[0].upper()}{command.HELP[1:]}.",
            epilog="examples:\n" + "".join(f"  {line}\n" for line in command.EXAMPLES.splitlines()) + f"\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser
