"""Multi-task zipping: its formula against a solver, and networks that do the same with channels in another order."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from small import Chain, Squeeze, settled
from torch import Tensor, nn
from torch.nn import functional as F
from twins import permuted

import fxprune
from fxprune import PlanError, methods
from fxprune.matching import cheapest, distances, joint

X = torch.randn(128, 3, 8, 8, generator=torch.Generator().manual_seed(1))
BATCHES: list[Any] = list(X.split(64))


def moment(n: int, seed: int) -> Tensor:
    a = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a.T @ a / (3 * n)


def test_weights_and_errors_are_those_of_least_squares() -> None:
    n = 5
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 1, n, generator=generator, dtype=torch.float64) for _ in range(2))
    h_a, h_b = moment(n, 1), 4 * moment(n, 2)
    damped = [h + 0.01 * h.diagonal().mean() * torch.eye(n, dtype=torch.float64) for h in (h_a, h_b)]
    roots = [torch.linalg.cholesky(h).T for h in damped]  # |root (w - a)|^2 is (w - a)^T H (w - a)
    found, merged = distances(a, h_a, b, h_b), joint([a, b], [h_a, h_b])
    for i in range(3):
        for j in range(3):
            target = torch.cat([roots[0] @ a[i, 0], roots[1] @ b[j, 0]])
            w = torch.linalg.lstsq(torch.cat(roots), target[:, None]).solution
            error = (torch.cat(roots) @ w[:, 0] - target).square().sum() / 2
            torch.testing.assert_close(found[i, j], error)
            if i == j:
                torch.testing.assert_close(merged[i, 0], w[:, 0])


def test_the_cheapest_pairs_are_taken_each_once() -> None:
    cost = np.array([[5.0, 1.0, 2.0], [3.0, 0.5, 9.0], [4.0, 8.0, 7.0]])
    assert cheapest(cost, 3).tolist() == [[1, 1], [0, 2], [2, 0]]
    assert cheapest(cost, 1).tolist() == [[1, 1]]


class Plain(nn.Module):
    """Biases, a batch norm without scale, a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, stride=2)
        self.norm = nn.BatchNorm2d(5, affine=False)
        self.hidden, self.head = nn.Linear(5 * 9, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.second(F.gelu(self.first(x)))).relu()
        return self.head(self.hidden(x.flatten(1)).tanh())


class Deep(nn.Module):
    """Residual, batch norms before and after a convolution, concatenation, depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.before, self.left, self.right = nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.deep, self.mix = nn.Conv2d(11, 11, 3, padding=1, groups=11), nn.Conv2d(11, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.right(self.before(x).relu())
        x = self.deep(torch.cat([self.left(x), x], 1)).relu()
        return self.head(self.mix(x).relu().mean((2, 3)))


@pytest.mark.parametrize("kind", [Chain, Plain, Deep])
def test_networks_that_do_the_same_become_one_that_does(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    nets = {"a": settled(kind()).double()}
    nets |= {name: permuted(nets["a"], X[:1].double(), seed) for seed, name in enumerate("bc", 1)}
    batches = [x.double() for x in BATCHES]
    merged = fxprune.merge(nets, batches, method=methods.MTZ(share=1.0), example_inputs=batches[0][:1])
    own = {name.split(".")[1] for name in merged.state_dict() if not name.startswith("shared.")}
    assert own <= {"head"}
    for name, t in merged.named_parameters():
        if name.startswith("shared."):
            assert t.shape == nets["a"].get_parameter(name.removeprefix("shared.")).shape
    with torch.no_grad():
        for name, net in nets.items():
            torch.testing.assert_close(merged(batches[0])[name], net(batches[0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("std", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 0.0])
def test_a_network_merged_with_itself_stays_as_it_is_however_little_its_inputs_vary(std: float) -> None:
    torch.manual_seed(0)
    net, x = Squeeze().eval(), 1 + std * torch.randn(8, 3, 16, 16)
    merged = fxprune.merge({"a": net, "b": deepcopy(net)}, [x], method=methods.MTZ(share=1.0), example_inputs=x[:1])
    for name in ("reduce.weight", "expand.weight"):
        torch.testing.assert_close(merged.get_parameter(f"shared.{name}"), net.get_parameter(name))
    with torch.no_grad():
        torch.testing.assert_close(merged(1.1 * x)["b"], net(1.1 * x))


def test_equal_weights_stay_as_they_are_whatever_rounding_has_made_of_moments() -> None:
    w, second = torch.randn(3, 1, 5, dtype=torch.float64), 1e-12 * moment(5, 1)
    second[0, 0] = -1e-10
    assert torch.equal(joint([w, w], [second, second]), w)


def test_parts_are_shared_and_nothing_is() -> None:
    nets: dict[str, nn.Module] = {"a": settled(Chain(8)), "b": settled(Chain(8))}
    none = fxprune.merge(nets, BATCHES, method=methods.MTZ(share=0.0), example_inputs=X[:1])
    assert not any(name.startswith("shared.") for name in none.state_dict())
    assert all(torch.equal(none(X)[name], net(X)) for name, net in nets.items())
    half = fxprune.merge(nets, BATCHES, method=methods.MTZ(share=0.5), example_inputs=X[:1])
    shapes = {name: tuple(t.shape) for name, t in half.named_parameters() if t.ndim > 1}
    assert shapes == {
        "shared.conv1.weight": (4, 3, 3, 3),
        "a.conv1.weight": (4, 3, 3, 3),
        "b.conv1.weight": (4, 3, 3, 3),
        "shared.conv2.weight": (8, 4, 3, 3),
        "a.conv2.weight": (8, 8, 3, 3),
        "b.conv2.weight": (8, 8, 3, 3),
        "a.head.weight": (10, 16),
        "b.head.weight": (10, 16),
    }
    # What is merged has statistics of its own, those of what comes in.
    norm, seen = half.get_submodule("shared.bn"), []
    norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    half(X)
    away = seen[0].mean((0, 2, 3)) - norm.get_buffer("running_mean")
    assert (away.abs() < 0.1 * seen[0].std((0, 2, 3))).all()
    torch.testing.assert_close(norm.get_buffer("running_var"), seen[0].var((0, 2, 3)), rtol=0.2, atol=0)


def test_bad_requests_are_told_what_to_do() -> None:
    with pytest.raises(PlanError, match=r"MTZ\(share=2\) is no share. Pass a number from 0 to 1"):
        methods.MTZ(share=2)
    with pytest.raises(PlanError, match="reads data"):
        fxprune.merge({"a": Chain(), "b": Chain()}, method=methods.MTZ(share=0.5), example_inputs=X[:1])
