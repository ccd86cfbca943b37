"""The groups of a network, and what a plan does to them, as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np

from fxprune.boxes import Box, change, find_boxes, short, shrinking
from fxprune.coupling import Coupling
from fxprune.errors import FxPruneError
from fxprune.grouping import Group
from fxprune.layering import Layers, lay_out
from fxprune.planning import keep_of
from fxprune.plans import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

COLORS = ("#77AADD", "#EE8866", "#44BB99", "#FFAABB", "#BBCC33", "#99DDFF", "#EEDD88")
"""Paul Tol's light scheme: colour-blind readers tell them apart, and dark text is legible on every one."""
STAYS, INK, EDGE = "#DDDDDD", "#222222", "#999999"
FONT, CHARACTER = 7.5, 0.066
"""Size of the text in points, and the room for one of its characters in inches."""
BOX, PITCH, GAP, LANE, LEGEND = 0.22, 0.36, 0.2, 0.2, 3.4
"""Inches: height of a box, from row to row, between boxes, for an edge that passes, width of the legend."""
TOP, MARGIN = 0.3, 0.45
"""Inches: from the origin down to the first row, and up to the top of the picture."""
LEGEND_ROWS, LEGEND_ROW = 24, 0.19
"""How many groups the legend names, and its inches from row to row."""
HATCH: dict[str, Any] = {"hatch": "////", "ec": "#BBBBBB"}


