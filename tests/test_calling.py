"""What the table of calls says of a layer is what the layer does."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fxprune
from fxprune import interpreting
from fxprune.calling import CALLS, FUNCTIONS, call_of, call_of_function, call_of_torch_function

IMAGE = (2, 8, 4, 4)
LAYERS = [
    (nn.Conv2d(8, 4, 3, padding=1, stride=2), IMAGE),
    (nn.Conv2d(8, 8, 3, groups=8, dilation=2, padding=2, bias=False), IMAGE),
    (nn.Conv1d(8, 4, 3), (2, 8, 5)),
    (nn.Conv3d(8, 4, 1), (2, 8, 3, 3, 3)),
    (nn.BatchNorm1d(8).eval(), (2, 8)),
    (nn.BatchNorm1d(8).eval(), (2, 8, 5)),
    (nn.BatchNorm2d(8, affine=False).eval(), IMAGE),
    (nn.BatchNorm2d(8, momentum=None).eval(), IMAGE),
    (nn.BatchNorm3d(8).eval(), (2, 8, 3, 3, 3)),
    (nn.AdaptiveAvgPool2d(1), IMAGE),
    (nn.AdaptiveAvgPool2d((1, 1)), IMAGE),
    (nn.AvgPool2d(2), IMAGE),
    (nn.AvgPool2d((3, 2), stride=(2, 1), padding=1, count_include_pad=False), IMAGE),
    (nn.AvgPool2d(3, stride=2, ceil_mode=True), IMAGE),
    (nn.MaxPool2d(2), IMAGE),
    (nn.MaxPool2d(3, stride=2, ceil_mode=True), IMAGE),
    (nn.MaxPool2d(3, stride=2, padding=(1, 0), dilation=(1, 1)), IMAGE),
    (nn.Flatten(), IMAGE),
    (nn.Flatten(0, -2), IMAGE),
    (nn.Sigmoid(), IMAGE),
    (nn.GELU(), IMAGE),
    (nn.LayerNorm(4), IMAGE),
    (nn.LayerNorm((4, 4), elementwise_affine=False), IMAGE),
    *[
        (kind(inplace), IMAGE)
        for kind in (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.SiLU)
        for inplace in (False, True)
    ],
]


class Recorder(TorchDispatchMode):
    """Notes every ATen call that computes something."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.empty.memory_format:
            self.seen.append((func, args, out))
        return out


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b
    if isinstance(a, (tuple, list)):
        return list(a) == list(b)
    return a == b


def recorded(function: Any, *args: Any) -> tuple[Any, tuple[Any, ...], Any]:
    with torch.no_grad(), Recorder() as recorder:
        function(*args)
    (only,) = recorder.seen
    return only


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v) if isinstance(v, nn.Module) else "")
def test_a_layer_makes_the_call_that_the_table_says(layer: nn.Module, shape: tuple[int, ...]) -> None:
    meta = layer.to("meta")
    x = torch.empty(shape, device="meta")
    call = call_of(meta, x)
    assert call is not None
    func, args, _ = recorded(meta, x)
    assert func is call[0]
    defaults = [a.default_value for a in func._schema.arguments[len(args) :]]  # which torch leaves out at the end
    assert all(same(a, b) for a, b in zip([*args, *defaults], call[1], strict=False))
    assert len(call[1]) >= len(args)


def test_every_layer_of_the_table_is_tested() -> None:
    assert set(CALLS) == {type(layer) for layer, _ in LAYERS} | {nn.Linear}  # of which torch makes several calls


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8, bias=False)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.5), nn.Linear(12, 8), nn.Identity())
        self.over_tokens, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj((q @ k.transpose(-2, -1) @ v).transpose(1, 2).reshape(b, n, c))
        x = self.proj(x + self.mlp(x))
        return self.head(self.over_tokens(x.transpose(1, 2)).mean(1))


