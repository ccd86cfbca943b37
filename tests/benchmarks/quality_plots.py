"""Plots of the quality benchmark: points against macs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from quality_scores import STAGES, Cell, Row, best, cell, points

SHOWN = {
    "joint": ("#0072b2", "-", 2.5),
    "joint-plain": ("#56b4e9", "-", 1.5),
    "taylor": ("#009e73", "-", 1.5),
    "magnitude": ("#e69f00", "-", 1.5),
    "tp-magnitude": ("#e69f00", "--", 1.2),
    "tp-taylor": ("#009e73", "--", 1.2),
}
BEST = "best of Torch-Pruning at each budget"


def plot(network: str, rows: Sequence[Row], folder: Path) -> str:
    """Write a PNG with a panel for every stage; return its file name."""
    budgets = sorted({r["budget"] for r in rows if r["method"] != "dense"})
    stages = [stage for stage in STAGES if any(stage in r for r in rows if r["method"] != "dense")]
    dense = [points(r["cut"]) for r in rows if r["method"] == "dense"]
    figure = Figure(figsize=(4.4 * max(len(stages), 1), 4.6), layout="constrained")
    axes = figure.subplots(1, max(len(stages), 1), squeeze=False, sharey=True)[0]
    for panel, stage in zip(axes, stages, strict=False):
        if dense:
            panel.axhline(sum(dense) / len(dense), color="0.6", linestyle=":", label="dense")
        for method, (color, line, width) in SHOWN.items():
            _draw(panel, budgets, lambda b, m=method, s=stage: cell(rows, m, b, s), method, (color, line, width))
        _draw(panel, budgets, lambda b, s=stage: _best(rows, b, s), BEST, ("#d55e00", "--", 2.5))
        panel.set_title(STAGES[stage])
        panel.set_xlabel("share of macs left")
        panel.set_ylim(0, 100)
        panel.set_xlim(0, 0.05 + max(budgets))
        panel.grid(alpha=0.3)
    axes[0].set_ylabel(f"{network}: points")
    if stages:
        figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=9)
    name = f"quality_{network}.png"
    figure.savefig(folder / name, dpi=110)
    return name


def _best(rows: Sequence[Row], budget: float, stage: str) -> Cell | None:
    found = best(rows, "tp-", budget, stage)
    return found[1] if found else None


def _draw(
    panel: Any,
    budgets: Sequence[float],
    look_up: Callable[[float], Cell | None],
    label: str,
    style: tuple[str, str, float],
) -> None:
    """Draw means with their spreads over the budgets."""
    found = [(budget, c) for budget in budgets if (c := look_up(budget)) is not None]
    if not found:
        return
    color, line, width = style
    at, means = [budget for budget, _ in found], [c.mean for _, c in found]
    spreads = [c.spread or 0.0 for _, c in found]
    panel.errorbar(
        at, means, spreads, color=color, linestyle=line, linewidth=width, marker="o", markersize=4, label=label
    )
