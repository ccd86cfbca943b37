"""Options that several commands have, and what they stand for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune import methods
from fxprune.commands.networks import fill, load_batches, load_network, load_tasks, parse_input
from fxprune.errors import ArtifactError, FxPruneError
from fxprune.latencies import LatencyModel
from fxprune.reporting import Report
from fxprune.tracing import trace

METHODS: dict[str, Callable[[], Any]] = {
    "joint": methods.Joint,
    "magnitude": methods.Magnitude,
    "taylor": methods.Taylor,
    "batch-norm-scale": methods.BatchNormScale,
    "random": methods.Random,
    "filter-omp": methods.FilterOMP,
    "filter-backward": methods.FilterBackward,
    "catro": methods.CATRO,
    "pagcp": methods.PAGCP,
    "hbgs": methods.HBGS,
    "hbgts": methods.HBGTS,
}

UNITS = {"memory": " of bytes", "latency": " of microseconds"}
"""What numbers of resources count, where the name does not tell."""


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add the network."""
    text = "a function or class that returns the network, or the network itself"
    parser.add_argument("network", metavar="MODULE:FACTORY", help=text)


def add_inputs(parser: argparse.ArgumentParser, *, known: bool = False) -> None:
    """Add example inputs; `known`: they are in the plan already, if they could be saved."""
    text = "an example input, such as 1,3,224,224 or 2,16:int64; once per argument"
    text += " (default: those of the plan)" if known else ""
    parser.add_argument("--input", action="append", required=not known, metavar="SHAPE[:DTYPE]", help=text)


def add_latency_model(parser: argparse.ArgumentParser) -> None:
    """Add what predicts latencies."""
    text = "what `fxprune.LatencyModel.save` wrote (default: with --latency, one is measured here, for these inputs)"
    parser.add_argument("--latency-model", type=Path, metavar="FILE", help=text)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add a file with weights."""
    text = "weights of the network: .safetensors, or from torch.save(model.state_dict(), FILE) (default: those that it "
    parser.add_argument("--weights", type=Path, metavar="FILE", help=f"{text}comes with)")


def add_method(parser: argparse.ArgumentParser) -> None:
    """Add how channels are ranked, and the data for it."""
    text = f"one of {', '.join(METHODS)} (default: joint with --calibration, else magnitude)"
    parser.add_argument("--method", choices=METHODS, metavar="NAME", help=text)
    text = "a function that returns batches (inputs, targets), for methods that need data"
    parser.add_argument("--calibration", metavar="MODULE:FACTORY", help=text)
    text = "a function that returns a dict of name -> fxprune.Task, for methods that need losses"
    parser.add_argument("--tasks", metavar="MODULE:FACTORY", help=text)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the folder for the slim network."""
    text = "gets plan.json and weights.safetensors; made if it does not exist"
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help=text)


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add in which forms the report is wanted."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the report as one HTML file")


def network_of(args: argparse.Namespace) -> nn.Module:
    """Return the network, in evaluation mode, with its weights."""
    network = load_network(args.network).eval()
    if args.weights:
        fill(network, args.weights)
    return network


def inputs_of(args: argparse.Namespace) -> tuple[torch.Tensor, ...] | None:
    """Return the example inputs, or None where none are given."""
    return tuple(parse_input(text) for text in args.input) if args.input else None


def request_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the method, the batches and the tasks, as `compile` takes them."""
    return {
        "method": METHODS[args.method]() if args.method else None,
        "calibration": load_batches(args.calibration) if args.calibration else None,
        "tasks": load_tasks(args.tasks) if args.tasks else None,
    }


def latency_model_of(args: argparse.Namespace, network: nn.Module) -> LatencyModel | None:
    """Return the latency model of a file, or else, if latency is bounded, one measured now."""
    if args.latency_model:
        return LatencyModel.load(args.latency_model)
    if not args.latency:
        return None
    inputs = inputs_of(args) or ()
    return LatencyModel.measure(trace(network, inputs), batch=next((len(x) for x in inputs if x.ndim), 1))


def check_paths(args: argparse.Namespace) -> None:
    """Check where results go, before any work.

    Raises:
        FxPruneError: the folder is a file, or the file a folder.
    """
    out, page = getattr(args, "out", None), args.html
    if out is not None and out.exists() and not out.is_dir():
        raise ArtifactError(f"--out {out} is a file. Name a folder.")
    if page is not None and page.is_dir():
        raise FxPruneError(f"--html {page} is a folder. Name a file, such as `--html {page / 'report.html'}`.")


def show(report: Report, args: argparse.Namespace) -> None:
    """Print a report and write its page; where files went is told on stderr."""
    print(report.to_json() if args.json else report)
    if args.html:
        report.to_html(args.html)
        print(f"wrote {args.html}", file=sys.stderr)
