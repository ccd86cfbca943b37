"""A plan as a picture: the width of every group before and after, and what a method expects of every other width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fxprune.boxes import layer_of, short
from fxprune.charts import largest
from fxprune.errors import ArtifactError, check_kind
from fxprune.figures import CHARACTER, COLORS, EDGE, FONT, GRID, INK, LINES, new_figure, pale, saved
from fxprune.plans import GroupWidth, Plan
from fxprune.sensing import Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR, BARS, CURVES, NUMBERS, ROOM, TICKS = 0.16, 2.6, 3.0, 1.35, 0.2, 0.4
"""Inches: height of a bar, width of the bars, of the curves and of the numbers, between the last two, on the right."""
ROW, TALL_ROW, HEAD, FOOT, MARGIN = 0.24, 0.46, 1.05, 0.5, 0.3
"""Inches: a row without and with a curve, what is above and below them, and left and right of everything."""
DECADES = 5
"""How many powers of ten the axis of comparable errors has."""


def draw_plan(
    plan: Plan, path: str | Path | None = None, sensitivity: Sensitivity | None = None, *, most: int = 40
) -> Figure:
    """Draw the width of every group before and after.

    With a sensitivity, a curve beside each bar says what its method expects the group's loss of channels to cost, on
    its own, at every width; a dot marks the width of the plan. Errors in one unit for all groups, as those of `Joint`,
    share a logarithmic axis; others run from 0 to all of their group.

    Args:
        plan: from `plan`.
        path: where to write the picture: `.png`, `.svg` or `.pdf`.
        sensitivity: from `fxprune.sensitivity`, of the same network, tasks and constraints.
        most: how many groups are shown at most: those that lose the largest shares, in the order of the network.

    Returns:
        The figure. Bars carry `after:` and the number of their group as `gid`, curves `curve:`, dots `cut:`.

    Raises:
        ArtifactError: plan and sensitivity are of different groups.
        FxPruneError: matplotlib is not installed, or cannot write such a file.

    Example:
        >>> fxprune.draw_plan(plan, "plan.png", fxprune.sensitivity(coupling, calibration=batches))  # doctest: +SKIP
    """
    check_kind(plan, Plan)
    if sensitivity is not None:
        _check(plan, sensitivity)
    listed = largest(np.array([1 - g.after / max(g.before, 1) for g in plan.groups]), most)
    groups = [plan.groups[g] for g in listed]
    names = [f"{g}  {short(layer_of(plan.groups[g].name))}" for g in listed]
    row = ROW if sensitivity is None else TALL_ROW
    room = CHARACTER * max(map(len, names), default=0) + 0.2
    width = 2 * MARGIN + room + BARS + NUMBERS + (ROOM + CURVES + TICKS if sensitivity is not None else 0)
    high = row * max(len(groups), 1)
    figure = new_figure(width, HEAD + high + FOOT)
    height = figure.get_figheight()
    axes = figure.add_axes(((MARGIN + room) / width, FOOT / height, BARS / width, high / height))
    _draw_bars(axes, listed, groups, names, row)
    if sensitivity is not None:
        left = MARGIN + room + BARS + NUMBERS + ROOM
        beside = figure.add_axes((left / width, FOOT / height, CURVES / width, high / height))
        _draw_curves(beside, listed, groups, sensitivity)
    figure.text(
        MARGIN / width, 1 - 0.12 / height, _title(plan, len(listed)), fontsize=FONT + 2, weight="bold", va="top"
    )
    return saved(figure, path)


def _check(plan: Plan, sensitivity: Sensitivity) -> None:
    mine, others = [(g.name, g.before) for g in plan.groups], [(c.name, c.width) for c in sensitivity]
    if mine != others:
        raise ArtifactError(
            f"the plan has {len(mine)} groups and the sensitivity {len(others)}, not the same ones. Call "
            "`fxprune.sensitivity` with the coupling, tasks and constraints of the plan."
        )


def _title(plan: Plan, shown: int) -> str:
    title = f"{len(plan.groups)} group{'' if len(plan.groups) == 1 else 's'}, widths before and after"
    if shown < len(plan.groups):
        title += f"; the {shown} that lose the largest shares"
    costs = ", ".join(f"{plan.costs.share(name):.1%} of {name}" for name in plan.costs.before.to_dict())
    return f"{title}\n{costs}"


def _draw_bars(
    axes: Axes, listed: Sequence[int], groups: Sequence[GroupWidth], names: Sequence[str], row: float
) -> None:
    shares, high = [g.after / max(g.before, 1) for g in groups], BAR / row
    for i, (number, group, share) in enumerate(zip(listed, groups, shares, strict=True)):
        axes.barh(i, 1, high, color=pale(COLORS[0]), ec=EDGE, lw=0.5)
        axes.barh(i, share, high, color=COLORS[0], ec=INK, lw=0.6, gid=f"after:{number}")
        words = f"{group.before} \N{RIGHTWARDS ARROW} {group.after}  ({group.share})"
        axes.text(1.03, i, words, va="center", fontsize=FONT, color=INK)
    axes.set_yticks(range(len(groups)), names, fontsize=FONT)
    _set_frame(axes, len(groups), "share of the channels that is kept")
    axes.set_xlim(0, 1)


def _set_frame(axes: Axes, rows: int, label: str) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(max(rows, 1) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(label, fontsize=FONT)
    axes.tick_params(labelsize=FONT, left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_curves(axes: Axes, listed: Sequence[int], groups: Sequence[GroupWidth], sensitivity: Sensitivity) -> None:
    """Draw each group's errors in a row of its own, 0.85 high, the axis of widths as that of the bars."""
    place = _place(sensitivity)
    levels = {place(t): f"{100 * t:,.10g}%" for t in _ticks(sensitivity)} if sensitivity.comparable else {}
    for i, (number, group) in enumerate(zip(listed, groups, strict=True)):
        floor, curve = i + 0.4, sensitivity[number]
        axes.axhline(floor, color=EDGE, lw=0.6)
        for level in levels:
            axes.plot([0, 1], [floor - 0.85 * level] * 2, color=GRID, lw=0.6, zorder=0)
        total = curve.errors[-1].sum() or 1.0
        kept = group.after / max(group.before, 1)
        at = curve.at(group.after)
        axes.plot([kept] * 2, [floor, floor - 0.85], color=INK, lw=0.8, ls=(0, (2, 2)), zorder=2)
        for task, errors in enumerate(curve.errors.T):
            color = LINES[task % len(LINES)]
            scale = 1.0 if sensitivity.comparable else total
            y = [floor - 0.85 * place(error / scale) for error in errors]
            axes.plot(curve.widths / curve.width, y, color=color, lw=1.3, zorder=3, gid=f"curve:{number}:{task}")
            cut = floor - 0.85 * place(at[task] / scale)
            axes.plot(
                kept, cut, "o", ms=4, color=color, mec=INK, mew=0.5, zorder=4, clip_on=False, gid=f"cut:{number}:{task}"
            )
    for level, words in levels.items():
        axes.text(1.02, 0.4 - 0.85 * level, words, fontsize=FONT - 2, va="center", color="#555555")
    _set_frame(axes, len(groups), "share of the channels that is kept")
    axes.set_xlim(0, 1)
    axes.set_yticks([])
    _draw_key(axes, sensitivity)


