"""What is measured, as charts: sensitivities as a heat map, sweeps as curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fxprune.boxes import layer_of, short
from fxprune.errors import FxPruneError
from fxprune.figures import CHARACTER, EDGE, FONT, GRID, INK, LINES, MARKERS, bold, new_figure, saved
from fxprune.sensing import WHOLE, Sensitivity
from fxprune.sweeping import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW, COLUMN, HEAD, MARGIN = 0.22, 0.62, 0.95, 0.3
"""Inches: a row and a column of the heat map, what is above it, and around it."""
SHADES, PALEST, WHITE_ABOVE = "Blues", 1e-4, 0.6
"""From white to dark blue; the smallest rise that has a colour of its own; from which shade on text is white."""
SCALE_ROOM, SCALE_HEIGHT, LEAST_WIDTH = 0.95, 1.3, 5.2
"""Inches for the scale of colours, its height at least, and the width of the heat map at least, for its title."""
PANEL, PANEL_HEIGHT, FRAME, LEGEND = 3.6, 3.3, 0.75, 0.45
"""Inches: a panel of a sweep, its height, left and below it for numbers, above it for the legend."""
LINEAR = 0.01
"""Up to which rise the axis of a sweep is linear where rises are large; logarithmic from there on."""
MANY_TASKS = 8


def draw_sensitivity(sensitivity: Sensitivity, path: str | Path | None = None, *, most: int = 40) -> Figure:
    """Draw how much each task's loss rises when one group alone shrinks, as a heat map of groups and tasks.

    Args:
        sensitivity: from `sensitivity`, measured on data.
        path: where to write the picture: `.png`, `.svg` or `.pdf`.
        most: how many groups are shown at most: those with the largest rises, in the order of the network.

    Returns:
        The figure. Numbers in the cells are the rises.

    Raises:
        FxPruneError: nothing was measured, matplotlib is not installed, or it cannot write such a file.

    Example:
        >>> found = fxprune.sensitivity(coupling, calibration=batches, tasks=tasks)  # doctest: +SKIP
        >>> fxprune.draw_sensitivity(found, "sensitivity.png")  # doctest: +SKIP
    """
    if not sensitivity.tasks or not len(sensitivity):
        raise FxPruneError(
            "there are no rises to draw: nothing was measured. Pass `calibration=batches` to `fxprune.sensitivity`."
        )
    rises = sensitivity.rises.transpose(0, 2, 1).reshape(len(sensitivity), -1)  # (groups, tasks x shares)
    listed = largest(np.nan_to_num(rises, nan=-np.inf).max(axis=1), most)
    names = [f"{g}  {short(layer_of(sensitivity[g].name))}  {sensitivity[g].width}" for g in listed]
    room = CHARACTER * max(map(len, names)) + 0.25
    wide, high = COLUMN * rises.shape[1], ROW * len(listed)
    tall = max(high, SCALE_HEIGHT)
    width, height = max(MARGIN + room + wide + SCALE_ROOM + MARGIN, LEAST_WIDTH), HEAD + tall + MARGIN
    figure = new_figure(width, height)
    axes = figure.add_axes(((MARGIN + room) / width, 1 - (HEAD + high) / height, wide / width, high / height))
    _draw_cells(axes, rises[listed], sensitivity)
    axes.set_yticks(range(len(listed)), names, fontsize=FONT)
    scale = figure.add_axes(((MARGIN + room + wide + 0.2) / width, MARGIN / height, 0.14 / width, tall / height))
    _draw_scale(scale, rises[listed])
    what = "change of the outputs" if sensitivity.tasks == (WHOLE,) else "rise of the loss"
    title = f"{what} when one group alone shrinks"
    if len(listed) < len(sensitivity):
        title += f"\nthe {len(listed)} of {len(sensitivity)} groups with the largest"
    figure.text(MARGIN / width, 1 - 0.12 / height, title, fontsize=FONT + 2, weight="bold", color=INK, va="top")
    return saved(figure, path)


def largest(values: np.ndarray, most: int) -> list[int]:
    """Return the places of the largest values, (n,), in order."""
    return sorted(np.argsort(-values, kind="stable")[:most].tolist())


def percent(value: float) -> str:
    """Return a share with two or three digits, or "" for NaN."""
    if np.isnan(value):
        return ""
    if abs(value) < 0.00005:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}\N{MULTIPLICATION SIGN}"
    return f"{value:.0%}" if abs(value) >= 0.1 else f"{value:.1%}" if abs(value) >= 0.01 else f"{value:.2%}"


def _draw_cells(axes: Axes, rises: np.ndarray, sensitivity: Sensitivity) -> None:
    shades = _shades(rises)
    axes.imshow(np.ma.masked_invalid(shades), cmap=SHADES, vmin=0, vmax=1, aspect="auto", gid="rises")
    for (row, column), value in np.ndenumerate(rises):
        color = "white" if shades[row, column] > WHITE_ABOVE else INK
        axes.text(column, row, percent(value), ha="center", va="center", fontsize=FONT - 0.5, color=color)
    shares, tasks = sensitivity.shares, sensitivity.tasks
    labels = [f"\N{MINUS SIGN}{share:.0%}" for _ in tasks for share in shares]
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(labels)), labels, fontsize=FONT)
    axes.set_xticks(np.arange(len(labels) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(rises) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color=GRID, lw=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_color(GRID)
    for i, task in enumerate(tasks):
        middle = i * len(shares) + (len(shares) - 1) / 2
        longest = max(int(COLUMN * len(shares) / CHARACTER), 4)
        name = task if len(task) <= longest else f"{task[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"
        above = axes.get_xaxis_transform()
        y = 1 + 0.3 / (ROW * len(rises))
        axes.text(middle, y, name, ha="center", va="bottom", fontsize=FONT + 0.5, weight="bold", transform=above)
        if i:
            axes.axvline(i * len(shares) - 0.5, color=EDGE, lw=1.4)


def _shades(rises: np.ndarray) -> np.ndarray:
    """Return rises as shades from 0 to 1, logarithmic from `PALEST` to the largest."""
    high = max(float(np.nanmax(rises, initial=0.0)), 10 * PALEST)
    return np.log(np.clip(rises, PALEST, None) / PALEST) / np.log(high / PALEST)


def _draw_scale(axes: Axes, rises: np.ndarray) -> None:
    high = max(float(np.nanmax(rises, initial=0.0)), 10 * PALEST)
    axes.imshow(np.linspace(1, 0, 256)[:, None], cmap=SHADES, vmin=0, vmax=1, aspect="auto", extent=(0, 1, 0, 1))
    ticks = [10.0**k for k in range(-4, 12) if 10.0**k <= high * 1.001]
    axes.yaxis.tick_right()
    places = [float(np.log(t / PALEST) / np.log(high / PALEST)) for t in ticks]
    labels = [f"{100 * t:,g}%" for t in ticks]
    labels[0] = f"\N{LESS-THAN OR EQUAL TO} {labels[0]}"
    axes.set_yticks(places, labels, fontsize=FONT)
    axes.set_xticks([])


def draw_sweep(sweep: Sweep, path: str | Path | None = None, *, resources: Sequence[str] | None = None) -> Figure:
    """Draw how much each task's loss rises, budget by budget, against what is left of each resource.

    Args:
        sweep: from `sweep`, with data to measure on.
        path: where to write the picture: `.png`, `.svg` or `.pdf`.
        resources: a panel for each, of those that the costs tell: `["macs"]`; by default all.

    Returns:
        The figure. Lines carry their task as `gid`.

    Raises:
        FxPruneError: no losses were measured, there is no such resource, matplotlib is not installed, or it cannot
            write such a file.

    Example:
        >>> points = fxprune.sweep(coupling, budgets, calibration=batches, tasks=tasks)  # doctest: +SKIP
        >>> fxprune.draw_sweep(points, "sweep.png")  # doctest: +SKIP
    """
    tasks = list(sweep[0].rises) if len(sweep) else []
    if not tasks:
        raise FxPruneError(
            "there are no rises to draw: the sweep measured no losses. Pass `calibration=batches` to `fxprune.sweep`."
        )
    known = list(sweep[0].plan.costs.before.to_dict())
    unknown = [name for name in resources or () if name not in known]
    if unknown:
        raise FxPruneError(f"the sweep has no resource {unknown[0]!r}. It has {', '.join(map(repr, known))}.")
    names = list(resources or known)
    width, height = FRAME + len(names) * PANEL + 0.2, PANEL_HEIGHT + FRAME + LEGEND
    figure = new_figure(width, height)
    for i, name in enumerate(names):
        left = (FRAME + 0.15 + i * PANEL) / width
        axes = figure.add_axes((left, FRAME / height, (PANEL - 0.35) / width, PANEL_HEIGHT / height))
        _draw_panel(axes, sweep, name, tasks)
        if i:
            axes.tick_params(labelleft=False)
        else:
            what = "change of the outputs" if tasks == [WHOLE] else "rise of the loss right after the cut"
            axes.set_ylabel(what, fontsize=FONT + 1)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper left", ncols=min(len(tasks), MANY_TASKS), frameon=False, fontsize=FONT + 1
    )
    return saved(figure, path)


def _draw_panel(axes: Axes, sweep: Sweep, resource: str, tasks: Sequence[str]) -> None:
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    order = sorted(sweep, key=lambda point: -point.plan.costs.share(resource))
    shares = [point.plan.costs.share(resource) for point in order]
    for i, task in enumerate(tasks):
        look: dict[str, Any] = {"color": LINES[i % len(LINES)], "marker": MARKERS[i % len(MARKERS)]}
        rises = [point.rises[task] for point in order]
        axes.plot(shares, rises, label=task, gid=task, lw=1.6, ms=4.5, **look)
    values = [point.rises[task] for point in order for task in tasks]
    if max(values) > 1:
        axes.set_yscale("symlog", linthresh=LINEAR)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:,g}%"))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlim(1.02, max(min(shares) - 0.05, 0.0))
    axes.set_xlabel(f"{bold(resource)} left, of the dense network", fontsize=FONT + 1)
    axes.axhline(0, color=INK, lw=0.8, zorder=1)
    axes.grid(color=GRID, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=FONT)
    axes.spines[["top", "right"]].set_visible(False)
