"""What forward writes to buffers while data run is put back: the model stays as it was, and results repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import settled
from torch import Tensor, nn

import fxprune
from fxprune import Budget, Task, methods
from fxprune.probing import Probe
from fxprune.restoring import restored

IMAGES = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3
BATCHES = [(IMAGES[i : i + 4], LABELS[i : i + 4]) for i in (0, 4, 8)]
TASKS = {"t": Task(lambda outputs, batch: F.cross_entropy(outputs, batch[1]))}


class Counting(nn.Module):
    """Counts its calls, and takes off a moving average, which the loss is differentiated through."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.b(F.relu(self.a(x)))).mean((2, 3))
        self.calls += 1
        self.average.mul_(0.5).add_(h.mean(0), alpha=0.5)  # pyright: ignore[reportCallIssue]
        return self.out(F.relu(self.c(h - self.average))) / self.calls


OTHER = settled(Counting())


def compiled(method: Any) -> Callable[[nn.Module], Any]:
    def call(model: nn.Module) -> Any:
        slim = fxprune.compile(
            model, IMAGES, Budget(macs=0.6), method=method, calibration=BATCHES, tasks=TASKS, progress=False
        )
        return list(slim.state_dict().values())

    return call


def calibrated(model: nn.Module) -> Any:
    found = fxprune.calibrate(fxprune.couple(fxprune.trace(model, IMAGES)), BATCHES, TASKS)
    return [*(m.second for m in found.moments.values()), *(m.sensitivity["t"] for m in found.moments.values())]


def merged(model: nn.Module) -> Any:
    batches = [(x, {"a": 2.0 * (y == 0) - 1, "b": 2.0 * (y == 1) - 1}) for x, y in BATCHES]
    network = fxprune.merge({"a": model, "b": OTHER}, batches, method=methods.PAM(share=0.5), example_inputs=IMAGES)
    return list(network.state_dict().values())


def timed(model: nn.Module) -> Any:
    fxprune.measure_latency(model, Counting(), IMAGES, rounds=2)
    return []


CALLS = {
    "Joint": compiled(methods.Joint()),
    "sequential": compiled(methods.Joint(sequential=True)),
    "Taylor": compiled(methods.Taylor()),
    "CATRO": compiled(methods.CATRO()),
    "FilterOMP": compiled(methods.FilterOMP()),
    "HBGS": compiled(methods.HBGS()),
    "HBGTS": compiled(methods.HBGTS()),
    "PAGCP": compiled(methods.PAGCP(fast=True)),
    "calibrate": calibrated,
    "merge": merged,
    "measure_latency": timed,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_model_is_as_it_was_and_a_second_call_finds_the_same(name: str) -> None:
    model = settled(Counting().eval())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = CALLS[name](model), CALLS[name](model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(buffer.requires_grad for buffer in model.buffers())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_parts_that_run_again_start_from_the_same_buffers() -> None:
    """Losses are those of whole runs, although what comes before the weight that changes is not run again."""
    coupling = fxprune.couple(fxprune.trace(settled(Counting().eval()), IMAGES))
    probe = Probe(
        coupling, fxprune.Calibration.of_batches(coupling, BATCHES, None), samples=12, damping=0.01, compensate=False
    )
    for gone in (7, 0, 7):
        keep = np.ones(coupling.num_channels, dtype=bool)
        keep[coupling.groups()[-1].cells[0][gone]] = False
        np.testing.assert_allclose(probe.rises(keep), probe.losses(keep), rtol=1e-5)


class Assigning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", None)
        self.register_buffer("seen", torch.zeros(3))
        self.plain = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.seen.data += x
        self.plain = self.plain + x
        self.plain.add_(x.expand(2, 3) if x.ndim == 2 else x)
        return self.plain


def test_what_is_assigned_is_put_back_too() -> None:
    module = Assigning()
    plain = module.plain
    with pytest.raises(RuntimeError), restored(module):
        module(module(torch.ones(3)).expand(2, 3))  # fails after it has assigned and written
    assert module.last is None
    assert module.plain is plain
    assert not module.seen.any()  # pyright: ignore[reportCallIssue]
