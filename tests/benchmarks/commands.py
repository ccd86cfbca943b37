"""What the commands share: options, rows that are kept in files, fresh processes, and the form of pages."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxprune.latencies import machine

Row = dict[str, Any]


def add_options(parser: argparse.ArgumentParser, results: str, *, jobs: bool = True) -> None:
    """Add the options of the commands that train networks and keep rows.

    Args:
        parser: of the command.
        results: what it writes, in words.
        jobs: whether it runs several processes.
    """
    add = parser.add_argument
    if jobs:
        add("--jobs", type=int, default=1, help="processes at a time, of one thread each (default: %(default)s)")
    add("--resume", action="store_true", help="keep the rows there are, and run the others")
    add("--quick", action="store_true", help="tiny sizes, to try the command; the networks stay poor")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxprune" / "quality"
    add("--cache", type=Path, default=cache, help="where trained weights are kept (default: the user's cache)")
    add("--out", type=Path, default=Path("docs/benchmarks"), help=f"where {results} go")


def command() -> str:
    """Return the command that is running; where its results go is left out."""
    words = [f"tests/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    return shlex.join(["python", *words])


def answer(words: Sequence[str], threads: int, limit: float, **settings: str) -> dict[str, Any]:
    """Run Python in a fresh process.

    Args:
        words: the script and its arguments.
        threads: of torch.
        limit: seconds.
        settings: of its environment.

    Returns:
        The JSON that it prints last; or, as `error`, why there is none.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | settings
    run = [sys.executable, *words]
    try:
        done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=limit, check=True)
    except subprocess.CalledProcessError as error:
        return {"error": (error.stderr.strip().splitlines() or ["no message"])[-1]}
    except subprocess.TimeoutExpired:
        return {"error": f"longer than {limit:g} s"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def rows_file(args: argparse.Namespace, name: str) -> Path:
    """Return the file of the rows, in a folder that is there; without `--resume`, rows of earlier runs are gone."""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / name
    if not args.resume:
        path.unlink(missing_ok=True)
    return path


def rows_in(path: Path) -> list[Row]:
    """Return the rows of a file; none if it is not there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def append(path: Path, row: Row) -> None:
    """Add a row to a file."""
    with path.open("a", encoding="utf-8") as file:
        print(json.dumps(row, sort_keys=True), file=file)


def header(title: str, packages: Sequence[str], work: str = "", **facts: str) -> str:
    """Say when, where and with what a page was made.

    Args:
        title: of the page.
        packages: whose versions are told.
        work: what ran at a time, such as "one thread".
        facts: whatever else there is to tell.
    """
    lines = {
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        "machine": f"{machine('cpu')}, {os.cpu_count()} CPUs" + (f", {work}" if work else ""),
        "versions": f"python {platform.python_version()}, {versions(packages)}",
    }
    return f"# {title}\n\n" + "\n".join(f"* {name}: {fact}" for name, fact in (lines | facts).items())


def versions(packages: Sequence[str]) -> str:
    """Return the versions of packages; of those that are not installed, a dash."""
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return ", ".join(f"{package} {found.get(package, '-')}" for package in packages)


def commands_of(rows: Sequence[Row]) -> str:
    """Return the commands that made some rows."""
    return ", then ".join(f"`{made}`" for made in dict.fromkeys(row["command"] for row in rows))


def seeds_of(rows: Sequence[Row]) -> str:
    """Return the seeds of some rows."""
    return ", ".join(map(str, sorted({row["seed"] for row in rows})))


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any] | Mapping[str, Any]]) -> str:
    """Format a table; where rows are mappings, heads are "keys"."""
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def section(title: str, note: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Format one titled table."""
    return f"## {title}\n\n{note}\n\n{markdown('keys', rows)}"
