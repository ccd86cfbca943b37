"""Recurrent layers as the labels see them: all time steps at once.

Run as they are, they make some twenty ATen calls a step. What stands in for one here couples the same channels, spends
the same multiply-accumulates and holds its gates in memory as the layer does, in a few calls however long the sequence
is. Its numbers mean nothing: it only ever runs on tensors without data.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils import _pytree as pytree

from fxprune.calling import is_hooked, plain_calls
from fxprune.registering import registering

StandIn = Callable[..., Any]
STAND_INS: dict[type[nn.Module], StandIn] = {}
"""Module class -> `(module, *args, **kwargs)`: what is run on labels where running the module would be wasteful."""

PACKED = "a PackedSequence cannot be followed: pad the sequences, and pass the padded tensor to the recurrent layer"


def is_packed(value: Any) -> bool:
    """Say whether there is a PackedSequence among values."""
    leaves = pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, PackedSequence))
    return any(isinstance(leaf, PackedSequence) for leaf in leaves)


def raised_packing(error: BaseException) -> bool:
    """Say whether an error was raised while sequences were packed."""
    packing = (pack_sequence.__code__, pack_padded_sequence.__code__)
    return any(frame.f_code in packing for frame, _ in traceback.walk_tb(error.__traceback__))


def stands_in_for(*kinds: type[nn.Module]) -> Callable[[StandIn], StandIn]:
    """Register what is labelled in place of modules of exactly these classes."""
    return registering(STAND_INS, kinds, "stand-ins")


def run_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module on tensors without data, or what stands in for it; where hooks make it more than its class, it."""
    stand_in = STAND_INS.get(type(module))
    if stand_in is None or not plain_calls() or is_hooked(module):
        return module(*args, **kwargs)
    return stand_in(module, *args, **kwargs)


@stands_in_for(nn.RNN, nn.GRU)
def recurrent(module: Any, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """input: (t, b, i), (b, t, i) or (t, i); hx and the second result: (layers * directions, b, hidden)."""
    x, states = _batched(module, input, [] if hx is None else [hx])
    module.check_input(x, None) if hx is None else module.check_forward_args(x, *states, None)
    out, hidden, _ = _layers(module, x, states)
    return _unbatched(module, input, out), _unbatched(module, input, hidden, dim=1)


@stands_in_for(nn.LSTM)
def lstm(module: Any, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """As `recurrent`; hx and the second result are pairs, of `h` (.., b, out) and `c` (.., b, hidden)."""
    x, states = _batched(module, input, [] if hx is None else list(hx))
    module.check_input(x, None) if hx is None else module.check_forward_args(x, states, None)
    out, hidden, cell = _layers(module, x, states)
    hidden, cell = (_unbatched(module, input, t, dim=1) for t in (hidden, cell))
    return _unbatched(module, input, out), (hidden, cell)


def _batched(module: Any, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Give an input without a batch dim one of size one."""
    if isinstance(x, PackedSequence):
        raise TypeError(PACKED)
    if module.proj_size >= module.hidden_size:
        sizes = f"{module.proj_size} of {module.hidden_size}"
        raise ValueError(f"proj_size has to be smaller than hidden_size, and would be {sizes}")
    if x.ndim != 2:
        return x, states
    return x.unsqueeze(0 if module.batch_first else 1), [t.unsqueeze(1) for t in states]


def _unbatched(module: Any, x: Tensor, result: Tensor, dim: int | None = None) -> Tensor:
    """Take the batch dim away where the input `x` had none."""
    return result.squeeze(dim or (0 if module.batch_first else 1)) if x.ndim == 2 else result


def _layers(module: Any, x: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Run all layers and directions; return the sequence and, stacked, the last `h` and `c` of each.

    Args:
        module: the layer.
        x: (t, b, i), or (b, t, i) where the module says so.
        states: none, or the initial `h` (layers * directions, b, out) and, of an LSTM, `c` (.., b, hidden).
    """
    hidden, cells = [], []
    for layer in range(module.num_layers):
        parts = []
        for direction in ("", "_reverse") if module.bidirectional else ("",):
            initial = [t[len(hidden)] for t in states]
            out, last, cell = _direction(module, f"_l{layer}{direction}", x, initial)
            parts.append(out)
            hidden.append(last)
            cells.append(cell)
        x = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    return x, _stacked(hidden), _stacked(cells)


def _direction(module: Any, suffix: str, x: Tensor, initial: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction of one layer: x (t, b, i) -> (t, b, out), and of one step (b, out) and (b, hidden)."""
    time = 1 if module.batch_first else 0
    weight, recurrent = getattr(module, "weight_ih" + suffix), getattr(module, "weight_hh" + suffix)
    gates = F.linear(x, weight).cumsum_(time)  # a step depends on all before it
    for bias in ("bias_ih", "bias_hh") if module.bias else ():
        gates.add_(getattr(module, bias + suffix))
    unit, *others = gates.chunk(len(weight) // module.hidden_size, -1)
    for other in [*others, *(c.unsqueeze(time) for c in initial[1:])]:
        unit.mul_(other)  # whatever a cell does to its gates and its memory, it does unit by unit
    out = F.linear(unit, getattr(module, "weight_hr" + suffix)) if module.proj_size else unit.clone()
    for h in initial[:1]:
        out.add_(h.unsqueeze(time))
    gates.flatten(0, 1).addmm_(out.flatten(0, 1), recurrent.t())
    return out, out.select(time, -1).clone(), unit.select(time, -1).clone()


def _stacked(states: list[Tensor]) -> Tensor:
    """Stack (b, n) tensors to (layers * directions, b, n): equally many units in each, but not the same ones."""
    if len(states) == 1:
        return states[0].unsqueeze(0)
    rows = torch.cat(states, -1).unflatten(-1, (len(states), -1))
    rows.unbind(1)  # reading each by its position: no layer may lose all its units
    return rows.transpose(0, 1).contiguous()
