"""`python -m fxprune compile`."""

from __future__ import annotations

import argparse
import sys

from fxprune.budgets import Budget
from fxprune.commands import options
from fxprune.compiling import compile
from fxprune.costs import RESOURCES
from fxprune.errors import PlanError
from fxprune.reporting import report
from fxprune.saving import save

HELP = "make a network smaller, prove it, and save it with its plan"
EXAMPLES = """
  python -m fxprune compile torchvision.models:resnet18 --input 1,3,224,224 --macs 0.5 --out slim
  python -m fxprune compile my_package.nets:net --weights net.pt --input 1,3,64,64 --macs 0.5 --params 2000000 \\
      --method joint --calibration my_package.data:batches --tasks my_package.data:tasks --out slim --html slim.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    options.add_network(parser)
    options.add_inputs(parser)
    for name in RESOURCES:
        text = f"most {name} to keep: a share up to 1, or a number{options.UNITS.get(name, '')}"
        parser.add_argument(f"--{name}", type=float, metavar="BOUND", help=text)
    options.add_latency_model(parser)
    options.add_method(parser)
    options.add_weights(parser)
    options.add_output(parser)
    options.add_report(parser)


def run(args: argparse.Namespace) -> None:
    """Compile, save, tell."""
    bounds = {name: getattr(args, name) for name in RESOURCES if getattr(args, name) is not None}
    if not bounds:
        raise PlanError(
            "no budget is given. Pass at least one of `--macs`, `--params`, `--memory`, `--latency`: `--macs 0.5`."
        )
    options.check_paths(args)
    network, request = options.network_of(args), options.request_of(args)
    budget = Budget(**bounds, latency_model=options.latency_model_of(args, network))
    slim = compile(network, options.inputs_of(args), budget, progress=sys.stderr.isatty(), **request)
    save(slim, args.out)
    options.show(report(slim), args)
    print(f"wrote {args.out}: plan.json, weights.safetensors", file=sys.stderr)
