"""Branches that go as a whole: which may, what stands in their place, and that it is exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from small import Chain, settled
from strategies import build, example_inputs, random_network
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune import ArtifactError, Budget, Constraints, PlanError
from fxprune.allocating import steps_of_all
from fxprune.cutting import HOME
from fxprune.masking import NO_INPUT, AbsentIsNaN
from fxprune.paths import paths_by_score
from fxprune.planning import plan_of
from fxprune.verifying import masked_copy, run_in

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
EMPTY = Constraints(min_width=0)


class Net(nn.Module):
    """A stem, some residual blocks, and a head."""

    def __init__(self, *blocks: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Plus(nn.Module):
    """A residual block."""

    def __init__(self, *body: nn.Module, last: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.last = nn.Sequential(*body), last or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.body(x))


class Basic(nn.Module):
    """The basic block of a ResNet, which adds in place."""

    def __init__(self, width: int = 8, out: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(width, out, 1) if width != out else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.down is None else self.down(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, width // 2, 1), nn.Conv2d(width // 2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class DropPath(nn.Module):
    """Drops the branch of whole samples in training."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(len(x), 1, 1, 1, device=x.device) > 0.1)


class Scaled(nn.Module):
    """An MLP over channels with layer scale, dropout and drop-path, as in ConvNeXt."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)
        self.gamma, self.drop, self.path = nn.Parameter(torch.ones(width)), nn.Dropout(0.1), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.permute(0, 2, 3, 1))
        y = self.gamma * self.drop(self.fc2(F.gelu(self.fc1(y))))
        return x + self.path(y.permute(0, 3, 1, 2))


class Attention(nn.Module):
    """Self-attention over the places of a map, then an MLP."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(tokens)).reshape(b, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.proj(y)
        return tokens.transpose(1, 2).reshape(b, c, h, w)


