"""The parts of the benchmark of greedy pruning that are quick to check."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from two_tasks import trained

sys.path.append(str(Path(__file__).parent / "benchmarks"))  # its modules import one another, as in the command

from greedy import jobs_for, parse
from greedy_distilling import DISTANCES, TEACHER, distilling, with_answers
from greedy_forwards import convolutions
from greedy_measure import METHODS, Noted, start
from greedy_networks import NETWORKS, OTHERS, greedy_problems
from greedy_report import costs, loss, losses, report
from quality_data import Table
from quality_measure import DENSE
from quality_problems import problems

import fxprune
from fxprune.methods import HBGS, HBGTS


@pytest.mark.parametrize("method", [HBGS(filters_per_round=6), HBGTS(filters_per_round=6)], ids=repr)
def test_a_noted_search_finds_the_same_and_tells_what_it_took(method):
    _, data, coupling = trained()
    noted = Noted(method)
    plans = [fxprune.plan(coupling, fxprune.Budget(macs=0.5), method=m, calibration=data) for m in (method, noted)]
    assert plans[0].groups == plans[1].groups
    (found,) = noted.found
    spent = noted.spent()
    assert spent["rounds"] == len(found.commits) > 2
    assert spent["published"] > spent["rounds"]
    assert 0 < spent["forwards"] <= spent["evaluations"]
    assert spent == {"rounds": len(found.commits)} | {n: getattr(found, n) for n in spent if n != "rounds"}


def test_distillation_adds_the_divergence_at_temperature_2():
    problem = distilling(greedy_problems(quick=True)["resnet20"])
    logits, teacher, labels = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 2.0], [0.0, 4.0]]), [0, 1]
    batch = (torch.zeros(2, 1), {"digit": torch.tensor(labels), TEACHER: teacher})
    p = 1 / (1 + math.e)  # of the first class, for the teacher's first image; the second image's answers are the same
    expected = (p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)) / 2
    assert problem.losses[TEACHER](logits, batch).item() == pytest.approx(expected, rel=1e-5)
    cross = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-4))) / 2
    assert problem.loss(logits, batch).item() == pytest.approx(expected + cross, rel=1e-5)


def test_a_teacher_answers_in_the_order_of_the_images():
    table = Table(torch.arange(300.0)[:, None], {"digit": torch.arange(300)})
    found = with_answers(table, torch.nn.Linear(1, 1).train())
    assert found.targets.keys() == {"digit", TEACHER}
    assert torch.equal(found.targets["digit"], table.targets["digit"])
    steps = found.targets[TEACHER].diff(dim=0)
    assert torch.allclose(steps, steps[0].expand_as(steps), atol=1e-4)
    assert not found.targets[TEACHER].requires_grad


@pytest.mark.parametrize("name", list(DISTANCES))
def test_networks_with_several_heads_learn_from_what_another_answers_with_each(name):
    problem = greedy_problems(quick=True)[name]
    torch.manual_seed(0)
    teacher, other = problem.build().eval(), problem.build().eval()
    table = with_answers(problem.split(problem.recipe.counts).calibration, teacher)
    loss = distilling(problem).losses[TEACHER]
    (batch,) = table.batches(len(table))
    assert {TEACHER + task for task in problem.metrics} == table.targets.keys() - problem.metrics.keys()
    with torch.no_grad():
        same, answers = teacher(batch[0]), other(batch[0])
        assert loss(same, batch).item() == pytest.approx(0, abs=1e-5)
        for task in problem.metrics:
            assert loss(same | {task: answers[task]}, batch) > 1e-4, task


def test_networks_are_what_their_names_say():
    every, known = greedy_problems(quick=False), problems()
    assert tuple(every) == NETWORKS
    for name, build in OTHERS.items():
        network = build().eval()
        with torch.no_grad():
            assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
        layers = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
        shortcuts = [name for name, _ in network.named_modules() if name.endswith("shortcut.0")]
        depth = {"resnet56": 56, "vgg16": 15, "resnext20": 20}[name]  # the VGG has one linear layer less
        assert len(layers) - len(shortcuts) == depth
        assert every[name].name.startswith(f"{name}_")
        assert every[name].recipe == known["resnet20"].recipe
    assert [every[name].name for name in NETWORKS if name not in OTHERS] == [
        "resnet20", "mobilenetv2", "vgg", "scenes", "two-heads",
    ]  # fmt: skip


def test_the_code_of_the_paper_prunes_16_convolutions_of_resnet18():
    assert convolutions(torchvision.models.resnet18()) == 16


def row(method: str, seed: int, tuned: float, budget: float = 0.06, **more: Any) -> dict[str, Any]:
    about = {"network": "vgg16", "seed": seed, "method": method, "budget": budget, "seconds": 9.0 - seed}
    scores = {stage: {"digit": tuned} for stage in ("cut", "refreshed", "tuned")}
    return about | {"macs": budget, "params": 0.1, "command": "run"} | scores | more


def rows() -> list[dict[str, Any]]:
    dense = [
        row(DENSE, seed, 0.99, 1.0, cut={"digit": accuracy}, macs=1_000, params=10)
        for seed, accuracy in ((0, 0.96), (1, 0.95))
    ]
    spent = {"rounds": 12, "evaluations": 70, "forwards": 34.4, "published": 1_200}
    slim = [row("hbgts", 0, 0.95, **spent), row("hbgts", 1, 0.955, **spent), row("joint", 0, 0.95)]
    slim += [row("random", seed, 0.5) for seed in (0, 1)] + [row("hbgs", 0, 0.9, **spent)]
    failed = {
        "network": "vgg16",
        "seed": 0,
        "method": "hbgs",
        "budget": 0.15,
        "error": "PlanError: no",
        "command": "run",
    }
    return [*slim, *dense, failed]


def test_losses_are_against_the_dense_network_of_the_same_seed():
    found = loss(rows(), "hbgts", 0.06)
    assert found is not None
    assert (found.mean, found.spread) == (pytest.approx(0.25), pytest.approx(1.0607, abs=1e-4))  # 1.0 and -0.5
    assert loss(rows(), "hbgts", 0.5) is None
    assert loss([r for r in rows() if r["seed"]], "joint", 0.06) is None
    table = losses(rows())[-1].splitlines()
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == ["vgg16", "0.06", "0.2 ± 1.1", "hbgts", "hbgts"]
    assert len(table) == 3


def test_costs_are_those_of_the_least_busy_seed():
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in costs(rows()[:4]).splitlines()[2:]]
    assert lines[0] == ["hbgts", "0.06", "0.060", "0.100", "8.0", "12", "70", "34", "1,200"]
    assert lines[1] == ["joint", "0.06", "0.060", "0.100", "9.0", "-", "-", "-", "-"]


def test_the_report_tells_every_cell_what_failed_and_what_the_search_took():
    clock = {"couple": [1, 1], "before": [2.0, 3.0], "plan": [100.0, 150.0], "after": [3.0, 5.0]}
    sizes = {"images": 512, "px": 64, "batch": 64, "threads": 2, "groups": 12, "convolutions": 16, "peak": 2e9}
    spent = {"rounds": 200, "evaluations": 900, "forwards": 250.5, "published": 2_300, "stages": clock}
    page = report([*rows(), row("hbgts", 0, 0.0, 0.5, **sizes, **spent) | {"network": "resnet18"}])
    assert "Dense, 2 seed(s): 95.5 ± 0.7, and 99.0 ± 0.0 fine-tuned; 1,000 macs" in page
    assert "95.2 ± 0.4" in page
    assert "PlanError: no" in page
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert ["planning, in runs", "40.0", "37.5"] in lines
    assert ["with what runs between rounds, at most", "452.5"] in lines  # 250.5, 200 and two at first
    assert ["published code: 2 x 16 x 200", "6,400"] in lines
    assert page.count("## resnet18") == 0


def test_jobs_are_those_without_rows_and_a_method_has_all_its_budgets_in_one():
    args = parse(["--networks", "vgg16", "resnet18", "--methods", "hbgs", "joint", "random", "--seeds", "0"])
    there = {("vgg16", 0, DENSE, 1.0): {}, ("vgg16", 0, "hbgs", 0.06): {}}
    there |= {("vgg16", 0, "random", share): {} for share in (0.5, 0.3, 0.15, 0.06)}
    first, then = jobs_for(args, there)
    assert first == []
    assert [(j.method, *j.budgets) for j in then] == [("hbgs", 0.5, 0.3, 0.15), ("joint", 0.5, 0.3, 0.15, 0.06)]
    assert set(parse(["--quick"]).methods) <= set(METHODS)


@pytest.mark.parametrize("name", ["hbgs-backward", "joint"])
def test_what_is_cut_for_one_budget_after_another_is_what_compile_cuts_for_each(name):
    problem = greedy_problems(quick=True)["vgg"]
    torch.manual_seed(0)
    network = problem.build().eval()
    batches = list(problem.split(problem.recipe.counts).calibration.batches(32))
    cut, tasks = start(METHODS[name], network, problem, batches), {"digit": fxprune.Task(problem.loss, target="digit")}
    spent = 0.0
    for share in (0.7, 0.5):
        slim, row = cut(share)
        budget = fxprune.Budget(macs=share)
        alone = fxprune.compile(
            network, batches[0][0][:1], budget, method=METHODS[name], calibration=batches, tasks=tasks, progress=False
        )
        with torch.no_grad():
            assert torch.allclose(slim(batches[0][0]), alone(batches[0][0]), rtol=1e-4, atol=1e-5)
        assert row["seconds"] > (spent if "rounds" in row else 0)  # from the dense network on
        spent = row["seconds"]
