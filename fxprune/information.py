"""How much features tell of labels: a bound on the mutual information by kernel density estimates.

Z is taken for a mixture of Gaussians of variance `noise` around the samples z_i. The bound by pairwise KL divergences
on its entropy is

    H(Z) = D/2 - 1/N sum_i [ log sum_k exp(-|z_i - z_k|^2 / (2 noise)) - log N - D/2 log(2 pi noise) ]

and I(Z; Y) = sum over labels of H(Z) - sum_v p(Y = v) H(Z | Y = v), labels being +1 or -1 and taken one by one.

Source: Kolchinsky and Tracey (2017), as He et al. (KDD 2021) use it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

NOISE = 0.1
"""Variance of the kernel, in squared units of the features."""


@dataclass(frozen=True, slots=True)
class Irrelevance:
    """Features in the order in which they tell least of some labels, those before them known.

    Attributes:
        order: (features,) which.
        information: (features,) nats, of each and all before it, summed over labels.
    """

    order: np.ndarray
    information: np.ndarray

    def below(self, bound: float) -> np.ndarray:
        """Return the features that come before the information is above a bound."""
        above = np.flatnonzero(self.information > bound)
        return self.order[: above[0] if len(above) else len(self.order)]


def irrelevance(features: torch.Tensor, labels: torch.Tensor, noise: float = NOISE) -> Irrelevance:
    """Order features by the joint information of each with all before it, least first.

    Distances add up over features, so kernels multiply: each step is one batched product of matrices.

    Args:
        features: (samples, n).
        labels: (samples, l) of +1 and -1.
        noise: variance of the kernel.
    """
    x = features.double().T
    kernels = torch.exp(-(x[:, :, None] - x[:, None, :]).square() / (2 * noise))
    known = _Labels(labels)
    left = np.arange(len(x))
    so_far = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype)
    order, information = [], []
    while len(left):
        found = known.information(kernels[torch.from_numpy(left)] * so_far)
        best = int(found.argmin())
        order.append(left[best])
        information.append(float(found[best]))
        so_far = so_far * kernels[left[best]]
        left = np.delete(left, best)
    return Irrelevance(np.array(order, dtype=np.int64), np.array(information))


class _Labels:
    """Labels of samples, ready to be asked about."""

    def __init__(self, labels: torch.Tensor) -> None:
        positive = labels > 0
        self._members = torch.cat([torch.ones(len(labels), 1, dtype=torch.bool), positive, ~positive], 1).double()
        which = 1 + torch.arange(positive.shape[1])
        self._own = torch.where(positive, which, which + len(which))  # (samples, l)
        sizes = self._members.sum(0)
        self._shares = torch.log(len(labels) / sizes[self._own]).sum(1)

    def information(self, kernels: torch.Tensor) -> torch.Tensor:
        """Return (b,) the information of kernels (b, samples, samples); a sample is at no distance from itself."""
        density = (kernels @ self._members).log()  # (b, samples, 1 + 2 l)
        own = density.gather(2, self._own.expand(len(density), -1, -1)).sum(2)
        return (own - self._own.shape[1] * density[:, :, 0] + self._shares).mean(1)
