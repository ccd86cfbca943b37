"""The command line: `python -m fxprune inspect` and `python -m fxprune demo`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.coupling import couple
from fxprune.drawing import draw_groups
from fxprune.errors import FxPruneError
from fxprune.inspecting import inspect
from fxprune.tracing import trace

EXAMPLES = """examples:
  python -m fxprune demo
  python -m fxprune demo --quick --budget 0.4 --out out
  python -m fxprune inspect torchvision.models:resnet18 --input 1,3,224,224
  python -m fxprune inspect my_package.nets:TwoInputs --input 1,3,64,64 --input 1,10
  python -m fxprune inspect my_package.nets:encoder --input 2,16:int64 --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; default those of the process.

    Returns:
        The exit code: 0, or 2 after an error, which is told in one line on stderr.
    """
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except FxPruneError as error:
        print(f"fxprune: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    look = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("fxprune", description="Make trained networks physically smaller.", **look)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = "say what can be pruned from a network, what not, why, and at which cost"
    command = commands.add_parser("inspect", help=text, description=text.capitalize() + ".", **look)
    command.set_defaults(command=_inspect)
    text = "a function or class that returns the network, or the network itself"
    command.add_argument("network", metavar="MODULE:FACTORY", help=text)
    text = "an example input, such as 1,3,224,224; once per argument"
    command.add_argument("--input", action="append", required=True, metavar="SHAPE[:DTYPE]", help=text)
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    command.add_argument("--picture", type=Path, metavar="FILE", help="also draw the groups, as .png, .svg or .pdf")

    text = "train a network of three tasks, compile it to half of its macs, fine-tune, compare"
    command = commands.add_parser("demo", help=text, description=text.capitalize() + ".", **look)
    command.set_defaults(command=_demo)
    command.add_argument("--seed", type=int, default=0, help="of data and weights (default: %(default)s)")
    command.add_argument("--budget", type=float, default=0.5, help="share of the macs to keep (default: %(default)s)")
    text = "where to write (default: %(default)s)"
    command.add_argument("--out", type=Path, default=Path("fxprune_demo"), metavar="DIR", help=text)
    command.add_argument("--quick", action="store_true", help="less data and training, to see it run")
    return parser


def _inspect(args: argparse.Namespace) -> None:
    coupling = couple(trace(load_network(args.network), tuple(parse_input(text) for text in args.input)))
    inspection = inspect(coupling)
    print(json.dumps(inspection.to_dict(), indent=2) if args.json else inspection)
    if args.picture:
        draw_groups(coupling, args.picture)


def _demo(args: argparse.Namespace) -> None:
    try:
        demo = importlib.import_module("fxprune.examples.demo")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("sklearn", "matplotlib"):
            raise
        message = f'the demo needs {package}, which is not installed. Run `pip install "fxprune[examples]"`.'
        raise FxPruneError(message) from error
    demo.run(seed=args.seed, budget=args.budget, out=args.out, quick=args.quick)


def load_network(name: str) -> nn.Module:
    """Return the network that `MODULE:FACTORY` names; modules of the current directory can be imported.

    Raises:
        FxPruneError: there is no such module or factory, it fails, or it gives something else than a network.
    """
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise FxPruneError(f"{name!r} is not MODULE:FACTORY. Write, for example, `torchvision.models:resnet18`.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        hint = "Install it, or run from the folder that holds it."
        raise FxPruneError(f"cannot import {module_name!r} ({type(error).__name__}: {error}). {hint}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            message = f"{module_name!r} has no {path!r}. Name a function, class or network that it defines."
            raise FxPruneError(message)
        found = getattr(found, part)
    try:
        network = found if isinstance(found, nn.Module) else found()
    except Exception as error:  # whatever the user's factory raises
        hint = "Name a function that takes no arguments and returns the network."
        raise FxPruneError(f"{name} cannot be called ({type(error).__name__}: {error}). {hint}") from error
    if not isinstance(network, nn.Module):
        hint = "Name a function that returns the network."
        raise FxPruneError(f"{name} gives {type(network).__name__!r}, not a torch.nn.Module. {hint}")
    return network


def parse_input(text: str) -> torch.Tensor:
    """Return an example input of the shape and dtype that `SHAPE[:DTYPE]` says.

    Raises:
        FxPruneError: not comma-separated positive whole numbers, or no dtype of torch.
    """
    shape, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise FxPruneError(f"--input {text}: torch has no dtype {name!r}. Write, for example, `--input 2,16:int64`.")
    sizes = [int(size) if size.strip().isdecimal() else 0 for size in shape.split(",")]
    if min(sizes) < 1:
        rule = "a shape is positive whole numbers with commas between"
        raise FxPruneError(f"--input {text}: {rule}. Write, for example, `--input 1,3,224,224`.")
    return torch.zeros(sizes, dtype=dtype)


if __name__ == "__main__":
    sys.exit(main())
