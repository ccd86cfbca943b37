"""Where in the user's code something happens."""

from __future__ import annotations

import functools
import os
import sys

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__)


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
    return not path.startswith((_TORCH, "<")) and os.path.dirname(path) != _HERE
