"""Sums over the calibration data: what a layer reads and answers to, and what a batch norm normalises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fxprune import sharing
from fxprune.accumulating import ClassTotals, Gram, Spread


@dataclass(frozen=True, slots=True)
class Layer:
    """How a weight is used: as `blocks` linear maps side by side, each from `inputs` numbers to `outputs`.

    Attributes:
        name: of the weight.
        blocks: groups of a grouped convolution, else 1.
        inputs: channels that go into each.
        outputs: channels that come out of each.
        taps: kernel positions; a linear layer has one.
        bias: name of the bias that is added, if one is.
    """

    name: str
    blocks: int
    inputs: int
    outputs: int
    taps: int
    bias: str | None


@dataclass(slots=True)
class Sums:
    """Sums over positions; every field is added to batch by batch.

    Attributes:
        layer: whose.
        shared_taps: each tap of the kernel counts as a position of its own.
        inputs: of what goes in, (blocks, positions, n), n = inputs * taps, or inputs where taps share a moment.
        outputs: task -> of g, (blocks, positions, outputs), the gradient of one sample's loss at one position.
        norm: running mean of the batch norm that what comes out goes straight into, if it does.
        classes: task -> of what goes in, by class; empty where classes are not told apart.
    """

    layer: Layer
    shared_taps: bool
    inputs: Gram = field(default_factory=Gram)
    outputs: dict[str, Gram] = field(default_factory=dict)
    norm: str | None = None
    classes: dict[str, ClassTotals] = field(default_factory=dict)


def renumber(mine: Mapping[str, Sums], numbers: Mapping[str, Sequence[int]]) -> None:
    """Number classes in place as all ranks do, where each has numbered them as they occurred to it.

    Args:
        mine: the sums of this rank.
        numbers: task -> the classes in the order of their numbers here.
    """
    if sharing.size() == 1:
        return
    parts = sharing.gather("classes", {task: list(classes) for task, classes in numbers.items()})
    for task, classes in numbers.items():
        of_all = list(dict.fromkeys(c for part in parts for c in part.get(task, [])))
        places = [of_all.index(c) for c in classes]
        for sums in mine.values():
            if task in sums.classes:
                sums.classes[task] = sums.classes[task].at(places, len(of_all))


def sums_of_all(mine: Mapping[str, Sums]) -> dict[str, Sums]:
    """Return what all ranks have summed at each weight, added up in place."""
    if sharing.size() == 1:
        return dict(mine)
    tensors: dict[tuple[str, str | None, int], torch.Tensor] = {}
    for name, sums in mine.items():
        for task, gram in {None: sums.inputs, **sums.outputs}.items():
            tensors |= {(name, task, i): t for i, t in enumerate(gram.sums)}
        for task, totals in sums.classes.items():
            tensors |= {(name, task, 2): totals.total, (name, task, 3): totals.count}
    about = {name: (s.layer, s.shared_taps, s.inputs.rows, s.norm) for name, s in mine.items()}
    found: dict[str, Sums] = {}
    for part in sharing.gather("layers", about):
        for name, (layer, shared_taps, rows, norm) in part.items():
            found.setdefault(name, Sums(layer, shared_taps, norm=norm)).inputs.rows += rows
    summed = sharing.total("moments", tensors)
    for name, task, which in summed:
        if which == 0:
            gram = found[name].inputs if task is None else found[name].outputs.setdefault(task, Gram())
            gram.sums = summed[name, task, 0], summed[name, task, 1]
        elif which == 2 and task is not None:
            totals = found[name].classes.setdefault(task, ClassTotals())
            totals.total, totals.count = summed[name, task, 2], summed[name, task, 3]
    return found


def gram_of_all(name: str, mine: Gram) -> Gram:
    """Return what all ranks have summed at one layer, added up in place."""
    if sharing.size() == 1:
        return mine
    found = sharing.total(name, dict(enumerate(mine.sums)) if mine.rows else {})
    mine.sums, mine.rows = (found[0], found[1]), sum(sharing.gather(name, mine.rows))
    return mine


def spreads_of_all(mine: Mapping[str, Spread]) -> dict[str, Spread]:
    """Return what all ranks have summed at each batch norm, added up."""
    if sharing.size() == 1:
        return dict(mine)
    found: dict[str, Spread] = {}
    for part in sharing.gather("batch norms", {name: spread.count for name, spread in mine.items()}):
        for name, count in part.items():
            found.setdefault(name, Spread()).count += count
    tensors = {(name, "total"): spread.total for name, spread in mine.items()}
    tensors |= {(name, "squares"): spread.squares for name, spread in mine.items()}
    for (name, which), value in sharing.total("batch norms", tensors).items():
        setattr(found[name], which, value)
    return found
