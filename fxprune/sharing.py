"""Several processes at one plan, as `torchrun` starts them: what they tell one another over torch.distributed.

Each process, a rank, makes the same calls in the same order, with its own share of the batches (see
`fxprune.shares`). A rank that fails says so where the others wait next, and they raise too. In one process nothing is
sent, and every function here returns what it was given.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed

from fxprune.errors import PlanError

T = TypeVar("T")
R = TypeVar("R")
Key = TypeVar("Key", bound=Hashable)

logger = logging.getLogger(__name__)

PATIENCE = 60.0
"""After so many seconds, a rank that waits for the others says so."""


class _Note(NamedTuple):
    """What a rank says: where it is, a value, and the error where it has failed."""

    what: str
    value: Any
    error: str | None


def size() -> int:
    """Return how many ranks there are; one without torch.distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return which of them this is, from 0."""
    return distributed.get_rank() if size() > 1 else 0


def gather(what: str, value: T) -> list[T]:
    """Return every rank's value, by rank.

    Args:
        what: the values are, for messages; the same on all ranks.
        value: of this rank; it is pickled.

    Raises:
        PlanError: another rank has failed, is at something else, or is gone.
    """
    if size() == 1:
        return [value]
    notes = _exchange(_Note(what, value, None))
    failed = [f"rank {r} raised {note.error}" for r, note in enumerate(notes) if note.error is not None]
    if failed:
        raise _told(PlanError(f"rank {rank()} stops at {what!r}, because another has failed: " + "; ".join(failed)))
    if len({note.what for note in notes}) > 1:
        each = ", ".join(f"rank {r} at {note.what!r}" for r, note in enumerate(notes))
        raise _told(
            PlanError(
                f"the ranks do not do the same: {each}. Make the same calls on every rank, with the same model, budget,"
                " method and tasks; only the batches differ."
            )
        )
    return [note.value for note in notes]


@contextmanager
def together(what: str) -> Iterator[None]:
    """Let ranks begin and end something together: where one of them raises, all do, and none waits in vain.

    Args:
        what: they do, for messages.

    Raises:
        PlanError: another rank has failed; which, and its error.
    """
    if size() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        if not _is_told(error):
            with suppress(PlanError):  # what this rank has to say is its own error
                _exchange(_Note(what, None, f"{type(error).__name__}: {error}"))
            _told(error)
        raise
    gather(f"the end of {what}", None)


def same(what: str, facts: Mapping[str, Any], fix: str) -> None:
    """Check that facts are the same on all ranks.

    Args:
        what: they are of, for the message.
        facts: name -> value; as in `gather`.
        fix: what to do about a difference.

    Raises:
        PlanError: they are not: the first that differs, and how.
    """
    first, *others = gather(what, dict(facts))
    for r, other in enumerate(others, 1):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                raise _told(
                    PlanError(
                        f"{what} is not the same on all ranks: {name} is {first.get(name)} on rank 0 and "
                        f"{other.get(name)} on rank {r}. {fix}"
                    )
                )


def total(what: str, tensors: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
    """Return the sum of each tensor over all ranks, in place where a rank has it; one that it lacks counts as zero.

    Args:
        what: they are, for messages.
        tensors: of this rank.

    Raises:
        PlanError: shapes or dtypes differ between ranks; otherwise as `gather`.
    """
    if size() == 1:
        return dict(tensors)
    known: dict[Key, tuple[tuple[int, ...], torch.dtype, str]] = {}
    about = {key: (tuple(t.shape), t.dtype, t.device.type) for key, t in tensors.items()}
    for r, found in enumerate(gather(what, about)):
        for key, form in found.items():
            if known.setdefault(key, form) != form:
                raise _told(
                    PlanError(
                        f"{what} of {key} is {form} on rank {r} and {known[key]} on one before it. Pass the same model "
                        "and settings on every rank."
                    )
                )
    return {key: _sum(tensors.get(key), *form) for key, form in known.items()}


def _sum(tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    if tensor is None:
        tensor = torch.zeros(shape, dtype=dtype, device=_own(device))
    away = tensor.to(_carrier(tensor.device.type)).contiguous()
    distributed.all_reduce(away)
    return away.to(tensor.device)


def send(what: str, owner: int, tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Return the tensors that one rank has, on every rank.

    Args:
        what: they are, for messages.
        owner: the rank that has them.
        tensors: there; elsewhere they are not looked at.
    """
    mine = rank() == owner
    about = [None if t is None else (t.shape, t.dtype, t.device.type) for t in tensors] if mine else []
    found: list[torch.Tensor | None] = []
    for i, form in enumerate(gather(what, about)[owner]):
        if form is None:
            found.append(None)
            continue
        shape, dtype, device = form
        own = tensors[i] if mine else None
        place = _carrier(device)
        away = torch.empty(shape, dtype=dtype, device=place) if own is None else own.detach().to(place).contiguous()
        distributed.broadcast(away, owner)
        found.append(away.to(_own(device)))
    return found


def spread(what: str, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return what `work` gives for each item; every rank does its part of them. Results are pickled."""
    parts = gather(what, [work(item) for item in items[rank() :: size()]])
    return [parts[i % size()][i // size()] for i in range(len(items))]


def from_first(what: str, work: Callable[[], T]) -> T:
    """Return on all ranks what `work` gives on the first; the others do not call it. The result is pickled."""
    return gather(what, [work()] if rank() == 0 else [])[0][0]


_TOLD = "_other_ranks_know"


def _told(error: Exception) -> Any:
    """Mark an error as one that the other ranks raise too, and return it."""
    setattr(error, _TOLD, True)
    return error


def _is_told(error: BaseException | None) -> bool:
    """Say whether an error, or one that it was raised from, is marked."""
    return error is not None and (getattr(error, _TOLD, False) or _is_told(error.__cause__))


def _exchange(note: _Note) -> list[_Note]:
    notes: list[Any] = [None] * size()
    late = threading.Timer(
        PATIENCE,
        logger.warning,
        (
            "rank %d has waited %.0f s at %r for another. Call fxprune on every rank, not on one alone.",
            rank(),
            PATIENCE,
            note.what,
        ),
    )
    late.daemon = True
    late.start()
    try:
        distributed.all_gather_object(notes, note)
    except RuntimeError as error:
        raise _told(
            PlanError(
                f"rank {rank()} has lost the others at {note.what!r} ({error}). See why they ended; every rank must "
                "make the same calls."
            )
        ) from error
    finally:
        late.cancel()
        late.join()  # a thread that is left when Python ends can take the process down
    return notes


def _carrier(device: str) -> torch.device:
    """Return where tensors of a kind of device are when they are sent: there, if the backend can."""
    able = [pair.split(":")[0] for pair in distributed.get_backend_config().split(",")]
    return _own(device if device in able else able[0])


def _own(device: str) -> torch.device:
    """Return this rank's device of a kind."""
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
