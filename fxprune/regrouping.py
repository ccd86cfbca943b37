"""Pruning-aware merging: channels of several networks, regrouped by which tasks they tell something of."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

import numpy as np

from fxprune.assigning import Sharing, regrouped
from fxprune.erring import share_by_errors
from fxprune.errors import PlanError
from fxprune.information import NOISE, Irrelevance, irrelevance
from fxprune.merging import Merger
from fxprune.observing import features_of, labels_of


@dataclass(frozen=True, slots=True)
class PAM:
    """Share what tells something of several tasks, keep for each what tells of it alone, drop the rest.

    In every group of channels of the networks side by side, each task finds the channels that it can do without. What
    no task needs is dropped; what all others can do without is a task's own; the rest is shared.

    With `estimator="entropy"`, as published, these are the channels that together tell least of the task's target; see
    `fxprune.information`. Weights stay as they are: what is a task's own and would go into the shared part is cut, so
    the merged network is to be trained, and then pruned. A channel's feature is the maximum over its positions where a
    layer first reads it. Targets are made labels of +1 and -1: integers (b,) are class numbers, a label per class; of
    integers (b, ..) the share of each class, and of real values (b,) or (b, n, ..) the mean over positions, are +1
    above their median over the samples; bools, and values that are all +1 and -1, are labels. Each task reads its
    `Task.target`; without, the entry of the targets that is named like the task, or the targets if they are one tensor.

    With `estimator="fisher"`, channels that repeat what others tell go first, whichever network these are of, and the
    others make up for them by least squares; then a task can do without the channels whose plain removal costs its loss
    least. Errors are second-order estimates, scaled to what is measured, see `fxprune.erring`. What is cut is made up
    for too. What transposed convolutions read is each task's own. Needs `tasks=`.

    Attributes:
        alpha: a task can do without channels of a group that together tell so little (nats, summed over labels), or
            cost so little (relative to the task's loss; once for those that are made up for, and once for the others).
            A number, or group name -> number, where groups that are not named are shared. One of `alpha` and `share`
            is given.
        share: a task can do without this share of the channels of each group, from 0 to 1; for "entropy" alone.
        estimator: "entropy" or "fisher".
        samples: how many samples the entropies are estimated on, at most.
        noise: variance of the kernel.

    Source: He et al. (KDD 2021), the regrouping of the authors' code; samples are those of the calibration data.
    """

    alpha: float | Mapping[str, float] | None = None
    share: float | None = None
    estimator: Literal["entropy", "fisher"] = "entropy"
    samples: int = 128
    noise: float = NOISE

    def __post_init__(self) -> None:
        if (self.alpha is None) == (self.share is None):
            raise PlanError("PAM asks for one of `alpha` and `share`. Pass `PAM(alpha=0.1)` or `PAM(share=0.5)`.")
        if self.share is not None and not _is_within(self.share, 0, 1):
            raise PlanError(f"PAM(share={self.share!r}) is no share. Pass a number from 0 to 1.")
        bounds = self.alpha.values() if isinstance(self.alpha, Mapping) else [0 if self.alpha is None else self.alpha]
        if not all(_is_within(bound, 0, math.inf) for bound in bounds):
            raise PlanError(
                f"PAM(alpha={self.alpha!r}) is no bound. Pass a number that is not negative, or group name -> number."
            )
        if not _is_within(self.noise, sys.float_info.min, sys.float_info.max):
            raise PlanError(f"PAM(noise={self.noise!r}) is no variance. Pass a number above 0.")
        if not isinstance(self.samples, Integral) or self.samples < 2:
            raise PlanError(f"PAM(samples={self.samples!r}) is no number of samples. Pass 2 or more.")
        if self.estimator not in ("entropy", "fisher"):
            raise PlanError(f"PAM(estimator={self.estimator!r}) is not known. Pass 'entropy' or 'fisher'.")
        if self.estimator == "fisher" and self.alpha is None:
            raise PlanError("PAM(estimator='fisher') goes by errors. Pass `alpha=0.01`, one percent of the loss.")

    def share_out(self, merger: Merger) -> Sharing:
        """Return who has which channel."""
        _check_groups(self.alpha, [group.name for group in merger.splits.coupling.groups()])
        if self.estimator == "fisher" and self.alpha is not None:
            return share_by_errors(merger, self.alpha)
        labels = [labels_of(merger, task, self.samples) for task in merger.tasks]
        parts = merger.separate()
        for index, features in features_of(merger, self.samples).items():
            group = merger.splits.coupling.groups()[index]
            needless = np.zeros((len(labels), features.shape[1] * features.shape[2]), dtype=bool)
            if not isinstance(self.alpha, Mapping) or group.name in self.alpha:
                for t, known in enumerate(labels):
                    needless[t, self._needless(group.name, irrelevance(features.flatten(1), known, self.noise))] = True
            parts[:, group.cells[0]] = regrouped(needless).reshape(features.shape[1:])
        return Sharing(parts)

    def _needless(self, group: str, found: Irrelevance) -> np.ndarray:
        """Return the channels of a group that a task can do without."""
        if self.alpha is None:
            return found.order[: int((self.share or 0) * len(found.order))]
        return found.below(self.alpha[group] if isinstance(self.alpha, Mapping) else self.alpha)


def _is_within(value: object, least: float, most: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and least <= float(value) <= most


def _check_groups(alpha: object, known: list[str]) -> None:
    unknown = [name for name in alpha if name not in known] if isinstance(alpha, Mapping) else []
    if unknown:
        raise PlanError(f"PAM(alpha=..) names group {unknown[0]!r}, which the networks do not have: {known}.")
