"""From channels to groups: what the planner may remove, step by step, without breaking a balance.

What can be decided upon is a *choice*: a plain channel, a column that several rows share, or a whole row (a group of a
grouped convolution, a head). Its *members* are the channels that go with it. A choice that would leave some balanced
row partly emptied must be matched in the other rows: choices that empty the same rows by the same amounts form a
*cell*, and one step of a balanced group takes an equal share out of every cell. That keeps all rows equal, whichever
positions each gives up.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import numpy as np

from fxprune.atoms import FIXED
from fxprune.closing import components, distinct, mixed, spans

PLAIN, COLUMN, ROW = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Group:
    """Channels that are ranked against each other.

    Attributes:
        index: position in `coupling.groups()`.
        name: the first parameter the group has a site on.
        kind: "channels", "balanced" (a step takes from every row) or "rows" (a step takes a whole row).
        cells: each an ascending array of choices, named by their channel.
        takes: how many choices one step takes out of each cell.
        overlap: how many groups decide over the same parameters (rows and columns of one layer: 2).
    """

    index: int
    name: str
    kind: str
    cells: tuple[np.ndarray, ...]
    takes: tuple[int, ...]
    overlap: int

    @property
    def width(self) -> int:
        """How many choices the group has."""
        return sum(len(cell) for cell in self.cells)

    @property
    def choices(self) -> np.ndarray:
        """(width,) all choices, cell by cell."""
        return np.concatenate(self.cells)

    @property
    def levels(self) -> int:
        """How many steps can be taken at most."""
        return min(len(cell) // take for cell, take in zip(self.cells, self.takes, strict=True))

    def path(self, score: np.ndarray) -> np.ndarray:
        """Return the removal path: the choices that go in each step, lowest score first: (steps, choices per step).

        Args:
            score: (channels,) saliency of each choice; those that may not go have infinite saliency.
        """
        if len(self.cells) == 1:
            cell, take = self.cells[0], self.takes[0]
            steps = int(np.isfinite(score[cell]).sum()) // take
            return cell[np.argsort(score[cell], kind="stable")][: steps * take].reshape(steps, take)
        choices, takes = self.choices, np.array(self.takes)
        lengths = np.array([len(cell) for cell in self.cells])
        cell_of, scores = np.repeat(np.arange(len(lengths)), lengths), score[choices]
        ranked = choices[np.lexsort((scores, cell_of))]
        steps = int((np.bincount(cell_of[np.isfinite(scores)], minlength=len(lengths)) // takes).min())
        first = spans(np.cumsum(lengths) - lengths, takes)
        return ranked[first + np.arange(steps)[:, None] * np.repeat(takes, takes)]

    def places(self, free: np.ndarray) -> list[np.ndarray]:
        """Return, for each cell, which of its choices are `free` (width,), as positions among all `choices`."""
        ends = np.cumsum([0, *map(len, self.cells)])
        return [np.flatnonzero(free[a:b]) + a for a, b in pairwise(ends)]


@dataclass(frozen=True, slots=True)
class Members:
    """Which channels go with each choice: pairs (choice, channel), sorted by choice."""

    choice: np.ndarray
    channel: np.ndarray

    def of(self, choices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the members of some choices, and for each which of the choices it is a member of."""
        if not len(self.choice) or len(self.choice) == self.choice[-1] + 1:  # every choice has one member, itself
            return choices, np.arange(len(choices))
        per_choice = np.bincount(self.choice)
        start, count = (np.cumsum(per_choice) - per_choice)[choices], per_choice[choices]
        return self.channel[spans(start, count)], np.repeat(np.arange(len(choices)), count)

    def total(self, score: np.ndarray) -> np.ndarray:
        """Add up a per-channel score over the members of every choice: (channels,) -> (channels,)."""
        return np.bincount(self.choice, weights=score[self.channel], minlength=len(score))


@dataclass(frozen=True, slots=True)
class Rows:
    """Balanced rows on channels: `row[i]` stays while any of `columns[i]` does. (rows, width) and (rows,)."""

    columns: np.ndarray
    row: np.ndarray
    node: str


@dataclass(frozen=True, slots=True)
class Products:
    """Channels that stay while both parents do. All arrays: (n,)."""

    channel: np.ndarray
    row: np.ndarray
    column: np.ndarray


