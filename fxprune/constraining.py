"""Constraints: what a user wants kept, tied or rounded, whatever the criterion says."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
from torch import fx

from fxprune.atoms import Ledger
from fxprune.coupling import Coupling, close_record
from fxprune.errors import PlanError
from fxprune.heads import FIELDS, hold
from fxprune.labels import Labels, broadcast

_PATTERNS = ("keep_inputs", "keep_outputs", *FIELDS)


@dataclass(frozen=True, slots=True)
class Constraints:
    """Limits on what may be removed.

    Patterns are shell patterns (`*`, `?`, `[..]`) on layer names as in `model.named_modules()`; a name stands for all
    layers inside it.

    Attributes:
        keep_inputs: layers that keep all their input channels.
        keep_outputs: layers that keep all their output channels.
        min_width: how many channels every group keeps at least. With 0, a residual branch whose channels would all go
            is removed: what is left of it is a constant per channel. Groups elsewhere keep one.
        max_ratio: which share of a group's channels may go at most.
        multiple_of: widths of groups are rounded up to multiples of this, where the dense width allows it. A mapping
            of patterns to numbers, such as `{"*": 8, "layer4": 32}`, says it of the output channels of the layers it
            names; where several patterns match a layer, the last one counts, and a group that several layers make
            fits all of these.
        tie: tuples of layer names whose outputs keep the same positions.
        keep_heads: attention layers that keep all their heads (and grouped convolutions that keep all their groups).
        keep_qk: attention layers that keep all head dims over which queries and keys are multiplied.
        keep_v: attention layers that keep all head dims of their values.
    """

    keep_inputs: Sequence[str] = ()
    keep_outputs: Sequence[str] = ()
    min_width: int = 1
    max_ratio: float = 1.0
    multiple_of: int | Mapping[str, int] = 1
    tie: Sequence[Sequence[str]] = ()
    keep_heads: Sequence[str] = ()
    keep_qk: Sequence[str] = ()
    keep_v: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._check_names()
        if not _is_whole(self.min_width):
            raise PlanError(f"Constraints(min_width={self.min_width!r}) is not a whole number. Pass 1, 8, 16, ..")
        if not isinstance(self.max_ratio, (int, float, np.number)) or isinstance(self.max_ratio, bool):
            raise PlanError(f"Constraints(max_ratio={self.max_ratio!r}) is no number. Pass a number from 0 to 1.")
        if self.min_width < 0:
            raise PlanError(
                f"Constraints(min_width={self.min_width}) is less than nothing. Pass 1 or more, or 0 to let residual "
                "branches go as a whole."
            )
        self._check_multiples()
        if not 0 <= self.max_ratio <= 1:
            raise PlanError(f"Constraints(max_ratio={self.max_ratio}) is not a share. Pass a number from 0 to 1.")

    def _check_multiples(self) -> None:
        asked = self.multiple_of
        for number in asked.values() if isinstance(asked, Mapping) else [asked]:
            if not _is_whole(number) or number < 1:
                raise PlanError(
                    f"Constraints(multiple_of={asked!r}): {number!r} is not a positive whole number. Pass 1, 8, "
                    "16, .., or layer names with such numbers: `multiple_of={'*': 8, 'layer4': 16}`."
                )
        if isinstance(asked, Mapping) and not _are_names(list(asked)):
            raise PlanError(
                f"Constraints(multiple_of={asked!r}) has keys that are no strings. Pass layer names: "
                "`multiple_of={'*': 8, 'layer4': 16}`."
            )

    def _check_names(self) -> None:
        for field in (*_PATTERNS, "tie"):
            if isinstance(getattr(self, field), str):
                raise PlanError(
                    f"Constraints({field}={getattr(self, field)!r}) is one string. Pass a list: `{field}=[...]`."
                )
        for field in _PATTERNS:
            if not _are_names(getattr(self, field)):
                raise PlanError(
                    f"Constraints({field}={getattr(self, field)!r}) is not a list of strings. Pass a list of layer "
                    f"names: `{field}=['conv1']`."
                )
        if not isinstance(self.tie, Sequence) or not all(_are_names(names) and len(names) > 1 for names in self.tie):
            raise PlanError(
                f"Constraints(tie={self.tie!r}) is not a list of tuples of two or more layer names. Pass "
                "`tie=[('conv1', 'conv2')]`."
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(name, str) for name in value)


def layers(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Return layer name -> nodes that run it: the module a node calls, or whose parameters it reads."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        names = [str(node.target)] if node.op == "call_module" else []
        if node.op not in ("call_module", "get_attr"):
            names = [str(n.target).rpartition(".")[0] for n in node.all_input_nodes if n.op == "get_attr"]
        for name in dict.fromkeys(n for n in names if n and not n.startswith("fxprune_")):
            found.setdefault(name, []).append(node)
    return found


def names(pattern: str, layer: str) -> bool:
    """Say whether a pattern names a layer, or a module that it is inside of."""
    return any(fnmatch.fnmatchcase(outer, pattern) for outer in accumulate(layer.split("."), "{}.{}".format))


def matching(graph: fx.Graph, pattern: str, what: str) -> list[fx.Node]:
    """Return the nodes of the layers that a pattern names.

    Raises:
        PlanError: there are none.
    """
    known = layers(graph)
    nodes = [n for name, found in known.items() if names(pattern, name) for n in found]
    if not nodes:
        raise PlanError(
            f"Constraints({what}=...): {pattern!r} matches no layer. Layers are, for example: "
            f"{', '.join(list(known)[:5])}."
        )
    return nodes


def kept_nodes(coupling: Coupling, constraints: Constraints) -> set[str]:
    """Return the nodes of the layers of which inputs or outputs are kept."""
    graph = coupling.traced.graph
    return {
        node.name
        for field in ("keep_inputs", "keep_outputs")
        for pattern in getattr(constraints, field)
        for node in matching(graph, pattern, field)
    }


def constrain(coupling: Coupling, constraints: Constraints) -> Coupling:
    """Return a coupling in which what the constraints keep is frozen, and what they tie is tied."""
    if not any(getattr(constraints, field) for field in (*_PATTERNS, "tie")):
        return coupling
    ledger = coupling.record.ledger.copy()
    graph = coupling.traced.graph
    nodes = coupling.record.nodes
    for field, inward in (("keep_inputs", True), ("keep_outputs", False)):
        for pattern in getattr(constraints, field):
            for node in matching(graph, pattern, field):
                ledger.node = node.name
                for source in node.all_input_nodes if inward else [node]:
                    for t in nodes.get(source.name, []) if source.op != "get_attr" else []:
                        _keep_all(ledger, t.labels, f"is kept by Constraints({field}={pattern!r})")
    for field in FIELDS:
        for pattern in getattr(constraints, field):
            nodes_hit = matching(graph, pattern, field)
            ledger.node = nodes_hit[0].name
            known = layers(graph)
            hold(ledger, coupling, field, pattern, {name for name in known if set(known[name]) & set(nodes_hit)})
    for names in constraints.tie:
        _tie(ledger, coupling, [matching(graph, name, "tie")[0] for name in names])
    return close_record(coupling.traced, replace(coupling.record, ledger=ledger))


def _keep_all(ledger: Ledger, labels: Labels, reason: str) -> None:
    for ids in labels:
        if ids is not None:
            ledger.freeze(ids, reason)


def _tie(ledger: Ledger, coupling: Coupling, nodes: list[fx.Node]) -> None:
    first = coupling.record.nodes[nodes[0].name][0]
    for node in nodes[1:]:
        other = coupling.record.nodes[node.name][0]
        ledger.node = node.name
        a, b = _channels(first.labels), _channels(other.labels)
        if a.shape != b.shape:
            raise PlanError(
                f"Constraints(tie=...): {nodes[0].name!r} has {a.size} output channels and {node.name!r} has "
                f"{b.size}. Tie equal layers."
            )
        broadcast(ledger, (a,), a.shape, (b,), b.shape)


def _channels(labels: Labels) -> np.ndarray:
    flat = [ids.ravel() for ids in labels if ids is not None]
    return np.concatenate(flat) if flat else np.empty(0, dtype=np.int64)
