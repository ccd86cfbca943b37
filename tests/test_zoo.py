"""A fast slice of torchvision, small inputs: half the multiply-accumulates, and the theorem below 1e-9."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision.models as zoo
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.inception import InceptionA
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import Bottleneck, ResNet

import fxprune


def alive(model: nn.Module) -> nn.Module:
    """Give norms statistics and scales of their own; return the model in eval mode."""
    generator = torch.Generator().manual_seed(0)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_floating_point() and t.ndim == 1:
            low = 0.5 if name.endswith(("weight", "running_var")) else -0.1
            t.data.copy_(low + 0.5 * torch.rand(t.shape, generator=generator))
    return model.eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (zoo.resnet18, 64),
    "resnext": (lambda: ResNet(Bottleneck, [1, 1, 1, 1], groups=8, width_per_group=4), 64),
    "vgg11_bn": (lambda: nn.Sequential(zoo.vgg11_bn().features, nn.Flatten(), nn.Linear(512, 10)), 32),
    "densenet": (lambda: DenseNet(12, (3, 4, 3), 24), 64),
    "mobilenet_v3_small": (zoo.mobilenet_v3_small, 64),
    "shufflenet_v2_x0_5": (zoo.shufflenet_v2_x0_5, 64),
    "squeezenet1_1": (zoo.squeezenet1_1, 64),
    "mnasnet0_5": (zoo.mnasnet0_5, 64),
    "regnet": (lambda: RegNet(BlockParams.from_init_params(2, 16, 8.0, 2.5, 8, se_ratio=0.25)), 64),
    "efficientnet_b0": (zoo.efficientnet_b0, 64),
    "convnext": (
        lambda: ConvNeXt([CNBlockConfig(24, 48, 2), CNBlockConfig(48, 96, 2), CNBlockConfig(96, None, 2)]),
        64,
    ),
    "googlenet": (lambda: zoo.googlenet(weights=None, init_weights=False, aux_logits=False), 64),
    "inception_block": (lambda: nn.Sequential(nn.Conv2d(3, 32, 3), InceptionA(32, 16), nn.Conv2d(240, 8, 1)), 32),
    "fcn_resnet50": (lambda: zoo.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True), 64),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_half_the_macs_and_the_theorem(name: str) -> None:
    make, size = NETWORKS[name]
    model = alive(make())
    slim = fxprune.compile(model, torch.randn(1, 3, size, size), fxprune.Budget(macs=0.5), progress=False)
    report = fxprune.report(slim)
    assert 0.45 < report.costs.share("macs") <= 0.5
    assert report.verification is not None
    assert report.verification.worst < 1e-9
    assert report.costs.after.params == sum(p.numel() for p in slim.parameters())
    assert slim.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        out = slim(
            torch.randn(2, 3, size + 32, size + 32) if name not in ("vgg11_bn",) else torch.randn(2, 3, size, size)
        )
    first = next(iter(out.values())) if isinstance(out, dict) else out
    assert first.shape[0] == 2
    assert first.isfinite().all()
    assert not torch.equal(first[0], first[1])  # alive: what is compared is not a constant
