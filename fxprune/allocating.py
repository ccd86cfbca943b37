"""From scores to widths: in which order all groups shrink, and where to stop so that the budget is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.branches import Branches
from fxprune.constraining import Constraints, kept_nodes
from fxprune.costs import Costs
from fxprune.coupling import Coupling
from fxprune.emptying import CannotEmptyError
from fxprune.errors import CouplingError, PlanError
from fxprune.freezing import frozen_rows
from fxprune.grouping import Group
from fxprune.paths import RemovalPath
from fxprune.pausing import without_collector
from fxprune.rounding import multiples
from fxprune.searching import Search


@dataclass(frozen=True, slots=True)
class Steps:
    """A group's removal path, bundled so that every width in between respects the constraints.

    Attributes:
        group: index of the group.
        choices: (n,) what goes, in order.
        step: (n,) in which step each choice goes.
        keys: (steps,) ascending; steps of all groups are taken in the order of their keys.
        errors: (steps, tasks) what each step adds to the loss of each task.
    """

    group: int
    choices: np.ndarray
    step: np.ndarray
    keys: np.ndarray
    errors: np.ndarray


def steps_of(group: Group, path: RemovalPath, scope: str, constraints: Constraints, multiple: int) -> Steps:
    """Return the steps of one group.

    Args:
        group: the group.
        path: in which order its choices go, at what error.
        scope: as of `allocate`.
        constraints: limits on widths.
        multiple: of which every width is one.
    """
    choices, errors = path.choices, path.errors.sum(axis=1)
    width, per_step = group.width, sum(group.takes)
    least = max(constraints.min_width, per_step) if constraints.min_width else 0
    limit = min(width - least, int(constraints.max_ratio * width + 1e-9))
    choices = choices[: max(limit, 0) // per_step]
    stops = step = np.arange(len(choices))
    left = width - per_step * (stops + 1)
    if multiple > 1:
        stops = np.flatnonzero(left % multiple == 0)
        choices = choices[: stops[-1] + 1 if len(stops) else 0]
        step = np.searchsorted(stops, np.arange(len(choices)), "left")
    errors = errors[: len(choices)]
    if scope == "uniform":
        keys = 1 - (left[stops] / width) ** group.overlap
        if len(stops) and left[stops[-1]] == 0:  # after all other steps; which group comes first, errors decide
            keys[-1] += _relative(errors)[-1]
    else:
        keys = _relative(errors)[stops]
    total = path.errors[: len(choices)]
    if multiple > 1:
        total = np.zeros((len(stops), total.shape[1]))
        np.add.at(total, step, path.errors[: len(choices)])
    return Steps(group.index, choices.ravel(), np.repeat(step, per_step), keys, total)


def _relative(total: np.ndarray) -> np.ndarray:
    """Return the errors of steps relative to their mean, ascending."""
    mean = total.mean() if len(total) else 0.0
    return np.maximum.accumulate(total / (mean if mean > 0 else 1.0))


class Allocation:
    """All steps of all groups in the order of their keys; any of them can be switched on or off.

    Attributes:
        group: (steps,) index of the group that each step shrinks.
        errors: (steps,) what each step adds to the loss, all tasks together.
    """

    def __init__(self, coupling: Coupling, paths: list[Steps], branches: Branches | None = None) -> None:
        """Sort the steps and look up which channels go with each; with `branches`, some of these may go as a whole."""
        self.coupling = coupling
        self.branches = branches
        empty = np.empty(0, dtype=np.int64)
        group = np.concatenate([np.full(len(p.keys), p.group) for p in paths] or [empty])
        key = np.concatenate([p.keys for p in paths] or [empty])
        order = np.lexsort((group, key))
        self.group = group[order]
        error = np.concatenate([p.errors.sum(axis=1) for p in paths] or [np.empty(0)])
        self.errors = error[order]
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        first = np.cumsum([0] + [len(p.keys) for p in paths])
        step = np.concatenate([place[p.step + start] for p, start in zip(paths, first[:-1], strict=True)] or [empty])
        choices = np.concatenate([p.choices for p in paths] or [empty])
        self._channels, which = coupling.members.of(choices)
        self._owner = step[which]

    def __len__(self) -> int:
        return len(self.group)

    def keep(self, taken: np.ndarray) -> np.ndarray:
        """Return the kept channels when the steps `taken` (steps,) bool are done."""
        keep = np.ones(self.coupling.num_channels, dtype=bool)
        keep[self._channels[taken[self._owner]]] = False
        return self.coupling.settle(keep) if self.branches is None else self.branches.settle(keep)

    def costs(self, keep: np.ndarray) -> Costs:
        """Return what a network costs of which the channels `keep` stay."""
        return self.coupling.costs(keep) if self.branches is None else self.branches.costs(keep)

    def meet(self, bounds: Mapping[str, float]) -> np.ndarray | None:
        """Return which steps to take: the fewest from the start that fit, less those that can be given back.

        Of each group that is one step, but as many as fit where memory or latency is bound.

        Args:
            bounds: resource -> absolute bound; removing more never costs more.

        Returns:
            (steps,) bool, or None when even all steps together do not fit.
        """
        costs = self.coupling.costs if self.branches is None else self.branches

        def fits(keep: np.ndarray) -> bool:
            return costs.within(keep, bounds)

        count = len(self)
        order = np.arange(count)
        low, high = 0, count
        if not fits(self.keep(order < count)):
            return None
        while low < high:
            middle = (low + high) // 2
            if fits(self.keep(order < middle)):
                high = middle
            else:
                low = middle + 1
        taken = order < low
        if not bounds.keys().isdisjoint(("memory", "latency")) and self.branches is None:
            return self._filled(taken, fits)
        for i in self._returnable(taken, bounds):
            taken[i] = False
            if not fits(self.keep(taken)):
                taken[i] = True
        return taken

    def _filled(self, taken: np.ndarray, fits: Callable[[np.ndarray], bool]) -> np.ndarray:
        """Give back all steps that fit, latest first; a group whose next one does not fit gives back no more.

        Most of a network has no part in its peak of memory, and need not shrink as far as what has. Most channels cost
        no time, as long as they fill a block of which there are others.
        """
        taken = taken.copy()
        done = np.zeros(int(self.group.max(initial=0)) + 1, dtype=bool)
        while True:
            left = np.flatnonzero(taken & ~done[self.group])[::-1]
            low, high = 0, len(left)
            while low < high:
                middle = (low + high + 1) // 2
                trial = taken.copy()
                trial[left[:middle]] = False
                if fits(self.keep(trial)):
                    low = middle
                else:
                    high = middle - 1
            taken[left[:low]] = False
            if low == len(left):
                return taken
            done[self.group[left[low]]] = True

    def _returnable(self, taken: np.ndarray, bounds: Mapping[str, float]) -> list[int]:
        """Return the last step taken of each group, latest first, without those that alone would cost too many macs."""
        low = int(taken.sum())
        _, first = np.unique(self.group[:low][::-1], return_index=True)
        last = np.sort(low - 1 - first)[::-1]
        bound = next((name for name in ("macs", "combined_macs") if name in bounds), None)
        if bound is None or not len(last) or self.branches is not None:
            return last.tolist()
        number = np.full(len(taken), -1)
        number[last] = np.arange(len(last))
        of, channels = number[self._owner], self._channels
        part = np.full(self.coupling.num_channels, -1)
        part[channels] = of
        times = np.bincount(channels[taken[self._owner]], minlength=len(part))
        part[(times > 1) | self.coupling.entangled] = -1  # whether these come back depends on more than this step
        macs = self.coupling.costs.macs_with(bound, self.keep(taken), part, len(last))
        return last[macs <= bounds[bound]].tolist()


def steps_of_all(coupling: Coupling, paths: Sequence[RemovalPath], scope: str, constraints: Constraints) -> Allocation:
    """Return the steps of all groups such that even all of them together leave something of every dim.

    Args:
        coupling: the coupled network.
        paths: of every group.
        scope: as of `allocate`.
        constraints: limits on widths.
    """
    members, groups = coupling.members, coupling.groups()
    multiple = multiples(coupling, constraints.multiple_of)
    held = np.zeros(coupling.num_channels, dtype=bool)
    branches = Branches(coupling, kept_nodes(coupling, constraints)) if constraints.min_width == 0 else None
    left = np.ones(coupling.num_channels + 1, dtype=bool)
    price = _prices(coupling, paths)

    def bundled() -> list[Steps]:
        left = [path.without(held) for path in paths] if held.any() else paths
        return [steps_of(groups[path.group], path, scope, constraints, int(multiple[path.group])) for path in left]

    while True:
        steps = bundled()
        if branches is not None:
            left[:-1] = _without_branches(coupling, branches, steps, held)
            steps = bundled()
        allocation = Allocation(coupling, steps, branches)
        keep = allocation.keep(np.ones(len(allocation), dtype=bool))
        emptied = [c for c in [*coupling.costs.emptied(keep), *coupling.lost_rows(keep)] if left[c].any()]
        if not emptied:
            return allocation
        best = [channels[np.argmax(price[channels])] for channels in emptied]
        fresh = members.choice[np.isin(members.channel, best)]
        if held[fresh].all():
            fresh = members.choice[np.isin(members.channel, np.concatenate(emptied))]
            if held[fresh].all():
                raise CouplingError(
                    f"nothing would be left of {len(emptied)} dims, whatever is held: a bug in fxprune, please report "
                    "it."
                )
        held[fresh] = True


def _prices(coupling: Coupling, paths: Sequence[RemovalPath]) -> np.ndarray:
    """Return (channels,) the error of the step that each channel goes in; infinite where none takes it."""
    price = np.full(coupling.num_channels, np.inf)
    for path in paths:
        channels, which = coupling.members.of(path.choices.ravel())
        error = np.repeat(path.errors.sum(axis=1), path.choices.shape[1])[which]
        price[channels] = np.minimum(price[channels], error)
    return price


def _without_branches(coupling: Coupling, branches: Branches, paths: list[Steps], held: np.ndarray) -> np.ndarray:
    """Return what stays, (channels,), when all groups that may lose everything have; hold the last step of others.

    Args:
        coupling: the coupled network.
        branches: its branches.
        paths: the steps of every group; those with the lower key of the last step are asked first.
        held: (channels,) choices that may not go; more are added.
    """
    groups = coupling.groups()
    keep = np.ones(coupling.num_channels, dtype=bool)
    whole = [p for p in paths if len(p.choices) == groups[p.group].width]
    for p in sorted(whole, key=lambda p: p.keys[-1]):
        try:
            alone = keep[p.choices].any()  # or it went along with another, and goes with that only
            keep = branches.without(keep, p.choices) if alone else keep
        except CannotEmptyError:
            alone = False
        if not alone:
            held[p.choices[p.step == p.step[-1]]] = True
    return keep


@without_collector
def allocate(
    coupling: Coupling, paths: Sequence[RemovalPath], scope: str, constraints: Constraints, bounds: Mapping[str, float]
) -> np.ndarray:
    """Return the kept channels (channels,) of the widest network within the bounds.

    Args:
        coupling: the coupled network.
        paths: of every group.
        scope: "uniform" (every group loses the same share), "global" (errors relative to their group's mean compete)
            or "optimal" (the least total error, which must be in one unit for all groups).
        constraints: limits on widths.
        bounds: resource -> absolute bound.

    Raises:
        PlanError: the bounds cannot be met.
    """
    allocation = steps_of_all(coupling, paths, scope, constraints)
    taken = allocation.meet(bounds)
    if taken is None:
        least = allocation.costs(allocation.keep(np.ones(len(allocation), dtype=bool)))
        raise PlanError(_impossible(coupling, constraints, bounds, least))
    if scope == "optimal":
        taken = least_error(allocation, taken, bounds)
    return allocation.keep(taken)


def least_error(allocation: Allocation, taken: np.ndarray, bounds: Mapping[str, float]) -> np.ndarray:
    """Return the steps (steps,) bool with the least total error within the bounds, starting from some that fit."""
    groups = np.unique(allocation.group)
    places = [np.flatnonzero(allocation.group == g) for g in groups]

    def chosen(levels: np.ndarray) -> np.ndarray:
        flags = np.zeros(len(allocation), dtype=bool)
        for place, level in zip(places, levels, strict=True):
            flags[place[:level]] = True
        return flags

    def cost(levels: np.ndarray) -> Mapping[str, float]:
        return allocation.costs(allocation.keep(chosen(levels))).to_dict()

    search = Search([allocation.errors[place] for place in places], cost, bounds)
    return chosen(search.run(np.array([int(taken[place].sum()) for place in places], dtype=np.int64)))


def _impossible(coupling: Coupling, constraints: Constraints, bounds: Mapping[str, float], least: Costs) -> str:
    dense = coupling.costs.dense
    lines = [
        f"{name}: at most {bound:,.0f} asked ({bound / getattr(dense, name):.1%} of the dense network), "
        f"{getattr(least, name):,} ({getattr(least, name) / getattr(dense, name):.1%}) is the least possible"
        for name, bound in bounds.items()
        if getattr(least, name) > bound
    ]
    frozen = int((coupling.is_frozen & coupling.has_site).sum())
    free = int((~coupling.is_frozen & coupling.has_site).sum())
    groups = coupling.groups()
    binding = f"{frozen:,} of {frozen + free:,} channels are frozen, "
    if groups:
        binding += (
            f"and {constraints} holds for {len(groups)} groups. Raise the budget, loosen the constraints, or ask "
            f"`coupling.why_frozen({groups[0].name!r})` what holds a layer."
        )
    else:
        binding += f"and nothing is left that may go{_largest_reason(coupling)}. Raise the budget, or free these."
    return "the budget cannot be met.\n  " + "\n  ".join(lines) + f"\n{binding}"


def _largest_reason(coupling: Coupling) -> str:
    """Return which node holds most channels, and why, as words; or nothing if nothing is frozen."""
    rows = frozen_rows(coupling)
    if not rows:
        return ""
    most = rows[0]
    return f": {most.channels:,} because node {most.node!r}{coupling.traced.where(most.node)} {most.reason}"
