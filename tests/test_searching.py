"""The search over widths finds what an exhaustive one does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fxprune.searching import Search


class Chain:
    """Costs of a chain of layers: products of neighbouring widths, and their sum."""

    def __init__(self, seed: int, groups: int, levels: int) -> None:
        rng = np.random.default_rng(seed)
        self.width = rng.integers(levels + 1, 3 * levels, groups)
        self.work = rng.integers(1, 20, groups + 1)
        self.errors = [np.sort(rng.random(levels)) ** rng.uniform(0.5, 3) * rng.uniform(0.1, 10) for _ in range(groups)]

    def cost(self, levels: np.ndarray) -> dict[str, float]:
        width = np.concatenate([[3], self.width - levels, [5]])
        macs = float((self.work * width[1:] * width[:-1]).sum())
        return {"macs": macs, "params": float(width.sum())}

    def exhaustive(self, bounds: dict[str, float]) -> float:
        best = np.inf
        for levels in itertools.product(*[range(len(e) + 1) for e in self.errors]):
            cost = self.cost(np.array(levels))
            if all(cost[name] <= bound for name, bound in bounds.items()):
                best = min(best, sum(e[:n].sum() for e, n in zip(self.errors, levels, strict=True)))
        return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("resources", [("macs",), ("macs", "params")])
def test_small_searches_are_exact(seed: int, resources: tuple[str, ...]) -> None:
    chain = Chain(seed, groups=4, levels=5)
    dense, least = chain.cost(np.zeros(4)), chain.cost(np.full(4, 5))
    bounds = {name: least[name] + 0.4 * (dense[name] - least[name]) for name in resources}
    search = Search(chain.errors, chain.cost, bounds)
    found = search.run(search.most.copy())
    assert search.fits(found)
    assert search.error(found) == pytest.approx(chain.exhaustive(bounds))


@pytest.mark.parametrize("seed", range(3))
def test_large_searches_fill_the_budget_and_beat_equal_shares(seed: int) -> None:
    chain = Chain(seed, groups=30, levels=40)
    bounds = {"macs": 0.5 * chain.cost(np.zeros(30))["macs"]}
    search = Search(chain.errors, chain.cost, bounds)
    equal = next(np.full(30, n) for n in range(41) if search.fits(np.full(30, n)))
    found = search.run(search.most.copy())
    assert 0.98 < search.use(found)[0] <= 1
    assert search.error(found) < 0.7 * search.error(equal)


def test_groups_without_steps_and_errors_of_zero_are_fine() -> None:
    search = Search([np.zeros(0), np.zeros(3)], lambda levels: {"macs": 10 - float(levels[1])}, {"macs": 8})
    assert search.run(np.array([0, 3])).tolist() == [0, 2]
