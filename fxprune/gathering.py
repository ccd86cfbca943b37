"""See every weighted layer of a network at work: what goes in, and how the loss answers to what comes out.

A function mode sees each call of a linear layer or convolution, whichever module it is in, and knows its weight. It
reads a sample of the positions: rows of inputs, and, going back, of gradients.
"""

from __future__ import annotations

import zlib
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fxprune.accumulating import ClassTotals, Gram, Spread
from fxprune.functions import as_function
from fxprune.memberships import Memberships
from fxprune.sums import Layer, Sums

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
"""Function -> how many spatial dims it has."""


@dataclass(frozen=True, slots=True)
class Call:
    """How a function uses a weight: the layer it is, and the geometry of a convolution, empty where it is linear."""

    layer: Layer
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    kernel: tuple[int, ...]

    @property
    def dim(self) -> int:
        """Which dim of the output has the channels."""
        return 1 if self.kernel else -1

    def batched(self, x: torch.Tensor) -> torch.Tensor:
        """Return an input or output with a batch dim: without one, it is a single sample."""
        return x[None] if x.ndim == len(self.kernel) + 1 else x


class Gatherer(TorchFunctionMode):
    """Adds up moments while a network runs, and while losses are differentiated.

    Attributes:
        sums: weight -> its sums.
        spreads: running mean of a batch norm -> of its input.
        task: whose loss is being differentiated.
        anchor: a zero that requires a gradient, added to the first outputs: parameters need none.
        samples: how many the batch has.
        classes: task -> the classes of the batch, if sums by class are wanted.
    """

    def __init__(self, names: Mapping[int, str], positions: Mapping[str, int], shares_taps: Container[str]) -> None:
        """Watch weights.

        Args:
            names: id of a parameter or buffer -> its name.
            positions: weight -> how many positions of each sample are read at most.
            shares_taps: weights whose taps share one moment.
        """
        super().__init__()
        self.sums: dict[str, Sums] = {}
        self.spreads: dict[str, Spread] = {}
        self.task = ""
        self.anchor = torch.zeros(())
        self.samples = 0
        self.classes: Mapping[str, Memberships] = {}
        self._names = names
        self._positions = positions
        self._shares_taps = shares_taps
        self._batch = 0

    def start_batch(self, samples: int, number: int) -> None:
        """Begin a batch: other positions are read than in others, the same in every run; `number` counts from 1."""
        self._batch = number
        self.samples = samples
        self.anchor = torch.zeros((), requires_grad=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function; read what goes into a layer, and listen to what comes out."""
        out = func(*args, **(kwargs or {}))
        func, args, kwargs = as_function(func, args, kwargs)
        call = call_of(self._names, func, args, kwargs) if torch.is_grad_enabled() else None
        if call is None:  # or nobody will tell the gradient, as inside of an autograd function
            if func is F.batch_norm:
                self._read_norm(kwargs["input"], self._names.get(id(kwargs.get("running_mean"))))
            return out
        return self._read(call, args[0], out)

    def _read(self, call: Call, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        layer = call.layer
        sums = self.sums.get(layer.name)
        if sums is None:
            sums = self.sums[layer.name] = Sums(layer, layer.name in self._shares_taps)
        is_conv, made = bool(call.kernel), call.batched(out)
        places = some_places(made, self._positions[layer.name], f"{layer.name} {self._batch}", is_conv=is_conv)
        rows = rows_read(call, call.batched(x.detach()), places)
        read = rows.transpose(2, 3).flatten(1, 2) if sums.shared_taps else rows.flatten(2)
        sums.inputs.add(read)
        if made.shape[0] == self.samples:
            sizes = (len(made), *(made.shape[2:] if is_conv else made.shape[1:-1]))
            for task, members in self.classes.items():
                shares = members.at(places, sizes).repeat_interleave(layer.taps if sums.shared_taps else 1, 0)
                sums.classes.setdefault(task, ClassTotals()).add(read, shares)
        if not out.requires_grad:
            out = out + self.anchor.to(out)
        scale = self.samples**2 * _positions_of(made, is_conv=is_conv) / max(len(places[0]), 1)
        out.register_hook(lambda g: self._add_gradient(sums, call.batched(g), places, scale, is_conv=is_conv))
        out._comes_from = layer.name, out._version, is_conv or out.ndim == 2  # pyright: ignore[reportAttributeAccessIssue]
        return out

    def _read_norm(self, x: torch.Tensor, running_mean: str | None) -> None:
        if running_mean is None:
            return
        self.spreads.setdefault(running_mean, Spread()).add(x)
        name, version, is_dim_1 = getattr(x, "_comes_from", ("", 0, False))
        if is_dim_1 and x._version == version:  # of its channels, and nothing has written to them
            self.sums[name].norm = running_mean

    def _add_gradient(
        self, sums: Sums, g: torch.Tensor, places: tuple[torch.Tensor, ...], scale: float, *, is_conv: bool
    ) -> None:
        rows = rows_made(g, sums.layer.blocks, places, is_conv=is_conv)
        sums.outputs.setdefault(self.task, Gram()).add(rows * scale**0.5)


def call_of(names: Mapping[int, str], func: Any, args: Any, kwargs: Any, *, single: bool = False) -> Call | None:
    """Return how a function uses a weight; None where it does not.

    Args:
        names: id of a parameter or buffer -> its name.
        func: the function.
        args: what it is called with.
        kwargs: by name.
        single: convolutions of single channels are wanted too.
    """
    if func is not F.linear and func not in CONVOLUTIONS:
        return None
    weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
    name = names.get(id(weight))
    if name is None or not args:
        return None
    bias = names.get(id(kwargs.get("bias", args[2] if len(args) > 2 else None)))
    if func is F.linear:
        return Call(Layer(name, 1, weight.shape[1], weight.shape[0], 1, bias), (), (), (), ())
    rank = CONVOLUTIONS[func]
    given = dict(zip(("stride", "padding", "dilation", "groups"), args[3:], strict=False)) | kwargs
    kernel, groups = tuple(weight.shape[2:]), int(given.get("groups", 1))
    dilation = _spread(given.get("dilation", 1), rank)
    padding = _padding(given.get("padding", 0), kernel, dilation, rank)
    if padding is None or (groups > 1 and weight.shape[1] == 1 and not single):
        return None
    layer = Layer(name, groups, weight.shape[1], weight.shape[0] // groups, weight[0, 0].numel(), bias)
    return Call(layer, _spread(given.get("stride", 1), rank), padding, dilation, kernel)


class Lister(TorchFunctionMode):
    """Lists the layers and batch norms that a network runs.

    Attributes:
        layers: weight -> layer.
        eps: running mean -> eps of the batch norm.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        """Look for weights and running means: id of a parameter or buffer -> its name."""
        super().__init__()
        self.layers: dict[str, Layer] = {}
        self.eps: dict[str, float] = {}
        self._names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function; note the layer or batch norm that it is."""
        kind, given, named = as_function(func, args, kwargs)
        call = call_of(self._names, kind, given, named)
        if call is not None:
            self.layers[call.layer.name] = call.layer
        elif kind is F.batch_norm and id(named.get("running_mean")) in self._names:
            self.eps[self._names[id(named["running_mean"])]] = named["eps"]
        return func(*args, **(kwargs or {}))


def _positions_of(out: torch.Tensor, *, is_conv: bool) -> int:
    return out.numel() // (out.shape[1] if is_conv else out.shape[-1])


def _spread(value: Any, rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value) * (rank if len(value) == 1 else 1)


def _padding(value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...], rank: int) -> tuple[int, ...] | None:
    """Return the zeros around the input; None where there are not equally many on both sides."""
    if value == "valid":
        return (0,) * rank
    if value == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple(r // 2 for r in reach) if not any(r % 2 for r in reach) else None
    return _spread(value, rank)


def some_places(out: torch.Tensor, count: int, seed: str, *, is_conv: bool) -> tuple[torch.Tensor, ...]:
    """Return up to so many positions of each sample, drawn by chance, as one index per dim but the channels."""
    sizes = [out.shape[0], *(out.shape[2:] if is_conv else out.shape[1:-1])]
    each = 1
    for n in sizes[1:]:
        each *= n
    if each <= count:
        flat = torch.arange(sizes[0] * each)
    else:
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        picked = torch.rand(sizes[0], each, generator=generator).topk(count).indices
        flat = (picked + torch.arange(sizes[0])[:, None] * each).flatten()
    return torch.unravel_index(flat.to(out.device), sizes)


def rows_made(out: torch.Tensor, blocks: int, places: tuple[torch.Tensor, ...], *, is_conv: bool) -> torch.Tensor:
    """Return (blocks, rows, outputs): what an output, or its gradient, is at each of the places."""
    rows = out[(places[0], slice(None), *places[1:])] if is_conv else out[places]
    return rows.reshape(len(rows), blocks, -1).transpose(0, 1)


def rows_read(call: Call, x: torch.Tensor, places: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return (blocks, rows, channels, taps): what each of the places of the output is computed from."""
    layer = call.layer
    if not call.kernel:
        return x[places].reshape(1, -1, layer.inputs, 1)
    rank = len(call.kernel)
    around = [p for size in reversed(call.padding) for p in (size, size)]
    x = F.pad(x, around) if any(around) else x
    index: list[torch.Tensor] = []
    for i in range(rank):
        taps = torch.arange(call.kernel[i], device=x.device) * call.dilation[i]
        shape = [1] * (rank + 1)
        shape[i + 1] = -1
        start = (places[i + 1] * call.stride[i]).reshape(-1, *[1] * rank)
        index.append(start + taps.reshape(shape))
    first = places[0].reshape(-1, *[1] * rank)
    patches = x.movedim(1, -1)[(first, *index)]  # (rows, *kernel, channels)
    patches = patches.reshape(len(patches), layer.taps, layer.blocks, layer.inputs)
    return patches.permute(2, 0, 3, 1)
