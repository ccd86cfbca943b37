"""A report as one HTML file: a template, its style and scripts, and the data as JSON. It needs no network."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping
from dataclasses import astuple
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx

from fxprune.boxes import Box
from fxprune.errors import FxPruneError
from fxprune.figures import colors_of, pale
from fxprune.layering import lay_out

if TYPE_CHECKING:
    from fxprune.reporting import Report
    from fxprune.sketching import Sketch

CHARACTER, PADDING, GAP, LANE, PITCH = 6.7, 22.0, 18.0, 14.0, 42
"""Pixels: a character, what a box has around its text, between boxes, for an edge that passes, from row to row."""
SCRIPTS = ("basics.js", "head.js", "picture.js", "details.js", "tables.js", "start.js")
"""In the order they run in; they share one scope."""
UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
"""Characters that mean something to HTML or JavaScript; inside JSON they stand only in strings."""


def publish(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the page of a report.

    Raises:
        FxPruneError: the file cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page_of(report), encoding="utf-8")
    except OSError as error:
        raise FxPruneError(
            f"cannot write {str(target)!r} ({error.strerror}). Name a file in a folder that can be written to."
        ) from error


def page_of(report: Report) -> str:
    """Return the page of a report, whatever its names hold."""
    parts = {
        "title": html.escape(f"{report.sketch.network}: what fxprune did"),
        "style": _template("report.css"),
        "script": "\n".join(_template(name) for name in SCRIPTS),
        "data": json.dumps(page_data(report), separators=(",", ":")).translate(UNSAFE),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _template("report.html"))


def _template(name: str) -> str:
    return (resources.files("fxprune") / "templates" / name).read_text(encoding="utf-8")


def page_data(report: Report) -> dict[str, Any]:
    """Return what the script of the page reads."""
    sketch = report.sketch
    budget = ", ".join(f"{name}={value:g}" for name, value in report.budget.items())
    blocked = [[b.macs, b.params, b.node, b.reason, b.source] for b in report.coverage.blocked]
    return {
        "network": sketch.network,
        "method": report.method,
        "budget": budget,
        "frontend": report.frontend,
        "coverage": report.coverage.headline,
        "passed": report.verification.passed if report.verification else None,
        "error": report.verification.worst if report.verification else None,
        "costs": [[name, before, after] for name, before, after, _ in report.costs.rows()],
        **_picture(sketch),
        "groups": [
            {"name": g.name, "kind": g.kind, "before": g.before, "after": g.after, "cuts": [*map(astuple, g.cuts)]}
            for g in sketch.groups
        ],
        "ties": [astuple(tie) for tie in sketch.ties],
        "frozen": [astuple(row) for row in report.frozen],
        "blocked": blocked,
        "notes": [*report.answers, *report.notes],
    }


def _picture(sketch: Sketch) -> dict[str, Any]:
    """Return boxes, edges and colours, laid out in pixels."""
    boxes = {box.node: box for box in sketch.boxes}
    graph = nx.DiGraph()
    graph.add_nodes_from(boxes)
    graph.add_edges_from(sketch.edges)
    layers = lay_out(graph, {node: _width(box) + GAP for node, box in boxes.items()}, LANE)
    colors = colors_of(graph, boxes)
    return {
        "boxes": [_box(box, *layers.at[node], sketch) for node, box in boxes.items()],
        "edges": [
            [a, b, [value for x, row in points for value in (round(x), row * PITCH)]]
            for (a, b), points in layers.paths.items()
        ],
        "colors": {group: [color, pale(color)] for group, color in sorted(colors.items())},
    }


def _width(box: Box) -> float:
    """Return the pixels that a box is wide."""
    number = str(box.groups[0]) if len(box.groups) == 1 else ""
    return CHARACTER * len(" ".join(word for word in (number, box.name, box.size) if word)) + PADDING


def _box(box: Box, x: float, row: int, sketch: Sketch) -> Mapping[str, Any]:
    return {
        "node": box.node,
        "kind": box.kind,
        "name": box.name,
        "layer": box.layer,
        "size": box.size,
        "source": sketch.sources.get(box.node, ""),
        "segments": [astuple(segment) for segment in box.segments],
        "held": [astuple(row) for row in sketch.held.get(box.node, ())],
        "x": round(x),
        "y": row * PITCH,
        "width": round(_width(box)),
    }
