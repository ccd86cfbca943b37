"""`python -m fxprune apply`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fxprune.commands import options
from fxprune.reporting import report
from fxprune.saving import PLAN, cut, save

HELP = "cut another checkpoint of a network by a plan that was saved, and prove it"
EXAMPLES = """
  python -m fxprune apply slim/plan.json torchvision.models:resnet18 --weights other.pt --out other_slim
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    text = "the plan.json of a slim network, or what `plan.to_json()` gave"
    parser.add_argument("plan", type=Path, metavar="PLAN.json", help=text)
    options.add_network(parser)
    options.add_weights(parser)
    options.add_inputs(parser, known=True)
    options.add_output(parser)
    options.add_report(parser)


def run(args: argparse.Namespace) -> None:
    """Cut, save, tell."""
    options.check_paths(args)
    path = args.plan / PLAN if args.plan.is_dir() else args.plan
    notes = (f"cut by {path}; the weights that stay are as they were",)
    slim = cut(path, options.network_of(args), example_inputs=options.inputs_of(args), verify=True, notes=notes)
    save(slim, args.out)
    options.show(report(slim), args)
    print(f"wrote {args.out}: plan.json, weights.safetensors", file=sys.stderr)
