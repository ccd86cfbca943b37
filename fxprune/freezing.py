"""What may not go, as rows to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxprune.coupling import Coupling


@dataclass(frozen=True, slots=True)
class FrozenRow:
    """Channels that stayed for one reason: how many, at which node, in which source line, why."""

    channels: int
    node: str
    source: str
    reason: str


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
