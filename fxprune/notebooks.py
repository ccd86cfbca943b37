"""What the results look like in a notebook: small tables and pictures, everything else folded away."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from fxprune.costs import CostChange
from fxprune.freezing import FrozenRow, frozen_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fxprune.coupling import Coupling
    from fxprune.plans import GroupWidth, Plan
    from fxprune.reporting import Report
    from fxprune.sensing import Sensitivity
    from fxprune.sweeping import Sweep


def report_html(report: Report) -> str:
    """Return a report: costs, the proof, notes; groups, what is frozen and the coverage on demand."""
    verdict = str(report.verification) if report.verification else "not verified"
    groups = _groups(report.groups) + _frozen(report.frozen)
    return "".join(
        [
            _title(report.method),
            _costs(report.costs),
            _plain(verdict),
            *(f"<p>{html.escape(note)}</p>" for note in report.notes),
            _folded("groups and frozen channels", groups),
            _folded("coverage", _plain(str(report.coverage))),
        ]
    )


def plan_html(plan: Plan) -> str:
    """Return a plan: costs; groups on demand."""
    return _title(plan.method) + _costs(plan.costs) + _folded("groups", _groups(plan.groups))


def coupling_line(coupling: Coupling) -> str:
    """Return what a coupling counts, in one line."""
    groups, stays = len(coupling.groups()), int((coupling.is_frozen & coupling.has_site).sum())
    line = f"{int(coupling.has_site.sum()):,} channels, {stays:,} frozen, others in {groups} group{'s' * (groups != 1)}"
    return f"{line}; {coupling.coverage().headline}"


def coupling_html(coupling: Coupling) -> str:
    """Return a coupling: what it counts; groups, what is frozen and the coverage on demand."""
    rows = [[g.name, g.kind, g.width] for g in coupling.groups()]
    return "".join(
        [
            _title(f"{type(coupling.traced.model).__name__}, traced by {coupling.traced.frontend}"),
            f"<p>{html.escape(coupling_line(coupling))}</p>",
            _folded("groups", _table(["first site", "kind", "width"], rows)),
            _folded("frozen channels", _frozen(frozen_rows(coupling))),
            _folded("coverage", _plain(str(coupling.coverage()))),
        ]
    )


def sensitivity_html(sensitivity: Sensitivity) -> str:
    """Return a sensitivity: its picture, where matplotlib is there; the table on demand."""
    from fxprune.charts import draw_sensitivity  # what it imports renders itself by this module

    picture = _picture(lambda: draw_sensitivity(sensitivity)) if sensitivity.tasks else ""
    table = _folded("groups", _plain(str(sensitivity)))
    return _title(f"sensitivity, {sensitivity.method}") + picture + table


def sweep_html(sweep: Sweep) -> str:
    """Return a sweep: its table, and its picture where losses were measured and matplotlib is there."""
    from fxprune.charts import draw_sweep

    picture = _picture(lambda: draw_sweep(sweep)) if sweep[0].rises else ""
    return _title("sweep") + _plain(str(sweep)) + picture


def _picture(draw: Callable[[], Figure]) -> str:
    """Return a picture as part of a page; nothing where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return ""
    from fxprune.figures import png_of

    data = base64.b64encode(png_of(draw())).decode()
    return f'<img alt="" style="max-width: 100%" src="data:image/png;base64,{data}">'


def _title(text: str) -> str:
    return f"<h4>fxprune: {html.escape(text)}</h4>"


def _plain(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>"


def _table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return str(tabulate(rows, headers=headers, tablefmt="html"))


def _costs(costs: CostChange) -> str:
    rows = [[name, f"{before:,}", f"{after:,}", f"{share:.1%}"] for name, before, after, share in costs.rows()]
    return str(tabulate(rows, headers=["cost", "before", "after", "share"], tablefmt="html", disable_numparse=True))


def _groups(groups: Iterable[GroupWidth]) -> str:
    rows = [[g.name, g.kind, g.sites, g.before, g.after] for g in groups]
    return _table(["first site", "kind", "sites", "before", "after"], rows)


def _frozen(frozen: Iterable[FrozenRow]) -> str:
    rows = [[f.channels, f.node, f.reason, f.source] for f in frozen]
    return _table(["frozen channels", "node", "reason", "line"], rows)
