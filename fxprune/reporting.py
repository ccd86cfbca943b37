"""What a compilation did, as data that prints, renders in a notebook and goes to JSON."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate
from torch import nn

from fxprune.costs import CostChange
from fxprune.coupling import Coupling
from fxprune.covering import Coverage
from fxprune.errors import FxPruneError
from fxprune.opening import opened
from fxprune.plans import GroupWidth, Plan, costs_table
from fxprune.slimming import RECORD
from fxprune.verifying import Verification


@dataclass(frozen=True, slots=True)
class FrozenRow:
    """Channels that stayed for one reason: how many, at which node, in which source line, why."""

    channels: int
    node: str
    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """The account of one compilation. `fxprune.report(slim)` returns it.

    Attributes:
        plan: what every parameter keeps, how it was chosen, and what it costs.
        frozen: what could not go, most channels first.
        verification: slim against masked original, or None if it was switched off.
        frontend: how the model was traced.
        coverage: which share of the network could go at all, and what blocks the rest.
        notes: what else a user should know.
    """

    plan: Plan
    frozen: tuple[FrozenRow, ...]
    verification: Verification | None
    frontend: str
    coverage: Coverage
    notes: tuple[str, ...] = ()

    @property
    def costs(self) -> CostChange:
        """Macs, params and memory before and after."""
        return self.plan.costs

    @property
    def groups(self) -> tuple[GroupWidth, ...]:
        """What every group kept."""
        return self.plan.groups

    @property
    def method(self) -> str:
        """How channels were ranked."""
        return self.plan.method

    @property
    def budget(self) -> Mapping[str, float]:
        """What was asked."""
        return self.plan.budget

    @property
    def classes(self) -> Mapping[str, tuple[int, ...]]:
        """Output -> the classes that its rows stand for, in order, where tasks asked for these alone."""
        return self.plan.classes

    def __str__(self) -> str:
        asked = ", ".join(f"{name}={value:g}" for name, value in self.budget.items())
        parts = [
            f"fxprune: {self.method}, budget {asked}, traced by {self.frontend}",
            costs_table(self.costs),
            f"{self._groups_line()}; {self.coverage.headline}",
            str(self.verification) if self.verification else "not verified: `verify=False`",
        ]
        if self.frozen:
            parts.insert(
                3,
                "what could not go:\n" + tabulate(self._frozen_rows(), headers=["channels", "node", "reason", "line"]),
            )
        parts += [f"output {name!r} answers for classes {', '.join(map(str, rows))}" for name, rows in self._rows()]
        return "\n\n".join([*parts, *(f"note: {note}" for note in self.notes)])

    def _rows(self) -> list[tuple[str, tuple[int, ...]]]:
        return list(self.classes.items())

    def _groups_line(self) -> str:
        before, after = sum(g.before for g in self.groups), sum(g.after for g in self.groups)
        line = f"{len(self.groups)} groups keep {after:,} of {before:,} channels"
        gone = sum(not g.after for g in self.groups)
        return f"{line}; {gone} of them keep nothing, and their branches are removed" if gone else line

    def _frozen_rows(self) -> list[list[Any]]:
        return [[f.channels, f.node, f.reason, f.source] for f in self.frozen]

    def _repr_html_(self) -> str:
        groups = [[g.name, g.kind, g.sites, g.before, g.after] for g in self.groups]
        costs = [
            [n, f"{getattr(self.costs.before, n):,}", f"{getattr(self.costs.after, n):,}", f"{self.costs.share(n):.1%}"]
            for n in self.costs.before.to_dict()
        ]
        tables = [
            tabulate(costs, headers=["cost", "before", "after", "share"], tablefmt="html", disable_numparse=True),
            tabulate(groups, headers=["first site", "kind", "sites", "before", "after"], tablefmt="html"),
            tabulate(self._frozen_rows(), headers=["frozen channels", "node", "reason", "line"], tablefmt="html"),
        ]
        blocked = html.escape(str(self.coverage))
        verdict = html.escape(str(self.verification) if self.verification else "not verified")
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        details = f"<details><summary>groups and frozen channels</summary>{tables[1]}{tables[2]}</details>"
        details += f"<details><summary>coverage</summary><pre>{blocked}</pre></details>"
        return f"<h4>fxprune: {html.escape(self.method)}</h4>{tables[0]}<pre>{verdict}</pre>{notes}{details}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "method": self.method,
            "budget": dict(self.budget),
            "frontend": self.frontend,
            "costs": {"before": self.costs.before.to_dict(), "after": self.costs.after.to_dict()},
            "groups": [asdict(g) for g in self.groups],
            "frozen": [asdict(f) for f in self.frozen],
            "verification": self.verification.to_dict() if self.verification else None,
            "coverage": self.coverage.to_dict(),
            "classes": {name: list(rows) for name, rows in self.classes.items()},
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(self.to_dict())


@dataclass(frozen=True, slots=True)
class Compiled:
    """What travels with a slim network: its report, plan included, and how to trace the original again.

    Attributes:
        report: of the compilation.
        inputs: a description of the example inputs; None where there is none.
        freeze: node -> reason; nodes whose sizes could not be rewritten.
        tasks: names of the tasks that were selected; None for all of them.
    """

    report: Report
    inputs: Any
    freeze: Mapping[str, str] = field(default_factory=dict)
    decomposed: tuple[str, ...] = ()
    tasks: tuple[str, ...] | None = None


def frozen_rows(coupling: Coupling) -> tuple[FrozenRow, ...]:
    """Return what may not go: a row for each node and reason, most channels first."""
    counts: dict[tuple[str, str, str], int] = {}
    for f in coupling.frozen:
        count = int(coupling.has_site[f.channels].sum())
        if count:
            key = (f.node, f.source, f.reason)
            counts[key] = counts.get(key, 0) + count
    rows = [FrozenRow(count, *key) for key, count in counts.items()]
    return tuple(sorted(rows, key=lambda row: -row.channels))


def make_report(
    coupling: Coupling, plan: Plan, verification: Verification | None, notes: tuple[str, ...] = ()
) -> Report:
    """Put a report together."""
    traced, coupling = coupling.traced, opened(coupling, plan.classes)
    notes = (*traced.notes, *notes)
    return Report(plan, frozen_rows(coupling), verification, traced.frontend, coupling.coverage(), notes)


def compiled(slim: nn.Module) -> Compiled:
    """Return what travels with a slim network.

    Raises:
        FxPruneError: the module did not come from fxprune.
    """
    found = getattr(slim, "meta", {}).get(RECORD) if isinstance(getattr(slim, "meta", None), dict) else None
    if found is None:
        raise FxPruneError(
            f"this {type(slim).__name__} carries no record of fxprune. Pass what `fxprune.compile` or `fxprune.load` "
            f"returned."
        )
    return found


def report(slim: nn.Module) -> Report:
    """Return the report that travels with a slim network.

    Raises:
        FxPruneError: the module did not come from fxprune.
    """
    return compiled(slim).report
