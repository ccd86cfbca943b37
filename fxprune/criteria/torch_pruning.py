"""Importances of Torch-Pruning, on the groups that fxprune finds: also where Torch-Pruning cannot trace the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fxprune.cloning import clone, submodule
from fxprune.coupling import Coupling
from fxprune.criteria.magnitude import magnitude
from fxprune.errors import PlanError
from fxprune.grouping import Group
from fxprune.shares import Share
from fxprune.tasks import Task, evaluating, run_batch


def torch_pruning_scores(
    coupling: Coupling,
    importance: Callable[[Any], torch.Tensor | None],
    calibration: Iterable[Any] | None,
    tasks: Mapping[str, Task] | None,
) -> np.ndarray:
    """Return what an importance of Torch-Pruning says of each choice of each group.

    The importance is given a `torch_pruning.Group` of the layers that a group of fxprune has sites on, with the
    gradients of the tasks' losses, summed over the calibration batches, in the weights of a copy of the network. One
    that accumulates gradients (`accumulate_grad`) is given those of every batch. Where it answers nothing, because it
    knows none of the layers, the group is ranked by magnitude. What goes along with a choice adds its own score.

    Args:
        coupling: the coupled network.
        importance: such as `torch_pruning.importance.MagnitudeImportance()`.
        calibration: batches of this rank, for importances that read gradients; those of all count.
        tasks: name -> Task, likewise.

    Returns:
        (channels,) scores.

    Raises:
        PlanError: the importance raises, or answers for another number of channels.
    """
    model = _copied(coupling)
    if tasks and calibration is not None:
        _differentiate(coupling, model, importance, calibration, tasks)
    score, rest = np.zeros(coupling.num_channels), magnitude(coupling)
    for group in coupling.groups():
        choices = group.choices
        found = _ask(importance, _group(coupling, group, model), group, len(choices))
        score[choices] = rest[choices] if found is None else found
    return score


def _copied(coupling: Coupling) -> nn.Module:
    """Copy the network: importances read and write gradients."""
    own = {id(t): t.detach().clone() for _, t, _ in coupling.traced.state}
    own |= {id(t): nn.Parameter(own[id(t)], t.requires_grad) for _, t, known in coupling.traced.state if known}
    return clone(coupling.traced.root, own)


def _differentiate(
    coupling: Coupling, model: nn.Module, importance: Any, calibration: Iterable[Any], tasks: Mapping[str, Task]
) -> None:
    network = torch.fx.GraphModule(model, coupling.traced.graph)
    weights = [p for p in model.parameters() if p.is_floating_point()]
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    gathers = hasattr(importance, "accumulate_grad")
    if gathers:
        importance.zero_grad()

    def differentiate(batch: Any) -> Sequence[torch.Tensor | None]:
        with evaluating(network):
            loss = torch.stack(list(run_batch(network, batch, tasks).values())).sum()
            return torch.autograd.grad(loss, weights, allow_unused=True)

    with torch.enable_grad():
        for gradients in Share.of(calibration).every(differentiate):
            for p, gradient in zip(weights, gradients, strict=True):
                known = None if gathers else p.grad
                p.grad = gradient if known is None or gradient is None else known + gradient
            if gathers:
                importance.accumulate_grad(model)


def _ask(importance: Callable[[Any], Any], group: Any, of: Group, count: int) -> np.ndarray | None:
    if not len(group):
        return None
    try:
        found = importance(group)
    except Exception as error:
        raise PlanError(
            f"{type(importance).__name__} of Torch-Pruning raised on the group of {of.name!r}: "
            f"{type(error).__name__}: {error}. Importances that read gradients need `calibration=` and `tasks=`."
        ) from error
    if found is None:
        return None
    if found.ndim != 1 or len(found) < count:
        raise PlanError(
            f"{type(importance).__name__} of Torch-Pruning returned shape {tuple(found.shape)} for the {count} channels"
            f" of the group of {of.name!r}. It must return one number for each."
        )
    return found[:count].double().cpu().numpy()  # longer where a choice has several positions in the first layer


def _group(coupling: Coupling, group: Group, model: nn.Module) -> Any:
    """Return the `torch_pruning.Group` of a group: every layer it has sites on, and which of its positions."""
    from torch_pruning.dependency import Dependency, Group, Node

    items = []
    for module, prune, at in _layers(coupling, model, coupling.choice_of(group)):
        positions = np.flatnonzero(at >= 0)
        items.append((module, prune, positions.tolist(), at[positions].tolist()))
    items.sort(key=lambda item: len(set(item[3])) < group.width)  # the first says how many channels there are
    found: Any = Group()
    for i, (module, prune, positions, roots) in enumerate(items):
        node, root = Node(module, None), Node(items[0][0], None)
        found.add_dep(Dependency(items[0][1], prune, root, node), positions)
        found[i].root_idxs = roots
    return found


def _layers(coupling: Coupling, model: nn.Module, choice_of: np.ndarray) -> Iterator[tuple[nn.Module, Any, np.ndarray]]:
    """Yield (module, pruning function, (positions,) choice or -1) of every layer that has choices."""
    from torch_pruning import ops
    from torch_pruning.pruner.function import PrunerBox

    seen: set[tuple[int, bool]] = set()
    for site in coupling.sites:
        path, _, key = site.name.rpartition(".")
        if key != "weight":
            continue
        module: Any = submodule(model, path)
        transposed = bool(getattr(module, "transposed", False))
        out = site.channels.ndim == 1 or site.dim == (1 if transposed else 0)
        kind = ops.module2type(module)
        if kind not in PrunerBox or (id(module), out) in seen or site.dim > 1:
            continue
        seen.add((id(module), out))
        at = choice_of[site.channels]
        if at.size != at.shape[site.dim]:  # grouped: one row of inputs for each filter
            rows = at.reshape(at.shape[:2])
            at = rows[:: max(len(rows) // module.groups, 1)]
        at = at.ravel()
        if (at >= 0).any():
            box = PrunerBox[kind]
            yield module, box.prune_out_channels if out else box.prune_in_channels, at
