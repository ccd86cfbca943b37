"""The parts of the benchmark of merging that are quick to check."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent / "benchmarks"))  # its modules import one another, as in the command

from merging import measure, prepared
from merging_report import DENSE, all_least, bound, least, report
from merging_tasks import TASKS, data, scene_table, subsets

from fxprune.examples.scenes import BACKGROUND, compose, split_digits


def test_targets_are_those_of_the_scenes():
    digits = split_digits()[1]
    table, made = scene_table(digits, 40, (3,)), compose(digits, 40, (3,))
    assert torch.equal(table.inputs, made.images)
    assert table.targets.keys() == TASKS.keys()
    assert torch.equal(table.targets["segmentation"], made.segmentation[:, ::2, ::2])
    assert (table.targets["segmentation"] == BACKGROUND).any()
    for n in range(40):
        depths = [d for d in made.depth[n].unique().tolist() if d > 0 and (made.depth[n] == d).sum() >= 8]
        assert table.targets["count"][n] == len(depths)
        here = [[(int(made.segmentation[n, y, x]), float(made.depth[n, y, x])) for x in range(32)] for y in range(32)]
        edge = [
            [any(here[y][x] != here[a][b] for a, b in ((y, min(x + 1, 31)), (min(y + 1, 31), x))) for x in range(32)]
            for y in range(32)
        ]
        for y in range(0, 32, 2):
            for x in range(0, 32, 2):
                expected = edge[y][x] or edge[y][x + 1] or edge[y + 1][x] or edge[y + 1][x + 1]
                assert table.targets["boundaries"][n, y // 2, x // 2] == expected


def rows():
    """Two tasks of one seed: `a` needs 20 macs of 100 on its own, `b` the geometric mean of 20 and 40."""
    names = [" + ".join(some) for some in subsets(("a", "b"))]

    def row(method, budget, macs, tuned):
        about = {"tasks": 3, "seed": 0, "command": "python", "seconds": {"merging": 1.0}}
        return about | {"method": method, "budget": budget, "macs": dict(zip(names, macs, strict=True)), "tuned": tuned}

    return [
        row("separate", DENSE, (100, 100, 200), {"a": 0.5, "b": 0.8}),
        row("separate", 0.4, (40, 40, 80), {"a": 0.5, "b": 0.8}),
        row("separate", 0.2, (20, 20, 40), {"a": 0.495, "b": 0.784}),
        row("mtz-50", 0.4, (60, 60, 70), {"a": 0.6, "b": 0.9}),
        row("mtz-90", 0.4, (50, 50, 55), {"a": 0.6, "b": 0.7}),
        row("pam-fisher-2", 0.2, (20, 18, 25), {"a": 0.5, "b": 0.7999}),
        {"tasks": 3, "seed": 0, "command": "python", "method": "pam-entropy", "budget": 0.2, "error": "PlanError: no"},
    ]


def test_least_macs_are_interpolated_where_the_worst_task_decides():
    made, dense = rows(), {"a": 0.5, "b": 0.8}
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


def test_a_method_is_run_at_every_budget(tmp_path):
    setting = prepared(2, 0, data(quick=True), tmp_path, quick=True)
    dense, slim = measure(setting, "separate", [DENSE, 0.3])
    assert sum(dense["macs"].values()) / 3 == pytest.approx(setting.separate)
    assert dense["merged"] == dense["macs"]
    assert sum(slim["macs"].values()) / 3 <= 0.3 * setting.separate
    assert slim["tuned"].keys() == set(setting.networks)
    assert list(tmp_path.glob("merging_depth_*.pt"))
