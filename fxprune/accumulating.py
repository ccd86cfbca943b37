"""Sums over rows, in float64, of more rows than one batch has at a time."""

from __future__ import annotations

import torch

BLOCK = 512
"""How many columns of a product are made at a time."""
LEFT = 1e-9
"""A share of the rows that is no more than rounding."""
VALUES = 1 << 20
"""How many values are widened to float64 at a time."""


class Gram:
    """Sum of x x^T over rows x, and of x.

    Rows wait until they are half as many as they are long: a product costs as much to add as many rows to multiply.
    They are multiplied in their own precision, float32 at least, but about their mean: so values that hardly vary keep
    how they do. Products are added up in float64, and only on and below the diagonal.

    Attributes:
        rows: how many were added.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._waiting: list[torch.Tensor] = []
        self._length = 0
        self._second: torch.Tensor | None = None
        self._first = torch.zeros(())

    @property
    def sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(blocks, n, n), right on and below the diagonal only, and (blocks, n); to be read, or set to others."""
        if self._waiting:
            self._multiply()
        assert self._second is not None
        return self._second, self._first

    @sums.setter
    def sums(self, sums: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._second, self._first = sums

    def add(self, rows: torch.Tensor) -> None:
        """Add rows (blocks, rows, n)."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.rows += rows.shape[1]
        self._length += rows.shape[1]
        self._waiting.append(rows)
        if 2 * self._length >= rows.shape[2]:
            self._multiply()

    def _multiply(self) -> None:
        rows = torch.cat(self._waiting, 1) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting, self._length = [], 0
        blocks, count, n = rows.shape
        if self._second is None:
            self._second = torch.zeros(blocks, n, n, dtype=torch.float64, device=rows.device)
        total = rows.sum(1, dtype=torch.float64)
        mean = total / max(count, 1)
        rows = rows - mean[:, None].to(rows)
        for start in range(0, n, BLOCK):
            here = slice(start, start + BLOCK)
            self._second[:, start:, here] += rows[:, :, start:].transpose(1, 2) @ rows[:, :, here]
            self._second[:, start:, here].addcmul_(total[:, start:, None], mean[:, None, here])
        self._first = self._first.to(rows.device) + total

    def mean(self, count: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums over `count`: (blocks, n, n) and (blocks, n). Nothing can be added afterwards."""
        second, first = self.sums
        self._second = None
        second /= count
        for start in range(0, second.shape[1], BLOCK):
            here, below = slice(start, start + BLOCK), slice(start + BLOCK, None)
            second[:, here, below] = second[:, below, here].transpose(1, 2)
            second[:, here, here] = second[:, here, here].tril() + second[:, here, here].tril(-1).transpose(1, 2)
        return second, first / count


class ClassTotals:
    """Sums of rows by class, and how many rows each class has, in float64.

    Attributes:
        total: (blocks, classes, n).
        count: (classes,).
    """

    def __init__(self) -> None:
        self.total = torch.zeros(1, 0, 0, dtype=torch.float64)
        self.count = torch.zeros(0, dtype=torch.float64)

    def add(self, rows: torch.Tensor, shares: torch.Tensor) -> None:
        """Add rows (blocks, rows, n), of which `shares` (rows, classes) says what classes each is of."""
        shares = (shares / shares.sum(1, keepdim=True).clamp_min(1)).to(rows.device, torch.float64)
        total, count = shares.T @ rows.double(), shares.sum(0)
        known = len(self.count)
        if known:
            total[:, :known] += self.total
            count[:known] += self.count
        self.total, self.count = total, count

    def at(self, places: list[int], classes: int) -> ClassTotals:
        """Return the sums with each class at another place, among so many."""
        blocks, known, n = self.total.shape
        found = ClassTotals()
        found.total, found.count = self.total.new_zeros(blocks, classes, n), self.count.new_zeros(classes)
        found.total[:, places[:known]], found.count[places[:known]] = self.total, self.count
        return found

    def whole(self, total: torch.Tensor, rows: int) -> ClassTotals:
        """Return the sums with one more class, for what is missing in them: of `rows` rows, which add up to `total`."""
        found = ClassTotals()
        rest = (rows - self.count.sum()).clamp_min(0)
        rest = torch.where(rest > LEFT * rows, rest, 0)
        missing = (total - self.total.sum(1)) * (rest > 0)
        found.total, found.count = torch.cat([self.total, missing[:, None]], 1), torch.cat([self.count, rest[None]])
        return found

    def second(self) -> torch.Tensor:
        """Return the sum over rows of m m^T, m the mean of the row's class: (blocks, n, n)."""
        means = self.total / self.count.clamp_min(1e-300)[:, None]
        return means.transpose(1, 2) @ self.total


class Spread:
    """Sums over the values of every channel that a batch norm reads: how many, their sum, and that of squares."""

    def __init__(self) -> None:
        self.count = 0
        self.total = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, x: torch.Tensor) -> None:
        """Add values (b, channels, ..)."""
        x = x.detach().reshape(*x.shape[:2], -1)
        self.count += x.shape[0] * x.shape[2]
        total = squares = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        for some in x.split(max(VALUES // max(x[:1].numel(), 1), 1)):
            wide = some.double()
            total = total + wide.sum((0, 2))
            squares = squares + torch.linalg.vector_norm(wide, 2, (0, 2)).square()
        self.total, self.squares = self.total + total.cpu(), self.squares + squares.cpu()

    @property
    def mean(self) -> torch.Tensor:
        """(channels,) float64."""
        return self.total / self.count

    @property
    def var(self) -> torch.Tensor:
        """(channels,) float64, of the whole population."""
        return (self.squares / self.count - self.mean.square()).clamp_min(0)
