"""Keep Python's cyclic garbage collector out of steps that make many objects and no garbage.

A collection walks all objects of the process, those of every imported library included. Steps that build graphs would
set off one after the other, the more the deeper the network: without a pause their time is not linear in its depth.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def without_collector(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function run without the cyclic collector; afterwards it is as it was. For steps that run no training."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not gc.isenabled():
            return function(*args, **kwargs)
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            gc.enable()

    return run
