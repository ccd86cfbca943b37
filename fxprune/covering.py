"""How much of a network can go at all, and what blocks the rest: an account that no plan changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tabulate import tabulate

from fxprune.labels import Extent, extents
from fxprune.slicing import kept_size

if TYPE_CHECKING:
    from fxprune.coupling import Coupling

SHOWN = 20
"""Rows of a printed table; all are in `Coverage.blocked`."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """What cannot go of the macs and parameters of one node, even if everything that can go went.

    Attributes:
        node: the fx node.
        source: the user's source line, or "".
        macs: multiply-accumulates that stay.
        params: elements of parameters first used at this node that stay.
        reason: what holds them.
    """

    node: str
    source: str
    macs: int
    params: int
    reason: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which share of a network can go at all. Made by `coupling.coverage()`.

    A multiply-accumulate or an element of a parameter can go if a channel that it belongs to is in a group. That every
    group keeps something is left out of account: for the least possible costs see `fxprune inspect`.

    Attributes:
        macs: share of the multiply-accumulates that can go, 0 to 1.
        params: share of the elements of parameters that can go, 0 to 1.
        blocked: what holds the rest, most macs first.
    """

    macs: float
    params: float
    blocked: tuple[Blocked, ...]

    @property
    def headline(self) -> str:
        """Both shares, in words."""
        return f"{_share(self.macs)} of the macs and {_share(self.params)} of the parameters can go"

    def __str__(self) -> str:
        if not self.blocked:
            return f"{self.headline}."
        rows = [[f"{b.macs:,}", f"{b.params:,}", b.node, b.reason, b.source or "-"] for b in self.blocked[:SHOWN]]
        if len(self.blocked) > SHOWN:
            rest = self.blocked[SHOWN:]
            more = [f"{sum(getattr(b, name) for b in rest):,}" for name in ("macs", "params")]
            rows.append([*more, f"{len(rest)} more", "", ""])
        headers = ["macs", "params", "node", "held because", "line"]
        align = ("right", "right", "left", "left", "left")
        table = tabulate(rows, headers, disable_numparse=True, colalign=align)
        return f"{self.headline}. What holds the rest:\n\n{table}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"macs": self.macs, "params": self.params, "blocked": [asdict(b) for b in self.blocked]}


def _share(value: float) -> str:
    """Write a share in percent, rounded down: what is not all does not read 100 %."""
    return f"{math.floor(value * 1000) / 10:g} %"


def cover(coupling: Coupling) -> Coverage:
    """Say how much of a network can go at all, and what blocks the rest."""
    free = _in_groups(coupling)
    stays = np.append(~free, True)
    dense = coupling.costs.dense
    least = coupling.costs(~free)
    return Coverage(
        1 - least.macs / max(dense.macs, 1), 1 - least.params / max(dense.params, 1), _blocked(coupling, stays)
    )


def _in_groups(coupling: Coupling) -> np.ndarray:
    """Return (channels,) which go with a choice of any group."""
    chosen = np.zeros(coupling.num_channels, dtype=bool)
    for group in coupling.groups():
        chosen[group.choices] = True
    members = coupling.members
    free = np.zeros(coupling.num_channels, dtype=bool)
    free[members.channel[chosen[members.choice]]] = True
    return free & ~coupling.is_frozen


def _blocked(coupling: Coupling, stays: np.ndarray) -> tuple[Blocked, ...]:
    """Collect what stays, node by node; `stays` is (channels + 1,) bool."""
    held = _Reasons(coupling)
    found: dict[str, list[Any]] = {}
    for node, is_param, size, dims in _terms(coupling):
        left = size * math.prod(kept_size(coupling.channels(ids), d, stays) for ids, d in dims)
        if left:
            entry = found.setdefault(node, [0, 0, {}])
            entry[int(is_param)] += left
            entry[2].update(dict.fromkeys(held.of(dims, stays)))
    rows = [Blocked(n, coupling.traced.source(n), m, p, "; ".join(why)) for n, (m, p, why) in found.items()]
    return tuple(sorted(rows, key=lambda row: (-row.macs, -row.params)))


def _terms(coupling: Coupling) -> Iterator[tuple[str, bool, int, tuple[Extent, ...]]]:
    """Yield (node, is a parameter, fixed factor, labelled dims) of all work and all parameters."""
    record = coupling.record
    for work in record.work:
        yield work.node, False, work.fixed, work.dims
    for name, (shape, labels, _, is_parameter) in record.issued.items():
        if is_parameter:
            fixed = math.prod(n for n, ids in zip(shape, labels, strict=True) if ids is None)
            yield record.named_at[name], True, fixed, extents(labels)
    for name, value, is_parameter in coupling.traced.state:
        if is_parameter and name not in record.issued:
            yield name, True, value.numel(), ()


class _Reasons:
    """Why channels stay."""

    def __init__(self, coupling: Coupling) -> None:
        self._coupling = coupling
        self._entry = np.full(coupling.num_channels + 1, -1)
        for i, frozen in reversed(list(enumerate(coupling.frozen))):
            self._entry[frozen.channels] = i

    def of(self, dims: Iterable[Extent], stays: np.ndarray) -> Iterator[str]:
        """Yield what holds the channels of some dims that stay, or that there is none that could go."""
        empty = True
        for ids, _ in dims:
            empty = False
            channels = np.unique(self._coupling.channels(ids))
            for i in np.unique(self._entry[channels[stays[channels]]]):
                frozen = self._coupling.frozen[i]
                yield f"{frozen.node!r} {frozen.reason}" if i >= 0 else "positions are fixed"
        if empty:
            yield "no dim is made of channels"
