"""The channel-dependency graph of a traced network: which positions live and die together, which must stay, and why."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np

from fxprune import explaining, notebooks
from fxprune.atoms import FIXED
from fxprune.channels import Frozen, Site, find_frozen, find_products, find_rows, find_sites
from fxprune.closing import Classes, close, mixed, owner
from fxprune.costs import CostModel, unlabelled
from fxprune.covering import Coverage, cover
from fxprune.errors import CouplingError, TraceError, check_kind
from fxprune.grouping import Group, Members, Products, Rows, find_groups
from fxprune.interpreting import InterpretationError, interpret
from fxprune.labels import Labels, Shape, fix
from fxprune.pausing import without_collector
from fxprune.records import Interpretation, Labelled
from fxprune.settling import Settling
from fxprune.traced import Traced
from fxprune.values import tensors_in
from fxprune.weighing import weights_of


@dataclass(frozen=True)
class Coupling:
    """All sites, groups and constraints of one traced model. Made by `couple`.

    Attributes:
        traced: the traced network.
        sites: where channels are, parameter by parameter in graph order.
        num_channels: channels are numbered from 0, in graph order.
        fixed: what the graph says may not go, and why.
        rows: rows of channels that must keep equally many.
        products: channels that stay while both their parents stay.
    """

    traced: Traced
    sites: tuple[Site, ...]
    num_channels: int
    fixed: tuple[Frozen, ...]
    rows: tuple[Rows, ...]
    products: Products
    record: Interpretation = field(repr=False)
    classes: Classes = field(repr=False)

    def groups(self) -> tuple[Group, ...]:
        """Return the groups: sets of channels with the same sites, ranked against each other."""
        return self._grouped[0]

    @property
    def members(self) -> Members:
        """The channels that go with each choice of a group."""
        return self._grouped[1]

    @cached_property
    def is_frozen(self) -> np.ndarray:
        """(channels,) which may not go."""
        return self.classes.frozen_by >= 0

    @cached_property
    def held(self) -> np.ndarray:
        """(channels,) which may not go as choices: they are frozen, or a channel is that goes with them."""
        return self.members.total(self.is_frozen) > 0

    def choice_of(self, group: Group) -> np.ndarray:
        """Return (channels + 1,) with which choice of a group each channel goes, by its number among them; else -1."""
        found = np.full(self.num_channels + 1, -1)
        channels, which = self.members.of(group.choices)
        found[channels] = which
        return found

    def in_group(self, group: Group) -> np.ndarray:
        """Return (channels + 1,) which channels go with the choices of a group."""
        return self.choice_of(group) >= 0

    @cached_property
    def frozen(self) -> tuple[Frozen, ...]:
        """What may not go, and why: what the graph says, and what no group has found a step for."""
        return self.fixed + self._without_step()

    def _without_step(self) -> tuple[Frozen, ...]:
        """Return the channels that are in no group although nothing fixes them: their rows take no even step."""
        settled = np.append(self.is_frozen | ~self.has_site, True)
        for group in self.groups():
            settled |= self.in_group(group)
        ledger = self.record.ledger
        starts = np.array([start for start, _ in ledger.births])
        found = []
        reason = "makes rows for which no step was found that takes equally many from each"
        for batch in self.rows:
            channels = np.unique(batch.columns[~settled[batch.columns]])
            if len(channels):
                settled[channels] = True
                found.append(Frozen(channels, batch.node, reason, self.traced.source(batch.node)))
        for channel in np.flatnonzero(~settled):
            atom = int(np.argmax(self.classes.of_atom == channel))
            node = ledger.births[int(np.searchsorted(starts, atom, "right")) - 1][1]
            found.append(Frozen(np.array([channel]), node, reason, self.traced.source(node)))
        return tuple(found)

    @cached_property
    def entangled(self) -> np.ndarray:
        """(channels,) which are part of a row, or a crossing or its parent: what stays of them depends on others."""
        found = np.zeros(self.num_channels + 1, dtype=bool)
        for batch in self.rows:
            found[batch.columns] = found[batch.row] = True
        for channels in (self.products.channel, self.products.row, self.products.column):
            found[channels] = True
        return found[:FIXED]

    @cached_property
    def has_site(self) -> np.ndarray:
        """(channels,) which occur in a parameter or buffer."""
        return self._site_key != 0

    @cached_property
    def _site_key(self) -> np.ndarray:
        key = np.zeros(self.num_channels + 1, dtype=np.uint64)
        hashes = mixed(np.arange(len(self.sites)))
        with np.errstate(over="ignore"):
            for channels, where in self.arrays:
                key[channels] += hashes[where].sum()  # once, however often a channel occurs
        return key[:FIXED]

    @cached_property
    def arrays(self) -> list[tuple[np.ndarray, list[int]]]:
        """Each distinct array of channels, flat, with the numbers of its sites."""
        found: dict[int, tuple[np.ndarray, list[int]]] = {}
        for number, site in enumerate(self.sites):
            found.setdefault(id(owner(site.channels)), (site.channels.ravel(), []))[1].append(number)
        return list(found.values())

    @cached_property
    def _grouped(self) -> tuple[tuple[Group, ...], Members]:
        first = np.full(self.num_channels + 1, len(self.sites), dtype=np.int64)
        for channels, where in sorted(self.arrays, key=lambda entry: -entry[1][0]):
            first[channels] = where[0]
        first = first[:FIXED]
        names = [f"{site.name}" for site in self.sites]
        return find_groups(
            self.num_channels, list(self.rows), self.products, self.is_frozen, self._site_key, names, first
        )

    @cached_property
    def costs(self) -> CostModel:
        """Costs as a function of the kept channels."""
        model, shares = self.traced.latency_model, self.traced.combinations
        timed = None if model is None else (model, self.traced.graph)
        weights = None if shares is None else weights_of(self.traced, shares)
        return CostModel(self.record, self.channels, unlabelled(self.record, self.traced.state), timed, weights)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the sites and their channels: equal for equal networks, on every machine."""
        digest = hashlib.sha256(f"{self.num_channels}".encode())
        for channels, where in self.arrays:
            about = [f"{self.sites[i].name}:{self.sites[i].dim}:{self.sites[i].channels.shape}" for i in where]
            digest.update(" ".join(about).encode())
            digest.update(channels.tobytes())
        return digest.hexdigest()

    def __str__(self) -> str:
        return notebooks.coupling_line(self)

    def _repr_html_(self) -> str:
        return notebooks.coupling_html(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # what a notebook stores besides: not all arrays

    @cached_property
    def graph(self) -> nx.Graph:
        """The dependency graph for people: (parameter, dim) are vertices, edges know the fx node that tied them."""
        return explaining.dependency_graph(self)

    def explain(self, a: str | tuple[str, int], b: str | tuple[str, int]) -> str:
        """Say in words why two parameters are coupled: the shortest chain of ties between them.

        Args:
            a: a parameter name, or (name, dim).
            b: another.

        Raises:
            CouplingError: a name that the network does not have.
        """
        return explaining.explain(self, a, b)

    def why_frozen(self, name: str | tuple[str, int]) -> str:
        """Say in words which channels of a parameter may not go, where in the graph that comes from, and why.

        Raises:
            CouplingError: a name that the network does not have.
        """
        return explaining.why_frozen(self, name)

    def coverage(self) -> Coverage:
        """Return which share of the macs and parameters can go at all, and what blocks the rest, most costly first."""
        return cover(self)

    def settle(self, keep: np.ndarray) -> np.ndarray:
        """Let everything that follows from removed channels go too: rows without columns, columns without their row.

        Args:
            keep: (channels,) bool.

        Returns:
            A new array that keeps at most as much.
        """
        return self._settling.settle(keep)

    @cached_property
    def _settling(self) -> Settling:
        return Settling(self.rows, self.products)

    def lost_rows(self, keep: np.ndarray) -> list[np.ndarray]:
        """Return the columns of every row that would be emptied although it is frozen."""
        return self._settling.emptied(keep, self.is_frozen)

    def violation(self, keep: np.ndarray, *, may_empty: bool = False) -> str | None:
        """Return what is wrong with a choice of kept channels, or None: frozen ones gone, rows out of balance.

        Args:
            keep: (channels,) bool.
            may_empty: let dims keep nothing, and rows go with them that are frozen; whether these can go is asked of
                `branches`.
        """
        lost = self.is_frozen & ~keep
        if may_empty and lost.any() and self.costs.emptied(keep):
            lost &= self.has_site
        if lost.any():
            return f"channel {int(np.flatnonzero(lost)[0])} is frozen and would go"
        if not np.array_equal(self.settle(keep), keep):
            return "a row and its columns, or a crossing and its parents, disagree"
        if not may_empty and self.costs.emptied(keep):
            return "nothing would be left of a dim of a parameter or activation"
        keep = np.append(keep, True)
        if not np.array_equal(keep[self.products.channel], keep[self.products.row] & keep[self.products.column]):
            return "a crossing would go although both its parents stay"
        uneven = self._settling.uneven(keep[:FIXED])
        return None if uneven is None else f"the rows at node {uneven!r} would keep unequally many channels"

    def channels(self, atoms: np.ndarray) -> np.ndarray:
        """Translate atoms to channels."""
        return self.classes.channels(atoms)

    def to_channels(self, labels: Labels) -> Labels:
        """Translate labels from atoms to channels."""
        return tuple(None if ids is None else self.channels(ids) for ids in labels)

    @cached_property
    def tensors(self) -> Mapping[str, tuple[Shape, Labels]]:
        """Shape and channels of every parameter and buffer that has any."""
        found: dict[str, list[np.ndarray | None]] = {
            name: [None] * len(s) for name, (s, *_) in self.record.issued.items()
        }
        for site in self.sites:
            found[site.name][site.dim] = site.channels
        return {name: (self.record.issued[name][0], tuple(labels)) for name, labels in found.items()}

    def at(self, node: str) -> list[Labelled]:
        """Return shape and channels of every tensor that a node returns."""
        return [Labelled(t.shape, self.to_channels(t.labels), t.dtype) for t in self.record.nodes.get(node, [])]


@without_collector
def couple(traced: Traced, *, unknown: str = "freeze", freeze: Mapping[str, str] | None = None) -> Coupling:
    """Find which channels of a traced network live and die together, and which may not go.

    Args:
        traced: from `trace`.
        unknown: what to do about ops without a rule: "freeze" what reaches them, or "error".
        freeze: fx node -> reason; nothing along the dims of what these nodes take and return may go.

    Raises:
        TraceError: the network does not run on the example inputs.
        CouplingError: `unknown="error"` and there are such ops (all are listed), or a rule could not be applied.
    """
    check_kind(traced, Traced)
    if unknown not in ("freeze", "error"):
        raise CouplingError(f"unknown={unknown!r} is neither 'freeze' nor 'error'. Pass one of the two.")
    record = interpreted(traced)
    if record.unknown and unknown == "error":
        lines = [f"  {op} at node {node!r}{traced.where(node)}" for node, op in dict.fromkeys(record.unknown)]
        raise CouplingError(
            "these ops have no rule:\n"
            + "\n".join(lines)
            + '\nAdd a rule with `@fxprune.rules.rule(op)`, or pass `unknown="freeze"`.'
        )
    _freeze_nodes(record, traced, dict(freeze or {}))
    return close_record(traced, record)


def interpreted(traced: Traced) -> Interpretation:
    """Run a traced network on labels.

    Raises:
        TraceError: it does not run on the example inputs.
    """
    try:
        return interpret(traced.root, traced.state, traced.graph, traced.args, traced.kwargs)
    except InterpretationError as error:
        cause = error.__cause__
        name = type(traced.model).__name__
        if error.reads is not None:
            raise TraceError(
                f"{name} cannot be followed: at node {error.node!r}{traced.where(error.node)}, {error.reads} returns a "
                "number or a size that depends on the data. Keep numbers in tensors (without `.item()`) and sizes "
                "fixed (`torch.where` in place of a mask), or compile the modules inside."
            ) from cause
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors_in((traced.args, traced.kwargs)))
        raise TraceError(
            f"{name} does not run on the example inputs of shape {shapes}: node {error.node!r}"
            f"{traced.where(error.node)} raised {type(cause).__name__}: {cause}. Pass example inputs that "
            f"`model(*example_inputs)` takes."
        ) from cause


