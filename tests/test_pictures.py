"""Pictures of groups, plans, sensitivities and sweeps: what they show is what was found."""

from __future__ import annotations

import base64
import re
import sys
from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from small import Chain, Multitask, Residual, settled
from torch import Tensor, nn

import fxprune
from fxprune import ArtifactError, Budget, CouplingError, FxPruneError, PlanError, Task, methods
from fxprune.cards import cards_of, find_group, fold
from fxprune.charts import percent
from fxprune.sensing import Sensitivity

ARROW = "\N{RIGHTWARDS ARROW}"


def batch(seed: int, size: int = 16) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 8, 8, generator=generator)
    targets = {
        "seg": torch.randn(size, 4, 8, 8, generator=generator),
        "present": torch.randn(size, 6, generator=generator),
    }
    return x, targets


def task(name: str) -> Task:
    return Task(lambda outputs, found: F.mse_loss(outputs[name], found[1][name]))


BATCHES = [batch(0), batch(1)]
TASKS = {"seg": task("seg"), "present": task("present")}
BUDGETS = [Budget(macs=m) for m in (0.8, 0.5, 0.3)]


@pytest.fixture(scope="module")
def coupling() -> fxprune.Coupling:
    torch.manual_seed(0)
    return fxprune.couple(fxprune.trace(settled(Multitask(8)), torch.zeros(2, 3, 8, 8)))


@pytest.fixture(scope="module")
def found(coupling: fxprune.Coupling) -> Sensitivity:
    return fxprune.sensitivity(coupling, calibration=BATCHES, tasks=TASKS, shares=(0.25, 0.5))


@pytest.fixture(scope="module")
def plan(coupling: fxprune.Coupling) -> fxprune.Plan:
    return fxprune.plan(coupling, Budget(macs=0.5), calibration=BATCHES, tasks=TASKS)


@pytest.fixture(scope="module")
def sweep(coupling: fxprune.Coupling) -> fxprune.Sweep:
    return fxprune.sweep(coupling, BUDGETS, calibration=BATCHES, tasks=TASKS)


def named(figure: Figure) -> dict[str, Any]:
    return {a.get_gid(): a for axes in figure.axes for a in axes.get_children() if a.get_gid()}


