"""Combinations of tasks: what each costs, of a network that runs some of its tasks now and others later."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations as subsets
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import fx, nn

from fxprune.costs import CostModel, Costs, unlabelled
from fxprune.coupling import interpreted
from fxprune.errors import TraceError
from fxprune.outputs import checked_tasks, of_tasks, returned, tasks_of
from fxprune.pausing import without_collector
from fxprune.reporting import Compiled
from fxprune.saving import examples
from fxprune.selecting import select_tasks
from fxprune.slimming import RECORD
from fxprune.timing import take_turns
from fxprune.traced import Traced, used_state
from fxprune.tracing import checked_inputs, trace

Combination = tuple[str, ...]
"""Names of tasks, in the order of the network."""
ALL_SUBSETS = 6
"""Of how many tasks all combinations are looked at; of more, single ones, all together, and those given."""
ROUNDS = 20
"""How often each combination is run when latency is measured."""


@dataclass(frozen=True, slots=True)
class CombinationCost:
    """What the network of one combination of tasks costs.

    Attributes:
        tasks: names of the tasks.
        costs: of one forward pass over the example inputs.
        latency: median seconds of a forward pass; None where it was not measured.
        relative: median over rounds of that pass over one of all tasks in the same round; None where not measured.
    """

    tasks: Combination
    costs: Costs
    latency: float | None = None
    relative: float | None = None

    @property
    def name(self) -> str:
        """The tasks, joined by plus signs."""
        return " + ".join(self.tasks)


@dataclass(frozen=True, slots=True)
class CombinationCosts:
    """What combinations of tasks cost. Made by `combination_costs`; prints as a table, one row per combination.

    Attributes:
        entries: fewest tasks first, all tasks last.
        complete: whether these are all combinations that there are.
    """

    entries: tuple[CombinationCost, ...]
    complete: bool

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[CombinationCost]:
        return iter(self.entries)

    def __getitem__(self, tasks: Sequence[str]) -> CombinationCost:
        """Return the entry of a combination, in whatever order its tasks are named."""
        wanted = {tasks} if isinstance(tasks, str) else set(tasks)
        for entry in self.entries:
            if set(entry.tasks) == wanted:
                return entry
        raise KeyError(tasks)

    @property
    def whole(self) -> CombinationCost:
        """The entry of all tasks."""
        return self.entries[-1]

    def share(self, tasks: Sequence[str], resource: str) -> float:
        """Return what a combination costs of what all tasks cost, for one resource."""
        whole = getattr(self.whole.costs, resource)
        return getattr(self[tasks].costs, resource) / whole if whole else 1.0

    def __str__(self) -> str:
        timed = self.whole.latency is not None
        headers = ["tasks", *(h for name in self.whole.costs.to_dict() for h in (name, "of all"))]
        table = tabulate(
            [self._row(entry) for entry in self.entries],
            [*headers, "latency", "of all"] if timed else headers,
            disable_numparse=True,
            colalign=["left", *["right"] * (len(headers) - 1 + 2 * timed)],
        )
        more = "" if self.complete else "\n\nother combinations were not looked at: pass `combinations=`"
        return table + more

    def _row(self, entry: CombinationCost) -> list[str]:
        row = [entry.name]
        for resource in self.whole.costs.to_dict():
            row += [f"{getattr(entry.costs, resource):,}", f"{self.share(entry.tasks, resource):.1%}"]
        if entry.latency is not None and entry.relative is not None:
            row += [f"{entry.latency * 1e3:.2f} ms", f"{entry.relative:.1%}"]
        return row


@without_collector
def combination_costs(
    network: nn.Module | Traced,
    example_inputs: Any = None,
    *,
    combinations: Iterable[Iterable[str | int]] | None = None,
    latency: bool = False,
) -> CombinationCosts:
    """Return what every combination of a network's tasks costs: that of the network that `select_tasks` makes of it.

    Tasks are the outputs, or containers of outputs, of the outermost container that holds several. Of up to six tasks
    all combinations are looked at, of more the single ones and all together.

    Args:
        network: from `compile`, `load` or `rewrite`, any `fx.GraphModule`, or what `trace` returned.
        example_inputs: as for `compile`; only needed where `network` does not know its own.
        combinations: look at these, at single tasks and at all together, such as `[("seg", "depth")]`.
        latency: measure it too, in eval mode, on the device that the network is on: the networks of all combinations
            take turns for 20 rounds after a warm-up.

    Raises:
        PlanError: there is no such task, or only one output.
        TraceError: `network` is no graph, or example inputs are missing or do not fit.
    """
    traced = _traced(network, example_inputs)
    value = returned(traced.graph)
    found = combinations_of(value, combinations)
    entries = [CombinationCost(names, costs_of_tasks(traced, names)) for names in found]
    if latency:
        networks = [select_tasks(traced, names, share=True) for names in found]
        device = next((t.device for _, t, _ in traced.state), torch.device("cpu"))
        seconds = take_turns(networks, traced.args, traced.kwargs, ROUNDS, device)
        ratios = np.median(seconds / seconds[-1], axis=1).tolist()
        entries = [
            replace(entry, latency=statistics.median(row), relative=ratio)
            for entry, row, ratio in zip(entries, seconds.tolist(), ratios, strict=True)
        ]
    return CombinationCosts(tuple(entries), len(found) == 2 ** len(tasks_of(value)) - 1)


def combinations_of(value: Any, given: Iterable[Iterable[str | int]] | None = None) -> list[Combination]:
    """Return the combinations to look at, fewest tasks first, all tasks last.

    Args:
        value: what a graph returns.
        given: combinations to look at, besides single tasks and all; None for all combinations, of few tasks.

    Raises:
        PlanError: there is no such task, or only one output.
    """
    tasks = checked_tasks(value, tasks_of(value) or ["0"])
    if given is not None:
        more = [checked_tasks(value, names) for names in given]
    elif len(tasks) <= ALL_SUBSETS:
        more = [names for count in range(2, len(tasks)) for names in subsets(tasks, count)]
    else:
        more = []
    found = dict.fromkeys([*((task,) for task in tasks), *sorted(more, key=len)])
    found.pop(tasks, None)
    return [*found, tasks]


def costs_of_tasks(traced: Traced, tasks: Combination) -> Costs:
    """Return what the network of some tasks costs, exactly, by running its graph on tensors without data."""
    graph = of_tasks(traced.root, traced.graph, tasks)
    part = replace(traced, graph=graph, state=used_state(traced.root, graph))
    record = interpreted(part)
    model = CostModel(record, lambda atoms: atoms, unlabelled(record, part.state))
    return model(np.ones(record.ledger.num_atoms, dtype=bool))


def _traced(network: nn.Module | Traced, example_inputs: Any) -> Traced:
    """Return a network with its example inputs, its graph as it is."""
    if isinstance(network, Traced):
        return network
    if not isinstance(network, fx.GraphModule):
        if example_inputs is None:
            raise TraceError(
                f"this {type(network).__name__} is no graph. Pass what `fxprune.compile` returned, or "
                "`example_inputs=` to trace it with."
            )
        return trace(network, example_inputs)
    if example_inputs is None:
        record = network.meta.get(RECORD)
        if not isinstance(record, Compiled):
            raise TraceError("the network does not know its example inputs. Pass them as to `fxprune.compile`.")
        example_inputs = examples(record.inputs)
    args, kwargs = checked_inputs(network, example_inputs)
    state = used_state(network, network.graph)
    return Traced(network, network, network.graph, args, kwargs, "graph", state=state)
