"""Questions about sizes that a merged network answers otherwise than the networks it is made of."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx

from fxprune.cloning import submodule
from fxprune.expecting import Expected, answer
from fxprune.tasks import evaluating
from fxprune.traced import Traced
from fxprune.values import Bound, bind


def drop_unmet(merged: fx.GraphModule, example: Traced) -> None:
    """Take out the nodes that expect a size of channels that a part does not have: no input will ever give it.

    Args:
        merged: changed in place.
        example: one of the networks that were merged, whose example inputs tell.
    """
    if not any(isinstance(m, Expected) for m in merged.modules()):
        return
    asking = _Asking(merged)
    args, kwargs = copy.deepcopy((example.args, example.kwargs))
    with torch.no_grad(), evaluating(merged):
        asking.run(*bind(merged.graph, args, kwargs), enable_io_processing=False)
    for n in asking.unmet:
        merged.graph.erase_node(n)
    if asking.unmet:
        merged.delete_all_unused_submodules()
        merged.recompile()


class _Asking(Bound):
    """Runs a network, and lists the nodes that would raise."""

    def __init__(self, merged: fx.GraphModule) -> None:
        super().__init__(merged)
        self.unmet: list[fx.Node] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, unless it expects another size."""
        module = submodule(self.module, str(n.target)) if n.op == "call_module" else None
        if isinstance(module, Expected):
            (given,), _ = self.fetch_args_kwargs_from_env(n)
            if answer(module.value, given) != module.value:
                self.unmet.append(n)
                return None
        return super().run_node(n)
