"""What is known of one network so far: stages that are timed, limited, and fail without taking the rest along."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO, TypeVar

T = TypeVar("T")
LONGEST = 600  # characters of a message


class OutOfTime(BaseException):
    """A stage took longer than its limit; not an `Exception`, so that nothing on the way mistakes it for one."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the body after some seconds, and again every second in case it is swallowed."""

    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Record:
    """A row in the making: written to a stream at every stage, so that a process that dies leaves what it had.

    Attributes:
        row: what is known; `failures` holds stage -> message.
    """

    def __init__(self, stream: TextIO = sys.stdout, **about: Any) -> None:
        """Start a row."""
        self.row: dict[str, Any] = {**about, "failures": {}}
        self._stream = stream

    def enter(self, stage: str) -> None:
        """Note which stage begins, and write the row."""
        self.row["stage"] = stage
        print(json.dumps(self.row), file=self._stream, flush=True)

    def attempt(self, stage: str, seconds: float, work: Callable[[], T]) -> T | None:
        """Do some work; where it fails or takes too long, note that under the last stage entered.

        Returns:
            What the work returns, or None where it failed.
        """
        self.enter(stage)
        try:
            with limited(seconds):
                return work()
        except OutOfTime:
            self.fail(f"OutOfTime: longer than {seconds:g} s")
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")
        return None

    def fail(self, message: str) -> None:
        """Note a failure of the current stage."""
        self.row["failures"][self.row["stage"]] = " ".join(message.split())[:LONGEST]


class Clock:
    """Adds up the seconds of named stages.

    Attributes:
        seconds: stage -> seconds.
    """

    def __init__(self, enter: Callable[[str], None] | None = None) -> None:
        """Take a function that is told which stage begins."""
        self.seconds: dict[str, float] = {}
        self._enter = enter

    def __call__(self, stage: str, work: Callable[[], T]) -> T:
        """Do some work as part of a stage."""
        if self._enter:
            self._enter(stage)
        start = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
