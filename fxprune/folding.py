"""What is left of an emptied branch: a constant, the same at every place, found by running what follows its last sum.

The nodes between the contractions that sum over nothing and the additions at the end form a graph of its own, without
inputs. It is run twice. On weights that stand for any weights, under a mode that lets only those ops pass which turn
what is the same at every place into the same: that says whether the branch may go, and along which dims its constant
varies. And, cut to the channels that stay, on the real weights in float64: that gives its values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.cloning import clone, submodule
from fxprune.coupling import Coupling
from fxprune.emptying import CannotEmptyError, Removal
from fxprune.labels import Shape
from fxprune.literals import argument, plain_name
from fxprune.traced import TRAINING, Traced, taking_part

aten = torch.ops.aten

NOTHING = "fxprune_nothing"
"""Name of the buffers that stand for the biases of contractions without one."""
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WITH_BIAS = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution",
}  # fmt: skip
_BIAS_FIRST = {"addmm", "baddbmm"}
_WITHOUT_BIAS = {"matmul", "mm", "bmm", "einsum"}
_TAKES_SIZES = {
    "view", "reshape", "expand", "flatten", "unflatten", "permute", "transpose", "getitem", "narrow", "slice", "roll",
    "split", "chunk", "_unsafe_view",
}  # fmt: skip
_STEADY = {
    aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.transpose, aten.t, aten.expand, aten.clone,
    aten.contiguous, aten.squeeze, aten.unsqueeze, aten.alias, aten.detach, aten.select, aten.slice, aten.split,
    aten.split_with_sizes, aten.unbind, aten.roll, aten.flip, aten.lift_fresh, aten._to_copy, aten.copy_, aten.mm,
    aten.addmm, aten.native_batch_norm, aten.native_layer_norm, aten.native_group_norm, aten.mean, aten.amax,
    aten.amin, aten._adaptive_avg_pool2d, aten.empty_like, aten.hardswish, aten.hardswish_, aten._prelu_kernel,
    aten.glu, aten.upsample_nearest2d, aten.upsample_bilinear2d,
}  # fmt: skip
"""Ops, besides the pointwise ones, whose result is the same at every place and for every size if their operands are."""


@dataclass(frozen=True, slots=True)
class Fold:
    """What takes the place of emptied branches.

    Attributes:
        traced: a network without inputs that returns, for each end, the constant at every place.
        constants: end of a branch -> shape of its constant in the dense network, of size one where it is the same
            everywhere; None where it is zero whatever the weights.
        dtypes: end of a branch -> dtype of its constant.
    """

    traced: Traced
    constants: dict[str, Shape | None]
    dtypes: dict[str, torch.dtype]


def fold(coupling: Coupling, removal: Removal) -> Fold:
    """Find what is left of emptied branches.

    Raises:
        CannotEmptyError: something that is not the same at every place, or cannot be told.
    """
    traced = _Constants(coupling, removal).traced()
    dtypes = {end: coupling.record.nodes[end][0].dtype for end in removal.ends}
    return Fold(traced, dict(zip(removal.ends, _shapes(traced), strict=True)), dtypes)


class _Constants:
    """The graph of constants in the making."""

    def __init__(self, coupling: Coupling, removal: Removal) -> None:
        self.record = coupling.record
        self.source = coupling.traced
        self.removal = removal
        self.root = clone(coupling.traced.root)
        self.graph = fx.Graph()
        self._twin: dict[fx.Node, fx.Node] = {}
        self._attention: set[Any] = set()
        """Nodes that return attention weights too."""

    def traced(self) -> Traced:
        """Return the network of the constants."""
        nodes = {n.name: n for n in self.source.graph.nodes}
        wanted = self._wanted([nodes[end] for end in self.removal.ends])
        for n in self.source.graph.nodes:
            if n in wanted:
                self._twin[n] = self._bias_alone(n) if n.name in self.removal.sums else self._copied(n)
        self.graph.output(tuple(self._twin[nodes[end]] for end in self.removal.ends))
        state, _ = taking_part(self.root, self.graph)
        return replace(self.source, root=self.root, graph=self.graph, args=(), kwargs={}, state=state, notes=())

    def _wanted(self, ends: list[fx.Node]) -> set[fx.Node]:
        """Return what the constants are computed from."""
        found: set[fx.Node] = set()
        left = list(ends)
        while left:
            n = left.pop()
            if n in found:
                continue
            found.add(n)
            sources = n.all_input_nodes
            if n.name in self.removal.sums:
                bias = self._bias(n)[0]
                sources = [bias] if isinstance(bias, fx.Node) else []
            left += [s for s in sources if self.record.nodes.get(s.name)]
        return found

    def _copied(self, n: fx.Node) -> fx.Node:
        if plain_name(n) == "getitem" and n.args[0] in self._attention:
            if n.args[1] != 0:
                raise CannotEmptyError(f"would leave no attention weights for node {n.name!r} to return")
            return self._twin[n.all_input_nodes[0]]
        sized = any(not self.record.nodes.get(s.name) and s.target != TRAINING for s in n.all_input_nodes)
        if sized and plain_name(n) not in _TAKES_SIZES:
            raise CannotEmptyError(f"would leave a constant that may depend on sizes, at node {n.name!r}")
        if plain_name(n) in _WITHOUT_BIAS and sum(s.name in self.removal.constant for s in n.all_input_nodes) > 1:
            raise CannotEmptyError(f"would leave a product of two constants at node {n.name!r}")
        args, kwargs = map_arg((n.args, n.kwargs), self._argument)
        return self.graph.create_node(n.op, n.target, args, kwargs, n.name)

    def _argument(self, n: fx.Node) -> Any:
        """Return what stands for an argument: a node, or the number that it was."""
        if n in self._twin:
            return self._twin[n]
        return False if n.target == TRAINING else self.record.numbers[n.name]

    def _bias(self, n: fx.Node) -> tuple[Any, int]:
        """Return the bias of a contraction (a node, the name of a parameter, or None) and the dim it is along."""
        ndim = len(self.record.nodes[n.name][0].shape)
        if n.op == "call_module":
            module = submodule(self.source.root, str(n.target))
            if isinstance(module, nn.MultiheadAttention):
                self._attention.add(n)
                return None if module.out_proj.bias is None else f"{n.target}.out_proj.bias", ndim - 1
            kind = next((k for k in _LAYERS if isinstance(module, k)), None)
            usual = kind is not None and type(module).forward is kind.forward and "bias" in module._parameters
            if usual and not module._forward_hooks and not module._forward_pre_hooks:
                name = None if module.bias is None else f"{n.target}.bias"
                return name, ndim - 1 if kind is nn.Linear else ndim - 1 - len(module.kernel_size)  # pyright: ignore
        elif n.op in ("call_function", "call_method"):
            name = plain_name(n)
            if name in _WITH_BIAS:
                return argument(n, 2, "bias"), ndim - 1 if name == "linear" else 1
            if name in _BIAS_FIRST and not n.kwargs:
                return n.args[0], ndim - 1
            if name in _WITHOUT_BIAS:
                return None, ndim - 1
        raise CannotEmptyError(f"would leave nothing for node {n.name!r} to read, which is no plain contraction")

    def _bias_alone(self, n: fx.Node) -> fx.Node:
        """Put the bias of a contraction, or zeros, in the place of what it returns."""
        t = self.record.nodes[n.name][0]
        bias, dim = self._bias(n)
        if bias is None:
            sizes = [1 if ids is None else size for size, ids in zip(t.shape, t.labels, strict=True)]
            bias = f"{NOTHING}_{n.name}"
            like = next(value for _, value, _ in self.source.state if value.is_floating_point())
            self.root.register_buffer(bias, torch.zeros(sizes, dtype=t.dtype, device=like.device))
            value = self.graph.get_attr(bias)
        else:
            known = self._twin.get(bias) if isinstance(bias, fx.Node) else self.graph.get_attr(bias)
            if known is None or (not isinstance(bias, str) and len(self.record.nodes[bias.name][0].shape) != 1):
                raise CannotEmptyError(f"would leave a bias at node {n.name!r} that is no vector of parameters")
            sizes = [size if d == dim else 1 for d, size in enumerate(t.shape)]
            value = self.graph.call_method("view", (known, sizes))
        wide = self.graph.call_method("expand", (value, list(t.shape)))
        return self.graph.create_node("call_method", "clone", (wide,), {}, n.name)


class _Steady(TorchDispatchMode):
    """Lets only those ops pass that keep what is the same at every place the same."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        steady = packet in _STEADY or torch.Tag.pointwise in func.tags
        if packet is aten.convolution:
            padding, transposed = args[4], args[6]
            steady = not any(padding) and not transposed
        if packet is aten.empty:  # what a batch norm reserves
            steady = 0 in args[0]
        if not steady or torch.Tag.nondeterministic_seeded in func.tags:
            raise CannotEmptyError(f"would leave what {packet} may not turn into the same constant at every place")
        return func(*args, **(kwargs or {}))


