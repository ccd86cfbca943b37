"""`python -m fxprune report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fxprune.commands import options
from fxprune.commands.networks import load_network
from fxprune.reporting import report
from fxprune.saving import load

HELP = "say what was done to a slim network that was saved"
EXAMPLES = """
  python -m fxprune report slim torchvision.models:resnet18 --html report.html
  python -m fxprune report slim my_package.nets:net --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what `compile --out` or `fxprune.save` wrote")
    options.add_network(parser)
    options.add_inputs(parser, known=True)
    options.add_report(parser)


def run(args: argparse.Namespace) -> None:
    """Load, tell."""
    options.check_paths(args)
    network = load_network(args.network).eval()
    options.show(report(load(args.folder, network, example_inputs=options.inputs_of(args))), args)
