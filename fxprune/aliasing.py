"""Which nodes write to their input, and whose memory a node hands on: what decides whether a node can be left out.

Leaf modules and functions of the user's, which are not looked into, are taken not to write to what they are given,
unless they say so by `inplace=True` or by a name that ends in an underscore.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Container
from types import FunctionType

import torch
from torch import fx, nn

from fxprune.cloning import submodule
from fxprune.literals import plain_name

_WRITING = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift",
    "irshift", "setitem",
}  # fmt: skip
_HANDING_ON = {
    "getitem", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "einsum", "meshgrid",
    "broadcast_tensors", "atleast_1d", "atleast_2d", "atleast_3d", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "alpha_dropout", "feature_dropout", "feature_alpha_dropout",
}  # fmt: skip
"""Names of functions that may return the memory of an input although their ATen schema, if any, does not say so."""
_HANDING_ON_LAYERS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
_NUMBERS = {"shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad"}
"""Attributes of tensors that share no memory with them."""


def writes(node: fx.Node, root: nn.Module) -> bool:
    """Say whether a node writes to an input: the first one, unless it says `out=`."""
    return bool(written(node, root))


def written(node: fx.Node, root: nn.Module) -> tuple[fx.Node, ...]:
    """Return the inputs that a node writes to."""
    if node.op not in ("call_module", "call_function", "call_method") or not node.all_input_nodes:
        return ()
    out = [n for n in node.all_input_nodes if n in _nodes_in(node.kwargs.get("out"))]
    if out:
        return tuple(out)
    if node.op == "call_module":
        marked = bool(getattr(submodule(root, str(node.target)), "inplace", False))
    else:
        name = plain_name(node)
        marked = name in _WRITING or (name.endswith("_") and not name.endswith("__")) or _asked_for_inplace(node)
    return tuple(node.all_input_nodes[:1]) if marked else ()


def _nodes_in(value: object) -> list[fx.Node]:
    if isinstance(value, (tuple, list)):
        return [n for part in value for n in _nodes_in(part)]
    return [value] if isinstance(value, fx.Node) else []


def _asked_for_inplace(node: fx.Node) -> bool:
    """Say whether a call has a true argument `inplace`, by name or by position."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is True
    if not isinstance(node.target, FunctionType):
        return False
    position = _position_of_inplace(node.target)
    return position is not None and len(node.args) > position and node.args[position] is True


@functools.cache
def _position_of_inplace(function: FunctionType) -> int | None:
    names = list(inspect.signature(function).parameters)
    return names.index("inplace") if "inplace" in names else None


def hands_on(node: fx.Node, root: nn.Module) -> bool:
    """Say whether a node may return the memory of its first input."""
    if writes(node, root):
        return True
    if node.op != "call_module":
        name = plain_name(node)
        if name == "getattr":
            return node.args[1] not in _NUMBERS
        return name in _HANDING_ON or _is_view(name)
    module = submodule(root, str(node.target))
    known = type(module).__module__.startswith("torch.nn.")
    return isinstance(module, _HANDING_ON_LAYERS) or not known


@functools.cache
def _is_view(name: str) -> bool:
    """Say whether an ATen op of this name returns the memory of an input, by its schema."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    infos = [result.alias_info for overload in overloads for result in overload._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def written_state(graph: fx.Graph, root: nn.Module) -> set[str]:
    """Return the names of the parameters and buffers that nodes of a graph write to."""
    names: dict[fx.Node, str] = {}
    found: set[str] = set()
    for n in graph.nodes:
        found.update(names[source] for source in written(n, root) if source in names)
        if n.op == "get_attr":
            names[n] = str(n.target)
        elif n.all_input_nodes and n.all_input_nodes[0] in names and hands_on(n, root):
            names[n] = names[n.all_input_nodes[0]]
    return found


def origin(node: fx.Node, root: nn.Module, among: Container[str]) -> fx.Node | None:
    """Return the node outside of `among` whose memory a node may return; None where it comes from inside."""
    while node.name in among:
        if not hands_on(node, root) or not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return node