class Multihead(nn.Module):
    """`nn.MultiheadAttention` over the places of a map."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        y = self.norm(tokens)
        tokens = tokens + self.attend(y, y, y, need_weights=False)[0]
        return tokens.transpose(1, 2).reshape(x.shape)


class Windows(nn.Module):
    """Rolls and cuts the map into windows, works in them, and puts them together again."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = x.permute(0, 2, 3, 1).roll((-1, -1), (1, 2)).reshape(b, h // 2, 2, w // 2, 2, c).transpose(2, 3)
        y = self.fc2(F.relu(self.fc1(y.flatten(1, 2))))
        y = y.reshape(b, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(b, h, w, c).roll((1, 1), (1, 2))
        return x + y.permute(0, 3, 1, 2)


def conv(inputs: int, out: int, kernel: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, out, kernel, padding=kernel // 2, **settings)


def bottleneck(*inside: nn.Module, **settings: Any) -> nn.Module:
    return Plus(
        conv(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4, **settings), nn.BatchNorm2d(4), nn.ReLU(), *inside,
        conv(4, 8, 1), nn.BatchNorm2d(8), last=nn.ReLU(),
    )  # fmt: skip


BLOCKS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "basic": (Basic, True),
    "plain, without biases": (lambda: Plus(conv(8, 6, bias=False), nn.ReLU(), conv(6, 8, bias=False)), False),
    "plain, with a bias": (lambda: Plus(conv(8, 6), nn.ReLU(), conv(6, 8)), True),
    "bottleneck": (bottleneck, True),
    "bottleneck, depthwise": (lambda: bottleneck(groups=4), True),
    "bottleneck, grouped": (lambda: bottleneck(groups=2), True),
    "bottleneck, squeezed": (lambda: bottleneck(Squeeze(4)), True),
    "squeezed at the end": (lambda: Plus(conv(8, 6), nn.ReLU(), conv(6, 8), nn.BatchNorm2d(8), Squeeze(8)), True),
    "normalized at the end": (lambda: Plus(conv(8, 6), nn.ReLU(), conv(6, 8), nn.GroupNorm(1, 8)), True),
    "pre-activation": (
        lambda: Plus(nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv(8, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 8)),
        True,
    ),
    "transposed": (lambda: Plus(conv(8, 6), nn.ReLU(), nn.ConvTranspose2d(6, 8, 3, padding=1)), True),
    "nested": (lambda: Plus(conv(8, 6), nn.ReLU(), Plus(conv(6, 4), nn.ReLU(), conv(4, 6)), conv(6, 8)), True),
    "scaled": (Scaled, True),
    "attention": (Attention, True),
    "multihead": (Multihead, True),
    "windows": (Windows, True),
}


def coupled(model: nn.Module, inputs: Any = X) -> fxprune.Coupling:
    return fxprune.couple(fxprune.trace(model, inputs))


def least(coupling: fxprune.Coupling, constraints: Constraints = EMPTY, seed: int = 0) -> fxprune.Plan:
    """Return the plan in which everything goes that may."""
    score = np.random.default_rng(seed).random(coupling.num_channels)
    allocation = steps_of_all(coupling, paths_by_score(coupling, score), "uniform", constraints)
    return plan_of(coupling, allocation.keep(np.ones(len(allocation), dtype=bool)))


def removal_only(coupling: fxprune.Coupling) -> fxprune.Plan:
    """Return the plan in which only branches go, and the rest is dense."""
    plan = least(coupling)
    assert plan.keep is not None
    keep = np.ones_like(plan.keep)
    for group, width in zip(coupling.groups(), plan.groups, strict=True):
        if not width.after:
            keep[coupling.members.of(group.choices)[0]] = False
    return plan_of(coupling, coupling.settle(keep))


def without(coupling: fxprune.Coupling, group: int) -> fxprune.Plan:
    """Return the plan in which a group keeps nothing and all others everything."""
    keep = np.ones(coupling.num_channels, dtype=bool)
    keep[coupling.members.of(coupling.groups()[group].choices)[0]] = False
    return plan_of(coupling, coupling.settle(keep))


def constants(slim: nn.Module) -> list[str]:
    return [name for name in slim.state_dict() if name.startswith(HOME)]


def counted(model: nn.Module, *inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() // 2


def check(coupling: fxprune.Coupling, plan: fxprune.Plan) -> fx.GraphModule:
    """Rewrite by a plan; check the theorem, the costs, and that nothing of the branches is left."""
    slim = fxprune.rewrite(coupling, plan)
    assert fxprune.verify(coupling, plan, slim).worst < 1e-12
    after = plan.costs.after
    assert sum(p.numel() for p in slim.parameters()) == after.params
    assert counted(copy.deepcopy(slim).eval(), *coupling.traced.args) == after.macs
    again = coupled(slim, coupling.traced.args)
    assert again.costs(np.ones(again.num_channels, dtype=bool)).memory == after.memory
    gone = {name for (name, _), kept in plan.kept.items() if not kept.size}
    assert gone
    assert not gone & slim.state_dict().keys()
    dead = [n.name for n in slim.graph.nodes if not n.users and n.op != "output"]
    assert set(dead) <= {n.name for n in coupling.traced.graph.nodes if not n.users}
    return slim


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("keeps", ["the rest", "little"])
def test_a_residual_branch_that_keeps_nothing_becomes_a_constant(name: str, keeps: str) -> None:
    make, has_constant = BLOCKS[name]
    model = settled(Net(make(), make())).float()
    coupling = coupled(model)
    plan = removal_only(coupling) if keeps == "the rest" else least(coupling)
    slim = check(coupling, plan)
    assert len(constants(slim)) == (2 if has_constant else 0)
    assert not any(name.startswith("blocks") for name, _ in slim.named_parameters())
    assert "branch removed" in str(plan)
    other = torch.randn(3, 3, 12, 16, dtype=torch.float64)  # the constant is the same for every batch and size
    expected = run_in(AbsentIsNaN(), masked_copy(model, plan), (other,), {})
    torch.testing.assert_close(copy.deepcopy(slim).double()(other), expected, rtol=1e-6, atol=1e-6)


def test_an_addition_of_a_constant_that_is_always_zero_disappears() -> None:
    coupling = coupled(settled(Net(BLOCKS["plain, without biases"][0]())))
    slim = check(coupling, least(coupling))
    assert "add" not in [n.name for n in slim.graph.nodes]
    assert not constants(slim)


def test_a_bias_that_happens_to_be_zero_stays_a_parameter() -> None:
    model = settled(Net(BLOCKS["plain, with a bias"][0]()))
    nn.init.zeros_(model.blocks[0].body[2].bias)
    coupling = coupled(model)
    slim = check(coupling, least(coupling))
    assert len(constants(slim)) == 1
    assert not slim.state_dict()[constants(slim)[0]].any()


def test_a_projected_shortcut_stays() -> None:
    model = settled(nn.Sequential(conv(3, 8), Basic(8, 12), nn.Flatten(), nn.Linear(12 * 64, 5)))
    slim = check(coupling := coupled(model), least(coupling))
    assert "1.down.weight" in slim.state_dict()
    assert not any("conv" in key or "bn" in key for key in slim.state_dict() if not key.startswith(HOME))


VISION = {"resnet18": 8, "mobilenet_v2": 10, "convnext_tiny": 18}


@pytest.mark.parametrize("name", VISION)
def test_torchvision_at_a_budget_that_asks_for_it(name: str) -> None:
    torch.manual_seed(0)
    model = settled(getattr(torchvision.models, name)(num_classes=10))
    x = torch.randn(1, 3, 32, 32)
    coupling = coupled(model, x)
    floor = least(coupling)
    assert len(constants(check(coupling, floor))) == VISION[name]
    bound = least(coupling, Constraints()).costs.after.params - 1
    with pytest.raises(PlanError, match="cannot be met"):
        fxprune.compile(model, x, Budget(params=bound), progress=False)
    slim = fxprune.compile(model, x, Budget(params=bound), constraints=EMPTY, progress=False)
    report = fxprune.report(slim)
    assert report.costs.after.params <= bound
    assert report.verification is not None
    assert report.verification.worst < 1e-12
    assert any(g.after == 0 for g in report.groups)
    assert "keep nothing, and their branches are removed" in str(report)
    check(coupled(model, x), report.plan)


# where a branch may not go


class Made(nn.Module):
    """A network around a block that forward is given for."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.stem, self.head, self.use = conv(3, 8), nn.Linear(8, 5), use
        self.first, self.second = conv(8, 6), conv(6, 8)
        for key, part in parts.items():
            self.add_module(key, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self, self.stem(x)).mean((2, 3)))

    def branch(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


def counting_places(m: Any, x: Tensor) -> Tensor:
    y = m.branch(x)
    return x + y * y.shape[2]


def written_to(m: Any, x: Tensor) -> Tensor:
    return x + m.second(F.relu(m.first(F.relu_(x))))


KEPT: dict[str, Made] = {
    "a trunk": Made(lambda m, x: m.branch(x)),
    "a constant through padded zeros": Made(lambda m, x: x + m.third(m.branch(x)), third=conv(8, 8, groups=8)),
    "a constant summed over all places": Made(lambda m, x: x + m.branch(x).sum((2, 3), keepdim=True)),
    "a constant that knows the size": Made(counting_places),
    "a gate": Made(lambda m, x: x * m.branch(x).sigmoid()),
    "a part of a concatenation": Made(
        lambda m, x: m.third(torch.cat([F.relu(m.first(x)), m.fourth(x)], 1)), third=conv(14, 8), fourth=conv(8, 8)
    ),
    "random": Made(lambda m, x: x + 1e-30 * torch.rand_like(y := m.branch(x)) + y),
    "wider than what it is added to": Made(lambda m, x: x.mean((2, 3), keepdim=True) + m.branch(x)),
    "scaled in the addition": Made(lambda m, x: torch.add(x, m.branch(x), alpha=0.5)),
    "needed by what writes to the trunk": Made(written_to),
    "read in part": Made(lambda m, x: x + m.second(F.relu(h := m.first(x))) + h[:, :1]),
}


@pytest.mark.parametrize("name", KEPT)
def test_where_no_branch_may_go_one_channel_stays(name: str) -> None:
    model = settled(KEPT[name])
    coupling = coupled(model)
    plan = least(coupling)
    assert all(g.after > 0 for g in plan.groups)
    alike = least(coupling, Constraints())
    assert plan.costs == alike.costs
    assert fxprune.verify(coupling, plan, fxprune.rewrite(coupling, plan)).worst < 1e-12


def test_a_chain_keeps_one_channel_everywhere() -> None:
    plan = least(coupled(settled(Chain())))
    assert [g.after for g in plan.groups] == [1] * len(plan.groups)


def test_of_two_branches_without_a_trunk_one_stays() -> None:
    model = settled(Made(lambda m, x: m.branch(x) + m.fourth(F.relu(m.third(x))), third=conv(8, 6), fourth=conv(6, 8)))
    coupling = coupled(model)
    plan = least(coupling)
    assert sum(g.after == 0 for g in plan.groups) == 1
    assert len(constants(check(coupling, plan))) == 1


def test_what_constraints_keep_is_not_removed_with_a_branch() -> None:
    coupling = coupled(settled(Net(bottleneck(), bottleneck())))
    both = fxprune.plan(coupling, Budget(params=least(coupling).costs.after.params), constraints=EMPTY)
    assert sum(g.after == 0 for g in both.groups) == 4
    held = Constraints(min_width=0, keep_outputs=["blocks.0.body.0"])
    with pytest.raises(PlanError, match="cannot be met"):
        fxprune.plan(coupling, Budget(params=both.costs.after.params), constraints=held)
    bound = fxprune.constraining.constrain(coupling, held)
    plan = least(bound, held)
    assert [g.after == 0 for g in plan.groups].count(True) == 2
    assert len(plan.kept["blocks.1.body.0.weight", 0]) == 0


def test_other_limits_on_widths_hold() -> None:
    coupling = coupled(settled(Net(Basic(), Basic())))
    assert all(g.after > 0 for g in least(coupling, Constraints(min_width=0, max_ratio=0.9)).groups)
    widths = [g.after for g in least(coupling, Constraints(min_width=0, multiple_of=4)).groups]
    assert sorted(widths) == [0, 0, 4]


@pytest.mark.parametrize("value", [-1, -8])
def test_widths_below_nothing_are_refused(value: int) -> None:
    with pytest.raises(PlanError, match=rf"min_width={value}\) is less than nothing\. Pass 1 or more, or 0"):
        Constraints(min_width=value)


def test_by_hand_only_what_may_go_is_accepted() -> None:
    coupling = coupled(settled(Net(bottleneck())))
    plan = without(coupling, 1)  # what comes after it is constant; it goes from the graph, though the plan keeps it
    slim = check(coupling, plan)
    assert plan.groups[2].after == plan.groups[2].before
    assert len(constants(slim)) == 1
    with pytest.raises(PlanError, match="an output of the network that depends on nothing"):
        without(coupling, 0)
    padded = coupled(settled(Net(Plus(conv(8, 6), nn.ReLU(), conv(6, 4), nn.ReLU(), conv(4, 8)))))
    with pytest.raises(PlanError, match=r"may not turn into the same constant at every place"):
        without(padded, 1)  # the constant between the last two convolutions
    assert [g.after for g in least(padded).groups] == [1, 0, 0]


# what comes out


def test_the_slim_network_trains_and_its_constant_too() -> None:
    model = settled(Net(Basic(), Scaled())).train()
    coupling = coupled(model)
    slim = fxprune.rewrite(coupling, removal_only(coupling)).train()
    names = constants(slim)
    assert len(names) == 2
    before = {k: v.clone() for k, v in slim.state_dict().items()}
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.1)
    F.cross_entropy(slim(X), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert all(not torch.equal(before[name], slim.state_dict()[name]) for name in names)


def test_the_constant_is_frozen_where_all_it_comes_from_is() -> None:
    model = settled(Net(Basic()))
    model.blocks.requires_grad_(False)
    coupling = coupled(model)
    slim = fxprune.rewrite(coupling, least(coupling))
    assert not dict(slim.named_parameters())[constants(slim)[0]].requires_grad


def test_an_optimizer_is_carried_over_and_moves_the_constant() -> None:
    model = settled(Net(Basic()))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    F.cross_entropy(model(X), torch.tensor([0, 1])).backward()
    optimizer.step()
    plan = removal_only(coupled(model))
    slim = fxprune.compile(model, X, Budget(params=plan.costs.after.params), constraints=EMPTY, progress=False)
    moved = fxprune.transfer(optimizer, slim, model=model)
    assert {id(p) for g in moved.param_groups for p in g["params"]} == {id(p) for p in slim.parameters()}


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = settled(Net(Basic(), bottleneck(groups=2)))
    floor = least(coupled(model)).costs.after.params
    slim = fxprune.compile(model, X, Budget(params=floor), constraints=EMPTY, progress=False)
    with torch.no_grad():
        for p in slim.parameters():
            p.add_(0.1)
    fxprune.save(slim, tmp_path / "slim")
    found = fxprune.load(tmp_path / "slim", Net(Basic(), bottleneck(groups=2)))
    assert found.state_dict().keys() == slim.state_dict().keys()
    torch.testing.assert_close(found.eval()(X), slim.eval()(X))
    assert str(fxprune.report(found).plan) == str(fxprune.report(slim).plan)


@pytest.mark.parametrize("name", ["bottleneck", "bottleneck, grouped", "attention", "plain, without biases"])
def test_a_plan_that_was_read_cuts_another_checkpoint(name: str) -> None:
    make = BLOCKS[name][0]
    plan = least(coupled(settled(Net(make()))))
    read = fxprune.Plan.from_json(plan.to_json())
    assert read.empties
    assert all(np.array_equal(read.kept[key], kept) for key, kept in plan.kept.items())
    torch.manual_seed(7)
    other = coupled(Net(make()).eval())
    check(other, read)


def test_a_plan_that_empties_what_has_to_stay_is_refused() -> None:
    coupling = coupled(settled(Chain()))
    plan = least(coupling)
    empty = {key: np.empty(0, dtype=np.int64) if "conv2" in str(key) or "bn" in str(key) or key == ("conv1.weight", 0)
             or key == ("conv1.bias", 0) else kept for key, kept in plan.kept.items()}  # fmt: skip
    damaged = fxprune.Plan(empty, plan.sizes, plan.costs, plan.groups, plan.method)
    with pytest.raises(ArtifactError, match=r"The plan is damaged"):
        fxprune.rewrite(coupling, damaged)


def test_nothing_is_looked_for_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []
    monkeypatch.setattr(fxprune.branches.Branches, "__init__", lambda *args: looked.append(args))
    fxprune.compile(settled(Net(Basic())), X, Budget(macs=0.5), progress=False)
    assert not looked


# the reference


def test_a_contraction_of_nothing_gives_its_bias_where_outputs_are_present() -> None:
    absent, marked = torch.nan, torch.tensor(NO_INPUT).view(torch.float64)
    x = torch.full((3, 4), absent, dtype=torch.float64)
    bias = torch.tensor([1.0, 2.0, absent], dtype=torch.float64)
    w = torch.full((3, 4), absent, dtype=torch.float64)
    w[:2] = marked
    with AbsentIsNaN():
        found = F.linear(x, w, bias)
        without = F.linear(x, w)
        everything = F.linear(torch.ones_like(x), w)  # inputs there and no weight: the outputs are absent
        mapped = F.conv2d(x.reshape(1, 4, 3, 1), w.reshape(3, 4, 1, 1), bias, padding=1)
    torch.testing.assert_close(found, bias.expand(3, 3), equal_nan=True)
    assert torch.equal(without.isnan(), torch.tensor([False, False, True]).expand(3, 3))
    assert not without[:, :2].any()
    assert everything.isnan().all()
    torch.testing.assert_close(mapped, bias.reshape(1, 3, 1, 1).expand(1, 3, 5, 3), equal_nan=True)


def test_the_reference_tells_absent_outputs_from_absent_inputs() -> None:
    coupling = coupled(model := settled(Net(bottleneck())))
    masked = masked_copy(model, least(coupling)).get_submodule("blocks.0.body")
    inner, last = masked[3].weight, masked[6].weight
    assert (inner.view(torch.int64) != NO_INPUT).all()  # its outputs went too
    here = (last.view(torch.int64) == NO_INPUT).flatten(1).all(1)
    assert torch.equal(here, ~masked[6].bias.isnan())
    assert here.sum() == 1


@pytest.mark.parametrize("seeds", [range(20), range(600, 620)], ids=str)
def test_random_networks_without_their_branches_satisfy_the_theorem(seeds: range) -> None:
    emptied = 0
    for seed in seeds:
        network = random_network(seed)
        coupling = coupled(build(network), example_inputs(network))
        plan = least(coupling, seed=seed)
        try:
            slim = fxprune.rewrite(coupling, plan)
        except fxprune.RewriteError:
            continue  # sizes that cannot be rewritten have nothing to do with branches
        assert fxprune.verify(coupling, plan, slim).worst < 1e-9
        assert plan.costs.after.params == sum(p.numel() for p in slim.parameters())
        assert fxprune.rewrite(coupling, fxprune.Plan.from_json(plan.to_json())).code == slim.code
        emptied += plan.empties
    assert emptied
