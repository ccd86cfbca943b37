"""The parts of the benchmark of classes that are quick to check."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parent / "benchmarks"))  # its modules import one another, as in the command

from classes import SHARES, SHARES_OF_SOME, data_of_digits, on_classes, renumbered, shares_left, subsets
from classes_numbers import numbers, of_numbers, problem_of_numbers
from classes_report import needed
from quality_data import Counts, Table
from quality_problems import problems

from fxprune.examples.scenes import Digits, split_digits


def test_a_number_is_its_tens_beside_its_units():
    scans = np.zeros((2, 8, 8), np.float32)
    scans[1] = 1.0  # the seven fills its box, the three is empty
    made = numbers(Digits(scans, np.array([3, 7])), 40, (1,), among=[37, 73])
    left, right = made.inputs[..., :16].mean((1, 2, 3)), made.inputs[..., 16:].mean((1, 2, 3))
    assert set(made.targets["digit"].tolist()) == {37, 73}
    assert torch.equal(left > right, made.targets["digit"] == 73)


def test_numbers_are_the_same_again_and_among_those_asked_for():
    digits = split_digits()[1]
    made, again = numbers(digits, 5, (1,)), numbers(digits, 5, (1,))
    assert made.inputs.shape == (5, 1, 32, 32)
    assert torch.equal(made.inputs, again.inputs)
    parts = of_numbers([12, 99], Counts(4, 3, 2))
    assert [len(part) for part in (parts.train, parts.calibration, parts.test)] == [4, 3, 2]
    for part in (parts.train, parts.calibration, parts.test):
        assert set(part.targets["digit"].tolist()) <= {12, 99}


def test_the_network_for_numbers_has_a_row_for_each():
    problem = problem_of_numbers(quick=True)
    table = problem.split(problem.recipe.counts).test
    logits = problem.build().eval()(table.inputs)
    assert logits.shape == (len(table), 100)
    assert problem.loss(logits, (table.inputs, table.targets)).isfinite()


def test_a_subtask_of_digits_sees_as_many_calibration_images_and_no_other_class():
    problem = problems(quick=True)["resnet20"]
    splits = problem.split(problem.recipe.counts)
    chosen = subsets(0, 10)
    whole, parts = data_of_digits(problem, splits, chosen)
    assert [len(classes) for classes in chosen] == [2, 3, 5]
    for classes, part in zip(chosen, parts, strict=True):
        assert len(part.calibration) == len(whole) == problem.recipe.counts.calibration
        for table in (part.train, part.calibration, part.test):
            assert set(table.targets["digit"].tolist()) <= set(classes)
        among = torch.isin(splits.test.targets["digit"], torch.tensor(classes))
        assert torch.equal(part.test.inputs, splits.test.inputs[among])
        back = torch.tensor(classes)[renumbered(part.test, classes).targets["digit"]]
        assert torch.equal(back, part.test.targets["digit"])


def test_a_network_for_all_classes_is_right_more_often_when_told_which_there_can_be():
    logits = torch.tensor([[0.0, 3.0, 9.0, 1.0], [0.0, 1.0, 0.0, 2.0], [0.0, 5.0, 0.0, 2.0]])
    table = Table(logits, {"digit": torch.tensor([1, 3, 3])})
    assert on_classes(nn.Identity(), [1, 3], table, "cut") == {
        "classes": [1, 3], "cut": pytest.approx(1 / 3), "cut_told": pytest.approx(2 / 3)
    }  # fmt: skip
    sliced = Table(logits[:, [1, 3]], table.targets)
    assert on_classes(nn.Identity(), [1, 3], sliced, "cut") == {"classes": [1, 3], "cut": pytest.approx(2 / 3)}


def test_shares_that_have_rows_are_not_measured_again():
    every = ((0, SHARES), (2, SHARES_OF_SOME), (3, SHARES_OF_SOME), (5, SHARES_OF_SOME))
    assert shares_left("resnet20", 0, []) == every
    about = {"part": "subtasks", "network": "resnet20", "seed": 0, "classes": [1, 2]}
    rows = [about | {"kind": "some classes", "budget": b} for b in SHARES_OF_SOME[:-1]]
    rows += [about | {"kind": "all classes", "budget": b} for b in SHARES]
    assert shares_left("resnet20", 0, rows) == ((2, SHARES_OF_SOME[-1:]), *every[2:])
    assert shares_left("resnet20", 1, rows) == every


def test_what_a_curve_needs_is_between_its_points_by_the_logarithm():
    curve = np.array([0.01, 0.1, 1.0]), np.array([50.0, 70.0, 90.0])
    assert needed(curve, 80.0) == pytest.approx(10**-0.5)
    assert needed(curve, 40.0) == pytest.approx(0.01)
    assert needed(curve, 91.0) is None
