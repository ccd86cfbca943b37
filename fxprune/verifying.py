"""The theorem, checked: the slim network computes what the original does when removed channels contribute nothing.

The reference knows nothing of graphs, labels or rewriting. It runs the original module in float64 with every removed
position of every parameter and buffer set to NaN, which stands for *absent* (see `masking`). What comes out, without
the absent positions, is what the slim network must return. A dim of which nothing stays is no exception: what sums over
it returns its bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxprune.cloning import aliased_state, clone, named_state
from fxprune.coupling import Coupling
from fxprune.errors import VerificationError, check_kind
from fxprune.masking import NO_INPUT, AbsentIsNaN, InFloat64
from fxprune.outputs import parts_of
from fxprune.patching import patched
from fxprune.plans import Plan
from fxprune.slimming import EXACT
from fxprune.switching import WITHOUT_INFERENCE
from fxprune.values import Bound, bind, tensors_in

MADE_BY_TRACING = ("_tensor_constant", "lifted_tensor")
"""How the names of tensors begin that forward makes, and a trace has made before."""
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
    def widen(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        wide = torch.complex128 if t.is_complex() else torch.float64 if t.is_floating_point() else t.dtype
        return t.detach().to(wide, copy=True)

    return pytree.tree_map(widen, value)


def double_copy(module: nn.Module, exact: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """Return a float64 copy in eval mode, on the same devices.

    Args:
        module: not touched.
        exact: name -> value of a parameter before it was rounded; used where the parameter still is that, rounded.
    """
    memo = {}
    for name, t, is_parameter in named_state(module):
        before = exact.get(name) if exact else None
        same = before is not None and torch.equal(before.to(t.device, t.dtype), t)
        wide = torch.complex128 if t.is_complex() else torch.float64 if t.is_floating_point() else t.dtype
        fresh = (before if same and before is not None else t).detach().to(wide, copy=True)
        memo[id(t)] = nn.Parameter(fresh, t.requires_grad) if is_parameter else fresh
    return clone(module, memo).eval()


def masked_copy(module: nn.Module, plan: Plan) -> nn.Module:
    """Return a float64 copy of a module, in eval mode, with NaN at every position the plan removes."""
    masked = double_copy(module)
    state = {name: t for name, t, _ in aliased_state(masked)}
    with torch.no_grad():
        for (name, dim), positions in plan.kept.items():
            if name.startswith(MADE_BY_TRACING) and name not in state:
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
        for name in dict.fromkeys(name for (name, _), positions in plan.kept.items() if not positions.size):
            _mark_emptied(state[name], {dim: k for (n, dim), k in plan.kept.items() if n == name})
    return masked


def _mark_emptied(value: torch.Tensor, kept: Mapping[int, np.ndarray]) -> None:
    """Mark where a weight, one dim of which keeps nothing, is kept along all others: these positions lack inputs."""
    others = {dim: positions for dim, positions in kept.items() if positions.size}
    if value.dtype != torch.float64 or value.ndim < 2 or len(kept) != len(others) + 1:
        return
    here = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    for dim, positions in others.items():
        gone = np.setdiff1d(np.arange(value.shape[dim]), positions)
        here.index_fill_(dim, torch.from_numpy(gone).to(value.device), False)
    value.view(torch.int64).masked_fill_(here, NO_INPUT)


def run_in(mode: InFloat64, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Run a module on float64 copies of its inputs, with ops that the mode can see."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    args, kwargs = _to_double((args, dict(kwargs)))
    mode.know(t for name, t, _ in named_state(module) if name.startswith(MADE_BY_TRACING))
    fastpath, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    if any(isinstance(m, nn.RNNBase) for m in module.modules()):
        torch.backends.cudnn.enabled = False  # in it a recurrent layer is a single op
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), patched([WITHOUT_INFERENCE]), mode:
            return module(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch.backends.cudnn.enabled = cudnn


def named_outputs(value: Any) -> dict[str, torch.Tensor]:
    """Return output name -> tensor: keys of dicts, fields of dataclasses, positions of tuples."""
    if isinstance(value, torch.Tensor):
        return {"output": value}
    found = {}
    for key, item in (parts_of(value) or {}).items():
        for name, t in named_outputs(item).items():
            found[str(key) if name == "output" else f"{key}.{name}"] = t
    return found


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return max |found - expected| / max |expected|; infinite where shapes differ, or what is infinite or NaN does."""
    if found.shape != expected.shape:
        return float("inf")
    if expected.is_complex() and found.is_complex():
        found, expected = torch.view_as_real(found), torch.view_as_real(expected)
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    here = expected.isfinite()
    if not torch.equal(found.nan_to_num()[~here], expected.nan_to_num()[~here]) or not torch.equal(
        found.isnan(), expected.isnan()
    ):
        return float("inf")
    if not here.any():
        return 0.0
    scale = expected[here].abs().max().item()
    error = (found[here] - expected[here]).abs().max().item()
    return error / (scale or 1.0) if math.isfinite(error) else float("inf")


