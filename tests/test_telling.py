"""What a formula tells of an op is what its kernel returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from fxprune.telling import FORMULAS, told

aten = torch.ops.aten


def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


IMAGE = (2, 8, 5, 4)
USUAL: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.convolution.default, (t(*IMAGE), t(6, 4, 3, 3), t(6), [2], [1], [1], False, [0], 2), {}),
    (aten.convolution.default, (t(*IMAGE), t(8, 3, 2, 3), None, [2, 3], [0], [1], True, [1], 2), {}),
    (aten.native_batch_norm.default, (t(*IMAGE), t(8), t(8), t(8), t(8), False, 0.1, 1e-5), {}),
    (aten.native_batch_norm.default, (t(*IMAGE), None, None, t(8), t(8), True, 0.1, 1e-5), {}),
    (aten.native_layer_norm.default, (t(*IMAGE), [5, 4], t(5, 4), t(5, 4), 1e-5), {}),
    (aten.native_layer_norm.default, (t(*IMAGE).transpose(1, 2), [4], None, None, 1e-5), {}),
    (aten._softmax.default, (t(*IMAGE), -1, False), {}),
    (aten._safe_softmax.default, (t(*IMAGE).transpose(1, 2), 1), {}),
    (aten.mean.dim, (t(*IMAGE), [2, 3], True), {}),
    (aten.sum.dim_IntList, (t(*IMAGE), [-1]), {}),
    (aten.amax.default, (t(*IMAGE), [1]), {}),
    (aten.amin.default, (t(*IMAGE), [0, -1], True), {}),
    (aten.var.correction, (t(*IMAGE), [1]), {"correction": 0, "keepdim": True}),
    (aten.cat.default, ([t(2, 3, 4), t(2, 5, 4)], -2), {}),
    (aten.linalg_vector_norm.default, (t(*IMAGE), 2, [2, 3], True), {}),
    (aten.mm.default, (t(3, 4), t(4, 5)), {}),
    (aten.bmm.default, (t(2, 3, 4), t(2, 4, 5)), {}),
    (aten.addmm.default, (t(5), t(3, 4), t(4, 5)), {}),
    (aten.addmm.default, (t(5), t(3, 4), t(4, 5)), {"beta": 2, "alpha": 0.5}),
    (aten.linear.default, (t(2, 3, 4), t(5, 4), t(5)), {}),
    (aten.linear.default, (t(3, 4), t(5, 4)), {}),
    (aten.upsample_bilinear2d.default, (t(*IMAGE), [10, 7], False), {}),
    (aten.upsample_bicubic2d.default, (t(*IMAGE), [3, 3], True), {}),
    (aten.upsample_nearest2d.default, (t(*IMAGE), [10, 8]), {}),
    (aten.avg_pool2d.default, (t(*IMAGE), [3, 2], [2], [1]), {}),
    (aten.avg_pool2d.default, (t(*IMAGE), [2], [], [0], False, False, 3), {}),
    (aten.max_pool2d_with_indices.default, (t(*IMAGE), [3], [2, 1], [1], [1, 2]), {}),
    (aten.max_pool2d_with_indices.default, (t(*IMAGE), [2, 2]), {}),
    *[
        (aten.max_pool2d_with_indices.default, (t(1, 2, n, n), [k], [s], [k // 2 - k // 4], [1], True), {})
        for n in (3, 4, 5, 6)
        for k in (1, 2, 3)
        for s in (1, 2, 3)
    ],
    (aten.add.Tensor, (t(*IMAGE), t(5, 1)), {"alpha": 2}),
    (aten.mul.Tensor, (t(*IMAGE), 2.0), {}),
    (aten.gelu.default, (t(*IMAGE),), {"approximate": "tanh"}),
]
UNUSUAL: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.add.Tensor, (t(2), t(2, dtype=torch.float64))),
    (aten.add.Tensor, (t(2, dtype=torch.int64), 1)),
    (aten.add.Tensor, (torch.ones(2), torch.ones(2))),
    (aten.add_.Tensor, (t(2), t(3, 2))),
    (aten.mm.default, (t(3, 4), t(5, 4))),
    (aten.bmm.default, (t(2, 3, 4), t(3, 4, 5))),
    (aten.addmm.default, (t(1), t(3, 4), t(4, 5))),
    (aten.linear.default, (t(3, 4), t(5, 3))),
    (aten.convolution.default, (t(*IMAGE), t(6, 3, 3, 3), None, [1], [1], [1], False, [0], 2)),
    (aten.convolution.default, (t(*IMAGE), t(6, 8, 3, 3), t(5), [1], [1], [1], False, [0], 1)),
    (aten.native_batch_norm.default, (t(*IMAGE), t(8), t(8), t(7), t(8), False, 0.1, 1e-5)),
    (aten.native_layer_norm.default, (t(*IMAGE), [4], t(5), None, 1e-5)),
    (aten.mean.dim, (t(*IMAGE), [1, 4])),
    (aten.mean.dim, (t(*IMAGE), None)),
    (aten.cat.default, ([t(2, 3), t(3, 3)], 1)),
    (aten.cat.default, ([t(2, 3), t(0)], 1)),
    (aten._softmax.default, (t(*IMAGE), 4, False)),
    (aten.avg_pool2d.default, (t(*IMAGE), [6])),
    (aten.avg_pool2d.default, (t(*IMAGE), [2], [2], [2])),
    (aten.max_pool2d_with_indices.default, (t(*IMAGE), [3], [2], [0], [3])),
    (aten.max_pool2d_with_indices.default, (t(*IMAGE)[0], [2])),
    (aten.relu.default, (t(2, dtype=torch.int64),)),
    (aten.permute.default, (t(2, 3), [1, 0])),
]


def described(value: Any) -> list[tuple[Any, ...]]:
    tensors = [value] if isinstance(value, torch.Tensor) else value
    return [(tuple(x.shape), x.dtype) for x in tensors]


def real(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return pytree.tree_map(lambda a: torch.zeros_like(a, device="cpu") if isinstance(a, torch.Tensor) else a, args)


@pytest.mark.parametrize(("func", "args", "kwargs"), USUAL, ids=lambda v: str(v) if not isinstance(v, tuple) else "")
def test_a_formula_tells_what_the_kernel_returns(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found = told(func, args, kwargs)
    assert described(found) == described(func(*real(args), **kwargs))
    assert all(x.is_meta for x in ([found] if isinstance(found, torch.Tensor) else found))


def test_every_formula_is_tested() -> None:
    assert set(FORMULAS) <= {func for func, _, _ in USUAL}


@pytest.mark.parametrize(("func", "args"), UNUSUAL, ids=lambda v: str(v) if not isinstance(v, tuple) else "")
def test_of_other_calls_nothing_is_told(func: Any, args: tuple[Any, ...]) -> None:
    assert told(func, args, {}) is None


def test_in_place_ops_return_what_they_write_to() -> None:
    x = t(2, 3)
    assert told(aten.add_.Tensor, (x, t(3)), {}) is x
