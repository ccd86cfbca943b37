"""Tracing: the graph behaves like the model in both modes, and keeps its signature, its sizes and its source lines."""

from __future__ import annotations

import copy
import functools
from collections import namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from small import Chain, settled
from torch import Tensor, fx, nn

import fxprune
from fxprune import Budget, TraceError
from fxprune.tracing import _symbolic

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def slimmed(model: nn.Module, inputs: Any = X, macs: float = 0.5) -> Any:
    slim = fxprune.compile(model, inputs, Budget(macs=macs), progress=False)
    report = fxprune.report(slim)
    assert report.verification is not None
    assert report.verification.passed
    assert report.costs.share("macs") <= macs
    return slim


def varies(module: nn.Module, *inputs: Any) -> bool:
    """Say whether two runs in a row differ."""
    with torch.no_grad():
        return not torch.equal(module(*inputs), module(*inputs))


# train and eval


class Stochastic(nn.Module):
    """A network with one stochastic op between two layers."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.a, self.op, self.b = nn.Conv2d(3, 16, 1), op, nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.op(torch.sigmoid(self.a(x))))


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=self.training)


class PositionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.inner(x), 0.5, self.training)


class DropPath(nn.Module):
    """As in timm: nothing in eval mode, whole samples dropped in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.5)
        return x * keep / 0.5


STOCHASTIC = [
    nn.Dropout(0.5),
    nn.Dropout2d(0.5),
    nn.AlphaDropout(0.3),
    FunctionalDropout(),
    PositionalDropout(),
    DropPath(),
]


@pytest.mark.parametrize("op", STOCHASTIC, ids=lambda op: type(op).__name__)
@pytest.mark.parametrize("training", [True, False])
def test_stochastic_ops_act_in_train_mode_only(op: nn.Module, training: bool) -> None:
    slim = slimmed(Stochastic(op).train(training))
    assert slim.training == training
    many = torch.randn(32, 3, 8, 8)
    assert varies(slim.train(), many)
    assert not varies(slim.eval(), many)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_uses_batch_statistics_in_train_mode_only(training: bool) -> None:
    model = settled(Chain()).train(training)
    slim = slimmed(model)
    slim.eval()
    before = slim.bn.running_mean.clone()
    slim(X)
    assert torch.equal(before, slim.bn.running_mean)
    slim.train()
    out = slim(X)
    assert not torch.equal(before, slim.bn.running_mean)
    assert not torch.allclose(out, slim.eval()(X))


class TwoPaths(nn.Module):
    """Returns more in train mode than in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        if self.training:
            return self.b(x), self.aux(x)
        return self.b(x)


def test_another_path_in_the_other_mode_is_noted() -> None:
    slim = slimmed(TwoPaths().eval())
    assert isinstance(slim(X), Tensor)
    notes = " ".join(fxprune.report(slim).notes)
    assert "takes another path in the other mode" in notes
    assert "test_tracing.py:" in notes
    assert "aux.weight" in notes
    assert len(slimmed(TwoPaths().train())(X)) == 2


# signature


class Signature(nn.Module):
    """Optional, keyword and plain arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0, extra: Tensor | None = None
    ) -> Tensor:
        y = self.b(F.relu(self.a(x))) * scale
        if mask is not None:
            y = y * mask
        return y if extra is None else y + extra


def test_defaults_are_kept_and_another_value_is_refused() -> None:
    slim = slimmed(Signature())
    assert torch.equal(slim(X), slim(X, None, scale=2.0))
    assert torch.equal(slim(X), slim(x=X))
    with pytest.raises(ValueError, match=r"'mask' was fixed to None when the network was traced"):
        slim(X, torch.ones(4, 1, 8, 8))
    with pytest.raises(
        ValueError, match=r"'scale' was fixed to 2\.0 .* is now 3\.0.*Trace it with an example of 'scale'"
    ):
        slim(X, scale=3.0)


def test_keyword_inputs_stay_inputs() -> None:
    model = Signature()
    slim = slimmed(model, {"x": X, "extra": torch.ones(4, 2, 8, 8), "scale": 3.0})
    zero = slim(X, extra=torch.zeros(4, 2, 8, 8), scale=3.0)
    torch.testing.assert_close(slim(x=X, extra=torch.ones(4, 2, 8, 8), scale=3.0), zero + 1)
    masked = slimmed(model, (X, torch.zeros(4, 1, 8, 8)))
    assert not masked(X, torch.zeros(4, 1, 8, 8)).any()
    assert masked(X, torch.ones(4, 1, 8, 8)).any()