def _draw_key(axes: Axes, sensitivity: Sensitivity) -> None:
    from matplotlib.lines import Line2D

    method = sensitivity.method.partition("(")[0]
    unit = "relative to the loss, log axis" if sensitivity.comparable else "share of the group's whole"
    handles: list[Any] = [
        Line2D([], [], color=LINES[i % len(LINES)], label=name) for i, name in enumerate(sensitivity.columns)
    ]
    title = f"expected error at every width; dot: the plan\nby {method}: {unit}"
    look: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False, "borderaxespad": 0.1}
    names = {"fontsize": FONT, "title_fontsize": FONT, "ncols": 4, "alignment": "left"}
    axes.legend(handles=handles if len(handles) > 1 else [], title=title, **look, **names)


def _ticks(sensitivity: Sensitivity) -> list[float]:
    """Return powers of ten that comparable errors are read by."""
    top = _top(sensitivity)
    return [10.0**k for k in range(top - DECADES, top + 1, 2)]


def _top(sensitivity: Sensitivity) -> int:
    """Return the power of ten that no error is above."""
    highest = max((float(c.errors.max(initial=0.0)) for c in sensitivity), default=0.0)
    return int(np.ceil(np.log10(highest))) if highest > 0 else 0


def _place(sensitivity: Sensitivity) -> Callable[[float], float]:
    """Return the function from an error to its height, from 0 to 1."""
    if not sensitivity.comparable:
        return lambda error: min(max(float(error), 0.0), 1.0)
    bottom = _top(sensitivity) - DECADES
    return lambda error: max(float(np.log10(max(float(error), 1e-300))) - bottom, 0.0) / DECADES