def test_the_table_only_saves_time(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = fxprune.trace(Tokens().eval(), torch.randn(2, 6, 8))
    fast = fxprune.couple(traced)
    monkeypatch.setattr(interpreting, "call_of", lambda *args: None)
    monkeypatch.setattr(interpreting, "call_of_torch_function", lambda *args: None)
    monkeypatch.setattr(interpreting, "is_identity", lambda module: False)
    slow = fxprune.couple(traced)
    assert fast.num_channels == slow.num_channels
    for a, b in zip(fast.sites, slow.sites, strict=True):
        assert (a.name, a.dim) == (b.name, b.dim)
        assert np.array_equal(a.channels, b.channels)
    assert [(f.node, f.reason) for f in fast.fixed] == [(f.node, f.reason) for f in slow.fixed]
    everything = np.ones(fast.num_channels, dtype=bool)
    assert fast.costs(everything) == slow.costs(everything)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_function_makes_the_call_that_the_table_says(function: Any) -> None:
    count = 1 if function.__name__ in ("relu", "sigmoid") else 2
    operands = [torch.empty(IMAGE, device="meta") for _ in range(count)]
    call = call_of_function(function, operands)
    assert call is not None
    func, args, _ = recorded(function, *operands)
    assert func is call[0]
    assert all(same(a, b) for a, b in zip(args, call[1], strict=True))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [(((2, 3),), {"keepdim": True}), (([1, -1],), {}), ((-1, True), {}), ((), {"dim": 2})],
)
@pytest.mark.parametrize("function", [torch.mean, Tensor.mean])
def test_a_mean_makes_the_call_that_the_table_says(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    x = torch.empty(IMAGE, device="meta")
    call = call_of_torch_function(function, (x, *args), kwargs)
    assert call is not None
    func, given, _ = recorded(lambda: function(x, *args, **kwargs))
    assert func is call[0]
    assert all(same(a, b) for a, b in zip([*given, False], call[1], strict=False))


def test_unusual_calls_of_functions_are_run() -> None:
    x, state = torch.empty(IMAGE), torch.empty(8)
    assert call_of_torch_function(torch.mean, (x,), {}) is None
    assert call_of_torch_function(torch.mean, (x, 1), {"dtype": torch.float64}) is None
    assert call_of_torch_function(torch.mean, (x,), {"axis": 1}) is None
    assert call_of_torch_function(torch.mean, (), {"input": x}) is None
    assert call_of_torch_function(F.batch_norm, (x, state, state), {"training": True}) is None
    assert call_of_torch_function(F.batch_norm, (x, None, None), {}) is None
    assert call_of_torch_function(F.relu, (x.long(),), {}) is None
    assert call_of_torch_function(F.tanh, (x,), {}) is None


def test_a_batch_norm_by_name_makes_the_call_that_the_table_says() -> None:
    x, mean, var = torch.empty(IMAGE, device="meta"), torch.empty(8, device="meta"), torch.empty(8, device="meta")
    named = {"running_mean": mean, "running_var": var, "eps": 0.5}
    call = call_of_torch_function(F.batch_norm, (x,), named)
    assert call is not None
    func, given, _ = recorded(lambda: F.batch_norm(x, **named))
    assert func is call[0]
    assert all(same(a, b) for a, b in zip(given, call[1], strict=True))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 4, 3, padding="same"), IMAGE),
        (nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"), IMAGE),
        (nn.Conv2d(8, 4, 3), (8, 4, 4)),
        (nn.BatchNorm2d(8), IMAGE),
        (nn.BatchNorm2d(8, track_running_stats=False).eval(), IMAGE),
        (nn.AdaptiveAvgPool2d(2), IMAGE),
        (nn.AvgPool2d(2, divisor_override=3), IMAGE),
        (nn.AvgPool2d(2), (8, 4, 4)),
        (nn.MaxPool2d(2, return_indices=True), IMAGE),
        (nn.Linear(8, 4), (8,)),
        (nn.LayerNorm(8), IMAGE),
        (nn.Tanh(), IMAGE),
    ],
    ids=str,
)
def test_unusual_layers_are_run(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert call_of(layer, torch.empty(shape)) is None


def test_layers_with_hooks_are_run() -> None:
    layer = nn.ReLU()
    layer.register_forward_hook(lambda module, args, out: out + 1)
    assert call_of(layer, torch.empty(IMAGE)) is None


def test_functions_of_numbers_and_integers_are_run() -> None:
    assert call_of_function(operator.add, [torch.empty(2), 1]) is None
    assert call_of_function(operator.add, [torch.ones(2, dtype=torch.int64)] * 2) is None
    assert call_of_function(operator.add, [torch.empty(2), torch.empty(2, dtype=torch.float64)]) is None


class OwnBatchNorm(nn.BatchNorm2d):
    """Asks for the mode, and so is a leaf."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), OwnBatchNorm(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.b(self.norm(self.a(x))), 0.1, self.training)


def test_only_modules_that_make_calls_keep_their_shape_for_certain() -> None:
    model, x = Normed().eval(), torch.randn(2, 3, 4, 4)
    assert fxprune.couple(fxprune.trace(model, x)).record.keeps_shape == {"norm"}  # not what answers `self.training`
    slim = fxprune.compile(model, x, fxprune.Budget(macs=0.5), progress=False)
    assert fxprune.report(slim).verification.passed
