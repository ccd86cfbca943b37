"""Joint saliency: predicted errors are those of refits on real activations, and what is planned with them is better."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rows import rows_of
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Budget, PlanError, Task, methods
from fxprune.assuming import assume
from fxprune.calibrating import calibrate
from fxprune.calibrations import Calibration
from fxprune.compensating import compensate
from fxprune.correcting import corrections
from fxprune.criteria.joint import joint_paths
from fxprune.layers import channels_of
from fxprune.probing import Probe, measured


class Mixed(nn.Module):
    """A residual sum, a concat, a grouped and a depthwise convolution, strides, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.side = nn.Conv2d(8, 4, 1)
        self.depthwise, self.grouped = nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 8, 1, groups=2)
        self.classes, self.dense = nn.Linear(8, 5), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.stem(x)).relu()
        x = F.gelu(x + self.outer(F.gelu(self.inner(x))))
        x = torch.cat([x, F.gelu(self.side(x))], 1)
        x = F.gelu(self.grouped(F.gelu(self.depthwise(x))))
        return self.classes(x.mean((2, 3))), self.dense(x)


TASKS = {
    "classes": Task(lambda outputs, batch: F.cross_entropy(outputs[0], batch[1][0])),
    "dense": Task(lambda outputs, batch: F.mse_loss(outputs[1], batch[1][1])),
}


def setting(model: nn.Module | None = None) -> tuple[nn.Module, fxprune.Coupling, list[Any], Calibration]:
    torch.manual_seed(1)
    model = (model or Mixed()).double().eval()
    data = []
    for _ in range(4):
        x = torch.randn(8, 3, 7, 7, dtype=torch.float64)
        data.append((x, (torch.randint(0, 5, (8,)), torch.randn(8, 2, 5, 5, dtype=torch.float64))))
    coupling = fxprune.couple(fxprune.trace(model, data[0][0]))
    return model, coupling, data, calibrate(coupling, data, TASKS, positions=100)


def refitted(
    model: nn.Module, coupling: fxprune.Coupling, data: list[Any], c: Calibration, choices: np.ndarray
) -> np.ndarray:
    """Return (tasks,) relative loss without some choices: every layer fitted again, a constant added where it can be.

    A block of a layer of which one choice takes all that comes out is not read any more.
    """
    gone = coupling.members.of(choices)[0]
    total = np.zeros(len(c.losses))
    for name, m in c.moments.items():
        inputs, outputs = channels_of(coupling, m.layer)
        x, y = rows_of(model, name.removesuffix(".weight"), [x for x, _ in data])
        for block in range(m.layer.blocks):
            lost = np.isin(inputs[block], gone)
            alone = [coupling.members.of(choices[i : i + 1])[0] for i in range(len(choices))]
            whole = any(np.isin(outputs[block], channels).all() for channels in alone)
            if whole or not lost.any():
                continue
            left = x[:, block][:, (~lost).nonzero()[0].tolist()].flatten(1)
            if m.absorbs:
                left = torch.cat([left, torch.ones(len(left), 1, dtype=left.dtype)], 1)
            e = y[:, block] - left @ torch.linalg.lstsq(left, y[:, block], driver="gelsd").solution
            for t, (task, loss) in enumerate(c.losses.items()):
                total[t] += float(torch.einsum("rm,mn,rn->", e, m.sensitivity[task][block], e)) / len(e) / 2 / loss
    return total


def test_errors_are_those_of_refits_summed_over_all_layers_that_read_a_channel() -> None:
    model, coupling, data, found = setting()
    seen = 0
    for path in joint_paths(coupling, found, damping=1e-13):
        total = np.zeros(2)
        for step, error in enumerate(path.errors[:-1]):
            total += error
            wanted = refitted(model, coupling, data, found, path.choices[: step + 1].ravel())
            assert total == pytest.approx(wanted, rel=1e-4, abs=1e-9)
            seen += 1
    assert seen == 14


def test_a_probe_measures_what_the_rewritten_network_does() -> None:
    model, coupling, data, found = setting()
    for correct in (False, True):
        probe = Probe(coupling, found, samples=1000, damping=0.01, compensate=correct)
        plan = fxprune.plan(coupling, Budget(macs=0.5), method=methods.Random(seed=1))
        slim = fxprune.rewrite(coupling, plan)
        if correct:
            compensate(coupling, plan, slim, replace(found, batches=None))
        with torch.no_grad():
            wanted = [np.mean([float(task.loss(slim(b[0]), b)) for b in data]) for task in TASKS.values()]
        assert plan.keep is not None
        assert probe.losses(plan.keep) == pytest.approx(wanted)
        assert probe.dense == pytest.approx(list(found.losses.values()))
    fresh = setting()[0].state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())


