"""Single handwritten digits: scikit-learn's scans as they are, a small residual classifier, and how to train it.

Small enough to train in seconds on one core, so that several methods and seeds can be looked at side by side.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fxprune.examples.networks import ConvNormAct, ResidualBlock
from fxprune.examples.scenes import NUM_DIGITS, Digits, rows_of_batches, split_digits
from fxprune.tasks import evaluating

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Scans:
    """Scans of single digits: images (n, 1, 8, 8), about zero mean and unit variance, and labels (n,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Count the scans."""
        return len(self.images)

    def batches(self, size: int, shuffle_seed: int | None = None) -> Iterator[Batch]:
        """Yield `(images, labels)` batches of at most `size` scans, in a random order if there is a seed."""
        for rows in rows_of_batches(len(self), size, shuffle_seed):
            yield self.images[rows], self.labels[rows]


def make_scans() -> tuple[Scans, Scans, Scans]:
    """Return 1,257 scans to train on, 180 to calibrate with and 360 to test on; no scan is in two of them."""
    train, calibration, test = map(_scans, split_digits())
    return train, calibration, test


def _scans(digits: Digits) -> Scans:
    return Scans((torch.from_numpy(digits.images)[:, None] - 0.3) / 0.38, torch.from_numpy(digits.labels))


class DigitNet(nn.Sequential):
    """Two residual blocks and a linear head: (b, 1, 8, 8) -> (b, outputs) logits."""

    def __init__(self, outputs: int = NUM_DIGITS, widths: Sequence[int] = (16, 32)) -> None:
        """Build the network.

        Args:
            outputs: how many logits.
            widths: channels at 8x8 and at 4x4 positions.
        """
        fine, coarse = widths
        super().__init__(
            OrderedDict(
                stem=ConvNormAct(1, fine),
                block1=ResidualBlock(fine, fine),
                block2=ResidualBlock(fine, coarse, stride=2),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                head=nn.Linear(coarse, outputs),
            )
        )


def classification_loss(outputs: Tensor, batch: Batch) -> Tensor:
    """Mean cross entropy of logits (b, classes) against labels (b,)."""
    return cross_entropy(outputs, batch[1])


def fit(
    network: nn.Module,
    scans: Scans,
    epochs: int,
    learning_rate: float,
    seed: int = 0,
    loss: Callable[[Tensor, Batch], Tensor] = classification_loss,
) -> None:
    """Train a network in place, with AdamW and a one-cycle schedule on batches of 64; leave it in evaluation mode."""
    steps = epochs * -(-len(scans) // 64)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.2)
    network.train()
    for epoch in range(epochs):
        for batch in scans.batches(64, shuffle_seed=seed * 1_000 + epoch):
            optimizer.zero_grad()
            loss(network(batch[0]), batch).backward()
            optimizer.step()
            schedule.step()
    network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, scans: Scans) -> float:
    """Return which share of the scans a network labels rightly, in evaluation mode."""
    with evaluating(network):
        return (network(scans.images).argmax(1) == scans.labels).double().mean().item()
