"""Losses, metrics, training and evaluation of a multi-task network on scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    log_softmax,
    logsigmoid,
    mse_loss,
)
from tqdm import tqdm

from fxprune.examples.scenes import Batch, Scenes
from fxprune.tasks import evaluating

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every size and schedule of the demo: how many scenes, how long to train, how long to fine-tune."""

    train_scenes: int = 12_000
    calibration_scenes: int = 512
    test_scenes: int = 2_000
    epochs: int = 7
    learning_rate: float = 4e-3
    tune_epochs: int = 3
    tune_learning_rate: float = 3e-3

    @classmethod
    def quick(cls) -> Recipe:
        """Shrink everything, to see the whole path in seconds; the networks stay poor."""
        return cls(train_scenes=1_024, calibration_scenes=128, test_scenes=256, epochs=2, tune_epochs=1)


def segmentation_loss(outputs: Outputs, batch: Batch) -> Tensor:
    """Mean cross entropy of logits (b, 11, h, w) against classes (b, h, w)."""
    return cross_entropy(outputs["segmentation"], batch[1]["segmentation"])


def depth_loss(outputs: Outputs, batch: Batch) -> Tensor:
    """Mean squared error of depths (b, h, w) as a share of their variance, which puts it on the others' scale."""
    depth = batch[1]["depth"]
    return mse_loss(outputs["depth"], depth) / depth.var()


def presence_loss(outputs: Outputs, batch: Batch) -> Tensor:
    """Mean binary cross entropy of logits (b, 10) against zeros and ones (b, 10)."""
    return binary_cross_entropy_with_logits(outputs["presence"], batch[1]["presence"])


losses: Mapping[str, Callable[[Outputs, Batch], Tensor]] = {
    "segmentation": segmentation_loss,
    "depth": depth_loss,
    "presence": presence_loss,
}


def mean_iou(logits: Tensor, classes: Tensor) -> float:
    """Average intersection over union of the classes that occur, from logits (n, c, h, w) and classes (n, h, w)."""
    count = logits.shape[1]
    confusion = torch.bincount((classes * count + logits.argmax(1)).flatten(), minlength=count**2).view(count, count)
    shared, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
    return (shared / union)[union > 0].mean().item()


def explained_variance(predicted: Tensor, depth: Tensor) -> float:
    """Return R^2 over all pixels: 1 less the squared error as a share of the variance of depth (n, h, w)."""
    return 1 - ((predicted - depth).square().sum() / (depth - depth.mean()).square().sum()).item()


def mean_average_precision(logits: Tensor, presence: Tensor) -> float:
    """Average, over the digits that occur, the precision at every true scene; logits and presence are (n, 10)."""
    ranked = presence.gather(0, logits.argsort(0, descending=True))
    precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1).unsqueeze(1)
    occurrences = ranked.sum(0)
    return ((precision * ranked).sum(0) / occurrences)[occurrences > 0].mean().item()


metrics: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    "segmentation": mean_iou,
    "depth": explained_variance,
    "presence": mean_average_precision,
}


def train(
    model: nn.Module,
    scenes: Scenes,
    epochs: int,
    learning_rate: float,
    seed: int = 0,
    progress: bool = True,
    batch_size: int = 64,
    label: str = "training",
) -> None:
    """Train `model` in place on the sum of the three losses, with AdamW and a one-cycle schedule.

    Leaves the model in evaluation mode, its weights in channels-last order: a quarter faster on a CPU.
    """
    _train(model, scenes, epochs, learning_rate, seed, progress, batch_size, label, None)


def _train(
    model: nn.Module,
    scenes: Scenes,
    epochs: int,
    learning_rate: float,
    seed: int,
    progress: bool,
    batch_size: int,
    label: str,
    extra: Callable[[Outputs, Batch], Tensor] | None,
) -> None:
    """Train as `train` says, on another loss `(outputs, batch) -> scalar` besides, where there is one."""
    model.to(memory_format=torch.channels_last)
    steps = epochs * -(-len(scenes) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.2)
    model.train()
    with tqdm(total=steps, desc=label, unit="batch", disable=not progress) as bar:
        for epoch in range(epochs):
            for batch in scenes.batches(batch_size, shuffle_seed=seed * 1_000 + epoch):
                outputs = model(batch[0])
                loss = torch.stack([task_loss(outputs, batch) for task_loss in losses.values()]).sum()
                loss = loss if extra is None else loss + extra(outputs, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
    model.eval()


def distillation_loss(student: Outputs, teacher: Outputs, temperature: float = 2.0) -> Tensor:
    """Sum, over the tasks, how far the student's answers are from the teacher's.

    For segmentation and presence: the Kullback-Leibler divergence of the student's distribution from the teacher's,
    both of logits over `temperature`, mean over pixels or digits, times its square, which keeps gradients in size. For
    depth: the mean squared error as a share of the variance of the teacher's depth.

    Source: Hinton et al. (2015). HBGS uses it without the square, at a temperature of 2.
    """
    soft = [log_softmax(o["segmentation"] / temperature, 1) for o in (student, teacher)]
    pixels = (soft[1].exp() * (soft[1] - soft[0])).sum(1).mean()
    yes = [torch.stack([logsigmoid(o["presence"] / temperature), logsigmoid(-o["presence"] / temperature)]) for o in
           (student, teacher)]  # fmt: skip
    digits = (yes[1].exp() * (yes[1] - yes[0])).sum(0).mean()
    depth = mse_loss(student["depth"], teacher["depth"]) / teacher["depth"].var()
    return temperature**2 * (pixels + digits) + depth


def distill(
    student: nn.Module,
    teacher: nn.Module,
    scenes: Scenes,
    epochs: int,
    learning_rate: float,
    seed: int = 0,
    progress: bool = True,
    weight: float = 1.0,
    label: str = "distilling",
) -> None:
    """Train `student` in place on the sum of the three losses and, times `weight`, its distance from the teacher.

    As `train`; the teacher is not changed, and may be the network that the student was pruned from. As `tune` of
    `fxprune.methods.HBGS`: `lambda student, teacher: distill(student, teacher, scenes, 1, 1e-3)`.
    """
    with evaluating(teacher):
        _train(
            student, scenes, epochs, learning_rate, seed, progress, 64, label,
            lambda outputs, batch: weight * distillation_loss(outputs, _answer(teacher, batch[0])),
        )  # fmt: skip


@torch.no_grad()
def _answer(teacher: nn.Module, images: Tensor) -> Outputs:
    return teacher(images)


@torch.no_grad()
def evaluate(model: nn.Module, scenes: Scenes, batch_size: int = 250) -> dict[str, float]:
    """Measure every task's metric on `scenes`, in evaluation mode; higher is better."""
    with evaluating(model):
        answers: list[Any] = [model(images) for images, _ in scenes.batches(batch_size)]
    outputs = {task: torch.cat([answer[task] for answer in answers]) for task in metrics}
    return {task: metric(outputs[task], getattr(scenes, task)) for task, metric in metrics.items()}
