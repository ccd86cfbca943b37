"""Subtasks: losses of some classes alone, and networks that answer for these alone; each against doing it by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import Chain, Heads, Multitask, Residual, settled
from torch import Tensor, nn

import fxprune
from fxprune import ArtifactError, Budget, Constraints, Plan, PlanError, Task, VerificationError, methods
from fxprune.calibrating import calibrate
from fxprune.restricting import restrict
from fxprune.tasks import of_wanted_classes

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 3, 8, 8, generator=GENERATOR)
LABELS = torch.randint(0, 10, (24,), generator=GENERATOR)
MAPS = torch.randint(0, 4, (24, 8, 8), generator=GENERATOR)
PRESENT = torch.randint(0, 2, (24, 6), generator=GENERATOR).float()
BATCHES = [(X[i : i + 8], LABELS[i : i + 8]) for i in (0, 8, 16)]
CLASSES = [2, 5, 7]


def entropy(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


TASKS = {"digit": Task(entropy, classes=CLASSES, slice_outputs=True)}
HEADS = {
    "seg": Task(lambda o, b: F.cross_entropy(o["seg"], b[1]["seg"]), None, [1, 3], True, "seg", "seg"),
    "depth": Task(lambda o, b: o["depth"].square().mean()),
    "present": Task(
        lambda o, b: F.binary_cross_entropy_with_logits(o["present"], b[1]["present"]),
        classes=[0, 4, 5], slice_outputs=True, output="present", target="present",
    ),
}  # fmt: skip
HEAD_BATCHES = [(X[i : i + 8], {"seg": MAPS[i : i + 8], "present": PRESENT[i : i + 8]}) for i in (0, 8, 16)]


def compiled(model: nn.Module, macs: float, **request: Any) -> Any:
    request = {"method": methods.Joint(samples=4), "calibration": BATCHES, "tasks": TASKS} | request
    return fxprune.compile(model, X[:2], Budget(macs=macs), progress=False, **request)


def test_the_loss_is_that_of_the_samples_and_rows_of_the_classes() -> None:
    logits = torch.randn(24, 10, generator=GENERATOR)
    mine = np.isin(LABELS.numpy(), CLASSES)
    new = torch.tensor([CLASSES.index(int(c)) for c in LABELS[mine]])
    wanted = F.cross_entropy(logits[mine][:, CLASSES], new)
    task = TASKS["digit"]
    assert 0 < mine.sum() < 24
    assert float(task(logits, (X, LABELS))) == pytest.approx(float(wanted) * mine.mean())
    assert torch.equal(task(logits[:, CLASSES], (X, LABELS)), task(logits, (X, LABELS)))
    others = torch.full((24,), 3)
    none = task(logits.requires_grad_(), (X, others))
    assert float(none.detach()) == 0
    assert none.requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_class_numbers_of_any_integer_type_are_the_same(dtype: torch.dtype) -> None:
    logits = torch.randn(24, 10, generator=GENERATOR)
    batches = [(x, labels.to(dtype)) for x, labels in BATCHES]
    assert torch.equal(TASKS["digit"](logits, (X, LABELS.to(dtype))), TASKS["digit"](logits, (X, LABELS)))
    left = [[len(x) for x, _ in of_wanted_classes(some, TASKS)] for some in (BATCHES, batches)]
    assert left[0] == left[1]
    assert sum(left[0]) < 24


@pytest.mark.parametrize("labels", [LABELS.float(), F.one_hot(LABELS, 10)[:, :6].float()])
def test_class_numbers_as_floats_and_memberships_of_too_few_classes_are_refused(labels: Tensor) -> None:
    with pytest.raises(PlanError, match=r"classes=\[2, 5, 7\]\): the labels are torch.float32 of shape"):
        compiled(settled(Chain()), 0.5, calibration=[(X, labels)])
    for method in (methods.CATRO(), methods.Taylor()):
        with pytest.raises(PlanError, match=r"class numbers \(b, \.\.\) as integers|integer class numbers"):
            compiled(settled(Chain()), 0.5, calibration=[(X, labels)], method=method)


def test_positions_of_other_classes_are_ignored_and_memberships_are_cut() -> None:
    torch.manual_seed(1)
    outputs = {"seg": torch.randn(24, 4, 8, 8), "depth": torch.randn(24, 1, 8, 8), "present": torch.randn(24, 6)}
    new = torch.full_like(MAPS, -100)
    new[MAPS == 1], new[MAPS == 3] = 0, 1
    batch = (X, {"seg": MAPS, "present": PRESENT})
    wanted = F.cross_entropy(outputs["seg"][:, [1, 3]], new)
    assert float(HEADS["seg"](outputs, batch)) == pytest.approx(float(wanted))
    wanted = F.binary_cross_entropy_with_logits(outputs["present"][:, [0, 4, 5]], PRESENT[:, [0, 4, 5]])
    assert float(HEADS["present"](outputs, batch)) == pytest.approx(float(wanted))
    lonely = MAPS.clone()
    lonely[:20] = 0  # samples without any of the classes are left out
    wanted = F.cross_entropy(outputs["seg"][20:, [1, 3]], new[20:]) * 4 / 24
    assert float(HEADS["seg"](outputs, (X, batch[1] | {"seg": lonely}))) == pytest.approx(float(wanted))


def test_losses_see_outputs_and_batches_of_any_structure() -> None:
    seen: list[Any] = []

    def loss(outputs: Any, batch: Any) -> Tensor:
        seen.append((outputs, batch))
        return outputs.labels.sum()

    outputs = Heads(labels=torch.arange(12.0).reshape(4, 3), depth=torch.arange(4.0))
    labels = torch.tensor([2, 0, 0, 1])
    Task(loss, classes=[0, 1], output="labels", target=1)(outputs, ({"x": X[:4]}, (torch.zeros(4), labels), "name"))
    after, batch = seen[0]
    assert after.labels.tolist() == [[3, 4], [6, 7], [9, 10]]
    assert after.depth.tolist() == [1, 2, 3]
    assert batch[0]["x"].shape[0] == 3
    assert batch[1][1].tolist() == [0, 0, 1]
    assert batch[2] == "name"


def test_calibration_leaves_out_what_no_task_wants() -> None:
    left = list(of_wanted_classes(BATCHES, TASKS))
    found = torch.cat([labels for _, labels in left])
    assert found.tolist() == [int(c) for c in LABELS if int(c) in CLASSES]
    coupling = fxprune.couple(fxprune.trace(settled(Chain()), X[:2]))
    mine = np.isin(LABELS.numpy(), CLASSES)
    alone = calibrate(coupling, [(X[mine], LABELS[mine])], TASKS, positions=64)
    together = calibrate(coupling, BATCHES, TASKS, positions=64)
    assert together.samples == mine.sum()
    for name, m in alone.moments.items():
        assert torch.allclose(together.moments[name].second, m.second, atol=1e-6)
        assert torch.allclose(together.moments[name].sensitivity["digit"], m.sensitivity["digit"], rtol=1e-4)
    others = {**TASKS, "all": Task(entropy)}
    assert of_wanted_classes(BATCHES, others) is BATCHES
    with pytest.raises(PlanError, match=r"no calibration sample is of the classes \{'digit': \[2, 5, 7\]\}"):
        calibrate(coupling, [(X, torch.zeros(24, dtype=torch.int64))], TASKS)


@pytest.mark.parametrize(
    "method", [methods.Joint(samples=4), methods.Magnitude(), methods.CATRO(), methods.PAGCP(), methods.Taylor()]
)
def test_a_subtask_network_answers_for_its_classes_alone(method: Any) -> None:
    slim = compiled(settled(Chain()), 0.5, method=method)
    report = fxprune.report(slim)
    assert slim(X).shape == (24, 3)
    assert report.classes == {"output": (2, 5, 7)}
    assert report.to_dict()["classes"] == {"output": [2, 5, 7]}
    assert "output 'output' answers for classes 2, 5, 7" in str(report)
    assert report.costs.share("macs") <= 0.5
    assert report.costs.before.macs == 2 * (9 * 3 * 16 * 64 + 9 * 16 * 32 * 64 + 32 * 10)
    assert report.verification is not None
    assert report.verification.worst < 1e-9


def test_with_all_channels_the_rows_are_those_of_the_whole_network() -> None:
    model = settled(Multitask())
    slim = compiled(model, 1.0, method=methods.Magnitude(), calibration=None, tasks=HEADS)
    with torch.no_grad():
        whole, part = model(X), slim(X)
    assert torch.allclose(part["seg"], whole["seg"][:, [1, 3]], atol=1e-6)
    assert torch.allclose(part["present"], whole["present"][:, [0, 4, 5]], atol=1e-6)
    assert torch.equal(part["depth"], whole["depth"])
    assert fxprune.report(slim).classes == {"seg": (1, 3), "present": (0, 4, 5)}


def test_heads_of_all_kinds_are_planned_for_and_verified() -> None:
    slim = compiled(settled(Multitask()), 0.4, calibration=HEAD_BATCHES, tasks=HEADS)
    assert {name: t.shape[1] for name, t in slim(X).items()} == {"seg": 2, "depth": 1, "present": 3}
    assert fxprune.report(slim).verification is not None
    assert fxprune.report(slim).costs.share("macs") <= 0.4


def test_without_slicing_all_rows_stay() -> None:
    slim = compiled(settled(Chain()), 0.5, tasks={"digit": Task(entropy, classes=CLASSES)})
    assert slim(X).shape == (24, 10)
    assert fxprune.report(slim).classes == {}


def test_a_subtask_network_is_saved_loaded_and_cut_out_of_other_checkpoints(tmp_path: Path) -> None:
    slim = compiled(settled(Residual()), 0.5, tasks={"few": Task(entropy, classes=[0, 3], slice_outputs=True)})
    fxprune.save(slim, tmp_path)
    loaded = fxprune.load(tmp_path, Residual().eval())
    assert torch.equal(loaded(X), slim(X))
    assert fxprune.report(loaded).classes == {"output": (0, 3)}
    plan = Plan.from_json(fxprune.report(slim).plan.to_json())
    other = settled(Residual())
    coupling = fxprune.couple(fxprune.trace(other, X[:2]))
    again = fxprune.rewrite(coupling, plan)
    assert fxprune.verify(coupling, plan, again).passed
    assert again(X).shape == (24, 2)
    damaged = fxprune.report(slim).plan.to_json().replace('"output": [0, 3]', '"output": [3, 0]')
    with pytest.raises(ArtifactError, match="output 'output': expected ascending classes, found"):
        Plan.from_json(damaged)


def test_verification_tells_the_wrong_rows() -> None:
    coupling = fxprune.couple(fxprune.trace(settled(Chain()), X[:2]))
    plan = fxprune.plan(coupling, Budget(macs=0.5), tasks=TASKS)
    slim = fxprune.rewrite(coupling, plan)
    assert fxprune.verify(coupling, plan, slim).passed
    with pytest.raises(VerificationError, match="output 'output' of the slim network differs"):
        fxprune.verify(coupling, replace(plan, classes={"output": (2, 5, 8)}), slim)


def test_an_optimizer_goes_on_with_the_rows_it_had() -> None:
    model = settled(Chain())
    optimizer = torch.optim.Adam(model.parameters())
    entropy(model(X), (X, LABELS)).backward()
    optimizer.step()
    slim = compiled(model, 0.5, method=methods.Magnitude(), calibration=None)
    moved = fxprune.transfer(optimizer, slim)
    kept = fxprune.report(slim).plan.kept["head.weight", 1].tolist()
    mine = moved.state[dict(slim.named_parameters())["head.weight"]]["exp_avg"]
    assert torch.equal(mine, optimizer.state[model.head.weight]["exp_avg"][CLASSES][:, kept])


def test_a_calibration_of_the_whole_network_is_cut_to_that_of_the_part() -> None:
    coupling = fxprune.couple(fxprune.trace(settled(Multitask()), X[:2]))
    restriction = restrict(coupling, HEADS)
    assert restriction is not None
    mine = calibrate(restriction.part, HEAD_BATCHES, HEADS, by_class=True)
    cut = restriction.cut(calibrate(coupling, HEAD_BATCHES, HEADS, by_class=True))
    assert list(cut.moments) == list(mine.moments)
    for name, m in mine.moments.items():
        assert cut.moments[name].layer == m.layer
        assert torch.allclose(cut.moments[name].second, m.second)
        assert torch.allclose(cut.moments[name].between, m.between)
        for task in HEADS:
            assert torch.allclose(cut.moments[name].sensitivity[task], m.sensitivity[task], atol=1e-9)


def test_a_sweep_of_a_subtask() -> None:
    coupling = fxprune.couple(fxprune.trace(settled(Chain()), X[:2]))
    known = calibrate(coupling, BATCHES, TASKS)
    budgets = [Budget(macs=0.6), Budget(macs=0.3)]
    for data in (known, BATCHES):
        curve = fxprune.sweep(coupling, budgets, method=methods.Joint(samples=4), calibration=data, tasks=TASKS)
        for point, budget in zip(curve, budgets, strict=True):
            assert point.plan.classes == {"output": (2, 5, 7)}
            assert point.plan.costs.share("macs") <= (budget.macs or 0)
            assert fxprune.rewrite(coupling, point.plan)(X).shape == (24, 3)


class Branch(nn.Module):
    """A residual branch that costs most of all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3, padding=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.outer(self.inner(x).relu())).mean((2, 3)))


