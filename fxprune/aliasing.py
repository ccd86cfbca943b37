"""Which nodes write to their input, and whose memory a node hands on: what decides whether a node can be left out."""

from __future__ import annotations

from collections.abc import Container

from torch import fx, nn

from fxprune.cloning import submodule
from fxprune.literals import plain_name

_WRITING = {"iadd", "isub", "imul", "itruediv", "setitem"}
_HANDING_ON = {
    "view", "reshape", "permute", "transpose", "t", "flatten", "unflatten", "squeeze", "unsqueeze", "getitem", "chunk",
    "split", "narrow", "select", "unbind", "expand", "contiguous", "detach", "movedim", "swapaxes", "to", "float",
    "dropout",
}  # fmt: skip
_HANDING_ON_LAYERS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)


def writes(node: fx.Node, root: nn.Module) -> bool:
    """Say whether a node writes to its first input."""
    if node.op not in ("call_module", "call_function", "call_method") or not node.all_input_nodes:
        return False
    if node.op == "call_module":
        return bool(getattr(submodule(root, str(node.target)), "inplace", False))
    name = plain_name(node)
    marked = name in _WRITING or (name.endswith("_") and not name.endswith("__"))
    return marked or node.kwargs.get("inplace") is True


def hands_on(node: fx.Node, root: nn.Module) -> bool:
    """Say whether a node may return the memory of its first input."""
    if writes(node, root):
        return True
    if node.op != "call_module":
        return plain_name(node) in _HANDING_ON
    module = submodule(root, str(node.target))
    known = type(module).__module__.startswith("torch.nn.")
    return isinstance(module, _HANDING_ON_LAYERS) or not known


def origin(node: fx.Node, root: nn.Module, among: Container[str]) -> fx.Node | None:
    """Return the node outside of `among` whose memory a node may return; None where it comes from inside."""
    while node.name in among:
        if not hands_on(node, root) or not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return node
