"""Compensation: the weights that stay make up, as well as they can, for what went."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune import sharing
from fxprune.calibrations import Calibration
from fxprune.correcting import corrections
from fxprune.coupling import Coupling
from fxprune.eliminating import DAMPING
from fxprune.errors import PlanError, check_kind
from fxprune.norms import estimate_statistics, norms_of
from fxprune.opening import opened
from fxprune.planning import keep_of
from fxprune.plans import Plan
from fxprune.refitting import refit


@torch.inference_mode(False)
@sharing.together("compensate")
def compensate(
    coupling: Coupling,
    plan: Plan,
    slim: fx.GraphModule,
    calibration: Calibration,
    *,
    damping: float = DAMPING,
    sequential: bool = False,
) -> tuple[str, ...]:
    """Correct a slim network's weights in place: each layer's by least squares, for the inputs it has lost.

    A layer with weight W, inputs x, of which K stay and R went, gets W_K + (H_KK)^-1 H_KR W_R, where H is the second
    moment of x: the least squared error of its output. Where a bias or a batch norm behind it takes up constants, H is
    centred, and they do.

    Args:
        coupling: of the dense network, whose weights are read.
        plan: what stays.
        slim: from `rewrite(coupling, plan)`; changed in place.
        calibration: of the dense network. If it has its batches, the statistics of batch norms are estimated again,
            on those of all ranks.
        damping: share of the mean diagonal that is added to H; as in planning.
        sequential: afterwards fit each layer again, from the first to the last, to what the dense network answers there
            from what the slim one by now reads there; the calibration must have its batches, of which as many are read
            as the values of both networks fit into 4 GiB.

    Returns:
        The weights that were corrected.

    Raises:
        PlanError: the calibration is of another network, or has no batches or fewer than four samples for `sequential`.
    """
    check_kind(coupling, Coupling)
    check_kind(plan, Plan)
    calibration.check_network(coupling)
    if sequential:
        check_sequential(calibration)
    corrected = correct(coupling, plan, slim, calibration, damping=damping)
    if calibration.batches is None:
        return corrected
    norms = norms_of(coupling, plan, calibration)
    estimate_statistics(slim, norms, calibration.batches)
    refitted = refit(coupling, plan, slim, norms, calibration.batches, damping) if sequential else ()
    return tuple(dict.fromkeys(corrected + refitted))


def check_sequential(calibration: Iterable[Any] | Calibration | None) -> None:
    """Raise PlanError where there are no batches for a sequential correction to read."""
    if calibration is None:
        raise PlanError("sequential=True reads batches: pass `calibration=[(inputs, targets), ...]`, or leave it out.")
    if isinstance(calibration, Calibration) and calibration.batches is None:
        raise PlanError(
            "sequential=True reads batches, and this calibration has none: they are not saved with it. Pass batches, "
            "or `dataclasses.replace(calibration, batches=batches)`."
        )


def correct(
    coupling: Coupling, plan: Plan, slim: nn.Module, calibration: Calibration, *, damping: float
) -> tuple[str, ...]:
    """Correct the weights of a slim network in place, and no statistics; arguments and result as of `compensate`."""
    coupling = opened(coupling, plan.classes)
    keep = np.append(keep_of(coupling, plan), True)
    state = coupling.traced.by_name
    there = dict(slim.named_parameters()) | dict(slim.named_buffers())
    corrected = []
    with torch.no_grad():
        for change in corrections(coupling, calibration.moments, keep, damping, among=there):
            _write(there[change.name], plan.cut(change.name, change.weight))
            if change.holder is not None:
                dense = state[change.holder].detach().double()
                _write(there[change.holder], plan.cut(change.holder, dense + change.shift.to(dense.device)))
            corrected.append(change.name)
    return tuple(corrected)


def take_over(plan: Plan, slim: nn.Module) -> None:
    """Give a slim network, in place, the weights that the method has trained while it searched."""
    there = dict(slim.named_parameters()) | dict(slim.named_buffers())
    with torch.no_grad():
        for name, value in (plan.weights or {}).items():
            if name in there:
                _write(there[name], plan.cut(name, value))


def _write(target: torch.Tensor, value: torch.Tensor) -> None:
    target.copy_(value.to(target))
