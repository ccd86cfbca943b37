"""Merging: side by side to the bit, parts that read what they may, and what tasks select of it."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from small import Chain, Residual, settled
from strategies import Network, build, example_inputs, networks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxprune
from fxprune import Budget, PlanError, methods
from fxprune.assigning import DEAD, SHARED, Sharing
from fxprune.merging import Merger
from fxprune.merging import settled as settled_parts
from fxprune.splitting import COMMON, Splits

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass
class Given:
    """A method that was told who has what: at random by a seed, or all that can be shared."""

    seed: int | None = None
    parts: np.ndarray | None = None
    splits: Splits | None = None

    def share_out(self, merger: Merger) -> Sharing:
        parts = merger.separate()
        choices = [DEAD, SHARED, SHARED, *range(1, len(merger.tasks) + 1)]
        if self.seed is None:
            parts[:] = SHARED
        else:
            parts = np.random.default_rng(self.seed).choice(choices, size=parts.shape)
        self.splits, self.parts = merger.splits, settled_parts(merger.splits, parts)
        return Sharing(self.parts)


def leaves(value: Any) -> list[Tensor]:
    return [t.nan_to_num() for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def run(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    with torch.no_grad():
        return module(*(x.clone() for x in inputs))


def pair(network: Network) -> dict[str, nn.Module]:
    """Two networks of one topology with weights of their own."""
    return {"a": build(network), "b": build(replace(network, seed=network.seed + 1))}


def with_edges_cut(model: nn.Module, task: int, method: Given) -> nn.Module:
    """Return a network whose weights are zero from what its layers do not read once it is merged.

    What is dead or another task's is read by nobody; what is the task's own, not by what is shared.
    """
    splits, parts = method.splits, method.parts
    assert splits is not None
    assert parts is not None
    model = copy.deepcopy(model)
    of_inputs = {
        f"{n.target}.weight"
        for n in splits.networks[0].graph.nodes
        if n.op == "call_module" and all(splits.kinds[a.name] == COMMON for a in n.all_input_nodes)
    }
    for name, weight in model.named_parameters():
        if name in of_inputs or not name.endswith("weight") or weight.ndim < 2 or name not in splits.coupling.tensors:
            continue
        rows, columns = splits.coupling.tensors[name][1][:2]
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.modules.conv._ConvTransposeNd):
            rows, columns = columns, rows
            weight = weight.data.transpose(0, 1)
        sizes = weight.shape
        if any(ids is not None and ids.size != n for ids, n in zip((rows, columns), sizes, strict=False)):
            continue  # of groups: these channels are each task's own
        of_row = np.full(sizes[0], task + 1) if rows is None else parts[task][rows.ravel()]
        of_column = np.full(sizes[1], SHARED) if columns is None else parts[task][columns.ravel()]
        own = (of_column == task + 1) & (of_row[:, None] == task + 1)
        reads = torch.from_numpy((of_column == SHARED) | own)
        weight.data.mul_(reads.reshape(*reads.shape, *[1] * (weight.ndim - 2)))
    return model


@given(network=networks())
@settings(max_examples=10)
def test_nothing_shared_is_the_separate_networks_to_the_bit(network: Network) -> None:
    nets, inputs = pair(network), example_inputs(network)
    merged = fxprune.merge(nets, method=methods.Separate(), example_inputs=inputs)
    found = run(merged, inputs)
    assert list(found) == ["a", "b"]
    for name, model in nets.items():
        expected = run(fxprune.trace(model, inputs).module, inputs)
        assert all(torch.equal(x, y) for x, y in zip(leaves(found[name]), leaves(expected), strict=True))


@given(network=networks())
@settings(max_examples=15)
def test_parts_read_what_is_shared_and_their_own(network: Network) -> None:
    nets, inputs = pair(network), example_inputs(network)
    method = Given(network.seed)
    merged = fxprune.merge(nets, method=method, example_inputs=inputs)
    found = run(merged, inputs)
    for task, (name, model) in enumerate(nets.items()):
        expected = run(with_edges_cut(model, task, method), inputs)
        for x, y in zip(leaves(found[name]), leaves(expected), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


class Asks(nn.Module):
    """Decides by its channels and by its positions what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x * 0.5 if x.size(1) > 6 else x.sigmoid()
        return self.second(x if x.size(2) > 2 else x.relu())