def test_rises_are_those_of_the_losses_without_their_slope() -> None:
    model, coupling, data, found = setting()
    plan = fxprune.plan(coupling, Budget(macs=0.7), method=methods.Random(seed=2))
    slim, probe = fxprune.rewrite(coupling, plan), Probe(coupling, found, damping=0.01, compensate=False)
    wanted = np.zeros(2)
    for batch in data:
        before = [t.detach().requires_grad_() for t in model(batch[0])]
        after = [t.detach() for t in slim(batch[0])]
        for i, task in enumerate(TASKS.values()):
            loss = task.loss(before, batch)
            slopes = torch.autograd.grad(loss, before[i])[0]
            along = (slopes * (after[i] - before[i])).sum()
            wanted[i] += float((task.loss(after, batch) - loss - along).detach()) / len(data)
    assert plan.keep is not None
    assert probe.rises(plan.keep) == pytest.approx(wanted / probe.dense)
    assert (probe.rises(plan.keep) > 0).all()


def test_measured_paths_cost_what_was_measured() -> None:
    _, coupling, _, found = setting()
    probe = Probe(coupling, found, samples=1000, damping=0.01, compensate=True)
    for path in measured(probe, joint_paths(coupling, found), shares=(0.5,)):
        half = round(0.5 * len(path.choices))
        if not 0 < half < len(path.choices):
            continue
        keep = np.ones(coupling.num_channels, dtype=bool)
        keep[coupling.members.of(path.choices[:half].ravel())[0]] = False
        rise = probe.rises(coupling.settle(keep))
        told = path.errors[:half].sum(axis=0)
        assert told[rise > 0.01] == pytest.approx(rise[rise > 0.01])
        assert (path.errors >= 0).all()


def test_joint_measures_by_default_on_as_many_samples_as_the_data_allow() -> None:
    _, coupling, _, found = setting()
    told = joint_paths(coupling, found)
    by_hand = measured(Probe(coupling, found, samples=16, damping=0.01, compensate=True), told)
    for path, same, other in zip(methods.Joint().paths(coupling, found), by_hand, told, strict=True):
        assert np.array_equal(path.errors, same.errors)  # the least
        assert not np.array_equal(path.errors, other.errors)


def test_layers_that_lose_few_inputs_are_corrected_by_an_inverse_that_is_kept() -> None:
    _, coupling, _, found = setting()
    inverses: dict[tuple[str, int], Tensor] = {}
    for path in joint_paths(coupling, found):
        keep = np.ones(coupling.num_channels + 1, dtype=bool)
        keep[coupling.members.of(path.choices[0])[0]] = False
        told, known = (
            list(corrections(coupling, found.moments, keep, 0.01, set(found.moments), some))
            for some in (None, inverses)
        )
        assert told
        for a, b in zip(told, known, strict=True):
            assert torch.allclose(a.weight, b.weight)
            assert torch.allclose(a.shift, b.shift)
    assert len(inverses) > 2


