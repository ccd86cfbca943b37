"""The class of slim networks: an fx module that keeps its record when it is copied or pickled."""

from __future__ import annotations

from typing import Any

from torch import fx

RECORD = "fxprune"
"""Key of the compilation's record in `slim.meta`."""


class SlimModule(fx.GraphModule):
    """A slim network. It trains, moves, copies, saves and exports like any `fx.GraphModule`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SlimModule:
        return _with_record(super().__deepcopy__(memo), self.meta.get(RECORD))

    def __reduce__(self) -> Any:
        return _restore, (super().__reduce__(), self.meta.get(RECORD))


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
