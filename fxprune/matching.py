"""Which channels of several networks differ least, and the weights of least squared error for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fxprune.eliminating import DAMPING, damped_inverse, damped_solve


@dataclass(frozen=True, slots=True)
class Maker:
    """What makes the channels of a group, in every network.

    Attributes:
        weights: networks x (channels, copies, n).
        seconds: networks x (n, n) moments of what is read.
    """

    weights: list[torch.Tensor]
    seconds: list[torch.Tensor]


def match(makers: list[Maker], count: int) -> np.ndarray:
    """Return (count, networks): which channels of the networks are merged with each other.

    Args:
        makers: the layers that make them.
        count: how many channels to merge.
    """
    networks = len(makers[0].weights)
    chosen = np.arange(len(makers[0].weights[0]))[:, None]
    merged = [(m.weights[0], m.seconds[0]) for m in makers]
    for t in range(1, networks):
        cost = sum(distances(w, h, m.weights[t], m.seconds[t]) for (w, h), m in zip(merged, makers, strict=True))
        pairs = cheapest(torch.as_tensor(cost).numpy(), count)
        chosen = np.concatenate([chosen[pairs[:, 0]], pairs[:, 1:]], 1)
        mine, theirs = torch.from_numpy(pairs[:, 0]), torch.from_numpy(pairs[:, 1])
        merged = [
            (joint([w[mine], m.weights[t][theirs]], [h, m.seconds[t]]), h + m.seconds[t])
            for (w, h), m in zip(merged, makers, strict=True)
        ]
    return chosen


def distances(a: torch.Tensor, h_a: torch.Tensor, b: torch.Tensor, h_b: torch.Tensor) -> torch.Tensor:
    """Return (i, j) the least squared error of one weight for a[i] and b[j], each (channels, copies, n)."""
    inverse = damped_inverse(h_a, _level(h_a)) + damped_inverse(h_b, _level(h_b))
    metric = torch.linalg.inv(inverse)
    metric = (metric + metric.T) / 2
    own = [torch.einsum("icn,nm,icm->i", w, metric, w) for w in (a, b)]
    return ((own[0][:, None] + own[1]) / 2 - torch.einsum("icn,nm,jcm->ij", a, metric, b)).clamp_min(0)


def joint(weights: list[torch.Tensor], seconds: list[torch.Tensor]) -> torch.Tensor:
    """Return the weights (channels, copies, n) of least squared error for those of several networks."""
    mean = torch.stack(weights).mean(0)
    off = [(w - mean).flatten(0, 1).T for w in weights]
    right = torch.stack([h @ d + _level(h) * d for d, h in zip(off, seconds, strict=True)]).sum(0)
    change = damped_solve(torch.stack(seconds).sum(0), sum(_level(h) for h in seconds), right)
    return mean + change.T.reshape(mean.shape)


def _level(second: torch.Tensor) -> float:
    return float(second.diagonal().mean()) * DAMPING


def cheapest(cost: np.ndarray, count: int) -> np.ndarray:
    """Return (count, 2) rows and columns of the smallest entries, each row and column once."""
    order = np.stack(np.unravel_index(np.argsort(cost, axis=None, kind="stable"), cost.shape), 1)
    rows, columns, found = set(), set(), []
    for i, j in order.tolist():
        if i not in rows and j not in columns:
            rows.add(i)
            columns.add(j)
            found.append((i, j))
        if len(found) == count:
            break
    return np.array(found, dtype=np.int64)