def words(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


# One group


def test_a_group_shows_every_site_once(coupling: fxprune.Coupling) -> None:
    for group in coupling.groups():
        mine = np.append(np.zeros(coupling.num_channels, dtype=bool), False)
        mine[group.choices] = True
        sites = {(s.name, s.dim) for s in coupling.sites if mine[s.channels].any()}
        shown = [site for card in cards_of(coupling, group) for site in card.sites]
        assert sorted(shown) == sorted(sites)


def test_makers_stand_on_the_left_and_readers_on_the_right() -> None:
    coupling = fxprune.couple(fxprune.trace(Chain().eval(), torch.zeros(1, 3, 8, 8)))
    figure = fxprune.draw_group(coupling, "conv1.weight")
    cards = named(figure)
    assert cards["conv1"].get_x() < cards["bn"].get_x() + cards["bn"].get_width() < 0 < cards["conv2"].get_x()
    assert {"weight, bias, running_mean, running_var [0]", "weight, bias [0]", "weight [1]"} <= set(words(figure))
    assert named(figure)["title"].get_text() == "group 0 of Chain: 16 channels"


def test_ties_are_those_that_explain_names() -> None:
    coupling = fxprune.couple(fxprune.trace(Residual().eval(), torch.zeros(1, 3, 8, 8)))
    group = find_group(coupling, ("stem.weight", 0))
    cards = {card.layer: card for card in cards_of(coupling, group)}
    assert list(cards) == ["stem", "a1", "a2", "b1", "b2", "head"]
    for name in ("a2", "b2"):
        (tie,) = cards[name].ties
        assert f"at node {tie!r}" in coupling.explain("stem.weight", (f"{name}.weight", 0))
        assert "x = x + " in cards[name].sources[0]
    assert not any(cards[name].ties for name in ("stem", "a1", "b1", "head"))
    assert {"tie:add", "tie:add_1"} <= set(named(fxprune.draw_group(coupling, group.index)))


def test_a_parameter_stands_for_what_it_makes() -> None:
    coupling = fxprune.couple(fxprune.trace(Chain().eval(), torch.zeros(1, 3, 8, 8)))
    made, read = (find_group(coupling, ("conv2.weight", dim)) for dim in (0, 1))
    assert made != read
    assert find_group(coupling, "conv2.weight") == made
    assert find_group(coupling, "bn.running_mean") == read


def test_rows_show_the_nodes_that_make_them() -> None:
    coupling = fxprune.couple(fxprune.trace(Residual().eval(), torch.zeros(1, 3, 8, 8)))
    for group in coupling.groups():
        cards = cards_of(coupling, group)
        graph = nx.Graph(coupling.graph.subgraph([site for card in cards for site in card.sites]))
        assert nx.is_connected(graph)


def test_parts_of_a_site_say_how_many_positions() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(10, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    coupling = fxprune.couple(fxprune.trace(Joined(), torch.zeros(1, 3, 4, 4)))
    assert "weight [1] 6 of 10" in words(fxprune.draw_group(coupling, "b.weight"))
    with pytest.raises(CouplingError, match=r"'c.weight' has channels of the groups 0, 1. Name one"):
        fxprune.draw_group(coupling, "c.weight")
    with pytest.raises(CouplingError, match="there is no group 7: the network has 2"):
        fxprune.draw_group(coupling, 7)
    with pytest.raises(CouplingError, match=r"no channel of .* may go\. Ask `coupling.why_frozen"):
        fxprune.draw_group(coupling, ("c.weight", 0))
    with pytest.raises(CouplingError, match=r"no parameter 'd\.weight'"):
        fxprune.draw_group(coupling, "d.weight")


def test_layers_that_repeat_are_one_card() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    coupling = fxprune.couple(fxprune.trace(Deep(), torch.zeros(2, 5)))
    cards, blocks = fold(cards_of(coupling, find_group(coupling, "stem.weight")))
    assert [card.layer for card in cards] == ["stem", "blocks.0\N{EN DASH}4.0", "blocks.0\N{EN DASH}4.1", "head"]
    assert blocks == {1: (2, 5)}
    shown = words(fxprune.draw_group(coupling, "stem.weight", collapse=True))
    assert "\N{MULTIPLICATION SIGN} 5" in shown
    assert len(words(fxprune.draw_group(coupling, "stem.weight", collapse=False))) > len(shown)


def test_a_group_tells_the_width_after(coupling: fxprune.Coupling, plan: fxprune.Plan) -> None:
    for i, group in enumerate(plan.groups):
        title = named(fxprune.draw_group(coupling, i, plan=plan))["title"].get_text()
        change = f"{group.before}" if group.before == group.after else f"{group.before}{ARROW}{group.after}"
        assert title == f"group {i} of Multitask: {change} channels"


# Sensitivities


def test_rises_are_those_of_networks_without_the_channels(coupling: fxprune.Coupling, found: Sensitivity) -> None:
    calibration = fxprune.calibrate(coupling, BATCHES, TASKS)
    paths = methods.Joint().paths(coupling, calibration)
    model = coupling.traced.model
    assert found.tasks == ("seg", "present")
    assert found.rises.shape == (len(coupling.groups()), 2, 2)
    for path in paths:
        for i, share in enumerate(found.shares):
            steps = round(share * len(path.choices))
            keep = np.ones(coupling.num_channels, dtype=bool)
            keep[coupling.members.of(path.choices[:steps].ravel())[0]] = False
            chosen = fxprune.planning.plan_of(coupling, coupling.settle(keep))
            slim = fxprune.rewrite(coupling, chosen).eval()
            fxprune.compensate(coupling, chosen, slim, replace(calibration, batches=None))
            for j, name in enumerate(TASKS):
                expected = _rise(name, model, slim)
                assert found.rises[path.group, i, j] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    untouched = {"seg.0.weight": 1, "present.weight": 0}
    for g, curve in enumerate(found):
        if curve.name in untouched:
            assert np.abs(found.rises[g, :, untouched[curve.name]]).max() < 1e-6


def _rise(name: str, model: nn.Module, slim: nn.Module) -> float:
    """Return the relative rise of a loss, less its slope in the outputs."""
    before, rise = 0.0, 0.0
    for found in BATCHES:
        with torch.no_grad():
            old, new = model(found[0])[name], slim(found[0])[name]
        leaf = old.clone().requires_grad_()
        loss = F.mse_loss(leaf, found[1][name])
        loss.backward()
        assert leaf.grad is not None
        was = loss.item()
        before += was / len(BATCHES)
        rise += (F.mse_loss(new, found[1][name]).item() - was - (leaf.grad * (new - old)).sum().item()) / len(BATCHES)
    return rise / before


def test_curves_are_what_the_method_expects(coupling: fxprune.Coupling, found: Sensitivity) -> None:
    paths = methods.Joint().paths(coupling, fxprune.calibrate(coupling, BATCHES, TASKS))
    assert found.columns == ("seg", "present")
    assert found.comparable
    for path, curve in zip(paths, found, strict=True):
        assert np.allclose(np.diff(curve.errors, axis=0), path.errors)
        assert curve.widths[0] == coupling.groups()[path.group].width
        assert np.array_equal(curve.at(int(curve.widths[2])), curve.errors[2])
    scores = fxprune.sensitivity(coupling, method=methods.Magnitude())
    assert scores.columns == ("error",)
    assert not scores.comparable
    assert scores.tasks == ()
    assert len(scores) == len(found)


def test_without_tasks_the_outputs_count(coupling: fxprune.Coupling) -> None:
    found = fxprune.sensitivity(coupling, calibration=[x for x, _ in BATCHES], method=methods.Magnitude(), samples=4)
    assert found.tasks == ("outputs",)
    assert (found.rises[:, 2] > found.rises[:, 0]).all()
    assert str(found).splitlines()[0].split() == ["group", "first", "site", "width", *_columns("outputs")]
    assert found.to_dict()["groups"][0]["rises"] == found.rises[0].tolist()


def _columns(name: str) -> list[str]:
    return [word for share in ("25%", "50%", "75%") for word in (name, f"-{share}")]


def test_a_share_that_is_no_step_is_not_measured() -> None:
    torch.manual_seed(0)
    coupling = fxprune.couple(fxprune.trace(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3)), torch.zeros(1, 3)))
    found = fxprune.sensitivity(coupling, calibration=[torch.randn(8, 3)], shares=(0.2, 0.5))
    assert np.isnan(found.rises[0, 0, 0])
    assert found.rises[0, 1, 0] > 0
    assert found.to_dict()["groups"][0]["rises"][0] == [None]