def test_questions_about_channels_are_answered_as_when_traced_and_others_still_asked() -> None:
    torch.manual_seed(0)
    nets = {"a": Asks().double().eval(), "b": Asks().double().eval()}
    method, inputs = Given(0), (torch.randn(2, 3, 4, 4, dtype=torch.float64),)
    merged = fxprune.merge(nets, method=method, example_inputs=inputs)
    widths = [m.out_channels for name, m in merged.named_modules() if name.endswith("first")]
    assert min(widths) <= 6
    for task, (name, model) in enumerate(nets.items()):
        torch.testing.assert_close(merged(*inputs)[name], with_edges_cut(model, task, method)(*inputs))
    with pytest.raises(ValueError, match="forward asks for a size"):
        merged(inputs[0][:, :, :2])


class Branches(nn.Module):
    """Residuals, a concatenation, a depthwise and a transposed convolution, a flattened map; returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.deep = nn.Conv2d(11, 11, 3, padding=1, groups=11)
        self.up = nn.ConvTranspose2d(11, 4, 2, stride=2)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.head, self.hidden = nn.Linear(4 * 8 * 8, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.stem(x)).relu()
        x = x + self.scale * self.right(x)
        x = self.deep(torch.cat([self.left(x), x], 1)).relu()
        x = self.up(F.max_pool2d(x, 2))
        flat = self.head(x.view(x.size(0), -1)).relu()
        return self.hidden(flat), x.mean((2, 3))


def three(kind: type[nn.Module]) -> dict[str, nn.Module]:
    found = {}
    for i, name in enumerate(("seg", "depth", "edges")):
        torch.manual_seed(i)
        found[name] = settled(kind())
    return found


def test_all_shared_is_the_separate_networks_too() -> None:
    nets = three(Branches)
    before = {name: copy.deepcopy(net.state_dict()) for name, net in nets.items()}
    method = Given()
    merged = fxprune.merge(nets, method=method, example_inputs=X)
    assert merged.meta["fxprune_held"] == {}
    assert method.splits is not None
    assert int(method.splits.free.sum()) == 6 + 5 + 7  # what goes out is frozen: the four of `up`, too
    assert {name.split(".")[0] for name in merged.state_dict()} == {"shared", "seg", "depth", "edges"}
    assert merged.state_dict()["shared.stem.weight"].shape == (18, 3, 3, 3)
    assert merged.state_dict()["depth.up.weight"].shape == (33, 4, 2, 2)
    for name, net in nets.items():
        for x, y in zip(run(merged, (X,))[name], run(net, (X,)), strict=True):
            torch.testing.assert_close(x, y)
        assert all(torch.equal(before[name][key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("kind", [Chain, Branches])
@pytest.mark.parametrize("method", [methods.Separate(), methods.Shared(), Given(0), Given()], ids=repr)
def test_selections_of_tasks_are_bit_identical_and_drop_what_others_need(kind: type[nn.Module], method: Any) -> None:
    merged = fxprune.merge(three(kind), method=method, example_inputs=X)
    whole = run(merged, (X,))
    for count in (1, 2, 3):
        for tasks in itertools.combinations(whole, count):
            some = fxprune.select_tasks(merged, tasks)
            found = run(some, (X,))
            assert list(found) == list(tasks)
            for task in tasks:
                assert all(torch.equal(x, y) for x, y in zip(leaves(found[task]), leaves(whole[task]), strict=True))
            assert {name.split(".")[0] for name in some.state_dict()} <= {"shared", *tasks}
    costs = fxprune.combination_costs(merged, X)
    if isinstance(method, methods.Separate):
        assert costs["seg"].costs.macs * 3 == costs.whole.costs.macs


def test_all_that_can_be_is_shared_and_the_networks_are_computed() -> None:
    nets = three(Chain)
    merged = fxprune.merge(nets, method=methods.Shared(), example_inputs=X)
    for name, net in nets.items():
        for x, y in zip(leaves(run(merged, (X,))[name]), leaves(run(net, (X,))), strict=True):
            torch.testing.assert_close(x, y)
    given = fxprune.merge(nets, method=Given(), example_inputs=X)
    assert {n: t.shape for n, t in merged.state_dict().items()} == {n: t.shape for n, t in given.state_dict().items()}


def test_what_is_merged_trains_copies_and_compiles() -> None:
    merged = fxprune.merge(three(Chain), method=Given(3), example_inputs=X).train()
    sum(t.square().mean() for t in merged(X).values()).backward()  # pyright: ignore
    assert all(p.grad is not None for p in merged.parameters())
    merged.eval()
    again = copy.deepcopy(merged)
    assert all(torch.equal(x, y) for x, y in zip(run(again, (X,)).values(), run(merged, (X,)).values(), strict=True))
    slim = fxprune.compile(merged, X, Budget(macs=0.5), progress=False)  # which verifies what it returns
    verification = fxprune.report(slim).verification
    assert verification is not None
    assert verification.passed
    assert fxprune.report(slim).costs.after.macs <= 0.5 * fxprune.report(slim).costs.before.macs
    assert list(slim(X)) == ["seg", "depth", "edges"]


class Normed(nn.Module):
    """A layer norm over the channels, and rows of a view."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.norm(self.a(x))).relu())


