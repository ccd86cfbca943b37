"""What calibration gathers is what a direct evaluation of its formulas gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import Chain, settled
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Budget, PlanError, Task, methods
from fxprune.calibrating import calibrate
from fxprune.calibrations import Calibration
from fxprune.errors import ArtifactError


class TwoHeads(nn.Module):
    """A trunk with strides, dilation, groups and a batch norm, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2)
        self.down = nn.Conv2d(8, 12, 1, bias=False)
        self.point, self.pool = nn.Conv2d(12, 4, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.a(x)).relu_()
        y = torch.relu(self.b(y) + self.down(y))
        return self.point(y), self.pool(y.mean((2, 3)))


def dense(outputs: Any, batch: Any) -> Tensor:
    return F.mse_loss(outputs[0], batch[1][0])


def classes(outputs: Any, batch: Any) -> Tensor:
    return F.cross_entropy(outputs[1], batch[1][1])


IMAGES = torch.zeros(4, 3, 8, 8)
TASKS = {"dense": Task(dense), "classes": Task(classes)}


def settings(batches: int = 3) -> tuple[nn.Module, fxprune.Coupling, list[Any]]:
    torch.manual_seed(0)
    model = TwoHeads().double().eval()
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    data = []
    for _ in range(batches):
        x = torch.randn(4, 3, 10, 8, dtype=torch.float64)
        data.append((x, (torch.randn(4, 4, 5, 4, dtype=torch.float64), torch.randint(0, 5, (4,)))))
    return model, fxprune.couple(fxprune.trace(model, data[0][0])), data


