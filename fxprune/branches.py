"""Branches that may go as a whole: which, what goes with each, what the network costs without them.

Without its emptied branches a network is another network, with fewer nodes and channels. It is traced (by cutting the
graph), coupled and counted like any other, so its costs are exact; nothing here is looked at while every group keeps
a channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx

from fxprune.cloning import submodule, unused_name
from fxprune.costs import Costs
from fxprune.coupling import Coupling, close_record, couple
from fxprune.cutting import HOME, cut
from fxprune.emptying import CannotEmptyError, Emptying, Removal
from fxprune.errors import ArtifactError, PlanError
from fxprune.folding import Fold, fold, narrowed
from fxprune.masking import InFloat64
from fxprune.slimming import EXACT
from fxprune.verifying import double_copy, run_in


def carried(coupling: Coupling, keep: np.ndarray, other: Coupling) -> np.ndarray:
    """Return the channels of a part of a network that stay, from those of the whole: equal parameters keep equal parts.

    Args:
        coupling: of the whole.
        keep: (channels,) of it.
        other: of the part.

    Raises:
        CannotEmptyError: the part cannot be cut alike.
    """
    keep, found = np.append(keep, True), np.ones(other.num_channels + 1, dtype=bool)
    shared = [
        (name, mine, theirs)
        for name, (_, labels) in other.tensors.items()
        if name in coupling.tensors
        for theirs, mine in zip(labels, coupling.tensors[name][1], strict=True)
    ]
    for _, mine, theirs in shared:
        if mine is not None and theirs is not None:
            np.logical_and.at(found, *np.broadcast_arrays(theirs, keep[mine]))
    found[-1] = True
    found = np.append(other.settle(found[:-1]), True)
    for name, mine, theirs in shared:
        expected = np.True_ if mine is None else keep[mine]
        stays = np.True_ if theirs is None else found[theirs]
        if (expected != stays).any():
            raise CannotEmptyError(f"would leave {name!r} in a network that cannot be cut alike")
    return found[:-1]


@dataclass(frozen=True, slots=True)
class Reduced:
    """A network without its emptied branches.

    Attributes:
        whole: the coupling of the network with them.
        coupling: of the network without.
        fold: what takes their place; None where there are none.
    """

    whole: Coupling
    coupling: Coupling
    fold: Fold | None = None

    def keep(self, keep: np.ndarray) -> np.ndarray:
        """Translate the channels that stay, (channels,), to those of the network without the branches."""
        return keep if self.fold is None else carried(self.whole, keep, self.coupling)

    def fill(self, slim: fx.GraphModule, values: Iterable[torch.Tensor]) -> None:
        """Give the constants of a slim network their values; it remembers them in full precision."""
        assert self.fold is not None
        home = unused_name(self.whole.traced.root, HOME)
        exact = slim.meta.setdefault(EXACT, {})
        for end, value in narrowed(list(values), self.fold.constants).items():
            parameter = submodule(slim, home)._parameters[end]
            assert parameter is not None
            with torch.no_grad():
                parameter.copy_(value)
            exact[f"{home}.{end}"] = value.clone()


_Key = tuple[frozenset[str], frozenset[str]]


class Branches:
    """The branches of one coupled network."""

    def __init__(self, coupling: Coupling, held: Iterable[str] = ()) -> None:
        """Look for nothing yet.

        Args:
            coupling: the coupled network.
            held: nodes that may not be removed.
        """
        self.coupling = coupling
        self.emptying = Emptying(coupling, held)
        self._folds: dict[_Key, Fold | str] = {}
        self._reduced: dict[_Key, Reduced] = {}

    def without(self, keep: np.ndarray, choices: np.ndarray) -> np.ndarray:
        """Return what stays, of `keep` (channels,), when the `choices` go and all that is not needed without them.

        Raises:
            CannotEmptyError: they may not all go.
        """
        before = self.emptying.removal(keep)
        keep = keep.copy()
        keep[self.coupling.members.of(choices)[0]] = False
        keep = self.emptying.close(keep)
        removal = self.emptying.removal(keep)
        if removal is None or (before is not None and removal.gone == before.gone):
            raise CannotEmptyError("are no branch of their own: other channels of the same dims stay")
        self._fold(removal)
        return keep

    def settle(self, keep: np.ndarray) -> np.ndarray:
        """Let everything go that follows from removed channels, branches of which nothing is needed included.

        Where something that is emptied has to stay, only what `Coupling.settle` lets go goes.
        """
        try:
            return self.emptying.close(keep)
        except CannotEmptyError:
            return self.coupling.settle(keep)

    def _fold(self, removal: Removal) -> Fold:
        key = (removal.absent, removal.gone)
        found = self._folds.get(key)
        if found is None:
            try:
                found = fold(self.coupling, removal)
            except CannotEmptyError as error:
                found = str(error)
            self._folds[key] = found
        if isinstance(found, str):
            raise CannotEmptyError(found)
        return found

    def reduced(self, keep: np.ndarray) -> Reduced:
        """Return the network without the branches that `keep` (channels,) empties.

        Raises:
            CannotEmptyError: something that is emptied has to stay.
        """
        removal = self.emptying.removal(keep)
        if removal is None:
            return Reduced(self.coupling, self.coupling)
        key = (removal.absent, removal.gone)
        found = self._reduced.get(key)
        if found is None:
            folded = self._fold(removal)
            coupling = couple(cut(self.coupling.traced, removal, folded))
            found = self._reduced[key] = Reduced(self.coupling, coupling, folded)
        return found

    def costs(self, keep: np.ndarray) -> Costs:
        """Return the costs of the network of the channels `keep` (channels,).

        Raises:
            CannotEmptyError: something that is emptied has to stay.
        """
        reduced = self.reduced(keep)
        return reduced.coupling.costs(reduced.keep(keep))

    def within(self, keep: np.ndarray, bounds: Mapping[str, float]) -> bool:
        """Say whether the network of the channels `keep` (channels,) exists and costs at most `bounds`."""
        try:
            reduced = self.reduced(keep)
            return reduced.coupling.costs.within(reduced.keep(keep), bounds)
        except CannotEmptyError:
            return False

    def constants(self, folded: Fold, keep: np.ndarray) -> tuple[Coupling, np.ndarray]:
        """Return the coupling of what computes the constants, whose outputs may be cut, and what stays of it."""
        record = couple(folded.traced).record
        ledger = replace(record.ledger, freezes=[f for f in record.ledger.freezes if f.node != "output"])
        coupling = close_record(folded.traced, replace(record, ledger=ledger))
        return coupling, carried(self.coupling, keep, coupling)


def build_without(
    coupling: Coupling, keep: np.ndarray, build: Callable[[Coupling, np.ndarray], fx.GraphModule]
) -> fx.GraphModule:
    """Build the slim network in which the branches that keep nothing are constants.

    Args:
        coupling: of the network with them.
        keep: (channels,) what stays.
        build: builds a slim network of which something of every dim stays.

    Raises:
        ArtifactError: something that keeps nothing is no branch that can go.
    """
    branches = Branches(coupling)
    try:
        reduced = branches.reduced(keep)
        slim = build(reduced.coupling, reduced.keep(keep))
        if reduced.fold is not None:
            constants = double_copy(build(*branches.constants(reduced.fold, keep)))
            reduced.fill(slim, run_in(InFloat64(), constants, (), {}))
    except CannotEmptyError as error:
        raise ArtifactError(
            f"the plan keeps nothing of a dim, and its channels {error}. The plan is damaged, or of another network."
        ) from error
    return slim


def costs_of(coupling: Coupling, keep: np.ndarray) -> Costs:
    """Return what the network of the channels `keep` (channels,) costs, without the branches that keep nothing.

    Raises:
        PlanError: a dim would keep nothing that cannot go.
    """
    if not coupling.costs.emptied(keep):
        return coupling.costs(keep)
    try:
        return Branches(coupling).costs(keep)
    except CannotEmptyError as error:
        raise PlanError(
            f"these channels cannot be kept: nothing would be left of a dim, and its channels {error}. Keep one of "
            "each dim."
        ) from error