def test_whole_branches_may_go_too() -> None:
    tasks = {"few": Task(entropy, classes=[1, 4], slice_outputs=True)}
    request: dict[str, Any] = {"method": methods.Magnitude(), "tasks": tasks, "constraints": Constraints(min_width=0)}
    slim = compiled(Branch().eval(), 0.004, **request)
    assert slim(X).shape == (24, 2)
    assert fxprune.report(slim).plan.empties
    assert fxprune.report(slim).classes == {"output": (1, 4)}


class Both(nn.Module):
    """Logits, and the probabilities that are made of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Chain()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {"logits": x, "probabilities": x.softmax(1)}


def test_what_was_frozen_stays_where_rows_are_cut() -> None:
    traced = fxprune.trace(settled(Chain()), X[:2])
    name = next(n.name for n in traced.graph.nodes if n.op == "call_module")
    coupling = fxprune.couple(traced, freeze={name: "is read by others"})
    plan = fxprune.plan(coupling, Budget(macs=0.5), method=methods.Joint(samples=4), calibration=BATCHES, tasks=TASKS)
    slim = fxprune.rewrite(coupling, plan)
    assert slim.get_submodule(name).weight.shape == traced.root.get_submodule(name).weight.shape
    assert plan.costs.share("macs") <= 0.5
    fxprune.verify(coupling, plan, slim)


def test_what_cannot_be_done_is_said() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"classes": [5, 2]}, r"Task\(classes=\[5, 2\]\) is not ascending.* Pass `classes=\[2, 5\]`"),
        ({"classes": []}, r"Task\(classes=\[\]\) is not a list of class numbers"),
        ({"classes": [0.5]}, r"is not a list of class numbers. Pass `classes=\[2, 5\]`"),
        ({"slice_outputs": True}, r"Task\(slice_outputs=True\) does not say which rows stay"),
    ]
    for arguments, message in cases:
        with pytest.raises(PlanError, match=message):
            Task(entropy, **arguments)
    coupling = fxprune.couple(fxprune.trace(settled(Both()), X[:2]))
    task = Task(entropy, classes=[2, 5], slice_outputs=True, output="logits")
    with pytest.raises(PlanError, match=r"the rows of output 'logits' cannot be cut: node 'output'.*is an output"):
        fxprune.plan(coupling, Budget(macs=0.5), tasks={"a": task})
    with pytest.raises(PlanError, match=r"the outputs are a dict of \['logits', 'probabilities'\], and Task\(output="):
        fxprune.plan(coupling, Budget(macs=0.5), tasks={"a": replace(task, output=None)})
    with pytest.raises(PlanError, match=r"task 'a': the output has shape \(2, 10\), and no row for class 12"):
        fxprune.plan(coupling, Budget(macs=0.5), tasks={"a": replace(task, classes=[12])})
    with pytest.raises(PlanError, match=r"labels have shape \(24, 8, 8\) and the outputs \(24, 10\)"):
        Task(entropy, classes=[1])(torch.zeros(24, 10), (X, MAPS))


@pytest.mark.parametrize("other", [None, [0, 2]])
@pytest.mark.parametrize("gathered", [False, True])
def test_rows_that_another_task_reads_are_not_cut(other: list[int] | None, gathered: bool) -> None:
    model = settled(Multitask())
    whole = Task(
        lambda o, b: F.cross_entropy(o["seg"], b[1]["seg"]), None, other, False, other and "seg", other and "seg"
    )
    tasks, data = HEADS | {"all": whole}, HEAD_BATCHES
    calibration = calibrate(fxprune.couple(fxprune.trace(model, X[:2])), data, tasks) if gathered else data
    for call in (
        compiled,
        lambda m, macs, **r: fxprune.sweep(fxprune.couple(fxprune.trace(m, X[:2])), [Budget(macs)], **r),
    ):
        with pytest.raises(PlanError, match="task 'all' reads rows of output 'seg' that another cuts off"):
            call(model, 0.6, calibration=calibration, tasks=tasks)
    same = HEADS | {"all": replace(whole, classes=[1, 3], output="seg", target="seg")}
    assert fxprune.report(compiled(model, 0.6, calibration=data, tasks=same)).classes
