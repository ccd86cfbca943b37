"""Run a module in float64, whatever precision its forward asks for.

Constants that forward computes by itself are the exception. A trace has computed them before, in the precision of the
model, so they are computed in that precision here too and widened after each step: both networks then use the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.meta import returns_fresh
from fxprune.values import tensors_in

aten = torch.ops.aten

WIDE = {
    torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
    torch.complex32: torch.complex128, torch.complex64: torch.complex128,
}  # fmt: skip
_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32}
_COMPLEX = {real: dtype for dtype, real in _REAL.items()}
_LITERAL = {aten.lift_fresh, aten.lift, aten.lift_fresh_copy}


def widened(value: Any) -> Any:
    """Return a value whose tensors are as precise as can be."""
    return pytree.tree_map(lambda t: t.to(WIDE[t.dtype]) if _is_narrow(t) else t, value)


def _is_narrow(t: Any) -> bool:
    return isinstance(t, torch.Tensor) and t.dtype in WIDE


class InFloat64(TorchDispatchMode):
    """Run a module in float64.

    Attributes:
        random: names of the ops that drew random numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.random: set[str] = set()
        self._constants: dict[int, tuple[torch.Tensor, torch.dtype]] = {}

    def know(self, constants: Iterable[torch.Tensor]) -> None:
        """Take tensors in float64 for constants; those that hold no more than float32 does were computed in it."""
        for t in constants:
            narrow = torch.complex64 if t.is_complex() else torch.float32
            fits = t.dtype not in WIDE.values() or torch.equal(t.to(narrow).to(t.dtype).nan_to_num(), t.nan_to_num())
            self._remember(t, narrow if fits else t.dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Widen the precision that an op is given and asked for."""
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # there, composite ops arrive whole
            with torch.inference_mode(False), torch.no_grad(), self:
                return func(*args, **kwargs)
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if drawn:
            self.random.add(str(func.overloadpacket))
        inputs = tensors_in((args, kwargs))
        if not drawn and all(self._is_constant(func, t) for t in inputs):
            return self._run_constant(func, args, kwargs, inputs)
        for t in _written(func, args, kwargs):
            self._constants.pop(_home(t), None)
        if any(map(_is_narrow, inputs)):
            args, kwargs = widened((args, kwargs))
        return widened(self.run(func, args, _asked_wide(kwargs)))

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one op."""
        return func(*args, **kwargs)

    def _is_constant(self, func: Any, t: torch.Tensor) -> bool:
        """Say whether a tensor depends on no input and no parameter: those are all wide."""
        return _home(t) in self._constants or t.dtype in WIDE or func.overloadpacket in _LITERAL

    def _run_constant(self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> Any:
        """Run an op on constants in their own precision, unless it only looks at them in another way."""
        if returns_fresh(func) or not inputs:
            narrow = self._narrowed((args, kwargs))
            if len({t.dtype for t in tensors_in(narrow) if t.is_floating_point() and t.ndim}) > 1:
                narrow = widened(narrow)  # one has the precision of the model, which is float64 here
            out = func(*narrow[0], **narrow[1])
            found = widened(out)
            for before, t in zip(tensors_in(out), tensors_in(found), strict=True):
                self._remember(t, before.dtype)
            return found
        args, kwargs = widened((args, kwargs))
        found = func(*args, **_asked_wide(kwargs))
        for t in _written(func, args, kwargs):
            t.copy_(self._narrowed(t))  # as if it had been computed in its own precision
        for t in tensors_in(found):
            self._remember(t, inputs[0].dtype)
        return found

    def _remember(self, t: torch.Tensor, precision: torch.dtype) -> None:
        """Hold on to a constant and its own precision; a view of one that is known has that of the whole."""
        self._constants.setdefault(_home(t), (t, _REAL.get(precision, precision)))

    def _narrowed(self, value: Any) -> Any:
        def narrow(t: Any) -> Any:
            if not isinstance(t, torch.Tensor) or _home(t) not in self._constants:
                return t
            precision = self._constants[_home(t)][1]
            if t.is_complex():
                precision = _COMPLEX.get(precision, t.dtype)
            return t.to(precision) if precision in WIDE and (t.is_floating_point() or t.is_complex()) else t

        return pytree.tree_map(narrow, value)


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the tensors that an op writes to."""
    if not func._schema.is_mutable:
        return []
    given = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(func._schema.arguments)]
    return [t for a, value in given if a.alias_info is not None and a.alias_info.is_write for t in tensors_in(value)]


def _asked_wide(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "dtype": WIDE[kwargs["dtype"]]} if kwargs.get("dtype") in WIDE else kwargs


def _home(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata
