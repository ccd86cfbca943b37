"""A convolution as two, the second 1x1: what its lost filters gave is made up for before anything else reads it.

`conv` becomes `conv`, with fewer outputs and no bias, and a linear 1x1 convolution back to the full width, with the
bias. At first that is the identity; once filters have gone, it holds the coefficients that give their outputs as linear
combinations of the others'. Widths outside of the pair stay, and no batch norm or neighbour is touched. The 1x1
convolution is one more layer, and is counted: where both together would cost more than the convolution alone, the
filters come back and the pair is the one convolution that it was, exactly.

Source: Joo et al., Linearly Replaceable Filters (AAAI 2021), as used by Purohit et al. (TMLR 2024).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune.branches import costs_of
from fxprune.budgets import Budget
from fxprune.calibrations import Calibration
from fxprune.choosing import Chooser
from fxprune.cloning import clone, submodule, unused_name
from fxprune.constraining import Constraints, constrain
from fxprune.costs import CostChange, Costs
from fxprune.coupling import Coupling, close_record, couple
from fxprune.errors import PlanError
from fxprune.layers import fingerprint_of
from fxprune.planning import counted, plan_of
from fxprune.plans import Plan
from fxprune.problems import agreed, gathered, needed
from fxprune.tasks import Task
from fxprune.traced import Traced, copied, taking_part
from fxprune.weighing import weights_of

HOME = "decomposed"
"""Name of the module that holds the 1x1 convolutions, each under the name of its convolution, if it is not taken."""
KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Pair:
    """A convolution and its 1x1 convolution.

    Attributes:
        name: of the convolution.
        channels: (outputs,) between the two.
        alone: macs and params of the convolution alone.
        each: what each channel that stays costs in the pair.
        rest: what the pair costs besides.
        weight: how much it counts over combinations of tasks, where costs tell that.
    """

    name: str
    channels: np.ndarray
    alone: Costs
    each: Costs
    rest: Costs
    weight: float = 1.0

    def wins(self, keep: np.ndarray) -> bool:
        """Say whether the pair takes fewer multiply-accumulates than the convolution alone, at `keep` (channels,)."""
        return int(keep[self.channels].sum()) * self.each.macs < self.alone.macs

    def saved(self, keep: np.ndarray) -> Costs:
        """Return by how much less is spent if the pair becomes one convolution again where that is cheaper."""
        if self.wins(keep):
            return Costs(0, 0, 0)
        width = int(keep[self.channels].sum())
        macs = width * self.each.macs - self.alone.macs
        return Costs(macs, width * self.each.params + self.rest.params - self.alone.params, 0)


class PairedCosts:
    """Costs of a network of pairs, in which those that do not pay are one convolution. Memory is an upper bound."""

    def __init__(self, plain: Any, pairs: Sequence[Pair]) -> None:
        """Wrap the costs of the network in which all pairs are two: `plain` is a `CostModel`."""
        self._plain = plain
        self._pairs = pairs

    def __call__(self, keep: np.ndarray) -> Costs:
        """Return the costs when `keep` (channels,) says which channels stay."""
        costs, saved = self._plain(keep), [(pair.saved(keep), pair.weight) for pair in self._pairs]
        macs, params = sum(s.macs for s, _ in saved), sum(s.params for s, _ in saved)
        less = replace(costs, macs=costs.macs - macs, params=costs.params - params)
        if costs.combined_macs is None or costs.combined_params is None:
            return less
        macs, params = sum(s.macs * weight for s, weight in saved), sum(s.params * weight for s, weight in saved)
        combined = round(costs.combined_macs - macs), round(costs.combined_params - params)
        return replace(less, combined_macs=combined[0], combined_params=combined[1])

    def within(self, keep: np.ndarray, bounds: Mapping[str, float]) -> bool:
        """Say whether the network of the channels `keep` (channels,) costs at most `bounds`."""
        costs = self(keep)
        return all(getattr(costs, name) <= bound for name, bound in bounds.items())

    def __getattr__(self, name: str) -> Any:
        """Return all else from the costs of the network in which all pairs are two."""
        return getattr(self._plain, name)


@dataclass(frozen=True)
class Paired(Coupling):
    """The coupling of a network of pairs: only what lies between the two of a pair may go."""

    pairs: tuple[Pair, ...] = ()

    @cached_property
    def costs(self) -> Any:
        """Costs in which pairs that do not pay are one convolution."""
        return PairedCosts(super().costs, self.pairs)


def candidates(traced: Traced) -> tuple[str, ...]:
    """Return the convolutions that can be pairs: all but the first with a kernel, of one group, called once."""
    calls = [n for n in traced.graph.nodes if n.op == "call_module"]
    module: Any
    weights = [id(t) for _, t in traced.root.named_parameters(remove_duplicate=False)]
    found = []
    for n in calls:
        module = submodule(traced.root, str(n.target))
        if type(module) not in KINDS or module.groups != 1 or module.weight[0, 0].numel() == 1:
            continue
        alone = sum(m.target == n.target for m in calls) == 1 and weights.count(id(module.weight)) == 1
        if alone and not module._forward_hooks and not module._forward_pre_hooks:
            found.append(str(n.target))
    return tuple(found[1:])


def decompose(traced: Traced, names: Iterable[str]) -> Traced:
    """Return the network in which some convolutions are pairs; it computes the same.

    Args:
        traced: the network.
        names: of the convolutions, from `candidates`.
    """
    names = list(names)
    if not names:
        return traced
    root, graph = clone(traced.root), copied(traced.graph)
    home, place = nn.Module(), unused_name(traced.root, HOME)
    root.add_module(place, home)
    for n in [n for n in graph.nodes if n.op == "call_module" and n.target in names]:
        module: Any = submodule(root, str(n.target))
        after = _identity(module)
        module.bias = None
        _place(home, str(n.target)).add_module("after", after)
        with graph.inserting_after(n):
            new = graph.call_module(f"{place}.{n.target}.after", (n,))
        for user in [u for u in n.users if u is not new]:
            user.replace_input_with(n, new)
    model = fx.GraphModule(root, copied(graph), type(traced.model).__name__)
    model.training = traced.model.training
    return replace(traced, model=model, root=root, graph=graph, state=taking_part(root, graph)[0])


def _identity(conv: Any) -> Any:
    """Return a 1x1 convolution that returns what it is given, plus the bias of `conv`."""
    width = conv.out_channels
    after: Any = type(conv)(width, width, 1, bias=conv.bias is not None, device="meta")  # nothing is drawn at random
    weight = torch.eye(width).reshape(after.weight.shape).to(conv.weight)
    after.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    if conv.bias is not None:
        after.bias = conv.bias
    return after.train(conv.training)


def _place(home: nn.Module, name: str) -> nn.Module:
    for key in name.split("."):
        if key not in home._modules:
            home.add_module(key, nn.Module())
        home = submodule(home, key)
    return home


def pair_up(traced: Traced, constraints: Constraints, *, unknown: str) -> Paired:
    """Couple a network of pairs; all channels but those between the two of a pair are frozen.

    Raises:
        PlanError: no convolution can be a pair.
    """
    names = candidates(traced)
    if not names:
        raise PlanError(
            "no convolution of this network can be two: `decompose=True` needs several with a kernel, of one group, "
            "each called once. Use `decompose=False`."
        )
    coupling = couple(decompose(traced, names), unknown=unknown)
    ledger = coupling.record.ledger.copy()
    record = coupling.record
    convs = {n.name: str(n.target) for n in coupling.traced.graph.nodes if n.op == "call_module" and n.target in names}
    made = [record.nodes[n][0].labels[1] for n in convs]
    inner = np.concatenate([ids.ravel() for ids in made if ids is not None])
    held = [(n, t.labels) for n, found in record.nodes.items() if n not in convs for t in found]
    held += [(record.named_at[name], labels) for name, (_, labels, _, _) in record.issued.items()]
    for node, labels in held:
        ledger.node = node
        for ids in labels:
            if ids is not None and not np.isin(ids, inner).any():
                ledger.freeze(ids, "keeps its width: `decompose=True`")
    bound = constrain(close_record(coupling.traced, replace(record, ledger=ledger)), constraints)
    pairs = [_pair(bound, node, name, submodule(traced.root, name)) for node, name in convs.items()]
    if coupling.traced.combinations is not None:
        nodes = weights_of(coupling.traced, coupling.traced.combinations).nodes
        pairs = [replace(pair, weight=nodes.get(node, 0.0)) for node, pair in zip(convs, pairs, strict=True)]
    return Paired(**{f.name: getattr(bound, f.name) for f in fields(bound)}, pairs=tuple(pairs))


def _pair(coupling: Coupling, node: str, name: str, conv: Any) -> Pair:
    """Return the pair of a convolution, which `node` stands for in the network of pairs."""
    channels = coupling.to_channels(coupling.record.nodes[node][0].labels)[1]
    assert channels is not None
    shape = coupling.record.nodes[node][0].shape
    width, positions = conv.out_channels, shape[0] * int(np.prod(shape[2:]))
    filters = conv.weight[0].numel()
    bias = 0 if conv.bias is None else width
    alone = Costs(positions * filters * width, filters * width + bias, 0)
    return Pair(
        name, channels.ravel(), alone, Costs(positions * (filters + width), filters + width, 0), Costs(0, bias, 0)
    )


@dataclass(frozen=True, slots=True)
class Decomposition:
    """A network of pairs, planned.

    Attributes:
        names: the convolutions that are pairs.
        coupling: of the network.
        plan: what stays of it; its costs are compared with those of the network without pairs.
        calibration: what was gathered.
    """

    names: tuple[str, ...]
    coupling: Coupling
    plan: Plan
    calibration: Calibration


def plan_decomposed(
    coupling: Coupling,
    budget: Budget,
    method: Any,
    calibration: Iterable[Any] | Calibration | None,
    tasks: Mapping[str, Task] | None,
    constraints: Constraints | None,
    *,
    on_conflict: str,
    unknown: str,
) -> Decomposition:
    """Search a network of pairs, and keep those that pay.

    Args:
        coupling: of the network as it is.
        budget: counted against it.
        method: with `choose`, such as `HBGS`.
        calibration: batches; of a `Calibration`, its batches.
        tasks: name -> Task.
        constraints: limits on widths.
        on_conflict: as of `plan`.
        unknown: as of `couple`.

    Raises:
        PlanError: no convolution can be a pair, the budget cannot be met or bounds latency, a task cuts outputs down or
            would get worse than its tolerance, or data are missing.
    """
    if budget.latency is not None:
        raise PlanError(
            "the latency model knows nothing of the 1x1 convolutions that `decompose=True` adds. Pass "
            "`decompose=False`, or bound something else."
        )
    if isinstance(calibration, Calibration):
        calibration = agreed(coupling, calibration, tasks)
        calibration, tasks = calibration.batches, calibration.tasks
    for name, task in (tasks or {}).items():
        if task.slice_outputs:
            raise PlanError(
                f"task {name!r} cuts outputs down to its classes, and `decompose=True` keeps what lies outside of its "
                "pairs. Pass `slice_outputs=False`, or `decompose=False`."
            )
    coupling = counted(coupling, replace(budget, latency_model=None))
    dense = coupling.costs.dense
    constraints = constraints or Constraints()
    paired = pair_up(coupling.traced, constraints, unknown=unknown)
    known = gathered(paired, method, needed(type(method).__name__, calibration), tasks)
    chooser = Chooser(paired, method, constraints, known, tasks)
    keep = chooser.keep(budget.bounds(dense), closest=on_conflict == "closest")
    kept = [pair for pair in paired.pairs if pair.wins(keep)]
    names = tuple(pair.name for pair in kept)
    smaller = couple(decompose(coupling.traced, names), unknown=unknown)
    stays = np.ones(smaller.num_channels, dtype=bool)
    for pair in kept:
        site = next(s for s in smaller.sites if s.name == f"{pair.name}.weight" and s.dim == 0)
        stays[site.channels.ravel()[~keep[pair.channels]]] = False
    plan = plan_of(smaller, stays, method=repr(method), budget=budget.to_dict())
    plan = replace(plan, costs=CostChange(dense, costs_of(smaller, stays)))
    return Decomposition(names, smaller, plan, replace(known, fingerprint=fingerprint_of(smaller)))