def close_record(traced: Traced, record: Interpretation) -> Coupling:
    """Find the channels, sites and constraints of an interpretation."""
    classes = close(record.ledger)
    sites = find_sites(record, classes)
    return Coupling(
        traced,
        sites,
        classes.num_channels,
        find_frozen(record, classes, traced),
        find_rows(record, classes),
        find_products(record, classes),
        record,
        classes,
    )


def _freeze_nodes(record: Interpretation, traced: Traced, freeze: dict[str, str]) -> None:
    nodes = {n.name: n for n in traced.graph.nodes}
    record.freeze.update(freeze)
    for name, reason in freeze.items():
        if name not in nodes:
            raise CouplingError(
                f"freeze names node {name!r}, which the graph does not have. Its nodes are in `traced.graph`."
            )
        record.ledger.node = name
        inside = f"{nodes[name].target}." if nodes[name].op == "call_module" else None
        for state, (shape, labels, _, _) in record.issued.items():
            if inside and state.startswith(inside):
                for d in range(len(shape)):
                    fix(record.ledger, labels, d, reason)
        for node in [nodes[name], *nodes[name].all_input_nodes]:
            for t in record.nodes.get(node.name, []):
                for d in range(len(t.shape)):
                    fix(record.ledger, t.labels, d, reason)
