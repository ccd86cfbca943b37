"""A traced network without its emptied branches: parameters take their place, and what nothing needs is gone."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx, nn

from fxprune.cloning import clone, unused_name
from fxprune.emptying import Removal, live_operand
from fxprune.folding import Fold
from fxprune.literals import plain_name
from fxprune.traced import Traced, copied, taking_part

HOME = "branch_constants"
"""Name of the module that holds the constants of removed branches, each under the name of the branch's last node."""


def cut(traced: Traced, removal: Removal, fold: Fold) -> Traced:
    """Return the network without its emptied branches, otherwise dense.

    Its constants are zero so far; they have the dtype of the branch and the size of the dense network.
    """
    root, graph = clone(traced.root), copied(traced.graph)
    nodes = {n.name: n for n in graph.nodes}
    home = nn.Module()
    for end, shape in fold.constants.items():
        additions = [nodes[name] for name in removal.ends[end]]
        constant = None
        if shape is not None:
            home.register_parameter(end, _parameter(fold, end, shape))
            with graph.inserting_before(next(n for n in graph.nodes if n in additions)):
                constant = graph.get_attr(f"{unused_name(traced.root, HOME)}.{end}")
        for addition in additions:
            _replace(graph, addition, nodes[end], constant)
    for n in reversed(list(graph.nodes)):
        if n.name in removal.gone:
            graph.erase_node(n)
    if home._parameters:
        root.add_module(unused_name(traced.root, HOME), home)
    return replace(traced, root=root, graph=graph, state=taking_part(root, graph)[0])


def _parameter(fold: Fold, end: str, shape: tuple[int, ...]) -> nn.Parameter:
    """Return zeros in the place of a constant: trainable if any of the parameters it comes from is."""
    parts = [t for _, t, is_parameter in fold.traced.state if is_parameter]
    like = next(t for _, t, _ in fold.traced.state if t.is_floating_point())
    value = torch.zeros(shape, dtype=fold.dtypes[end], device=like.device)
    return nn.Parameter(value, requires_grad=any(p.requires_grad for p in parts))


def _replace(graph: fx.Graph, addition: fx.Node, end: fx.Node, constant: fx.Node | None) -> None:
    """Let an addition take the constant in the place of the branch; without one it returns its other operand."""
    other = live_operand(addition, end)
    assert other is not None
    if constant is None:
        addition.replace_all_uses_with(other)
        graph.erase_node(addition)
        return
    addition.replace_input_with(end, constant)
    if plain_name(addition) != "add" and addition.args[0] is constant:  # would write to the parameter
        addition.op, addition.target, addition.args = "call_function", operator.add, (other, constant)
