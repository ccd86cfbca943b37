"""The report on many random networks, in Markdown."""

from __future__ import annotations

import argparse
import datetime
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from commands import header, markdown
from random_checks import FAILURES, Outcome
from tabulate import tabulate

PACKAGES = ("fxprune", "torch", "numpy", "networkx", "hypothesis")
STAGES = ("build", "trace", "couple", "plan", "rewrite", "verify", "other batch", "train", "compile")


def count_rows(outcomes: Sequence[Outcome], seconds: float) -> list[list[str]]:
    """Return the rows of the table of counts."""
    total = len(outcomes)
    failed = Counter(o.failure for o in outcomes)
    cut = [o.share for o in outcomes if o.removed]
    steps = sum(len(o.ops) for o in outcomes)

    def share(number: int) -> str:
        return f"{number:,} ({number / max(total, 1):.2%})"

    rows = [["networks", f"{total:,}"], ["steps", f"{steps:,}"]]
    rows += [["traced", share(sum(bool(o.frontend) for o in outcomes))]]
    rows += [["failures: " + kind, f"{failed[kind]:,}"] for kind in FAILURES]
    rows += [
        ["cut by their plan", share(len(cut))],
        ["parameters left where cut, mean", f"{float(np.mean(cut)) if cut else 1.0:.1%}"],
        ["planned again with a node frozen", share(sum(bool(o.refrozen) for o in outcomes))],
        ["nothing to prune, with a reason", share(sum(o.stuck is not None for o in outcomes))],
        ["trained a step, run on another batch size", share(sum(o.trained for o in outcomes))],
        ["compiled to a random budget", share(sum(o.budget == "met" for o in outcomes))],
        ["a random budget out of reach", share(sum(o.budget == "out of reach" for o in outcomes))],
        ["outputs not all finite", share(sum(not o.finite for o in outcomes))],
        ["time", f"{datetime.timedelta(seconds=round(seconds))}"],
        ["networks per second", f"{total / seconds:.2f}"],
    ]
    return rows


def tally(title: str, unit: str, entries: Iterable[str]) -> str:
    """Format a table of how often each entry occurs."""
    rows = [[entry, f"{count:,}"] for entry, count in Counter(entries).most_common()]
    return f"## {title}\n\n" + (table([unit, "networks"], rows) if rows else "None.")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table whose last column is to the right."""
    align = ["left"] * (len(headers) - 1) + ["right"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def failures(outcomes: Sequence[Outcome]) -> str:
    """List every failing seed with its error."""
    rows = [[str(o.seed), o.failure, o.error.replace("|", "\\|")] for o in outcomes if o.failure]
    if not rows:
        return "## Failures\n\nNone."
    replay = (
        "`python tests/strategies.py SEED` prints the network; "
        "`python tests/benchmarks/random_networks.py --first SEED --count 1` runs it again."
    )
    listed = markdown(["seed", "kind", "first line of the error"], rows)
    return f"## Failures\n\n{replay}\n\n{listed}"


def write_report(args: argparse.Namespace, outcomes: Sequence[Outcome], seconds: float) -> str:
    """Put the report together."""
    stages = [[stage, f"{sum(o.seconds.get(stage, 0.0) for o in outcomes):,.1f}"] for stage in STAGES]
    made = f"python tests/benchmarks/random_networks.py --count {args.count} --first {args.first} --jobs {args.jobs}"
    parts = [
        header("Random networks", PACKAGES, f"{args.jobs} at work", command=f"`{made}`"),
        table(["what", "count"], count_rows(outcomes, seconds)),
        failures(outcomes),
        "## Stages\n\n" + table(["stage", "seconds, all processes"], stages),
        tally("Why nothing could be pruned", "first reason", (o.stuck[0] for o in outcomes if o.stuck)),
        tally("Why nodes were frozen", "reason", (r for o in outcomes for r in set(o.refrozen.values()))),
        tally("Op kinds", "kind", (op for o in outcomes for op in set(o.ops))),
    ]
    return "\n\n".join(parts) + "\n"
