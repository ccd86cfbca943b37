"""Random weights under which every part of a network matters to its outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STATISTICS = ("running_mean", "running_var")


def awaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw weights, scales, biases and running statistics such that none is zero, constant or without effect.

    Networks are often initialised so that a branch starts as nothing: scales of 0 or 1e-6, heads of zeros. A slim
    network that has such a branch wrong would still return what it should.

    Args:
        model: any module; it is changed.
        seed: of the random numbers.

    Returns:
        The module, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *_norm_buffers(model)]:
            if tensor.is_floating_point():
                _draw(name, tensor, generator)
    return model.eval()


def _norm_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return running statistics, and the scales and shifts of norms that do not train."""
    buffers = dict(model.named_buffers())
    norms = {name.rpartition(".")[0] for name in buffers if name.endswith(STATISTICS)}
    return [(n, b) for n, b in buffers.items() if n.rpartition(".")[0] in norms and b.ndim == 1]


def _draw(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    last = name.rpartition(".")[2]
    constant = bool((tensor == tensor.reshape(-1)[:1]).all())
    if last == "running_var":
        _spread(tensor, 0.5, 2.0, generator)
    elif last == "weight" and tensor.ndim > 1:
        tensor.normal_(0.0, (2 * tensor.shape[0] / tensor.numel()) ** 0.5, generator=generator)
    elif last != "bias" and constant and (last == "weight" or bool(tensor.any())):
        _spread(tensor, 0.5, 1.5, generator)
    elif constant or last in ("bias", "running_mean"):
        _spread(tensor, -0.4, 0.4, generator)


def _spread(tensor: Tensor, low: float, high: float, generator: torch.Generator) -> None:
    """Fill a tensor with different values, evenly spread and shuffled."""
    place = torch.randperm(tensor.numel(), generator=generator).reshape(tensor.shape)
    tensor.copy_(low + (high - low) * (place + 0.5) / tensor.numel())
