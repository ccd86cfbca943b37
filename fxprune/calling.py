"""The ATen call that a common layer or operator makes: its labels follow without the layer and the dispatcher.

Only what is asked for is here: `rules/` alone says what an op does. A layer that is not in the table, or is called in
an unusual way, is run.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fxprune.registering import registering

aten = torch.ops.aten

Call = tuple[Any, tuple[Any, ...]]
"""An overload and its arguments."""

Caller = Callable[[Any, torch.Tensor], Call | None]
CALLS: dict[type[nn.Module], Caller] = {}


def calls(*kinds: type[nn.Module]) -> Callable[[Caller], Caller]:
    """Register the call of exactly these classes."""
    return registering(CALLS, kinds, "calls")


FUNCTIONS: dict[Callable[..., Any], Any] = {
    operator.add: aten.add.Tensor,
    operator.iadd: aten.add_.Tensor,
    operator.mul: aten.mul.Tensor,
    operator.imul: aten.mul_.Tensor,
    torch.add: aten.add.Tensor,
    torch.mul: aten.mul.Tensor,
    torch.relu: aten.relu.default,
    torch.sigmoid: aten.sigmoid.default,
    torch.Tensor.add: aten.add.Tensor,
    torch.Tensor.mul: aten.mul.Tensor,
    torch.Tensor.relu: aten.relu.default,
    torch.Tensor.sigmoid: aten.sigmoid.default,
}
"""Functions and methods that are one ATen call on the same arguments."""


@functools.cache
def _operands(func: Any) -> int:
    return sum(str(a.type) == "Tensor" for a in func._schema.arguments)


def call_of_function(function: Any, operands: list[Any]) -> Call | None:
    """Return the ATen call of a function on floating tensors of one dtype; None where only running it tells."""
    found = FUNCTIONS.get(function)
    if found is None or len(operands) != _operands(found):
        return None
    same = all(isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype == operands[0].dtype for x in operands)
    return (found, tuple(operands)) if same else None


def call_of(module: nn.Module, x: torch.Tensor) -> Call | None:
    """Return the only ATen call of a layer without hooks on a floating tensor; None where only running it tells."""
    found = CALLS.get(type(module))
    if found is None or is_hooked(module) or not x.is_floating_point():
        return None
    return found(module, x)


def is_hooked(module: nn.Module) -> bool:
    """Say whether a module has hooks, or a forward, of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def plain_calls() -> bool:
    """Say whether calling a module does nothing but what its class says: no hooks for all modules are installed."""
    everywhere = nn.modules.module
    return not (everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)


@calls(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: Any, x: torch.Tensor) -> Call | None:
    """x: (b, c, *space). Zeros around it, the same number on both sides."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or weight.dtype != x.dtype or module.padding_mode != "zeros" or type(module.padding) is not tuple:
        return None
    if x.ndim != weight.ndim or x.shape[1] != weight.shape[1] * module.groups:
        return None
    fixed = module.stride, module.padding, module.dilation, False, (0,) * (x.ndim - 2), module.groups
    return aten.convolution.default, (x, weight, bias, *fixed)


@calls(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(module: Any, x: torch.Tensor) -> Call | None:
    """x: (b, c, *space). With running statistics."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    mean, var = module._buffers.get("running_mean"), module._buffers.get("running_var")
    rank = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}[type(module)]
    momentum = 0.0 if module.momentum is None else module.momentum
    if module.training or x.ndim not in rank:
        return None
    return function_batch_norm(x, mean, var, weight, bias, False, momentum, module.eps)


@calls(nn.ReLU)
def relu(module: Any, x: torch.Tensor) -> Call:
    """x: any shape."""
    return (aten.relu_.default if module.inplace else aten.relu.default), (x,)


@calls(nn.ReLU6)
def relu6(module: Any, x: torch.Tensor) -> Call:
    """x: any shape."""
    return (aten.hardtanh_.default if module.inplace else aten.hardtanh.default), (x, 0.0, 6.0)


@calls(nn.Hardswish)
def hardswish(module: Any, x: torch.Tensor) -> Call:
    """x: any shape."""
    return (aten.hardswish_.default if module.inplace else aten.hardswish.default), (x,)


@calls(nn.Hardsigmoid)
def hardsigmoid(module: Any, x: torch.Tensor) -> Call:
    """x: any shape."""
    return (aten.hardsigmoid_.default if module.inplace else aten.hardsigmoid.default), (x,)


@calls(nn.SiLU)
def silu(module: Any, x: torch.Tensor) -> Call:
    """x: any shape."""
    return (aten.silu_.default if module.inplace else aten.silu.default), (x,)


@calls(nn.Sigmoid)
def sigmoid(module: Any, x: torch.Tensor) -> Call:
    """x: any shape."""
    return aten.sigmoid.default, (x,)