def test_channels_that_a_node_mixes_are_each_tasks_own_and_it_says_so() -> None:
    nets: dict[str, nn.Module] = {"a": Normed().eval(), "b": Normed().eval()}
    x = torch.randn(3, 4)
    merged = fxprune.merge(nets, method=Given(), example_inputs=x)
    assert merged.meta["fxprune_held"] == {"norm": "mixes channels"}
    # Behind what is not shared nothing can be: it would read nothing.
    assert {name.split(".")[0] for name in merged.state_dict()} == {"a", "b"}
    assert all(torch.equal(merged(x)[name], net(x)) for name, net in nets.items())
    balanced = fxprune.merge(three(Residual), method=Given(), example_inputs=X).meta["fxprune_held"]
    assert balanced == {"b2": "makes rows of channels that are balanced"}


class Normalised(nn.Module):
    """`Chain` on inputs that are normalised by buffers, with a frozen factor between its layers."""

    def __init__(self, mean: float = 0.5, factor: float = 2.0, trained: bool = False, counts: bool = False) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), mean))
        self.register_buffer("seen", torch.zeros(()))
        self.deviation = nn.Parameter(torch.full((1, 3, 1, 1), 0.2), requires_grad=trained)
        self.factor = nn.Parameter(torch.tensor(factor), requires_grad=False)
        self.chain, self.counts = Chain(), counts

    def forward(self, x: Tensor) -> Tensor:
        if self.counts:
            self.seen.add_(1)
            x = x + self.seen
        x = self.chain.conv1((x - self.mean) / self.deviation) * self.factor
        return self.chain.head(self.chain.conv2(x).relu().mean((2, 3)))


OWN = "differs from network to network, or may once they are trained"


@pytest.mark.parametrize(
    ("first", "second", "held", "shares"),
    [
        ({}, {}, {}, {"conv1", "conv2"}),
        ({}, {"mean": 0.4}, {"mean": OWN}, set()),
        ({"trained": True}, {"trained": True}, {"deviation": OWN}, set()),
        ({"counts": True}, {"counts": True}, {"seen": OWN}, set()),
        ({}, {"factor": 3.0}, {"mul": "takes 'factor', which each network has its own of, along"}, set()),
    ],
)
def test_values_that_all_networks_have_are_read_by_all_and_others_hold_what_is_behind(
    first: dict[str, Any], second: dict[str, Any], held: dict[str, str], shares: set[str]
) -> None:
    torch.manual_seed(0)
    nets: dict[str, nn.Module] = {"a": Normalised(**first).eval(), "b": Normalised(**second).eval()}
    merged = fxprune.merge(nets, method=methods.Shared(), example_inputs=X)
    assert merged.meta["fxprune_held"] == held
    found = {name.split(".")[2] for name in merged.state_dict() if name.startswith("shared.")}
    assert found == shares
    outputs = run(copy.deepcopy(merged), (X,))
    for name, net in nets.items():
        torch.testing.assert_close(outputs[name], run(copy.deepcopy(net), (X,)))


