"""Copy the structure of a module, with other tensors in it: faster than `copy.deepcopy`, and no weight is copied."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import nn

_ATOMIC = {int, float, complex, str, bytes, bool, type(None), type, torch.dtype, torch.device, torch.Size}
_TABLES = {dict, set, OrderedDict}
_STATE = {"_parameters", "_buffers"}
_TENSOR = {torch.Tensor}
_OLD_PICKLES = {
    nn.Module, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
}  # fmt: skip
"""Classes whose `__setstate__` does nothing but read what older versions of torch pickled."""

State = tuple[str, torch.Tensor, bool]
"""Name, tensor, is a parameter."""


def modules_in(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of a module and all inside, shared ones once: `named_modules` without recursion."""
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", module)]
    while stack:
        name, found = stack.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield name, found
        inside = found._modules
        if inside:
            prefix = f"{name}." if name else ""
            stack.extend([(prefix + key, m) for key, m in reversed(inside.items()) if m is not None])


def submodule(module: nn.Module, name: str) -> nn.Module:
    """Return the module of a qualified name."""
    for key in name.split(".") if name else ():
        found = module._modules[key]
        if found is None:
            raise AttributeError(f"{key!r} of {name!r} is None")
        module = found
    return module


def unused_name(module: nn.Module, name: str, others: Container[str] = ()) -> str:
    """Return a name that nothing in a module has, and no other: `name`, with underscores after it as far as need be."""
    while hasattr(module, name) or name in others:
        name += "_"
    return name


def named_part(module: nn.Module, name: str) -> Any:
    """Return the module, parameter, buffer or attribute of a qualified name; a trace patches `getattr` on modules."""
    path, _, key = name.rpartition(".")
    holder = submodule(module, path)
    for table in (holder._modules, holder._parameters, holder._buffers, vars(holder)):
        if key in table:
            return table[key]
    return getattr(holder, key)


def plain_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that are plain attributes of a module by name."""
    attributes = vars(module)
    if _TENSOR.isdisjoint(map(type, attributes.values())):
        return {}
    return {key: value for key, value in attributes.items() if type(value) is torch.Tensor}


def named_state(module: nn.Module) -> Iterator[State]:
    """Yield (name, tensor, is a parameter) of every parameter, buffer and plain tensor attribute, shared ones once."""
    seen: set[int] = set()
    for name, t, is_parameter in aliased_state(module):
        if id(t) not in seen:
            seen.add(id(t))
            yield name, t, is_parameter


def aliased_state(module: nn.Module) -> Iterator[State]:
    """Yield what `named_state` does, but shared tensors by all names that modules have for them."""
    for prefix, child in modules_in(module):
        attributes = vars(child)
        parameters, buffers = attributes["_parameters"], attributes["_buffers"]
        if not (parameters or buffers) and _TENSOR.isdisjoint(map(type, attributes.values())):
            continue
        own = [(k, v, True) for k, v in parameters.items()]
        own += [(k, v, False) for k, v in (*buffers.items(), *plain_tensors(child).items())]
        for key, value, is_parameter in own:
            if value is not None:
                yield f"{prefix}.{key}" if prefix else key, value, is_parameter


def all_named(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters, buffers and plain tensor attributes, shared ones by all their names."""
    yield from ((name, t) for name, t, _ in named_state(module))
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def names_of(module: nn.Module) -> dict[int, str]:
    """Return the id of each parameter and buffer -> its name, the first of shared ones."""
    return {id(t): name for name, t in [*module.named_parameters(), *module.named_buffers()]}


def uncompiled(module: nn.Module) -> nn.Module:
    """Return a module without the wrappers of `torch.compile`: what is wrapped; a copy, if there are others inside."""
    module = _unwrapped(module)
    return clone(module) if any(_is_wrapper(m) for _, m in modules_in(module)) else module


def _is_wrapper(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


def _unwrapped(module: nn.Module) -> nn.Module:
    return submodule(module, "_orig_mod") if _is_wrapper(module) else module


def clone(module: nn.Module, tensors: Mapping[int, torch.Tensor] | None = None) -> Any:
    """Return a module of the same structure.

    Submodules, hook tables and attributes are new objects; classes and functions are shared.

    Args:
        module: any module; not touched.
        tensors: id of a parameter, buffer or tensor attribute -> what takes its place; others (None: all) are shared.
    """
    return Cloner(module, tensors).clone(module)


class Cloner:
    """A copy in the making: what was copied so far, and what takes the place of each tensor."""

    def __init__(self, root: nn.Module, tensors: Mapping[int, torch.Tensor] | None) -> None:
        """Copy (parts of) `root`; `tensors` as for `clone`."""
        self._root = root if tensors is None else None
        self._memo: dict[int, Any] = dict(tensors or {})

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        """Return what takes the place of a tensor."""
        return self._memo.get(id(value), value)

    def clone(self, module: nn.Module) -> nn.Module:
        """Copy a module, or return its copy; of a wrapper of `torch.compile`, that of what is inside."""
        module = _unwrapped(module)
        memo = self._memo
        new = memo.get(id(module))
        if new is not None:
            return new
        kind = type(module)
        if _copies_itself(kind):
            for _, t, _ in named_state(module):  # what a hook has computed cannot be copied
                memo.setdefault(id(t), t)
            return self._deepcopy(module)
        new = memo[id(module)] = object.__new__(kind)
        attributes, state = vars(module), vars(new)
        state.update(attributes)
        for key, value in attributes.items():
            kind = type(value)
            if kind in _ATOMIC:
                continue
            if kind in _TABLES and not value:
                state[key] = kind()
            elif key in _STATE:
                state[key] = {k: None if t is None else memo.get(id(t), t) for k, t in value.items()}
            elif key == "_modules":
                state[key] = {k: None if m is None else self.clone(m) for k, m in value.items()}
            elif kind is not tuple or not _ATOMIC.issuperset(map(type, value)):
                state[key] = self._copy(value)
        state.pop("_compiled_call_impl", None)  # of `module.compile()`: it would call what was copied
        return new

    def _copy(self, value: Any) -> Any:
        """Copy an attribute: containers and modules by hand, the rest by `copy.deepcopy`."""
        kind = type(value)
        if kind in _ATOMIC:
            return value
        found = self._memo.get(id(value))
        if found is not None:
            return found
        if kind is dict:
            new = self._memo[id(value)] = {}
            new.update([(k if type(k) is str else self._copy(k), self._copy(v)) for k, v in value.items()])
            return new
        if kind is list:
            new = self._memo[id(value)] = []
            new.extend([self._copy(v) for v in value])
            return new
        if kind is tuple:
            return tuple([self._copy(v) for v in value])
        if isinstance(value, torch.Tensor):
            return value
        return self.clone(value) if isinstance(value, nn.Module) else self._deepcopy(value)

    def _deepcopy(self, value: Any) -> Any:
        """Copy what only `copy.deepcopy` knows how to, with the same tensors in it."""
        if self._root is not None:
            self._memo.update({id(t): t for _, t, _ in named_state(self._root)})
            self._root = None
        return copy.deepcopy(value, self._memo)


@functools.cache
def _copies_itself(kind: type[nn.Module]) -> bool:
    """Say whether a class has a way of its own to be copied (fx graphs, recurrent layers and their flat weights)."""
    home = next(c for c in kind.__mro__ if "__setstate__" in vars(c))
    return hasattr(kind, "__deepcopy__") or home not in _OLD_PICKLES
