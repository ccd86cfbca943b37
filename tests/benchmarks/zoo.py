"""Prune every network of torchvision and the smallest of every module of timm, with fxprune and with Torch-Pruning.

Every network runs in a process of its own, with limits on time and memory; what exceeds them is reported. Weights are
random, and drawn so that every part of the network matters to its outputs. fxprune traces, couples, plans half of the
multiply-accumulates (or the least that can be reached), rewrites, and compares the slim network with the masked
original in float64; the slim network then takes a training step. Torch-Pruning prunes a copy to about half its macs,
and its result is compared with the masked original too. Then the two take turns against the clock.

Results are JSON, one line for each network, appended as they come (`docs/benchmarks/zoo.jsonl`), and a Markdown summary
of them (`docs/benchmarks/zoo.md`).

Run: ``python tests/benchmarks/zoo.py [--filter REGEX] [--jobs N] [--resume] [--limit S] [--memory GB] [--out DIR]``;
``python tests/benchmarks/zoo.py --list`` finds timm's smallest models anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from commands import append, rows_file, rows_in
from tqdm import tqdm
from zoo_networks import TIMM, Network, networks, smallest_of_timm
from zoo_report import report, verdict

CHILD = Path(__file__).with_name("zoo_child.py")
ROOT = Path(__file__).resolve().parents[2]


def in_child(network: Network, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one network in a fresh process; return its row, as far as the process came."""
    command = [sys.executable, str(CHILD), network.family, network.name, "--limit", str(args.limit)]
    command += ["--other-limit", str(args.other_limit), "--memory", str(args.memory), "--threads", str(args.threads)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": paths}
    longest = 3 * (args.limit + args.other_limit)  # stages end by themselves, unless stuck outside of Python
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=longest, check=False)
        text, ended = done.stdout, _ended(done)
    except subprocess.TimeoutExpired as error:
        text, ended = (error.stdout or b"").decode(), f"OutOfTime: longer than {longest:g} s"
    row = _last_row(text) or {"family": network.family, "name": network.name, "failures": {}, "stage": "start"}
    if row["stage"] != "done":
        row["failures"][row["stage"]] = ended
    return row | {"wall": round(time.perf_counter() - start, 1)}


def _ended(done: subprocess.CompletedProcess[str]) -> str:
    """Say how a process that did not finish its row ended."""
    if done.returncode < 0:
        return f"killed by {signal.Signals(-done.returncode).name}"
    return f"ended with code {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"


def _last_row(text: str) -> dict[str, Any] | None:
    """Return the last complete row that a process printed."""
    for line in reversed(text.splitlines()):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return None


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a file by network."""
    return {f"{row['family']}/{row['name']}": row for row in rows_in(path)}


def measure(chosen: Sequence[Network], args: argparse.Namespace, path: Path) -> None:
    """Measure networks, and append a line for each to a file as soon as it is known."""
    with (
        ThreadPoolExecutor(args.jobs) as pool,
        tqdm(total=len(chosen), unit="network", disable=None) as bar,
    ):
        jobs = {pool.submit(in_child, network, args): network for network in chosen}
        for job in as_completed(jobs):
            row = job.result()
            append(path, row)
            bar.update()
            bar.write(f"{jobs[job]}: {verdict(row)} [{row['wall']:.0f} s]")


def write_list() -> None:
    """Find the smallest model of every module of timm, and keep the list."""
    import timm

    lines = [
        f"# The smallest model of every module of timm {timm.__version__}, by parameters: module, name, parameters.",
        "# Made by `python tests/benchmarks/zoo.py --list`.",
    ]
    for module, name, count in tqdm(smallest_of_timm(), total=len(timm.list_modules()), unit="module", disable=None):
        lines.append(f"{module:<26} {name:<40} {count}")
    TIMM.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--filter", default="", help="only networks whose family/name this regular expression finds")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep the rows there are, and measure the others")
    parser.add_argument(
        "--limit", type=float, default=240, help="seconds for a stage of fxprune (default: %(default)g)"
    )
    parser.add_argument(
        "--other-limit", type=float, default=90, help="seconds for a run of Torch-Pruning (default: %(default)g)"
    )
    parser.add_argument(
        "--memory", type=float, default=14, help="GB that a process may allocate (default: %(default)g)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="where zoo.jsonl and zoo.md go")
    parser.add_argument("--list", action="store_true", help="only find the smallest models of timm, in minutes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the summary of all rows there are."""
    args = parse(argv)
    if args.list:
        write_list()
        return
    path = rows_file(args, "zoo.jsonl")
    there = read_rows(path)
    everything = networks()
    chosen = [n for n in everything if re.search(args.filter, str(n)) and str(n) not in there]
    measure(chosen, args, path)
    rows = read_rows(path)
    (args.out / "zoo.md").write_text(
        report([rows[str(n)] for n in everything if str(n) in rows], args), encoding="utf-8"
    )
    print(f"{len(rows)} networks in {args.out / 'zoo.md'}")


if __name__ == "__main__":
    main()
