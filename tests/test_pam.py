"""Pruning-aware merging: the estimator against its formula, planted structure, duplicates across networks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from small import Chain, settled
from torch import Tensor, nn
from torch.nn import functional as F
from twins import permuted

import fxprune
from fxprune import PlanError, Task, methods
from fxprune.assigning import DEAD, SHARED, regrouped
from fxprune.information import irrelevance
from fxprune.observing import binary

GENERATOR = torch.Generator().manual_seed(0)


def entropy(z: Tensor, noise: float) -> float:
    """H(Z) in nats, sample by sample, as the paper has it."""
    n, d = z.shape
    total = 0.0
    for i in range(n):
        near = sum(math.exp(-float((z[i] - z[k]).square().sum()) / (2 * noise)) for k in range(n))
        total += math.log(near) - math.log(n) - d / 2 * math.log(2 * math.pi * noise)
    return d / 2 - total / n


def information(z: Tensor, y: Tensor, noise: float) -> float:
    """I(Z; Y), label by label."""
    total = 0.0
    for j in range(y.shape[1]):
        parts = [y[:, j] == v for v in (-1, 1)]
        total += entropy(z, noise) - sum(float(m.double().mean()) * entropy(z[m], noise) for m in parts)
    return total


def test_the_estimator_is_its_formula() -> None:
    z = torch.rand(14, 4, generator=GENERATOR, dtype=torch.float64)
    y = torch.where(torch.rand(14, 3, generator=GENERATOR) > 0.4, 1.0, -1.0)
    for noise in (0.1, 0.5):
        assert irrelevance(z, y, noise).information[-1] == pytest.approx(information(z, y, noise), rel=1e-9)
    found = irrelevance(z, y)
    assert sorted(found.order) == [0, 1, 2, 3]
    for k in range(4):  # each is the least of all that were left
        left = {j: information(z[:, [*found.order[:k], j]], y, 0.1) for j in found.order[k:]}
        assert found.order[k] == min(left, key=left.__getitem__)
        assert found.information[k] == pytest.approx(min(left.values()), rel=1e-9)
    assert list(found.below(found.information[1])) == list(found.order[:2])
    assert len(found.below(np.inf)) == 4


def test_channels_are_regrouped_by_who_needs_them() -> None:
    needless = np.array([[1, 0, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 1]], dtype=bool)
    assert list(regrouped(needless)) == [DEAD, 1, 2, SHARED, SHARED]


def test_targets_become_labels_of_plus_and_minus_one() -> None:
    assert binary(torch.tensor([2, 0, 2])).tolist() == [[-1, 1], [1, -1], [-1, 1]]
    assert binary(torch.tensor([[True, False], [False, False]])).tolist() == [[1, -1], [-1, -1]]
    assert binary(torch.tensor([[1.0, -1.0], [-1.0, -1.0]])).tolist() == [[1, -1], [-1, -1]]
    assert binary(torch.tensor([0.5, 3.0, 2.0])).tolist() == [[-1], [1], [-1]]
    depth = torch.tensor([1.0, 2.0, 9.0])[:, None, None, None].expand(3, 1, 2, 2)
    assert binary(depth).tolist() == [[-1], [-1], [1]]
    classes = torch.tensor([[[0, 0], [0, 1]], [[0, 1], [1, -100]], [[1, 1], [1, 1]]])
    assert binary(classes).tolist() == [[1, -1], [-1, -1], [-1, 1]]


class Planted(nn.Module):
    """Hidden channels that are inputs, rectified; outputs that read some of them."""

    def __init__(self, hidden: list[int], outputs: list[int]) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, len(hidden), bias=False), nn.Linear(len(hidden), len(outputs))
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(6)[hidden])
            self.head.weight.copy_(4 * torch.eye(len(hidden))[outputs])
            self.head.bias.fill_(-1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)))


def planted() -> tuple[dict[str, nn.Module], list[Any], dict[str, Task]]:
    """Task a is told by inputs 0 and 1, task b by 0 and 2; inputs 3 and 5 are noise that a channel of each reads."""
    x = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))
    nets: dict[str, nn.Module] = {"a": Planted([0, 1, 5], [0, 1]), "b": Planted([3, 0, 2], [1, 2])}
    targets = {"a": x[:, [0, 1]] > 0, "b": x[:, [0, 2]] > 0}

    def task(name: str) -> Task:
        return Task(
            lambda outputs, batch: F.binary_cross_entropy_with_logits(outputs, batch[1][name].float()), target=name
        )

    return nets, [(x, targets)], {name: task(name) for name in nets}


def first_weights(merged: nn.Module) -> dict[str, list[list[int]]]:
    """Which inputs the hidden channels of each part read."""
    found = {name: t for name, t in merged.named_parameters() if name.endswith("first.weight")}
    return {name.split(".")[0]: sorted(row.nonzero().flatten().tolist() for row in t) for name, t in found.items()}


@pytest.mark.parametrize("settings", [{"share": 0.5}, {"alpha": 0.25, "samples": 512}])
def test_information_finds_what_was_planted(settings: dict[str, float]) -> None:
    nets, data, _ = planted()
    method = methods.PAM(**settings)  # pyright: ignore[reportArgumentType]
    merged = fxprune.merge(nets, data, method=method, example_inputs=data[0][0][:2])
    # Weights are not merged: input 0 is there as a channel of each network.
    assert first_weights(merged) == {"shared": [[0], [0]], "a": [[1]], "b": [[2]]}
    for name, net in nets.items():
        torch.testing.assert_close(merged(data[0][0])[name], net(data[0][0]))


def test_errors_find_what_was_planted_and_keep_one_of_two_channels_that_are_the_same() -> None:
    nets, data, tasks = planted()
    method = methods.PAM(alpha=0.01, estimator="fisher")
    merged = fxprune.merge(nets, data, method=method, example_inputs=data[0][0][:2], tasks=tasks)
    assert first_weights(merged) == {"shared": [[0]], "a": [[1]], "b": [[2]]}
    for name, net in nets.items():
        torch.testing.assert_close(merged(data[0][0])[name], net(data[0][0]), rtol=0, atol=0.01)


class Deep(nn.Module):
    """Residual, batch norm, concatenation, depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.deep, self.mix = nn.Conv2d(11, 11, 3, padding=1, groups=11), nn.Conv2d(11, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.right(x)
        x = self.deep(torch.cat([self.left(x), x], 1)).relu()
        return self.head(self.mix(x).relu().mean((2, 3)))


def twins(kind: type[nn.Module]) -> tuple[dict[str, nn.Module], list[Any], dict[str, Task]]:
    """Two networks that do the same with channels in another order, and tasks that they do well."""
    torch.manual_seed(0)
    a = settled(kind())
    x = 3 * torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    b = permuted(a, x[:1], seed=1)
    with torch.no_grad():
        y = a(x)
        torch.testing.assert_close(b(x), y)
    spread = y.std(0)
    targets = y + 0.3 * spread * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    task = Task(lambda outputs, batch: ((outputs - batch[1]) / spread).square().mean())
    return {"a": a, "b": b}, list(zip(x.split(64), targets.split(64), strict=True)), {"a": task, "b": task}


@pytest.mark.parametrize("kind", [Chain, Deep])
def test_networks_that_do_the_same_share_everything(kind: type[nn.Module]) -> None:
    nets, data, tasks = twins(kind)
    x = data[0][0]
    method = methods.PAM(alpha=1e-3, estimator="fisher")
    merged = fxprune.merge(nets, data, method=method, example_inputs=x[:1], tasks=tasks)
    own = {name for name in merged.state_dict() if not name.startswith("shared.")}
    assert own == {"a.head.weight", "a.head.bias", "b.head.weight", "b.head.bias"}
    for name, t in merged.named_parameters():
        if name.startswith("shared."):
            assert len(t) <= len(nets["a"].get_parameter(name.removeprefix("shared.")))
    with torch.no_grad():
        y = nets["a"](x)
        for found in merged(x).values():
            assert ((found - y) / y.std(0)).norm() < 0.1 * ((y - y.mean(0)) / y.std(0)).norm()


def test_at_no_error_nothing_is_shared_that_one_network_has() -> None:
    nets, data, tasks = twins(Chain)
    other = settled(Chain())
    method = methods.PAM(alpha=0.0, estimator="fisher")
    merged = fxprune.merge({"a": nets["a"], "b": other}, data, method=method, example_inputs=data[0][0], tasks=tasks)
    assert not any(name.startswith("shared.") for name in merged.state_dict())
    found = merged(data[0][0])
    assert torch.equal(found["a"], nets["a"](data[0][0]))
    assert torch.equal(found["b"], other(data[0][0]))


def test_groups_that_alpha_does_not_name_are_shared() -> None:
    nets, data, _ = planted()
    merged = fxprune.merge(nets, data, method=methods.PAM(alpha={}), example_inputs=data[0][0][:2])
    assert first_weights(merged) == {"shared": [[0], [0], [1], [2], [3], [5]]}
    merged = fxprune.merge(
        nets, data, method=methods.PAM(alpha={"first.weight": 0.25}, samples=512), example_inputs=data[0][0][:2]
    )
    assert first_weights(merged)["shared"] == [[0], [0]]
    with pytest.raises(PlanError, match=r"names group 'frist', which the networks do not have: \['first.weight'\]"):
        fxprune.merge(nets, data, method=methods.PAM(alpha={"frist": 1.0}), example_inputs=data[0][0][:2])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": math.nan}, r"PAM\(alpha=nan\) is no bound"),
        ({"alpha": -1.0}, r"PAM\(alpha=-1.0\) is no bound"),
        ({"alpha": "x"}, r"PAM\(alpha='x'\) is no bound"),
        ({"alpha": {"first.weight": math.nan}}, "nan}.* is no bound"),
        ({"share": "x"}, r"PAM\(share='x'\) is no share"),
        ({"share": 0.5, "noise": 0}, r"PAM\(noise=0\) is no variance"),
        ({"share": 0.5, "noise": math.inf}, r"PAM\(noise=inf\) is no variance"),
        ({"share": 0.5, "samples": 0}, r"PAM\(samples=0\) is no number of samples. Pass 2 or more"),
        ({"share": 0.5, "samples": 2.5}, r"PAM\(samples=2.5\) is no number of samples"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        methods.PAM(**settings)


def test_data_that_tell_nothing_are_refused() -> None:
    nets, [(x, targets)], tasks = planted()

    def merged(calibration: Any, method: Any = methods.PAM(share=0.5)) -> None:  # noqa: B008 (frozen)
        fxprune.merge(nets, calibration, method=method, example_inputs=x[:2], tasks=tasks)

    with pytest.raises(PlanError, match="the calibration is a single batch"):
        merged(x)
    with pytest.raises(PlanError, match="cannot be iterated"):
        merged(3)
    with pytest.raises(PlanError, match="has no samples"):
        merged([(x[:0], {name: t[:0] for name, t in targets.items()})])
    with pytest.raises(PlanError, match="the targets of task 'b' are alike in all of the 128 samples"):
        merged([(x, targets | {"b": torch.ones(512)})])
    with pytest.raises(PlanError, match="targets of task 'b' are NaN or infinite"):
        merged([(x, targets | {"b": torch.full((512,), torch.nan)})])
    with pytest.raises(PlanError, match=r"what node 'relu' \(.*\) returns is NaN or infinite"):
        merged([(x * torch.nan, targets)])
    for method in (methods.MTZ(share=0.5), methods.PAM(alpha=0.1, estimator="fisher")):
        with pytest.raises(PlanError, match=r"the loss of task '(a|outputs)' is nan on calibration batch 0"):
            merged([(x * torch.nan, targets)], method)


def test_bad_requests_are_told_what_to_do() -> None:
    nets, data, tasks = planted()
    x = data[0][0][:2]
    with pytest.raises(PlanError, match="one of `alpha` and `share`"):
        methods.PAM()
    with pytest.raises(PlanError, match="from 0 to 1"):
        methods.PAM(share=1.5)
    with pytest.raises(PlanError, match="'entropy' or 'fisher'"):
        methods.PAM(alpha=0.1, estimator="guess")  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanError, match="goes by errors"):
        methods.PAM(share=0.5, estimator="fisher")
    with pytest.raises(PlanError, match="reads data"):
        fxprune.merge(nets, method=methods.PAM(share=0.5), example_inputs=x)
    with pytest.raises(PlanError, match="without labels"):
        fxprune.merge(nets, [x], method=methods.PAM(share=0.5), example_inputs=x)
    with pytest.raises(PlanError, match="Pass `calibration=` and `tasks=`"):
        fxprune.merge(nets, data, method=methods.PAM(alpha=0.1, estimator="fisher"), example_inputs=x)
    unnamed = {name: Task(task.loss) for name, task in tasks.items()}
    data = [(data[0][0], {"x": data[0][1]["a"], "y": data[0][1]["b"]})]
    with pytest.raises(PlanError, match=r"Task\(target=...\) is needed"):
        fxprune.merge(nets, data, method=methods.PAM(share=0.5), example_inputs=x, tasks=unnamed)
