"""Carry an optimizer over to the slim network, so that training goes on with the momenta it had."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from fxprune.errors import ArtifactError
from fxprune.plans import Plan
from fxprune.reporting import report


def transfer(
    optimizer: torch.optim.Optimizer, slim: nn.Module, *, model: nn.Module | None = None
) -> torch.optim.Optimizer:
    """Return an optimizer of the same class, settings and parameter groups for the slim network, with sliced state.

    The constants of removed branches are parameters that the original does not have: they join the first group.

    Args:
        optimizer: over the parameters of the original model. It is not touched.
        slim: from `compile` or `load`.
        model: the original model, which says which parameter has which name. Without it, the parameters are taken to be
            in the order of `model.parameters()`, all of them, as `Adam(model.parameters())` has them.

    Raises:
        ArtifactError: the optimizer's parameters are not those of the original model, or it keeps state that is not
            shaped like a parameter (LBFGS, Adafactor), which a plan cannot cut.
    """
    plan = report(slim).plan
    named = _names(optimizer, slim, model)
    targets = dict(slim.named_parameters())
    groups = []
    for group in optimizer.param_groups:
        params = [targets[named[id(p)]] for p in group["params"] if named.get(id(p)) in targets]
        groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": params})
    accepted = inspect.signature(type(optimizer)).parameters
    if model is not None and groups:
        known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        groups[0]["params"] += [p for name, p in slim.named_parameters() if name not in known]
    settings = {k: v for k, v in optimizer.defaults.items() if k in accepted}
    states = {}
    for p, state in optimizer.state.items():
        name = named.get(id(p))
        if name in targets:
            _check(optimizer, name, p, state)
            states[targets[name]] = {k: _cut(plan, name, p, v) for k, v in state.items()}
    fresh = type(optimizer)([g for g in groups if g["params"]], **settings)
    fresh.state.update(states)
    return fresh


def _check(optimizer: torch.optim.Optimizer, name: str, p: torch.Tensor, state: dict[str, Any]) -> None:
    """Check that what an optimizer keeps for a parameter is single numbers and tensors of its shape."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            if value.numel() <= 1 or value.shape == p.shape:
                continue
            found = f"a tensor of shape {tuple(value.shape)}"
        elif isinstance(value, (list, tuple, dict)):
            found = f"a {type(value).__name__}"
        else:
            continue
        raise ArtifactError(
            f"{type(optimizer).__name__} keeps {key!r} of {name!r} as {found}, expected the parameter's shape "
            f"{tuple(p.shape)}: a plan cannot cut it. Make a new `{type(optimizer).__name__}(slim.parameters())`."
        )


def _names(optimizer: torch.optim.Optimizer, slim: nn.Module, model: nn.Module | None) -> dict[int, str]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if model is not None:
        theirs = dict(slim.named_parameters())
        names: dict[int, str] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            if id(p) not in names or name in theirs:
                names[id(p)] = name  # of shared ones, the name that the slim network has
        unknown = [p for p in params if id(p) not in names]
        if unknown:
            raise ArtifactError(
                f"{len(unknown)} of the optimizer's {len(params)} parameters are not in `model`. Pass the model it "
                f"was made for."
            )
        return names
    targets = list(slim.named_parameters())
    if len(params) != len(targets):
        raise ArtifactError(
            f"the optimizer has {len(params)} parameters, the slim network {len(targets)}: which is which cannot be "
            f"told. Pass `model=` too."
        )
    plan = report(slim).plan
    for p, (name, q) in zip(params, targets, strict=True):
        expected = tuple(plan.sizes.get((name, d), n) for d, n in enumerate(q.shape))
        if tuple(p.shape) != expected:
            raise ArtifactError(
                f"{name!r}: expected the optimizer's parameter of shape {expected}, found {tuple(p.shape)}. Pass "
                f"`model=` too."
            )
    return {id(p): name for p, (name, _) in zip(params, targets, strict=True)}


def _cut(plan: Plan, name: str, p: torch.Tensor, value: Any) -> Any:
    """Cut one entry of an optimizer's state, if it has the shape of the parameter."""
    if not isinstance(value, torch.Tensor):
        return value
    return plan.cut(name, value) if value.shape == p.shape else value.clone()