class Twins(nn.Module):
    """Every filter of the first layer is there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)
        with torch.no_grad():
            self.a.weight[8:], self.a.bias[8:] = 2 * self.a.weight[:8], 2 * self.a.bias[:8]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def test_twins_go_first_and_nothing_is_lost() -> None:
    torch.manual_seed(0)
    model = Twins().double().eval()
    x = torch.randn(20, 3, 9, 9, dtype=torch.float64)
    method = methods.Joint(damping=1e-9)
    slim = fxprune.compile(model, x[:2], Budget(macs=0.51), method=method, calibration=[x], progress=False)
    kept = fxprune.report(slim).plan.kept["a.weight", 0]
    assert sorted(set(kept % 8)) == list(range(8))
    with torch.no_grad():
        assert torch.allclose(slim(x), model(x), atol=1e-6)


def test_joint_reads_saved_calibrations_and_says_what_is_missing(tmp_path: Any) -> None:
    _, coupling, _, found = setting()
    found.save(tmp_path / "c.safetensors")
    read = Calibration.load(tmp_path / "c.safetensors")
    told = fxprune.plan(coupling, Budget(macs=0.5), method=methods.Joint(samples=0), calibration=found)
    again = fxprune.plan(coupling, Budget(macs=0.5), method=methods.Joint(), calibration=read)
    assert np.array_equal(told.keep, again.keep)
    with pytest.raises(PlanError, match="no calibration batches to measure their losses on"):
        fxprune.plan(coupling, Budget(macs=0.5), method=methods.Joint(), tasks=TASKS)
    with pytest.raises(PlanError, match="reads batches, and a calibration that was loaded has none"):
        fxprune.plan(coupling, Budget(macs=0.5), method=methods.Taylor(), calibration=read, tasks=TASKS)
    other = fxprune.couple(fxprune.trace(Twins(), torch.randn(1, 3, 9, 9)))
    with pytest.raises(PlanError, match=r"holds 'stem\.weight', which this network does not have"):
        methods.Joint().paths(other, found)


def test_a_calibration_is_of_one_network_and_its_weights(tmp_path: Any) -> None:
    model, _, data, found = setting()
    found.save(tmp_path / "c.safetensors")
    wider = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double().eval()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.side.weight += 1e-6
    for network in (wider, changed):
        other = fxprune.couple(fxprune.trace(network, data[0][0]))
        for cal in (found, replace(Calibration.load(tmp_path / "c.safetensors"), batches=data)):
            for method in (methods.Joint(), methods.HBGS(), methods.HBGS(decompose=True), methods.Taylor()):
                with pytest.raises(PlanError, match="the calibration is of another network, or of other weights"):
                    fxprune.compile(network, data[0][0], Budget(macs=0.5), method=method, calibration=cal)
            with pytest.raises(PlanError, match="the calibration is of another network"):
                fxprune.sensitivity(other, calibration=cal)
            plan = fxprune.plan(other, Budget(macs=0.5))
            with pytest.raises(PlanError, match="the calibration is of another network"):
                fxprune.compensate(other, plan, fxprune.rewrite(other, plan), cal)


def test_what_is_held_or_cut_in_a_network_leaves_its_calibration_valid() -> None:
    model, coupling, data, found = setting()
    held = fxprune.couple(fxprune.trace(copy.deepcopy(model), data[1][0]), freeze={"inner": "held"})
    limits = fxprune.Constraints(keep_outputs=["side"])
    assert fxprune.plan(held, Budget(macs=0.98), calibration=found, constraints=limits).costs.share("macs") <= 0.98
    some = replace(TASKS["classes"], classes=[0, 2], slice_outputs=True, output=0, target=0)
    cut = calibrate(held, data, TASKS | {"classes": some})
    plan = fxprune.plan(coupling, Budget(macs=0.6), calibration=cut)
    assert list(plan.classes.values()) == [(0, 2)]
    fxprune.compensate(coupling, plan, fxprune.rewrite(coupling, plan), cut)


def test_methods_that_score_take_the_batches_and_the_tasks_of_a_calibration() -> None:
    _, coupling, data, found = setting()
    by_batches = fxprune.plan(coupling, Budget(macs=0.5), method=methods.Taylor(), calibration=data, tasks=TASKS)
    by_calibration = fxprune.plan(coupling, Budget(macs=0.5), method=methods.Taylor(), calibration=found)
    assert np.array_equal(by_batches.keep, by_calibration.keep)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.proj(a)
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


@pytest.mark.parametrize("macs", [0.7, 0.4])
def test_attention_is_cut_to_the_budget(macs: float) -> None:
    torch.manual_seed(0)
    model, x = Attention().double().eval(), torch.randn(16, 6, 16, dtype=torch.float64)
    slim = fxprune.compile(model, x[:2], Budget(macs=macs), method=methods.Joint(), calibration=[x], progress=False)
    report = fxprune.report(slim)
    assert report.verification.passed
    assert 0.9 * macs < report.costs.share("macs") <= macs


class Normal(nn.Module):
    """Whose first batch norms make normal channels, rectified, two of them added up."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.b, self.other, self.last = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)
        for norm in (self.norm, self.other):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.norm(self.a(x)) + self.other(self.b(x))).relu())


def test_without_data_moments_are_those_of_rectified_normals() -> None:
    torch.manual_seed(0)
    model = Normal().double().eval()
    coupling = fxprune.couple(fxprune.trace(model, torch.randn(1, 3, 4, 4, dtype=torch.float64)))
    found = assume(coupling).moments["last.weight"]
    drawn = [n.bias + n.weight * torch.randn(400_000, 6, dtype=torch.float64) for n in (model.norm, model.other)]
    x = (drawn[0] + drawn[1]).relu()
    assert found.mean[0].tolist() == pytest.approx(x.mean(0).tolist(), abs=0.02)
    assert found.second[0].diagonal().tolist() == pytest.approx(x.square().mean(0).tolist(), rel=0.05, abs=1e-3)


@pytest.mark.parametrize("train", [False, True])
def test_without_data_networks_are_cut_and_corrected(train: bool) -> None:
    model = setting()[0].train(train)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    slim = fxprune.compile(model, x, Budget(macs=0.2), method=methods.Joint(), progress=False)
    report = fxprune.report(slim)
    assert report.verification.passed
    assert slim.training == train == model.stem.training
    plan = report.plan
    changed = [n for n, v in slim.named_parameters() if not torch.equal(v, plan.cut(n, model.state_dict()[n]))]
    assert changed
