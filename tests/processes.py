"""Processes of their own, forked from one that has imported what takes long: ranks, and work that is killed.

What they run is a function of a module, and what it is given and returns is pickled.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fxprune", "torch_pruning"])


def in_process(work: Callable[..., Any], *args: Any) -> Any:
    """Return what `work(*args)` returns in a process of its own."""
    return _in_processes(work, [args])[0]


def in_ranks(count: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what `work(*args)` returns on every rank of a process group; None where a rank has ended otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        return _in_processes(_in_rank, [(f"file://{folder}/store", r, count, work, args) for r in range(count)])


def _in_rank(store: str, rank: int, count: int, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    try:
        return work(*args)
    finally:
        distributed.destroy_process_group()


def _in_processes(work: Callable[..., Any], each: list[tuple[Any, ...]], seconds: float = 120) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(i)) for i in range(len(each))]
        running = [
            CONTEXT.Process(target=_run, args=(file, work, args)) for file, args in zip(files, each, strict=True)
        ]
        for process in running:
            process.start()
        for process in running:
            process.join(seconds)
        stuck = [i for i, process in enumerate(running) if process.is_alive()]
        for process in running:
            process.kill()
            process.join()
        assert not stuck, f"processes {stuck} of {len(each)} hang"
        found = [pickle.loads(file.read_bytes()) if file.exists() else (None, None) for file in files]
    for _, error in found:
        assert error is None, error
    return [result for result, _ in found]


def _run(file: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        found = work(*args), None
    except BaseException:
        found = None, traceback.format_exc()
    file.write_bytes(pickle.dumps(found))


def forked(work: Callable[[], Any]) -> int:
    """Run `work` in a copy of this process, which must have one thread; return how it ended, as `os.waitpid` does."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]
