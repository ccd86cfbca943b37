"""Walk through a network node by node, all batches at once, and see which layers and batch norms each node runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fxprune.cloning import names_of
from fxprune.functions import as_function
from fxprune.gathering import Call, call_of
from fxprune.running import Runner
from fxprune.values import clones, tensors_in


@dataclass(frozen=True, slots=True)
class Seen:
    """A layer or batch norm at work, or a parameter or buffer that something else reads.

    Attributes:
        name: of the layer's weight, of the batch norm's running mean, or of the parameter.
        call: how the layer uses its weight; None for all others.
        x: what went in.
        out: what came out; of a layer, without a bias that is computed and no parameter.
        eps: of the batch norm.
        scale: the batch norm's weight, if it has one.
    """

    name: str
    call: Call | None
    x: torch.Tensor
    out: torch.Tensor
    eps: float = 0.0
    scale: torch.Tensor | None = None


class Walk:
    """A graph on some batches, on its way through its nodes; values that nothing needs any more are let go of.

    Attributes:
        values: of each batch: node -> what it returned.
        peak: the most bytes that values have taken.
    """

    def __init__(self, module: torch.nn.Module, graph: fx.Graph, inputs: Iterable[Sequence[Any]]) -> None:
        """Begin before the first node, in eval mode and without gradients, for which the caller cares.

        Args:
            module: what the graph runs on; parameters may change on the way.
            graph: of the network.
            inputs: of each batch, the values of the graph's placeholders; the graph may write to copies of them.
        """
        places = [n for n in graph.nodes if n.op == "placeholder"]
        self.values: list[dict[fx.Node, Any]] = [
            dict(zip(places, clones(list(given)), strict=True)) for given in inputs
        ]
        self.peak = 0
        self._runner = Runner(module, graph)
        self._watch = _Watch(names_of(module))
        self._nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        last = {source: n for n in self._nodes for source in [n, *n.all_input_nodes]}
        self._done = {n: [s for s in {n, *n.all_input_nodes} if last[s] is n] for n in self._nodes}

    def nodes(self) -> Iterator[fx.Node]:
        """Yield the nodes in order; each is to be run before the next is asked for."""
        for n in self._nodes:
            yield n
            self.peak = max(self.peak, sum(t.numel() * t.element_size() for t in tensors_in(self.values)))
            for env in self.values:
                for done in self._done[n]:
                    env.pop(done, None)

    def run(self, n: fx.Node) -> list[list[Seen]]:
        """Run a node on all batches, for the first time or again; return what was at work, by batch."""
        found = []
        for env in self.values:
            self._runner.env = env
            with self._watch:
                env[n] = self._runner.run_node(n)
            found.append(self._watch.take())
        return found


class _Watch(TorchFunctionMode):
    """Takes down the layers and batch norms that run."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self._seen: list[Seen] = []

    def take(self) -> list[Seen]:
        """Return what ran since this was called last."""
        seen, self._seen = self._seen, []
        return seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        func, args, kwargs = as_function(func, args, kwargs)
        if func is F.batch_norm:
            name = self._names.get(id(kwargs.get("running_mean")))
            if name is not None:
                seen = Seen(name, None, kwargs["input"], out, kwargs["eps"], kwargs.get("weight"))
                self._seen.append(seen)
            return out
        call = call_of(self._names, func, args, kwargs, single=True)
        if call is not None:
            bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
            made = out
            if bias is not None and call.layer.bias is None:
                made = out - bias.reshape(-1, *[1] * len(call.kernel))
            self._seen.append(Seen(call.layer.name, call, args[0], made))
        else:
            read = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor) and id(a) in self._names]
            self._seen += [Seen(self._names[id(a)], None, a, a) for a in read]
        return out
