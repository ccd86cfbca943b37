"""Class-aware moments: what the means of classes make of them, and of redundant twins only one is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rows import rows_of
from small import Chain, Multitask, settled
from torch import Tensor, nn

import fxprune
from fxprune import Budget, Calibration, PlanError, Task, methods
from fxprune.accumulating import ClassTotals
from fxprune.calibrating import _moments, calibrate
from fxprune.criteria.class_aware import weigh_classes
from fxprune.sums import Layer, Sums

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 3, 8, 8, generator=GENERATOR)
LABELS = torch.randint(0, 4, (24,), generator=GENERATOR)
MAPS = torch.randint(-1, 3, (24, 8, 8), generator=GENERATOR)
BATCHES = [(X[:10], LABELS[:10]), (X[10:], LABELS[10:])]
TASKS = {"label": Task(lambda outputs, batch: F.cross_entropy(outputs, batch[1]))}


def between(rows: Tensor, labels: Tensor) -> Tensor:
    """E[m m^T] over rows (rows, n) by its definition; all without a class are one."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    labels = labels.clamp_min(-1)
    for c in labels.unique():
        mean = rows[labels == c].double().mean(0)
        total += (labels == c).sum() * torch.outer(mean, mean)
    return total / len(rows)


@pytest.mark.parametrize("max_bytes", [4 << 30, 60_000])
def test_what_the_means_of_classes_make_is_gathered_batch_by_batch(max_bytes: int) -> None:
    model = settled(Chain())
    coupling = fxprune.couple(fxprune.trace(model, X[:1]))
    found = calibrate(coupling, BATCHES, TASKS, positions=64, max_bytes=max_bytes, by_class=True)
    for name, m in found.moments.items():
        rows = rows_of(model, name.removesuffix(".weight"), [X])[0][:, 0]
        labels = LABELS.repeat_interleave(len(rows) // len(X))
        if m.shared_taps:
            labels = labels.repeat_interleave(rows.shape[2])
            rows = rows.transpose(1, 2).flatten(0, 1)
        assert m.between is not None
        assert torch.allclose(m.between[0], between(rows.flatten(1), labels), rtol=1e-3, atol=1e-6)
        within, whole = torch.linalg.eigvalsh(m.second[0] - m.between[0]), torch.linalg.eigvalsh(m.second[0])
        assert within.min() > -1e-6 * whole.max()
    assert any(m.shared_taps for m in found.moments.values()) == (max_bytes < 1 << 20)


def test_positions_have_classes_of_their_own_and_tasks_are_averaged() -> None:
    model = settled(Multitask())
    coupling = fxprune.couple(fxprune.trace(model, X[:1]))
    tasks = {
        "seg": Task(lambda o, b: F.cross_entropy(o["seg"], b[1]["seg"], ignore_index=-1), target="seg"),
        "label": Task(lambda o, b: o["present"].square().mean(), target="label"),
        "depth": Task(lambda o, b: o["depth"].square().mean()),
    }
    batch = (X, {"seg": MAPS, "label": LABELS})
    found = calibrate(coupling, [batch], tasks, positions=64, by_class=True)
    rows = rows_of(model, "seg.0", [X])[0].flatten(1)
    wanted = (between(rows, MAPS.flatten()) + between(rows, LABELS.repeat_interleave(64))) / 2
    assert torch.allclose(found.moments["seg.0.weight"].between[0], wanted, rtol=1e-3, atol=1e-6)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(1, 6))