def test_a_slim_network_is_traced_as_any_other() -> None:
    for inputs in (X, {"x": X, "extra": torch.ones(4, 2, 8, 8), "scale": 3.0}):
        slim = slimmed(Signature(), inputs)
        again = slimmed(slim, inputs)
        report = fxprune.report(again)
        assert report.frontend == "symbolic_trace"
        assert not report.notes
        assert sum("expect" in n.name for n in again.graph.nodes) == sum("expect" in n.name for n in slim.graph.nodes)
        with pytest.raises(ValueError, match=r"'mask' was fixed to None"):
            again(X, torch.ones(4, 1, 8, 8))


class Containers(nn.Module):
    """Arguments whose defaults are containers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor, size: list[int] = [4, 4], more: dict[str, float] = {"scale": 2.0}) -> Tensor:  # noqa: B006
        return F.interpolate(self.b(F.relu(self.a(x))), size) * more["scale"]


def test_defaults_may_be_containers() -> None:
    model = Containers()
    assert slimmed(model)(X).shape == (4, 2, 4, 4)
    slim = slimmed(model, {"x": X, "size": [2, 2]})
    assert slim(x=X, size=[2, 2]).shape == (4, 2, 2, 2)
    with pytest.raises(ValueError, match=r"'size' was fixed to \[2, 2\]"):
        slim(X)


def reading(forward: Any) -> Any:
    """Decorate a forward: an option is taken out, and an input is looked up by its name."""

    @functools.wraps(forward)
    def decorated(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        double = kwargs.pop("double", False)
        if "mask" in kwargs:
            kwargs["mask"] = kwargs["mask"] * 0.5
        y = forward(self, *args, **kwargs)
        return y + y if double else y

    return decorated


class Decorated(Signature):
    @reading
    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0, extra: Tensor | None = None, **named: Any
    ) -> Tensor:
        assert not named
        return super().forward(x, mask, scale=scale, extra=extra)


@pytest.mark.parametrize(
    "inputs", [X, {"x": X, "extra": X[:, :2]}, (X, X[:, :1]), {"x": X, "mask": X[:, :1]}, {"x": X, "double": True}]
)
def test_a_decorated_forward_is_called_as_the_examples_are(inputs: Any) -> None:
    model = Decorated()
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    kwargs = inputs if isinstance(inputs, dict) else {}
    assert fxprune.trace(model, inputs).frontend == "symbolic_trace"
    torch.testing.assert_close(slimmed(model, inputs, 1.0)(*args, **kwargs), model(*args, **kwargs))
    slimmed(model, inputs)


class Between(nn.Module):
    """An argument that is given by name alone, behind any number of others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor, *more: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.b(F.relu(self.a(x + more[0] if more else x)))
        return y if mask is None else y * mask


def test_arguments_by_name_come_behind_those_of_open_number() -> None:
    model = Between()
    slim = slimmed(model, (X, X), 1.0)
    torch.testing.assert_close(slim(X, 2 * X), model(X, 2 * X))
    with pytest.raises(ValueError, match=r"'mask' was fixed to None"):
        slim(X, X, mask=X)
    torch.testing.assert_close(slimmed(model, {"x": X, "mask": X}, 1.0)(X, mask=2 * X), model(X, mask=2 * X))


class Inside(nn.Module):
    """A layer that forward makes, and a number that the dtype tells."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(nn.ReLU()(self.a(x)))
        return y.masked_fill(x > 0, torch.finfo(y.dtype).min).softmax(1)


def test_layers_made_by_forward_and_limits_of_dtypes() -> None:
    assert fxprune.trace(Inside(), X).frontend == "symbolic_trace"
    assert slimmed(Inside()).double()(X.double()).dtype == torch.float64


class Various(nn.Module):
    """Arguments whose number and names are open."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor, *more: Tensor, **named: Any) -> Tensor:
        x = x if len(more) == 0 else x + more[0]
        y = self.b(F.relu(self.a(x))) * named.get("scale", 1.0)
        return y + named["bias"] if "bias" in named and len(named) > 0 else y


