"""First-order Taylor: how much the loss would change if a channel were zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from fxprune.coupling import Coupling
from fxprune.criteria import add_up, weight_sites
from fxprune.errors import PlanError
from fxprune.tasks import Task, run_batch


def taylor(coupling: Coupling, calibration: Iterable[Any] | None, tasks: Mapping[str, Task] | None) -> np.ndarray:
    """Return sum (w * dL/dw) squared per position, added up over the weights of each channel.

    L is the sum of the tasks' losses, averaged over the calibration batches. The network is differentiated in eval
    mode; the model's own gradients are not touched.

    Args:
        coupling: the coupled network.
        calibration: batches `(inputs, targets)`.
        tasks: name -> Task.

    Returns:
        (channels,) scores.

    Raises:
        PlanError: no batches or no tasks.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning (2019), equation 8, per filter.
    """
    if calibration is None or not tasks:
        missing = "calibration batches" if calibration is None else "tasks"
        raise PlanError(
            f"Taylor needs {missing}: pass `calibration=loader, tasks={{'name': fxprune.Task(loss)}}`, or use `Magnitude()`."
        )
    gradients = _gradients(coupling, calibration, tasks)

    def measure(name: str, weight: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
        product = weight.double() * gradients[name].double()
        return (product.sum(dim=dims, keepdim=True) if dims else product) ** 2

    return add_up(coupling, [s for s in weight_sites(coupling) if s.name in gradients], measure)


def _gradients(coupling: Coupling, calibration: Iterable[Any], tasks: Mapping[str, Task]) -> dict[str, torch.Tensor]:
    module = coupling.traced.module
    names = {name: p for name, p in module.named_parameters()}
    modes = {m: m.training for m in module.modules()}
    asked = {name: p.requires_grad for name, p in names.items()}
    total: dict[str, torch.Tensor] = {}
    batches = 0
    try:
        module.eval()
        for p in names.values():
            p.requires_grad_(True)
        for batch in calibration:
            losses = run_batch(module, batch, tasks)
            found = torch.autograd.grad(
                torch.stack(list(losses.values())).sum(), list(names.values()), allow_unused=True
            )
            for name, gradient in zip(names, found, strict=True):
                if gradient is not None:
                    total[name] = total[name] + gradient if name in total else gradient
            batches += 1
    finally:
        for m, training in modes.items():
            m.training = training
        for name, p in names.items():
            p.requires_grad_(asked[name])
    if not batches:
        raise PlanError("the calibration data has no batches. Pass a list or a DataLoader, not an exhausted iterator.")
    return {name: gradient / batches for name, gradient in total.items()}
