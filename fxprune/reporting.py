"""What a compilation did, as data that prints, renders in a notebook and goes to JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate
from torch import nn

from fxprune import notebooks, publishing
from fxprune.costs import CostChange
from fxprune.coupling import Coupling
from fxprune.covering import Coverage
from fxprune.errors import FxPruneError
from fxprune.freezing import FrozenRow, frozen_rows
from fxprune.opening import opened
from fxprune.plans import GroupWidth, Plan, costs_table
from fxprune.sketching import Sketch, sketch
from fxprune.slimming import RECORD
from fxprune.verifying import Verification


@dataclass(frozen=True, slots=True)
class Report:
    """The account of one compilation. `fxprune.report(slim)` returns it.

    Attributes:
        plan: what every parameter keeps, how it was chosen, and what it costs.
        frozen: what could not go, most channels first.
        verification: slim against masked original, or None if it was switched off.
        frontend: how the model was traced.
        coverage: which share of the network could go at all, and what blocks the rest.
        sketch: what the picture in `to_html` shows.
        notes: what else a user should know.
    """

    plan: Plan
    frozen: tuple[FrozenRow, ...]
    verification: Verification | None
    frontend: str
    coverage: Coverage
    sketch: Sketch = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def costs(self) -> CostChange:
        """All costs that are known, before and after."""
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
        parts += self.answers
        return "\n\n".join([*parts, *(f"note: {note}" for note in self.notes)])

    @property
    def answers(self) -> list[str]:
        """In words, the classes that outputs answer for, where tasks asked for these alone."""
        items = self.classes.items()
        return [f"output {name!r} answers for classes {', '.join(map(str, rows))}" for name, rows in items]

    def _groups_line(self) -> str:
        before, after = sum(g.before for g in self.groups), sum(g.after for g in self.groups)
        line = f"{len(self.groups)} groups keep {after:,} of {before:,} channels"
        gone = sum(not g.after for g in self.groups)
        return f"{line}; {gone} of them keep nothing, and their branches are removed" if gone else line

    def _frozen_rows(self) -> list[list[Any]]:
        return [[f.channels, f.node, f.reason, f.source] for f in self.frozen]

    def _repr_html_(self) -> str:
        return notebooks.report_html(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

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

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one HTML file that needs nothing else: the graph of groups, and all tables.

        Args:
            path: the file; its folder is made if it does not exist.

        Raises:
            FxPruneError: the file cannot be written.
        """
        publishing.publish(self, path)


@dataclass(frozen=True, slots=True)
class Compiled:
    """What travels with a slim network: its report, plan included, and how to trace the original again.

    Attributes:
        report: of the compilation.
        inputs: a description of the example inputs; None where there is none.
        freeze: node -> reason; nodes whose sizes could not be rewritten.
        decomposed: names of the convolutions that became pairs, where the method decomposes.
        tasks: names of the tasks that were selected; None for all of them.
        training: whether the model was in train mode when it was traced, which may decide what path forward takes.
    """

    report: Report
    inputs: Any
    freeze: Mapping[str, str] = field(default_factory=dict)
    decomposed: tuple[str, ...] = ()
    tasks: tuple[str, ...] | None = None
    training: bool = False


def make_report(
    coupling: Coupling, plan: Plan, verification: Verification | None, notes: tuple[str, ...] = ()
) -> Report:
    """Put a report together."""
    traced, coupling = coupling.traced, opened(coupling, plan.classes)
    notes = (*traced.notes, *notes)
    frozen, drawn = frozen_rows(coupling), sketch(coupling, plan)
    return Report(plan, frozen, verification, traced.frontend, coupling.coverage(), drawn, notes)


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
