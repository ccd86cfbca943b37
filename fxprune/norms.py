"""Statistics of batch norms in a slim network: what they return stays spread as in the dense one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fxprune import sharing
from fxprune.accumulating import Spread
from fxprune.calibrations import Calibration
from fxprune.coupling import Coupling
from fxprune.functions import as_function
from fxprune.layers import eps_of
from fxprune.opening import opened
from fxprune.plans import Plan
from fxprune.sums import spreads_of_all
from fxprune.tasks import evaluating, run_batch


@dataclass(frozen=True, slots=True)
class Norm:
    """What a batch norm of the dense network did to the data, by channel.

    Attributes:
        level: mean of what it returned, before scale and shift.
        spread: variance of that.
    """

    level: torch.Tensor
    spread: torch.Tensor

    @staticmethod
    def of(
        mean: torch.Tensor, var: torch.Tensor, running_mean: torch.Tensor, running_var: torch.Tensor, eps: float
    ) -> Norm:
        """Return what a batch norm of these statistics does to values of this mean and variance, (channels,) each."""
        running_mean, wide = running_mean.double().cpu(), running_var.double().cpu() + eps
        return Norm((mean - running_mean) / wide.sqrt(), var / wide)

    @property
    def lives(self) -> torch.Tensor:
        """(channels,) which vary at all."""
        return self.spread > 1e-12

    def matched(self, mean: torch.Tensor, var: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the running mean and variance that take values of this mean and variance to this level and spread."""
        running = (var / self.spread.clamp_min(1e-12)).clamp_min(eps)
        return mean - self.level * running.sqrt(), running - eps

    def write(self, running_mean: torch.Tensor, running_var: torch.Tensor, seen: Spread, eps: float) -> None:
        """Give a batch norm, in place, the statistics that take what it reads to this level and spread."""
        for target, value in zip((running_mean, running_var), self.matched(seen.mean, seen.var, eps), strict=True):
            target.copy_(torch.where(self.lives, value, target.double().cpu()))


def norms_of(coupling: Coupling, plan: Plan, calibration: Calibration) -> dict[str, Norm]:
    """Return what the dense network's batch norms did to the data, in the channels that stay."""
    coupling = opened(coupling, plan.classes)
    state = coupling.traced.by_name
    found, eps = {}, eps_of(coupling)
    for name, (mean, var) in calibration.norms.items():
        running_var = state.get(f"{name.removesuffix('mean')}var")
        if running_var is not None:  # else it is called as a function, with statistics that have names of their own
            norm = Norm.of(mean, var, state[name], running_var, eps[name])
            found[name] = Norm(plan.cut(name, norm.level), plan.cut(name, norm.spread))
    return found


def estimate_statistics(slim: nn.Module, norms: Mapping[str, Norm], batches: Iterable[Any]) -> None:
    """Estimate the running statistics of batch norms again, in place, so that what they return is spread as before.

    Where the dense network's statistics are those of the data, so are the new ones.

    Args:
        slim: in eval mode while the batches run.
        norms: running mean -> what the dense network's batch norm did to the data.
        batches: calibration batches of this rank.

    Source: Jordan et al., REPAIR (2023), with batch norms in place of an affine map.
    """
    buffers = dict(slim.named_buffers())
    estimator = _Estimator({id(buffers[name]): (name, norm) for name, norm in norms.items() if name in buffers})
    for batch in batches:
        with evaluating(slim), torch.no_grad(), estimator:
            run_batch(slim, batch, {})
    eps = {name: value for part in sharing.gather("batch norms", estimator.eps) for name, value in part.items()}
    with torch.no_grad():
        for name, spread in spreads_of_all(estimator.spreads).items():
            norm, targets = norms[name], (buffers[name], buffers[f"{name.removesuffix('mean')}var"])
            norm.write(*targets, spread, eps[name])


class _Estimator(TorchFunctionMode):
    """Lets batch norms normalise each batch by its own statistics, to the level and spread of the dense network."""

    def __init__(self, norms: Mapping[int, tuple[str, Norm]]) -> None:
        super().__init__()
        self.spreads: dict[str, Spread] = {}
        self.eps: dict[str, float] = {}
        self._norms = norms

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, _, given = as_function(func, args, kwargs)
        known = self._norms.get(id(given.get("running_mean"))) if kind is F.batch_norm else None
        if known is None:
            return func(*args, **(kwargs or {}))
        name, norm = known
        x, mean, var, eps = given["input"], given["running_mean"], given["running_var"], given["eps"]
        own = Spread()
        own.add(x)
        self.spreads.setdefault(name, Spread()).add(x)
        self.eps[name] = eps
        mean, var = (
            torch.where(norm.lives, value, old.double().cpu()).to(old)
            for value, old in zip(norm.matched(own.mean, own.var, eps), (mean, var), strict=True)
        )
        return F.batch_norm(x, mean, var, given.get("weight"), given.get("bias"), False, 0.0, eps)
