"""`python -m fxprune demo`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from pathlib import Path

from fxprune.errors import FxPruneError

HELP = "train a network of three tasks, compile it to half of its macs, fine-tune, compare"
EXAMPLES = """
  python -m fxprune demo
  python -m fxprune demo --quick --budget 0.4 --out out
  python -m fxprune demo --quick --json > demo.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the macs to keep (default: %(default)s)")
    text = "where to write (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("fxprune_demo"), metavar="DIR", help=text)
    parser.add_argument("--quick", action="store_true", help="less data and training, to see it run")
    parser.add_argument("--json", action="store_true", help="print JSON; everything else goes to stderr")


def run(args: argparse.Namespace) -> None:
    """Run the demo, if what it needs is installed."""
    try:
        demo = importlib.import_module("fxprune.examples.demo")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("sklearn", "matplotlib"):
            raise
        message = f'the demo needs {package}, which is not installed. Run `pip install -e ".[examples]"`.'
        raise FxPruneError(message) from error
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        outcome = demo.run(seed=args.seed, budget=args.budget, out=args.out, quick=args.quick)
    if args.json:
        print(json.dumps(outcome.to_dict(), indent=2))
