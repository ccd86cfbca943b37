"""Arithmetic in which NaN stands for *absent*: the reference that slim networks are compared with.

A contraction sums over what is present, a statistic is taken over what is present, and everything else lets NaN pass,
as arithmetic does by itself.

A contraction of which all inputs are absent sums over nothing: its outputs are zero, plus the bias, as far as they are
present themselves. Its weight is absent altogether, so it has to say which outputs are: where an output is present and
only its inputs are not, it holds a NaN of its own (`NO_INPUT`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxprune.meta import UNDEFINED
from fxprune.registering import registering
from fxprune.widening import InFloat64

aten = torch.ops.aten

Reference = Callable[..., Any]
_REFERENCE: dict[Any, Reference] = {}


def _absent_aware(*packets: Any) -> Callable[[Reference], Reference]:
    return registering(_REFERENCE, packets, "absent-aware forms")


NO_INPUT = 0x7FF8_0000_0000_0001
"""Bits of the NaN in a weight that is absent only because one of its dims keeps nothing."""


def _lacks_inputs(w: torch.Tensor) -> torch.Tensor:
    return w.view(torch.int64) == NO_INPUT if w.dtype == torch.float64 else torch.zeros_like(w, dtype=torch.bool)


def _absent_products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x: (.., n, k), w: (.., k, m) -> (.., n, m), or of size one: absent, unless only what is summed over is."""
    absent = x.isnan().all(-1, keepdim=True) | w.isnan().all(-2, keepdim=True)
    nothing = x.isnan().all(-1, keepdim=True).all(-2, keepdim=True)
    return absent & ~(nothing & _lacks_inputs(w).any(-2, keepdim=True))