def draw_groups(coupling: Coupling, path: str | Path | None = None, plan: Plan | None = None) -> Figure:
    """Draw the layers of a network from top to bottom, coloured by the group of their output channels.

    A norm is drawn in one box with the layer it follows. What stays as it is, is grey and hatched. Boxes carry the
    number of their group and their width; with a plan, the width before and after, and the part that goes is pale.

    Args:
        coupling: from `couple`.
        path: where to write the picture: `.png`, `.svg` or `.pdf`.
        plan: what to show the effect of.

    Returns:
        The figure. Patches carry the fx node they stand for as their `gid`.

    Raises:
        FxPruneError: matplotlib is not installed, or cannot write such a file.
        ArtifactError: the plan is of another network.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        message = 'drawing needs matplotlib, which is not installed. Run `pip install "fxprune[examples]"`.'
        raise FxPruneError(message) from error
    keep = np.ones(coupling.num_channels, dtype=bool) if plan is None else keep_of(coupling, plan)
    boxes, graph = find_boxes(coupling, keep)
    layers = lay_out(graph, {name: _room(box) + GAP for name, box in boxes.items()}, LANE)
    colors = colors_of(graph, boxes)
    listed = _largest(shrinking(coupling))
    left, right, rows = _extent(layers, boxes)
    height = max(rows * PITCH, LEGEND_ROW * (len(listed) + 4)) + TOP + MARGIN
    figure = Figure(figsize=(right - left + LEGEND, height), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(left, right + LEGEND), ylim=(MARGIN - height, MARGIN))
    axes.axis("off")
    _draw_edges(axes, layers)
    for name, box in boxes.items():
        _draw_box(axes, box, layers.at[name][0], _y(layers.at[name][1]), colors)
    _draw_legend(axes, right, _handles(coupling, listed, keep, colors, plan), _title(coupling, listed, plan))
    if path is not None:
        _save(figure, Path(path))
    return figure


def _room(box: Box) -> float:
    """Return the inches that a box is wide."""
    return CHARACTER * (len(box.name) + len(box.size) + (5 if len(box.groups) == 1 else 2)) + 0.1


def _y(row: int) -> float:
    return -row * PITCH - TOP


def _extent(layers: Layers, boxes: Mapping[str, Box]) -> tuple[float, float, int]:
    """Return the left and right end of everything, with a margin, and the number of rows."""
    sides = [x + side * _room(boxes[name]) / 2 for name, (x, _) in layers.at.items() for side in (-1, 1)]
    sides += [x for points in layers.paths.values() for x, _ in points]
    return (
        min(sides, default=0.0) - GAP,
        max(sides, default=0.0) + GAP,
        1 + max((row for _, row in layers.at.values()), default=0),
    )


def colors_of(graph: nx.DiGraph, boxes: Mapping[str, Box]) -> dict[int, str]:
    """Colour the groups so that those drawn near each other differ, and all colours are used about equally."""
    near: dict[int, set[int]] = {}
    around = nx.power(graph.to_undirected(), 3) if len(graph) else graph
    for name, box in boxes.items():
        for g in box.groups:
            near.setdefault(g, set()).update(box.groups, *(boxes[other].groups for other in around[name]))
    chosen: dict[int, str] = {}
    for g in sorted(near):
        taken = [chosen[other] for other in near[g] if other in chosen]
        chosen[g] = min(COLORS, key=lambda c: (taken.count(c), list(chosen.values()).count(c)))
    return chosen


def pale(color: str) -> str:
    """Mix a colour with three parts of white."""
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{(part + 3 * 255) // 4:02X}" for part in parts)


def _draw_edges(axes: Axes, layers: Layers) -> None:
    from matplotlib.collections import PathCollection
    from matplotlib.path import Path as Curve

    into: dict[Any, list[Any]] = {}
    for edge in layers.paths:
        into.setdefault(edge[1], []).append(edge)
    curves = []
    for edges in into.values():
        edges.sort(key=lambda edge: layers.paths[edge][-2][0])
        for i, edge in enumerate(edges):
            points = [(x, _y(row)) for x, row in layers.paths[edge]]
            points[-1] = (points[-1][0] + 0.14 * (i - (len(edges) - 1) / 2), points[-1][1])
            vertices, codes = [(points[0][0], points[0][1] - BOX / 2)], [Curve.MOVETO]
            for (x0, y0), (x1, y1) in pairwise(points):
                below, above = y0 - BOX / 2, y1 + BOX / 2
                middle = (below + above) / 2
                vertices += [(x0, below), (x0, middle), (x1, middle), (x1, above)]
                codes += [Curve.LINETO, *[Curve.CURVE4] * 3]
            curves.append(Curve(vertices, codes))
    axes.add_collection(PathCollection(curves, facecolors="none", edgecolors=EDGE, linewidths=0.8, zorder=1))


def _draw_box(axes: Axes, box: Box, x: float, y: float, colors: Mapping[int, str]) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    room = _room(box)
    left, bottom, style = x - room / 2, y - BOX / 2, {"fontsize": FONT, "color": INK, "va": "center", "zorder": 4}
    if box.kind in ("input", "output"):
        look = {"fc": "white", "ec": EDGE, "lw": 0.8, "zorder": 2, "gid": box.node}
        axes.add_patch(FancyBboxPatch((left, bottom), room, BOX, "round,pad=0,rounding_size=0.1", **look))
        axes.text(x, y, box.name, ha="center", style="italic", **style)
        return
    total, start = sum(s.before for s in box.segments), left
    for s in box.segments:
        wide = room * s.before / max(total, 1)
        stays = wide * s.after / max(s.before, 1)
        look: dict[str, Any] = {"fc": STAYS, **HATCH} if s.group is None else {"fc": colors[s.group]}
        axes.add_patch(Rectangle((start, bottom), wide, BOX, fc=pale(look["fc"]), lw=0, zorder=2))
        axes.add_patch(Rectangle((start, bottom), stays, BOX, lw=0, zorder=2, gid=f"{box.node}:{s.group}", **look))
        start += wide
    look = {"fc": "none", "ec": INK, "lw": 0.7, "ls": "-" if box.kind == "layer" else (0, (3, 1.5)), "gid": box.node}
    axes.add_patch(Rectangle((left, bottom), room, BOX, zorder=3, **look))
    name = f"{_bold(box.groups[0])}  {box.name}" if len(box.groups) == 1 else box.name
    axes.text(left + 0.06, y - 0.008, name, ha="left", **style)
    axes.text(left + room - 0.06, y - 0.008, box.size, ha="right", **style)


def _bold(number: int) -> str:
    return f"$\\bf{{{number}}}$"


def _largest(groups: list[Group]) -> list[Group]:
    """Return the widest groups, in graph order."""
    widest = sorted(groups, key=lambda group: (-group.width, group.index))[:LEGEND_ROWS]
    return sorted(widest, key=lambda group: group.index)


def _handles(
    coupling: Coupling, listed: list[Group], keep: np.ndarray, colors: Mapping[int, str], plan: Plan | None
) -> list[Patch]:
    from matplotlib.patches import Patch

    alive = coupling.members.total((keep & coupling.has_site).astype(np.float64)) > 0
    handles = []
    for group in listed:
        width = change(group.width, int(alive[np.concatenate(group.cells)].sum()))
        name = short(group.name.rpartition(".")[0] or group.name)
        handles.append(Patch(fc=colors.get(group.index, STAYS), label=f"{_bold(group.index)}  {name}  {width}"))
    handles.append(Patch(fc=STAYS, lw=0, label="stays as it is", **HATCH))
    if plan is not None:
        handles.append(Patch(fc=pale(COLORS[0]), label="pale: goes"))
    return handles


def _title(coupling: Coupling, listed: list[Group], plan: Plan | None) -> str:
    count = len(shrinking(coupling))
    title = f"{count} group{'' if count == 1 else 's'} of {type(coupling.traced.model).__name__}"
    if count > len(listed):
        title += f", the {len(listed)} widest"
    if plan is not None:
        title += f"\n{plan.costs.share('macs'):.1%} of macs, {plan.costs.share('params'):.1%} of params"
    return title


def _draw_legend(axes: Axes, x: float, handles: list[Patch], title: str) -> None:
    corner: dict[str, Any] = {
        "loc": "upper left",
        "bbox_to_anchor": (x, 0.25),
        "bbox_transform": axes.transData,
        "borderaxespad": 0,
    }
    sizes: dict[str, Any] = {"fontsize": FONT + 0.5, "title_fontsize": FONT + 1.5, "handlelength": 1.6}
    legend = axes.legend(handles=handles, title=title, frameon=False, alignment="left", **corner, **sizes)
    legend.get_title().set_fontweight("bold")


def _save(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (ValueError, OSError) as error:
        message = f"cannot write {str(path)!r} ({error}). Name a file that ends in .png, .svg or .pdf."
        raise FxPruneError(message) from error
