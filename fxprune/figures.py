"""What all pictures share: colours, the check for matplotlib, the file that a picture is written to."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx

from fxprune.boxes import Box
from fxprune.errors import FxPruneError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#77AADD", "#EE8866", "#44BB99", "#FFAABB", "#BBCC33", "#99DDFF", "#EEDD88")
"""Paul Tol's light scheme: colour-blind readers tell them apart, and dark text is legible on every one."""
LINES = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB")
"""Paul Tol's bright scheme, for lines."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STAYS, INK, EDGE, GRID = "#DDDDDD", "#222222", "#999999", "#E4E4E4"
FONT, CHARACTER, DPI = 7.5, 0.066, 110
"""Size of the text in points, the room for one of its characters in inches, and pixels per inch."""
HATCH: dict[str, Any] = {"hatch": "////", "ec": "#BBBBBB"}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        FxPruneError: matplotlib is not installed.
    """
    try:
        return _picture_class()(figsize=(width, height), dpi=DPI)
    except ModuleNotFoundError as error:
        message = 'drawing needs matplotlib, which is not installed. Run `pip install -e ".[examples]"`.'
        raise FxPruneError(message) from error


@cache
def _picture_class() -> type[Figure]:
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure that shows itself in a notebook, whether pyplot is imported or not."""

        def _repr_png_(self) -> bytes:
            return png_of(self)

    return Picture


def png_of(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png")
        return file.getvalue()


def saved(figure: Figure, path: str | Path | None) -> Figure:
    """Write a figure, where a path is given, and return it.

    Raises:
        FxPruneError: it cannot be written.
    """
    if path is None:
        return figure
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (ValueError, OSError) as error:
        message = f"cannot write {str(path)!r} ({error}). Name a file that ends in .png, .svg or .pdf."
        raise FxPruneError(message) from error
    return figure


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


def bold(text: str) -> str:
    """Return text that matplotlib writes in bold, for numbers and letters."""
    return f"$\\bf{{{text}}}$"
