"""The report of the quality benchmark, in Markdown."""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from commands import commands_of, header, markdown
from quality_measure import DENSE, TUNED_ON
from quality_methods import CONTENDERS
from quality_problems import Problem
from quality_scores import STAGES, Row, best, cell, over_seeds, points, verdict, weakest

MAIN = "joint"
OTHERS = "tp-"
PACKAGES = ("fxprune", "torch", "torch-pruning", "scikit-learn", "numpy")


def report(
    rows: Sequence[Row], known: Mapping[str, Problem], plots: Mapping[str, str], args: argparse.Namespace
) -> str:
    """Put the report together.

    Args:
        rows: all there are.
        known: the problems they are of.
        plots: network -> file name of its plot.
        args: of the command.
    """
    work = f"{args.jobs} at work, one thread each"
    parts = [header("Quality", PACKAGES, work, command=commands_of(rows)), HOW]
    parts += ["## Joint against the best of Torch-Pruning", *duels(rows, list(known))]
    several = [name for name, problem in known.items() if len(problem.metrics) > 1]
    if several:
        parts += ["## The task that suffers most", protection(rows, several)]
    for name, problem in known.items():
        parts += network_part([r for r in rows if r["network"] == name], problem, plots[name])
    return "\n\n".join([*parts, failures(rows)]) + "\n"


HOW = (
    "Points are the mean of the tasks' metrics in percent, a metric below 0 counted as 0; they are means with standard "
    "deviations over seeds. Tables by task show each metric times 100. Macs are counted by `torch.utils.flop_counter`. "
    "All methods see the same calibration data, which share no scan with training and test data; BN refresh (running "
    "statistics estimated again from calibration data) and fine-tuning are the same for all. Fine-tuning is short: a "
    f"quarter of the training images, at least {TUNED_ON:,}, each once (on CIFAR-10 twice).\n\n"
    "Methods whose names begin with `tp-` are Torch-Pruning's importances in its `BasePruner`; the pruning ratio is "
    "found by bisection, and macs may be 2 % over the budget, in its favour. The others are fxprune's: `joint-plain` "
    "does not correct the weights that stay, `joint-uniform` takes the same part of every group, `joint-one-score` "
    "sees only the sum of the losses, `joint-classes` weighs what varies within classes a fifth. With `-global`, "
    "channels of all layers compete. `tp-hessian` of Torch-Pruning 1.6.1 sees less than it is given: the gradients "
    "that it accumulates are those of the last sample alone. Seconds to plan are the least of all "
    "seeds and budgets: other work shared the machine."
)


def duels(rows: Sequence[Row], networks: Sequence[str]) -> list[str]:
    """Compare Joint with the best importance of Torch-Pruning, chosen anew for each cell."""
    table: list[list[str]] = []
    counts: dict[str, Counter[str]] = {stage: Counter() for stage in STAGES}
    leads: dict[tuple[str, float], list[float]] = {}
    for network in networks:
        mine = [r for r in rows if r["network"] == network]
        for budget in budgets_of(mine):
            whole = over_seeds([points(r["cut"]) for r in mine if r["method"] == DENSE])
            line = [network, f"{whole.mean:.1f}" if whole else "", f"{budget:g}"]
            for stage in STAGES:
                ours, other = cell(mine, MAIN, budget, stage), best(mine, OTHERS, budget, stage)
                if ours is None or other is None:
                    line.append("")
                    continue
                said = verdict(ours, other[1])
                counts[stage][said] += 1
                leads.setdefault((stage, budget), []).append(ours.mean - other[1].mean)
                difference = f"{ours.mean - other[1].mean:+.1f}"
                line.append(f"{said} {difference}: {ours.mean:.1f}, {other[0]} {other[1].mean:.1f}")
            table.append(line)
    note = (
        "Each cell: Joint's points, and those of the importance of Torch-Pruning that is best in this very cell. Even "
        "is within noise: the two standard deviations in quadrature, and at least half a point."
    )
    total = [[STAGES[s], *(str(c[k]) for k in ("win", "even", "loss"))] for s, c in counts.items() if c]
    mean = [[f"{b:g}", STAGES[s], f"{statistics.mean(d):+.1f}", f"{min(d):+.1f}"] for (s, b), d in leads.items()]
    return [
        note,
        markdown(["", "wins", "even", "losses"], total),
        markdown(["budget", "", "mean lead, points", "least"], sorted(mean, key=lambda line: -float(line[0]))),
        markdown(["network", "dense", "budget", *STAGES.values()], table),
    ]


