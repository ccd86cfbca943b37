"""What a closed record says of channels: where they are, which may not go, which rows they form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxprune.closing import Classes
from fxprune.grouping import Products, Rows
from fxprune.records import Interpretation
from fxprune.traced import Traced


@dataclass(frozen=True, slots=True)
class Site:
    """One dim of one parameter or buffer.

    Attributes:
        name: qualified name of the parameter or buffer.
        dim: which of its dims.
        channels: int64, the channel at each position, -1 where it stays. Broadcastable to the parameter: its size is
            the parameter's on `dim`, and 1 on the others unless the channels differ from row to row (the second dim of
            a grouped convolution).
        is_parameter: False for buffers.
    """

    name: str
    dim: int
    channels: np.ndarray
    is_parameter: bool


@dataclass(frozen=True, slots=True)
class Frozen:
    """Channels that may not go.

    Attributes:
        channels: (n,) the channels.
        node: the fx node that says so.
        reason: why, in words.
        source: the user's source line of that node, or "".
    """

    channels: np.ndarray
    node: str
    reason: str
    source: str


def find_sites(record: Interpretation, classes: Classes) -> tuple[Site, ...]:
    """Return the labelled dims of every parameter and buffer, in the order of first use."""
    sites = []
    for name, (_, labels, _, is_parameter) in record.issued.items():
        for dim, ids in enumerate(labels):
            if ids is not None:
                sites.append(Site(name, dim, classes.channels(ids), is_parameter))
    return tuple(sites)


def find_frozen(record: Interpretation, classes: Classes, traced: Traced) -> tuple[Frozen, ...]:
    """Return the channels that may not go, one entry for each node and reason."""
    order = np.argsort(classes.frozen_by, kind="stable")
    order = order[classes.frozen_by[order] >= 0]
    result = []
    for channels in np.split(order, np.flatnonzero(np.diff(classes.frozen_by[order])) + 1) if len(order) else []:
        freeze = record.ledger.freezes[classes.frozen_by[channels[0]]]
        result.append(Frozen(channels, freeze.node, freeze.reason, traced.source(freeze.node)))
    return tuple(result)


def find_rows(record: Interpretation, classes: Classes) -> tuple[Rows, ...]:
    """Return the balanced rows, without those that are all-or-nothing anyway."""
    found = []
    for batch in record.ledger.rows:
        columns = classes.of(batch.columns)
        if not (columns == columns[:, :1]).all():
            found.append(Rows(columns, classes.of(batch.row), batch.node))
    return tuple(found)


def find_products(record: Interpretation, classes: Classes) -> Products:
    """Return the channels that are crossings of two others."""

    def joined(which: str) -> np.ndarray:
        return classes.of(
            np.concatenate([getattr(b, which) for b in record.ledger.products] or [np.empty(0, dtype=np.int64)])
        )

    channel, row, column = joined("atom"), joined("row"), joined("column")
    proper = (channel != row) & (channel != column)
    return Products(channel[proper], row[proper], column[proper])
