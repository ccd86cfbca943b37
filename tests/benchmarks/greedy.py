"""Greedy pruning: HBGS and HBGTS, forward and backward, down to 6 % of the multiply-accumulates of eight networks.

The networks of the quality benchmark are trained, and on its hard digits a ResNet-56, a narrow VGG-16 and a wide
ResNeXt-20; their weights are kept. Every method prunes each of them to several shares of its macs; the slim
network is tested as it is, and after a fine-tuning with distillation, the same for every method. `--networks resnet18`
is another part: what HBGTS costs on torchvision's ResNet-18, in seconds and in runs of the network. It runs last,
alone, on two threads.

Results are JSON, one line for each network, seed, method and budget, appended as they come
(`docs/benchmarks/greedy.jsonl`), and a Markdown summary of them (`docs/benchmarks/greedy.md`).

Run: ``python tests/benchmarks/greedy.py [--networks ...] [--methods ...] [--budgets ...] [--seeds ...] [--jobs N]
[--resume] [--quick] [--cache DIR] [--out DIR]``
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from commands import add_options, append, command, rows_file
from greedy_forwards import BUDGET, METHOD, NAME, THREADS, search
from greedy_measure import METHODS, Row, measure
from greedy_networks import NETWORKS
from greedy_report import report
from quality import Key, read_rows
from quality_measure import DENSE, Job, Options, told
from tqdm import tqdm

BUDGETS, SEEDS = (0.5, 0.3, 0.15, 0.06), (0, 1, 2)
QUICK = ("hbgs", "joint")

Work = Callable[[], list[Row]]


def jobs_for(args: argparse.Namespace, there: Mapping[Key, Row]) -> tuple[list[Job], list[Job]]:
    """Return the jobs that train, and those that prune by a method, as far as there are no rows of theirs."""
    pairs = [(network, seed) for seed in args.seeds for network in args.networks if network != NAME]
    first = [Job(*pair, DENSE, (1.0,)) for pair in pairs if (*pair, DENSE, 1.0) not in there]
    then = []
    for pair in pairs:
        for method in args.methods:
            left = tuple(share for share in args.budgets if (*pair, method, share) not in there)
            then += [Job(*pair, method, left)] if left else []
    return first, then


def search_row(*, quick: bool) -> list[Row]:
    """Return the row of the search on ResNet-18."""
    try:
        return [search(quick=quick)]
    except Exception as error:  # whatever goes wrong is part of the report
        return [{"network": NAME, "seed": 0, "method": METHOD, "budget": BUDGET, "error": told(error)}]


def run(args: argparse.Namespace, path: Path) -> None:
    """Run what is missing, and append a line for each row to a file as soon as it is known."""
    there, options = read_rows(path), Options(args.cache, None, args.quick, tune=True)
    first, then = ([partial(measure, job, options) for job in jobs] for jobs in jobs_for(args, there))
    asked = NAME in args.networks and (NAME, 0, METHOD, BUDGET) not in there
    last: list[Work] = [partial(search_row, quick=args.quick)] if asked else []
    stages = [(first, args.jobs, 1), (then, args.jobs, 1), (last, 1, THREADS)]  # all trainings before the first method
    total = sum(len(works) for works, _, _ in stages)
    with tqdm(total=total, unit="job", disable=None) as bar:
        for works, processes, threads in stages:
            os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}  # of processes to start
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                for done in as_completed([pool.submit(work) for work in works]):
                    for row in done.result():
                        append(path, row | {"command": command()})
                        bar.write(f"{row['network']} {row['seed']} {row['method']} {row['budget']:g}")
                    bar.update()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    every = [*NETWORKS, NAME]
    add("--networks", nargs="+", choices=every, default=every, metavar="NETWORK", help=f"some of {', '.join(every)}")
    add("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help=f"default: all; quick {QUICK}")
    add("--budgets", nargs="+", type=float, help=f"shares of the macs (default: {BUDGETS}, quick 0.5)")
    add("--seeds", nargs="+", type=int, help=f"of weights and batches (default: {SEEDS}, quick 0)")
    add_options(parser, "greedy.jsonl and greedy.md")
    args = parser.parse_args(argv)
    args.budgets = args.budgets or ([0.5] if args.quick else list(BUDGETS))
    args.methods = args.methods or list(QUICK if args.quick else METHODS)
    args.seeds = args.seeds or ([0] if args.quick else list(SEEDS))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing; write the summary of all rows there are."""
    args = parse(argv)
    path = rows_file(args, "greedy.jsonl")
    run(args, path)
    rows = list(read_rows(path).values())
    (args.out / "greedy.md").write_text(report(rows), encoding="utf-8")
    print(f"{len(rows)} rows in {args.out / 'greedy.md'}")


if __name__ == "__main__":
    main()