@pytest.mark.parametrize(
    "inputs", [{"x": X}, {"x": X, "scale": 2.0}, {"x": X, "bias": X, "scale": torch.ones(())}, (X, X)]
)
def test_arguments_of_open_number_and_name(inputs: Any) -> None:
    model = Various().eval()
    slim = slimmed(model, inputs)
    assert fxprune.report(slim).frontend == "symbolic_trace"
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    whole = slimmed(model, inputs, 1.0)
    torch.testing.assert_close(whole(*args, **kwargs), model(*args, **kwargs))
    tasks = {"task": fxprune.Task(lambda y, b: F.mse_loss(y, b[1]))}
    batches = [(inputs, torch.zeros(4, 3, 8, 8))] * 2
    fxprune.compile(model, inputs, Budget(macs=0.5), calibration=batches, tasks=tasks, progress=False)
    with pytest.raises(ValueError, match=r"'sorted\(named\)' was fixed to .* is now \[.*'other'"):
        whole(*args, **kwargs, other=1)


class Pair(NamedTuple):
    """A typed tuple."""

    low: Tensor
    high: Tensor


Loose = namedtuple("Loose", ["low", "high"])


@dataclass
class Record:
    """A dataclass."""

    low: Tensor
    high: Tensor


@dataclass
class Entries(dict[str, Tensor]):
    """A dataclass whose fields are entries of a dict too."""

    low: Tensor
    high: Tensor
    other: Tensor | None = None

    def __post_init__(self) -> None:
        self.update(low=self.low, high=self.high)


FORMS: dict[str, Any] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"low": a, "high": b},
    "nested": lambda a, b: {"low": a, "rest": [b, (a, {"deep": b})]},
    "named": lambda a, b: Pair(a, b),
    "loose": lambda a, b: Loose(low=a, high=b),
    "dataclass": lambda a, b: Record(low=a, high=b),
    "entries": lambda a, b: Entries(low=a, high=b),
}


class Returning(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.a, self.low, self.high = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1), nn.Conv2d(16, 3, 1)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.a(x))
        return FORMS[self.form](self.low(x), self.high(x))


@pytest.mark.parametrize("form", FORMS)
def test_outputs_keep_their_form(form: str) -> None:
    slim = slimmed(Returning(form))
    found, dense = slim(X), Returning(form)(X)
    assert type(found) is type(dense)
    report = fxprune.report(slim)
    assert report.verification is not None
    assert len(report.verification.errors) == (4 if form == "nested" else 2)
    if form in ("dict", "named", "loose", "dataclass", "entries"):
        assert set(report.verification.errors) >= {"low", "high"} or form in ("named", "loose")
        high = found["high"] if form == "dict" else found.high
        assert high.shape == (4, 3, 8, 8)


def test_two_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(1, 16, 1), nn.Conv2d(16, 2, 1)

        def forward(self, image: Tensor, depth: Tensor) -> Tensor:
            return self.out(F.relu(self.a(image) + self.b(depth)))

    slim = slimmed(Two(), (X, X[:, :1]))
    assert slim.a.out_channels == slim.b.out_channels < 16
    assert slim(depth=X[:2, :1], image=X[:2]).shape == (2, 2, 8, 8)


# source lines


def test_nodes_know_their_source_lines() -> None:
    traced = fxprune.trace(Chain(), X)
    assert traced.frontend == "symbolic_trace"
    lines = {n.name: traced.source(n.name) for n in traced.module.graph.nodes if n.op != "placeholder"}
    assert lines["conv1"].startswith("small.py:")
    assert lines["conv1"].endswith("x = F.relu(self.bn(self.conv1(x)))")
    assert "self.head(x.mean((2, 3)))" in lines["mean"]
    assert traced.where("conv1") == f" ({lines['conv1']})"
    assert traced.source("no_such_node") == traced.where("no_such_node") == ""


def test_tracing_shares_the_parameters_and_changes_nothing() -> None:
    model = settled(Chain()).train()
    traced = fxprune.trace(model, X)
    assert traced.model is model
    assert all(a is b for a, b in zip(traced.module.parameters(), model.parameters(), strict=True))
    assert traced.module is not model
    assert all(m.training is True for m in model.modules())


