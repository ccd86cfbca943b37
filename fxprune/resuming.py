"""Searches that survive being killed: their state in a file, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from fxprune.errors import PlanError
from fxprune.values import tensors_in

SCHEMA = 1
"""Version of the file of a search."""


def write_state(path: str | Path, about: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write where a search is; who reads the file meanwhile sees the old state or the new one.

    Args:
        path: of the file.
        about: what the search is of, as JSON; `read_state` compares it.
        state: as JSON.
    """
    home = Path(path)
    draft = home.with_name(f"{home.name}.part")  # one that a kill has left behind is written over
    with open(draft, "w", encoding="utf-8") as file:
        json.dump({"schema": SCHEMA, "about": about, "state": state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, home)


def read_state(path: str | Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return where a search was, or None where there is no file yet.

    Raises:
        PlanError: the file is of another search, or damaged, or there is no folder to write it to.
    """
    folder = Path(path).absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise PlanError(f"the checkpoint {path} cannot be written: {folder} is no folder to write to. Make it first.")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise PlanError(f"the checkpoint {path} cannot be read ({error}). Delete it, or pass another path.") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("about"), dict):
        raise PlanError(f"the checkpoint {path} is not of a search. Delete it, or pass another path.")
    wanted = json.loads(json.dumps(about))
    for key in wanted:
        if found["about"].get(key) != wanted[key]:
            raise PlanError(
                f"the checkpoint {path} is of another search: its {key} is {found['about'].get(key)!r}, this one's is "
                f"{wanted[key]!r}. Delete it, or pass another path."
            )
    return found["state"]


def sums_over(batches: Iterable[Any]) -> list[float]:
    """Return sums that tell batches from others, whatever their order: three for each tensor of a batch."""
    found: list[float] = []
    for batch in batches:
        sums = [x for t in tensors_in(batch) for x in _sums(t.detach())]
        found = [a + b for a, b in zip_longest(found, sums, fillvalue=0.0)]
    return found


def _sums(t: torch.Tensor) -> tuple[float, float, float]:
    values = t.abs().double() if t.is_complex() else t.double()
    return float(t.numel()), float(values.clamp_min(0).sum()), float(values.square().sum())