def test_a_norm_of_the_inputs_that_all_networks_have_is_run_once() -> None:
    nets = {name: nn.Sequential(nn.BatchNorm2d(3, affine=False), net) for name, net in three(Chain).items()}
    for net in nets.values():
        settled(net)
        net[0].running_mean.fill_(0.3)  # pyright: ignore
        net[0].running_var.fill_(2.0)  # pyright: ignore
    merged = fxprune.merge(nets, method=methods.Shared(), example_inputs=X)
    assert merged.meta["fxprune_held"] == {}
    assert {name.split(".")[0] for name in merged.state_dict()} == {"common", "shared", *nets}
    for name, net in nets.items():
        torch.testing.assert_close(run(merged, (X,))[name], run(net, (X,)))
    slim = fxprune.compile(fxprune.select_tasks(merged, ["seg", "edges"]), X, Budget(macs=0.5), progress=False)
    assert list(slim(X)) == ["seg", "edges"]


class Other(Chain):
    """`Chain` with another activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn(self.conv1(x)))
        return self.head(F.relu(self.conv2(x)).mean((2, 3)))


class Stretched(Chain):
    """`Chain` with another pooling."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.bn(self.conv1(x)))))
        return self.head(x.mean((3, 2)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Other(), r"'a' and 'b' are not of one topology: at node 'gelu' \(test_merging.py:\d+: x = F.gelu.*relu.*gelu"),
        (Chain(8), r"at node 'conv1' \(small.py:\d+: .*Conv2d\(3, 16.*Conv2d\(3, 8"),
        (Stretched(), r"at node 'mean' .* the arguments are .*\(2, 3\).*\(3, 2\)"),
        (Chain().double(), r"at node 'conv1' .*'weight' is torch.float32 \(16, 3, 3, 3\) in one, torch.float64"),
    ],
)
def test_networks_that_differ_are_told_where(other: nn.Module, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fxprune.merge({"a": Chain(), "b": other}, method=methods.Separate(), example_inputs=X)


class Writing(nn.Module):
    """Writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.head = nn.Parameter(torch.rand(3)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.add_(self.offset))


def test_bad_requests_are_told_what_to_do() -> None:
    nets: dict[str, nn.Module] = {"a": Chain(), "b": Chain()}
    merge = fxprune.merge
    with pytest.raises(PlanError, match="two networks or more"):
        merge({"a": Chain()}, method=methods.Separate(), example_inputs=X)
    with pytest.raises(PlanError, match="'shared' cannot name a task"):
        merge({"shared": Chain(), "b": Chain()}, method=methods.Separate(), example_inputs=X)
    with pytest.raises(PlanError, match="does not merge"):
        merge(nets, method=methods.Magnitude(), example_inputs=X)  # pyright: ignore
    task = fxprune.Task(lambda outputs, batch: outputs.mean())
    with pytest.raises(PlanError, match=r"tasks are \['c'\], networks \['a', 'b'\]"):
        merge(nets, method=methods.Separate(), example_inputs=X, tasks={"c": task})
    with pytest.raises(PlanError, match=r"node 'add_' .* writes to 'x'"):
        merge({"a": Writing(), "b": Writing()}, method=methods.Separate(), example_inputs=torch.randn(1, 3))


@pytest.mark.parametrize(
    "name",
    ["class", "a b", "", "graph", "forward", "training", "code", "meta", "_modules", "T_destination", "common", "type"],
)
def test_names_that_would_break_the_merged_module_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match=rf"{name!r} cannot name a task here, for it becomes an attribute"):
        fxprune.merge({name: Chain(), "b": Chain()}, method=methods.Shared(), example_inputs=X)


@pytest.mark.parametrize("name", ["self", "x", "match", "head", "conv1", "input", "shared_", "_1", "print"])
def test_other_names_are_those_of_outputs(name: str) -> None:
    nets = {name: settled(Chain()), "b": settled(Chain())}
    merged = fxprune.merge(nets, method=methods.Shared(), example_inputs=X)
    for task, net in nets.items():
        torch.testing.assert_close(run(merged, (X,))[task], run(net, (X,)))


@dataclass
class Behind:
    """Shares only what the second convolution of `Chain` makes."""

    def share_out(self, merger: Merger) -> Sharing:
        parts = merger.separate()
        second = next(g for g in merger.splits.coupling.groups() if g.name == "conv2.weight")
        parts[:, second.cells[0]] = SHARED
        return Sharing(parts)


def test_what_a_layer_makes_of_nothing_shared_is_not_shared() -> None:
    nets = three(Chain)
    merged = fxprune.merge(nets, method=Behind(), example_inputs=X)
    assert not any(name.startswith("shared.") for name in merged.state_dict())
    assert all(torch.equal(merged(X)[name], net(X)) for name, net in nets.items())