class Asking(nn.Module):
    """Python that asks for the types of values, and uses a number of dims as a key."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 4, 1)

    def join(self, x: Tensor, skip: Tensor | None) -> Tensor:
        return torch.cat([x, skip], 1) if skip is not None and torch.jit.isinstance(skip, Tensor) else x

    def forward(self, x: Any) -> Tensor:
        (x,) = x if isinstance(x, (list, tuple)) else [x]
        y = self.a(x)
        height = y.shape[2]
        side = (height, height) if isinstance(height, int) else height
        return {4: self.b}[y.ndim](self.join(y, y.relu() if torch.is_tensor(y) else None)) + torch.ones(side)


@pytest.mark.parametrize("listed", [False, True])
def test_types_and_numbers_of_dims_are_those_of_the_example(listed: bool) -> None:
    def inputs(batch: int, side: int) -> Any:
        image = torch.randn(batch, 3, side, side)
        return ([image],) if listed else (image,)

    model = settled(Asking())
    slim = slimmed(model, inputs(2, 8))
    assert fxprune.report(slim).frontend == "symbolic_trace"
    assert slim.get_parameter("b.weight").shape[1] < 16
    assert slim(*inputs(1, 6)).shape == model(*inputs(1, 6)).shape


class Checking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(x, 0.5, training=self.training)
        if y.shape[-1] != 8:
            raise ValueError("maps of width 8 are needed")
        return y


def test_a_sequence_may_ask_for_sizes() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 1), Checking(), nn.Conv2d(8, 4, 1)))
    slim = slimmed(model)
    assert fxprune.report(slim).frontend == "symbolic_trace"
    assert varies(slim.train(), X)
    assert not varies(slim.eval(), X)


# torch.export


class DataDependent(nn.Module):
    """Python that symbolic tracing cannot follow: it takes no symbolic values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.c = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 2, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.bn(self.a(x))))
        if isinstance(x, fx.Proxy) or x.shape[1] % 2:
            raise ValueError("maps with an even number of channels are needed")
        for _ in range(int(x.shape[1] > 8)):
            x = torch.sigmoid(self.b(x))
        return self.c(x)


def test_what_symbolic_trace_cannot_do_is_exported() -> None:
    model = settled(DataDependent())
    with pytest.raises(Exception, match="maps with an even number"):
        torch.fx.symbolic_trace(model)
    traced = fxprune.trace(model, X)
    assert traced.frontend == "export"
    slim = slimmed(model)
    assert fxprune.report(slim).frontend == "export"
    assert set(dict(slim.named_parameters())) == set(dict(model.named_parameters()))
    assert dict(slim.named_parameters())["b.weight"].shape[0] < 16
    assert any("torch.export" in note for note in fxprune.report(slim).notes)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_what_exported_batch_norms_do_not_do_is_noted(momentum: float | None) -> None:
    model = DataDependent()
    model.bn.momentum = momentum
    slim = slimmed(settled(model))
    before = slim.bn.running_mean.clone()
    slim.train()(X)
    notes = fxprune.report(slim).notes
    assert slim.bn.num_batches_tracked == 0
    assert "batch norms do not count batches in num_batches_tracked" in notes
    kept = torch.equal(slim.bn.running_mean, before)
    assert kept == ("batch norms with momentum=None keep their running statistics in train()" in notes)
    assert kept == (momentum is None)


