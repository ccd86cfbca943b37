"""Prune many random networks, check each against its masked original, and write a Markdown report.

Seed N stands for the network that ``python tests/strategies.py N`` prints, cut by one random legal plan. It runs
``trace``, ``couple``, a random plan, ``rewrite`` (over again with those nodes frozen whose sizes cannot be rewritten,
as ``compile`` does) and ``verify`` at 1e-9 in float64. Every channel of a parameter must be one that some group decides
over, or frozen with a reason; a channel that is neither is *unreported*, and counts as a failure like a mismatch or a
crash. Of eight networks, one is also run on another batch size and trained for a step, and another one is compiled to a
random budget.

The networks run in child processes that are replaced now and then. One that dies, or spends too long on a network,
costs only that network, which is listed.

Run: ``python tests/benchmarks/random_networks.py [--count 20000] [--first 0] [--jobs 2] [--out FILE]``
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the next modules are

from random_checks import Outcome, check
from random_report import write_report

CHUNK = 250  # networks per child process
LIMIT = 300  # seconds for one network


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
    args.out.write_text(report, encoding="utf-8")
    print(report)
    return int(any(o.failure for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
