"""Prune many random networks, check each against its masked original, and write a Markdown report.

Seed N stands for the network that ``python tests/strategies.py N`` prints, cut by one random legal plan. It runs
``trace``, ``couple``, a random plan, ``rewrite`` (over again with those nodes frozen whose sizes cannot be rewritten,
as ``compile`` does) and ``verify`` at 1e-9 in float64. Every channel of a parameter must be one that some group decides
over, or frozen with a reason; a channel that is neither is *unreported*, and counts as a failure like a mismatch or a
crash.

The networks run in child processes that are replaced now and then. One that dies, or spends too long on a network,
costs only that network, which is listed.

Run: ``python tests/benchmarks/random_networks.py [--count 20000] [--first 0] [--jobs 2] [--out FILE]``
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tabulate import tabulate
from torch import fx
from torch.utils import _pytree as pytree
from tqdm import tqdm

import fxprune
from fxprune.allocating import steps_of_all
from fxprune.planning import plan_of
from fxprune.reporting import frozen_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the next two modules are

from plans import random_keep
from strategies import build, example_inputs, random_network

TOLERANCE = 1e-9
ATTEMPTS = 8  # every round freezes a node more, as in `compile`
CHUNK = 250  # networks per child process
LIMIT = 300  # seconds for one network
STAGES = ("build", "trace", "couple", "plan", "rewrite", "verify")
T = TypeVar("T")
FAILURES = ("mismatch", "crash", "unreported")


@dataclass
class Outcome:
    """What became of one network.

    Attributes:
        seed: of the network and of its plan.
        ops: the kinds of its steps.
        error: the first line of what was raised, or "".
        failure: one of `FAILURES`, or "".
        frontend: how it was traced, or "".
        refrozen: node -> why its sizes could not be rewritten.
        unreported: what nothing was said about, as "parameter[dim]: count".
        removed: whether the plan removed anything.
        stuck: what holds a network from which nothing can go, most channels first; None where something can.
        share: parameters after / before.
        finite: whether the slim network returns finite numbers only, so that the comparison says something.
        seconds: stage -> seconds.
    """

    seed: int
    ops: list[str] = field(default_factory=list)
    error: str = ""
    failure: str = ""
    frontend: str = ""
    refrozen: dict[str, str] = field(default_factory=dict)
    unreported: list[str] = field(default_factory=list)
    removed: bool = False
    stuck: list[str] | None = None
    share: float = 1.0
    finite: bool = True
    seconds: dict[str, float] = field(default_factory=dict)


def unreported(coupling: fxprune.Coupling) -> list[str]:
    """Return the sites of channels that no group decides over and that are not frozen with a reason either."""
    known = np.zeros(coupling.num_channels + 1, dtype=bool)
    known[-1] = True  # fixed positions
    for frozen in coupling.frozen:
        known[frozen.channels] |= bool(frozen.node and frozen.reason)
    members = coupling.members
    for group in coupling.groups():
        known[members.channel[np.isin(members.choice, np.concatenate(group.cells))]] = True
    found = []
    for site in coupling.sites:
        channels = np.unique(site.channels)
        count = int((~known[channels]).sum())
        if count:
            found.append(f"{site.name}[{site.dim}]: {count} of {len(channels)}")
    return found


def check(seed: int) -> Outcome:
    """Run the network of a seed."""
    outcome = Outcome(seed)
    try:
        _run(seed, outcome)
    except fxprune.VerificationError as error:
        outcome.failure, outcome.error = "mismatch", _first_line(error)
    except Exception as error:
        outcome.failure, outcome.error = "crash", f"{type(error).__name__}: {_first_line(error)}"
    if outcome.unreported and not outcome.failure:
        outcome.failure, outcome.error = "unreported", "; ".join(outcome.unreported)
    return outcome


def _first_line(error: Exception) -> str:
    """Return the first line of a message, with the next one where it only announces a list."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])


Timed = Callable[[str, Callable[[], T]], T]


def _run(seed: int, outcome: Outcome) -> None:
    def timed(stage: str, call: Callable[[], T]) -> T:
        start = time.perf_counter()
        try:
            return call()
        finally:
            outcome.seconds[stage] = outcome.seconds.get(stage, 0.0) + time.perf_counter() - start

    network = random_network(seed)
    outcome.ops = [step.op for step in network.steps]
    model, inputs = timed("build", lambda: (build(network), example_inputs(network)))
    traced = timed("trace", lambda: fxprune.trace(model, inputs))
    outcome.frontend = traced.frontend
    coupling, plan, slim = _cut(traced, seed, outcome, timed)
    outcome.removed = plan.costs.after != plan.costs.before
    outcome.share = plan.costs.share("params")
    result = timed("verify", lambda: fxprune.verify(coupling, plan, slim))
    if result.worst > TOLERANCE:
        raise fxprune.VerificationError(f"worst error {result.worst:.1e}")
    found = sum(p.numel() for p in slim.parameters())
    if found != plan.costs.after.params:
        raise fxprune.VerificationError(f"{found} parameters are left, {plan.costs.after.params} were predicted")
    with torch.no_grad():
        leaves = pytree.tree_leaves(slim(*inputs))
    outcome.finite = all(bool(t.isfinite().all()) for t in leaves if isinstance(t, torch.Tensor))


