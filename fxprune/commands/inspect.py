"""`python -m fxprune inspect`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fxprune.commands.networks import load_network
from fxprune.commands.options import add_inputs, add_network, inputs_of
from fxprune.coupling import couple
from fxprune.drawing import draw_groups
from fxprune.inspecting import inspect
from fxprune.tracing import trace

HELP = "say what can be pruned from a network, what not, why, and at which cost"
EXAMPLES = """
  python -m fxprune inspect torchvision.models:resnet18 --input 1,3,224,224
  python -m fxprune inspect my_package.nets:TwoInputs --input 1,3,64,64 --input 1,10
  python -m fxprune inspect my_package.nets:encoder --input 2,16:int64 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_network(parser)
    add_inputs(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw the groups, as .png, .svg or .pdf")


def run(args: argparse.Namespace) -> None:
    """Trace, couple, tell."""
    coupling = couple(trace(load_network(args.network), inputs_of(args)))
    inspection = inspect(coupling)
    print(json.dumps(inspection.to_dict(), indent=2) if args.json else inspection)
    if args.picture:
        draw_groups(coupling, args.picture)
