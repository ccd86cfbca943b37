"""The network of some tasks, out of a network of several."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import fx, nn

from fxprune.cloning import Cloner
from fxprune.errors import TraceError
from fxprune.outputs import checked_tasks, of_tasks, returned
from fxprune.pausing import without_collector
from fxprune.reporting import Compiled
from fxprune.slicing import copied_like
from fxprune.slimming import EXACT, RECORD, SlimModule, only_used
from fxprune.traced import Traced, used_state


@without_collector
def select_tasks(network: nn.Module | Traced, tasks: Iterable[str | int], *, share: bool = False) -> fx.GraphModule:
    """Return the network of some tasks: what the others need alone is gone from it.

    Tasks are outputs, and are called as in a verification: by the key of a dict, the field of a dataclass or the
    position in a tuple, `aux.0` for the first of what `aux` holds, and `aux` for all of it. A dict loses the other
    keys; in a tuple, list or dataclass None takes the place of the others, so that every output keeps its name.

    The outputs of the tasks are the same to the bit, parameters keep their names, and inputs that are no longer needed
    stay in the signature. In train mode, random numbers are drawn for what is left only, and a batch norm that several
    tasks call gathers statistics over the calls that are left.

    Args:
        network: from `compile`, `load` or `rewrite`; any `fx.GraphModule`; or what `trace` returned. It is not touched.
        tasks: names of outputs. Positions may be whole numbers.
        share: hold the parameters and buffers of `network` instead of copies of them, so that several selections take
            the memory of one. To train one is to train them all then.

    Returns:
        A module that trains, copies, saves and exports like a slim network. If `network` carries a report, so does it,
        and `save` and `load` know which tasks it is for.

    Raises:
        PlanError: there is no such task (the message lists them), or only one output.
        TraceError: `network` is no graph, or packs its outputs in a way of its own.

    Example:
        >>> slim = fxprune.compile(model, x, fxprune.Budget(macs=0.5))  # doctest: +SKIP
        >>> depth = fxprune.select_tasks(slim, ["depth"])  # doctest: +SKIP
        >>> depth(x)  # doctest: +SKIP
        {'depth': tensor(...)}
    """
    root, graph = graph_of(network)
    names = checked_tasks(returned(graph), tasks)
    graph = of_tasks(root, graph, names)
    state = [t for _, t, _ in used_state(root, graph)]
    held = {id(t): t if share else copied_like(t, t.detach().clone()) for t in state}
    holder = only_used(root, graph, Cloner(root, held))
    _drop_hooks_of_export(holder)
    module = SlimModule(holder, graph)
    module.meta.update(_meta(getattr(network, "meta", {}), module, names))
    return module


def graph_of(network: nn.Module | Traced) -> tuple[nn.Module, fx.Graph]:
    """Return the graph of a network and the module that it runs on.

    Raises:
        TraceError: it is no graph.
    """
    if isinstance(network, Traced):
        return network.root, network.graph
    if isinstance(network, fx.GraphModule):
        return network, network.graph
    raise TraceError(
        f"this {type(network).__name__} is no graph. Pass what `fxprune.compile` returned, or "
        "`fxprune.trace(model, example_inputs)`."
    )


def _drop_hooks_of_export(module: nn.Module) -> None:
    """Take off the hooks by which `torch.export` checks inputs: they ask for attributes of its own module."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if getattr(hook, "__module__", "").startswith("torch.export."):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _meta(meta: dict[str, Any], module: nn.Module, tasks: tuple[str, ...]) -> dict[str, Any]:
    """Return what a selection notes down of what the whole network has: its record, and values before rounding."""
    found = dict(meta)
    if EXACT in meta:
        left = dict(module.named_parameters())
        found[EXACT] = {name: value for name, value in meta[EXACT].items() if name in left}
    if RECORD in meta:
        found[RECORD] = of_selection(meta[RECORD], tasks)
    return found


def of_selection(record: Compiled, tasks: tuple[str, ...]) -> Compiled:
    """Return the record of the network of some tasks, from that of the whole."""
    report = record.report
    notes = tuple(note for note in report.notes if not note.startswith(NOTE))
    note = f"{NOTE} {', '.join(tasks)}; plan, costs and verification are those of the network of all tasks"
    return replace(record, report=replace(report, notes=(*notes, note)), tasks=tasks)


NOTE = "this is the network of the tasks"
"""How the note of a report begins that says which tasks were selected."""