@torch.inference_mode(False)
def verify(coupling: Coupling, plan: Plan, slim: fx.GraphModule) -> Verification:
    """Compare the slim network with the masked original on the example inputs, in float64 and eval mode.

    Args:
        coupling: of the original network.
        plan: what the slim network keeps.
        slim: from `rewrite`, before any of its weights were changed.

    Raises:
        VerificationError: an output differs (which, by how much, and the first node that does), or nothing can be
            compared: forward draws random numbers, or returns no finite number.
    """
    check_kind(coupling, Coupling)
    check_kind(plan, Plan)
    traced = coupling.traced
    original = traced.module if traced.one_path and traced.model.training else traced.model
    reference, plain = AbsentIsNaN(), InFloat64()
    try:
        masked = named_outputs(run_in(reference, masked_copy(original, plan), traced.args, traced.kwargs))
        found = named_outputs(run_in(plain, double_copy(slim, slim.meta.get(EXACT)), traced.args, traced.kwargs))
    except Exception as error:
        raise VerificationError(
            f"the networks do not run in float64 on the example inputs: {type(error).__name__}: {error}. Check that "
            "`model(*example_inputs)` runs, or pass `verify=False`."
        ) from error
    for name, rows in plan.classes.items():
        if name in masked:
            masked[name] = masked[name].index_select(1, torch.tensor(rows, device=masked[name].device))
    names = list(dict.fromkeys([*masked, *found]))
    both = masked.keys() & found.keys()
    errors = {n: relative_error(found[n], masked[n]) if n in both else float("inf") for n in names}
    result = Verification(errors)
    if not any(masked[n].isfinite().any() for n in both):
        raise VerificationError(
            "nothing can be compared: no output of the original holds a finite number. Pass other example inputs, or "
            "`verify=False`."
        )
    if not result.passed:
        name = max(errors, key=errors.__getitem__)
        drawn = reference.random | plain.random
        reason = (
            f"Forward draws random numbers ({', '.join(sorted(drawn))}), other ones in every run: pass `verify=False`."
            if drawn
            else f"{_first_difference(coupling, plan, slim)} This is a bug in fxprune or in a custom rule: please "
            "report it; `Constraints(keep_outputs=[...])` on that layer is a way around it."
        )
        raise VerificationError(
            f"output {name!r} of the slim network differs from the masked original by {errors[name]:.1e} (relative, "
            f"float64). {reason}"
        )
    return result


class _Recorder(Bound):
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
        dense.run(*_to_double(values), enable_io_processing=False)
    short = _Recorder(double_copy(slim, slim.meta.get(EXACT)))  # pyright: ignore[reportArgumentType]
    with torch.no_grad(), InFloat64():
        short.run(*_to_double(values), enable_io_processing=False)
    for name, expected in dense.values.items():
        for a, b in zip(short.values.get(name, []), expected, strict=False):
            present = b[~b.isnan()] if b.is_floating_point() else b.reshape(-1)
            error = relative_error(a.reshape(-1), present)
            if error > TOLERANCE:
                return f"The first node that differs is {name!r}{traced.where(name)}, by {error:.1e}."
    return "No node of the traced graph differs: the trace itself does not compute what the model does."
