"""Tables that decorators fill: what is registered twice is refused, wherever that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.calling import calls
from fxprune.literals import fixes
from fxprune.masking import _absent_aware
from fxprune.recurrent import stands_in_for
from fxprune.resizing import resizes
from fxprune.rules import rule
from fxprune.telling import tells

TWICE = {
    "aten.addmm has two rules: addmm and": (rule, torch.ops.aten.addmm),
    "view has two fixers": (fixes, "view"),
    "Linear has two resizers": (resizes, nn.Linear),
    "ReLU has two calls": (calls, nn.ReLU),
    "aten.mm.default has two formulas": (tells, torch.ops.aten.mm.default),
    "LSTM has two stand-ins": (stands_in_for, nn.LSTM),
    "aten.where has two absent-aware forms": (_absent_aware, torch.ops.aten.where),
}


@pytest.mark.parametrize("message", TWICE)
def test_a_key_has_one_function(message: str) -> None:
    register, key = TWICE[message]

    def again(*args: Any) -> None: ...

    decorate: Callable[..., Any] = register(key)
    with pytest.raises(ValueError, match=message):
        decorate(again)
