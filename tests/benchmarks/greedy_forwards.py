"""What the search of HBGTS costs on torchvision's ResNet-18: seconds, and runs of the network."""

from __future__ import annotations

import torch
from commands import Row
from greedy_measure import Noted
from planning_child import Batch, Clock, build, images
from torch import nn

import fxprune
from fxprune.methods import HBGTS

NAME, METHOD = "resnet18", "hbgts"
PX, IMAGES, BATCH, BUDGET, THREADS = 64, 512, 64, 0.5, 2


def search(*, quick: bool = False) -> Row:
    """Plan to half of the macs, and tell what that took; the weights of the network are random."""
    torch.set_num_threads(THREADS)
    clock = Clock()
    px, count, size = (32, 8, 4) if quick else (PX, IMAGES, BATCH)
    batches = images(px, count, size)
    network = build(NAME, batches)
    coupling = clock("couple", lambda: fxprune.couple(fxprune.trace(network, batches[0][0][:1])))
    forward(network, batches[:1])  # whatever is done once
    clock("before", forward, network, batches)
    method = Noted(HBGTS())
    plan = clock("plan", fxprune.plan, coupling, fxprune.Budget(macs=BUDGET), method=method, calibration=batches)
    clock("after", forward, network, batches)
    about: Row = {"network": NAME, "seed": 0, "method": METHOD, "budget": BUDGET, "macs": plan.costs.share("macs")}
    about |= {"images": count, "px": px, "batch": size, "threads": THREADS}
    sizes = {"groups": len(coupling.groups()), "convolutions": convolutions(network)}
    return about | sizes | method.spent() | {"stages": clock.stages, "peak": clock.peaks["plan"]}


@torch.no_grad()
def forward(network: nn.Module, batches: list[Batch]) -> None:
    """Run all batches."""
    for inputs, _ in batches:
        network(inputs)


def convolutions(network: nn.Module) -> int:
    """Count the convolutions that the authors' code prunes: the 3x3 ones, without the first of the network."""
    every = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    return sum(m.kernel_size == (3, 3) for m in every[1:])
