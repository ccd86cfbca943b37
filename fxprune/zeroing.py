"""Whether zeros in place of channels make the network that rewriting makes.

They do not where what has gone still counts: in a norm over channels, or a softmax over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.func import functional_call

from fxprune.building import build
from fxprune.coupling import Coupling
from fxprune.criteria.magnitude import magnitude
from fxprune.errors import RewriteError
from fxprune.paths import paths_by_score
from fxprune.tasks import evaluating, inputs_of
from fxprune.values import tensors_in

CLOSE = 1e-4
"""Outputs that differ by less than this, relative to their norm, are the same."""


def zeros_suffice(coupling: Coupling, batch: Any) -> bool:
    """Say whether they do, as tried out once on a batch; no, where it cannot be tried or all outputs are zero."""
    for share in (0.5, 0.25, 0.0):
        keep = _without_some(coupling, share)
        if coupling.violation(keep):
            continue
        try:
            slim = build(coupling, keep)
        except RewriteError:
            continue
        found, wanted = _outputs(coupling.traced.module, zeros(coupling, keep), batch), _outputs(slim, {}, batch)
        return all(bool((a - b).norm() < CLOSE * b.norm()) for a, b in zip(found, wanted, strict=True))
    return False


def zeros(
    coupling: Coupling, keep: np.ndarray, state: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return the parameters that hold other channels than `keep` (channels,), with zeros in their place.

    Args:
        coupling: of the network.
        keep: what stays.
        state: name -> value; the network's own without it.
    """
    stays, values = np.append(keep, True), dict[str, torch.Tensor]()
    if state is None:
        state = {name: tensor.detach() for name, tensor, _ in coupling.traced.state}
    for site in coupling.sites:
        gone = ~stays[site.channels]
        if gone.any() and site.is_parameter:
            value = values.get(site.name, state[site.name])
            values[site.name] = value.masked_fill(torch.from_numpy(gone).to(value.device), 0)
    return values


def _outputs(module: torch.nn.Module, values: dict[str, torch.Tensor], batch: Any) -> list[torch.Tensor]:
    args, kwargs = inputs_of(batch)
    with evaluating(module), torch.no_grad():
        outputs = functional_call(module, values, args, kwargs, tie_weights=True)
    return [t for t in tensors_in(outputs) if t.is_floating_point() or t.is_complex()]


def _without_some(coupling: Coupling, share: float) -> np.ndarray:
    """Return (channels,) a choice without a share of every group, or one step of it."""
    keep = np.ones(coupling.num_channels, dtype=bool)
    for path in paths_by_score(coupling, magnitude(coupling)):
        steps = min(max(int(share * len(path.choices)), 1), len(path.choices) - 1)
        keep[coupling.members.of(path.choices[:steps].ravel())[0]] = False
    return coupling.settle(keep)
