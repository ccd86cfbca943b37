"""A small network of two tasks, trained; and what PAGCP is asked of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Budget, Constraints, Task
from fxprune.methods import Problem


class TwoTasks(nn.Module):
    """A residual stem, a block, and two heads: the sign of each quadrant's mean, and the mean of squares."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.a, self.b = nn.Conv2d(12, 20, 3, padding=1, stride=2), nn.Conv2d(20, 12, 1)
        self.c = nn.Conv2d(12, 12, 3, padding=1, stride=2)
        self.wide = nn.Conv2d(12, 24, 3, padding=1)
        self.signs, self.square = nn.Linear(96, 4), nn.Linear(24, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.stem(x)).relu()
        x = (self.c(x) + self.b(self.a(x).relu())).relu()
        x = self.wide(x).relu()
        return self.signs(F.adaptive_avg_pool2d(x, 2).flatten(1)), self.square(x.mean((2, 3)))[:, 0]


def batches(count: int, seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        level = torch.randn(32, 2, 2, 2, generator=generator)
        x = F.interpolate(level, scale_factor=4) + 0.5 * torch.randn(32, 2, 8, 8, generator=generator)
        found.append((x, ((level.mean(1).flatten(1) > 0).float(), level.square().mean((1, 2, 3)))))
    return found


def signs(outputs: Any, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs[0], batch[1][0])


def square(outputs: Any, batch: Any) -> Tensor:
    return F.mse_loss(outputs[1], batch[1][1])


TASKS = {"signs": Task(signs), "square": Task(square)}


@cache
def trained() -> tuple[nn.Module, list[Any], fxprune.Coupling]:
    torch.manual_seed(0)
    model = TwoTasks()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for batch in batches(150, 1):
        optimizer.zero_grad()
        outputs = model(batch[0])
        (signs(outputs, batch) + square(outputs, batch)).backward()
        optimizer.step()
    data = batches(4, 2)
    model.eval()
    return model, data, fxprune.couple(fxprune.trace(model, data[0][0]))


def asked(share: float = 0.5, **settings: Any) -> Problem:
    _, data, coupling = trained()
    return replace(problem(coupling, data, share), **settings)


def problem(coupling: fxprune.Coupling, data: list[Any], share: float) -> Problem:
    bounds = Budget(macs=share).bounds(coupling.costs(np.ones(coupling.num_channels, dtype=bool)))
    return Problem(coupling, bounds, Constraints(), data, TASKS)


def rebuilt(state: dict[str, Tensor]) -> fxprune.Coupling:
    """Return the coupling of the network with these weights, in a process that has not trained it."""
    model = TwoTasks()
    model.load_state_dict(state)
    return fxprune.couple(fxprune.trace(model.eval(), batches(1, 2)[0][0]))
