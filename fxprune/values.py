"""Values that go in and out of graphs: containers of tensors, in an order; and hashes of tensors."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in a value: containers and dataclasses included, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if type(value) in (int, float, bool, str, type(None)):
        return []
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors_in(v)]
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return [t for name in value.__dataclass_fields__ for t in tensors_in(getattr(value, name))]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_in(v)]
    return []


def to_meta(value: Any) -> Any:
    """Copy example inputs to the meta device, remembering the values of small integer tensors."""

    def move(t: Any) -> Any:
        return torch.empty_like(t, device="meta", requires_grad=False) if isinstance(t, torch.Tensor) else t

    if type(value) is tuple:  # the usual containers, by hand: several times faster
        return tuple([to_meta(v) for v in value])
    if type(value) is dict:
        return {key: to_meta(v) for key, v in value.items()}
    return move(value) if isinstance(value, torch.Tensor) else pytree.tree_map(move, value)


def clones(value: Any) -> Any:
    """Return a value with copies of the tensors in it."""
    return pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, value)


def bind(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Lay example inputs out in the order of the graph's placeholders, defaults included."""
    if isinstance(graph._codegen, _PyTreeCodeGen):
        return pytree.arg_tree_leaves(*args, **kwargs)
    values: list[Any] = []
    nodes = [n for n in graph.nodes if n.op == "placeholder"]
    names = {n.target for n in nodes}
    positional = len(args)
    for i, node in enumerate(nodes):
        if str(node.target).startswith("**"):
            values.append({key: value for key, value in kwargs.items() if key not in names})
        elif str(node.target).startswith("*"):
            values.append(args[i:])
            positional = i  # what follows is given by name
        elif i < positional:
            values.append(args[i])
        elif node.target in kwargs:
            values.append(kwargs[node.target])
        elif node.args:
            values.append(node.args[0])
        else:
            raise TypeError(f"missing input {node.target!r}")
    return values


class Bound(fx.Interpreter):
    """Runs a graph on what `bind` lays out: one value for each input, of `*args` and `**kwargs` all of them in one."""

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return the next input."""
        return next(self.args_iter)


def hash_of(tensor: torch.Tensor) -> str:
    """Return a hash of a tensor's values, bit by bit."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:12]
