"""Sums of products over rows are those of all rows at once."""

from __future__ import annotations

import pytest
import torch

from fxprune import accumulating
from fxprune.accumulating import Gram, Spread


@pytest.mark.parametrize("sizes", [[40], [1, 2, 3], [7, 1, 1, 30, 2]])
@pytest.mark.parametrize("block", [512, 4])
def test_products_are_those_of_all_rows(sizes: list[int], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulating, "BLOCK", block)
    torch.manual_seed(0)
    rows = torch.randn(2, sum(sizes), 10, dtype=torch.float64)
    gram = Gram()
    for some in rows.split(sizes, 1):
        gram.add(some)
    assert gram.rows == sum(sizes)
    second, mean = gram.mean(5)
    assert torch.allclose(second, rows.mT @ rows / 5)
    assert torch.equal(second, second.mT)
    assert torch.allclose(mean, rows.sum(1) / 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sums_keep_their_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = (torch.rand(1, 20_000, 6) + 10).to(dtype)
    gram = Gram()
    for some in rows.split(50, 1):
        gram.add(some)
    second, mean = gram.mean(20_000)
    exact = rows.double()
    assert torch.allclose(second, exact.mT @ exact / 20_000, rtol=1e-6)
    assert torch.allclose(mean, exact.mean(1), rtol=1e-12)


@pytest.mark.parametrize("sizes", [[4000], [1, 3999], [50] * 80])
def test_values_that_hardly_vary_keep_how_they_do(sizes: list[int]) -> None:
    torch.manual_seed(0)
    rows = torch.tensor([1.0, -30.0, 0.01, 0.0]) * (1 + 1e-4 * torch.randn(2, 4000, 4))
    gram = Gram()
    for some in rows.split(sizes, 1):
        gram.add(some)
    gram.add(rows[:, :0])
    second, mean = gram.mean(4000)
    exact = rows.double() - rows.double().mean(1, keepdim=True)
    centred = second - mean[:, :, None] * mean[:, None]
    std = exact.square().mean(1).sqrt()
    error = (centred - exact.mT @ exact / 4000).abs()
    assert (error <= 1e-5 * std[:, :, None] * std[:, None]).all()


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 9), (6, 4, 3, 5)])
def test_spreads_are_means_and_variances_of_every_channel(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulating, "VALUES", 50)
    torch.manual_seed(0)
    x = torch.randn(*shape) * 3 + 5
    spread = Spread()
    for some in (x[:1], x[1:]):
        spread.add(some)
    flat = x.double().transpose(0, 1).flatten(1)
    assert torch.allclose(spread.mean, flat.mean(1), rtol=1e-12)
    assert torch.allclose(spread.var, flat.var(1, correction=0), rtol=1e-9)
