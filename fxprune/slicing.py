"""Cut parameters and buffers down to the channels that stay."""

from __future__ import annotations

import numpy as np
import torch

from fxprune.closing import owner
from fxprune.labels import Labels


class Kept:
    """Which positions stay, looked up once for every array of channels."""

    def __init__(self, keep: np.ndarray) -> None:
        """Remember what stays: `keep` is (channels + 1,) bool; the last entry serves fixed positions."""
        self.keep = keep
        self._positions: dict[int, tuple[np.ndarray, torch.Tensor | None]] = {}

    def positions(self, channels: np.ndarray) -> torch.Tensor | None:
        """Return the positions that stay along one dim, or None where all do."""
        home = owner(channels)
        found = self._positions.get(id(home))
        if found is None:
            flags = self.keep[channels].ravel()
            index = None if flags.all() else torch.from_numpy(np.flatnonzero(flags))
            found = self._positions[id(home)] = (home, index)
        return found[1]


def slice_tensor(value: torch.Tensor, labels: Labels, kept: Kept) -> torch.Tensor:
    """Return the kept positions of a tensor, a new tensor in the same memory format. To be called without gradients.

    Args:
        value: any shape.
        labels: its channels, dim by dim.
        kept: what stays.
    """
    result, shape = value, value.shape
    for d, ids in enumerate(labels):
        if ids is None:
            continue
        if ids.size != shape[d]:
            result = _by_mask(value, labels, kept.keep)
            break
        index = kept.positions(ids)
        if index is not None:
            result = result.index_select(d, index if value.is_cpu else index.to(value.device))
    if result is value:
        return value.clone()
    if len(shape) == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last):
        result = result.contiguous(memory_format=torch.channels_last)
    return result


def _by_mask(value: torch.Tensor, labels: Labels, keep: np.ndarray) -> torch.Tensor:
    """Cut a tensor whose rows keep different positions: kept positions are in row order, rows are equally long."""
    mask = np.ones(value.shape, dtype=bool)
    for ids in labels:
        if ids is not None:
            mask &= keep[ids]
    sizes = [
        n if ids is None else kept_size(ids, d, keep)
        for d, (n, ids) in enumerate(zip(value.shape, labels, strict=True))
    ]
    return value[torch.from_numpy(mask).to(value.device)].reshape(sizes)


def kept_size(ids: np.ndarray, dim: int, keep: np.ndarray) -> int:
    """Return how many positions of a labelled dim stay (in every row that stays at all)."""
    if ids.size == ids.shape[dim]:
        return int(np.count_nonzero(keep[ids]))
    return int(keep[ids].sum(axis=dim).max(initial=0))


def sliced_like(value: torch.Tensor, labels: Labels | None, kept: Kept) -> torch.Tensor:
    """Return a sliced copy of a parameter or buffer that is a parameter where the original is.

    To be called without gradients.
    """
    return copied_like(value, value.clone() if labels is None else slice_tensor(value, labels, kept))


def copied_like(value: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Return a copy of (a part of) a parameter or buffer: a parameter if that is one, with the attributes of it."""
    if isinstance(value, torch.nn.Parameter):
        result = torch.nn.Parameter(result, requires_grad=value.requires_grad)
    for key, attribute in vars(value).items():
        if not hasattr(result, key):
            setattr(result, key, attribute)
    return result
