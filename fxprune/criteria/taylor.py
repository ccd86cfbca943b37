"""First-order Taylor: how much the loss would change if a channel were zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fxprune.coupling import Coupling
from fxprune.criteria import add_up, summed, weight_sites
from fxprune.errors import PlanError
from fxprune.shares import Share
from fxprune.tasks import NO_BATCHES, Task, evaluating, run_batch


def taylor(coupling: Coupling, calibration: Iterable[Any] | None, tasks: Mapping[str, Task] | None) -> np.ndarray:
    """Return sum (w * dL/dw) squared per position, added up over the weights of each channel.

    L is the sum of the tasks' losses, averaged over the calibration batches. The network is differentiated in eval
    mode; the model's own gradients are not touched, and it does not matter whether gradients are switched off around
    the call. Each loss is called as `loss(outputs, batch)`, the batch as it came from `calibration`.

    Args:
        coupling: the coupled network.
        calibration: batches `(inputs, targets)` of this rank; those of all count.
        tasks: name -> Task; its loss takes `(outputs, batch)`.

    Returns:
        (channels,) scores.

    Raises:
        PlanError: no batches or no tasks, or a loss that does not depend on the weights.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning (2019), equation 8, per filter.
    """
    if calibration is None or not tasks:
        missing = "calibration batches" if calibration is None else "tasks"
        raise PlanError(
            f"Taylor needs {missing}: pass `calibration=loader, tasks={{'name': fxprune.Task(loss)}}`, or use "
            "`Magnitude()`."
        )
    gradients = _gradients(coupling, calibration, tasks)

    def measure(name: str, weight: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
        wide = torch.complex128 if weight.is_complex() else torch.float64
        product = (weight.to(wide).conj() * gradients[name].to(wide)).real
        return summed(product, dims) ** 2

    return add_up(coupling, [s for s in weight_sites(coupling) if s.name in gradients], measure)


def _gradients(coupling: Coupling, calibration: Iterable[Any], tasks: Mapping[str, Task]) -> dict[str, torch.Tensor]:
    module = coupling.traced.module
    names = dict(module.named_parameters())
    asked = {name: p.requires_grad for name, p in names.items()}
    total: dict[str, torch.Tensor] = {}
    batches = 0
    try:
        for p in names.values():
            p.requires_grad_(True)
        for found in Share.of(calibration).every(lambda b: _of_batch(module, b, tasks, list(names.values()))):
            for name, gradient in zip(names, found, strict=True):
                if gradient is not None:
                    total[name] = total[name] + gradient if name in total else gradient
            batches += 1
    finally:
        for name, p in names.items():
            p.requires_grad_(asked[name])
    if not batches:
        raise PlanError(NO_BATCHES)
    return {name: gradient / batches for name, gradient in total.items()}


def _of_batch(
    module: torch.nn.Module, batch: Any, tasks: Mapping[str, Task], weights: list[torch.nn.Parameter]
) -> Sequence[torch.Tensor | None]:
    """Return the gradient of the sum of the losses of one batch for each weight."""
    with evaluating(module), torch.enable_grad():
        losses = run_batch(module, batch, tasks)
        constant = [name for name, loss in losses.items() if not loss.requires_grad]
        found: Sequence[torch.Tensor | None] = ()
        if not constant:
            found = torch.autograd.grad(torch.stack(list(losses.values())).sum(), weights, allow_unused=True)
    if all(gradient is None for gradient in found):
        names = ", ".join(repr(name) for name in constant or tasks)
        raise PlanError(
            f"the loss of task {names} does not depend on the weights. Compute it from `outputs`, without `.detach()`, "
            "`.item()` or `torch.no_grad()`."
        )
    return found
