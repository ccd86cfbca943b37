"""The one call: a network with three tasks, its report, and one clear error for each bad input."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from small import Chain, Multitask, Residual, settled
from torch import Tensor, fx, nn

import fxprune
from fxprune import Budget, Constraints, Task, methods

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def tasks() -> dict[str, Task]:
    return {
        "seg": Task(lambda out, batch: F.cross_entropy(out["seg"], batch[1]["seg"]), tolerance=10.0),
        "depth": Task(lambda out, batch: F.l1_loss(out["depth"], batch[1]["depth"])),
        "present": Task(lambda out, batch: F.binary_cross_entropy_with_logits(out["present"], batch[1]["present"])),
    }


def batches(count: int = 2) -> list[tuple[Tensor, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(4, 3, 8, 8, generator=generator),
            {
                "seg": torch.randint(0, 4, (4, 8, 8), generator=generator),
                "depth": torch.randn(4, 1, 8, 8, generator=generator),
                "present": torch.randint(0, 2, (4, 6), generator=generator).float(),
            },
        )
        for _ in range(count)
    ]


METHODS = [
    None,
    methods.Joint(compensate=False),
    methods.Magnitude(p=1.0),
    methods.Taylor(),
    methods.BatchNormScale(scope="global"),
    methods.Random(seed=3),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_one_call_on_three_tasks(method: Any) -> None:
    model = settled(Multitask())
    slim = fxprune.compile(
        model, X, Budget(macs=0.5), method=method, calibration=batches(), tasks=tasks(),
        constraints=Constraints(multiple_of=2, keep_outputs=["seg.0"]), progress=False,
    )  # fmt: skip
    assert isinstance(slim, fx.GraphModule)
    report = fxprune.report(slim)
    assert 0.3 < report.costs.share("macs") <= 0.5
    assert report.verification is not None
    assert report.verification.worst < 1e-9
    assert set(report.verification.errors) == {"seg", "depth", "present"}
    assert report.method == repr(method or methods.Joint())
    assert report.budget == {"macs": 0.5}
    assert report.frontend == "symbolic_trace"
    assert slim.get_submodule("seg.0").out_channels == 16
    assert all(group.after % 2 == 0 for group in report.groups)
    out, dense = slim(X), model(X)
    assert {name: t.shape for name, t in out.items()} == {name: t.shape for name, t in dense.items()}


def test_the_report_tells_what_was_done() -> None:
    slim = fxprune.compile(settled(Multitask()), X, Budget(macs=0.5, params=0.6), progress=False)
    report = fxprune.report(slim)
    assert report.costs.after.params == sum(p.numel() for p in slim.parameters())
    assert sum(group.after for group in report.groups) < sum(group.before for group in report.groups)
    assert {group.name for group in report.groups} >= {"trunk.0.weight", "seg.0.weight"}
    reasons = " ".join(row.reason for row in report.frozen)
    assert "is an output of the network" in reasons
    assert [row.channels for row in report.frozen] == sorted((row.channels for row in report.frozen), reverse=True)
    text = str(report)
    for words in (
        "Magnitude",
        "macs=0.5, params=0.6",
        "groups keep",
        "what could not go",
        "slim(x) against masked(x)",
        "equal",
    ):
        assert words in text


def test_the_report_is_json_and_html() -> None:
    slim = fxprune.compile(settled(Multitask()), X, Budget(macs=0.5), progress=False)
    report = fxprune.report(slim)
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert data["costs"]["before"]["macs"] == report.costs.before.macs
    assert data["verification"]["passed"] is True
    assert len(data["groups"]) == len(report.groups)
    page = report._repr_html_()
    assert page.count("<table") == page.count("</table>") == 3
    assert "trunk.0.weight" in page
    assert "<lambda>" not in page


def test_without_verification_nothing_runs_on_the_original() -> None:
    model = settled(Multitask())
    convolve = torch.ops.aten.convolution.default
    values: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is convolve:
                values.append(args[0].device.type)
            return func(*args, **(kwargs or {}))

    with mock.patch.object(nn.Conv2d, "forward", autospec=True, side_effect=nn.Conv2d.forward) as forward, Watch():
        slim = fxprune.compile(model, X, Budget(macs=0.5), verify=False, progress=False)
    own = {id(m) for m in model.modules()}
    assert not [call for call in forward.call_args_list if id(call.args[0]) in own]
    assert set(values) <= {"meta"}
    report = fxprune.report(slim)
    assert report.verification is None
    assert "not verified: `verify=False`" in str(report)
    assert "not verified" in report._repr_html_()
    assert report.to_dict()["verification"] is None


def test_verification_does_run_the_original() -> None:
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution.default:
                seen.append((args[0].device.type, args[0].dtype))
            return func(*args, **(kwargs or {}))

    seen: list[tuple[str, torch.dtype]] = []
    with Watch():
        fxprune.compile(settled(Chain()), X, Budget(macs=0.5), progress=False)
    assert seen.count(("cpu", torch.float64)) == 4  # two convolutions, masked and slim


def test_progress_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    fxprune.compile(settled(Chain()), X, Budget(macs=0.5), progress=False)
    assert capsys.readouterr() == ("", "")
    fxprune.compile(settled(Chain()), X, Budget(macs=0.5))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "5/5" in captured.err


def test_compiling_is_the_five_steps() -> None:
    model = settled(Residual())
    slim = fxprune.compile(model, X, Budget(macs=0.5), progress=False)
    coupling = fxprune.couple(fxprune.trace(model, X))
    plan = fxprune.plan(coupling, Budget(macs=0.5))
    by_hand = fxprune.rewrite(coupling, plan)
    assert fxprune.verify(coupling, plan, by_hand).errors == fxprune.report(slim).verification.errors  # type: ignore[union-attr]
    assert all(torch.equal(t, by_hand.state_dict()[name]) for name, t in slim.state_dict().items())
    assert str(slim.graph) == str(by_hand.graph)


def test_a_slim_network_can_be_compiled_again() -> None:
    once = fxprune.compile(settled(Residual(32)), X, Budget(macs=0.5), progress=False)
    twice = fxprune.compile(once, X, Budget(macs=0.5), progress=False)
    assert fxprune.report(twice).costs.before == fxprune.report(once).costs.after
    assert fxprune.report(twice).costs.share("macs") <= 0.5
    assert fxprune.report(once).costs.share("macs") > 0.4


def test_a_module_from_elsewhere_has_no_report() -> None:
    with pytest.raises(fxprune.FxPruneError, match=r"this Chain carries no record of fxprune"):
        fxprune.report(Chain())


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError("not on my watch")


class Singular(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(self.a(x))


HALF = Budget(macs=0.5)
TOKENS = torch.zeros(2, 3, 8)
NO_STEM = Constraints(keep_inputs=["stem*"])
BAD: dict[str, tuple[Any, Any, Any, dict[str, Any], type[Exception], str]] = {
    "budget out of reach": (
        Chain,
        X,
        Budget(macs=1e-6),
        {},
        fxprune.PlanError,
        "cannot be met.*macs: at most.*is the least",
    ),
    "no budget": (Chain, X, None, {}, fxprune.PlanError, r"the budget is None.*Budget\(macs=0\.5\)"),
    "a number as budget": (Chain, X, 0.5, {}, fxprune.PlanError, r"the budget is 0\.5"),
    "no example inputs": (Chain, None, HALF, {}, fxprune.TraceError, "no tensor in the example inputs"),
    "two inputs too many": (Chain, (X, X, X), HALF, {}, fxprune.TraceError, "do not fit `Chain.forward"),
    "inputs of the wrong shape": (Chain, torch.zeros(2, 4, 8, 8), HALF, {}, fxprune.TraceError, "conv1"),
    "a model that raises": (Raising, X, HALF, {}, fxprune.TraceError, "not on my watch"),
    "no model": (lambda: "resnet18", X, HALF, {}, fxprune.TraceError, "the model is a str, not a torch.nn.Module"),
    "a pattern for nothing": (
        Chain,
        X,
        HALF,
        {"constraints": NO_STEM},
        fxprune.PlanError,
        r"'stem\*' matches no layer",
    ),
    "a method without its data": (Chain, X, HALF, {"method": methods.Taylor()}, fxprune.PlanError, "needs calibration"),
    "an unknown op": (Singular, TOKENS, HALF, {"unknown": "error"}, fxprune.CouplingError, "svd.* at node 'linalg"),
    "a word for unknown": (Chain, X, HALF, {"unknown": "skip"}, fxprune.CouplingError, "neither 'freeze' nor 'error'"),
    "nothing that may go": (Singular, TOKENS, HALF, {}, fxprune.PlanError, "cannot be met"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_its_error(case: str) -> None:
    make, inputs, budget, settings, kind, words = BAD[case]
    with pytest.raises(kind) as caught:
        fxprune.compile(make(), inputs, budget, progress=False, **settings)
    assert isinstance(caught.value, fxprune.FxPruneError)
    assert caught.match("(?s)" + words)


PROJECTED = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # what torch says, running one


class Recurrent(nn.Module):
    """A module that can lose nothing: of its 9 hidden units it needs more than the 8 it projects them to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm = nn.Linear(8, 16), nn.LSTM(16, 9, batch_first=True, proj_size=8)
        self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(x + self.lstm(self.first(x))[0])))


