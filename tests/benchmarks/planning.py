"""Time planning with `Joint` against the plain forward and backward passes over the same calibration batches.

Planning is all that happens between a network and a plan: calibration, the removal paths of all groups, the losses
measured at some widths of each, and the allocation. It is compared with `loss.backward()` over the same batches, to the
gradients of all parameters, and with the cheaper pass to the gradients of activations only, which is what a calibration
needs. Both run before and after planning, in the same process, on as many threads.

Networks have random weights, and batch norms with the statistics of the data: digits among clutter, in colour,
enlarged. Each runs in its own process.

Run: ``python tests/benchmarks/planning.py [--networks NAME:PX ...] [--samples N] [--batch N] [--budget SHARE]
[--threads N] [--out FILE]``
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands import answer, command, header, section
from tqdm import tqdm

NETWORKS = ("resnet50:224", "resnet18:64", "densenet121:64", "swin_t:64", "mobilenet_v3_large:64")
PACKAGES = ("fxprune", "torch", "torchvision", "numpy")
CHILD = Path(__file__).with_name("planning_child.py")
TIMEOUT = 7200  # seconds for one network
WALL, PROCESSOR = 0, 1

Result = dict[str, Any]


def in_child(network: str, args: argparse.Namespace) -> Result:
    """Measure one network in a fresh process; return its answer, or its error's last line."""
    name, _, px = network.partition(":")
    words = [str(CHILD), name, px, "--threads", str(args.threads), "--budget", str(args.budget)]
    words += ["--samples", str(args.samples), "--batch", str(args.batch)]
    return answer(words, args.threads, TIMEOUT)


def passes(stages: dict[str, list[float]], clock: int, kind: str = "") -> tuple[float, float]:
    """Return the seconds of the passes before and after planning."""
    return stages[f"before{kind}"][clock], stages[f"after{kind}"][clock]


def row(network: str, result: Result, clock: int) -> dict[str, str]:
    """Return one line of the table of a clock."""
    if "error" in result:
        return {"network": network, "forward-backward (s)": result["error"]}
    stages = result["stages"]
    full, activations = passes(stages, clock), passes(stages, clock, ", activations")
    paths, measured = stages["paths"][clock], stages["measure"][clock]
    total = stages["calibrate"][clock] + stages["plan"][clock]
    return {
        "network": network,
        "forward-backward (s)": f"{sum(full) / 2:.1f} ({min(full):.1f} to {max(full):.1f})",
        "calibrate (s)": f"{stages['calibrate'][clock]:.1f}",
        "paths (s)": f"{paths:.1f}",
        "measure (s)": f"{measured:.1f}",
        "allocate (s)": f"{stages['plan'][clock] - paths - measured:.1f}",
        "planning (s)": f"{total:.1f}",
        "ratio": f"{2 * total / sum(full):.2f} ({total / max(full):.2f} to {total / min(full):.2f})",
        "ratio, activations only": f"{2 * total / sum(activations):.2f}",
    }


def memory_row(network: str, result: Result) -> dict[str, str]:
    """Return one line of the table of peaks."""
    if "error" in result:
        return {"network": network}
    peaks = {name: f"{result['peaks'][name] / 1e9:.2f}" for name in ("before", "calibrate", "plan")}
    return {"network": network, "groups": str(result["groups"]), "macs left": f"{result['macs']:.3f}"} | {
        "forward-backward (GB)": peaks["before"],
        "until calibrated (GB)": peaks["calibrate"],
        "until planned (GB)": peaks["plan"],
    }


def heading(args: argparse.Namespace) -> str:
    """Describe when, where, with what and how the tables were made."""
    load = " ".join(f"{value:.1f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "-"
    return header(
        "Planning",
        PACKAGES,
        f"{args.threads} thread(s)",
        load=f"{load} (1, 5 and 15 minutes) when the last network had ended",
        calibration=f"{args.samples} images in batches of {args.batch}, one cross entropy",
        command=f"`{command()}`",
    )


def report(results: dict[str, Result], args: argparse.Namespace) -> str:
    """Return the tables."""
    note = (
        "Seconds of the process, whatever else the machine does. Forward-backward: the mean of the passes before and "
        "after planning, and both; ratio: planning over that."
    )
    wall = "The same by the clock on the wall: another program that runs at the time counts."
    memory = "Peak resident bytes of the process up to the end of each stage, all that ran before included."
    return "\n\n".join(
        [
            heading(args),
            section("Processor time", note, [row(n, r, PROCESSOR) for n, r in results.items()]),
            section("Wall time", wall, [row(n, r, WALL) for n, r in results.items()]),
            section("Memory", memory, [memory_row(n, r) for n, r in results.items()]),
        ]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="NAME:PX, of torchvision")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--budget", type=float, default=0.5, help="share of the macs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/planning.md"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the report and write it."""
    args = parse(argv)
    results = {network: in_child(network, args) for network in tqdm(args.networks, disable=None)}
    text = report(results, args) + "\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
