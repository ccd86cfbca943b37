"""Where in the user's code something happens."""

from __future__ import annotations

import contextlib
import functools
import os
import sys

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__)
_OURS = (_HERE, os.path.join(_HERE, "commands"))


def user_line() -> str:
    """Return `file:line` of the innermost frame that is neither torch's nor ours; empty if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if _is_users(name):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@functools.cache
def _is_users(path: str) -> bool:
    if path.startswith((_TORCH, "<")) or path == contextlib.__file__:  # whose decorators wrap some of ours
        return False
    return os.path.dirname(path) not in _OURS


def short_line(place: str) -> str:
    """Return `file:line` without the folder; in a notebook, a cell is called what IPython calls it: `In[3]:12`."""
    path, _, line = place.rpartition(":")
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    name_of = getattr(getattr(shell, "compile", None), "format_code_name", None)  # there is none before IPython 8
    named = None if name_of is None else name_of(path)
    return f"{os.path.basename(path) if named is None else named[1]}:{line}"
