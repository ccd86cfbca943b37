"""The problems of the quality benchmark: what to train, on what, for how long, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quality_cifar import cifar_splits
from quality_data import Batch, Counts, Splits, gratings, hard_digits, make_splits, scenes
from quality_networks import VGG, MobileNetV2, ResNet20, TwoHeads
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from fxprune.examples import training
from fxprune.examples.networks import SceneNet

GRATING_SCALE = 8.0  # of the loss of the easy task, which drowns the hard one's


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every size and schedule of a problem."""

    counts: Counts = Counts(10_000, 512, 2_000)  # noqa: RUF009 (it is frozen)
    epochs: int = 8
    learning_rate: float = 4e-3
    tune_epochs: int = 1
    tune_learning_rate: float = 1e-3
    batch_size: int = 64

    def quick(self) -> Recipe:
        """Shrink everything, to try the command."""
        return replace(self, counts=Counts(128, 64, 64), epochs=1)


@dataclass(frozen=True, slots=True)
class Problem:
    """A network, its data and its tasks.

    Attributes:
        name: of the problem.
        build: makes the untrained network.
        split: makes the data.
        losses: task -> `(outputs, batch) -> scalar`; training minimises their sum.
        metrics: task -> name and `(outputs, targets) -> number`; higher is better, 1 is best.
        recipe: sizes and schedules.
    """

    name: str
    build: Callable[[], nn.Module]
    split: Callable[[Counts], Splits]
    losses: Mapping[str, Callable[[Any, Batch], Tensor]]
    metrics: Mapping[str, tuple[str, Callable[[Any, Mapping[str, Tensor]], float]]]
    recipe: Recipe

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the sum of the losses."""
        return torch.stack([loss(outputs, batch) for loss in self.losses.values()]).sum()


def problems(cifar10: Path | None = None, *, quick: bool = False) -> dict[str, Problem]:
    """Return all problems by name; with a path, those of CIFAR-10 in place of those of hard digits."""
    classifiers = {"resnet20": ResNet20, "mobilenetv2": MobileNetV2, "vgg": VGG}
    if cifar10 is None:
        split, recipe, target, channels = partial(make_splits, hard_digits), Recipe(), "digit", 1
    else:
        split, target, channels = partial(cifar_splits, cifar10), "label", 3
        recipe = Recipe(Counts(45_000, 512, 10_000), epochs=20, tune_epochs=2)
    found = [_classifier(name, partial(kind, channels), split, target, recipe) for name, kind in classifiers.items()]
    if cifar10 is None:
        found = [_scenes(), *found, _two_heads()]
    return {p.name: replace(p, recipe=p.recipe.quick()) if quick else p for p in found}


def _classifier(
    name: str, build: Callable[[], nn.Module], split: Callable[[Counts], Splits], target: str, recipe: Recipe
) -> Problem:
    def loss(outputs: Tensor, batch: Batch) -> Tensor:
        return cross_entropy(outputs, batch[1][target])

    def accuracy(outputs: Tensor, targets: Mapping[str, Tensor]) -> float:
        return _accuracy(outputs, targets[target])

    return Problem(name, build, split, {target: loss}, {target: ("accuracy", accuracy)}, recipe)


def _scenes() -> Problem:
    def judged(task: str, metric: Callable[[Tensor, Tensor], float]) -> Callable[[Any, Mapping[str, Tensor]], float]:
        return lambda outputs, targets: metric(outputs[task], targets[task])

    names = {"segmentation": "mIoU", "depth": "R\N{SUPERSCRIPT TWO}", "presence": "mAP"}
    metrics = {task: (names[task], judged(task, metric)) for task, metric in training.metrics.items()}
    recipe = Recipe(Counts(5_000, 512, 1_000), epochs=12)
    return Problem("scenes", SceneNet, partial(make_splits, scenes), training.losses, metrics, recipe)


def _two_heads() -> Problem:
    def digit(outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return cross_entropy(outputs["digit"], batch[1]["digit"])

    def grating(outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return GRATING_SCALE * mse_loss(outputs["grating"], batch[1]["grating"])

    metrics = {
        "digit": ("accuracy", lambda outputs, targets: _accuracy(outputs["digit"], targets["digit"])),
        "grating": (
            "R\N{SUPERSCRIPT TWO}",
            lambda outputs, targets: _explained(outputs["grating"], targets["grating"]),
        ),
    }
    split = partial(make_splits, gratings)
    return Problem("two-heads", TwoHeads, split, {"digit": digit, "grating": grating}, metrics, Recipe(epochs=12))


def _accuracy(logits: Tensor, classes: Tensor) -> float:
    return (logits.argmax(1) == classes).float().mean().item()


def _explained(predicted: Tensor, target: Tensor) -> float:
    """Return R^2 of (n, values), over all values."""
    return 1 - ((predicted - target).square().sum() / (target - target.mean(0)).square().sum()).item()