def test_sensitivity_says_what_is_wrong(coupling: fxprune.Coupling) -> None:
    with pytest.raises(PlanError, match="PAGCP searches by itself and has no removal paths"):
        fxprune.sensitivity(coupling, method=methods.PAGCP())
    with pytest.raises(PlanError, match="not all between 0 and 1"):
        fxprune.sensitivity(coupling, shares=[0.5, 1.0])
    with pytest.raises(FxPruneError, match=r"nothing was measured\. Pass `calibration=batches`"):
        fxprune.draw_sensitivity(fxprune.sensitivity(coupling))


def test_the_heat_map_shows_the_rises(found: Sensitivity) -> None:
    figure = fxprune.draw_sensitivity(found)
    axes = figure.axes[0]
    expected = found.rises.transpose(0, 2, 1).reshape(len(found), -1)
    assert [t.get_text() for t in axes.texts][: expected.size] == [percent(value) for value in expected.ravel()]
    shades = np.asarray(named(figure)["rises"].get_array())
    order = np.argsort(expected, axis=None)
    assert (np.diff(shades.ravel()[order]) >= 0).all()
    assert 0 <= shades.min() <= shades.max() <= 1
    assert [t.get_text() for t in axes.texts][expected.size :] == ["seg", "present"]
    few = fxprune.draw_sensitivity(found, most=2).axes[0]
    largest = np.sort(np.argsort(-expected.max(axis=1))[:2])
    assert [int(t.get_text().split()[0]) for t in few.get_yticklabels()] == largest.tolist()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (float("nan"), ""),
        (0.0, "0"),
        (0.0012, "0.12%"),
        (0.034, "3.4%"),
        (0.5, "50%"),
        (250.0, "250\N{MULTIPLICATION SIGN}"),
    ],
)
def test_rises_have_few_digits(value: float, text: str) -> None:
    assert percent(value) == text


# Plans


