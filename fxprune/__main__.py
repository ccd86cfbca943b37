"""The command line: `python -m fxprune COMMAND`; the commands are in `fxprune.commands`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from fxprune.commands import apply, compile, demo, inspect, report, sweep
from fxprune.errors import FxPruneError, VerificationError

COMMANDS = {
    "demo": demo,
    "inspect": inspect,
    "compile": compile,
    "report": report,
    "apply": apply,
    "sweep": sweep,
}
CODES = "exit codes: 0 done; 2 a wrong request, told in one line on stderr; 3 the slim network failed its proof"
OPTIONS = {"example_inputs": "--input", "calibration": "--calibration", "tasks": "--tasks"}
"""Keyword of the library, as its messages write it -> option."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; default those of the process.

    Returns:
        The exit code: 0; 2 after an error, which is told in one line on stderr; 3 where the slim network differs from
        the masked original, in which case nothing is written.
    """
    args = _parser().parse_args(argv)
    try:
        args.command.run(args)
    except FxPruneError as error:
        print(f"fxprune: error: {_as_options(' '.join(str(error).split()))}", file=sys.stderr)
        return 3 if isinstance(error, VerificationError) else 2
    return 0


def _as_options(message: str) -> str:
    """Say an error in the words of the command line."""
    names = "|".join(OPTIONS)
    message = re.sub(rf"`({names})=[^`]*`", lambda found: f"`{OPTIONS[found[1]]}`", message)
    return re.sub(r"`(methods\.)?Magnitude\(\)`", "`--method magnitude`", message)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fxprune",
        description="Make trained networks physically smaller.",
        epilog=_epilog("".join(command.EXAMPLES for command in COMMANDS.values())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.HELP,
            description=f"{command.HELP[0].upper()}{command.HELP[1:]}.",
            epilog=_epilog(command.EXAMPLES),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(added)
        added.set_defaults(command=command)
    return parser


def _epilog(examples: str) -> str:
    lines = "\n".join(line for line in examples.split("\n") if line)
    return f"examples:\n{lines}\n\n{CODES}"


if __name__ == "__main__":
    sys.exit(main())
