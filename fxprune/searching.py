"""The widths of all groups with the least total error under all bounds at once: a Lagrangian over removal paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

SWEEPS = 6
"""How often all groups are visited at one price, at most; most often two do."""
PRICES = 24
"""How many prices are tried."""
STEEP = 8
"""How much more a resource that is further over its bound weighs than one that is less."""
NODES = 4000
"""How many networks the exhaustive search looks at before it gives up."""


class Search:
    """Looks for the levels of all groups: how many steps each has taken."""

    def __init__(
        self,
        errors: list[np.ndarray],
        cost: Callable[[np.ndarray], Mapping[str, float]],
        bounds: Mapping[str, float],
    ) -> None:
        """Prepare a search.

        Args:
            errors: for each group, (steps,) what each of its steps adds to the error.
            cost: (groups,) levels -> resource -> cost; more steps never cost more.
            bounds: resource -> the most it may cost.
        """
        self.total = [np.concatenate([[0.0], np.cumsum(e)]) for e in errors]
        self.most = np.array([len(e) for e in errors], dtype=np.int64)
        self.bounds = bounds
        self._cost = cost
        self._known: dict[bytes, np.ndarray] = {}

    def use(self, levels: np.ndarray) -> np.ndarray:
        """Return (resources,) costs as shares of their bounds."""
        key = levels.tobytes()
        if key not in self._known:
            cost = self._cost(levels)
            self._known[key] = np.array([cost[name] / bound for name, bound in self.bounds.items()])
        return self._known[key]

    def fits(self, levels: np.ndarray) -> bool:
        """Say whether all bounds hold."""
        return bool((self.use(levels) <= 1).all())

    def error(self, levels: np.ndarray) -> float:
        """Return the total error."""
        return float(sum(total[level] for total, level in zip(self.total, levels, strict=True)))

    def run(self, start: np.ndarray) -> np.ndarray:
        """Return levels that fit, with the least error found.

        Args:
            start: (groups,) levels that fit.
        """
        best, least = start, self.error(start)
        levels = start.copy()
        low, high = self._prices()
        for _ in range(PRICES):
            price = np.sqrt(low * high)
            levels = self.at_price(levels, price)
            if not self.fits(levels):
                low = price
                continue
            high = price
            if self.error(levels) < least:
                best, least = levels.copy(), self.error(levels)
        best = self.polish(best)
        return self._proven(best)

    def _proven(self, best: np.ndarray) -> np.ndarray:
        """Return the levels with the least error of all, where a search of all that could be better ends in time."""
        least, left = self.error(best), NODES
        order = np.argsort([-total[-1] for total in self.total], kind="stable")

        def descend(levels: np.ndarray, depth: int, spent: float) -> None:
            """Try all levels of the groups from `depth` on, which are at their last one."""
            nonlocal best, least, left
            if depth == len(order):
                best, least = levels, spent
                return
            g = order[depth]
            for level in range(self.most[g] + 1):
                error = spent + self.total[g][level]
                if error >= least or left <= 0:
                    return
                trial = levels.copy()
                trial[g] = level
                left -= 1
                if self.fits(trial):
                    descend(trial, depth + 1, error)

        descend(self.most.copy(), 0, 0.0)
        return best

    def _prices(self) -> tuple[float, float]:
        """Return a price at which nothing goes, and one at which all that can does."""
        steps = np.concatenate([np.diff(total) for total in self.total] or [np.ones(1)])
        positive = steps[steps > 0]
        if not len(positive):
            return 1e-12, 1e12
        return float(positive.min()) * 1e-3, float(sum(total[-1] for total in self.total)) * 1e6

    def at_price(self, levels: np.ndarray, price: float) -> np.ndarray:
        """Return levels that no group alone can better, where one whole bound costs `price`."""
        levels = levels.copy()
        for _ in range(SWEEPS):
            use = self.use(levels)
            weight = (use / use.max()) ** STEEP if use.max() > 0 else np.ones_like(use)
            before = levels.copy()
            for g in np.flatnonzero(self.most):
                levels[g] = int(np.argmin(self.total[g] + price * (self._along(levels, int(g)) @ weight)))
            if np.array_equal(levels, before):
                break
        return levels

    def _along(self, levels: np.ndarray, g: int) -> np.ndarray:
        """Return (levels + 1, resources) what one group's levels cost: a parabola through three of them.

        A group's width enters an op's macs once, or twice where it is both what goes in and what comes out.
        """
        at = np.unique([0, self.most[g] // 2, self.most[g]])
        known = []
        for level in at:
            trial = levels.copy()
            trial[g] = level
            known.append(self.use(trial))
        x = np.arange(self.most[g] + 1)
        values = np.array(known)
        out = np.zeros((len(x), values.shape[1]))
        for i, here in enumerate(at):  # Lagrange's formula
            basis = np.ones(len(x))
            for there in at[at != here]:
                basis *= (x - there) / (here - there)
            out += basis[:, None] * values[i]
        return out

    def polish(self, levels: np.ndarray) -> np.ndarray:
        """Give back what still fits, most error for its cost first, and swap a step of one group for one of another."""
        levels = self._give_back(levels.copy())
        last = [total[level] - total[max(level - 1, 0)] for total, level in zip(self.total, levels, strict=True)]
        for g in np.argsort(last)[::-1]:
            if levels[g] == 0:
                continue
            trial = levels.copy()
            trial[g] -= 1
            gain = self.total[g][levels[g]] - self.total[g][trial[g]]
            loss = np.array([self._next(h, int(trial[h])) for h in range(len(trial))])
            loss[g] = np.inf
            for h in np.argsort(loss)[:4]:
                if not loss[h] < gain:
                    break
                swapped = trial.copy()
                swapped[h] += 1
                if self.fits(swapped):
                    levels = self._give_back(swapped)
                    break
        return levels

    def _next(self, g: int, level: int) -> float:
        """Return what one more step of a group adds to the error; infinite after its last."""
        return float(self.total[g][level + 1] - self.total[g][level]) if level < self.most[g] else np.inf

    def _give_back(self, levels: np.ndarray) -> np.ndarray:
        """Give steps back while all bounds hold."""
        while True:
            now, gains = self.use(levels), []
            for g in np.flatnonzero(levels):
                trial = levels.copy()
                trial[g] -= 1
                use = self.use(trial)
                if (use <= 1).all():
                    gain = self.total[g][levels[g]] - self.total[g][trial[g]]
                    gains.append((gain / max(float((use - now).max()), 1e-12), int(g)))
            if not gains:
                return levels
            levels[max(gains)[1]] -= 1
