"""From a plan to a slim network."""

from __future__ import annotations

from torch import fx

from fxprune.branches import build_without
from fxprune.building import build
from fxprune.coupling import Coupling
from fxprune.errors import check_kind
from fxprune.opening import opened
from fxprune.pausing import without_collector
from fxprune.planning import keep_of
from fxprune.plans import Plan


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
