"""The report of the benchmark of classes, in Markdown, and its plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from commands import Row, commands_of, header, markdown, rows_in, seeds_of
from matplotlib.figure import Figure
from quality_scores import cell

Curve = tuple[np.ndarray, np.ndarray]
"""Shares of macs, ascending, and accuracies in percent."""
DATA_FREE = ("magnitude-global", "bn-scale-global", "random", "tp-magnitude", "tp-magnitude-global",
             "tp-bn-scale-global", "tp-lamp-global", "tp-fpgm-global", "tp-random")  # fmt: skip
STAGES = {"cut": "right after pruning", "tuned": "after fine-tuning"}
KINDS = {"all classes": ("#d55e00", "-"), "all classes, told": ("#e69f00", "--"), "some classes": ("#0072b2", "-")}
PACKAGES = ("fxprune", "torch", "torch-pruning", "scikit-learn", "numpy")


def report(rows: Sequence[Row], folder: Path) -> str:
    """Put the report together, and write the plot next to where it goes."""
    work, made, seeds = "one thread for each process", commands_of(rows), seeds_of(rows)
    parts = [header("Classes", PACKAGES, work, command=made, seeds=seeds)]
    by_part = {part: [r for r in rows if r["part"] == part] for part in ("few", "subtasks", "scatter")}
    if by_part["few"]:
        parts += few(by_part["few"], folder / "quality.jsonl")
    if by_part["subtasks"]:
        parts += subtasks(by_part["subtasks"])
        plot(by_part["subtasks"], folder / "classes.png")
    if by_part["scatter"]:
        parts += scatter(by_part["scatter"])
    return "\n\n".join(parts) + "\n"


def few(rows: Sequence[Row], known: Path) -> list[str]:
    """Tabulate what plans from few images are worth; beside them, what looks at no data at all."""
    others, counts = rows_in(known), sorted({r["per_class"] for r in rows})
    parts = [
        "## Few labelled images",
        "Accuracy in percent, means with standard deviations over seeds, right after pruning; for the most images also "
        "after fine-tuning. A method sees so many calibration images of each of the ten classes, for all that it does: "
        "to rank, to measure, to correct. Methods that look at no data are those of the [quality page](quality.md).",
    ]
    for network in dict.fromkeys(r["network"] for r in rows):
        mine = [r for r in rows if r["network"] == network]
        free = [r for r in others if r["network"] == network and r["method"] in DATA_FREE]
        for stage, title in STAGES.items():
            table, budgets = [], sorted({r["budget"] for r in mine}, reverse=True)
            for count in counts if stage == "cut" else counts[-1:]:
                these = [r for r in mine if r["per_class"] == count]
                table += [[str(count), *line] for line in scores(these, stage, budgets)]
            table += [["none", *line] for line in scores(free, stage, budgets)]
            heads = ["images of a class", "method", *(f"{b:g} of macs" for b in budgets)]
            parts += [f"### {network}, {title}", markdown(heads, table)]
    failed = dict.fromkeys((r["method"], r["network"], f"{r['budget']:g}", r["error"]) for r in rows if "error" in r)
    return [*parts, markdown(["could not be run", "network", "budget", "why"], list(failed))] if failed else parts


def scores(rows: Sequence[Row], stage: str, budgets: Sequence[float]) -> list[list[str]]:
    """Return a line for each method."""
    methods = dict.fromkeys(r["method"] for r in rows)
    return [[m, *(str(cell(rows, m, b, stage) or "-") for b in budgets)] for m in methods]


def curves(rows: Sequence[Row], stage: str) -> dict[str, Curve]:
    """Return the means over seeds of each kind, at the budgets that all seeds reach."""
    found = {}
    for kind in KINDS:
        told = kind.endswith("told")
        mine = [r for r in rows if r["kind"] == kind.removesuffix(", told")]
        seeds = {r["seed"] for r in rows}
        at = {b: [r for r in mine if r["budget"] == b] for b in sorted({r["budget"] for r in mine})}
        whole = [group for group in at.values() if len(group) == len(seeds)]
        macs = np.array([statistics.mean(r["macs"] for r in group) for group in whole])
        key = f"{stage}_told" if told else stage
        found[kind] = macs, 100 * np.array([statistics.mean(r[key] for r in group) for group in whole])
    return found


def needed(curve: Curve, accuracy: float) -> float | None:
    """Return the least share of macs at which a curve has an accuracy, between its points by the logarithm of macs.

    None where the curve does not get there. Where its first point has it already, that is what is returned.
    """
    macs, found = curve
    reached = np.flatnonzero(found >= accuracy)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0:
        return float(macs[0])
    part = (accuracy - found[i - 1]) / (found[i] - found[i - 1])
    return float(np.exp(np.log(macs[i - 1]) + part * (np.log(macs[i]) - np.log(macs[i - 1]))))


def subtasks(rows: Sequence[Row]) -> list[str]:
    """Tabulate how many macs networks for some classes need to be as good as those for all."""
    table = []
    for (network, size), mine in by_size(rows).items():
        dense = 100 * statistics.mean(r["cut"] for r in mine if r["kind"] == "dense")
        for stage, title in STAGES.items():
            found = curves(mine, stage)
            for i in reversed(range(len(found["all classes"][0]))):
                line = [network, str(size), f"{dense:.1f}", title, f"{found['all classes'][0][i]:.3f}"]
                for kind in ("all classes", "all classes, told"):
                    macs, accuracy = found[kind][0][i], found[kind][1][i]
                    line += [f"{accuracy:.1f}", *share_needed(found["some classes"], accuracy, macs)]
                table.append(line)
    asked = ["accuracy", "as good at", "ratio"]
    seeds = {network: seeds_of([r for r in rows if r["network"] == network]) for network, _ in by_size(rows)}
    return [
        "## Networks for some of the classes",
        "![Accuracy against macs](classes.png)",
        "Accuracy on images of some of the ten classes, chosen by chance for each seed: of networks for all classes, "
        "and of networks for these alone. Both are planned and corrected by `Joint(sequential=True)` on equally many "
        "images of their classes, and tuned on all training images of these, in the way that the dense network was "
        "trained, for a quarter of the epochs; so is the network for all classes of which nothing is cut. A network "
        "for all classes answers with the greatest of its ten outputs; *told*, with the greatest of those that can be "
        "right. As good at: the share of the dense network's macs at which the network for some classes has that "
        "accuracy, between its points; ratio: that, over the macs of the network for all.",
        "`resnet20-numbers` is for a hundred classes: numbers of two digits. There, a network for some of them is "
        "calibrated, tuned and tested on as many images of these, made of the same scans, as the network for all is "
        "on images of all: of the training images, a few classes of a hundred would have too few.",
        f"Seeds: {'; '.join(f'{network} {found}' for network, found in seeds.items())}.",
        markdown(["network", "classes", "dense", "", "macs", *asked, *(f"told: {name}" for name in asked)], table),
    ]


def share_needed(curve: Curve, accuracy: float, macs: float) -> tuple[str, str]:
    """Return at which share of macs a curve has an accuracy, and that over the macs of another network."""
    least = needed(curve, accuracy)
    if least is None:
        return "not reached", "-"
    bound = "at most " if least == curve[0][0] else ""
    return f"{bound}{least:.3f}", f"{bound}{least / macs:.2f}"


def by_size(rows: Sequence[Row]) -> Mapping[tuple[str, int], list[Row]]:
    """Return the rows of each network and number of classes."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["network"], len(row["classes"])), []).append(row)
    return found


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw accuracies against macs: a row of panels for each network, a column for each number of classes."""
    groups = by_size(rows)
    networks, sizes = (sorted({key[i] for key in groups}, key=str) for i in (0, 1))
    figure = Figure(figsize=(4.2 * len(sizes), 3.2 * len(networks)), layout="constrained")
    panels = figure.subplots(len(networks), len(sizes), squeeze=False, sharex=True, sharey="row")
    for (network, size), mine in groups.items():
        panel = panels[networks.index(network)][sizes.index(size)]
        panel.axhline(100 * statistics.mean(r["cut"] for r in mine if r["kind"] == "dense"), color="0.6", linestyle=":")
        for stage, width in (("cut", 1.2), ("tuned", 2.5)):
            for kind, (macs, accuracy) in curves(mine, stage).items():
                color, line = KINDS[kind]
                label = f"{kind}, {STAGES[stage]}"
                panel.plot(macs, accuracy, line, color=color, linewidth=width, marker="o", markersize=3, label=label)
        panel.set_title(f"{network}: {size} classes")
        panel.set_xscale("log")
        shares = sorted({r["budget"] for r in mine if r["kind"] != "dense"})
        panel.set_xticks(shares, [f"{share:g}" for share in shares], rotation=90, fontsize="small")
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3, which="both")
    for panel in panels[-1]:
        panel.set_xlabel("share of macs left")
    for line in panels:
        line[0].set_ylabel("accuracy, %")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)


def scatter(rows: Sequence[Row]) -> list[str]:
    """Tabulate what the statistics of CATRO cost."""
    table = [[r["network"], r["images"], f"{r['ratio']:.2f} ({r['low']:.2f} .. {r['high']:.2f})"] for r in rows]
    return [
        "## What scatter statistics cost",
        "CPU time of `CATRO`'s statistics over that of a forward pass on the same images, in turns: median and "
        "quartiles of the ratio.",
        markdown(["network", "images", "times a forward pass"], table),
    ]
