"""Small real networks of torchvision and timm: half the multiply-accumulates, and the theorem below 1e-9."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from zoo import NETWORKS

import fxprune
from fxprune.verifying import TOLERANCE


@pytest.mark.parametrize("name", NETWORKS)
def test_half_the_macs_and_the_theorem(name: str) -> None:
    small = NETWORKS[name]
    model, x = small.build()
    slim = fxprune.compile(model, x, fxprune.Budget(macs=0.5), progress=False)
    report = fxprune.report(slim)
    assert 0.45 < report.costs.share("macs") <= 0.5
    assert report.verification is not None
    assert report.verification.worst <= TOLERANCE
    assert report.costs.after.params == sum(p.numel() for p in slim.parameters())
    assert slim.state_dict().keys() <= model.state_dict().keys()
    assert all(row.reason and row.node for row in report.frozen)

    _, *sizes = x.shape
    other = torch.randn(2, *sizes) if small.fixed else torch.randn(2, 3, *(size + 32 for size in sizes[1:]))
    with torch.no_grad():
        dense, found = pytree.tree_leaves(model(other)), pytree.tree_leaves(slim(other))
    assert [out.shape for out in found] == [out.shape for out in dense]
    for out in found:
        assert isinstance(out, Tensor)
        assert out.isfinite().all()
        assert not torch.equal(out[0], out[1])  # what is compared is not a constant