@PROJECTED
def test_a_frozen_module_is_named_by_its_class() -> None:
    slim = fxprune.compile(Recurrent(), TOKENS, Budget(macs=0.9), progress=False)
    (note,) = fxprune.report(slim).notes
    assert note.startswith("node 'lstm' was frozen: is an nn.LSTM, whose sizes cannot be rewritten yet (")
    assert any(row.reason.startswith("is an nn.LSTM, whose") for row in fxprune.report(slim).frozen)


@PROJECTED
def test_a_plan_that_fails_after_nodes_were_frozen_names_them() -> None:
    with pytest.raises(fxprune.PlanError) as caught:
        fxprune.compile(Recurrent(), TOKENS, Budget(macs=0.3), progress=False)
    for words in ("cannot be met", "These nodes were frozen before", "node 'lstm'", "is an nn.LSTM, whose sizes"):
        assert words in str(caught.value)


@PROJECTED
def test_calibration_that_can_be_read_once_lasts_for_all_rounds() -> None:
    data = [torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    size = {"size": Task(lambda outputs, batch: outputs.pow(2).mean())}
    slim = fxprune.compile(
        Recurrent(), TOKENS, Budget(macs=0.9), method=methods.Taylor(), calibration=iter(data), tasks=size,
        progress=False,
    )  # fmt: skip
    assert "lstm" in fxprune.report(slim).notes[0]  # planned twice
