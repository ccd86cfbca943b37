"""From a plan to a slim network."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import fx

from fxprune.branches import build_without
from fxprune.building import build
from fxprune.cloning import submodule
from fxprune.coupling import Coupling, couple
from fxprune.errors import PlanError, RewriteError, check_kind
from fxprune.opening import opened
from fxprune.pausing import without_collector
from fxprune.planning import keep_of
from fxprune.plans import Plan
from fxprune.traced import Traced

logger = logging.getLogger(__name__)


@torch.inference_mode(False)
@without_collector
def rewrite(coupling: Coupling, plan: Plan) -> fx.GraphModule:
    """Build the slim network of a plan.

    Args:
        coupling: of the network to cut: the one planned on, or another checkpoint of the same class.
        plan: what stays.

    Returns:
        A module with the same forward signature, outputs and parameter names, that shares no memory with the model.

    Raises:
        ArtifactError: the plan does not fit this network.
        RewriteError: the graph holds sizes that cannot be rewritten; its `nodes` say where and why.
    """
    check_kind(coupling, Coupling)
    check_kind(plan, Plan)
    coupling = opened(coupling, plan.classes)
    keep = keep_of(coupling, plan)
    return build_without(coupling, keep, build) if plan.empties else build(coupling, keep)


def plan_and_rewrite(
    coupling: Coupling, choose: Callable[[Coupling], Plan], *, unknown: str = "freeze"
) -> tuple[Coupling, Plan, fx.GraphModule, dict[str, str]]:
    """Plan and rewrite; where sizes in the graph cannot be rewritten, freeze those nodes and start over.

    Each round freezes a node more, so that this ends.

    Args:
        coupling: of the network.
        choose: plans on a coupling.
        unknown: what to do about ops without a rule, as of `couple`.

    Returns:
        The coupling and the plan of the last round, the slim network, and the nodes frozen: node -> reason.
    """
    traced = coupling.traced
    freeze: dict[str, str] = {}
    while True:
        try:
            chosen = choose(coupling)
        except PlanError as error:
            if not freeze:
                raise
            lines = [f"  node {node!r}{traced.where(node)} {reason}" for node, reason in freeze.items()]
            raise PlanError(f"{error}\nThese nodes were frozen before:\n" + "\n".join(lines)) from error
        try:
            return coupling, chosen, rewrite(coupling, chosen), freeze
        except RewriteError as error:
            fresh = {node: _why(traced, node, reason) for node, reason in error.nodes.items() if node not in freeze}
            if not fresh:
                raise
        logger.info("frozen and planned again: %s", fresh)
        freeze |= fresh
        coupling = couple(traced, unknown=unknown, freeze=freeze)


def _why(traced: Traced, name: str, reason: str) -> str:
    """Say why a node whose sizes cannot be rewritten is frozen."""
    node = next(n for n in traced.graph.nodes if n.name == name)
    if node.op != "call_module":
        return f"holds a size that cannot be rewritten ({reason})"
    kind = type(submodule(traced.root, str(node.target)))
    known = f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__name__
    article = "an" if known[0] in "aeiounAEIOU" else "a"
    return f"is {article} {known}, whose sizes cannot be rewritten yet ({reason})"
