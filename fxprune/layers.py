"""Which channels go into a weighted layer, and which come out of it."""

from __future__ import annotations

import numpy as np

from fxprune.atoms import FIXED
from fxprune.coupling import Coupling
from fxprune.sums import Layer


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