class Dividing(nn.Module):
    """Divides by the number of its calls, a buffer that it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)
        self.register_buffer("calls", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)  # pyright: ignore[reportCallIssue]
        return self.b(self.a(x).relu()) / self.calls


def test_gradients_pass_by_buffers_that_an_exported_network_writes_to() -> None:
    slim = slimmed(Dividing().eval())
    slim(X).sum().backward()
    assert slim.calls == 1
    assert slim.b.weight.grad.any()


def test_an_exported_network_keeps_modes_and_batch() -> None:
    slim = slimmed(settled(DataDependent()))
    assert slim.eval()(torch.randn(7, 3, 8, 8)).shape == (7, 2, 8, 8)
    assert not varies(slim, X)
    assert varies(slim.train(), X)


# errors


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the cat sat on the keyboard")


@pytest.mark.parametrize("inputs", [None, (), [], {}, 3, "x", (None, 2)])
def test_no_example_inputs(inputs: Any) -> None:
    with pytest.raises(TraceError, match=r"no tensor in the example inputs.*torch\.randn\(1, 3, 224, 224\)"):
        fxprune.trace(Chain(), inputs)


def test_no_module() -> None:
    with pytest.raises(TraceError, match=r"the model is a function, not a torch\.nn\.Module"):
        fxprune.trace(lambda x: x, X)  # type: ignore[arg-type]


@pytest.mark.parametrize("inputs", [(X, X), {"y": X}, {"x": X, "y": X}])
def test_inputs_that_do_not_fit_the_signature(inputs: Any) -> None:
    with pytest.raises(TraceError, match=r"do not fit `Chain\.forward\(x: .*`: "):
        fxprune.trace(Chain(), inputs)


@pytest.mark.parametrize("inputs", [torch.randn(4, 5, 8, 8), torch.randn(4, 3), torch.randint(0, 3, (4, 3, 8, 8))])
def test_inputs_of_the_wrong_shape_or_kind(inputs: Tensor) -> None:
    with pytest.raises(TraceError) as caught:
        fxprune.compile(Chain(), inputs, Budget(macs=0.5), progress=False)
    message = str(caught.value)
    assert "Chain" in message or "conv1" in message
    assert "example inputs" in message


class Mapped(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(super().forward)(x[:, None])[:, 0]


def test_vmap_is_refused_and_leaves_nothing_open() -> None:
    with pytest.raises(TraceError, match=r"forward calls torch\.vmap \(test_tracing\.py:\d+\).*whole batches"):
        fxprune.compile(settled(Mapped()), X, Budget(macs=0.5), progress=False)
    torch.randn(2)  # refuses inside of torch.vmap


def test_a_model_that_does_not_run() -> None:
    with pytest.raises(TraceError, match=r"'?b'?.*(test_tracing\.py|expected input)"):
        fxprune.compile(Broken(), X, Budget(macs=0.5), progress=False)


def test_a_model_that_raises_carries_its_own_words() -> None:
    with pytest.raises(TraceError) as caught:
        fxprune.trace(Raising(), X)
    assert str(caught.value).count("the cat sat on the keyboard") == 2  # once for each way to trace
    assert "Raising cannot be traced" in str(caught.value)
    assert caught.value.__cause__ is not None


ON_DATA = {
    "item": lambda x, y: y / y.abs().max().item(),
    "nonzero": lambda x, y: (y, torch.nonzero(x[:, 0])),
    "index": lambda x, y: y[x[:, 0, 0, 0] > 0],
    "masked_select": lambda x, y: y.masked_select(y > 0),
    "bincount": lambda x, y: (y, torch.bincount(y.argmax(1).flatten())),
    "unique": lambda x, y: (y, torch.unique(y)),
}


class OnData(nn.Module):
    def __init__(self, use: Any) -> None:
        super().__init__()
        self.a, self.b, self.use = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), use

    def forward(self, x: Tensor) -> Any:
        return self.use(x, self.b(self.a(x)))


@pytest.mark.parametrize("op", ON_DATA)
def test_what_depends_on_the_data_is_called_that(op: str) -> None:
    """The model runs on the example inputs, so they are not to blame."""
    with pytest.raises(TraceError, match=rf"cannot be followed: at node .*{op}.* that depends on the data") as caught:
        fxprune.couple(fxprune.trace(OnData(ON_DATA[op]), X))
    assert "example inputs" not in str(caught.value)


def test_a_model_that_compiles_itself() -> None:
    model = Signature()
    model.compile(backend="eager")
    model.a.compile(backend="eager")
    slim = slimmed(model)
    report = fxprune.report(slim)
    assert report.frontend == "symbolic_trace"
    assert not report.notes
    torch.testing.assert_close(slimmed(model, X, 1.0)(X), model(X))


class Holding(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


@pytest.mark.parametrize("where", ["around", "inside", "both"])
def test_wrappers_of_torch_compile_come_off(where: str) -> None:
    inner = Signature()
    model: Any = Holding(inner if where == "around" else torch.compile(inner, backend="eager"))
    names = {name.replace("_orig_mod.", "") for name in model.state_dict()}
    model = model if where == "inside" else torch.compile(model, backend="eager")
    slim = slimmed(model)
    report = fxprune.report(slim)
    assert report.frontend == "symbolic_trace"
    assert [note[:29] for note in report.notes] == ["torch.compile was taken off b"]
    assert set(slim.state_dict()) == names
    whole = slimmed(model, X, 1.0)
    torch.testing.assert_close(whole(X), model(X))
    assert fxprune.trace(model, X).root.get_parameter("last.weight") is model.last.weight


@torch.fx.wrap
def copied(x: Tensor) -> Tensor:
    return copy.deepcopy(x * 2)


@torch.fx.wrap
def generator(x: Tensor) -> torch.Generator:
    """What cannot be copied, and is noted down of the run."""
    return torch.Generator().manual_seed(len(x))


class Copying(Chain):
    def forward(self, x: Tensor) -> Tensor:
        generator(x)
        return super().forward(copied(x))


def test_a_tensor_that_forward_copies_takes_no_record_along() -> None:
    coupling = fxprune.couple(_symbolic(Copying(), (X,), {}, False))
    assert "copied" in [n.name for n in coupling.traced.graph.nodes]
    assert not coupling.record.unknown
