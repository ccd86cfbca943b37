"""A search that is killed, anywhere, goes on and ends with the same plan; files of other searches are refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from processes import forked, in_process
from torch import Tensor, nn
from two_tasks import TASKS, asked, batches, problem, rebuilt, signs, trained

import fxprune
from fxprune import PlanError, Task
from fxprune.methods import PAGCP, Problem

MOMENTS = 20


class Clock:
    """Counts what a search does: losses, and the steps of a write. At one of them it kills the process."""

    def __init__(self, end: int) -> None:
        self.now, self.end = 0, end

    def tick(self) -> None:
        self.now += 1
        if self.now == self.end:
            os.kill(os.getpid(), signal.SIGKILL)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        self.tick()
        return signs(outputs, batch)

    def dump(self, data: Any, file: Any) -> None:
        """Write half of a state, then the other half."""
        text = json.dumps(data)
        for part in (text[: len(text) // 2], text[len(text) // 2 :]):
            file.write(part)
            file.flush()
            self.tick()

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.tick()
            found = function(*args)
            self.tick()
            return found

        return run


def timed(asked: Problem, method: PAGCP, end: int) -> int:
    """Search until a moment; return how many there are, where it is not reached."""
    clock = Clock(end)
    with (
        mock.patch.object(json, "dump", clock.dump),
        mock.patch.object(os, "fsync", clock.around(os.fsync)),
        mock.patch.object(os, "replace", clock.around(os.replace)),
    ):
        method.search(replace(asked, tasks=TASKS | {"signs": Task(clock.loss)}))
    return clock.now


def kill_and_resume(state: dict[str, Tensor], method: PAGCP, folder: Path) -> list[tuple[bool, ...]]:
    """Kill a search at random moments; return of each whether there was a state, a draft, and the same end."""
    asked = problem(rebuilt(state), batches(2, 2), 0.6)
    wanted = method.search(asked)
    count = timed(asked, replace(method, checkpoint=str(folder / "whole.json")), 0)
    moments = np.random.default_rng(0).permutation(count)[:MOMENTS] + 1
    found = []
    for moment in moments.tolist():
        path = folder / f"{moment}.json"
        own = replace(method, checkpoint=str(path))
        assert os.WTERMSIG(forked(partial(timed, asked, own, moment))) == signal.SIGKILL
        there = path.exists(), Path(f"{path}.part").exists()
        after = own.search(asked)
        found.append((*there, np.array_equal(after.keep, wanted.keep) and after == replace(wanted, keep=after.keep)))
    return found


@pytest.mark.parametrize("fast", [False, True])
def test_a_search_killed_at_any_moment_goes_on_and_ends_with_the_same_plan(fast: bool, tmp_path: Path) -> None:
    method = PAGCP(initial_rate=0.1, global_tolerance=1.6, fast=fast)
    found = in_process(kill_and_resume, trained()[0].state_dict(), method, tmp_path)
    assert len(found) == MOMENTS
    assert all(same for *_, same in found)
    there = {(state, draft) for state, draft, _ in found}
    assert there >= {(False, False), (True, False), (True, True)}  # before all writes, between two, within one
    assert list(tmp_path.glob("*.part")) == []


def test_checkpoints_of_other_searches_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "search.json")
    method = PAGCP(initial_rate=0.1, global_tolerance=1.6, fast=True, checkpoint=path)
    found = method.search(asked(0.7))
    assert np.array_equal(method.search(asked(0.7)).keep, found.keep)
    with pytest.raises(PlanError, match=r"its method is 'PAGCP\(.*topk=0\.8.*Delete it"):
        replace(method, topk=0.5).search(asked(0.7))
    with pytest.raises(PlanError, match="its budget is"):
        method.search(asked(0.6))
    with pytest.raises(PlanError, match="other weights or data"):
        method.search(asked(0.7, calibration=batches(2, 5)))
    other = fxprune.couple(fxprune.trace(nn.Conv2d(2, 4, 3), trained()[1][0][0]))
    with pytest.raises(PlanError, match="its network is"):
        method.search(asked(0.7, coupling=other, bounds={"macs": 1e12}, tasks={"x": Task(lambda o, b: o.std())}))
    Path(path).write_text("{")
    with pytest.raises(PlanError, match="cannot be read"):
        method.search(asked(0.7))
