"""Put other functions in the place of some for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Patch = tuple[Any, str, Any]
"""A module or class, the name of an attribute, and what is there meanwhile."""


@contextmanager
def patched(patches: Iterable[Patch]) -> Iterator[None]:
    """Set attributes of modules and classes; afterwards they are as they were."""
    patches = list(patches)
    before = [vars(home).get(name) for home, name, _ in patches]
    try:
        for home, name, value in patches:
            setattr(home, name, value)
        yield
    finally:
        for (home, name, _), value in zip(patches, before, strict=True):
            if value is None:  # inherited
                delattr(home, name)
            else:
                setattr(home, name, value)