@calls(nn.GELU)
def gelu(module: Any, x: torch.Tensor) -> Call:
    """x: any shape. Exact or not: the shape is the same."""
    return aten.gelu.default, (x,)


@calls(nn.Linear)
def linear(module: Any, x: torch.Tensor) -> Call | None:
    """x: (.., k). Of values laid out otherwise, torch makes other calls."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or weight.dtype != x.dtype or x.ndim < 2 or x.shape[-1] != weight.shape[1]:
        return None
    return (aten.linear.default, (x, weight, bias)) if x.is_contiguous() else None


@calls(nn.LayerNorm)
def layer_norm(module: Any, x: torch.Tensor) -> Call | None:
    """x: (.., *normalized_shape)."""
    weight, bias, sizes = module._parameters["weight"], module._parameters["bias"], module.normalized_shape
    if x.shape[-len(sizes) :] != sizes or (weight is not None and weight.dtype != x.dtype):
        return None
    return aten.native_layer_norm.default, (x, sizes, weight, bias, module.eps)


def function_batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Call | None:
    """input: (b, c, *space), all others: (c,). With running statistics."""
    if training or running_mean is None or running_var is None or momentum is None:
        return None
    if input.ndim < 2 or input.shape[1] != len(running_mean) or running_mean.dtype != input.dtype:
        return None
    state = weight, bias, running_mean, running_var
    return aten.native_batch_norm.default, (input, *state, False, momentum, eps)


def mean(x: torch.Tensor, dim: Any = (), keepdim: bool = False, **others: Any) -> Call | None:
    """x: any shape; some dims, which are named, disappear."""
    dims = [dim] if isinstance(dim, int) else dim
    plain = isinstance(dims, (tuple, list)) and dims and all(type(d) is int for d in dims) and not others
    return (aten.mean.dim, (x, list(dims), bool(keepdim))) if plain else None


def flatten(x: torch.Tensor, start_dim: int = 0, end_dim: int = -1) -> Call | None:
    """x: any shape; several dims become one. Where they do not follow one another in memory, torch makes a copy."""
    if not x.ndim or not x.is_contiguous():
        return None
    first, last = start_dim % x.ndim, end_dim % x.ndim
    sizes = [*x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :]]
    return (aten.view.default, (x, sizes)) if first < last else None


_ACTIVATIONS = {
    F.relu: (aten.relu.default, aten.relu_.default),
    F.hardswish: (aten.hardswish.default, aten.hardswish_.default),
    F.hardsigmoid: (aten.hardsigmoid.default, aten.hardsigmoid_.default),
    F.silu: (aten.silu.default, aten.silu_.default),
}
"""Activations of `torch.nn.functional`, and what they call: not in place and in place."""


def call_of_torch_function(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Return the only ATen call of a function on floating tensors; None where only running it tells."""
    if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
        return None
    if function is F.batch_norm:
        return function_batch_norm(*args, **kwargs)
    if function in (torch.mean, torch.Tensor.mean):
        return mean(*args, **kwargs)
    if function in (torch.flatten, torch.Tensor.flatten):
        return flatten(*args, **kwargs)
    if function in _ACTIVATIONS and len(args) == 1 and kwargs.keys() <= {"inplace"}:
        return _ACTIVATIONS[function][bool(kwargs.get("inplace"))], args
    return None if kwargs else call_of_function(function, list(args))


def is_identity(module: nn.Module) -> bool:
    """Say whether calling a module returns its input."""
    kind = type(module)
    return (kind is nn.Identity or (kind is nn.Dropout and not module.training)) and not is_hooked(module)


@calls(nn.Flatten)
def flatten_dims(module: Any, x: torch.Tensor) -> Call | None:
    """x: any shape."""
    return flatten(x, module.start_dim, module.end_dim)


@calls(nn.AdaptiveAvgPool2d)
def global_average(module: Any, x: torch.Tensor) -> Call | None:
    """x: (b, c, h, w) -> (b, c, 1, 1)."""
    return (aten.mean.dim, (x, [-1, -2], True)) if module.output_size in (1, (1, 1)) and x.ndim == 4 else None


@calls(nn.AvgPool2d)
def average_pool(module: Any, x: torch.Tensor) -> Call | None:
    """x: (b, c, h, w)."""
    if module.divisor_override is not None or x.ndim != 4:
        return None
    sizes = [_two(v) for v in (module.kernel_size, module.stride, module.padding)]
    return aten.avg_pool2d.default, (x, *sizes, module.ceil_mode, module.count_include_pad)


@calls(nn.MaxPool2d)
def max_pool(module: Any, x: torch.Tensor) -> Call | None:
    """x: (b, c, h, w)."""
    if module.return_indices or x.ndim != 4:
        return None
    sizes = [_two(v) for v in (module.kernel_size, module.stride, module.padding, module.dilation)]
    return aten.max_pool2d_with_indices.default, (x, *sizes, module.ceil_mode)


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
