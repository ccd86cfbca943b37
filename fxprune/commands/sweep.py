"""`python -m fxprune sweep`."""

from __future__ import annotations

import argparse
import json

from fxprune.budgets import Budget
from fxprune.commands import options
from fxprune.costs import RESOURCES
from fxprune.coupling import couple
from fxprune.sweeping import sweep
from fxprune.tracing import trace

HELP = "plan for many budgets, and say what each costs"
EXAMPLES = """
  python -m fxprune sweep torchvision.models:resnet18 --input 1,3,224,224 --macs 0.7 0.5 0.3
  python -m fxprune sweep my_package.nets:net --input 1,3,64,64 --params 0.5 0.25 --weights net.pt \\
      --calibration my_package.data:batches --tasks my_package.data:tasks --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    options.add_network(parser)
    options.add_inputs(parser)
    bounds = parser.add_mutually_exclusive_group(required=True)
    for name in RESOURCES:
        text = f"budgets on {name}: shares up to 1, or numbers{options.UNITS.get(name, '')}"
        bounds.add_argument(f"--{name}", type=float, nargs="+", metavar="BOUND", help=text)
    options.add_latency_model(parser)
    options.add_method(parser)
    options.add_weights(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> None:
    """Plan for every budget, tell."""
    network, request = options.network_of(args), options.request_of(args)
    model = options.latency_model_of(args, network)
    asked = [{name: bound} for name in RESOURCES for bound in getattr(args, name) or ()]
    budgets = [Budget(**bounds, latency_model=model) for bounds in asked]
    points = sweep(couple(trace(network, options.inputs_of(args))), budgets, **request)
    print(json.dumps(points.to_dict(), indent=2) if args.json else points)
