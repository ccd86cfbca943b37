"""Modules of a traced graph that check, when it runs, what it was traced for."""

from __future__ import annotations

from typing import Any

from torch import nn

NUMBERS = (bool, int, float)


class Expect(nn.Module):
    """Raises when an argument that was fixed at tracing time is given another value."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__()
        self.name, self.value = name, value

    def forward(self, given: Any) -> None:
        """Compare the value given with the one traced."""
        if given is not self.value and given != self.value:
            raise ValueError(
                f"argument {self.name!r} was fixed to {self.value!r} when the network was traced, and is now "
                f"{given!r}. Trace it with an example of {self.name!r} instead."
            )


class Expected(nn.Module):
    """Raises when a size that decided what was traced is another one."""

    def __init__(self, value: Any, line: str) -> None:
        super().__init__()
        self.value, self.line = value, line

    def forward(self, given: Any) -> None:
        """Compare a length, a number or a decision with the one traced."""
        found = answer(self.value, given)
        if found != self.value:
            raise ValueError(
                f"forward asks for a size at {self.line or 'an unknown line'}, and followed {self.value!r} when the "
                f"network was traced; it is now {found!r}. Trace it with example inputs that give the same."
            )


def answer(asked: Any, given: Any) -> Any:
    """Return the truth of a value, its length or itself, whichever `asked` was the answer to."""
    if isinstance(asked, bool):
        return bool(given)
    return given if isinstance(given, NUMBERS) else len(given)
