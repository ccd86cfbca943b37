"""Constraints on attention: heads, head dims of queries and keys, head dims of values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Budget, Constraints
from fxprune.methods import Magnitude

HEADS, DIM = 4, 8


class Attention(nn.Module):
    """Separate projections, so that queries and values have widths of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, HEADS * DIM) for _ in range(3))
        self.proj = nn.Linear(HEADS * DIM, 24)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, HEADS, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 24), nn.Linear(24, 3)
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def kept(constraints: Constraints) -> tuple[int, int, int]:
    """Return heads, query rows and value rows of the first block after cutting much."""
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 5, 6)
    with torch.no_grad():  # the last head is worth little, so that it goes when it may
        for layer in (model.blocks[0].q, model.blocks[0].k, model.blocks[0].v):
            layer.weight[-DIM:] *= 0.01
        model.blocks[0].proj.weight[:, -DIM:] *= 0.01
    slim = fxprune.compile(
        model,
        x,
        Budget(macs=0.35),
        method=Magnitude(scope="global"),
        constraints=constraints,
        progress=False,
    )
    positions = fxprune.report(slim).plan.kept.get(("blocks.0.v.weight", 0))
    rows = range(HEADS * DIM) if positions is None else positions.ravel().tolist()
    heads = len({p // DIM for p in rows})
    return heads, *(slim.get_parameter(f"blocks.0.{name}.weight").shape[0] for name in "qv")


def test_everything_may_go() -> None:
    heads, q, v = kept(Constraints())
    assert heads < HEADS
    assert q < HEADS * DIM > v


@pytest.mark.parametrize("pattern", ["blocks.*", "blocks.0", "blocks.*.q", "*.v"])
def test_heads_are_kept(pattern: str) -> None:
    heads, q, v = kept(Constraints(keep_heads=[pattern]))
    assert heads == HEADS
    assert q < HEADS * DIM > v


def test_dims_of_queries_and_keys_are_kept() -> None:
    heads, q, v = kept(Constraints(keep_qk=["blocks"]))
    assert q == heads * DIM
    assert v < heads * DIM


def test_dims_of_values_are_kept() -> None:
    heads, q, v = kept(Constraints(keep_v=["blocks"]))
    assert v == heads * DIM
    assert q < heads * DIM


def test_all_of_attention_is_kept() -> None:
    everything = {"keep_heads": ["blocks"], "keep_qk": ["blocks"], "keep_v": ["blocks"]}
    assert kept(Constraints(**everything)) == (HEADS, HEADS * DIM, HEADS * DIM)


def test_patterns_are_checked() -> None:
    with pytest.raises(fxprune.PlanError, match=r"keep_heads='blocks'\) is one string"):
        Constraints(keep_heads="blocks")
    with pytest.raises(fxprune.PlanError, match=r"keep_qk=.*'attn' matches no layer"):
        kept(Constraints(keep_qk=["attn"]))