def _cut(
    traced: fxprune.Traced, seed: int, outcome: Outcome, timed: Timed[Any]
) -> tuple[fxprune.Coupling, fxprune.Plan, fx.GraphModule]:
    """Couple, plan at random and rewrite; freeze nodes whose sizes cannot be rewritten, and start over."""
    attempts = 0
    while True:
        attempts += 1
        coupling = timed("couple", lambda: fxprune.couple(traced, freeze=outcome.refrozen))
        outcome.unreported += [site for site in unreported(coupling) if site not in outcome.unreported]
        if attempts == 1:
            outcome.stuck = _what_holds(coupling)
        plan = timed("plan", lambda coupling=coupling: plan_of(coupling, random_keep(coupling, seed)))
        try:
            slim = timed("rewrite", lambda coupling=coupling, plan=plan: fxprune.rewrite(coupling, plan))
            return coupling, plan, slim
        except fxprune.RewriteError as error:
            fresh = {node: reason for node, reason in error.nodes.items() if node not in outcome.refrozen}
            if not fresh or attempts == ATTEMPTS:
                raise
            outcome.refrozen |= fresh


def _what_holds(coupling: fxprune.Coupling) -> list[str] | None:
    """Return why nothing can go, most channels first, or None when something can."""
    everything = steps_of_all(coupling, np.ones(coupling.num_channels), "uniform", fxprune.Constraints())
    if len(everything):
        return None
    reasons = list(dict.fromkeys(row.reason for row in frozen_rows(coupling)))
    if (coupling.has_site & ~coupling.is_frozen).any():
        reasons.append("keeps the one step it has: nothing would be left of a group")
    return reasons or ["has no parameters"]


def work(first: int, count: int) -> None:
    """Run some seeds in this process; print one line of JSON for each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's, about ops that the networks use on purpose
    for seed in range(first, first + count):
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        print(json.dumps(asdict(check(seed))), flush=True)
        faulthandler.cancel_dump_traceback_later()


def run_chunk(seeds: range, note: Callable[[Outcome], None]) -> None:
    """Run seeds in child processes; where one dies, its seed is noted as a crash, and the next one goes on after it."""
    while seeds:
        command = [sys.executable, __file__, "--child", "--first", str(seeds.start), "--count", str(len(seeds))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with tempfile.TemporaryFile("w+") as said:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment)
            for line in child.stdout or ():
                outcome = Outcome(**json.loads(line))
                seeds = range(outcome.seed + 1, seeds.stop)
                note(outcome)
            child.wait()
            said.seek(0)
            first = next(iter(said.read().strip().splitlines()), "no message")
        if seeds:
            error = f"the process ended with code {child.returncode} after at most {LIMIT} s: {first}"
            note(Outcome(seeds.start, failure="crash", error=error))
            seeds = range(seeds.start + 1, seeds.stop)


def measure(args: argparse.Namespace) -> tuple[list[Outcome], float]:
    """Run all seeds; return what became of each, in order, and the seconds it took."""
    seeds = range(args.first, args.first + args.count)
    chunks = [seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK)]
    outcomes: list[Outcome] = []
    failures: Counter[str] = Counter()
    start = time.perf_counter()
    with tqdm(total=args.count, unit="network", smoothing=0.05) as bar, ThreadPoolExecutor(args.jobs) as pool:

        def note(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if outcome.failure:
                failures[outcome.failure] += 1
                bar.write(f"seed {outcome.seed}: {outcome.failure}: {outcome.error}")
                bar.set_postfix(failures)
            bar.update()

        list(pool.map(lambda chunk: run_chunk(chunk, note), chunks))
    return sorted(outcomes, key=lambda o: o.seed), time.perf_counter() - start


def header(args: argparse.Namespace) -> str:
    """Describe when, where, with what and how the tables were made."""
    packages = ("fxprune", "torch", "numpy", "networkx", "hypothesis")
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    found["fxprune"] = fxprune.__version__
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} CPUs, {args.jobs} at work",
        "versions": ", ".join([f"python {platform.python_version()}"] + [f"{p} {found.get(p, '-')}" for p in packages]),
        "command": f"`python tests/benchmarks/random_networks.py --count {args.count} --first {args.first} "
        f"--jobs {args.jobs}`",
    }
    return "# Random networks\n\n" + "\n".join(f"* {key}: {value}" for key, value in facts.items())


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
    listed = tabulate(rows, ["seed", "kind", "first line of the error"], tablefmt="github", disable_numparse=True)
    return f"## Failures\n\n{replay}\n\n{listed}"


def write_report(args: argparse.Namespace, outcomes: Sequence[Outcome], seconds: float) -> str:
    """Put the report together."""
    stages = [[stage, f"{sum(o.seconds.get(stage, 0.0) for o in outcomes):,.1f}"] for stage in STAGES]
    parts = [
        header(args),
        table(["what", "count"], count_rows(outcomes, seconds)),
        failures(outcomes),
        "## Stages\n\n" + table(["stage", "seconds, all processes"], stages),
        tally("Why nothing could be pruned", "first reason", (o.stuck[0] for o in outcomes if o.stuck)),
        tally("Why nodes were frozen", "reason", (r for o in outcomes for r in set(o.refrozen.values()))),
        tally("Op kinds", "kind", (op for o in outcomes for op in set(o.ops))),
    ]
    return "\n\n".join(parts) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=20_000, help="how many networks (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/random_networks.md"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the networks, print the report and write it.

    Returns:
        The exit code: 1 if any network failed.
    """
    args = parse(argv)
    if args.child:
        work(args.first, args.count)
        return 0
    outcomes, seconds = measure(args)
    report = write_report(args, outcomes, seconds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report)
    print(report)
    return int(any(o.failure for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