def test_bars_and_dots_are_the_widths_of_the_plan(plan: fxprune.Plan, found: Sensitivity) -> None:
    figure = fxprune.draw_plan(plan, sensitivity=found)
    shown = named(figure)
    for i, group in enumerate(plan.groups):
        assert shown[f"after:{i}"].get_width() == pytest.approx(group.after / group.before)
        assert f"{group.before} {ARROW} {group.after}  ({group.share})" in words(figure)
        for j in range(2):
            curve, cut = shown[f"curve:{i}:{j}"], shown[f"cut:{i}:{j}"]
            assert np.allclose(curve.get_xdata(), found[i].widths / group.before)
            assert (np.diff(curve.get_ydata()) <= 1e-12).all()  # rows run downwards: errors grow upwards
            assert cut.get_xdata()[0] == pytest.approx(group.after / group.before)
            assert cut.get_ydata()[0] == pytest.approx(
                np.interp(cut.get_xdata()[0], curve.get_xdata()[::-1], curve.get_ydata()[::-1]), abs=0.05
            )
    assert len(fxprune.draw_plan(plan).axes) == 1
    assert len([gid for gid in named(fxprune.draw_plan(plan, most=2)) if gid.startswith("after:")]) == 2


def test_scores_run_from_nothing_to_the_whole_of_their_group(coupling: fxprune.Coupling, plan: fxprune.Plan) -> None:
    scores = fxprune.sensitivity(coupling, method=methods.Magnitude())
    shown = named(fxprune.draw_plan(plan, sensitivity=scores))
    for i in range(len(plan.groups)):
        heights = i + 0.4 - shown[f"curve:{i}:0"].get_ydata()
        assert heights[0] == pytest.approx(0)
        assert heights[-1] == pytest.approx(0.85)


def test_plans_of_other_groups_are_refused(plan: fxprune.Plan) -> None:
    other = fxprune.couple(fxprune.trace(Chain().eval(), torch.zeros(1, 3, 8, 8)))
    with pytest.raises(ArtifactError, match=r"the plan has 4 groups and the sensitivity 2, not the same ones"):
        fxprune.draw_plan(plan, sensitivity=fxprune.sensitivity(other))


# Sweeps


def test_lines_are_the_rises_of_the_sweep(sweep: fxprune.Sweep) -> None:
    figure = fxprune.draw_sweep(sweep)
    resources = list(sweep[0].plan.costs.before.to_dict())
    assert [axes.get_xlabel() for axes in figure.axes] == [
        f"$\\bf{{{name}}}$ left, of the dense network" for name in resources
    ]
    for axes, resource in zip(figure.axes, resources, strict=True):
        lines = {line.get_gid(): line for line in axes.lines if line.get_gid()}
        assert set(lines) == set(TASKS)
        for name, line in lines.items():
            points = {(p.plan.costs.share(resource), p.rises[name]) for p in sweep}
            assert set(zip(line.get_xdata(), line.get_ydata(), strict=True)) == points
    assert len(fxprune.draw_sweep(sweep, resources=["macs"]).axes) == 1
    with pytest.raises(FxPruneError, match=r"no resource 'flops'\. It has 'macs'"):
        fxprune.draw_sweep(sweep, resources=["flops"])


def test_a_sweep_without_data_has_nothing_to_draw(coupling: fxprune.Coupling) -> None:
    with pytest.raises(FxPruneError, match=r"the sweep measured no losses\. Pass `calibration=batches`"):
        fxprune.draw_sweep(fxprune.sweep(coupling, BUDGETS))


# Notebooks and files


def test_sweeps_and_sensitivities_show_their_pictures(
    sweep: fxprune.Sweep, found: Sensitivity, monkeypatch: pytest.MonkeyPatch
) -> None:
    for thing in (sweep, found):
        (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', thing._repr_html_())
        assert base64.b64decode(data).startswith(b"\x89PNG")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("fxprune.notebooks.find_spec", lambda name: None)
    assert "<img" not in sweep._repr_html_() + found._repr_html_()
    assert "present" in found._repr_html_()


def test_pictures_are_written(
    coupling: fxprune.Coupling, plan: fxprune.Plan, sweep: fxprune.Sweep, found: Sensitivity, tmp_path: Any
) -> None:
    fxprune.draw_group(coupling, 0, tmp_path / "a" / "group.svg")
    fxprune.draw_plan(plan, tmp_path / "plan.svg")
    fxprune.draw_sensitivity(found, tmp_path / "found.svg")
    fxprune.draw_sweep(sweep, tmp_path / "sweep.svg")
    assert [path.stat().st_size > 1000 for path in tmp_path.rglob("*.svg")] == [True] * 4
