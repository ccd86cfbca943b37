"""Distillation in the benchmark of greedy pruning: from the dense network's answers, which are computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from quality_data import Batch, Table
from quality_problems import GRATING_SCALE, Problem
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, mse_loss
from torch.utils import _pytree as pytree

from fxprune.examples.training import distillation_loss

TEACHER = "teacher"
"""The teacher's answers are targets of this name, with that of the head behind it where there are several."""
TEMPERATURE = 2.0


@torch.no_grad()
def with_answers(table: Table, teacher: nn.Module) -> Table:
    """Add what a network answers to the targets; images are always the same, so that it need answer only once."""
    parts: list[Any] = [teacher.eval()(inputs) for inputs, _ in table.batches(250)]
    whole = pytree.tree_map(lambda *answers: torch.cat(answers), *parts)
    heads = whole if isinstance(whole, Mapping) else {"": whole}
    return Table(table.inputs, {**table.targets, **{TEACHER + head: answers for head, answers in heads.items()}})


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of a classifier's distribution from its teacher's.

    Both of logits (b, classes) over a temperature, mean over images, and not times its square: as in the authors' code
    of HBGS.
    """
    soft = [log_softmax(logits / TEMPERATURE, 1) for logits in (student, teacher)]
    return kl_div(*soft, reduction="batchmean", log_target=True)


def of_two_heads(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Add the loss of gratings, which are numbers, with the teacher's in place of the true ones, to the divergence."""
    gratings = GRATING_SCALE * mse_loss(student["grating"], teacher["grating"])
    return divergence(student["digit"], teacher["digit"]) + gratings


DISTANCES: Mapping[str, Callable[[Any, Any], Tensor]] = {"scenes": distillation_loss, "two-heads": of_two_heads}
"""How far `(student's, teacher's)` outputs are apart, for the networks with several heads."""


def distilling(problem: Problem) -> Problem:
    """Add the distance from the teacher to the losses of a problem."""
    distance = DISTANCES.get(problem.name, divergence)

    def loss(outputs: Any, batch: Batch) -> Tensor:
        heads = {name.removeprefix(TEACHER): t for name, t in batch[1].items() if name.startswith(TEACHER)}
        return distance(outputs, heads.get("", heads))

    return replace(problem, losses={**problem.losses, TEACHER: loss})
