"""What could be pruned from a network, what could not and why, and what it would save: an account before any plan."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tabulate import tabulate

from fxprune.allocating import Allocation, steps_of_all
from fxprune.constraining import Constraints
from fxprune.costs import Costs
from fxprune.coupling import Coupling
from fxprune.covering import Coverage
from fxprune.errors import check_kind
from fxprune.freezing import FrozenRow, frozen_rows
from fxprune.paths import paths_in_any_order
from fxprune.planning import sites_of_choices

REASON_WIDTH = 46
"""Characters per line of a reason in the printed table."""


@dataclass(frozen=True, slots=True)
class GroupOutlook:
    """What one group is, and what the network would save if the group alone kept half of its width.

    Attributes:
        name: first parameter that the group cuts.
        kind: "channels", "balanced" or "rows".
        sites: how many dims of parameters and buffers it cuts.
        width: how many channels it has.
        least: how many it has to keep.
        macs: share of the network's macs that go when the group keeps half.
        params: share of the network's parameters that go when the group keeps half.
    """

    name: str
    kind: str
    sites: int
    width: int
    least: int
    macs: float
    params: float


@dataclass(frozen=True, slots=True)
class Inspection:
    """What can be pruned, what not, why, and at which cost. Made by `inspect`.

    Attributes:
        network: class of the model.
        frontend: how it was traced.
        costs: of the dense network.
        least: costs when every group keeps as little as it can: no budget below can be met.
        groups: in graph order.
        frozen: what may not go, most channels first.
        coverage: which share of the network can go at all, and what blocks the rest.
        notes: what else a user should know.
    """

    network: str
    frontend: str
    costs: Costs
    least: Costs
    groups: tuple[GroupOutlook, ...]
    frozen: tuple[FrozenRow, ...]
    coverage: Coverage
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.network}, traced by {self.frontend}", self._costs(), self._groups(), self._frozen()]
        parts.append(str(self.coverage))
        return "\n\n".join([*parts, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self) | {"costs": self.costs.to_dict(), "least": self.least.to_dict()}

    def _costs(self) -> str:
        rows = []
        for name in self.costs.to_dict():
            dense, least = getattr(self.costs, name), getattr(self.least, name)
            rows.append([name, f"{dense:,}", f"{least:,}", f"{least / max(dense, 1):.1%}"])
        return _table("lrrr", ["cost", "dense", "least possible", "share"], rows)

    def _groups(self) -> str:
        rows = [
            [i, g.name, g.kind, g.sites, g.width, g.least, f"-{g.macs:.1%}", f"-{g.params:.1%}"]
            for i, g in enumerate(self.groups)
            if g.least < g.width
        ]
        if not rows:
            return "Nothing can be pruned."
        headers = ["group", "first site", "kind", "sites", "width", "least", "macs at half", "params at half"]
        count = f"{len(rows)} group{'s' if len(rows) > 1 else ''}"
        return (
            f"What can be pruned: {sum(g.width - g.least for g in self.groups):,} channels in {count}.\n"
            "At half: what the whole network saves when this group alone keeps half of its width.\n\n"
            + _table("rllrrrrr", headers, rows)
        )

    def _frozen(self) -> str:
        title, rows = "Every channel can be pruned.", []
        if self.frozen:
            title = f"What cannot be pruned: {sum(f.channels for f in self.frozen):,} channels."
        for f in self.frozen:
            rows.append([f"{f.channels:,}", f.node, textwrap.fill(f.reason, REASON_WIDTH), f.source or "-"])
        parts = [title, _table("rlll", ["channels", "node", "because it", "line"], rows) if rows else ""]
        return "\n\n".join(part for part in parts if part)


def _table(align: str, headers: list[str], rows: list[list[Any]]) -> str:
    """Lay out a table; `align` has l or r for each column."""
    sides = ["left" if letter == "l" else "right" for letter in align]
    return tabulate(rows, headers, disable_numparse=True, colalign=sides)


def inspect(coupling: Coupling) -> Inspection:
    """Say what can be pruned from a coupled network, what not and why, and what it would save.

    Args:
        coupling: from `couple`.
    """
    check_kind(coupling, Coupling)
    allocation = steps_of_all(coupling, paths_in_any_order(coupling), "uniform", Constraints())
    traced = coupling.traced
    return Inspection(
        type(traced.model).__name__,
        traced.frontend,
        coupling.costs.dense,
        coupling.costs(allocation.keep(np.ones(len(allocation), dtype=bool))),
        _groups(coupling, allocation),
        frozen_rows(coupling),
        coupling.coverage(),
        traced.notes,
    )


def _groups(coupling: Coupling, allocation: Allocation) -> tuple[GroupOutlook, ...]:
    """Halve one group at a time."""
    dense = coupling.costs.dense
    sites = sites_of_choices(coupling)
    outlooks = []
    for group in coupling.groups():
        own = allocation.group == group.index
        per_step = sum(group.takes)
        half = coupling.costs(allocation.keep(own & (np.cumsum(own) * per_step <= group.width / 2)))
        saved = [1 - getattr(half, name) / max(getattr(dense, name), 1) for name in ("macs", "params")]
        count, least = int(sites[group.choices].max()), group.width - int(own.sum()) * per_step
        outlooks.append(GroupOutlook(group.name, group.kind, count, group.width, least, *saved))
    return tuple(outlooks)
