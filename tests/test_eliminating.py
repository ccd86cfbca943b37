"""The error that an elimination predicts at each width is that of an exhaustive least-squares refit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fxprune.eliminating import Unit, damped_inverse, damped_solve, eliminate


def unit(
    seed: int, choice: list[int], copies: int = 1, m: int = 3, tasks: int = 2, rows: int = 60
) -> tuple[Unit, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = len(choice)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, n, generator=generator, dtype=torch.float64) @ mix
    root = torch.randn(tasks, m, m, generator=generator, dtype=torch.float64)
    weight = torch.randn(n, copies, m, generator=generator, dtype=torch.float64)
    return Unit(weight, x.T @ x / rows, root @ root.mT, np.array(choice)), x


def refit(u: Unit, x: torch.Tensor, gone: set[int]) -> np.ndarray:
    """Return (tasks,) what is lost when choices are gone and the weights of the others are fitted again."""
    stay = [i for i, c in enumerate(u.choice) if c not in gone]
    weight = u.weight.flatten(1)
    y = x @ weight
    fitted = torch.linalg.lstsq(x[:, stay], y).solution if stay else torch.zeros(0, weight.shape[1], dtype=x.dtype)
    e = (y - x[:, stay] @ fitted).reshape(len(x), *u.weight.shape[1:])
    return (torch.einsum("rcm,tmn,rcn->t", e, u.sensitivity, e) / len(x) / 2).numpy()


CASES = {
    "plain": [[0, 1, 2, 3, 4, 5]],
    "blocks": [[0, 0, 1, 1, 2, 2, 3, 3]],
    "uneven, and inputs of no choice": [[0, -1, 1, 1, 2, 2, 2, -1, 3]],
    "two maps": [[0, 1, 2, 3], [3, 3, -1, 1, 1, 0, 0, 2, 2]],
}


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("chunk", [math.inf, 2])
@pytest.mark.parametrize("case", CASES)
def test_errors_are_those_of_a_refit_at_every_width(case: str, chunk: float, copies: int) -> None:
    made = [unit(seed, choice, copies) for seed, choice in enumerate(CASES[case])]
    choices = np.array(sorted({c for choice in CASES[case] for c in choice if c >= 0}))
    found = eliminate([u for u, _ in made], [choices], [1], steps=len(choices), tasks=2, damping=1e-14, chunk=chunk)
    total = np.zeros(2)
    for step in range(len(choices)):
        total += found.errors[step]
        gone = set(found.order[: step + 1].ravel().tolist())
        wanted = sum((refit(u, x, gone) for u, x in made), np.zeros(2))
        assert total == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_the_cheapest_goes_at_every_step() -> None:
    u, x = unit(7, [0, 0, 1, 2, 2, 3, 4])
    found = eliminate([u], [np.arange(5)], [1], steps=5, tasks=2, damping=1e-14, chunk=math.inf)
    gone: set[int] = set()
    for choice in found.order.ravel().tolist():
        costs = {c: refit(u, x, gone | {c}).sum() for c in range(5) if c not in gone}
        assert choice == min(costs, key=costs.__getitem__)
        gone.add(choice)


def test_cells_lose_their_share_at_every_step_and_what_went_before_costs_nothing() -> None:
    u, x = unit(3, [0, 1, 2, 3, 4, 5, 6])
    cells = [np.array([0, 1, 2]), np.array([3, 4, 5])]
    found = eliminate([u], cells, [1, 1], steps=2, tasks=2, first=np.array([6]), damping=1e-14)
    assert found.order.shape == (2, 2)
    assert all(len(np.intersect1d(step, cell)) == 1 for step in found.order for cell in cells)
    gone = {6, *found.order.ravel().tolist()}
    assert found.errors.sum(axis=0) == pytest.approx(refit(u, x, gone) - refit(u, x, {6}), rel=1e-6)


def test_an_inverse_that_is_known_gives_the_same_and_stays_as_it_is() -> None:
    u, _ = unit(5, [0, -1, 1, 1, 2, -1, 3])
    inverse = torch.linalg.inv(u.second + 0.1 * u.second.diagonal().mean() * torch.eye(7, dtype=torch.float64))
    known = replace(u, inverse=inverse.clone())
    told, found = (eliminate([v], [np.arange(4)], [1], steps=4, tasks=2, damping=0.1) for v in (u, known))
    assert np.array_equal(told.order, found.order)
    assert found.errors == pytest.approx(told.errors)
    assert torch.equal(known.inverse, inverse)


def test_costs_of_their_own_are_added() -> None:
    u, _ = unit(1, [0, 1, 2])
    own = np.array([[0.0, 1e6], [0.0, 0.0], [0.0, 0.0], [5.0, 6.0]])
    found = eliminate([u], [np.arange(4)], [1], steps=4, tasks=2, own=own)
    assert found.order[-1] == [0]
    alone = int(np.flatnonzero(found.order.ravel() == 3)[0])
    assert found.errors[alone] == pytest.approx([5, 6])


def test_twins_are_not_both_kept() -> None:
    """A copy of an input costs nothing to remove, its twin then everything."""
    torch.manual_seed(0)
    x = torch.randn(100, 3, dtype=torch.float64)
    x = torch.cat([x, x[:, :1] * 2], 1)
    u = Unit(
        torch.randn(4, 1, 2, dtype=torch.float64), x.T @ x / 100, torch.eye(2, dtype=torch.float64)[None], np.arange(4)
    )
    found = eliminate([u], [np.arange(4)], [1], steps=4, tasks=1, damping=1e-9, chunk=math.inf)
    assert found.order[0, 0] in (0, 3)
    assert found.errors[0, 0] < 1e-6 < found.errors[1, 0]


def test_moments_that_rounding_made_indefinite_are_inverted_up_to_rounding() -> None:
    """Large means and small variances, centred: what is left is rounding, and an eigenvalue below zero."""
    second = torch.diag(torch.tensor([4.0, 1.0, -1e-3], dtype=torch.float64))
    u = Unit(torch.ones(3, 1, 1, dtype=torch.float64), second, torch.ones(1, 1, 1, dtype=torch.float64), np.arange(3))
    found = eliminate([u], [np.arange(3)], [1], steps=3, tasks=1, damping=1e-6)
    assert found.order.ravel().tolist() == [2, 1, 0]
    assert found.errors.ravel() == pytest.approx([0, 0.5, 2], abs=2e-3)


def test_inputs_that_never_vary_cost_nothing() -> None:
    second = torch.zeros(4, 4, dtype=torch.float64)
    u = Unit(torch.ones(4, 1, 2, dtype=torch.float64), second, torch.eye(2, dtype=torch.float64)[None], np.arange(4))
    assert np.abs(eliminate([u], [np.arange(4)], [1], steps=4, tasks=1).errors).max() < 1e-12


def test_what_rounding_has_made_indefinite_makes_nothing_large() -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (2, 6))
    second = x.T @ x + 1e-7 * (noise + noise.T)
    assert torch.linalg.eigvalsh(second)[0] < 0
    for level in (1e-13, 0.0):
        change = damped_solve(second, level, second @ torch.eye(6, dtype=torch.float64))
        assert change.abs().max() < 3
        assert torch.allclose(change, damped_inverse(second, level) @ second)
