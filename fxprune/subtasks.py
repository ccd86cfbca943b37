"""Classes of samples: where a batch holds its labels, which samples are of some classes, and outputs for these alone.

Labels are of one of three forms. Class numbers of samples, an integer (b,); class numbers of positions, an integer
(b, ..), as in segmentation; or floating or bool (b, classes, ..), which of the classes a sample has. A number that
is negative or not wanted is of no class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import torch

from fxprune.errors import PlanError
from fxprune.values import tensors_in

IGNORED = -100
"""The number of what is of no class, once classes are numbered anew: what `cross_entropy` passes over."""

Key = str | int


def part_of(value: Any, key: Key | None, what: str) -> torch.Tensor:
    """Return a tensor of outputs or targets: the one of a key, or the only one there is.

    Args:
        value: a tensor, or a mapping, sequence or dataclass of tensors.
        key: which; None for the only one.
        what: what it is for, for the message: "output" or "target".

    Raises:
        PlanError: there is no such tensor, or more than one.
    """
    found = tensors_in(value) if key is None else tensors_in(_item(value, key))
    if len(found) != 1:
        names = list(value) if isinstance(value, Mapping) else f"{len(tensors_in(value))} tensors"
        asked = f"Task({what}=...) is needed to say which" if key is None else f"Task({what}={key!r}) names none"
        raise PlanError(f"the {what}s are a {type(value).__name__} of {names}, and {asked}.")
    return found[0]


def _item(value: Any, key: Key) -> Any:
    if isinstance(value, Mapping):
        return value.get(key)
    if isinstance(value, (tuple, list)) and isinstance(key, int):
        return value[key] if -len(value) <= key < len(value) else None
    return getattr(value, key, None) if isinstance(key, str) else None


def targets_of(batch: Any) -> Any:
    """Return the targets of a batch `(inputs, targets)`.

    Raises:
        PlanError: it has none.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise PlanError(f"a calibration batch is a {type(batch).__name__} without labels. Pass `(inputs, targets)`.")
    return batch[1]


def are_numbers(labels: torch.Tensor) -> bool:
    """Say whether labels are class numbers, not which classes a sample has."""
    return not labels.is_floating_point() and labels.dtype != torch.bool


def renumbered(labels: torch.Tensor, classes: Sequence[int]) -> torch.Tensor:
    """Return labels for some classes alone: numbers counted from 0 in their order, as int64, `IGNORED` for others.

    Raises:
        PlanError: memberships without these classes, such as class numbers as floats.
    """
    if not are_numbers(labels):
        if labels.ndim < 2 or labels.shape[1] <= max(classes):
            raise PlanError(
                f"Task(classes={list(classes)}): the labels are {labels.dtype} of shape {tuple(labels.shape)}. Pass "
                "class numbers (b, ..) as integers, or memberships (b, classes, ..) as floats, of all classes."
            )
        return labels.index_select(1, torch.tensor(classes, device=labels.device))
    labels = labels.long()  # unsigned ones have no negative numbers
    new = torch.full_like(labels, IGNORED)
    for i, number in enumerate(classes):
        new[labels == number] = i
    return new


def has_some(labels: torch.Tensor) -> torch.Tensor:
    """Return (b,) which samples have a class, of renumbered labels; one that lacks all classes still answers."""
    if not are_numbers(labels):
        return torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    return (labels >= 0).flatten(1).any(1) if labels.ndim > 1 else labels >= 0


def exchanged(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a value of the same structure with a function of each of its tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: exchanged(item, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(exchanged(item, function) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(exchanged(item, function) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        fields = {name: exchanged(getattr(value, name), function) for name in value.__dataclass_fields__}
        return replace(value, **fields)
    return value


def samples_where(value: Any, keep: torch.Tensor) -> Any:
    """Return the samples of a batch, or of outputs, for which `keep` (b,) is true."""
    if bool(keep.all()):
        return value

    def cut(t: torch.Tensor) -> torch.Tensor:
        return t[keep.to(t.device)] if t.ndim and len(t) == len(keep) else t

    return exchanged(value, cut)


def rows_for(logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[int]) -> torch.Tensor:
    """Return the rows of some classes, (b, classes, ..), of logits for all classes, or for these alone.

    Raises:
        PlanError: the logits do not fit the classes or the labels.
    """
    expected = labels.ndim + are_numbers(labels)
    if logits.ndim != expected:
        raise PlanError(
            f"the labels have shape {tuple(labels.shape)} and the outputs {tuple(logits.shape)}. Pass class numbers "
            "(b, ..) as integers or memberships (b, classes, ..) as floats, and outputs (b, classes, ..)."
        )
    if logits.shape[1] == len(classes):
        return logits
    if logits.shape[1] <= max(classes):
        raise PlanError(
            f"Task(classes={list(classes)}): the outputs are of shape {tuple(logits.shape)}, which has no row for "
            f"class {max(classes)}. Pass classes below {logits.shape[1]}, or `output=` for another output."
        )
    return logits.index_select(1, torch.tensor(classes, device=logits.device))


def loss_on(
    loss: Callable[[Any, Any], torch.Tensor],
    outputs: Any,
    batch: Any,
    classes: Sequence[int],
    output: Key | None,
    target: Key | None,
) -> torch.Tensor:
    """Return a loss of some classes alone.

    The loss sees the samples of these classes, their rows of the outputs, and their labels counted from 0; positions
    of other classes are `IGNORED`. It is averaged over the whole batch, where samples that were left out count zero.

    Args:
        loss: `(outputs, batch) -> scalar tensor`, a mean over samples.
        outputs: for all classes, or for these alone.
        batch: `(inputs, targets)`, the labels as they came.
        classes: ascending.
        output: which of the outputs holds the logits.
        target: which of the targets holds the labels.
    """
    logits, labels = part_of(outputs, output, "output"), part_of(targets_of(batch), target, "target")
    rows, new = rows_for(logits, labels, classes), renumbered(labels, classes)
    keep = has_some(new)
    left = int(keep.sum())
    if not left:
        return 0.0 * logits.sum()
    outputs = samples_where(exchanged(outputs, lambda t: rows if t is logits else t), keep)
    batch = samples_where(exchanged(batch, lambda t: new if t is labels else t), keep)
    found = loss(outputs, batch)
    return found if left == len(keep) else found * (left / len(keep))
