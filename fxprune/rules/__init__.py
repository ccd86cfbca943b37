"""The rule table: how each ATen op moves labels from its operands to its results.

One file per family. A rule is a small function `(op, *args, **kwargs) -> Labels`, registered with `@rule(aten.name)`
for all overloads of an op and its in-place form. It sees the op's own arguments (tensors on the meta device, so shapes
are at hand) and the verbs of `Op`; it returns the labels of the result, or a list of them for several results.
Every op without a rule freezes what reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from fxprune import labels as algebra
from fxprune.atoms import Ledger
from fxprune.labels import Extent, Labels, Shape, along
from fxprune.registering import registering
from fxprune.reshaping import reshape

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


class Labeller(Protocol):
    """Whatever knows the labels of tensors."""

    ledger: Ledger

    def labels(self, tensor: torch.Tensor) -> Labels:
        """Return the labels of a tensor; a parameter met for the first time is issued fresh ones."""
        ...

    def name(self, tensor: torch.Tensor, labels: Labels) -> Labels:
        """Give a parameter nothing has been said about yet its labels, and return them."""
        ...

    def pristine(self, tensor: torch.Tensor) -> bool:
        """Say whether this is a parameter about whose labels nothing has been said yet."""
        ...

    def constant(self, shape: Shape) -> np.ndarray:
        """Issue fresh atoms for channels made of a constant, which can be cut anywhere."""
        ...

    def count(self, fixed: int, dims: tuple[Extent, ...]) -> None:
        """Record multiply-accumulates: `fixed` times the kept size of each labelled dim."""
        ...

    def pair(self, x: torch.Tensor, w: torch.Tensor, dim: int) -> None:
        """Remember that `dim` of `x` is summed over with `w`, if both are activations."""
        ...

    def value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the known value of a constant integer tensor."""
        ...

    def on_read(self, tensor: torch.Tensor, then: Callable[[], object]) -> None:
        """Do something once a tensor is read, as if where it was made."""
        ...


