"""Data for the quality benchmark, made from handwritten digits: the splits of each problem share no scan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.examples.scenes import SIZE, Digits, Floats, clutter, compose, draw, split_digits

Batch = tuple[Tensor, dict[str, Tensor]]
SEED = 7  # one set of images for all seeds of a network, so that they are tested on the same
FRAGMENTS = 5  # of other digits, around the one to tell


@dataclass(frozen=True, slots=True)
class Table:
    """Inputs (n, ...) and what is to be predicted from them: name -> (n, ...)."""

    inputs: Tensor
    targets: Mapping[str, Tensor]

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.inputs)

    def batches(self, size: int, shuffle_seed: int | None = None) -> Iterator[Batch]:
        """Yield `(inputs, targets)` of at most `size` samples, in a random order if there is a seed."""
        order = torch.arange(len(self))
        if shuffle_seed is not None:
            order = order[torch.randperm(len(self), generator=torch.Generator().manual_seed(shuffle_seed))]
        for rows in order.split(size):
            yield self.inputs[rows], {name: target[rows] for name, target in self.targets.items()}


@dataclass(frozen=True, slots=True)
class Splits:
    """What a network learns from, what pruning may look at, and what the result is tested on."""

    train: Table
    calibration: Table
    test: Table


@dataclass(frozen=True, slots=True)
class Counts:
    """Samples in each split."""

    train: int
    calibration: int
    test: int


def scenes(digits: Digits, count: int, seed: tuple[int, ...]) -> Table:
    """Compose the demo's scenes of one to three digits, with its three dense or global targets."""
    made = compose(digits, count, seed)
    targets = {task: getattr(made, task) for task in ("segmentation", "depth", "presence")}
    return Table(made.images, targets)


def hard_digits(digits: Digits, count: int, seed: tuple[int, ...]) -> Table:
    """Compose images of one digit each among fragments of others: `digit` (n,) says which.

    Position, size, aspect, contrast and noise differ from image to image; some fragments lie on top of the digit.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(digits.labels), size=count)
    image = _picture(rng, digits, chosen, clutter(rng, count))
    return Table(_standardised(image), {"digit": torch.from_numpy(digits.labels[chosen])})


def gratings(digits: Digits, count: int, seed: tuple[int, ...]) -> Table:
    """Compose hard digits on stripes: `digit` (n,), and `grating` (n, 2), the contrast times the doubled direction.

    The stripes are easy to measure and hide the digit.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(digits.labels), size=count)
    contrast, angle, phase = rng.uniform(0.03, 0.15, count), rng.uniform(0, np.pi, count), rng.uniform(0, 7, count)
    at = np.arange(SIZE) * (2 * np.pi / 6)  # a stripe is six pixels wide
    across = np.cos(angle)[:, None, None] * at[None, :, None] + np.sin(angle)[:, None, None] * at[None, None, :]
    stripes = contrast[:, None, None] * np.sin(across + phase[:, None, None])
    image = _picture(rng, digits, chosen, clutter(rng, count)) + stripes
    grating = contrast[:, None] * np.stack([np.cos(2 * angle), np.sin(2 * angle)], 1)
    targets = {"digit": torch.from_numpy(digits.labels[chosen]), "grating": torch.from_numpy(grating).float() * 10}
    return Table(_standardised(image), targets)


def make_splits(compose_some: Callable[[Digits, int, tuple[int, ...]], Table], counts: Counts) -> Splits:
    """Compose every split from its own scans."""
    sizes = (counts.train, counts.calibration, counts.test)
    parts = zip(split_digits(), sizes, range(3), strict=True)
    return Splits(*(compose_some(digits, size, (SEED, part)) for digits, size, part in parts))


def _picture(rng: np.random.Generator, digits: Digits, chosen: np.ndarray, canvas: Floats) -> np.ndarray:
    """Draw the chosen digits (n,) and fragments of others onto a canvas (n, 32, 32), and add noise."""
    count = len(chosen)
    main = draw(digits.images[chosen], rng.uniform(12, SIZE - 12, (count, 2)), rng.uniform(16, 24, (count, 2)))
    strength = rng.uniform(0.65, 1.0, (count, 1, 1))
    image = canvas.astype(np.float64)
    for number in range(FRAGMENTS):
        if number == FRAGMENTS - 1:  # the last one is on top
            image = image * (1 - np.clip(2 * main, 0, 1)) + main * strength
        ink = _fragment(rng, digits, count)
        image = image * (1 - np.clip(2 * ink, 0, 1)) + ink * rng.uniform(0.3, 0.8, (count, 1, 1))
    return image + rng.normal(0, 1, image.shape) * rng.uniform(0.02, 0.10, (count, 1, 1))


def _fragment(rng: np.random.Generator, digits: Digits, count: int) -> np.ndarray:
    """Draw a random half or quarter of a random digit, smaller than the one to tell: (n, 32, 32)."""
    pieces = digits.images[rng.integers(len(digits.labels), size=count)].copy()
    pieces[rng.random(count) < 0.7, :4] = 0
    pieces[rng.random(count) < 0.5, :, 4:] = 0
    return draw(pieces, rng.uniform(2, SIZE - 2, (count, 2)), rng.uniform(9, 15, (count, 2)))


def _standardised(image: np.ndarray) -> Tensor:
    return torch.from_numpy(((image - 0.25) / 0.3).astype(np.float32))[:, None]