def seen(model: nn.Module, data: list[Any], task: Task, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs (samples, channels, h, w), outputs' gradients of each sample's own loss, of a layer."""
    layer = model.get_submodule(name)
    inputs, gradients = [], []
    for x, (a, b) in data:
        for i in range(len(x)):
            kept: list[Tensor] = []

            def hook(module: nn.Module, args: Any, out: Tensor, kept: list[Tensor] = kept) -> None:
                kept.extend((args[0].clone(), out))
                out.retain_grad()

            handle = layer.register_forward_hook(hook)
            batch = (x[i : i + 1], (a[i : i + 1], b[i : i + 1]))
            task.loss(model(batch[0]), batch).backward()
            handle.remove()
            inputs.append(kept[0].detach())
            gradients.append(torch.zeros_like(kept[1]) if kept[1].grad is None else kept[1].grad)
    return torch.cat(inputs), torch.cat(gradients), torch.tensor(len(inputs))


@pytest.mark.parametrize("name", ["a", "b", "down", "point", "pool"])
@pytest.mark.parametrize("task", TASKS)
def test_moments_are_those_of_all_patches_and_of_each_samples_gradient(name: str, task: str) -> None:
    model, coupling, data = settings()
    found = calibrate(coupling, data, TASKS, positions=100).moments[f"{name}.weight"]
    x, g, samples = seen(model, data, TASKS[task], name)
    layer: Any = model.get_submodule(name)
    if isinstance(layer, nn.Conv2d):
        taps = layer.weight[0, 0].numel()
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        rows = patches.transpose(1, 2).reshape(-1, layer.groups, layer.in_channels // layer.groups * taps)
        gradients = g.flatten(2).transpose(1, 2).reshape(-1, layer.groups, layer.out_channels // layer.groups)
    else:
        rows, gradients = x[:, None], g[:, None]
    assert torch.allclose(found.second, torch.einsum("rbi,rbj->bij", rows, rows) / len(rows))
    assert torch.allclose(found.mean, rows.mean(0))
    wanted = torch.einsum("rbi,rbj->bij", gradients, gradients) / samples
    assert torch.allclose(found.sensitivity[task], wanted, atol=1e-12 * float(wanted.abs().max()))
    assert found.absorbs == (name != "down")
    assert found.norm == ("norm.running_mean" if name == "a" else None)


def test_a_sample_of_the_positions_stands_for_all() -> None:
    _, coupling, data = settings(40)
    every, some = calibrate(coupling, data, TASKS, positions=100), calibrate(coupling, data, TASKS, positions=4)
    for name, m in every.moments.items():
        other = some.moments[name]
        for a, b in ((m.second, other.second), *((g, other.sensitivity[task]) for task, g in m.sensitivity.items())):
            total, sampled = (float(t.diagonal(dim1=1, dim2=2).sum()) for t in (a, b))
            assert sampled == pytest.approx(total, rel=0.15)
    again = calibrate(coupling, data, TASKS, positions=4)
    assert all(torch.equal(m.second, again.moments[name].second) for name, m in some.moments.items())


def test_large_moments_are_shared_by_the_taps_of_a_kernel() -> None:
    _, coupling, data = settings()
    every = calibrate(coupling, data, TASKS, positions=100).moments["b.weight"]
    small = calibrate(coupling, data, TASKS, positions=100, max_bytes=25_000)
    shared = small.moments["b.weight"]
    assert shared.shared_taps
    wide = every.second.reshape(2, 4, 9, 4, 9).diagonal(dim1=2, dim2=4).mean(-1)
    assert torch.allclose(shared.second, wide)
    assert torch.allclose(shared.mean, every.mean.reshape(2, 4, 9).mean(-1))
    with pytest.raises(
        PlanError, match=r"more than max_bytes=1,000; the largest is that of 'down\.weight' with 8 inputs"
    ):
        calibrate(coupling, data, TASKS, max_bytes=1000)


def test_the_network_is_as_it_was_and_modes_do_not_matter() -> None:
    model, coupling, data = settings()
    model.a.weight.requires_grad_(False)
    coupling.traced.module.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        found = calibrate(coupling, data, TASKS)
    assert coupling.traced.module.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * (len(list(model.parameters())) - 1)]
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        losses = [classes(model(batch[0]), batch) for batch in data]
    assert found.losses["classes"] == pytest.approx(float(torch.stack(losses).mean()))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head((self.first(x) + self.second(y)).relu())


def test_inputs_that_ask_for_a_gradient_are_data_like_others() -> None:
    torch.manual_seed(0)
    x, y, labels = torch.randn(8, 4), torch.randn(8, 3), torch.arange(8) % 2
    coupling = fxprune.couple(fxprune.trace(TwoInputs().eval(), (x, y)))
    tasks = {"label": Task(lambda outputs, batch: F.cross_entropy(outputs, batch[1]))}
    plain = calibrate(coupling, [((x, y), labels)], tasks)
    asking = x.clone().requires_grad_()
    found = calibrate(coupling, [((asking, y), labels)], tasks)
    for name, m in plain.moments.items():
        assert m.sensitivity["label"].diagonal(dim1=1, dim2=2).sum() > 0
        assert torch.equal(m.sensitivity["label"], found.moments[name].sensitivity["label"])
    assert asking.grad is None


def test_without_tasks_the_outputs_are_what_counts() -> None:
    _, coupling, data = settings()
    found = calibrate(coupling, [x for x, _ in data])
    assert list(found.losses) == ["outputs"]
    assert all(m.sensitivity["outputs"].diagonal(dim1=1, dim2=2).sum() > 0 for m in found.moments.values())


def test_a_calibration_is_saved_and_read(tmp_path: Path) -> None:
    _, coupling, data = settings()
    found = calibrate(coupling, data, TASKS)
    found.save(tmp_path / "made" / "calibration.safetensors")
    read = Calibration.load(tmp_path / "made" / "calibration.safetensors")
    assert (read.losses, read.samples, read.fingerprint) == (found.losses, found.samples, found.fingerprint)
    for name, m in found.moments.items():
        other = read.moments[name]
        assert (m.layer, m.norm, m.shared_taps) == (other.layer, other.norm, other.shared_taps)
        assert torch.equal(m.second, read.moments[name].second)
        assert all(torch.equal(g, read.moments[name].sensitivity[task]) for task, g in m.sensitivity.items())
    (tmp_path / "cut").write_bytes((tmp_path / "made" / "calibration.safetensors").read_bytes()[:500])
    with pytest.raises(ArtifactError, match="is no calibration"):
        Calibration.load(tmp_path / "cut")
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ArtifactError, match=r"cannot be read \(.*\). Pass the file"):
            Calibration.load(path)


def test_bad_calibration_data_have_their_errors() -> None:
    _, coupling, data = settings()
    with pytest.raises(PlanError, match="has no batches"):
        calibrate(coupling, iter(()), TASKS)
    with pytest.raises(PlanError, match="without a tensor"):
        calibrate(coupling, ["x"], TASKS)
    with pytest.raises(PlanError, match="'still' does not depend on the network"):
        calibrate(coupling, data, {"still": Task(lambda outputs, batch: batch[0].sum())})
    with pytest.raises(PlanError, match="the loss of task 'dense' is nan on calibration batch 3"):
        calibrate(coupling, [*data, (data[0][0] * torch.inf, data[0][1])], TASKS)
    with pytest.raises(PlanError, match="the loss of task 'nan' is nan on calibration batch 0"):
        calibrate(coupling, data, {"nan": Task(lambda outputs, batch: dense(outputs, batch) * torch.nan)})


@pytest.mark.parametrize("method", [None, methods.HBGTS(), methods.PAGCP(), methods.CATRO()], ids=repr)
def test_batches_without_samples_and_no_batches_at_all_are_told(method: Any) -> None:
    model, data = settled(Chain()), torch.randn(8, 3, 8, 8)
    labels = torch.arange(8)
    task = Task(lambda outputs, batch: F.cross_entropy(outputs, batch[1]))
    for batches, words in (
        ([(data, labels), (data[:0], labels[:0])], r"has no samples: its first tensor is of shape \(0, 3, 8, 8\)"),
        ([], "has no batches"),
    ):
        with pytest.raises(PlanError, match=words):
            fxprune.compile(
                model, data[:1], Budget(macs=0.5), method=method, calibration=batches, tasks={"a": task}, progress=False
            )


class OneImage(nn.Module):
    """Takes an image without a batch dim, and weighs its features by what it makes of a vector of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.vector, self.weigh, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.second(self.first(x).relu()).relu().mean((-2, -1))
        return self.head(features * self.weigh(self.vector))


def test_what_has_no_batch_dim_is_one_sample() -> None:
    torch.manual_seed(0)
    model, images = OneImage().eval(), [torch.randn(3, 4, 4) for _ in range(3)]
    alone, together = (
        calibrate(fxprune.couple(fxprune.trace(model, batches[0])), batches).moments
        for batches in (images, [x[None] for x in images])
    )
    assert alone.keys() == together.keys() == {f"{name}.weight" for name in ("first", "second", "weigh", "head")}
    for name, m in together.items():
        torch.testing.assert_close(alone[name].second, m.second)
        torch.testing.assert_close(alone[name].mean, m.mean)
        (a,), (b,) = alone[name].sensitivity.values(), m.sensitivity.values()
        torch.testing.assert_close(a / a.norm(), b / b.norm())


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.randn(4, 5, 8, 8), r"batch with inputs \(4, 5, 8, 8\) torch\.float32: RuntimeError: .* pair"),
        (torch.randn(4, 3, 8, 8).double(), r"batch with inputs \(4, 3, 8, 8\) torch\.float64: RuntimeError"),
        ({"x": torch.randn(4, 3, 8, 8), "labels": torch.zeros(4)}, r"unexpected keyword argument 'labels'.* by name"),
        (torch.full((4, 3, 8, 8), torch.nan), r"the loss of task 'outputs' is nan on calibration batch 1"),
    ],
)
def test_batches_that_do_not_run_or_hold_nan_are_named(batch: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        fxprune.calibrate(fxprune.couple(fxprune.trace(settled(Chain()), IMAGES)), iter([IMAGES, batch]))


def test_the_layer_that_infinite_numbers_reach_is_named() -> None:
    model: Any = settled(Chain())
    model.conv1.weight.data[0] = torch.inf
    tasks = {"t": Task(lambda outputs, batch: outputs.nan_to_num(0, 0, 0).sum())}
    with pytest.raises(PlanError, match=r"NaN or infinite numbers reach the layer of '.*weight'"):
        fxprune.calibrate(fxprune.couple(fxprune.trace(model, IMAGES)), [IMAGES], tasks)


def test_methods_that_do_not_calibrate_name_the_batch_too() -> None:
    batches = [(torch.randn(4, 5, 8, 8), torch.zeros(4).long())] * 2
    model, tasks = settled(Chain()), {"t": Task(lambda outputs, batch: outputs.sum())}
    for method in (methods.Taylor(), methods.CATRO(), methods.PAGCP(), methods.HBGTS()):
        with pytest.raises(PlanError, match=r"does not run on a calibration batch with inputs \(4, 5, 8, 8\)"):
            fxprune.compile(
                model, IMAGES, Budget(macs=0.5), method=method, calibration=batches, tasks=tasks, progress=False
            )
