"""Watch the modules of one network while it is traced, and no others."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType
from typing import Any

from torch import nn
from torch.fx import _symbolic_trace


class _Trace(threading.local):
    """What the symbolic trace of a thread has for `torch.nn.Module`: its `__call__` and its `__getattr__`."""

    def __init__(self) -> None:
        self.methods: dict[str, Callable[..., Any]] = {
            "__call__": nn.Module.__call__,
            "__getattr__": nn.Module.__getattr__,
        }


_trace = _Trace()
_set = object.__setattr__  # that of modules looks for parameters


class _Patcher(_symbolic_trace._Patcher):
    """Gives the watched modules what a symbolic trace sets on `torch.nn.Module`.

    Set there, every class derived from it, and with torch alone these are hundreds, looks up its slots again.
    """

    def __init__(self, wrapped: set[int]) -> None:
        super().__init__()
        self.wrapped = wrapped

    def patch_method(self, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True) -> None:
        if cls is nn.Module:
            _trace.methods[name] = new_fn
        else:
            super().patch_method(cls, name, new_fn, deduplicate)

    def visit_once(self, thing: Any) -> bool:
        """Say whether a namespace is to be searched for functions such as `math.sqrt`: not yet, and it has some."""
        if id(thing) in self.visited:  # as nearly always: this is asked at every call of a module
            return False
        self.visited.add(id(thing))
        return not self.wrapped.isdisjoint(map(id, thing.values()))


def _is_plain(kind: type[nn.Module]) -> bool:
    """Say whether a class is called, read and derived from as `torch.nn.Module` is."""
    return (
        type(kind) is type
        and kind.__call__ is nn.Module.__call__
        and kind.__getattr__ is nn.Module.__getattr__
        and not hasattr(kind.__init_subclass__, "__func__")
    )


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _trace.methods["__call__"](module, *args, **kwargs)


def _read(module: nn.Module, name: str) -> Any:
    return _trace.methods["__getattr__"](module, name)


@functools.cache
def _watched(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that modules of a plain class have while they are watched. To make one takes its time."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**names, "__call__": _call, "__getattr__": _read})


def _wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    return _wrapped_builtin(function) if type(function) is BuiltinFunctionType else _wrap(function)


_wrap = _symbolic_trace._create_wrapped_func
_wrapped_builtin = functools.cache(_wrap)
"""Every trace wraps all functions of `math`, and the same way."""


@contextmanager
def watched(modules: Iterable[nn.Module], wrapped: set[int]) -> Iterator[None]:
    """Let a symbolic trace see calls of these modules and reads of their parameters; others run as they are.

    Meanwhile each module is of a class of its own kind. Where a class has its own way to be called, read or derived
    from, torch watches all modules, as it does without this.

    Args:
        modules: the modules.
        wrapped: ids of the functions that the trace wraps wherever it meets their names.
    """
    modules = list(modules)
    classes = {type(m) for m in modules}
    if not all(map(_is_plain, classes)):
        yield
        return
    kinds = {kind: _watched(kind) for kind in classes}
    for m in modules:
        _set(m, "__class__", kinds[type(m)])
    plain, wrap, methods = _symbolic_trace._Patcher, _symbolic_trace._create_wrapped_func, _trace.methods
    _symbolic_trace._Patcher = lambda: _Patcher(wrapped)  # pyright: ignore[reportAttributeAccessIssue]
    _symbolic_trace._create_wrapped_func = _wrapped
    _trace.methods = dict(methods)
    try:
        yield
    finally:
        _symbolic_trace._Patcher, _trace.methods = plain, methods  # pyright: ignore[reportAttributeAccessIssue]
        _symbolic_trace._create_wrapped_func = wrap
        for m in modules:
            _set(m, "__class__", type(m).__bases__[0])
