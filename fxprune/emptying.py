"""Residual branches that go as a whole: what follows for a graph when dims of it keep nothing.

A contraction that sums over nothing returns its bias, so what comes after it no longer depends on the inputs. Where an
addition takes such a constant in, the branch before it ends: nothing of it is needed but the constant. Wherever else a
node that is still needed would read what is empty or constant, the channels may not all go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import fx, nn

from fxprune.aliasing import origin, writes
from fxprune.atoms import FIXED
from fxprune.cloning import submodule
from fxprune.closing import owner
from fxprune.coupling import Coupling
from fxprune.labels import Labels
from fxprune.literals import plain_name

LIVE, FREE, CONSTANT, ABSENT = "live", "free", "constant", "absent"
"""What a node returns: something that depends on the inputs, or on parameters only, or is the same whatever comes in,
because it depends on what is absent; or something of which no channel is left."""

_ADDITIONS = {"add", "iadd", "add_"}


class CannotEmptyError(Exception):
    """Channels that may not all go; the message says why, as the end of a sentence on them."""


@dataclass(frozen=True, slots=True)
class Removal:
    """What goes from a graph whose emptied branches are replaced by constants.

    Attributes:
        absent: nodes of which nothing stays.
        constant: nodes that return the same whatever comes in.
        sums: those among them that sum over what is absent.
        ends: constant nodes that are still needed -> the additions that take them in.
        gone: all nodes that the slim network does without.
    """

    absent: frozenset[str]
    constant: frozenset[str]
    sums: frozenset[str]
    ends: dict[str, tuple[str, ...]]
    gone: frozenset[str]


class Places:
    """Which channels are at which nodes and in which parameters, dim by dim."""

    def __init__(self, coupling: Coupling) -> None:
        """Look up all labelled dims of a coupled network; equal ones once."""
        self.dims: list[np.ndarray] = []
        self._known: dict[int, int] = {}
        self._alive: list[np.ndarray] = []
        self.nodes = {
            name: [self._of(coupling.to_channels(t.labels)) for t in tensors]
            for name, tensors in coupling.record.nodes.items()
        }
        self.state = {name: self._of(labels) for name, (_, labels) in coupling.tensors.items()}
        self._size = coupling.num_channels + 1

    def _of(self, labels: Labels) -> list[int]:
        return [self.index(ids) for ids in labels if ids is not None]

    def index(self, ids: np.ndarray) -> int:
        """Return the number of a labelled dim."""
        home = owner(ids)
        found = self._known.get(id(home))
        if found is None:
            found = self._known[id(home)] = len(self.dims)
            self.dims.append(ids.ravel())
            self._alive.append(home)
        return found

    def emptied(self, keep: np.ndarray) -> np.ndarray:
        """Return (dims,) bool: which keep nothing of the channels `keep` (channels,)."""
        keep = np.append(keep, True)
        return np.array([not keep[dim].any() for dim in self.dims], dtype=bool)

    def channels(self, dims: Iterable[int]) -> np.ndarray:
        """Return (channels + 1,) bool: which channels occur in these dims."""
        found = np.zeros(self._size, dtype=bool)
        for dim in set(dims):
            found[self.dims[dim]] = True
        return found


class Emptying:
    """Answers, for one coupled network, what goes along when dims of it keep nothing."""

    def __init__(self, coupling: Coupling, held: Iterable[str] = ()) -> None:
        """Read the graph.

        Args:
            coupling: the coupled network.
            held: nodes that may not be removed.
        """
        self.coupling = coupling
        self.places = Places(coupling)
        self._nodes = list(coupling.traced.graph.nodes)
        self._held = frozenset(held)
        self._inside = _parameters_of(self._nodes, self.places.state)

    def close(self, keep: np.ndarray) -> np.ndarray:
        """Let everything go that is needed by nothing once what `keep` (channels,) empties has gone.

        Raises:
            CannotEmptyError: something of it has to stay.
        """
        coupling = self.coupling
        loose = coupling.has_site & ~coupling.is_frozen
        while True:
            keep = coupling.settle(keep)
            problem = coupling.violation(keep, may_empty=True)
            if problem:
                raise CannotEmptyError(f"would take others with them: {problem}")
            found = self.removal(keep)
            unused = loose & keep & ~self._needed_channels(found) if found else np.zeros_like(keep)
            if not unused.any():
                return keep
            keep = keep & ~unused

    def removal(self, keep: np.ndarray) -> Removal | None:
        """Return what goes from the graph when the channels `keep` (channels,) stay; None where no dim is emptied.

        Raises:
            CannotEmptyError: a node that is needed reads what is empty or constant.
        """
        emptied = self.places.emptied(keep)
        if not emptied.any():
            return None
        state, sums = self._states(emptied)
        needed, ends = self._needed(state, emptied)
        gone = frozenset(n.name for n in self._nodes if n.name not in needed and n.op not in ("placeholder", "output"))
        self._check_gone(gone)
        self._check_frozen(keep, gone)
        return Removal(
            frozenset(name for name, s in state.items() if s == ABSENT),
            frozenset(name for name, s in state.items() if s == CONSTANT),
            frozenset(sums),
            {end: tuple(dict.fromkeys(additions)) for end, additions in ends.items()},
            gone,
        )

    def _states(self, emptied: np.ndarray) -> tuple[dict[str, str], set[str]]:
        """Return what every node returns, LIVE, FREE, CONSTANT or ABSENT, and which nodes sum over what is absent."""
        state: dict[str, str] = {}
        sums: set[str] = set()
        for n in self._nodes:
            tensors = self.places.nodes.get(n.name, [])
            found = {state[s.name] for s in n.all_input_nodes if not tensors or self.places.nodes.get(s.name)}
            if n.op in ("placeholder", "output"):
                state[n.name] = LIVE
            elif tensors and all(emptied[dims].any() for dims in tensors):
                state[n.name] = ABSENT
            elif self._sums_inside(n, emptied):
                state[n.name] = CONSTANT
                sums.add(n.name)
            elif found & {CONSTANT, ABSENT} and (not tensors or LIVE not in found):
                state[n.name] = CONSTANT
                if tensors and ABSENT in found:
                    sums.add(n.name)
            elif LIVE in found or any(state[s.name] == LIVE for s in n.all_input_nodes):
                state[n.name] = LIVE
            else:
                state[n.name] = FREE
        return state, sums

    def _sums_inside(self, n: fx.Node, emptied: np.ndarray) -> bool:
        """Say whether a node is attention without any values: its output projection sums over nothing."""
        name = f"{n.target}.out_proj.weight"
        if n.op != "call_module" or name not in self.places.state:
            return False
        last = self.coupling.tensors[name][1][1]
        is_attention = isinstance(submodule(self.coupling.traced.root, str(n.target)), nn.MultiheadAttention)
        return is_attention and last is not None and bool(emptied[self.places.index(last)])

    def _needed(self, state: dict[str, str], emptied: np.ndarray) -> tuple[set[str], dict[str, list[str]]]:
        """Walk back from the outputs; return what is still needed, and where constants are taken in."""
        unused = [n for n in self._nodes if not n.users and state[n.name] in (LIVE, FREE)]
        writing = [n for n in unused if writes(n, self.coupling.traced.root)]
        ends_at = [n for n in self._nodes if n.op in ("placeholder", "output")]
        needed = self._behind(ends_at + writing, state, set())
        for n in unused:  # checks of sizes and the like, which stay where what they look at does
            seen = self._behind([n], state, needed)
            if not any(self.places.nodes.get(name) for name in seen - {n.name}):
                needed |= seen
        ends: dict[str, list[str]] = {}
        for n in self._nodes:
            if n.name in needed:
                self._check_needed(n, emptied)
                for source in n.all_input_nodes:
                    if source.name not in needed:
                        self._check_end(n, source, state)
                        ends.setdefault(source.name, []).append(n.name)
        return needed, ends

    def _behind(self, nodes: list[fx.Node], state: dict[str, str], known: set[str]) -> set[str]:
        """Return these nodes and all that they are computed from, up to what is known, constant or absent."""
        found: set[str] = set()
        while nodes:
            n = nodes.pop()
            if n.name not in found and n.name not in known:
                found.add(n.name)
                nodes += [source for source in n.all_input_nodes if state[source.name] in (LIVE, FREE)]
        return found

    def _check_needed(self, n: fx.Node, emptied: np.ndarray) -> None:
        """Check that nothing in a node that stays is empty."""
        inside = [dim for name in self._inside.get(str(n.target), ()) for dim in self.places.state[name]]
        around = [dim for dims in self.places.nodes.get(n.name, []) for dim in dims]
        if emptied[around + (inside if n.op == "call_module" else [])].any():
            raise CannotEmptyError(f"would leave nothing of a part of node {n.name!r}, which stays")

    def _check_end(self, n: fx.Node, source: fx.Node, state: dict[str, str]) -> None:
        """Check that a node that stays only adds a constant to something of its own shape."""
        if n.op == "output":
            raise CannotEmptyError("would leave an output of the network that depends on nothing")
        if state[source.name] == ABSENT or not self.places.nodes.get(source.name):
            raise CannotEmptyError(f"would leave nothing for node {n.name!r} to read")
        other = live_operand(n, source)
        record = self.coupling.record.nodes
        if other is None or not record.get(other.name):
            raise CannotEmptyError(f"would leave a constant at node {n.name!r}, which is no plain addition")
        mine, theirs, result = (record[name][0] for name in (source.name, other.name, n.name))
        if theirs.shape != result.shape or theirs.dtype != result.dtype or mine.dtype != result.dtype:
            raise CannotEmptyError(f"would leave a constant that node {n.name!r} takes its shape or dtype from")
        if any(ids is not None and ids.size != ids.shape[d] for d, ids in enumerate(mine.labels)):
            raise CannotEmptyError(f"would leave a constant at node {n.name!r} whose rows keep different positions")

    def _check_gone(self, gone: frozenset[str]) -> None:
        """Check that nothing goes that a user wants kept, or that writes to what stays."""
        held = self._held & gone
        if held:
            raise CannotEmptyError(f"would take node {min(held)!r} with them, which the constraints keep")
        for n in self._nodes:
            if n.name not in gone or not writes(n, self.coupling.traced.root):
                continue
            written = origin(n.all_input_nodes[0], self.coupling.traced.root, gone)
            if written is not None:
                raise CannotEmptyError(f"would take node {n.name!r} with them, which writes to {written.name!r}")

    def _check_frozen(self, keep: np.ndarray, gone: frozenset[str]) -> None:
        """Check that what is frozen and goes, such as rows read by their position, is frozen by nodes that go too."""
        lost = np.append(self.coupling.is_frozen & ~keep, False)
        if not lost.any():
            return
        for freeze in self.coupling.record.ledger.freezes:
            if freeze.node not in gone and lost[self.coupling.channels(freeze.atoms)].any():
                raise CannotEmptyError(f"would take others with them that node {freeze.node!r} needs: {freeze.reason}")

    def _needed_channels(self, removal: Removal) -> np.ndarray:
        """Return (channels,) which the nodes that stay make use of, and what these could not be without."""
        dims = []
        for n in self._nodes:
            if n.name not in removal.gone:
                dims += [dim for tensor in self.places.nodes.get(n.name, []) for dim in tensor]
                dims += [dim for name in self._inside.get(str(n.target), ()) for dim in self.places.state[name]]
        used = self.places.channels(dims)
        products = self.coupling.products
        while True:
            before = used.sum()
            for parent in (products.row, products.column):
                used[parent[used[products.channel]]] = True
            for batch in self.coupling.rows:
                real = batch.row != FIXED
                row, columns = batch.row[real], batch.columns[real]
                np.logical_or.at(used, row, used[columns].any(axis=1))
                used[columns[used[row]]] = True
            if used.sum() == before:
                return used[:-1]


def live_operand(addition: fx.Node, constant: fx.Node) -> fx.Node | None:
    """Return what a constant is added to; None where the node is no plain addition of two tensors."""
    if addition.op not in ("call_function", "call_method") or plain_name(addition) not in _ADDITIONS:
        return None
    if addition.kwargs or len(addition.args) != 2:
        return None
    first, second = addition.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
        return None
    if first is constant and plain_name(addition) != "add" and len(constant.users) > 1:
        return None  # writes to the constant, which others read too
    return second if first is constant else first


def _parameters_of(nodes: Iterable[fx.Node], state: Iterable[str]) -> dict[str, list[str]]:
    """Return target of a node -> the parameters and buffers it reads."""
    targets = {str(n.target) for n in nodes if n.op in ("call_module", "get_attr")}
    found: dict[str, list[str]] = {}
    for name in state:
        home = name
        while home:
            if home in targets:
                found.setdefault(home, []).append(name)
            home = home.rpartition(".")[0]
    return found
