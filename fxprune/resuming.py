"""Searches that survive being killed: their state in a file, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxprune.errors import PlanError

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
        PlanError: the file is of another search, or damaged.
    """
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