def test_what_classes_make_is_a_part_of_the_moment_whoever_is_of_which(seed: int, density: float, classes: int) -> None:
    """Memberships at random: rows of no class, of several, in shares; and rows of which nothing is known."""
    generator = torch.Generator().manual_seed(seed)
    sums = Sums(Layer("some", 2, 4, 3, 1, None), shared_taps=False)
    for batch in range(3):
        rows = 1 + torch.randn(2, 15, 4, dtype=torch.float64, generator=generator)
        sums.inputs.add(rows)
        for task in ("first", "second")[: batch + 1]:
            members = (torch.rand(15, classes, generator=generator) < density).double()
            shares = members * torch.rand(15, 1, generator=generator).round(decimals=1)
            sums.classes.setdefault(task, ClassTotals()).add(rows, (members, shares)[task == "second"])
    m = _moments(sums, 45, [], own_bias=True)
    assert m.between is not None
    for part in (m.between - m.mean[:, :, None] * m.mean[:, None], m.second - m.between):
        assert torch.linalg.eigvalsh(part).min() >= -1e-9


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
def test_positions_and_samples_of_no_class_are_planned_with(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    maps = MAPS.clamp_min(0).masked_fill(torch.rand(MAPS.shape, generator=generator) < share, -100)
    present = (torch.rand(24, 6, generator=generator) < 0.3).float()
    tasks = {
        "seg": Task(lambda o, b: F.cross_entropy(o["seg"], b[1]["seg"].clamp_min(0)), target="seg"),
        "present": Task(
            lambda o, b: F.binary_cross_entropy_with_logits(o["present"], b[1]["present"]),
            classes=[0, 2, 5], output="present", target="present",
        ),
    }  # fmt: skip
    request: dict[str, Any] = {"method": methods.Joint(within=0, samples=4), "progress": False, "tasks": tasks}
    batches = [(X, {"seg": maps, "present": present})]
    slim = fxprune.compile(settled(Multitask()), X[:1], Budget(macs=0.5), calibration=batches, **request)
    assert fxprune.report(slim).costs.share("macs") <= 0.5


def test_weights_of_what_varies_within_classes() -> None:
    coupling = fxprune.couple(fxprune.trace(settled(Chain()), X[:1]))
    found = calibrate(coupling, BATCHES, TASKS, by_class=True)
    assert weigh_classes(found, 1.0) is found
    for name, m in weigh_classes(found, 0.25).moments.items():
        dense = found.moments[name]
        assert dense.between is not None
        assert torch.allclose(m.second, 0.25 * dense.second + 0.75 * dense.between)
        assert m.mean is dense.mean


def test_of_redundant_twins_joint_keeps_one_and_the_trace_ratio_both() -> None:
    """Units 0 and 1 are the same; 2 tells the classes apart otherwise, less clearly; 3 varies most, within classes.

    The network is not sure of the classes: where it is, no output counts for its loss.
    """
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(4).repeat(32)
    noise = torch.randn(128, 3, generator=generator)
    first, second = (labels % 2).float(), (labels // 2).float()
    x = torch.stack([4 * first, 4 * first, 2 * second, 0 * first], 1)
    x[:, :3] += 0.3 * noise[:, [0, 0, 1]]
    x[:, 3] = 6 * noise[:, 2]
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        rows = [[-1, -1, -2, 0.8], [1, 1, -2, 0.8], [-1, -1, 2, -0.8], [1, 1, 2, -0.8]]
        model[1].weight.copy_(0.2 * torch.tensor(rows))
        model[1].bias.copy_(0.2 * torch.tensor([4.0, 0, 0, -4]))
    coupling = fxprune.couple(fxprune.trace(model.eval(), x[:1]))

    def kept(method: Any) -> list[int]:
        request: dict[str, Any] = {"method": method, "calibration": [(x, labels)], "tasks": TASKS}
        return fxprune.plan(coupling, Budget(macs=0.5), **request).kept["0.weight", 0].tolist()

    assert kept(methods.CATRO()) == [0, 1]
    aware = kept(methods.Joint(within=0.05, samples=0))
    assert len(aware) == 2
    assert 2 in aware
    assert 3 not in aware
    assert 3 in kept(methods.Joint(samples=0))  # what varies most, class or not


def test_between_is_saved(tmp_path: Path) -> None:
    coupling = fxprune.couple(fxprune.trace(settled(Chain()), X[:1]))
    found = calibrate(coupling, BATCHES, TASKS, by_class=True)
    found.save(tmp_path / "c.safetensors")
    for name, m in Calibration.load(tmp_path / "c.safetensors").moments.items():
        assert torch.equal(m.between, found.moments[name].between)


def test_class_aware_joint_compiles_and_says_what_it_lacks() -> None:
    model = settled(Chain())
    request: dict[str, Any] = {"method": methods.Joint(within=0.2, samples=4), "progress": False}
    slim = fxprune.compile(model, X[:1], Budget(macs=0.5), calibration=BATCHES, tasks=TASKS, **request)
    assert fxprune.report(slim).costs.share("macs") <= 0.5
    plain = calibrate(fxprune.couple(fxprune.trace(model, X[:1])), BATCHES, TASKS)
    with pytest.raises(PlanError, match=r"Joint\(within=0.2\) needs moments by class, .*by_class=True\)`"):
        fxprune.compile(model, X[:1], Budget(macs=0.5), calibration=plain, tasks=TASKS, **request)
    for wrong in (-0.1, 1.5, "much"):
        with pytest.raises(PlanError, match=r"Joint\(within=.*\) is no weight. Pass a number from 0 to 1"):
            methods.Joint(within=wrong)  # pyright: ignore[reportArgumentType]