@dataclass(frozen=True, slots=True)
class Op:
    """One ATen call, as a rule sees it.

    Attributes:
        func: the overload that was called.
        out: its result on the meta device.
        host: the interpretation it is part of.
    """

    func: Any
    out: Any
    host: Labeller

    @property
    def name(self) -> str:
        """The op's name without overload: `aten.addmm`."""
        return str(self.func.overloadpacket)

    @property
    def ledger(self) -> Ledger:
        """The record that ties, rows and freezes go to."""
        return self.host.ledger

    def labels(self, tensor: torch.Tensor) -> Labels:
        """Return the labels of a tensor."""
        return self.host.labels(tensor)

    def broadcast(self, *tensors: torch.Tensor) -> Labels:
        """Tie operands dim by dim and return the labels of the pointwise result."""
        labels, shape = self.labels(tensors[0]), tuple(tensors[0].shape)
        for other in tensors[1:]:
            labels, shape = algebra.broadcast(self.ledger, labels, shape, self.labels(other), tuple(other.shape))
        return labels

    def fix(self, labels: Labels, dims: Iterable[int], reason: str | None = None) -> Labels:
        """Freeze everything along `dims`."""
        for d in dims:
            labels = algebra.fix(self.ledger, labels, d, reason or f"runs along a dim that {self.name} cannot shorten")
        return labels

    def fix_if_read(self, positions: torch.Tensor, labels: Labels, dims: Iterable[int], reason: str) -> None:
        """Freeze everything along `dims` as soon as something reads `positions`, which were found along them."""
        self.host.on_read(positions, lambda: self.fix(labels, dims, reason))

    def freeze(self, *tensors: torch.Tensor) -> Labels:
        """Freeze everything that reaches an op which cannot be followed; nothing along its result's dims can go."""
        for x in tensors:
            self.fix(self.labels(x), range(x.ndim))
        return algebra.blank(self.out.ndim)

    def as_constant(self, labels: Labels) -> Labels:
        """Return labels for what is there whatever goes, such as `ones_like(x)` or `x > 0`, cut where `labels` are."""
        result = []
        for ids in labels:
            fresh = None if ids is None else self.host.constant(ids.shape)
            if fresh is not None and ids is not None:
                self.ledger.tie(fresh, ids)
            result.append(fresh)
        return tuple(result)

    def pick(self, labels: Labels, dim: int, positions: np.ndarray) -> Labels:
        """Keep some positions of a dim, in the given order."""
        return algebra.pick(self.ledger, labels, dim, positions)

    def reduce(self, labels: Labels, dims: Iterable[int], keepdim: bool = False) -> Labels:
        """Let dims disappear (or keep them with size one), as a statistic does."""
        self._hold_constants(labels, dims)
        return algebra.reduce(self.ledger, labels, dims, keepdim)

    def mix(self, labels: Labels, dims: Iterable[int]) -> Labels:
        """Say that a statistic is taken along `dims`."""
        self._hold_constants(labels, dims)
        return algebra.mix(self.ledger, labels, dims)

    def _hold_constants(self, labels: Labels, dims: Iterable[int]) -> None:
        """Freeze channels made of a constant where a statistic takes them in: without them it would be another."""
        for d in dims:
            ids = labels[d]
            if ids is not None:
                self.ledger.freeze(self.ledger.constants(ids), f"is a constant that {self.name} takes a statistic over")

    def _hold_summed(self, x: Labels, w: Labels, dims: Iterable[int]) -> None:
        """Freeze channels made of a constant where they are summed over and neither operand knows when they go."""
        ndim = max(len(x), len(w))
        for d in dims if self.ledger.has_constants else ():
            a, b = x[d - ndim], w[d - ndim]
            if a is not None and b is not None:
                both = self.ledger.is_constant(a) & self.ledger.is_constant(b)
                for ids in (a, b):
                    held = np.broadcast_to(ids, both.shape)[both]
                    self.ledger.freeze(self.ledger.constants(held), f"is a constant that {self.name} sums over")

    def per_channel(
        self, labels: Labels, shape: Shape, params: Iterable[torch.Tensor | None], at: Sequence[int]
    ) -> Labels:
        """Tie parameters to the dims `at` of a tensor; one nothing has been said about yet takes the tensor's labels.

        Args:
            labels: of the tensor.
            shape: of the tensor.
            params: each of the shape of the dims `at`; None is skipped.
            at: ascending dims.
        """
        plain = tuple(None if (ids := labels[d]) is None else along(ids.ravel(), i, len(at)) for i, d in enumerate(at))
        alike = not any(algebra.rag(labels[d], d) for d in at)
        for p in params:
            if p is None:
                continue
            if alike and self.host.pristine(p) and p.is_floating_point():
                self.host.name(p, plain)
                continue
            sizes = tuple(shape[d] if d in at else 1 for d in range(len(shape)))
            wide = self.reshape(self.labels(p), tuple(p.shape), sizes)
            labels = algebra.broadcast(self.ledger, labels, tuple(shape), wide, sizes)[0]
        return labels

    def reshape(self, labels: Labels, shape: Shape, new: Shape) -> Labels:
        """Follow a view."""
        return reshape(self.ledger, labels, shape, new)

    def contract(
        self, x: Labels, x_shape: Shape, w: Labels, w_shape: Shape, dims: Iterable[int], each: int = 1
    ) -> Labels:
        """Multiply two operands pointwise and sum over `dims`; `each` more macs are spent at every position."""
        dims = list(dims)
        self._hold_summed(x, w, dims)
        labels, shape = algebra.broadcast(self.ledger, x, x_shape, w, w_shape)
        fixed = math.prod(n for n, ids in zip(shape, labels, strict=True) if ids is None)
        self.host.count(fixed * each, algebra.extents(labels))
        return algebra.reduce(self.ledger, labels, dims)


def rule(*packets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for all overloads of these ATen ops."""
    return registering(RULES, packets, "rules")


def lookup(func: Any) -> Rule | None:
    """Return the rule of an overload, or None."""
    packet, tags = func.overloadpacket, func.tags
    found = RULES.get(packet)
    if found is None and packet.__name__.endswith("_"):
        plain = getattr(torch.ops.aten, packet.__name__.rstrip("_"), None)
        found = RULES.get(plain)
        tags = tags + getattr(getattr(plain, func._overloadname, None), "tags", [])  # some in-place forms lack the tag
    if found is None and torch.Tag.pointwise in tags:
        found = RULES[torch.ops.aten.add]
    return found


from fxprune.rules import (  # noqa: E402 (fills RULES)
    contraction,  # noqa: F401
    creation,  # noqa: F401
    movement,  # noqa: F401
    normalization,  # noqa: F401
    pointwise,  # noqa: F401
    pooling,  # noqa: F401
    selection,  # noqa: F401
    spectral,  # noqa: F401
)