def _present(t: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    return torch.where(t.isnan(), fill, t)


def _mark(out: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
    return torch.where(absent, torch.nan, out)


@_absent_aware(aten.mm, aten.bmm)
def _mm(func: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return _mark(func(_present(x), _present(w)), _absent_products(x, w))


@_absent_aware(aten.addmm, aten.baddbmm)
def _addmm(func: Any, bias: torch.Tensor, x: torch.Tensor, w: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return _mark(func(bias, _present(x), _present(w), **kwargs), _absent_products(x, w))


@_absent_aware(aten.mv, aten.dot, aten.vdot)
def _mv(func: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    out = func(_present(x), _present(w))
    return _mark(out, x.isnan().all(-1) | w.isnan().all(-1))


@_absent_aware(aten._cdist_forward)
def _cdist(func: Any, x: torch.Tensor, y: torch.Tensor, p: float, *args: Any) -> torch.Tensor:
    apart = x.unsqueeze(-2) - y.unsqueeze(-3)
    return _mark(torch.linalg.vector_norm(_present(apart), p, dim=-1), apart.isnan().all(-1))


@_absent_aware(aten._trilinear)
def _trilinear(func: Any, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, *args: Any) -> torch.Tensor:
    wide = []
    for t, dims in zip((x, w, y), args[:3], strict=True):
        for d in dims:
            t = t.unsqueeze(d)
        wide.append(t)
    product = wide[0] * wide[1] * wide[2]
    return _mark(_present(product).sum(args[3]), product.isnan().all(dim=tuple(args[3])))


@_absent_aware(aten.convolution)
def _convolution(func: Any, x: torch.Tensor, w: torch.Tensor, b: Any, *args: Any) -> torch.Tensor:
    transposed, groups = args[3], args[5]
    gone = w.isnan().flatten(2).all(2)
    absent = gone.reshape(groups, -1, w.shape[1]).all(1).reshape(-1) if transposed else gone.all(1)
    if groups == 1 and x.isnan().all():
        absent = absent & ~_lacks_inputs(w).flatten(2).any(2).any(0 if transposed else 1)
    out = func(_present(x), _present(w), None if b is None else _present(b), *args)
    return _mark(out, absent.reshape(1, -1, *[1] * (out.ndim - 2)))


def _dims(dim: Any, x: torch.Tensor) -> list[int]:
    if dim is None or dim == [] or dim == ():
        return list(range(x.ndim))
    return [dim] if isinstance(dim, int) else list(dim)


def _moments(x: torch.Tensor, dims: list[int], correction: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    here = ~x.isnan()
    count = here.sum(dims, keepdim=True)
    mean = torch.where(here, x, 0.0).sum(dims, keepdim=True) / count
    var = torch.where(here, (x - mean) ** 2, 0.0).sum(dims, keepdim=True) / (count - correction)
    return mean, var


def _normalized(x: torch.Tensor, dims: list[int], eps: float) -> torch.Tensor:
    mean, var = _moments(x, dims)
    return (x - mean) / (var + eps).sqrt()


@_absent_aware(aten.native_batch_norm)
def _batch_norm(func: Any, x: Any, w: Any, b: Any, mean: Any, var: Any, training: bool, *args: Any) -> Any:
    """Batch statistics (as instance norm takes them) are over what is present; running ones are per channel anyway."""
    if not training:
        return func(x, w, b, mean, var, training, *args)
    out = _normalized(x, [d for d in range(x.ndim) if d != 1], args[1])
    wide = (1, -1, *[1] * (x.ndim - 2))
    out = out if w is None else out * w.reshape(wide)
    return (out if b is None else out + b.reshape(wide)), x.new_empty(0), x.new_empty(0)


@_absent_aware(aten.native_layer_norm)
def _layer_norm(func: Any, x: torch.Tensor, shape: Any, w: Any, b: Any, eps: float) -> Any:
    out = _normalized(x, list(range(x.ndim - len(shape), x.ndim)), eps)
    out = out if w is None else out * w
    return (out if b is None else out + b), x.new_empty(0), x.new_empty(0)


@_absent_aware(aten.native_group_norm)
def _group_norm(func: Any, x: torch.Tensor, w: Any, b: Any, n: int, c: int, hw: int, groups: int, eps: float) -> Any:
    out = _normalized(x.reshape(n, groups, -1), [2], eps).reshape(x.shape)
    wide = (1, c, *[1] * (x.ndim - 2))
    out = out if w is None else out * w.reshape(wide)
    return (out if b is None else out + b.reshape(wide)), x.new_empty(0), x.new_empty(0)


@_absent_aware(aten._weight_norm_interface)
def _weight_norm(func: Any, v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> Any:
    others = tuple(d for d in range(v.ndim) if d != dim % v.ndim)
    norm = torch.linalg.vector_norm(_present(v), dim=others, keepdim=True)
    return v * (g / norm), norm


@_absent_aware(aten._fft_r2c, aten._fft_c2r, aten._fft_c2c)
def _fft(func: Any, x: torch.Tensor, dims: Any, *args: Any) -> torch.Tensor:
    """What is absent is absent at every frequency: zeros written next to it hold nothing."""
    return _mark(func(_present(x), dims, *args), x.isnan().any(tuple(dims), keepdim=True))


@_absent_aware(aten.grid_sampler_2d, aten.grid_sampler_3d)
def _grid_sample(func: Any, x: torch.Tensor, grid: torch.Tensor, *args: Any) -> torch.Tensor:
    """What is read of something absent is absent, and so is what is read at places that are."""
    absent = x.isnan().flatten(2).all(2) | grid.isnan().flatten(1).all(1, keepdim=True)
    return _mark(func(_present(x), _present(grid), *args), absent.reshape(*x.shape[:2], *[1] * (x.ndim - 2)))


@_absent_aware(aten.view_as_real)
def _view_as_real(func: Any, x: torch.Tensor) -> torch.Tensor:
    return _mark(func(x), x.isnan().unsqueeze(-1))


@_absent_aware(aten.im2col)
def _im2col(func: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
    """The padding of what is absent is absent."""
    out = func(x, *args)
    absent = x.isnan().flatten(2).all(2)
    return _mark(out, absent.repeat_interleave(out.shape[1] // x.shape[1], 1).unsqueeze(-1))


@_absent_aware(aten.constant_pad_nd)
def _pad(func: Any, x: torch.Tensor, pad: Any, *args: Any) -> torch.Tensor:
    """Padding of what is absent is absent: along each padded dim, a line that holds nothing gets nothing."""
    for i in range(len(pad) // 2):
        dim = x.ndim - 1 - i
        out = func(x, [*[0] * (2 * i), *pad[2 * i : 2 * i + 2]], *args)
        x = _mark(out, x.isnan().all(dim, keepdim=True))
    return x


@_absent_aware(aten.where)
def _where(func: Any, condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What is chosen from is absent in both or in none: a condition on what is absent chose at random."""
    return _mark(func(condition, a, b), a.isnan() | b.isnan())


@_absent_aware(aten.masked_fill, aten.index_fill, aten.index_put, aten.scatter, aten.fill)
def _overwritten(func: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What is absent stays so where a value is written over it."""
    return _mark(func(x, *args, **kwargs), x.isnan())


@_absent_aware(aten._prelu_kernel)
def _prelu(func: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Where the slope is absent, the channel is, though what is positive does not meet it."""
    return _mark(func(x, w), w.isnan())


@_absent_aware(aten.mean)
def _mean(func: Any, x: torch.Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> torch.Tensor:
    mean = _moments(x, _dims(dim, x))[0]
    return mean if keepdim else mean.squeeze(tuple(_dims(dim, x)))


@_absent_aware(aten.var, aten.std)
def _var(
    func: Any,
    x: torch.Tensor,
    dim: Any = None,
    *args: Any,
    correction: Any = None,
    keepdim: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    var = _moments(x, _dims(dim, x), 1 if correction is None else correction)[1]
    var = var.sqrt() if func.overloadpacket is aten.std else var
    return var if keepdim else var.squeeze(tuple(_dims(dim, x)))


@_absent_aware(aten.var_mean, aten.std_mean)
def _var_mean(
    func: Any, x: torch.Tensor, dim: Any = None, *args: Any, correction: Any = None, keepdim: bool = False
) -> Any:
    mean, var = _moments(x, _dims(dim, x), 1 if correction is None else correction)
    var = var.sqrt() if func.overloadpacket is aten.std_mean else var
    return (var, mean) if keepdim else (var.squeeze(tuple(_dims(dim, x))), mean.squeeze(tuple(_dims(dim, x))))


@_absent_aware(aten.max, aten.min)
def _extreme(func: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of all of a tensor, or along a dim: of what is present. Of two tensors: as it is."""
    if args and isinstance(args[0], torch.Tensor):
        return func(x, *args, **kwargs)
    fill = -torch.inf if func.overloadpacket is aten.max else torch.inf
    out = func(_present(x, fill), *args, **kwargs)
    if not args:
        return _mark(out, x.isnan().all())
    values, positions = out
    absent = x.isnan().all(args[0], keepdim=values.ndim == x.ndim)
    return _mark(values, absent), positions


_NEUTRAL = {
    aten.sum: 0.0,
    aten.prod: 1.0,
    aten.amax: -torch.inf,
    aten.amin: torch.inf,
    aten.logsumexp: -torch.inf,
    aten.linalg_vector_norm: 0.0,
    aten.norm: 0.0,
}


@_absent_aware(*_NEUTRAL)
def _reduction(func: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    out = func(_present(x, _NEUTRAL[func.overloadpacket]), *args, **kwargs)
    if func.overloadpacket in (aten.linalg_vector_norm, aten.norm):
        args = args[1:] if args else args
    dims = _dims(args[0] if args else kwargs.get("dim"), x)
    absent = x.isnan().all(tuple(dims), keepdim=True) if dims else x.isnan()
    return _mark(out, absent.reshape(out.shape))


@_absent_aware(aten._softmax, aten._log_softmax, aten._safe_softmax)
def _softmax(func: Any, x: torch.Tensor, dim: int, *args: Any) -> torch.Tensor:
    return _mark(func(_present(x, -torch.inf), dim, *args), x.isnan())


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


class AbsentIsNaN(InFloat64):
    """Run a module whose parameters hold NaN at removed positions, as if those positions were not there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op; memory that nothing was written to is not absent, whatever it holds."""
        found = super().__torch_dispatch__(func, types, args, kwargs)
        return found.nan_to_num_() if func.overloadpacket in UNDEFINED else found

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Use the absent-aware form of an op where it has one and NaN is about."""
        reference = _REFERENCE.get(func.overloadpacket)
        if reference is not None and any(_is_floating(a) and bool(a.isnan().any()) for a in args):
            return reference(func, *args, **kwargs)
        writes = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
        absent = args[0].isnan() if writes and _is_floating(args[0]) else None
        found = func(*args, **kwargs)
        if absent is not None:
            args[0].masked_fill_(absent, torch.nan)  # nor does it come back where it is written to
        return found
