"""What is followed of a user's module is what running it does; where that is not certain, it is run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fxprune
from fxprune import interpreting
from fxprune.calling import _ACTIVATIONS, call_of_torch_function
from fxprune.following import follow

IMAGE = torch.empty(2, 8, 4, 4, device="meta")


class Recorder(TorchDispatchMode):
    """Notes every ATen call that computes something."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.empty.memory_format:
            self.seen.append((func, args))
        return out


class Norm(nn.BatchNorm2d):
    """A batch norm with its activation, as in timm."""

    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__(width)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4 dims, got {x.ndim}")
        training = self.training or self.running_mean is None
        mean, var = self.running_mean, self.running_var
        return self.act(F.batch_norm(x, mean, var, self.weight, self.bias, training, 0.1, self.eps))


class CatchesAll(Norm):
    """Does something else where a function fails."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x.tanh())
        except Exception:
            return super().forward(x)


class Counts(Norm):
    """Writes to a buffer whatever the mode is."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        return super().forward(x)


class Reads(Norm):
    """Asks for a value."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.running_mean[0] < 1 else -x)


class Remembers(Norm):
    """Holds on to what came in."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return super().forward(x)


class Pair(Norm):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


@pytest.mark.parametrize("function", _ACTIVATIONS)
@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_makes_the_call_that_the_table_says(function: Any, inplace: bool) -> None:
    x = IMAGE.clone()
    with Recorder() as recorder:
        function(x, inplace=inplace)
    call = call_of_torch_function(function, (x,), {"inplace": inplace})
    assert call is not None
    assert [call[0]] == [func for func, _ in recorder.seen]
    assert call[1][0] is recorder.seen[0][1][0] is x


@pytest.mark.parametrize(
    "act", [nn.Identity(), nn.ReLU(inplace=True), nn.SiLU(), nn.Sigmoid(), nn.Hardswish()], ids=str
)
def test_the_calls_of_a_batch_norm_are_those_that_running_it_makes(act: nn.Module) -> None:
    norm = Norm(8, act).eval()
    found = follow(norm, IMAGE)
    assert found is not None
    value, made = found
    twin, x = Norm(8, act).eval().to("meta"), IMAGE.clone()
    with torch.no_grad(), Recorder() as recorder:
        result = twin(x)
    assert (value.shape, value.dtype) == (result.shape, result.dtype)
    assert [func for (func, _), _ in made] == [func for func, _ in recorder.seen]
    (_, args), _ = made[0]
    names = {id(t): name for m in (norm, twin) for name, t in m.state_dict(keep_vars=True).items()}
    mine, theirs = ([names.get(id(a)) for a in given[1:5]] for given in (args, recorder.seen[0][1]))
    assert mine == theirs == ["weight", "bias", "running_mean", "running_var"]
    assert list(args[5:]) == list(recorder.seen[0][1][5:])


@pytest.mark.parametrize("kind", [CatchesAll, Counts, Reads, Pair])
def test_what_is_not_certain_is_run(kind: type[Norm]) -> None:
    norm = kind(8, nn.ReLU()).eval()
    assert follow(norm, IMAGE) is None
    assert not norm.num_batches_tracked


def test_batch_norms_in_training_and_activations_without_a_call_are_run() -> None:
    assert follow(Norm(8, nn.ReLU()).train(), IMAGE) is None
    assert follow(Norm(8, nn.Softmax(1)).eval(), IMAGE) is None
    assert follow(Norm(4, nn.ReLU()).eval(), IMAGE) is None  # of another width: running it says what is wrong
    assert follow(Norm(8, nn.ReLU()).eval(), IMAGE[0]) is None


def test_modules_with_hooks_inside_are_run() -> None:
    norm = Norm(8, nn.ReLU()).eval()
    norm.act.register_forward_hook(lambda module, args, out: out + 1)
    assert follow(norm, IMAGE) is None


def test_the_module_is_not_touched() -> None:
    norm = Remembers(8, nn.ReLU()).eval()
    assert follow(norm, IMAGE) is not None
    assert "last" not in vars(norm)


class Net(nn.Module):
    def __init__(self, kind: type[Norm]) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, bias=False), kind(8, nn.ReLU(inplace=True))
        self.b, self.m = nn.Conv2d(8, 8, 3, padding=1), kind(8, nn.SiLU(inplace=True))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n(self.a(x))
        return self.head((x + self.m(self.b(x))).mean((2, 3)))


@pytest.mark.parametrize("kind", [Norm, CatchesAll, Remembers])
def test_following_only_saves_time(kind: type[Norm], monkeypatch: pytest.MonkeyPatch) -> None:
    traced = fxprune.trace(Net(kind).eval(), torch.randn(2, 3, 6, 6))
    fast = fxprune.couple(traced)
    monkeypatch.setattr(interpreting, "follow", lambda *args: None)
    slow = fxprune.couple(traced)
    assert [s.name for s in fast.sites] == [s.name for s in slow.sites]
    assert all(np.array_equal(a.channels, b.channels) for a, b in zip(fast.sites, slow.sites, strict=True))
    assert [(f.node, f.reason) for f in fast.fixed] == [(f.node, f.reason) for f in slow.fixed]
    assert fast.record.keeps_shape == slow.record.keeps_shape
    for keep in (np.ones(fast.num_channels, dtype=bool), np.arange(fast.num_channels) % 2 == 0):
        assert fast.costs(keep) == slow.costs(keep)
