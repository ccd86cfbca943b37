"""What a layer reads and returns, row by row, gathered with torch's own `unfold`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rows_of(model: nn.Module, layer: str, inputs: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return what goes into a layer, (rows, blocks, inputs, taps), and what comes out, (rows, blocks, outputs)."""
    kept: list[tuple[Tensor, Tensor]] = []
    module: Any = model.get_submodule(layer)
    handle = module.register_forward_hook(lambda m, args, out: kept.append((args[0], out)))
    with torch.no_grad():
        for x in inputs:
            model(x)
    handle.remove()
    x, y = (torch.cat(parts) for parts in zip(*kept, strict=True))
    if isinstance(module, nn.Linear):
        return x[:, None, :, None], y[:, None]
    patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)
    rows = patches.reshape(-1, module.groups, module.in_channels // module.groups, module.weight[0, 0].numel())
    return rows, y.flatten(2).transpose(1, 2).reshape(len(rows), module.groups, -1)
