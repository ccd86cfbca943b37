"""Who has which channel of several networks: all tasks, one of them, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

DEAD, SHARED = -1, 0
"""What a channel is when no task has it, and when all have; that of task t alone is t + 1."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """Who has which channel of networks side by side.

    Attributes:
        parts: (networks, channels) `DEAD`, `SHARED` or the number of a task, counted from 1.
        written: name of a parameter or buffer -> what takes the place of the networks' own: channels of all networks
            side by side, (positions * networks) along every dim of channels, position by position.
    """

    parts: np.ndarray
    written: Mapping[str, torch.Tensor] = field(default_factory=dict)


def regrouped(needless: np.ndarray) -> np.ndarray:
    """Return whose each channel is: (channels,) from (tasks, channels) bool, which channels a task can do without."""
    needed = ~needless
    count = needed.sum(axis=0)
    return np.where(count == 0, DEAD, np.where(count == 1, needed.argmax(axis=0) + 1, SHARED))
