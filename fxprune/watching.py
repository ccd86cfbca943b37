"""Watch the modules of one network while it is traced, and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.fx import _symbolic_trace


class _Patcher(_symbolic_trace._Patcher):
    """Sets on a few classes what a symbolic trace sets on `torch.nn.Module`.

    Set there, every class derived from it, and with torch alone these are hundreds, looks up its slots again.
    """

    def __init__(self, kinds: Iterable[type[nn.Module]]) -> None:
        super().__init__()
        self.kinds = kinds

    def patch_method(self, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True) -> None:
        if cls is not nn.Module:
            super().patch_method(cls, name, new_fn, deduplicate)
            return
        for kind in self.kinds:
            setattr(kind, name, new_fn)


def _is_plain(kind: type[nn.Module]) -> bool:
    """Say whether a class is called, read and derived from as `torch.nn.Module` is."""
    return (
        type(kind) is type
        and kind.__call__ is nn.Module.__call__
        and kind.__getattr__ is nn.Module.__getattr__
        and not hasattr(kind.__init_subclass__, "__func__")
    )


@contextmanager
def watched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let a symbolic trace see calls of these modules and reads of their parameters; others run as they are.

    Meanwhile each module is of a class of its own kind. Where a class has its own way to be called, read or derived
    from, torch watches all modules, as it does without this.
    """
    modules = list(modules)
    classes = {type(m) for m in modules}
    if not all(map(_is_plain, classes)):
        yield
        return
    kinds = {k: type(k.__name__, (k,), {"__module__": k.__module__, "__qualname__": k.__qualname__}) for k in classes}
    for m in modules:
        m.__class__ = kinds[type(m)]
    plain = _symbolic_trace._Patcher
    _symbolic_trace._Patcher = lambda: _Patcher(kinds.values())  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        _symbolic_trace._Patcher = plain  # pyright: ignore[reportAttributeAccessIssue]
        for m in modules:
            m.__class__ = type(m).__bases__[0]