def _among(numbers: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Say which numbers are among the ascending `known`, of which there are some."""
    return known[np.minimum(np.searchsorted(known, numbers), len(known) - 1)] == numbers


def _counted(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct numbers, ascending, and how often each occurs."""
    ordered = np.sort(numbers)
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if ordered.size else ordered
    return ordered[first], np.diff(np.append(first, ordered.size))


def find_members(num_channels: int, rows: list[Rows], products: Products, emptied: np.ndarray) -> Members:
    """Find what goes with each choice: a row takes its columns along, a parent its products.

    Args:
        num_channels: how many channels there are.
        rows: balanced rows.
        products: channels that are crossings.
        emptied: (n, 2) pairs (choice, row) of choices that empty a row, which then goes too.
    """
    source, target = [products.row, products.column, emptied[:, 0]], [products.channel, products.channel, emptied[:, 1]]
    for batch in rows:
        row = np.broadcast_to(batch.row[:, None], batch.columns.shape)
        real = (row != FIXED) & (batch.columns != FIXED)
        source.append(row[real])
        target.append(batch.columns[real])
    edges = distinct(np.concatenate(source) * num_channels + np.concatenate(target))
    a, b = edges // num_channels, edges % num_channels
    a, b = a[a != b], b[a != b]
    known = np.arange(num_channels) * (num_channels + 1)
    fresh = a * num_channels + b
    count = np.bincount(a, minlength=num_channels)
    start = np.cumsum(count) - count
    while len(fresh):
        known = np.sort(np.concatenate([known, fresh]))
        choice, at = np.divmod(fresh, num_channels)
        further = np.repeat(choice, count[at]) * num_channels + b[spans(start[at], count[at])]
        further = distinct(further)
        fresh = further[~_among(further, known)]
    return Members(*np.divmod(known, num_channels))


@dataclass(frozen=True, slots=True)
class _Losses:
    """How many columns each row loses with each choice, where the row is not emptied. All arrays: (n,)."""

    choice: np.ndarray
    row: np.ndarray
    count: np.ndarray
    batch_of_row: np.ndarray
    emptied: np.ndarray
    """(n, 2): choices that empty a row, and the channel of that row."""
    start: np.ndarray
    """(channels + 1,) where the entries of each choice start."""
    first_rows: np.ndarray
    """(batches,) the first row of each batch."""


def _losses(num_channels: int, rows: list[Rows], members: Members) -> _Losses:
    channel, row, width, batch_of_row, first_rows, first = [], [], [], [], [], 0
    for index, batch in enumerate(rows):
        n, w = batch.columns.shape
        real = batch.columns != FIXED
        channel.append(batch.columns[real])
        row.append(np.broadcast_to(np.arange(first, first + n)[:, None], (n, w))[real])
        width.append(np.full(n, w))
        batch_of_row.append(np.full(n, index))
        first_rows.append(first)
        first += n
    if not rows:
        empty = np.empty(0, dtype=np.int64)
        return _Losses(empty, empty, empty, empty, empty.reshape(0, 2), empty, empty)
    x, r = np.concatenate(channel), np.concatenate(row)
    r = r[np.argsort(x, kind="stable")]
    per_channel = np.bincount(x, minlength=num_channels)
    start, count = (np.cumsum(per_channel) - per_channel)[members.channel], per_channel[members.channel]
    keys, lost = _counted(np.repeat(members.choice, count) * first + r[spans(start, count)])
    choice, row = np.divmod(keys, first)
    partial = lost < np.concatenate(width)[row]
    emptied = np.stack([choice, np.concatenate([batch.row for batch in rows])[row]], 1)[~partial]
    return _Losses(
        choice[partial],
        row[partial],
        lost[partial],
        np.concatenate(batch_of_row),
        emptied[emptied[:, 1] != FIXED],
        np.searchsorted(choice[partial], np.arange(num_channels + 1)),
        np.array(first_rows),
    )


def _members_and_losses(num_channels: int, rows: list[Rows], products: Products) -> tuple[Members, _Losses]:
    """Follow what goes with each choice until no further row is emptied."""
    emptied = np.empty((0, 2), dtype=np.int64)
    while True:
        members = find_members(num_channels, rows, products, emptied)
        losses = _losses(num_channels, rows, members)
        found = np.concatenate([losses.emptied, _bereft_parents(members, products, num_channels)])
        known = members.choice * num_channels + members.channel
        if _among(found[:, 0] * num_channels + found[:, 1], known).all():
            return members, losses
        emptied = found


def _matches(members: Members, channel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all (choice, i) such that channel[i] is a member of the choice."""
    order = np.argsort(members.channel, kind="stable")
    start = np.searchsorted(members.channel[order], channel, "left")
    count = np.searchsorted(members.channel[order], channel, "right") - start
    return members.choice[order[spans(start, count)]], np.repeat(np.arange(len(channel)), count)


def _bereft_parents(members: Members, products: Products, n: int) -> np.ndarray:
    """Return (choice, parent) where the choice takes all crossings of the parent: the parent goes too."""
    if not len(products.channel):
        return np.empty((0, 2), dtype=np.int64)
    found = []
    choice, which = _matches(members, products.channel)
    for parent in (products.row, products.column):
        pairs, pair = np.unique(parent * n + products.channel, return_inverse=True)
        total = np.bincount(pairs // n, minlength=n)
        taker, taken = np.divmod(distinct(choice * len(pairs) + pair[which]), len(pairs))
        keys, taken = _counted(taker * n + pairs[taken] // n)
        complete = keys[taken == total[keys % n]]
        found.append(np.stack([complete // n, complete % n], 1))
    return np.concatenate(found)


def _torn(members: Members, products: Products, n: int) -> np.ndarray:
    """Return (channels,) which choices take a crossing without either of its parents: no choice on their own."""
    torn = np.zeros(n, dtype=bool)
    if len(products.channel):
        choice, which = _matches(members, products.channel)
        known = members.choice * n + members.channel
        row, column = choice * n + products.row[which], choice * n + products.column[which]
        lonely = ~_among(row, known) & ~_among(column, known)
        torn[choice[lonely]] = True
    return torn


def find_groups(
    num_channels: int,
    rows: list[Rows],
    products: Products,
    frozen: np.ndarray,
    site_key: np.ndarray,
    names: list[str],
    first_site: np.ndarray,
) -> tuple[tuple[Group, ...], Members]:
    """Find the groups and the members of every choice.

    Args:
        num_channels: how many channels there are.
        rows: balanced rows.
        products: channels that are crossings.
        frozen: (channels,) which may not go.
        site_key: (channels,) a hash of the sites of each channel, 0 where it has none.
        names: name of each site.
        first_site: (channels,) index of the first site of each channel; the number of sites where it has none.
    """
    members, losses = _members_and_losses(num_channels, rows, products)
    frozen = np.bincount(members.choice, weights=frozen[members.channel], minlength=num_channels) > 0
    crossing = _torn(members, products, num_channels)
    reaches = np.bincount(members.choice, weights=site_key[members.channel] != 0, minlength=num_channels) > 0
    crossing[products.channel] = True
    role = _roles(products, num_channels)
    row_key = np.zeros(num_channels, dtype=np.uint64)
    for index, batch in enumerate(rows):
        real = np.unique(batch.row[batch.row != FIXED])
        role[real] = ROW
        row_key[real] += mixed(np.array([index]))
    balanced = np.zeros(num_channels, dtype=bool)
    balanced[losses.choice] = True
    open_ = ~frozen & ~crossing & ~balanced & reaches
    key = np.zeros(num_channels, dtype=np.uint64)
    np.add.at(key, members.choice, site_key[members.channel])
    drafts = [("channels", (cell,), (1,)) for cell in _by_key(np.flatnonzero(open_ & (role != ROW)), key)]
    drafts += [("rows", (cell,), (1,)) for cell in _by_key(np.flatnonzero(open_ & (role == ROW)), row_key)]
    drafts += _balanced(losses, role, frozen | ~reaches, crossing, num_channels)
    drafts.sort(key=lambda draft: min(int(cell[0]) for cell in draft[1]))
    return _numbered(drafts, members, site_key, names, first_site), members


_Draft = tuple[str, tuple[np.ndarray, ...], tuple[int, ...]]


def _by_key(choices: np.ndarray, key: np.ndarray) -> list[np.ndarray]:
    """Split choices into runs of equal key, each in order."""
    if not len(choices):
        return []
    order = np.argsort(key[choices], kind="stable")
    ordered = choices[order]
    ends = [0, *(np.flatnonzero(np.diff(key[ordered])) + 1).tolist(), len(ordered)]
    return [ordered[a:b] for a, b in pairwise(ends)]


def _roles(products: Products, n: int) -> np.ndarray:
    """Return (channels,) which are the row or the column of a crossing; of one that is both, what it was first."""
    role = np.zeros(n, dtype=np.int64)
    kinds = np.repeat([COLUMN, ROW], len(products.channel))
    latest_first = np.argsort(-np.tile(np.arange(len(products.channel)), 2), kind="stable")
    role[np.concatenate([products.column, products.row])[latest_first]] = kinds[latest_first]
    return role


def _balanced(losses: _Losses, role: np.ndarray, frozen: np.ndarray, crossing: np.ndarray, n: int) -> list[_Draft]:
    """Form families of choices that empty the same rows, and the cells inside each."""
    if not len(losses.choice):
        return []
    signature = np.zeros(n, dtype=np.uint64)
    known = np.flatnonzero(np.diff(losses.start))
    signature[known] = np.add.reduceat(mixed(losses.row) * losses.count.astype(np.uint64), losses.start[known])
    anchor = n + losses.batch_of_row[losses.row] * 2 + (role[losses.choice] == ROW)  # columns go with plain channels
    family = components(n + 3 * (int(losses.batch_of_row.max()) + 1), losses.choice, anchor)
    drafts = []
    for choices in _by_key(known[~crossing[known]], family):
        counted = [(cell, len(cell) - np.count_nonzero(frozen[cell])) for cell in _by_key(choices, signature)]
        free = [cell for cell, left in counted if left]
        if not free:
            continue
        lengths, left = [len(cell) for cell in free], [left for _, left in counted if left]
        levels = gcd(*lengths)
        for takes in ([length // levels for length in lengths], [1] * len(free)):
            stay = left != lengths or max(takes) < max(lengths)
            steps = min(n // take for n, take in zip(left, takes, strict=True))
            if steps and stay and _even(losses, free, takes):
                kind = "rows" if (role[free[0]] == ROW).all() else "balanced"
                drafts.append((kind, tuple(free), tuple(takes)))
                break
    return drafts


def _even(losses: _Losses, cells: list[np.ndarray], takes: list[int]) -> bool:
    """Say whether one step takes equally many columns out of every row of the batches it touches."""
    choices = np.concatenate(cells)
    lengths = np.array([len(cell) for cell in cells])
    rate = np.repeat(np.array(takes) / lengths, lengths)
    start, count = losses.start[choices], losses.start[choices + 1] - losses.start[choices]
    hit = spans(start, count)
    lost = np.bincount(losses.row[hit], losses.count[hit] * np.repeat(rate, count), len(losses.batch_of_row))
    most, least = (f.reduceat(lost, losses.first_rows) for f in (np.maximum, np.minimum))
    return bool((most - least < 1e-9).all())


def _numbered(
    drafts: list[_Draft], members: Members, site_key: np.ndarray, names: list[str], first_site: np.ndarray
) -> tuple[Group, ...]:
    group_of = np.full(len(site_key), -1)
    for index, (_, cells, _) in enumerate(drafts):
        for cell in cells:
            group_of[cell] = index
    real = (group_of[members.choice] >= 0) & (site_key[members.channel] != 0)
    group, channel = group_of[members.choice[real]], members.channel[real]
    pairs = distinct(group * len(site_key) + channel)
    shared = np.bincount(pairs % len(site_key), minlength=len(site_key))
    overlap = np.ones(len(drafts), dtype=np.int64)
    np.maximum.at(overlap, pairs // len(site_key), shared[pairs % len(site_key)])
    first = np.full(len(drafts), len(names))
    np.minimum.at(first, group, first_site[channel])
    return tuple(
        Group(i, names[first[i]], kind, cells, takes, int(overlap[i])) for i, (kind, cells, takes) in enumerate(drafts)
    )
