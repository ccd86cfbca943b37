"""The theorem, checked: the slim network computes what the original does when removed channels contribute nothing.

The reference knows nothing of graphs, labels or rewriting. It runs the original module in float64 with every removed
position of every parameter and buffer set to NaN, which stands for *absent* (see `masking`). What comes out, without
the absent positions, is what the slim network must return.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxprune.coupling import Coupling
from fxprune.errors import VerificationError
from fxprune.interpreting import bind, named_state, tensors_in
from fxprune.masking import AbsentIsNaN
from fxprune.planning import Plan

TOLERANCE = 1e-9
"""Largest relative error, in float64, that counts as equal."""


@dataclass(frozen=True, slots=True)
class Verification:
    """How far the slim network is from the masked original.

    Attributes:
        errors: output -> max |slim - masked| / max |masked|, in float64. Outputs are named by their place.
        tolerance: what counts as equal.
    """

    errors: Mapping[str, float]
    tolerance: float = TOLERANCE

    @property
    def worst(self) -> float:
        """The largest error of any output."""
        return max(self.errors.values(), default=0.0)

    @property
    def passed(self) -> bool:
        """Whether every output is equal to within the tolerance."""
        return self.worst <= self.tolerance

    def __str__(self) -> str:
        verdict = "equal" if self.passed else "DIFFERENT"
        lines = [f"slim(x) against masked(x) in float64: {verdict}, worst relative error {self.worst:.1e}"]
        return "\n".join(lines + [f"  {name}: {error:.1e}" for name, error in self.errors.items()])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"passed": self.passed, "worst": self.worst, "tolerance": self.tolerance, "errors": dict(self.errors)}


def _to_double(value: Any) -> Any:
    return pytree.tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, value)


def _double_copy(module: nn.Module) -> nn.Module:
    """Return a float64 copy in eval mode, on the same devices."""
    memo = {}
    for _, t, is_parameter in named_state(module):
        fresh = t.detach().to(
            torch.complex128 if t.is_complex() else torch.float64 if t.is_floating_point() else t.dtype, copy=True
        )
        memo[id(t)] = nn.Parameter(fresh, requires_grad=False) if is_parameter else fresh
    return copy.deepcopy(module, memo).eval()


def masked_copy(module: nn.Module, plan: Plan) -> nn.Module:
    """Return a float64 copy of a module, in eval mode, with NaN at every position the plan removes."""
    masked = _double_copy(module)
    state = {name: t for name, t, _ in named_state(masked)}
    with torch.no_grad():
        for (name, dim), positions in plan.kept.items():
            if name.startswith("_tensor_constant") and name not in state:
                continue  # made by tracing out of a tensor that forward makes
            value = state[name]
            if positions.ndim == 1:
                gone = np.setdiff1d(np.arange(value.shape[dim]), positions)
                value.index_fill_(dim, torch.from_numpy(gone).to(value.device), torch.nan)
            else:
                rows = plan.kept.get((name, 0), np.arange(value.shape[0]))
                for row, stays in zip(rows.tolist(), positions, strict=True):
                    gone = np.setdiff1d(np.arange(value.shape[dim]), stays)
                    value[row].index_fill_(dim - 1, torch.from_numpy(gone).to(value.device), torch.nan)
    return masked


def run_masked(module: nn.Module, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run a masked copy on float64 inputs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), AbsentIsNaN():
            return module(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _named_outputs(value: Any) -> dict[str, torch.Tensor]:
    """Return output name -> tensor: keys of dicts, fields of dataclasses, positions of tuples."""
    if isinstance(value, torch.Tensor):
        return {"output": value}
    if hasattr(value, "__dataclass_fields__"):
        items = {k: getattr(value, k) for k in value.__dataclass_fields__}
    elif isinstance(value, dict):
        items = value
    else:
        items = dict(enumerate(value)) if isinstance(value, (tuple, list)) else {}
    found = {}
    for key, item in items.items():
        for name, t in _named_outputs(item).items():
            found[str(key) if name == "output" else f"{key}.{name}"] = t
    return found


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return max |found - expected| / max |expected|; infinite where shapes differ, or what is finite does."""
    if found.shape != expected.shape:
        return float("inf")
    if not found.numel():
        return 0.0
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return float("inf")
    here = expected.isfinite()
    if not here.any():
        return 0.0
    scale = expected[here].abs().max().item()
    return (found[here] - expected[here]).abs().max().item() / (scale or 1.0)


def verify(coupling: Coupling, plan: Plan, slim: fx.GraphModule) -> Verification:
    """Compare the slim network with the masked original on the example inputs, in float64 and eval mode.

    Args:
        coupling: of the original network.
        plan: what the slim network keeps.
        slim: from `rewrite`, before any of its weights were changed.

    Raises:
        VerificationError: an output differs: which, by how much, and the first node that does.
    """
    traced = coupling.traced
    args, kwargs = _to_double((traced.args, traced.kwargs))
    original = traced.module if traced.one_path and traced.model.training else traced.model
    masked = _named_outputs(run_masked(masked_copy(original, plan), copy.deepcopy(args), copy.deepcopy(kwargs)))
    with torch.no_grad():
        found = _named_outputs(_double_copy(slim)(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
    errors = {name: relative_error(found[name], masked[name]) if name in found else float("inf") for name in masked}
    result = Verification(errors)
    if not result.passed:
        name = max(errors, key=errors.__getitem__)
        raise VerificationError(
            f"output {name!r} of the slim network differs from the masked original by {errors[name]:.1e} (relative, "
            f"float64). "
            f"{_first_difference(coupling, plan, slim)} This is a bug in fxprune or in a custom rule: please report "
            f"it; "
            "`Constraints(keep_outputs=[...])` on that layer is a way around it."
        )
    return result


class _Recorder(fx.Interpreter):
    """Keeps what every node returns."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, list[torch.Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and keep its tensors."""
        value = super().run_node(n)
        self.values[n.name] = [t.clone() for t in tensors_in(value)]
        return value


def _first_difference(coupling: Coupling, plan: Plan, slim: fx.GraphModule) -> str:
    """Say at which node the two networks part."""
    traced = coupling.traced
    values = bind(traced.graph, *_to_double((traced.args, traced.kwargs)))
    dense = _Recorder(masked_copy(traced.module, plan))  # pyright: ignore[reportArgumentType]
    with torch.no_grad(), AbsentIsNaN():
        dense.run(*copy.deepcopy(values), enable_io_processing=False)
    short = _Recorder(_double_copy(slim))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        short.run(*copy.deepcopy(values), enable_io_processing=False)
    for name, expected in dense.values.items():
        for a, b in zip(short.values.get(name, []), expected, strict=False):
            present = b[~b.isnan()] if b.is_floating_point() else b.reshape(-1)
            error = relative_error(a.reshape(-1), present)
            if error > TOLERANCE:
                return f"The first node that differs is {name!r}{traced.where(name)}, by {error:.1e}."
    return "No node of the traced graph differs: the trace itself does not compute what the model does."
