"""The groups of a network, and what a plan does to them, as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fxprune.boxes import Box, find_boxes
from fxprune.collapsing import Repeat
from fxprune.collapsing import collapse as collapsed
from fxprune.coupling import Coupling
from fxprune.errors import check_kind
from fxprune.figures import CHARACTER, EDGE, FONT, HATCH, INK, STAYS, bold, colors_of, new_figure, pale, saved
from fxprune.layering import Layers, lay_out
from fxprune.legends import Legend
from fxprune.planning import keep_of
from fxprune.plans import Plan
from fxprune.serving import serve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BOX, PITCH, GAP, LANE = 0.22, 0.36, 0.2, 0.2
"""Inches: height of a box, from row to row, between boxes, for an edge that passes."""
TOP, MARGIN = 0.3, 0.45
"""Inches: from the origin down to the first row, and up to the top of the picture."""
FRAME, FRAME_COLOR, TIMES_ROOM = 0.09, "#F1F1F1", 0.5
"""Inches around the boxes of a block that repeats, and for how often it does."""
BADGE, LONGEST_BADGE = 0.125, 4
"""Inches: height of the mark that says which tasks a box serves; how many letters it has at most."""
TIMES, ELLIPSIS = "\N{MULTIPLICATION SIGN}", "\N{HORIZONTAL ELLIPSIS}"
MANY_BOXES = 60
"""From how many boxes on blocks that repeat are drawn once, unless a picture is asked for otherwise."""


def draw_groups(
    coupling: Coupling, path: str | Path | None = None, plan: Plan | None = None, *, collapse: bool | None = None
) -> Figure:
    """Draw the layers of a network from top to bottom, coloured by the group of their output channels.

    A norm is drawn in one box with the layer it follows. What stays as it is, is grey and hatched. Boxes carry the
    number of their group and their width; with a plan, the width before and after, and the part that goes is pale.
    Where there are several outputs, letters mark what serves only some of them.

    Equal blocks that follow each other may be drawn once, framed, with how often they occur. Names and widths then
    tell from which to which they go, and `12..` is group 12 and those in its place in the other blocks.

    Args:
        coupling: from `couple`.
        path: where to write the picture: `.png`, `.svg` or `.pdf`.
        plan: what to show the effect of.
        collapse: draw blocks that repeat once; by default where there are more than 60 boxes.

    Returns:
        The figure. Patches carry the fx node they stand for as their `gid`, frames and letters `repeat:` or `serves:`
        before it.

    Raises:
        FxPruneError: matplotlib is not installed, or cannot write such a file.
        ArtifactError: the plan is of another network.

    Example:
        >>> fxprune.draw_groups(coupling, "groups.png")  # doctest: +SKIP
    """
    check_kind(coupling, Coupling)
    keep = np.ones(coupling.num_channels, dtype=bool) if plan is None else keep_of(coupling, plan)
    boxes, graph = find_boxes(coupling, keep)
    repeats, stands = [], {}
    if len(boxes) > MANY_BOXES if collapse is None else collapse:
        boxes, graph, repeats, stands = collapsed(boxes, graph)
    layers = lay_out(graph, {name: _room(box) + GAP for name, box in boxes.items()}, LANE)
    colors = colors_of(graph, boxes)
    letters, served = serve(boxes, graph)
    legend = Legend.of(coupling, boxes, colors, stands=stands, letters=letters, plan=plan, keep=keep)
    left, right, rows = _extent(layers, boxes, repeats)
    height = max(rows * PITCH, legend.height) + TOP + MARGIN
    figure = new_figure(right - left + legend.width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(left, right + legend.width), ylim=(MARGIN - height, MARGIN))
    axes.axis("off")
    for repeat in repeats:
        _draw_frame(axes, repeat, layers, boxes)
    _draw_edges(axes, layers)
    for name, box in boxes.items():
        x, y = layers.at[name][0], _y(layers.at[name][1])
        _draw_box(axes, box, x, y, colors, stands)
        if name in served:
            _draw_badge(axes, box, x, y, served[name], len(letters))
    legend.draw(axes, right)
    return saved(figure, path)


def _room(box: Box) -> float:
    """Return the inches that a box is wide."""
    return CHARACTER * (len(box.name) + len(box.size) + (6 if len(box.groups) == 1 else 2)) + 0.1


def _y(row: int) -> float:
    return -row * PITCH - TOP


def _extent(layers: Layers, boxes: Mapping[str, Box], repeats: Sequence[Repeat]) -> tuple[float, float, int]:
    """Return the left and right end of everything, with a margin, and the number of rows."""
    sides = [x + side * _room(boxes[name]) / 2 for name, (x, _) in layers.at.items() for side in (-1, 1)]
    sides += [x for points in layers.paths.values() for x, _ in points]
    frames = [_frame(repeat, layers, boxes) for repeat in repeats]
    return (
        min([*sides, *(left - TIMES_ROOM for left, *_ in frames)], default=0.0) - GAP,
        max([*sides, *(right for _, right, *_ in frames)], default=0.0) + GAP,
        1 + max((row for _, row in layers.at.values()), default=0),
    )


def _frame(repeat: Repeat, layers: Layers, boxes: Mapping[str, Box]) -> tuple[float, float, float, float]:
    """Return left, right, bottom and top of what is around a block that repeats."""
    nodes = repeat.blocks[0]
    sides = [layers.at[n][0] + side * _room(boxes[n]) / 2 for n in nodes for side in (-1, 1)]
    rows = [_y(layers.at[n][1]) for n in nodes]
    room = BOX / 2 + FRAME / 2
    return min(sides) - FRAME, max(sides) + FRAME, min(rows) - room, max(rows) + room


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


def _draw_box(axes: Axes, box: Box, x: float, y: float, colors: Mapping[int, str], stands: Mapping[int, Any]) -> None:
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
    groups = [f"{bold(str(g))}{ELLIPSIS if g in stands else ''}" for g in box.groups]
    name = f"{groups[0]}  {box.name}" if len(groups) == 1 else box.name
    axes.text(left + 0.06, y - 0.008, name, ha="left", **style)
    axes.text(left + room - 0.06, y - 0.008, box.size, ha="right", **style)


def _draw_frame(axes: Axes, repeat: Repeat, layers: Layers, boxes: Mapping[str, Box]) -> None:
    """Draw what is around a block that repeats, with how often it does."""
    from matplotlib.patches import FancyBboxPatch

    left, right, bottom, top = _frame(repeat, layers, boxes)
    look: dict[str, Any] = {
        "fc": FRAME_COLOR,
        "ec": EDGE,
        "lw": 0.8,
        "zorder": 0,
        "gid": f"repeat:{repeat.blocks[0][0]}",
    }
    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((left, bottom), right - left, top - bottom, style, **look))
    words = f"{TIMES} {repeat.count}"
    axes.text(left - 0.06, top - 0.06, words, ha="right", va="top", fontsize=FONT + 3, weight="bold", color=INK)


def _draw_badge(axes: Axes, box: Box, x: float, y: float, letters: Sequence[str], of: int) -> None:
    """Mark which tasks a box serves, on its upper left corner."""
    from matplotlib.patches import FancyBboxPatch

    words = " ".join(letters) if len(letters) <= LONGEST_BADGE else f"{len(letters)} of {of}"
    wide = BADGE + 0.052 * (len(words) - 1)
    left, bottom = x - _room(box) / 2 - BADGE / 2, y + BOX / 2 - BADGE / 2 + 0.02
    look: dict[str, Any] = {"fc": INK, "ec": "white", "lw": 0.6, "zorder": 5, "gid": f"serves:{box.node}"}
    style = f"round,pad=0,rounding_size={BADGE / 2}"
    axes.add_patch(FancyBboxPatch((left, bottom), wide, BADGE, style, label=words, **look))
    where = {"ha": "center", "va": "center", "zorder": 6}
    axes.text(left + wide / 2, bottom + BADGE / 2 - 0.006, words, fontsize=6, weight="bold", color="white", **where)
