"""Importances of Torch-Pruning say inside fxprune what they say in Torch-Pruning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
import torchvision
from small import Chain
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Budget, PlanError, Task, methods
from fxprune.criteria.torch_pruning import torch_pruning_scores

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3])


def loss(outputs: Any, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None, num_classes=5).eval()


def ranks(values: Any) -> np.ndarray:
    return np.argsort(np.argsort(np.asarray(values), kind="stable"))


@pytest.mark.parametrize(
    "importance",
    [
        tp.importance.MagnitudeImportance(p=2),
        tp.importance.MagnitudeImportance(p=1, group_reduction="first"),
        tp.importance.BNScaleImportance(),
        tp.importance.LAMPImportance(),
        tp.importance.FPGMImportance(),
        tp.importance.TaylorImportance(),
    ],
    ids=lambda i: type(i).__name__,
)
def test_the_order_of_channels_is_that_of_torch_pruning(importance: Any) -> None:
    model = resnet()
    coupling = fxprune.couple(fxprune.trace(model, X))
    mine = torch_pruning_scores(coupling, importance, [(X, Y)], {"c": Task(loss)})
    loss(model(X), (X, Y)).backward()
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=X)
    compared = 0
    for name in ("layer1.0.conv1", "layer2.0.conv1", "layer3.1.conv1", "layer4.0.conv2", "conv1"):
        layer = model.get_submodule(name)
        group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels)))
        wanted = importance(group).detach().numpy()
        channels = coupling.tensors[f"{name}.weight"][1][0].ravel()
        close = np.corrcoef(ranks(mine[channels]), ranks(wanted))[0, 1]
        compared += len(channels)
        assert close > 0.999
    assert compared > 800


def test_an_importance_plans_and_what_it_lacks_is_told() -> None:
    method = methods.FromTorchPruning(tp.importance.MagnitudeImportance(), scope="global")
    slim = fxprune.compile(resnet(), X, Budget(macs=0.5), method=method, progress=False)
    assert fxprune.report(slim).verification.passed
    assert fxprune.report(slim).costs.share("macs") <= 0.5
    with pytest.raises(PlanError, match="TaylorImportance of Torch-Pruning raised on the group of"):
        fxprune.plan(
            fxprune.couple(fxprune.trace(resnet(), X)),
            Budget(macs=0.5),
            method=methods.FromTorchPruning(tp.importance.TaylorImportance()),
        )


class Shuffled(nn.Module):
    """Torch-Pruning is silently wrong on it: channels are shuffled between two grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=2)
        self.c, self.head = nn.Conv2d(16, 16, 1, groups=4), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        b, c, h, w = x.shape
        return self.head(self.c(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)))


@pytest.mark.parametrize("model", [Shuffled(), Chain()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("importance", [tp.importance.MagnitudeImportance(), tp.importance.HessianImportance()])
def test_importances_run_where_torch_pruning_does_not(model: nn.Module, importance: Any) -> None:
    tasks = {"out": Task(lambda outputs, batch: outputs.square().mean())}
    method = methods.FromTorchPruning(importance)
    data = [X[:2, :, :8, :8]]
    slim = fxprune.compile(
        model.eval(), data[0], Budget(macs=0.6), method=method, calibration=data, tasks=tasks, progress=False
    )
    assert fxprune.report(slim).verification.passed
