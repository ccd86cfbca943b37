"""Which class each sample or position of a batch is of, as far as tasks have labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fxprune.errors import PlanError
from fxprune.subtasks import are_numbers, part_of, renumbered, targets_of
from fxprune.tasks import Task


@dataclass(frozen=True)
class Memberships:
    """The classes of one batch.

    Attributes:
        labels: class numbers (b, ..) from 0, negative for no class; or (b, classes, ..), which classes a sample has.
        count: how many classes there are so far.
    """

    labels: torch.Tensor
    count: int

    @cached_property
    def of_samples(self) -> torch.Tensor:
        """(b, classes) float64: the share of each sample that is of a class."""
        labels = self.labels
        if not are_numbers(labels):
            return labels.double().flatten(2).mean(2) if labels.ndim > 2 else labels.double()
        labels = labels.flatten(1) if labels.ndim > 1 else labels[:, None]
        found = torch.zeros(len(labels), self.count + 1, dtype=torch.float64, device=labels.device)
        here = torch.where(labels >= 0, labels, self.count)
        found.scatter_add_(1, here, torch.ones_like(here, dtype=torch.float64))
        return found[:, :-1] / labels.shape[1]

    def at(self, places: tuple[torch.Tensor, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """Return (places, classes) float64: the class at the centre of each place, or the sample's where none has one.

        Args:
            places: one index per dim, the first of samples.
            sizes: of these dims; labels may have more or fewer positions.
        """
        labels = self.labels
        if not are_numbers(labels) or labels.ndim == 1 or labels.ndim != len(sizes):
            return self.of_samples[places[0].to(labels.device)]
        index = [places[0].to(labels.device)]
        for place, size, there in zip(places[1:], sizes[1:], labels.shape[1:], strict=True):
            index.append(((place.to(labels.device) * 2 + 1) * there).div(2 * size, rounding_mode="floor"))
        return Memberships(labels[tuple(index)], self.count).of_samples


@dataclass(slots=True)
class LabelReader:
    """Reads the labels of tasks from batches, and numbers classes in the order they occur.

    Attributes:
        tasks: name -> Task; without any, the targets of a batch are the labels.
    """

    tasks: Mapping[str, Task] | None
    _known: dict[str, dict[int, int]] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[str, list[int]]:
        """Task -> its classes so far, in the order of their numbers."""
        return {name: list(known) for name, known in self._known.items()}

    def read(self, batch: Any) -> dict[str, Memberships]:
        """Return task -> memberships, of the tasks that have labels: integers, or others where classes are given.

        Raises:
            PlanError: no task has labels.
        """
        tasks = self.tasks or {"labels": Task(lambda outputs, batch: outputs)}
        found = {}
        for name, task in tasks.items():
            labels = self._labels(batch, task)
            if labels is not None:
                found[name] = self._numbered(name, labels, task)
        if not found:
            raise PlanError(
                f"no task of {list(tasks)} has class labels. Pass `Task(loss, target=...)` for the entry of a batch's "
                "targets that holds integer class numbers, or `classes=[...]` where labels are memberships."
            )
        return found

    def _labels(self, batch: Any, task: Task) -> torch.Tensor | None:
        targets = targets_of(batch)
        try:
            labels = part_of(targets, task.target, "target")
        except PlanError:
            if task.target is None and task.classes is None:
                return None
            raise
        wanted = are_numbers(labels) or (task.classes is not None and labels.ndim > 1)
        return labels.detach() if wanted and labels.ndim else None

    def _numbered(self, name: str, labels: torch.Tensor, task: Task) -> Memberships:
        if task.classes is not None:
            self._known[name] = {c: i for i, c in enumerate(task.classes)}
            return Memberships(renumbered(labels, task.classes), len(task.classes))
        known = self._known.setdefault(name, {})
        values, inverse = labels.unique(return_inverse=True)
        for value in values[values >= 0].tolist():
            known.setdefault(int(value), len(known))
        new = torch.tensor([known.get(int(v), -1) for v in values.tolist()], device=labels.device)
        return Memberships(new[inverse].reshape(labels.shape), len(known))
