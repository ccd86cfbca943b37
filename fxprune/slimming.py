"""The class of slim networks: an fx module that keeps its record when it is copied or pickled."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from fxprune.cloning import Cloner, submodule
from fxprune.packing import Packed, pack, unpack
from fxprune.switching import safe_code

RECORD = "fxprune"
"""Key of the compilation's record in `slim.meta`."""
EXACT = "fxprune_exact"
"""Key, in `slim.meta`, of parameters that were computed: name -> value before it was rounded to the dtype."""


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_TABLES = ("_modules", "_parameters", "_buffers")


class SlimModule(fx.GraphModule):
    """A slim network. It trains, moves, copies, saves and exports like any `fx.GraphModule`."""

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "SlimModule") -> None:
        """Hold what the graph refers to, under the same names.

        Args:
            root: holds the modules, parameters and buffers, and nothing else (see `only_used`); they are taken over,
                not copied.
            graph: what forward does.
            class_name: what the module calls itself.
        """
        super().__init__(nn.Module(), fx.Graph(), class_name)
        self.training = root.training
        for table in (*_HOOKS, *_TABLES, "_non_persistent_buffers_set"):
            getattr(self, table).update(getattr(root, table))
        for name, value in vars(root).items():
            if type(value) is torch.Tensor:
                setattr(self, name, value)
        self.graph = graph

    def recompile(self) -> Any:
        """Write the code of forward, as soon as there is a graph."""
        if not len(self._graph.nodes):
            return None
        with self._graph.on_generate_code(partial(safe_code, self._graph)):
            return super().recompile()

    def __deepcopy__(self, memo: dict[int, Any]) -> SlimModule:
        twin = super().__deepcopy__(memo)
        for table in _HOOKS:
            getattr(twin, table).update(getattr(self, table))
        return _with_record(twin, self.meta.get(RECORD), _plain_tensors(self))

    def __reduce__(self) -> Any:
        root = _container(self)
        for table in (*_HOOKS, *_TABLES, "_non_persistent_buffers_set"):
            getattr(root, table).update(getattr(self, table))
        vars(root).update({name: vars(self)[name] for path, name in _plain_tensors(self) if not path})
        return _restore, (root, pack(self.graph), type(self).__name__, dict(self.meta))


def only_used(root: nn.Module, graph: fx.Graph, copy: Cloner) -> nn.Module:
    """Copy what a graph refers to, under the same names, in plain modules.

    Args:
        root: the module that the graph runs on.
        graph: what forward does.
        copy: makes the copies.
    """
    homes = {"": (root, _container(root))}
    for target in dict.fromkeys(str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")):
        parent, _, name = target.rpartition(".")
        inner, holder = _home(homes, parent)
        for table in _TABLES:
            if name in getattr(inner, table):
                found = getattr(inner, table)[name]
                getattr(holder, table)[name] = copy.clone(found) if table == "_modules" else copy.tensor(found)
                break
        else:
            setattr(holder, name, copy.tensor(getattr(inner, name)))
        if name in inner._non_persistent_buffers_set:
            holder._non_persistent_buffers_set.add(name)
    for table in _HOOKS:
        getattr(homes[""][1], table).update(getattr(root, table))
    return homes[""][1]


def _home(homes: dict[str, tuple[nn.Module, nn.Module]], path: str) -> tuple[nn.Module, nn.Module]:
    """Return the module of a path and the one that holds its copies, made where it is not there."""
    found = homes.get(path)
    if found is None:
        parent, _, name = path.rpartition(".")
        outer, holder = _home(homes, parent)
        inner, copy = submodule(outer, name), holder._modules.get(name)
        if copy is None:
            copy = holder._modules[name] = _container(inner)
        found = homes[path] = (inner, copy)
    return found


_EMPTY = vars(nn.Module())
_EMPTY_TABLES = [(key, type(value)) for key, value in _EMPTY.items() if isinstance(value, (dict, set))]


def _container(module: nn.Module) -> nn.Module:
    plain = object.__new__(nn.Module)  # with what `__init__` sets, several times faster
    state = vars(plain)
    state.update(_EMPTY, training=module.training)
    for key, kind in _EMPTY_TABLES:
        state[key] = kind()
    return plain


def _plain_tensors(module: nn.Module) -> list[tuple[str, str]]:
    """Return (module, name) of the tensors that are plain attributes, such as constants of forward."""
    return [
        (path, name)
        for path, m in module.named_modules()
        for name, value in vars(m).items()
        if type(value) is torch.Tensor
    ]


def _with_record(module: fx.GraphModule, record: Any, plain: Iterable[tuple[str, str]]) -> SlimModule:
    for path, name in plain:  # which torch made buffers of, on copying
        holder = submodule(module, path)
        if name in holder._buffers:
            setattr(holder, name, holder._buffers.pop(name))
    slim = SlimModule(module, module.graph)
    slim.meta.update(module.meta)
    if record is not None:
        slim.meta[RECORD] = record
    return slim


def _restore(root: nn.Module, packed: Packed, class_name: str, meta: dict[str, Any]) -> SlimModule:
    slim = SlimModule(root, unpack(packed), class_name)
    slim.meta.update(meta)
    return slim
