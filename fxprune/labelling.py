"""A dispatch mode that carries labels through every ATen call, whatever composite function it came from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune import labels as algebra
from fxprune.atoms import Ledger
from fxprune.cloning import State
from fxprune.labels import Extent, Labels, Shape
from fxprune.meta import UNDEFINED, Kernels, meta_tensor, on_meta, returns_fresh
from fxprune.records import Buffer, Convolution, Interpretation, Term, Work
from fxprune.rules import Op, lookup
from fxprune.values import tensors_in
from fxprune.workspaces import convolving, this_machine

MAX_CONSTANT = 1 << 22
"""Integer constants of up to this many elements are computed, so that indexing with them can be followed."""


class Labelling(TorchDispatchMode):
    """Carry labels through every ATen call."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare each call the wrapper that keeps torch.compile away: nothing here is ever compiled."""
        return False

    def __init__(self, state: Iterable[State]) -> None:
        """Know the parameters and buffers; they are met as they are, or as their twins on the meta device."""
        super().__init__()
        self.record = Interpretation(Ledger(), this_machine())
        self.ledger = self.record.ledger
        self._origin = {id(item[1]): item for item in state}
        self._on_cpu = all(t.is_cpu for _, t, _ in self._origin.values())
        self._state_labels: dict[str, Labels] = {}
        self._twins: dict[int, torch.Tensor] = {}
        self._kernels = Kernels()
        self._overwritten: set[int] = set()
        """Storages of constants that something unknown was written to."""
        self._rules: dict[Any, Any] = {}
        self.calls: list[Any] = []
        """The ops that were called since this was cleared."""

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what stands for a parameter or buffer on the meta device."""
        origin = self._origin.get(id(tensor))
        if origin is None:
            return tensor
        found = self._twins.get(id(tensor))
        if found is None:
            found = self._twins[id(tensor)] = meta_tensor(tensor)
            self._origin[id(found)] = origin
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one ATen call on meta tensors and label what comes out."""
        kwargs = on_meta(func, kwargs or {})
        self.calls.append(func.overloadpacket)
        seen = self._as_before(args) if _reshapes_in_place(func) else args
        out = self._kernels.run(func, args, kwargs)
        results = tensors_in(out)
        inputs = tensors_in(args) + tensors_in(kwargs) if kwargs else tensors_in(args)
        self.read(inputs)
        if results:
            self._fold(func, args, kwargs, results, inputs)
            self._label(Op(func, out, self), seen, kwargs, results, inputs)
            self._account(func, args, results, inputs)
            for t in results:
                t._held = Held(self.record, t)  # pyright: ignore[reportAttributeAccessIssue]
        return out

    def _as_before(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return arguments in which the first tensor keeps its shape and labels, whatever is done to it."""
        before = args[0].detach()
        before._labels = self.labels(args[0])
        return before, *args[1:]

    def call(self, func: Any, args: tuple[Any, ...]) -> torch.Tensor:
        """Label one ATen call on floating tensors without going through the dispatcher; return its first result."""
        return self.enter(func, args, self._kernels.run(func, args, {}))

    def enter(self, func: Any, args: tuple[Any, ...], out: Any) -> torch.Tensor:
        """Label what an ATen call on floating tensors has returned; return the first result."""
        results = [out] if isinstance(out, torch.Tensor) else [out[0], *(t for t in out[1:] if t.numel())]
        inputs = [a for a in args if isinstance(a, torch.Tensor)]
        self._label(Op(func, out, self), args, {}, results, inputs)
        self._account(func, args, results, inputs)
        return results[0]

    # what rules ask for

    def labels(self, tensor: torch.Tensor) -> Labels:
        """Return the labels of a tensor; issue fresh ones to a parameter that is met for the first time."""
        origin = self._origin.get(id(tensor))
        found = getattr(tensor, "_labels", None) if origin is None else self._state_labels.get(origin[0])
        if found is not None:
            return found
        if origin is None or not (tensor.is_floating_point() or tensor.is_complex()):
            return algebra.blank(tensor.ndim)
        return self.name(tensor, algebra.issue(self.ledger, tuple(tensor.shape)))

    def pristine(self, tensor: torch.Tensor) -> bool:
        """Say whether this is a parameter about whose labels nothing has been said yet."""
        origin = self._origin.get(id(tensor))
        return origin is not None and origin[0] not in self._state_labels

    def name(self, tensor: torch.Tensor, labels: Labels) -> Labels:
        """Give a parameter nothing has been said about yet its labels, and return them."""
        name, original, is_parameter = self._origin[id(tensor)]
        self.record.issued[name] = (tuple(tensor.shape), labels, original.element_size(), is_parameter)
        self.record.named_at[name] = self.ledger.node
        self._state_labels[name] = labels
        return labels

    def hold(self, tensor: torch.Tensor, dim: int, reason: str) -> None:
        """Let nothing go along a dim of an activation: it has no labels from then on."""
        tensor._labels = algebra.fix(self.ledger, self.labels(tensor), dim, reason)  # pyright: ignore[reportAttributeAccessIssue]

    def constant(self, shape: Shape) -> np.ndarray:
        """Issue fresh atoms for channels made of a constant, which can be cut anywhere."""
        atoms = self.ledger.fresh(shape)
        self.ledger.mark(atoms)
        return atoms

    def pair(self, x: torch.Tensor, w: torch.Tensor, dim: int) -> None:
        """Remember that `dim` of `x` is summed over with `w`, if both are activations."""
        ids = self.labels(x)[dim]
        if ids is not None and all(getattr(t, "_buffer", NO_BUFFER) is not NO_BUFFER for t in (x, w)):
            self.record.paired.append(ids.ravel())

    def count(self, fixed: int, dims: tuple[Extent, ...]) -> None:
        """Record multiply-accumulates."""
        self.record.work.append(Work(self.ledger.node, fixed, dims))

    def value(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Return the known value of a constant integer tensor."""
        if tensor is None or tensor.is_floating_point() or tensor.is_complex():
            return None
        if tensor.device.type != "meta":
            return tensor
        found = getattr(tensor, "_constant", None)
        if found is None and id(tensor) in self._origin:
            original = self._origin[id(tensor)][1]
            if original.device.type == "meta":
                return None
            found = tensor._constant = original.detach().to("cpu", copy=True)  # pyright: ignore[reportAttributeAccessIssue]
        return None if found is None or found.untyped_storage()._cdata in self._overwritten else found

    def on_read(self, tensor: torch.Tensor, then: Callable[[], object]) -> None:
        """Do something once a tensor is read, as if where it was made."""
        tensor._on_read = self.ledger.node, then  # pyright: ignore[reportAttributeAccessIssue]

    # what happens at every call

    def read(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do what was to be done once these tensors are read."""
        here = self.ledger.node
        for t in tensors:
            waiting = getattr(t, "_on_read", None)
            if waiting is not None:
                self.ledger.node, then = waiting
                then()
                del t._on_read  # pyright: ignore[reportAttributeAccessIssue]
        self.ledger.node = here

    def _fold(self, func: Any, args: Any, kwargs: Any, results: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
        """Compute integer constants: ops on known integers only, and ops that make integers from nothing."""
        if any(t.is_floating_point() or t.is_complex() or t.numel() > MAX_CONSTANT for t in results):
            return
        known = {id(t): self.value(t) for t in inputs}
        if any(v is None for v in known.values()) or func.overloadpacket in UNDEFINED:
            if func._schema.is_mutable:
                written = [v for t in results if (v := known.get(id(t))) is not None]
                self._overwritten.update(v.untyped_storage()._cdata for v in written)
            return
        args, kwargs = pytree.tree_map(lambda a: known[id(a)] if isinstance(a, torch.Tensor) else a, (args, kwargs))
        out = func(*args, **({**kwargs, "device": "cpu"} if "device" in kwargs else kwargs))
        values = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        for result, value in zip(results, values, strict=True):
            if result.shape == value.shape and value.device.type == "cpu":
                result._constant = value  # pyright: ignore[reportAttributeAccessIssue]

    def _label(self, op: Op, args: Any, kwargs: Any, results: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
        known = op.func in self._rules
        rule = self._rules[op.func] if known else self._rules.setdefault(op.func, lookup(op.func))
        if rule is None:
            reached = [t for t in inputs if any(ids is not None for ids in self.labels(t))]
            for t in reached:
                for d in range(t.ndim):
                    algebra.fix(self.ledger, self.labels(t), d, f"reaches {op.name}, which has no rule")
            if reached:
                self.record.unknown.append((self.ledger.node, op.name))
            labels: list[Labels] = [algebra.blank(t.ndim) for t in results]
        else:
            found = rule(op, *args, **kwargs)
            labels = found[: len(results)] if isinstance(found, list) else [found]
        for tensor, mine in zip(results, labels, strict=True):
            if not _fit(mine, tensor.shape):
                raise RuntimeError(f"the rule of {op.name} returned labels that do not fit shape {tuple(tensor.shape)}")
            origin = self._origin.get(id(tensor))
            if origin is None:
                tensor._labels = mine  # pyright: ignore[reportAttributeAccessIssue]
            else:
                self._state_labels[origin[0]] = mine

    def _account(self, func: Any, args: Any, results: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
        """Keep the books of memory: who was allocated when, who was read last when."""
        step = self.record.steps = self.record.steps + 1
        fresh = returns_fresh(func)
        owners: dict[int, Buffer] = {}
        for t in inputs:
            buffer = NO_BUFFER if id(t) in self._origin else getattr(t, "_buffer", None)
            if buffer is None:
                continue
            if buffer is not NO_BUFFER:
                buffer.dies = step
            if not fresh:
                owners[t.untyped_storage()._cdata] = buffer
        for t in results:
            if id(t) not in self._origin and t.numel():
                self.own(t, None if fresh else owners.get(t.untyped_storage()._cdata))
        if self._on_cpu:
            self._work(func.overloadpacket, args, results)

    def _work(self, op: Any, args: Any, results: list[torch.Tensor]) -> None:
        """Note what a kernel of the CPU needs while it runs."""
        step = self.record.steps
        if op is torch.ops.aten.convolution:
            x, weight, bias, stride, padding, dilation, transposed = args[:7]
            original = self._origin[id(weight)][1] if id(weight) in self._origin else weight
            run = convolving(x, original, bias, results[0], stride, padding, dilation, transposed, self.record.machine)
            dims = [(tuple(t.shape), self.labels(t)) for t in (x, weight, results[0])]
            self.record.convolutions.append(Convolution(step, self.ledger.node, run, dims))
        elif op in _OF_CONTIGUOUS and not args[0].is_contiguous():
            fixed, dims = self.term(args[0])
            self.record.buffers.append(Buffer(fixed * args[0].element_size(), dims, step, step))

    def term(self, tensor: torch.Tensor, dim: int | None = None) -> Term:
        """Return the elements of a tensor, or the size of one of its dims, as a product."""
        labels, shape = self.labels(tensor), tensor.shape
        fixed, extents = 1, []
        for d in range(len(shape)) if dim is None else (dim,):
            ids = labels[d]
            if ids is None:
                fixed *= shape[d]
            else:
                extents.append((ids, d))
        return fixed, tuple(extents)

    def own(self, tensor: torch.Tensor, buffer: Buffer | None = None) -> None:
        """Give a tensor its allocation: that of the tensor it is a view of, or a new one."""
        if buffer is None:
            fixed, dims = self.term(tensor)
            buffer = Buffer(fixed * tensor.element_size(), dims, self.record.steps, self.record.steps)
            self.record.buffers.append(buffer)
        tensor._buffer = buffer  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def _reshapes_in_place(func: Any) -> bool:
    """Say whether an op gives the tensor that it is called on another shape, such as `squeeze_`."""
    return torch.Tag.inplace_view in func.tags


def _fit(labels: Labels, shape: Shape) -> bool:
    """Say whether labels are those of a tensor of this shape."""
    if len(labels) != len(shape):
        return False
    for d, ids in enumerate(labels):  # noqa: SIM110 (a loop: this is asked for every call)
        if ids is not None and ids.shape[d] != shape[d]:
            return False
    return True


NO_BUFFER = Buffer(0, (), 0, 0)
"""Stands for the storage of parameters, which is counted apart."""

_OF_CONTIGUOUS = {
    torch.ops.aten.native_layer_norm, torch.ops.aten._softmax, torch.ops.aten._log_softmax,
    torch.ops.aten._safe_softmax,
}  # fmt: skip
"""Ops whose kernel copies an operand that is not contiguous."""


class Held:
    """Goes with a tensor: where a function's locals keep it alive, its memory is taken until they are gone."""

    __slots__ = ("buffer", "node", "record")

    def __init__(self, record: Interpretation, tensor: torch.Tensor) -> None:
        """Watch the memory of a tensor at the node being run; what it returns is kept for others, and not watched."""
        self.record, self.node = record, record.ledger.node
        self.buffer = getattr(tensor, "_buffer", NO_BUFFER)

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        return self  # of a tensor that forward copies: not the record of all that has run, nor half of it

    def __del__(self) -> None:
        if self.record.ledger.node == self.node:
            self.buffer.dies = self.record.steps
