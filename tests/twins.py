"""Networks that do the same with their channels in another order."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

import fxprune


def permuted(model: nn.Module, example_inputs: torch.Tensor, seed: int) -> nn.Module:
    """Return a copy of a network in which the channels of every group have changed places."""
    coupling = fxprune.couple(fxprune.trace(model, example_inputs))
    goes_to = np.arange(coupling.num_channels)
    rng = np.random.default_rng(seed)
    for group in coupling.groups():
        goes_to[group.cells[0]] = rng.permutation(group.cells[0])
    twin = copy.deepcopy(model)
    state = dict(twin.named_parameters()) | dict(twin.named_buffers())
    for name, (_, labels) in coupling.tensors.items():
        for dim, ids in enumerate(labels):
            if ids is not None and ids.size == state[name].shape[dim]:
                order = np.argsort(np.argsort(goes_to[ids.ravel()], kind="stable"), kind="stable")
                order = np.argsort(ids.ravel(), kind="stable")[order]
                state[name].data.copy_(state[name].data.index_select(dim, torch.from_numpy(order)))
    return twin
