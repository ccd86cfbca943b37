"""A network for some of its classes: the rows of its outputs for the others go, and with them all that only they need.

They go before anything else is planned. What is left is a network like any other, and is planned for like any other;
the plan is then written down for the whole network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from fxprune.building import build
from fxprune.calibrations import Calibration, Moments
from fxprune.costs import CostChange
from fxprune.coupling import Coupling, couple
from fxprune.errors import PlanError
from fxprune.layers import channels_of, fingerprint_of
from fxprune.opening import Classes, check_losses, classes_of, opened, rows_that_stay
from fxprune.planning import plan_of
from fxprune.plans import Plan, frozen
from fxprune.tasks import Task
from fxprune.traced import taking_part


@dataclass(frozen=True, slots=True)
class Restriction:
    """A network without the rows of its outputs for some classes.

    Attributes:
        classes: output -> the classes that stay.
        whole: the network with all rows, which may go.
        rows: the plan that removes these rows and nothing else.
        part: the network without them.
    """

    classes: Classes
    whole: Coupling
    rows: Plan
    part: Coupling

    def widened(self, plan: Plan) -> Plan:
        """Return the plan for the whole network that does what `plan` does after the rows are gone."""
        kept = dict(self.rows.kept)
        for key, positions in plan.kept.items():
            before = kept.get(key)
            if before is not None and before.ndim == positions.ndim == 1:
                kept[key] = frozen(before[positions])
            elif before is None or before.shape[-1] == self.rows.sizes[key]:
                kept[key] = positions
            else:
                raise PlanError(f"{key[0]!r} would lose classes and channels row by row. Pass `slice_outputs=False`.")
        weights = {name: self._whole(name, value) for name, value in (plan.weights or {}).items()}
        return replace(
            plan,
            kept=kept,
            sizes={**plan.sizes, **self.rows.sizes},
            costs=CostChange(self.rows.costs.before, plan.costs.after),
            fingerprint=self.whole.fingerprint,
            keep=None,
            classes=dict(self.classes),
            weights=None if plan.weights is None else weights,
        )

    def _whole(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the part as one of the whole network: rows that went are as they were."""
        dense = self.whole.traced.by_name[name].detach().clone()
        places = self.rows.cut(name, torch.arange(dense.numel()).reshape(dense.shape)).to(dense.device)
        dense.view(-1)[places.reshape(-1)] = value.to(dense).reshape(-1)
        return dense

    def cut(self, data: Any) -> Any:
        """Return a calibration of the whole network as one of the part; batches, or None, as they are."""
        if not isinstance(data, Calibration):
            return data
        assert self.rows.keep is not None
        keep = np.append(self.rows.keep, True)
        moments = {name: self._moments(m, keep) for name, m in data.moments.items()}
        norms = {name: torch.stack([self.rows.cut(name, v) for v in both]) for name, both in data.norms.items()}
        return replace(data, moments=moments, norms=norms, fingerprint=fingerprint_of(self.part))

    def _moments(self, m: Moments, keep: np.ndarray) -> Moments:
        layer = m.layer
        if layer.name not in self.whole.tensors:
            return m
        into, out = (keep[channels] for channels in channels_of(self.whole, layer))
        if into.all() and out.all():
            return m
        blocks = np.flatnonzero(into.any(axis=1) & out.any(axis=1))
        each = 1 if m.shared_taps else layer.taps
        columns = [torch.from_numpy(np.flatnonzero(np.repeat(into[b], each))) for b in blocks]
        rows = [torch.from_numpy(np.flatnonzero(out[b])) for b in blocks]
        return replace(
            m,
            layer=replace(layer, blocks=len(blocks), inputs=len(columns[0]) // each, outputs=len(rows[0])),
            second=torch.stack([m.second[b][c[:, None], c] for b, c in zip(blocks, columns, strict=True)]),
            between=None
            if m.between is None
            else torch.stack([m.between[b][c[:, None], c] for b, c in zip(blocks, columns, strict=True)]),
            mean=torch.stack([m.mean[b][c] for b, c in zip(blocks, columns, strict=True)]),
            sensitivity={
                task: torch.stack([g[b][r[:, None], r] for b, r in zip(blocks, rows, strict=True)])
                for task, g in m.sensitivity.items()
            },
        )


def restrict(coupling: Coupling, tasks: Mapping[str, Task] | None, data: Any = None) -> Restriction | None:
    """Remove the rows of outputs for classes that no task wants, where tasks say so; None where none does.

    Args:
        coupling: the whole network.
        tasks: name -> Task.
        data: batches, or a calibration that may have some, to see whether another task reads these rows.

    Raises:
        PlanError: rows cannot go, an output does not have the classes, or another task wants them.
    """
    classes = classes_of(coupling, tasks)
    if not classes:
        return None
    batches = data.batches if isinstance(data, Calibration) else data
    for batch in () if batches is None or isinstance(batches, Iterator) else islice(batches, 1):
        check_losses(coupling, classes, tasks or {}, batch)
    whole = opened(coupling, classes)
    keep = rows_that_stay(whole, classes)
    rows = plan_of(whole, keep)
    slim = build(whole, keep)
    traced = replace(whole.traced, model=slim, root=slim, graph=slim.graph, state=taking_part(slim, slim.graph)[0])
    left = {n.name for n in slim.graph.nodes}
    freeze = {name: reason for name, reason in coupling.record.freeze.items() if name in left}
    return Restriction(classes, whole, rows, couple(traced, freeze=freeze))
