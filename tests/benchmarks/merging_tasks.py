"""What the benchmark of merging merges: tasks on the demo's scenes, and a network that can learn any of them.

One set has the demo's three tasks, which ask for different things. The other has five that need the same knowledge, as
in the paper, where each of five tasks is a set of attributes of the same face: each asks for some attributes of the
digit that is in front at a position. All networks are of one topology: a map of features at half the resolution of the
scene, from which each task reads as many channels as it needs, position by position or pooled over positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from quality_data import Batch, Counts, Splits, Table, make_splits
from quality_problems import Problem, Recipe
from torch import Tensor, nn
from torch.nn.functional import (
    adaptive_max_pool2d,
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse_loss,
)

import fxprune
from fxprune.examples.networks import ConvNormAct, Merge, ResidualBlock
from fxprune.examples.scenes import NUM_CLASSES, NUM_DIGITS, Digits, compose
from fxprune.examples.training import explained_variance, mean_average_precision, mean_iou

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "binary": tuple(f"{digit:04b}" for digit in range(NUM_DIGITS)),
    "gray": tuple(f"{digit ^ digit >> 1:04b}" for digit in range(NUM_DIGITS)),
    "segments": ("1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111",
                 "1111011"),
    "morse": ("11111", "01111", "00111", "00011", "00001", "00000", "10000", "11000", "11100", "11110"),
    "number": ("1010", "1000", "0100", "0110", "1000", "0101", "0011", "0101", "0001", "1011"),
}  # fmt: skip
"""Task -> the attributes of each digit, 1 where it has them: bits of its binary code and of its Gray code; segments of
a display, from the top down, left before right; dashes of its Morse code; whether it is a square, a prime, divisible
by three, above four. What is on a digit at all is one more, the first."""
ATTRIBUTE_MAPS = 8


class MapNet(nn.Module):
    """A residual encoder and a decoder with skips: (b, 1, 32, 32) -> (b, maps, 16, 16)."""

    def __init__(self, maps: int, fine: int = 12, middle: int = 24, coarse: int = 48) -> None:
        """Build the network.

        Args:
            maps: channels that it returns.
            fine: channels at 16x16 positions.
            middle: channels at 8x8.
            coarse: channels at 4x4.
        """
        super().__init__()
        self.stem = nn.Sequential(ConvNormAct(1, fine, stride=2), ConvNormAct(fine, fine))
        self.down1 = ResidualBlock(fine, middle, stride=2)
        self.down2 = ResidualBlock(middle, coarse, stride=2)
        self.up1 = Merge(coarse, middle, middle)
        self.up0 = Merge(middle, fine, fine)
        self.head = nn.Conv2d(fine, maps, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the map that a task reads."""
        fine = self.stem(images)
        middle = self.down1(fine)
        return self.head(self.up0(self.up1(self.down2(middle), middle), fine))


@dataclass(frozen=True, slots=True)
class SceneTask:
    """How a task reads a map, and how it is judged.

    Attributes:
        maps: how many channels its network returns, the same for all tasks of a set.
        read: (b, maps, 16, 16) -> its answer.
        loss: `(answer, target) -> scalar`.
        metric: name and `(answer, target) -> number`; higher is better, 1 is best.
    """

    maps: int
    read: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: tuple[str, Callable[[Tensor, Tensor], float]]


def _relative_error(predicted: Tensor, depth: Tensor) -> Tensor:
    return mse_loss(predicted, depth) / depth.var()


R2 = "R\N{SUPERSCRIPT TWO}"
DEMO: Mapping[str, SceneTask] = {
    "segmentation": SceneTask(NUM_CLASSES, lambda maps: maps, cross_entropy, ("mIoU", mean_iou)),
    "depth": SceneTask(NUM_CLASSES, lambda maps: maps[:, 0], _relative_error, (R2, explained_variance)),
    "presence": SceneTask(
        NUM_CLASSES,
        lambda maps: adaptive_max_pool2d(maps[:, :NUM_DIGITS], 1).flatten(1),
        binary_cross_entropy_with_logits,
        ("mAP", mean_average_precision),
    ),
}