def _shapes(traced: Traced) -> list[Shape | None]:
    """Run constants on weights that stand for any weights; return the dims along which each varies."""
    generator = torch.Generator().manual_seed(0)
    stand_ins = {id(t): _stand_in(name, t, generator) for name, t, _ in traced.state}
    module = fx.GraphModule(clone(traced.root, stand_ins), traced.graph).eval()
    try:
        with torch.no_grad(), _Steady():
            values = module()
    except CannotEmptyError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise CannotEmptyError(f"would leave a constant that cannot be computed ({reason})") from error
    return [tuple(n if _varies(v, d) else 1 for d, n in enumerate(v.shape)) if v.any() else None for v in values]


def _stand_in(name: str, t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random weights in the place of a parameter or buffer; integers, and what stands for no bias, stay."""
    if not t.is_floating_point():
        return t.cpu()
    value = torch.rand(t.shape, generator=generator, dtype=torch.float64) + 0.5
    value = torch.zeros_like(value) if name.startswith(NOTHING) else value
    return nn.Parameter(value, requires_grad=False) if isinstance(t, nn.Parameter) else value


def _varies(value: torch.Tensor, dim: int) -> bool:
    first = value.narrow(dim, 0, 1)
    return not torch.allclose(value, first.expand_as(value), rtol=1e-9, atol=1e-12)


def narrowed(values: list[torch.Tensor], constants: dict[str, Shape | None]) -> dict[str, torch.Tensor]:
    """Return the values of the constants that are not zero, of size one along the dims they do not vary along.

    Raises:
        CannotEmptyError: one varies where it should not.
    """
    found = {}
    for (end, shape), value in zip(constants.items(), values, strict=True):
        if shape is None:
            continue
        for d, n in enumerate(shape):
            if n == 1 and value.shape[d] > 1:
                if not value.is_meta and _varies(value, d):
                    raise CannotEmptyError(f"would leave a constant that is not the same at every place, at {end!r}")
                value = value.narrow(d, 0, 1)
        found[end] = value
    return found
