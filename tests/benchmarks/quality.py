"""How good slim networks are: fxprune's methods and every importance of Torch-Pruning, on networks trained here.

Five networks are trained on images made of handwritten digits: the demo's three-task network, a ResNet-20, a small
MobileNetV2 and a VGG on single digits made hard, and a narrow one with two tasks that conflict. Their weights are kept.
Every method then prunes each of them to several shares of its multiply-accumulates. It may look at calibration data,
which share no scan with training or test data. The slim network is tested as it is, after its batch norms'
statistics were estimated again, and after a short fine-tuning, all the same for every method.

Results are JSON, one line for each network, seed, method and budget, appended as they come
(`docs/benchmarks/quality.jsonl`), a Markdown summary of them (`docs/benchmarks/quality.md`), and a plot per network.

Run: ``python tests/benchmarks/quality.py [--networks ...] [--methods ...] [--budgets ...] [--seeds ...] [--jobs N]
[--resume] [--no-tune] [--cifar10 PATH] [--quick] [--cache DIR] [--out DIR]``
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from commands import add_options, append, command, rows_file, rows_in
from quality_measure import DENSE, Job, Options, Row, measure
from quality_methods import CONTENDERS
from quality_plots import plot
from quality_problems import problems
from quality_report import report
from tqdm import tqdm

BUDGETS = (0.7, 0.5, 0.3, 0.15)
SEEDS = (0, 1, 2)
QUICK = ("joint", "magnitude", "tp-magnitude", "tp-taylor-global")

Key = tuple[str, int, str, float]


def read_rows(path: Path) -> dict[Key, Row]:
    """Return the rows of a file by network, seed, method and budget."""
    return {(row["network"], row["seed"], row["method"], row["budget"]): row for row in rows_in(path)}


def jobs_for(args: argparse.Namespace, there: dict[Key, Row]) -> tuple[list[Job], list[Job]]:
    """Return the jobs that train, and those that prune, as far as there are no rows of theirs."""
    known = problems(args.cifar10)
    pairs = [(network, seed) for seed in args.seeds for network in args.networks]
    first = [Job(network, seed, DENSE, (1.0,)) for network, seed in pairs]
    then = []
    for network, seed in pairs:
        for method in args.methods:
            if getattr(CONTENDERS[method], "one_score", False) and len(known[network].losses) == 1:
                continue  # it is the same method there
            left = tuple(share for share in args.budgets if (network, seed, method, share) not in there)
            then.append(Job(network, seed, method, left))
    return [job for job in first if (job.network, job.seed, DENSE, 1.0) not in there], [j for j in then if j.budgets]


def run(args: argparse.Namespace, path: Path) -> None:
    """Run what is missing, and append a line for each row to a file as soon as it is known."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # for the processes that are started
    options = Options(args.cache, args.cifar10, args.quick, args.tune)
    stages = jobs_for(args, read_rows(path))
    with (
        ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool,
        tqdm(total=sum(map(len, stages)), unit="job", disable=None) as bar,
    ):
        for stage in stages:  # all trainings before the first method
            doing = {pool.submit(measure, job, options): job for job in stage}
            for done in as_completed(doing):
                for row in done.result():
                    append(path, row | {"command": command()})
                job = doing[done]
                bar.update()
                bar.write(f"{job.network} {job.seed} {job.method}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--networks", nargs="+", help="which networks (default: all)")
    add("--methods", nargs="+", choices=list(CONTENDERS), metavar="METHOD", help=f"default: all; quick {QUICK}")
    add("--budgets", nargs="+", type=float, help=f"shares of the macs (default: {BUDGETS}, quick 0.5)")
    add("--seeds", nargs="+", type=int, help=f"of weights and batches (default: {SEEDS}, quick 0)")
    add("--no-tune", dest="tune", action="store_false", help="leave the fine-tuning out")
    add("--cifar10", type=Path, help="cifar-10-python.tar.gz or its folder: the classifiers on CIFAR-10 instead")
    add_options(parser, "quality.jsonl, quality.md and the plots")
    args = parser.parse_args(argv)
    args.budgets = args.budgets or ([0.5] if args.quick else list(BUDGETS))
    args.methods = args.methods or list(QUICK if args.quick else CONTENDERS)
    args.seeds = args.seeds or ([0] if args.quick else list(SEEDS))
    known = list(problems(args.cifar10))
    args.networks = args.networks or known
    unknown = [name for name in args.networks if name not in known]
    if unknown:
        parser.error(f"there is no network {unknown[0]!r}. Pass some of: {', '.join(known)}.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run, and write the summary and the plots of all rows there are."""
    args = parse(argv)
    path = rows_file(args, "quality.jsonl")
    run(args, path)
    rows = list(read_rows(path).values())
    measured = {row["network"] for row in rows}
    known = {name: p for name, p in problems(args.cifar10, quick=args.quick).items() if name in measured}
    plots = {name: plot(name, [r for r in rows if r["network"] == name], args.out) for name in known}
    (args.out / "quality.md").write_text(report(rows, known, plots, args), encoding="utf-8")
    print(f"{len(rows)} rows in {args.out / 'quality.md'}")


if __name__ == "__main__":
    main()
