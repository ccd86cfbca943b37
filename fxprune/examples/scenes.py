"""Scenes of overlapping handwritten digits with clutter, and three dense or global targets for each.

The digits are scikit-learn's 1,797 real 8x8 scans. They are split before anything is composed, so no scan that a
network is tested on was ever seen in training or calibration. A nearer digit hides what is behind it, and tends to be
larger and brighter: the cues that a depth order can be read from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from torch import Tensor

SIZE = 32
NUM_DIGITS = 10
NUM_CLASSES = NUM_DIGITS + 1
BACKGROUND = NUM_DIGITS
MAX_DIGITS = 3

_SPLIT_SEED = 0  # one split for every seed, so that runs with different seeds are tested on the same scans
_SPLIT_ENDS = (0.70, 0.80)  # train, calibration, test
_VISIBLE_PIXELS = 8  # a digit with fewer pixels in sight counts as absent

Floats = npt.NDArray[np.float32]
Batch = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Digits:
    """Scans of single digits: images (n, 8, 8) in [0, 1] and labels (n,)."""

    images: Floats
    labels: npt.NDArray[np.int64]


def rows_of_batches(count: int, size: int, shuffle_seed: int | None) -> Iterator[Tensor]:
    """Yield the rows of batches of at most `size` of `count` samples, in a random order if there is a seed."""
    order = torch.arange(count)
    if shuffle_seed is not None:
        order = order[torch.randperm(count, generator=torch.Generator().manual_seed(shuffle_seed))]
    yield from order.split(size)


@dataclass(frozen=True, slots=True)
class Scenes:
    """Composed scenes and what is to be predicted from them.

    Attributes:
        images: (n, 1, 32, 32) float32, about zero mean and unit variance.
        segmentation: (n, 32, 32) int64, the digit in front at each pixel, or `BACKGROUND`.
        depth: (n, 32, 32) float32, 1 on the nearest digit, 2/3 and 1/3 on those behind it, 0 on the background.
        presence: (n, 10) float32, 1 for every digit that can be seen.
    """

    images: Tensor
    segmentation: Tensor
    depth: Tensor
    presence: Tensor

    def __len__(self) -> int:
        """Count the scenes."""
        return len(self.images)

    def batches(self, size: int, shuffle_seed: int | None = None) -> Iterator[Batch]:
        """Yield `(images, targets)` batches of at most `size` scenes, in a random order if there is a seed."""
        for rows in rows_of_batches(len(self), size, shuffle_seed):
            targets = {task: getattr(self, task)[rows] for task in ("segmentation", "depth", "presence")}
            yield self.images[rows], targets


@dataclass(frozen=True, slots=True)
class Splits:
    """Scenes made of three disjoint sets of scans."""

    train: Scenes
    calibration: Scenes
    test: Scenes


def split_digits() -> tuple[Digits, Digits, Digits]:
    """Split the scans into train, calibration and test digits."""
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    images = pixels.reshape(-1, 8, 8)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    parts = np.split(order, [int(end * len(order)) for end in _SPLIT_ENDS])
    train, calibration, test = (
        Digits((images[part] / 16).astype(np.float32), labels[part].astype(np.int64)) for part in parts
    )
    return train, calibration, test


def make_splits(train: int, calibration: int, test: int, seed: int = 0) -> Splits:
    """Compose the given numbers of scenes from the train, calibration and test digits."""
    counts = (train, calibration, test)
    parts = zip(split_digits(), counts, range(3), strict=True)
    return Splits(*(compose(digits, count, (seed, part)) for digits, count, part in parts))


def compose(digits: Digits, count: int, seed: int | tuple[int, ...] = 0) -> Scenes:
    """Compose `count` scenes of one to three digits each; the same seed gives the same scenes."""
    rng = np.random.default_rng(seed)
    image = clutter(rng, count)
    segmentation = np.full((count, SIZE, SIZE), BACKGROUND)
    depth = np.zeros((count, SIZE, SIZE), np.float32)
    chosen = rng.integers(len(digits.labels), size=(MAX_DIGITS, count))
    present = rng.integers(1, MAX_DIGITS + 1, count)[None] > np.arange(MAX_DIGITS)[:, None]
    brightness = rng.uniform(0.75, 1.0, count)
    centres = _place(rng, count)
    for rank in reversed(range(MAX_DIGITS)):  # from the back to the front
        size = rng.uniform(15, 21, (count, 2)) * 0.9**rank
        ink = draw(digits.images[chosen[rank]], centres[rank], size) * present[rank, :, None, None]
        cover = np.clip(2 * ink, 0, 1)  # wider than the ink: a nearer digit has a dark rim
        fade = brightness * rng.uniform(0.9, 1.1, count) * 0.75**rank
        image = image * (1 - cover) + ink * fade[:, None, None]
        inside = ink > 0.4
        segmentation = np.where(inside, digits.labels[chosen[rank]][:, None, None], segmentation)
        depth = np.where(inside, 1 - rank / MAX_DIGITS, depth)
    image += rng.normal(0, 0.03, image.shape)
    seen = np.stack([(segmentation == digit).sum((1, 2)) >= _VISIBLE_PIXELS for digit in range(NUM_DIGITS)], 1)
    return Scenes(
        images=torch.from_numpy(((image - 0.25) / 0.3).astype(np.float32))[:, None],
        segmentation=torch.from_numpy(segmentation),
        depth=torch.from_numpy(depth.astype(np.float32)),
        presence=torch.from_numpy(seen.astype(np.float32)),
    )


def _place(rng: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
    """Draw centres (rank, count, 2): each digit lies within reach of the one before it, so most of them overlap."""
    centres = [rng.uniform(10, SIZE - 10, (count, 2))]
    for _ in range(MAX_DIGITS - 1):
        angle = rng.uniform(0, 2 * np.pi, count)
        step = rng.uniform(8, 14, (count, 1)) * np.stack([np.sin(angle), np.cos(angle)], 1)
        outside = (centres[0] + step < 8) | (centres[0] + step > SIZE - 8)
        centres.append(np.clip(centres[0] + np.where(outside, -step, step), 7, SIZE - 7))
    return np.stack(centres)


def draw(images: Floats, centres: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64]) -> Floats:
    """Resample scans (n, 8, 8) bilinearly to n canvases (n, 32, 32), at `centres` (n, 2) with `sizes` (n, 2) pixels."""
    pixels = np.arange(SIZE)[None, None, :, None] + 0.5
    source = (pixels - centres[:, :, None, None]) * (8 / sizes)[:, :, None, None] + 4 - 0.5
    weights = np.clip(1 - np.abs(source - np.arange(8)), 0, 1).astype(np.float32)  # (n, 2, 32, 8)
    return weights[:, 0] @ images @ weights[:, 1].swapaxes(1, 2)


def clutter(rng: np.random.Generator, count: int, blobs: int = 2, strokes: int = 3) -> Floats:
    """Draw backgrounds (count, 32, 32): a gradient, soft blobs and thin strokes, all dimmer than most digits."""
    y, x = (np.arange(SIZE, dtype=np.float32) / (SIZE - 1) - 0.5)[:, None], (np.arange(SIZE) / (SIZE - 1) - 0.5)[None]
    slope_y, slope_x, base = (rng.uniform(*bounds, (count, 1, 1)) for bounds in ((-0.1, 0.1), (-0.1, 0.1), (0.05, 0.2)))
    canvas = base + slope_y * y + slope_x * x
    for _ in range(blobs):
        at_y, at_x = rng.uniform(-0.5, 0.5, (2, count, 1, 1))
        spread = rng.uniform(0.05, 0.2, (count, 1, 1))
        bump = np.exp(-((y - at_y) ** 2) / (2 * spread**2)) * np.exp(-((x - at_x) ** 2) / (2 * spread**2))
        canvas = canvas + rng.uniform(-0.1, 0.2, (count, 1, 1)) * bump
    for _ in range(strokes):
        angle, offset = rng.uniform(0, 2 * np.pi, (count, 1, 1)), rng.uniform(-0.4, 0.4, (count, 1, 1))
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle) - offset
        start, length = rng.uniform(-0.5, 0.3, (count, 1, 1)), rng.uniform(0.2, 0.6, (count, 1, 1))
        within = (along > start) & (along < start + length)
        canvas = canvas + rng.uniform(0.1, 0.35, (count, 1, 1)) * within * np.clip(1.5 - np.abs(across) * SIZE, 0, 1)
    return np.clip(canvas, 0, 1).astype(np.float32)