def intersection_over_union(logits: Tensor, present: Tensor) -> float:
    """Average over attributes the intersection of what is found and what is there, over their union; (n, c, h, w)."""
    found, there = logits > 0, present > 0
    return ((found & there).sum((0, 2, 3)) / (found | there).sum((0, 2, 3)).clamp(min=1)).mean().item()


def _attributes(codes: tuple[str, ...]) -> SceneTask:
    count, metric = 1 + len(codes[0]), ("IoU", intersection_over_union)
    return SceneTask(ATTRIBUTE_MAPS, lambda maps: maps[:, :count], binary_cross_entropy_with_logits, metric)


SETS: Mapping[str, Mapping[str, SceneTask]] = {
    "demo": DEMO,
    "attributes": {name: _attributes(codes) for name, codes in ATTRIBUTES.items()},
}
"""Set -> its tasks."""
TASKS: Mapping[str, SceneTask] = {name: task for tasks in SETS.values() for name, task in tasks.items()}


def scene_table(digits: Digits, count: int, seed: tuple[int, ...]) -> Table:
    """Compose scenes, with the targets of all tasks; maps (n, 16, 16) are of every other row and column."""
    made = compose(digits, count, seed)
    classes = made.segmentation[:, ::2, ::2].contiguous()
    targets = {"segmentation": classes, "depth": made.depth[:, ::2, ::2].contiguous(), "presence": made.presence}
    for name, codes in ATTRIBUTES.items():
        table = torch.tensor([[1.0, *map(float, code)] for code in codes] + [[0.0] * (1 + len(codes[0]))])
        targets[name] = table[classes].permute(0, 3, 1, 2).contiguous()
    return Table(made.images, targets)


def single(name: str, recipe: Recipe) -> Problem:
    """Return the problem of one task: a network that returns its map."""
    task = TASKS[name]

    def loss(maps: Tensor, batch: Batch) -> Tensor:
        return task.loss(task.read(maps), batch[1][name])

    def metric(maps: Tensor, targets: Mapping[str, Tensor]) -> float:
        return task.metric[1](task.read(maps), targets[name])

    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]  # kept weights are those of this file
    split = partial(make_splits, scene_table)
    build, metrics = partial(MapNet, task.maps), {name: (task.metric[0], metric)}
    return Problem(f"merging_{name}_{digest}", build, split, {name: loss}, metrics, recipe)


def together(names: tuple[str, ...], recipe: Recipe) -> Problem:
    """Return the problem of several tasks: a network that returns the map of each."""
    alone = {name: single(name, recipe) for name in names}

    def loss(name: str, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return alone[name].losses[name](outputs[name], batch)

    def metric(name: str, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> float:
        return alone[name].metrics[name][1](outputs[name], targets)

    losses = {name: partial(loss, name) for name in names}
    metrics = {name: (TASKS[name].metric[0], partial(metric, name)) for name in names}
    return Problem("merged", alone[names[0]].build, partial(make_splits, scene_table), losses, metrics, recipe)


def as_tasks(problem: Problem) -> dict[str, fxprune.Task]:
    """Return the tasks of a problem."""
    return {name: fxprune.Task(loss, target=name) for name, loss in problem.losses.items()}


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return all combinations of tasks, fewest first."""
    return [some for count in range(1, len(names) + 1) for some in combinations(names, count)]


def recipe(*, quick: bool) -> Recipe:
    """Return sizes and schedules; the networks of quick ones stay poor."""
    found = Recipe(Counts(4_000, 512, 2_000), epochs=16, tune_epochs=6, tune_learning_rate=4e-3)
    return replace(found, counts=Counts(256, 64, 64), epochs=1, tune_epochs=1) if quick else found


def data(quick: bool) -> Splits:
    """Return the scenes, the same for all seeds and tasks."""
    return make_splits(scene_table, recipe(quick=quick).counts)
