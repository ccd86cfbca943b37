"""The legend of the picture of a network: its groups, what stays and why, the tasks."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fxprune.boxes import Box, change, layer_of, short, shrinking
from fxprune.collapsing import named_together
from fxprune.coupling import Coupling
from fxprune.figures import CHARACTER, COLORS, EDGE, FONT, HATCH, INK, STAYS, bold, pale
from fxprune.freezing import frozen_rows
from fxprune.grouping import Group
from fxprune.plans import Plan

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

WIDTH, ROW = 3.0, 0.19
"""Inches: width of the legend at least, and from row to row."""
MOST_GROUPS, MOST_REASONS, COLUMNS = 24, 3, 42
"""How many groups it names, how many reasons why channels stay, and characters of a line."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A line or some of the legend: `mark` is "patch", "hatch", "dot" or "none"."""

    mark: str
    label: str
    color: str = STAYS


@dataclass(frozen=True, slots=True)
class Legend:
    """What the legend says."""

    title: str
    entries: tuple[Entry, ...]

    @property
    def width(self) -> float:
        """In inches."""
        labels = [self.title, *(re.sub(r"[$]\\bf|[{}$]", "", entry.label) for entry in self.entries)]
        lines = [line for label in labels for line in label.split("\n")]
        return max(WIDTH, max(map(len, lines)) * CHARACTER * 1.07 + 0.6)

    @property
    def height(self) -> float:
        """In inches."""
        return ROW * (sum(entry.label.count("\n") + 1 for entry in self.entries) + self.title.count("\n") + 3)

    @staticmethod
    def of(
        coupling: Coupling,
        boxes: Mapping[str, Box],
        colors: Mapping[int, str],
        *,
        stands: Mapping[int, Collection[int]],
        letters: Mapping[str, str],
        plan: Plan | None,
        keep: np.ndarray,
    ) -> Legend:
        """Return the legend of a picture.

        Args:
            coupling: of the network.
            boxes: what is drawn.
            colors: group -> colour.
            stands: group -> the groups that it stands for, of those that stand for several.
            letters: letter -> task.
            plan: what is shown the effect of.
            keep: (channels,) which stay.
        """
        groups, drawn = shrinking(coupling), {g for box in boxes.values() for g in box.groups}
        hidden = {g for others in stands.values() for g in others} - drawn
        undrawn = _alike([group for group in groups if group.index not in drawn | hidden]) if stands else {}
        hidden |= {g for others in undrawn.values() for g in others[1:]}
        stands = {**stands, **undrawn}
        listed = _largest([group for group in groups if group.index not in hidden])
        alive = coupling.members.total((keep & coupling.has_site).astype(np.float64)) > 0
        after = {group.index: int(alive[group.choices].sum()) for group in groups}
        names = {group.index: layer_of(group.name) for group in groups}
        entries = [_entry(group, names, after, colors, stands.get(group.index, ())) for group in listed]
        entries += [Entry("hatch", "stays as it is:"), *(Entry("none", reason) for reason in _reasons(coupling))]
        if plan is not None:
            entries.append(Entry("patch", "pale: goes", pale(COLORS[0])))
        entries += [Entry("dot", f"{bold(letter)}  serves {task}", INK) for letter, task in letters.items()]
        if letters:
            entries.append(Entry("none", "no letter: serves all of them"))
        return Legend(_title(coupling, len(groups), len(groups) - len(hidden) - len(listed), plan), tuple(entries))

    def draw(self, axes: Axes, x: float) -> None:
        """Draw the legend, its left side at `x`."""
        corner: dict[str, Any] = {
            "loc": "upper left",
            "bbox_to_anchor": (x, 0.25),
            "bbox_transform": axes.transData,
            "borderaxespad": 0,
        }
        sizes: dict[str, Any] = {"fontsize": FONT + 0.5, "title_fontsize": FONT + 1.5, "handlelength": 1.6}
        handles = [_handle(entry) for entry in self.entries]
        legend = axes.legend(handles=handles, title=self.title, frameon=False, alignment="left", **corner, **sizes)
        legend.get_title().set_fontweight("bold")


def _handle(entry: Entry) -> Artist:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if entry.mark in ("dot", "none"):
        return Line2D([], [], ls="", marker="o" if entry.mark == "dot" else "", color=entry.color, label=entry.label)
    hatch = {"lw": 0, **HATCH} if entry.mark == "hatch" else {}
    edge = {"ec": EDGE, "lw": 0.7} if entry.color == "white" else {}
    return Patch(fc=entry.color, label=entry.label, **edge, **hatch)


def _largest(groups: list[Group]) -> list[Group]:
    """Return the widest groups, in graph order."""
    widest = sorted(groups, key=lambda group: (-group.width, group.index))[:MOST_GROUPS]
    return sorted(widest, key=lambda group: group.index)


def _alike(groups: list[Group]) -> dict[int, list[int]]:
    """Return the first of all groups whose names differ in numbers only -> these groups, where there are several."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for group in groups:
        found.setdefault((re.sub(r"\d+", "#", group.name), group.kind, group.width), []).append(group.index)
    return {same[0]: same for same in found.values() if len(same) > 1}


def _entry(
    group: Group,
    names: Mapping[int, str],
    after: Mapping[int, int],
    colors: Mapping[int, str],
    stands: Collection[int],
) -> Entry:
    of = sorted(stands) or [group.index]
    low, high = (pick(after[g] for g in of) for pick in (min, max))
    width = change(str(group.width), f"{low}" if low == high else f"{low}\N{EN DASH}{high}")
    name = short(named_together(names[of[0]], names[of[-1]]))
    number = "\N{HORIZONTAL ELLIPSIS}".join(bold(str(g)) for g in dict.fromkeys((of[0], of[-1])))
    label = f"{number}  {name}  {width}" + (" rows" if group.kind == "rows" else "")
    return Entry("patch", label + (f", {len(of)} groups" if stands else ""), colors.get(group.index, "white"))


def _reasons(coupling: Coupling) -> list[str]:
    """Return why channels stay, the most frequent reasons."""
    counts: dict[str, int] = {}
    for row in frozen_rows(coupling):
        counts[row.reason] = counts.get(row.reason, 0) + row.channels
    reasons = sorted(counts, key=lambda reason: -counts[reason])
    lines = [f"{counts[reason]:,} channels: {reason}" for reason in reasons[:MOST_REASONS]]
    if len(reasons) > MOST_REASONS:
        lines.append(f"and for {len(reasons) - MOST_REASONS} more reasons")
    return ["\n".join(textwrap.wrap(line, COLUMNS, subsequent_indent="  ")).replace("$", r"\$") for line in lines]


def _title(coupling: Coupling, count: int, left_out: int, plan: Plan | None) -> str:
    title = f"{count} group{'' if count == 1 else 's'} of {type(coupling.traced.model).__name__}"
    if left_out > 0:
        title += f"\nthe {count - left_out} widest"
    if plan is not None:
        title += f"\n{plan.costs.share('macs'):.1%} of macs, {plan.costs.share('params'):.1%} of params"
    return title
