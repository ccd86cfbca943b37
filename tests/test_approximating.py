"""Sparse approximation: errors are those of least squares, and the order is greedy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp

from fxprune.approximating import Dictionary, _Kept, backward, errors_along, forward

SHAPES = {"long": (40, 12), "square": (12, 12), "more filters than their length": (7, 18)}


def vectors(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Return (length, n) vectors of unequal length, some near each other."""
    generator = np.random.default_rng(seed)
    f = generator.standard_normal(shape) * generator.uniform(0.3, 2, shape[1])
    f[:, -1] = f[:, 0] + 0.1 * f[:, -1]
    return f


def dictionary(f: np.ndarray, choice: list[int] | None = None) -> Dictionary:
    return Dictionary(torch.from_numpy(f.T @ f), np.arange(f.shape[1]) if choice is None else np.array(choice))


def refit(f: np.ndarray, kept: list[int]) -> float:
    """Return the squared error when all are fitted by those that are kept."""
    if not kept:
        return float((f**2).sum())
    return float(((f - f[:, kept] @ np.linalg.lstsq(f[:, kept], f, rcond=1e-10)[0]) ** 2).sum())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_backward_drops_what_exhaustive_least_squares_says(shape: tuple[int, int]) -> None:
    f = vectors(shape)
    total = (f**2).sum()
    found = backward([dictionary(f)], [np.arange(shape[1])], [1])
    kept = list(range(shape[1]))
    for gone, error in zip(found.order[:, 0], np.cumsum(found.errors), strict=True):
        each = {k: refit(f, [c for c in kept if c != k]) for k in kept}
        assert each[gone] == pytest.approx(min(each.values()), abs=1e-8 * total)
        kept.remove(gone)
        assert error * total == pytest.approx(refit(f, kept), abs=1e-8 * total)
    assert found.errors.sum() == pytest.approx(1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_downdates_are_what_inverting_again_gives(shape: tuple[int, int]) -> None:
    f = vectors(shape, 3)
    d, state = dictionary(f), _Kept(dictionary(f))
    gram = (d.gram / d.total).numpy()
    left = list(range(shape[1]))
    for gone in backward([d], [np.arange(shape[1])], [1]).order[:-1, 0]:
        state.remove(np.array([gone]))
        left.remove(gone)
        inside = gram[np.ix_(left, left)]
        independent = np.linalg.matrix_rank(f[:, left]) == len(left)
        wanted = np.linalg.pinv(inside, rcond=1e-10, hermitian=True)
        if independent:
            assert np.abs(state.inverse.numpy() - wanted).max() <= 1e-8 * np.abs(wanted).max()
            assert np.abs(state.lam.numpy() - wanted @ gram[left]).max() <= 1e-8
        else:
            assert np.abs(inside @ state.lam.numpy() - gram[left]).max() <= 1e-8


def test_blocks_and_several_dictionaries_add_up() -> None:
    a, b = vectors((30, 9), 1), vectors((20, 6), 2)
    of_a, of_b = [0, 0, 1, 2, 2, 3, 3, -1, -1], [0, 1, 2, 2, 3, -1]
    made = [dictionary(a, of_a), dictionary(b, of_b)]
    cells = [np.array([0, 2]), np.array([1, 3])]
    found = backward(made, cells, [1, 1])
    assert found.order.shape == (2, 2)
    assert {*found.order[:, 0]} == {0, 2}
    gone: set[int] = set()
    for row, error in zip(found.order, np.cumsum(found.errors), strict=True):
        gone |= set(row.tolist())
        wanted = 0.0
        for f, of, d in zip((a, b), (of_a, of_b), made, strict=True):
            wanted += refit(f, [i for i, c in enumerate(of) if c not in gone]) / d.total
        assert error == pytest.approx(wanted, abs=1e-8)
    assert errors_along(made, found.order) == pytest.approx(found.errors, abs=1e-8)


def test_what_may_not_go_helps_to_approximate() -> None:
    f = vectors((30, 6))
    found = backward([dictionary(f)], [np.array([1, 2, 3])], [1])
    assert set(found.order.ravel().tolist()) == {1, 2, 3}
    assert found.errors.sum() * (f**2).sum() == pytest.approx(refit(f, [0, 4, 5]), abs=1e-8)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_omp_takes_in_what_its_definition_says(shape: tuple[int, int]) -> None:
    f = vectors(shape, 5)
    rank = np.linalg.matrix_rank(f)
    unit = f / np.linalg.norm(f, axis=0)
    order = forward([dictionary(f)], np.arange(shape[1]))
    assert sorted(order) == list(range(shape[1]))
    for step in range(rank):
        taken = order[:step]
        rest = unit - unit[:, taken] @ np.linalg.lstsq(unit[:, taken], unit, rcond=None)[0] if step else unit
        along = np.abs(unit.T @ rest).sum(1)
        along[taken] = -1
        assert along[order[step]] == pytest.approx(along.max(), rel=1e-8)


def test_omp_for_one_vector_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(8)
    f = generator.standard_normal((25, 15)) * generator.uniform(0.3, 2, 15)
    f[:, -1] = f[:, :4] @ [1.0, -2, 0.5, 1] + 0.05 * f[:, -1]
    for target in range(15):
        others = [j for j in range(15) if j != target]
        unit = f[:, others] / np.linalg.norm(f[:, others], axis=0)
        found = forward([dictionary(f)], np.array(others), [np.arange(15) == target])
        for count in (1, 3, 6):
            wanted = orthogonal_mp(unit, f[:, target], n_nonzero_coefs=count)
            assert set(np.array(others)[np.flatnonzero(wanted)]) == set(found[:count])


def test_greedy_is_near_the_best_subset_and_says_where_it_is_not() -> None:
    same, ratio = [0, 0], [1.0, 1.0]
    for seed in range(20):
        f = np.random.default_rng(seed).standard_normal((9, 7))
        d = dictionary(f)
        dropped = backward([d], [np.arange(7)], [1]).order[:, 0]
        taken = forward([d], np.arange(7))
        for i, order in enumerate((dropped[::-1], taken)):
            for width in range(1, 7):
                best = min(refit(f, list(kept)) for kept in combinations(range(7), width))
                mine = refit(f, order[:width].tolist())
                assert mine >= best - 1e-9
                same[i] += mine <= best * (1 + 1e-9)
                ratio[i] = max(ratio[i], mine / best)
    assert same == [92, 24]  # of 120: backward, omp
    assert ratio[0] < 1.5 < ratio[1] < 7
