"""Time fxprune against Torch-Pruning, side by side, and write a Markdown table.

The job is the same for both: from a model and an example input to a network of about half the
multiply-accumulates, ranked by weight magnitude. fxprune does ``trace``, ``couple``, ``plan`` (which
also finds the widths for the budget) and ``rewrite``; Torch-Pruning builds its ``MagnitudePruner`` with
a fixed ratio and takes one ``step``.

Every row runs in its own process; inside it the tools alternate, on copies made outside the clock, after
one untimed run each. Memory is measured in one more process per tool, after a tiny model has loaded
whatever is imported lazily.

Run: ``python tests/benchmarks/speed.py [--models ...] [--tools ...] [--repeats N] [--threads N] [--out FILE]``
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from commands import answer, command, header, section
from tqdm import tqdm

MODELS = ("resnet50", "resnet152", "densenet121", "mobilenet_v3_large")
TOOLS = ("fxprune", "torch-pruning")
PACKAGES = ("fxprune", "torch", "torchvision", "torch-pruning", "numpy", "networkx")
DEPTHS = (50, 100, 200, 500, 1000)
STAGES = ("trace", "couple", "plan", "rewrite")
JOBS = Path(__file__).with_name("speed_jobs.py")
TIMEOUT = 1800  # seconds for one child process

Stages = dict[str, float]


def in_child(job: str, name: str, tools: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Run one of `speed_jobs.py` in a fresh process and return its answer, or its error's last line."""
    words = [str(JOBS), job, name, "--tools", *tools]
    words += ["--repeats", str(args.repeats), "--threads", str(args.threads)]
    return answer(words, args.threads, TIMEOUT)


def totals(runs: Sequence[Stages]) -> list[float]:
    """Return the seconds of each run, over all of its stages."""
    return [sum(run.values()) for run in runs]


def spread(seconds: Sequence[float]) -> str:
    """Write the median and the range of some durations."""
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def speed_rows(results: dict[str, dict[str, Any]], tools: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row per model: each tool's seconds and share of macs left, and the ratio of the medians."""
    rows: list[dict[str, Any]] = []
    for name, result in results.items():
        row: dict[str, Any] = {"model": name}
        if "error" in result:
            rows.append(row | {tools[0]: result["error"]})
            continue
        for tool in tools:
            row[f"{tool} (s)"] = spread(totals(result["runs"][tool]))
            row[f"{tool} macs left"] = f"{result['share'][tool]:.3f}"
        if len(tools) == 2:
            medians = [statistics.median(totals(result["runs"][tool])) for tool in tools]
            row["ratio"] = f"{medians[0] / medians[1]:.2f}"
        rows.append(row)
    return rows


def stage_rows(results: dict[str, dict[str, Any]], tool: str) -> list[dict[str, Any]]:
    """Return a row per model: the median seconds of each stage of ``tool``."""
    rows: list[dict[str, Any]] = []
    for name, result in results.items():
        if "error" not in result:
            runs = result["runs"][tool]
            medians = {stage: f"{statistics.median(run[stage] for run in runs):.3f}" for stage in runs[0]}
            rows.append({"model": name} | medians | {"total": f"{statistics.median(totals(runs)):.3f}"})
    return rows


def memory_row(name: str, tool: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return one line of the memory table; the ratio counts the model itself, the run and the result."""
    if "error" in result:
        return {"model": name, "tool": tool, "weights (MB)": result["error"]}
    sizes = {key: f"{result[key] / 1e6:.1f}" for key in ("weights", "extra", "slim")}
    ratio = (result["weights"] + result["extra"]) / result["weights"]
    names = {"weights": "weights (MB)", "extra": "peak on top (MB)", "slim": "of it slim weights (MB)"}
    return {"model": name, "tool": tool, **{names[k]: v for k, v in sizes.items()}, "peak / weights": f"{ratio:.2f}"}


def exponent(blocks: Sequence[int], seconds: Sequence[float]) -> float:
    """Fit ``seconds = c * blocks ** k`` and return ``k``."""
    return float(np.polyfit(np.log(blocks), np.log(seconds), 1)[0])


def depth_rows(results: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per depth with fxprune's stages, and a last row with the fitted exponents."""
    good = {depth: result for depth, result in results.items() if "error" not in result}
    rows: list[dict[str, Any]] = [{"blocks": d, "trace": r["error"]} for d, r in results.items() if d not in good]
    table: dict[int, Stages] = {}
    for depth, result in good.items():
        runs = result["runs"]["fxprune"]
        table[depth] = {stage: statistics.median(run[stage] for run in runs) for stage in STAGES}
        table[depth]["total"] = statistics.median(totals(runs))
    rows += [{"blocks": depth} | {k: f"{v:.3f}" for k, v in stages.items()} for depth, stages in table.items()]
    if len(table) > 1:
        fits = {k: exponent(list(table), [table[d][k] for d in table]) for k in (*STAGES, "total")}
        rows.append({"blocks": "exponent"} | {k: f"{v:.2f}" for k, v in fits.items()})
    return rows


def heading(args: argparse.Namespace) -> str:
    """Describe when, where, with what and how the tables were made."""
    collector = "fxprune pauses Python's cyclic garbage collector inside its steps, Torch-Pruning does not"
    return header("Speed", PACKAGES, f"{args.threads} thread(s)", collector=collector, command=f"`{command()}`")


def measure(args: argparse.Namespace) -> str:
    """Run every child and return the report."""
    ours = "fxprune" in args.tools
    depths = args.depths if ours else []
    with tqdm(total=len(args.models) * (1 + len(args.tools)) + len(depths), disable=None) as bar:

        def child(job: str, name: str, tools: Sequence[str]) -> dict[str, Any]:
            bar.set_description(f"{job} {name}")
            result = in_child(job, name, tools, args)
            bar.update()
            return result

        timed = {name: child("time", name, args.tools) for name in args.models}
        memory = [memory_row(n, t, child("memory", n, [t])) for n in args.models for t in args.tools]
        chain = {depth: child("time", f"residual:{depth}", ["fxprune"]) for depth in depths}
    note = f"Median and range of {args.repeats} alternating runs; ratio: {' / '.join(args.tools)}."
    parts = [heading(args), section("Same job, side by side", note, speed_rows(timed, args.tools))]
    for tool in args.tools:
        parts.append(section(f"Stages of {tool}", "Median seconds.", stage_rows(timed, tool)))
    parts.append(section("Memory", "Resident bytes of a fresh process, weights of the model included once.", memory))
    if depths:
        note = "Residual blocks of width 8, all on one trunk; seconds, and the exponent k of `seconds ~ blocks ** k`."
        parts.append(section("Depth", note, depth_rows(chain)))
    return "\n\n".join(parts) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="torchvision names, or residual:BLOCKS")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--depths", nargs="*", type=int, default=list(DEPTHS), help="blocks of the residual chains")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/speed.md"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the report and write it."""
    args = parse(argv)
    report = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
