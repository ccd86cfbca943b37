"""The class of slim networks: an fx module that keeps its record when it is copied or pickled."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

RECORD = "fxprune"
"""Key of the compilation's record in `slim.meta`."""


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


class SlimModule(fx.GraphModule):
    """A slim network. It trains, moves, copies, saves and exports like any `fx.GraphModule`."""

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "SlimModule") -> None:
        """Hold what the graph refers to, under the same names.

        Args:
            root: holds the modules, parameters and buffers; they are taken over, not copied.
            graph: what forward does.
            class_name: what the module calls itself.
        """
        super().__init__(nn.Module(), fx.Graph(), class_name)
        self.training = root.training
        for table in _HOOKS:
            getattr(self, table).update(getattr(root, table))
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                _take_over(root, self, node.target)
        self.graph = graph

    def __deepcopy__(self, memo: dict[int, Any]) -> SlimModule:
        twin = super().__deepcopy__(memo)
        for table in _HOOKS:
            getattr(twin, table).update(getattr(self, table))
        return _with_record(twin, self.meta.get(RECORD))

    def __reduce__(self) -> Any:
        return _restore, (super().__reduce__(), self.meta.get(RECORD))


def _take_over(root: nn.Module, holder: nn.Module, target: str) -> None:
    """Put what a target names into the same place of another module, in plain modules in between."""
    *path, name = target.split(".")
    for part in path:
        root = root._modules[part]  # pyright: ignore[reportAssignmentType]
        if part not in holder._modules:
            holder._modules[part] = nn.Module()
            holder._modules[part].training = root.training  # pyright: ignore[reportOptionalMemberAccess]
        holder = holder._modules[part]  # pyright: ignore[reportAssignmentType]
    for table in ("_modules", "_parameters", "_buffers"):
        if name in getattr(root, table):
            getattr(holder, table)[name] = getattr(root, table)[name]
            break
    else:
        setattr(holder, name, getattr(root, name))
    if name in root._non_persistent_buffers_set:
        holder._non_persistent_buffers_set.add(name)


def _with_record(module: fx.GraphModule, record: Any) -> SlimModule:
    slim = SlimModule(module, module.graph)
    slim.meta.update(module.meta)
    for name, child in module.named_modules():
        slim.get_submodule(name).training = child.training
    if record is not None:
        slim.meta[RECORD] = record
    return slim


def _restore(reduced: Any, record: Any) -> SlimModule:
    return _with_record(reduced[0](*reduced[1]), record)
