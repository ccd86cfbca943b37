"""Fit a layer to answers: least squares from moments, and how far a layer is from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxprune.accumulating import Gram
from fxprune.eliminating import damped_solve

STEPS = (1, 10, 100, 1000)
"""How many times the damping is tried, where data are few."""
STILL = 1e-4
"""Values that vary by less than this share of their mean square are no better than constants."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Moments of what a layer reads and of what it should answer, in float64.

    Attributes:
        rows: how many of both were seen.
        own: (blocks, n, n) of what it reads.
        across: (blocks, n, outputs) of both.
        read: (blocks, n) mean of what it reads; zero where moments are not centred.
        wanted: (blocks, outputs) mean of what it should answer.
        size: (blocks,) mean square of what it reads, means included.
    """

    rows: int
    own: torch.Tensor
    across: torch.Tensor
    read: torch.Tensor
    wanted: torch.Tensor
    size: torch.Tensor

    @staticmethod
    def of(grams: Sequence[Gram], n: int, *, centred: bool) -> Answers:
        """Return the moments of several sums over (blocks, rows, n + outputs) together.

        Args:
            grams: they can be read again.
            n: how many of a row are read, and not answered.
            centred: a constant in the answer is taken up.
        """
        rows = sum(gram.rows for gram in grams)
        second, mean = (torch.stack(parts).sum(0) / rows for parts in zip(*(g.sums for g in grams), strict=True))
        second = torch.tril(second) + torch.tril(second, -1).transpose(1, 2)
        size = second.diagonal(dim1=1, dim2=2)[:, :n].mean(1)
        if centred:
            second = second - mean[:, :, None] * mean[:, None, :]
        return Answers(rows, second[:, :n, :n], second[:, :n, n:], mean[:, :n], mean[:, n:], size)

    def fitted(self, weight: torch.Tensor, damping: float) -> torch.Tensor:
        """Return the weight (blocks, n, outputs) of least squared error, drawn to a given one by the damping.

        The damping is a share of the mean diagonal of what is read; what hardly varies for its size is taken for a
        constant, of which nothing can be told.
        """
        change = [
            damped_solve(own, damping * max(float(own.diagonal().mean()), STILL * float(size)), missing)
            for own, missing, size in zip(self.own, self.across - self.own @ weight, self.size, strict=True)
        ]
        return weight + torch.stack(change)

    def error(self, weight: torch.Tensor) -> float:
        """Return the mean squared error of a weight, less what no weight can change."""
        return float((weight * (self.own @ weight - 2 * self.across)).sum())

    def bias(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the bias (outputs,) that goes with a weight."""
        return (self.wanted - torch.einsum("bn,bno->bo", self.read, weight)).flatten()


def best_fit(weight: torch.Tensor, most: Answers, others: Answers, every: Answers, damping: float) -> torch.Tensor:
    """Return a weight fitted to all answers, with the damping whose fit to most of them is nearest to the others.

    Args:
        weight: (blocks, n, outputs), what fits are drawn to.
        most: answers to fit to.
        others: answers to check on.
        every: both.
        damping: the least.
    """
    errors = {damping * step: others.error(most.fitted(weight, damping * step)) for step in STEPS}
    return every.fitted(weight, min(errors, key=errors.__getitem__))
