"""Tables that decorators fill, such as those of rules: each key has one function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def registering(table: dict[Any, Function], keys: Iterable[Any], what: str) -> Callable[[Function], Function]:
    """Return a decorator that puts a function into a table, under some keys.

    Args:
        table: is filled.
        keys: that the function is for.
        what: the table holds, in plural; the decorator raises ValueError where a key has one.
    """

    def register(function: Function) -> Function:
        for key in keys:
            if key in table:
                name = key.__name__ if isinstance(key, type) else key
                raise ValueError(f"{name} has two {what}: {table[key].__qualname__} and {function.__qualname__}")
            table[key] = function
        return function

    return register
