"""The weighted layers of a network, and which channels go into each and come out of it."""

from __future__ import annotations

import hashlib
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fxprune.atoms import FIXED
from fxprune.cloning import names_of
from fxprune.coupling import Coupling
from fxprune.gathering import Lister
from fxprune.sums import Layer
from fxprune.tasks import evaluating
from fxprune.values import hash_of

_LISTED: WeakKeyDictionary[torch.nn.Module, Lister] = WeakKeyDictionary()
"""Of traced modules that were asked for theirs: to find them takes a run."""


def layers_of(coupling: Coupling) -> list[Layer]:
    """Return the weighted layers of a network, as seen in one run, in eval mode, on the example inputs."""
    return list(_listed(coupling).layers.values())


def eps_of(coupling: Coupling) -> dict[str, float]:
    """Return running mean -> eps of the batch norms of a network, as seen in the same run."""
    return _listed(coupling).eps


def fingerprint_of(coupling: Coupling) -> str:
    """Return a hash of a network's weighted layers and batch norms, and of their weights; not of what is held in it."""
    state = coupling.traced.by_name
    layers, norms = layers_of(coupling), list(eps_of(coupling))
    names = [name for layer in layers for name in (layer.name, layer.bias)] + norms
    hashes = [hash_of(state[name]) for name in names if name in state]
    return hashlib.sha256(repr((layers, norms, hashes)).encode()).hexdigest()


def _listed(coupling: Coupling) -> Lister:
    module = coupling.traced.module
    if module not in _LISTED:
        lister = Lister(names_of(module))
        with torch.no_grad(), evaluating(module), lister:
            module(*coupling.traced.args, **coupling.traced.kwargs)
        _LISTED[module] = lister
    return _LISTED[module]


def channels_of(coupling: Coupling, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """Return the channels that go into a layer, (blocks, inputs), and those that come out of it, (blocks, outputs).

    Positions that stay, and inputs that differ from filter to filter inside a block, are `FIXED`.
    """
    shape, (out, into, *_) = coupling.tensors[layer.name]
    outputs = np.full((layer.blocks, layer.outputs), FIXED)
    if out is not None:
        outputs = out.reshape(layer.blocks, layer.outputs)
    inputs = np.full((layer.blocks, layer.inputs), FIXED)
    if into is not None:
        rows = np.broadcast_to(into.reshape(into.shape[:2]), shape[:2])
        rows = rows.reshape(layer.blocks, layer.outputs, layer.inputs)
        if (rows == rows[:, :1]).all():
            inputs = rows[:, 0]
    return inputs, outputs
