"""A network for a hundred classes: images of two digits, and a ResNet-20 that reads which number they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from quality_data import Counts, Splits, Table, make_splits
from quality_networks import ResNet20
from quality_problems import Problem, problems
from torch import nn

from fxprune.examples.scenes import SIZE, Digits, clutter, draw

NAME, COUNT = "resnet20-numbers", 100
EPOCHS = 12


def numbers(digits: Digits, count: int, seed: tuple[int, ...], among: Sequence[int] = range(COUNT)) -> Table:
    """Compose images of two digits side by side, which may touch, before clutter.

    Args:
        digits: scans.
        count: images to compose.
        seed: of all that is drawn.
        among: the numbers that are drawn from.

    Returns:
        `digit` (n,) is the number, so that losses and metrics of single digits do for it.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.choice(np.asarray(among), count)
    image = clutter(rng, count).astype(np.float64)
    scans = [np.flatnonzero(digits.labels == digit) for digit in range(10)]
    for digit, left in ((drawn // 10, 6), (drawn % 10, 19)):
        chosen = np.array([rng.choice(scans[d]) for d in digit])
        centres = np.stack([rng.uniform(11, SIZE - 11, count), rng.uniform(left, left + 7, count)], 1)
        sizes = np.stack([rng.uniform(14, 22, count), rng.uniform(11, 15, count)], 1)
        ink = draw(digits.images[chosen], centres, sizes)
        image = image * (1 - np.clip(2 * ink, 0, 1)) + ink * rng.uniform(0.5, 1.0, (count, 1, 1))
    image += rng.normal(0, 1, image.shape) * rng.uniform(0.02, 0.10, (count, 1, 1))
    standardised = torch.from_numpy(((image - 0.25) / 0.3).astype(np.float32))[:, None]
    return Table(standardised, {"digit": torch.from_numpy(drawn)})


def of_numbers(among: Sequence[int], counts: Counts) -> Splits:
    """Compose splits of some numbers alone."""
    return make_splits(partial(numbers, among=among), counts)


def problem_of_numbers(*, quick: bool) -> Problem:
    """Return the problem: as that of single digits, with other data and as many outputs as there are numbers."""
    known = problems(quick=quick)["resnet20"]
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]  # kept weights are those of this file
    recipe = known.recipe if quick else replace(known.recipe, epochs=EPOCHS)
    return replace(known, name=f"{NAME}_{digest}", build=_network, split=partial(make_splits, numbers), recipe=recipe)


def _network() -> nn.Module:
    network = ResNet20()
    network[-1] = nn.Linear(network[-1].in_features, COUNT)
    return network
