"""The parts of the benchmark of merging that are quick to check."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent / "benchmarks"))  # its modules import one another, as in the command

from merging import measure, prepared
from merging_report import DENSE, all_least, all_most, bound, least, references, report
from merging_tasks import ATTRIBUTES, SETS, TASKS, data, intersection_over_union, recipe, scene_table, single, subsets

from fxprune.examples.scenes import BACKGROUND, compose, split_digits


def test_targets_are_those_of_the_scenes():
    digits = split_digits()[1]
    table, made = scene_table(digits, 40, (3,)), compose(digits, 40, (3,))
    assert torch.equal(table.inputs, made.images)
    assert table.targets.keys() == TASKS.keys()
    assert torch.equal(table.targets["segmentation"], made.segmentation[:, ::2, ::2])
    assert (table.targets["segmentation"] == BACKGROUND).any()
    segments = [{0, 2, 3, 5, 6, 7, 8, 9}, {0, 4, 5, 6, 8, 9}, {0, 1, 2, 3, 4, 7, 8, 9}, {2, 3, 4, 5, 6, 8, 9},
                {0, 2, 6, 8}, {0, 1, 3, 4, 5, 6, 7, 8, 9}, {0, 2, 3, 5, 6, 8, 9}]  # fmt: skip
    dashes = [{0, 6, 7, 8, 9}, {0, 1, 7, 8, 9}, {0, 1, 2, 8, 9}, {0, 1, 2, 3, 9}, {0, 1, 2, 3, 4}]
    asked = {
        "binary": [{d for d in range(10) if d & bit} for bit in (8, 4, 2, 1)],
        "gray": [{8, 9}, {4, 5, 6, 7, 8, 9}, {2, 3, 4, 5}, {1, 2, 5, 6, 9}],
        "segments": segments,
        "morse": dashes,
        "number": [{0, 1, 4, 9}, {2, 3, 5, 7}, {0, 3, 6, 9}, {5, 6, 7, 8, 9}],
    }
    assert asked.keys() == ATTRIBUTES.keys() == SETS["attributes"].keys()
    classes = table.targets["segmentation"]
    for name, sets in asked.items():
        assert torch.equal(table.targets[name][:, 0] > 0, classes != BACKGROUND)
        assert table.targets[name].shape[1] == 1 + len(sets)
        for i, having in enumerate(sets, 1):
            assert torch.equal(table.targets[name][:, i] > 0, torch.isin(classes, torch.tensor(sorted(having))))


def test_the_union_of_an_attribute_is_over_all_scenes():
    logits = torch.tensor([[[[1.0, -1.0]], [[1.0, 1.0]]], [[[1.0, 1.0]], [[-1.0, -1.0]]]])
    present = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]], [[[1.0, 0.0]], [[0.0, 1.0]]]])
    assert intersection_over_union(logits, present) == pytest.approx((2 / 3 + 0 / 3) / 2)


@pytest.mark.parametrize("name", TASKS)
def test_a_network_returns_what_its_task_reads(name):
    problem, table = single(name, recipe(quick=True)), scene_table(split_digits()[1], 3, (3,))
    maps = problem.build()(table.inputs)
    assert maps.shape == (3, 8 if name in ATTRIBUTES else 11, 16, 16)
    assert problem.loss(maps, (table.inputs, table.targets)).isfinite()
    assert problem.metrics[name][1](maps, table.targets) <= 1


def rows():
    """Two tasks of one seed: `a` needs 20 macs of 100 on its own, `b` the geometric mean of 20 and 40."""
    names = [" + ".join(some) for some in subsets(("a", "b"))]

    def row(method, budget, macs, tuned):
        about = {"set": "ab", "seed": 0, "command": "python", "seconds": {"merging": 1.0}}
        return about | {"method": method, "budget": budget, "macs": dict(zip(names, macs, strict=True)), "tuned": tuned}

    return [
        row(DENSE, 0.4, (100, 100, 200), {"a": 0.5, "b": 0.8}),
        row(DENSE, 0.2, (100, 100, 200), {"a": 0.6, "b": 0.8}),
        row("separate", 0.4, (40, 40, 80), {"a": 0.5, "b": 0.8}),
        row("separate", 0.2, (20, 20, 40), {"a": 0.594, "b": 0.784}),
        row("mtz-50", 0.4, (60, 60, 70), {"a": 0.6, "b": 0.9}),
        row("mtz-90", 0.4, (50, 50, 55), {"a": 0.6, "b": 0.7}),
        row("pam-fisher-2", 0.2, (20, 18, 25), {"a": 0.6, "b": 0.7999}),
        {"set": "ab", "seed": 0, "command": "python", "method": "pam-entropy", "budget": 0.2, "error": "PlanError: no"},
    ]


def test_least_macs_are_interpolated_where_the_worst_task_decides():
    made = rows()
    dense = references(made, 0)
    assert dense == {0.4: {"a": 0.5, "b": 0.8}, 0.2: {"a": 0.6, "b": 0.8}}  # a budget's own, trained as long
    assert least(made, "separate", "a", dense) == pytest.approx(20)
    assert least(made, "separate", "b", dense) == pytest.approx(math.sqrt(20 * 40))
    assert least(made, "separate", "a + b", dense) == pytest.approx(20 + math.sqrt(20 * 40))
    assert least(made, "mtz-90", "a + b", dense) is None
    found = all_least(made)
    assert found[0, "MTZ", "a"] == 50  # the best of two settings
    assert found[0, "MTZ", "a + b"] == 70
    assert found[0, "PAM, fisher", "a + b"] == 25
    assert found[0, "PAM, entropy", "a"] is None
    assert bound(found, 0, "a + b") == pytest.approx(1 + 20 / math.sqrt(20 * 40))
    assert bound(found, 0, "a") == 1


def test_the_report_tells_every_cell_and_what_failed():
    page = report(rows())
    assert "| a + b" in page
    assert "1.93" in page  # 48.28 / 25
    assert "2.80" in page  # 70 / 25
    assert "not reached" in page
    assert "PlanError: no" in page


def test_what_did_not_run_is_not_said_not_to_be_reached():
    made = rows()
    later = [row | {"seed": 1} for row in made if row["method"] in (DENSE, "separate", "shared", "mtz-50", "mtz-90")]
    found = all_least([*made, *later])
    assert (1, "MTZ", "a") in found
    assert not any(kind.startswith("PAM") for seed, kind, _ in found if seed == 1)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report([*made, *later]).splitlines()]
    heads = next(line for line in lines if line[:1] == ["tasks"])
    both = next(line for line in lines if line[:1] == ["a + b"])
    assert both[heads.index("Separate / PAM, fisher")] == "1.93"  # of the only seed that ran
    assert both[heads.index("Separate / PAM, entropy")] == "not reached"
    assert both[heads.index("Separate / MTZ")] == "0.69 (0.69 .. 0.69)"
    assert ["a", "1", "0.000", "0.000", "", ""] in lines
    assert ["mtz-90", "0.4", "0, 1"] in [line[:3] for line in lines]


def test_what_is_never_reached_takes_more_than_all_it_was_tried_with():
    made = [row | {"tuned": {"a": 0.1, "b": 0.1}} if row["method"].startswith("mtz") else row for row in rows()]
    assert all_least(made)[0, "MTZ", "a + b"] is None
    assert all_most(made)[0, "MTZ", "a + b"] == 55  # of the setting that was tried with least
    assert "| > 2.20" in report(made)  # 55 / 25
    assert ">" not in report(rows()).split("## The set")[1].split("|", 1)[1]
    some = [row for row in made if row["method"] != "mtz-50"]
    assert all_most(some)[0, "MTZ", "a + b"] is None  # it might be with what was not tried


def test_a_chain_prunes_further_at_every_link(tmp_path):
    setting = prepared(("segmentation", "depth"), 0, data(quick=True), tmp_path, quick=True)
    first, second = measure(setting, "separate", [0.3, 0.6])  # the largest is first, whatever the order
    assert (first["budget"], second["budget"]) == (0.6, 0.3)
    for row in (first, second):
        assert sum(row["macs"].values()) / 3 <= row["budget"] * setting.separate
        assert row["tuned"].keys() == set(setting.networks)
    assert sum(first["merged"].values()) / 3 == pytest.approx(setting.separate)
    assert list(tmp_path.glob("merging_depth_*.pt"))


def test_what_is_dense_stays_so(tmp_path):
    setting = prepared(("segmentation", "depth"), 0, data(quick=True), tmp_path, quick=True)
    (row,) = measure(setting, DENSE, [0.3])
    assert row["macs"] == row["merged"]
    assert row["tuned"] != row["cut"]  # it is trained on, all the same


def test_a_budget_that_cannot_be_met_is_told_and_the_chain_goes_on_with_what_it_had(tmp_path):
    setting = prepared(("segmentation", "depth"), 0, data(quick=True), tmp_path, quick=True)
    first, second = measure(setting, "separate", [0.6, 0.0001])
    assert "tuned" in first
    assert second["error"].startswith("PlanError")
