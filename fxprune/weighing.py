"""How much counts of what a network does, where it runs some of its tasks now and others later.

A combination of tasks runs the nodes that any of them needs. So what a network costs over combinations is a weighted
sum of what its nodes cost: a node weighs as much as the share of the combinations that run it, and a parameter as much
as the share of those that hold it. The most that any combination costs is what all tasks together cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fxprune.errors import PlanError
from fxprune.outputs import checked_tasks, of_tasks, returned, tasks_of
from fxprune.traced import Shares, Traced, used_state

Combinations = str | Mapping[tuple[str | int, ...], float]
"""Over which combinations of tasks is counted: "mean", "max", or names of tasks -> share."""
PASS = '`combinations="mean"`, `"max"` or shares such as `{("seg",): 0.5, ("seg", "depth"): 0.5}`'


@dataclass(frozen=True, slots=True)
class Weights:
    """The share of all combinations that each part of a network counts in, at most 1.

    Attributes:
        nodes: node -> the share that run it; those that none runs may be missing.
        state: parameter or buffer -> the share that hold it.
    """

    nodes: Mapping[str, float]
    state: Mapping[str, float]


def check_combinations(combinations: object) -> None:
    """Check that combinations are of the right type.

    Raises:
        PlanError: they are not, or a share is no positive number.
    """
    if isinstance(combinations, str) and combinations in ("mean", "max"):
        return
    if not isinstance(combinations, Mapping):
        raise PlanError(f"combinations={combinations!r} is not known. Pass {PASS}.")
    if not combinations:
        raise PlanError(f"combinations={{}} names no combination. Pass {PASS}.")
    for tasks, share in combinations.items():
        if not isinstance(tasks, tuple) or not tasks:
            raise PlanError(f"combinations has the key {tasks!r}, not a tuple of names of tasks. Pass {PASS}.")
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < float("inf"):
            raise PlanError(
                f"combinations gives {tasks!r} the share {share!r}, which is not a positive number. Leave out the "
                "combinations that never run; shares need not add up to 1."
            )


def shares_of(traced: Traced, combinations: Combinations) -> Shares:
    """Return combinations as those of a network: "mean", "max", or tasks -> share of all, which add up to 1.

    Raises:
        PlanError: there is no such task, or only one output.
    """
    value = returned(traced.graph)
    if isinstance(combinations, str):
        checked_tasks(value, tasks_of(value) or ["0"])
        return combinations
    total, found = sum(combinations.values()), {}
    for tasks, share in combinations.items():
        names = checked_tasks(value, tasks)
        found[names] = found.get(names, 0.0) + share / total
    return tuple(found.items())


def described(traced: Traced, combinations: Combinations) -> str:
    """Say in words what is counted over combinations, for a report."""
    shares = shares_of(traced, combinations)
    if isinstance(shares, str):
        names = tasks_of(returned(traced.graph))
        count = f"the {2 ** len(names) - 1:,} combinations of the tasks {', '.join(names)}"
        what = f"means over {count}" if shares == "mean" else f"the most that any of {count} takes"
    else:
        what = "means over combinations of tasks: " + ", ".join(f"{' + '.join(t)} {share:.1%}" for t, share in shares)
    return f"combined_macs and combined_params are {what}"


def weights_of(traced: Traced, shares: Shares) -> Weights:
    """Return how much each node and parameter of a network counts, at shares from `shares_of`."""
    value = returned(traced.graph)
    tasks = tasks_of(value) if isinstance(shares, str) else list(dict.fromkeys(t for names, _ in shares for t in names))
    nodes: dict[str, set[str]] = {}
    tensors: dict[int, set[str]] = {}
    for task in tasks:
        graph = of_tasks(traced.root, traced.graph, (task,))
        for n in graph.nodes:
            nodes.setdefault(n.name, set()).add(task)
        for _, tensor, _ in used_state(traced.root, graph):
            tensors.setdefault(id(tensor), set()).add(task)
    weigh = _weigher(shares, len(tasks))
    return Weights(
        {name: weigh(needing) for name, needing in nodes.items()},
        {name: weigh(tensors.get(id(tensor), ())) for name, tensor, _ in traced.state},
    )


def _weigher(shares: Shares, count: int) -> Callable[[Iterable[str]], float]:
    """Return what tells the share of the combinations, of `count` tasks, in which any of some tasks is."""

    def weigh(needing: Iterable[str]) -> float:
        some = set(needing)
        if not isinstance(shares, str):
            return sum(share for names, share in shares if not some.isdisjoint(names))
        return float(bool(some)) if shares == "max" else (2**count - 2 ** (count - len(some))) / (2**count - 1)

    return weigh
