"""The networks of `zoo.py`: every model builder of torchvision, and the smallest model of every module of timm."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the next module is

from zoo_weights import awaken

TIMM = Path(__file__).with_name("zoo_timm.txt")
MODULES = {  # family -> torchvision's module of it
    "classification": "", "segmentation": "segmentation", "video": "video", "optical_flow": "optical_flow",
    "detection": "detection",
}  # fmt: skip
FAMILIES = (*MODULES, "timm")
FRAMES = 16  # of a video


@dataclass(frozen=True, slots=True)
class Network:
    """One network of the zoo.

    Attributes:
        family: one of `FAMILIES`.
        name: what torchvision or timm calls it.
    """

    family: str
    name: str

    def __str__(self) -> str:
        return f"{self.family}/{self.name}"


def networks() -> list[Network]:
    """Return all networks, family by family."""
    import torchvision

    found = []
    for family, module in MODULES.items():
        home = getattr(torchvision.models, module) if module else torchvision.models
        found += [Network(family, name) for name in torchvision.models.list_models(home)]
    return found + [Network("timm", name) for name in listed()]


def listed() -> list[str]:
    """Return the names in the list of timm's smallest models."""
    lines = (line.split() for line in TIMM.read_text().splitlines() if not line.startswith("#"))
    return [name for _, name, _ in lines]


def smallest_of_timm() -> Iterator[tuple[str, str, int]]:
    """Yield each module of timm with the name and the parameters of its smallest model, built without data."""
    import timm

    for module in timm.list_modules():
        counts = {name: _parameters(name) for name in timm.list_models(module=module)}
        best = min(counts, key=counts.__getitem__)
        if math.isfinite(counts[best]):
            yield module, best, int(counts[best])


def _parameters(name: str) -> float:
    """Return the parameters of a model of timm; infinitely many where it cannot be built without data."""
    import timm

    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    except (RuntimeError, NotImplementedError, ValueError, TypeError, ImportError):
        return math.inf


def build(network: Network) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a network in eval mode, with weights that matter, and random example inputs."""
    torch.manual_seed(0)
    model = _timm(network.name) if network.family == "timm" else _torchvision(network)
    return awaken(model), tuple(torch.randn(shape) for shape in _shapes(network, model))


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def _torchvision(network: Network) -> nn.Module:
    import torchvision

    more: dict[str, Any] = {}
    if network.family in ("segmentation", "detection"):
        more["weights_backbone"] = None
    if network.name.startswith(("fcn", "deeplab")):
        more["aux_loss"] = True
    elif network.name in ("googlenet", "inception_v3"):
        more = {"init_weights": False, "aux_logits": True}  # the former takes long, and is drawn anew
    model: Any = torchvision.models.get_model(network.name, weights=None, **more)
    return model.backbone if network.family == "detection" else model  # detectors branch on the values of boxes


def _shapes(network: Network, model: nn.Module) -> list[tuple[int, ...]]:
    """Return the shapes of the example inputs."""
    if network.family == "timm":
        config: Any = getattr(model, "default_cfg", {})
        return [(1, *(config.get("input_size") or (3, 224, 224)))]
    if network.family == "optical_flow":
        return [(1, 3, 128, 128)] * 2
    if network.family == "video":
        px = 224 if network.name.startswith(("swin3d", "mvit", "s3d")) else 112
        return [(1, 3, FRAMES, px, px)]
    if network.family == "detection":
        px = 300 if network.name.startswith("ssd300") else 320
        return [(1, 3, px, px)]
    px = 299 if network.name.startswith("inception") else 224
    return [(1, 3, px, px)]
