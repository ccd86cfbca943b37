"""Modules whose attributes repeat the sizes of their parameters: read them again from the sliced ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxprune.attention import MultiheadAttention
from fxprune.labels import Shape
from fxprune.registering import registering

RESIZERS: dict[type[nn.Module], Callable[..., None]] = {}


@dataclass(frozen=True, slots=True)
class Call:
    """How a module is called in the slim network.

    Attributes:
        inputs: predicted shape of each tensor that goes in.
        outputs: predicted shape of each tensor that comes out.
        rows: `(dim, count) -> int`: how many of `count` equal rows of the first input's dim stay.
        kept: `(name, dim) -> (size,) bool`: which positions of one of its parameters stay along a dim.
    """

    inputs: list[Shape]
    outputs: list[Shape]
    rows: Callable[[int, int], int]
    kept: Callable[[str, int], np.ndarray]


def resizes(*kinds: type[nn.Module]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register how modules of these classes (and their subclasses) are resized."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        resizer_of.cache_clear()
        return registering(RESIZERS, kinds, "resizers")(function)

    return register


@functools.cache
def resizer_of(kind: type[nn.Module]) -> Callable[..., None] | None:
    """Return what resizes modules of a class, or None where they repeat no sizes in attributes."""
    return next((RESIZERS[base] for base in kind.__mro__ if base in RESIZERS), None)


def resize(module: nn.Module, call: Call) -> None:
    """Set the size attributes of a module to what its parameters and its call now say."""
    resizer = resizer_of(type(module))
    if resizer is None:
        return
    if not (module._forward_pre_hooks or (module._modules and parametrize.is_parametrized(module))):
        resizer(module, call)
        return
    with _as_in_eval(module), torch.no_grad():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                hook(module, ())  # computes the weight that it holds as an attribute between calls
        resizer(module, call)


@contextmanager
def _as_in_eval(module: nn.Module) -> Iterator[None]:
    """Let weights that are computed be as in eval mode: in train mode, spectral norm changes its buffers each time."""
    modes = [(m, m.training) for m in module.modules()]
    for m, _ in modes:
        m.training = False
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


_SHAPE_KEEPING = {
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.ELU,
    nn.Identity, nn.Dropout,
}  # fmt: skip
_CONVOLUTIONS = {nn.Conv1d, nn.Conv2d, nn.Conv3d}
_BATCH_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}


def fits(module: nn.Module, inputs: list[Shape], outputs: list[Shape]) -> bool:
    """Say whether a resized module of a common kind returns the predicted shape; False where only running it tells.

    Args:
        module: the resized module.
        inputs: shapes of the tensors that go in.
        outputs: predicted shapes of what comes out.
    """
    if len(inputs) != 1 or len(outputs) != 1:
        return False
    (x,), (y,) = inputs, outputs
    kind = type(module)
    if kind in _SHAPE_KEEPING:
        return x == y
    if kind in _CONVOLUTIONS:
        weight: Any = module.weight
        at = len(x) - weight.ndim + 1
        channels = (x[at], y[at]) == (module.in_channels, module.out_channels)
        return channels and tuple(weight.shape[:2]) == (y[at], x[at] // module.groups) and not x[at] % module.groups  # pyright: ignore
    if kind is nn.Linear:
        return tuple(module.weight.shape) == (y[-1], x[-1]) and x[:-1] == y[:-1]  # pyright: ignore
    if kind in _BATCH_NORMS:
        return x == y and module.num_features == x[1]  # pyright: ignore
    if kind is nn.LayerNorm:
        sizes: Any = module.normalized_shape
        return x == y and x[-len(sizes) :] == sizes and all(p.shape == sizes for p in module.parameters())
    if kind is nn.AdaptiveAvgPool2d and len(x) > 2:
        size: Any = module.output_size
        return x[:-2] == y[:-2] and y[-2:] == ((size, size) if isinstance(size, int) else size)
    if kind is nn.Flatten:
        first, last = module.start_dim % len(x), module.end_dim % len(x)  # pyright: ignore
        return y == (*x[:first], math.prod(x[first : last + 1]), *x[last + 1 :])
    return kind in (nn.AvgPool2d, nn.MaxPool2d) and x[:-2] == y[:-2]  # along the others nothing goes


@resizes(nn.Linear)
def linear(module: Any, call: Call) -> None:
    """weight: (out, in)."""
    module.out_features, module.in_features = module.weight.shape


@resizes(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: Any, call: Call) -> None:
    """weight: (out, in / groups, *kernel)."""
    out, width = module._parameters["weight"].shape[:2] if "weight" in module._parameters else module.weight.shape[:2]
    channels = call.inputs[0][-len(module.kernel_size) - 1]
    vars(module).update(in_channels=channels, out_channels=out, groups=channels // width)


@resizes(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(module: Any, call: Call) -> None:
    """weight: (in, out / groups, *kernel)."""
    module.in_channels = module.weight.shape[0]
    module.out_channels = call.outputs[0][-len(module.kernel_size) - 1]
    module.groups = module.out_channels // module.weight.shape[1]


@resizes(nn.modules.batchnorm._NormBase)
def batch_norm(module: Any, call: Call) -> None:
    """weight: (channels,)."""
    state = module._parameters.get("weight")
    state = module._buffers.get("running_mean") if state is None else state
    vars(module)["num_features"] = call.inputs[0][1] if state is None else state.shape[0]


@resizes(nn.LayerNorm, nn.RMSNorm)
def layer_norm(module: Any, call: Call) -> None:
    """weight: (*normalized_shape,)."""
    module.normalized_shape = tuple(call.inputs[0][-len(module.normalized_shape) :])


@resizes(nn.GroupNorm)
def group_norm(module: Any, call: Call) -> None:
    """weight: (channels,)."""
    module.num_groups = call.rows(1, module.num_groups)
    module.num_channels = call.inputs[0][1]


@resizes(nn.ChannelShuffle)
def channel_shuffle(module: Any, call: Call) -> None:
    """The rows that its input is read as."""
    module.groups = call.rows(1, module.groups)


@resizes(nn.Embedding, nn.EmbeddingBag)
def embedding(module: Any, call: Call) -> None:
    """weight: (entries, d)."""
    module.num_embeddings, module.embedding_dim = module.weight.shape


@resizes(nn.Bilinear)
def bilinear(module: Any, call: Call) -> None:
    """weight: (out, in1, in2)."""
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


@resizes(nn.PReLU)
def prelu(module: Any, call: Call) -> None:
    """weight: (channels,) or (1,)."""
    module.num_parameters = module.weight.shape[0]


@resizes(nn.Unflatten)
def unflatten(module: Any, call: Call) -> None:
    """Splits one dim into several."""
    at = module.dim % len(call.inputs[0])
    count = len(module.unflattened_size)
    module.unflattened_size = tuple(call.outputs[0][at : at + count])


@resizes(MultiheadAttention)
def attention(module: MultiheadAttention, call: Call) -> None:
    """Projections of query, key and value: (heads * head dim, in), stacked or each on its own."""
    if module.in_proj_weight is not None:
        parts = list(np.split(call.kept("in_proj_weight", 0), np.cumsum(module.sizes)[:2]))
    else:
        parts = [call.kept(f"{name}_proj_weight", 0) for name in "qkv"]
    heads = parts[0].reshape(module.num_heads, -1).any(axis=1)
    sizes = tuple(int(part.sum()) for part in parts)
    vars(module).update(sizes=sizes, num_heads=int(heads.sum()), head_dim=sizes[0] // int(heads.sum()))
    module.embed_dim = module.out_proj.weight.shape[0]
    module.out_proj.out_features, module.out_proj.in_features = module.out_proj.weight.shape
    if module.in_proj_weight is None:
        module.kdim, module.vdim = module.k_proj_weight.shape[1], module.v_proj_weight.shape[1]
    else:
        module.kdim = module.vdim = module.in_proj_weight.shape[1]


@resizes(nn.RNNBase)
def recurrent(module: Any, call: Call) -> None:
    """weight_ih_l0: (gates * hidden, in), weight_hh_l0: (gates * hidden, out), weight_hr_l0: (out, hidden)."""
    module.input_size = module.weight_ih_l0.shape[1]
    if module.proj_size:
        module.proj_size, module.hidden_size = module.weight_hr_l0.shape
    else:
        module.hidden_size = module.weight_hh_l0.shape[1]
    module._init_flat_weights()


@resizes(nn.modules.rnn.RNNCellBase)
def recurrent_cell(module: Any, call: Call) -> None:
    """weight_ih: (gates * hidden, in), weight_hh: (gates * hidden, hidden)."""
    module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]
