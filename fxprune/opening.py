"""Outputs whose rows may go: those for the classes that a plan leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fxprune.coupling import Coupling, close_record
from fxprune.errors import ArtifactError, PlanError
from fxprune.labels import fix
from fxprune.subtasks import exchanged, part_of
from fxprune.tasks import Task, evaluating, inputs_of
from fxprune.verifying import named_outputs

Classes = Mapping[str, tuple[int, ...]]
"""Output -> the classes that its rows (dim 1) stand for, in order."""
REASON = "is an output of the network"


def classes_of(coupling: Coupling, tasks: Mapping[str, Task] | None) -> Classes:
    """Return the classes that outputs are cut down to: of the tasks that say so.

    Raises:
        PlanError: an output that does not have these classes, or two tasks that ask for different ones.
    """
    slicing = {name: task for name, task in (tasks or {}).items() if task.slice_outputs}
    if not slicing:
        return {}
    outputs = _outputs(coupling)
    names = {id(t): name for name, t in named_outputs(outputs).items()}
    found: dict[str, tuple[int, ...]] = {}
    for name, task in slicing.items():
        logits, classes = part_of(outputs, task.output, "output"), tuple(task.classes or ())
        if logits.ndim < 2 or logits.shape[1] <= max(classes):
            raise PlanError(
                f"task {name!r}: the output has shape {tuple(logits.shape)}, and no row for class {max(classes)} along "
                "dim 1. Pass classes that it has, or `output=` for another output."
            )
        if found.setdefault(names[id(logits)], classes) != classes:
            raise PlanError(
                f"two tasks cut output {names[id(logits)]!r} down to different classes. Pass the same ones."
            )
    for name, task in (tasks or {}).items():
        output = None if task.classes is None else names.get(id(part_of(outputs, task.output, "output")))
        if output in found and task.classes != found[output]:
            raise PlanError(_read_by(name, output))
    return found


def check_losses(coupling: Coupling, classes: Classes, tasks: Mapping[str, Task], batch: Any) -> None:
    """Check that tasks for all classes do not read rows that go: on one batch, their losses have no slope in these.

    Raises:
        PlanError: one does.
    """
    module, (args, kwargs) = coupling.traced.module, inputs_of(batch)
    with torch.no_grad(), evaluating(module):
        outputs = module(*args, **kwargs)
    cut = {name: t for name, t in named_outputs(outputs).items() if name in classes}
    for name, task in tasks.items():
        if task.classes is not None:
            continue
        with torch.enable_grad():
            leaves = {id(t): t.clone().requires_grad_() for t in cut.values()}
            loss = task(exchanged(outputs, lambda t, leaves=leaves: leaves.get(id(t), t)), batch)
            if not loss.requires_grad:
                continue
            slopes = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
        for output, slope in zip(cut, slopes, strict=True):
            gone = [c for c in range(cut[output].shape[1]) if c not in classes[output]]
            if slope is not None and slope[:, gone].any():
                raise PlanError(_read_by(name, output))


def _read_by(task: str, output: str) -> str:
    return (
        f"task {task!r} reads rows of output {output!r} that another cuts off. Pass the same `classes=` to both, or "
        "`slice_outputs=False`."
    )


def opened(coupling: Coupling, classes: Classes) -> Coupling:
    """Return a coupling in which the rows of some outputs may go, as far as nothing else holds them.

    Args:
        coupling: of the whole network.
        classes: output -> classes; as it is where there are none.

    Raises:
        ArtifactError: the network has no such output, or no such classes.
    """
    if not classes:
        return coupling
    places = _places(coupling, classes)
    ledger = coupling.record.ledger.copy()
    node = _output_node(coupling)
    ledger.freezes, ledger.node = [f for f in ledger.freezes if f.node != node], node
    for i, t in enumerate(coupling.record.nodes[node]):
        for d in range(len(t.shape)):
            if not (i in places and d == 1):
                fix(ledger, t.labels, d, REASON)
    return close_record(coupling.traced, replace(coupling.record, ledger=ledger))


def rows_that_stay(coupling: Coupling, classes: Classes) -> np.ndarray:
    """Return what stays, (channels,), of an opened coupling without the rows of all other classes.

    Raises:
        PlanError: rows cannot go, with the reason.
    """
    keep = np.ones(coupling.num_channels, dtype=bool)
    wanted = np.zeros(coupling.num_channels, dtype=bool)
    for place, (name, rows) in _places(coupling, classes).items():
        t = coupling.at(_output_node(coupling))[place]
        ids = t.labels[1]
        if ids is None or ids.size != t.shape[1] or (ids < 0).any():
            raise PlanError(_held(name, "they are no channels of their own, or differ from position to position"))
        ids = ids.ravel()
        gone = np.ones(len(ids), dtype=bool)
        gone[list(rows)] = False
        for f in coupling.fixed:
            if np.isin(f.channels, ids[gone]).any():
                raise PlanError(_held(name, f"node {f.node!r}{coupling.traced.where(f.node)} {f.reason}"))
        keep[ids[gone]], wanted[ids[~gone]] = False, True
    keep = coupling.settle(keep)
    problem = coupling.violation(keep)
    if problem or not keep[wanted].all():
        raise PlanError(_held(", ".join(classes), problem or "rows for the classes wanted would go with them"))
    return keep


def _held(output: str, why: str) -> str:
    return f"the rows of output {output!r} cannot be cut: {why}. Pass `slice_outputs=False` to keep them all."


def _outputs(coupling: Coupling) -> Any:
    traced = coupling.traced
    with torch.no_grad(), evaluating(traced.module):
        return traced.module(*traced.args, **traced.kwargs)


def _output_node(coupling: Coupling) -> str:
    return next(n.name for n in coupling.traced.graph.nodes if n.op == "output")


def _places(coupling: Coupling, classes: Classes) -> dict[int, tuple[str, tuple[int, ...]]]:
    """Return, for outputs by their place among all tensors that come out, their names and classes."""
    outputs = list(named_outputs(_outputs(coupling)).items())
    found = {i: (name, classes[name]) for i, (name, _) in enumerate(outputs) if name in classes}
    missing = [name for name in classes if name not in dict(outputs)]
    if missing:
        raise ArtifactError(f"the plan cuts output {missing[0]!r}, and this network has {list(dict(outputs))}.")
    for i, (name, rows) in found.items():
        shape = tuple(outputs[i][1].shape)
        if len(shape) < 2 or shape[1] <= max(rows):
            raise ArtifactError(f"output {name!r}: the plan keeps class {max(rows)}, and its shape is {shape}.")
    return found