def protection(rows: Sequence[Row], networks: Sequence[str]) -> str:
    """Compare planning on each task's loss with planning on their sum, and with Torch-Pruning, on networks of tasks."""
    table = []
    for network in networks:
        mine = [r for r in rows if r["network"] == network]
        for budget in budgets_of(mine):
            for stage, title in STAGES.items():
                other = best(mine, OTHERS, budget, stage, weakest)
                found = [weakest(mine, method, budget, stage) for method in (MAIN, f"{MAIN}-one-score")]
                line = [network, f"{budget:g}", title, *(f"{c or '-'}" for c in found)]
                table.append([*line, f"{other[1]} ({other[0]})" if other else "-"])
    note = (
        "What is left of the metric of the task that suffers most, in percent of the dense network's: with Joint, with "
        "Joint that sees only the sum of the losses, and with the importance of Torch-Pruning that is best at this."
    )
    return f"{note}\n\n" + markdown(
        ["network", "budget", "", "joint", "joint-one-score", "best of Torch-Pruning"], table
    )


def network_part(rows: Sequence[Row], problem: Problem, plot: str) -> list[str]:
    """Return the section on one network."""
    dense = [r for r in rows if r["method"] == DENSE]
    told = ", ".join(
        f"{task} {name} {over_seeds([100 * r['cut'][task] for r in dense])}"
        for task, (name, _) in problem.metrics.items()
    )
    seconds = statistics.median(r["seconds"] for r in dense)
    parts = [
        f"## {problem.name}",
        f"![Points against macs]({plot})",
        f"Dense, {len(dense)} seed(s): {over_seeds([points(r['cut']) for r in dense])} points ({told}), "
        f"{dense[0]['macs']:,} macs, {dense[0]['params']:,} parameters, trained in {seconds:.0f} s on "
        f"{problem.recipe.counts.train:,} images.",
    ]
    for stage, title in STAGES.items():
        if any(stage in r for r in rows if r["method"] != DENSE):
            parts += [f"### {problem.name}, {title}", scores(rows, stage)]
            if len(problem.metrics) > 1:
                parts += [by_task(rows, stage, problem)]
    return [*parts, f"### {problem.name}, costs", costs(rows)]


def scores(rows: Sequence[Row], stage: str) -> str:
    """Tabulate the points of all methods at all budgets; the best of each column is bold."""
    budgets = budgets_of(rows)
    tops = {budget: best([r for r in rows if r["method"] != DENSE], "", budget, stage) for budget in budgets}
    table = []
    for method in methods_of(rows):
        line = [method]
        for budget in budgets:
            found, top = cell(rows, method, budget, stage), tops[budget]
            line.append("-" if found is None else f"**{found}**" if top and top[0] == method else f"{found}")
        table.append(line)
    return markdown(["method", *(f"{b:g} of macs" for b in budgets)], table)


def by_task(rows: Sequence[Row], stage: str, problem: Problem) -> str:
    """Tabulate the metric of each task, times 100, at each budget."""
    budgets, tasks = budgets_of(rows), list(problem.metrics)
    table = [
        [method, *(str(cell(rows, method, b, stage, task) or "-") for b in budgets for task in tasks)]
        for method in methods_of(rows)
    ]
    heads = [f"{b:g}: {task} {problem.metrics[task][0]}" for b in budgets for task in tasks]
    return markdown(["method", *heads], table)


def costs(rows: Sequence[Row]) -> str:
    """Tabulate the shares of macs and parameters that are left, and the seconds to plan: the least over seeds."""
    budgets = budgets_of(rows)
    table = []
    for method in methods_of(rows):
        good = [r for r in rows if r["method"] == method and "error" not in r]
        shares = [[(r["macs"], r["params"]) for r in good if r["budget"] == b] for b in budgets]
        line = [" / ".join(f"{statistics.mean(v):.3f}" for v in zip(*pairs, strict=True)) or "-" for pairs in shares]
        time = f"{min(r['seconds'] for r in good):.1f}" if good else "-"
        table.append([method, *line, time])
    return markdown(["method", *(f"{b:g}: macs / params" for b in budgets), "seconds, least"], table)


def failures(rows: Sequence[Row]) -> str:
    """List what could not be run, and why."""
    why: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        if "error" in r:
            why.setdefault((r["method"], r["error"]), []).append(f"{r['network']} at {r['budget']:g}")
    listed = [[m, ", ".join(dict.fromkeys(w)), e.replace("|", "\\|")] for (m, e), w in why.items()]
    return "## Could not be run\n\n" + (markdown(["method", "where", "why"], listed) if listed else "Nothing.")


def budgets_of(rows: Sequence[Row]) -> list[float]:
    """Return the budgets, largest first."""
    return sorted({r["budget"] for r in rows if r["method"] != DENSE}, reverse=True)


def methods_of(rows: Sequence[Row]) -> list[str]:
    """Return the methods that have rows, in their usual order."""
    there = {r["method"] for r in rows}
    return [method for method in CONTENDERS if method in there]
