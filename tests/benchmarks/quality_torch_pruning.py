"""Torch-Pruning's importances, each in Torch-Pruning's own pruner, at a share of the multiply-accumulates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from quality_data import Batch
from quality_problems import Problem
from quality_training import macs_of
from torch import Tensor, nn
from zoo_torch_pruning import leaves, output_layers

import fxprune

TRIALS = 10  # of the pruning ratio
OVER = 0.02  # by so much the macs may exceed the budget, relative: in Torch-Pruning's favour
SAMPLES = 64  # losses that are differentiated one by one

Importance = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class TorchPruning:
    """An importance in `torch_pruning.pruner.BasePruner`, with every option at its default.

    Attributes:
        make: makes the importance.
        prepare: shows it the network and data, as its documentation says; None where it reads weights only.
        everywhere: channels of all layers compete (`global_pruning`); otherwise each layer loses the same part.
    """

    make: Callable[[], Importance]
    prepare: Callable[[Importance, nn.Module, Problem, Sequence[Batch], tp.pruner.BasePruner], None] | None = None
    everywhere: bool = False

    def start(self, network: nn.Module, problem: Problem, batches: Sequence[Batch]) -> Callable[[float], nn.Module]:
        """Prepare the importance; return what prunes a copy of the network to a share of its macs."""
        network = copy.deepcopy(network)
        examples = batches[0][0][:1]
        outputs = output_layers(fxprune.couple(fxprune.trace(network, examples)))
        torch.manual_seed(0)  # of the random importance
        importance = self.make()
        if self.prepare is not None:
            pruner = self._pruner(network, importance, examples, outputs, 0.5)
            self.prepare(importance, network, problem, batches, pruner)
        dense = macs_of(network, examples)

        def at_ratio(ratio: float) -> nn.Module:
            slim, known = _copies(network, importance)
            torch.manual_seed(0)
            self._pruner(slim, known, examples, outputs, ratio).step()
            slim.zero_grad()
            return slim

        return lambda share: at_ratio(ratio_for(share, lambda ratio: macs_of(at_ratio(ratio), examples) / dense))

    def _pruner(
        self, network: nn.Module, importance: Importance, examples: Tensor, outputs: Sequence[str], ratio: float
    ) -> tp.pruner.BasePruner:
        return tp.pruner.BasePruner(
            network,
            examples,
            importance,
            global_pruning=self.everywhere,
            pruning_ratio=ratio,
            ignored_layers=[network.get_submodule(name) for name in outputs],
            in_channel_groups={},  # its defaults are shared between pruners
            out_channel_groups={},
            num_heads={},
            output_transform=leaves,
        )


def ratio_for(share: float, measure: Callable[[float], float]) -> float:
    """Return the pruning ratio that leaves the most macs within a share of the dense network's, by bisection.

    Args:
        share: of the macs to keep; may be exceeded by `OVER`.
        measure: ratio -> share of the macs that is left; falls as the ratio grows.

    Raises:
        ValueError: even the largest ratio leaves more.
    """
    low, high, found = 0.0, 1.0, None
    for _ in range(TRIALS):
        middle = (low + high) / 2
        if measure(middle) <= share * (1 + OVER):
            high = found = middle
        else:
            low = middle
    if found is None:
        raise ValueError(f"no pruning ratio below 1 leaves {share:.0%} of the macs or less")
    return found


def _copies(network: nn.Module, importance: Importance) -> tuple[nn.Module, Importance]:
    """Copy a network with its gradients, and an importance that may refer to its layers."""
    twin, known = copy.deepcopy((network, importance))
    for old, new in zip(network.parameters(), twin.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    return twin, known


def _gradients(_: Importance, network: nn.Module, problem: Problem, batches: Sequence[Batch], __: Any) -> None:
    """Leave the gradient of the loss on the weights."""
    for batch in batches:
        problem.loss(network(batch[0]), batch).backward()


def _squares(importance: Any, network: nn.Module, problem: Problem, batches: Sequence[Batch], _: Any) -> None:
    """Differentiate the losses of single samples, and let the importance accumulate their squares."""
    importance.zero_grad()
    for batch in _samples(batches[0]):
        network.zero_grad()
        problem.loss(network(batch[0]), batch).backward()
        importance.accumulate_grad(network)


def _fisher(importance: Any, network: nn.Module, problem: Problem, batches: Sequence[Batch], pruner: Any) -> None:
    """Let the importance watch layers while the loss is differentiated."""
    importance._prepare_model(network, pruner)  # there is no public way
    for batch in batches:
        network.zero_grad()
        problem.loss(network(batch[0]), batch).backward()
        importance.step()
    importance._rm_hooks(network)


def _activations(importance: Any, network: nn.Module, _: Problem, batches: Sequence[Batch], __: Any) -> None:
    """Run all data at once: the importance keeps what it saw last."""
    with importance.compute_importance(network), torch.no_grad():
        network(torch.cat([inputs for inputs, _ in batches]))


def _samples(batch: Batch) -> list[Batch]:
    inputs, targets = batch
    rows = [slice(i, i + 1) for i in range(min(SAMPLES, len(inputs)))]
    return [(inputs[row], {name: target[row] for name, target in targets.items()}) for row in rows]


_PREPARED: dict[str, tuple[Callable[[], Importance], Any]] = {
    "magnitude": (tp.importance.MagnitudeImportance, None),
    "taylor": (tp.importance.TaylorImportance, _gradients),
    "hessian": (tp.importance.HessianImportance, _squares),
    "bn-scale": (tp.importance.BNScaleImportance, None),
    "lamp": (tp.importance.LAMPImportance, None),
    "fpgm": (tp.importance.FPGMImportance, None),
    "activation": (tp.importance.ActivationImportance, _activations),
    "obdc": (lambda: tp.importance.OBDCImportance(num_classes=10), _fisher),
    "random": (tp.importance.RandomImportance, None),
}

TORCH_PRUNING: dict[str, TorchPruning] = {
    f"tp-{name}{'-global' if everywhere else ''}": TorchPruning(make, prepare, everywhere)
    for name, (make, prepare) in _PREPARED.items()
    for everywhere in (False, True)
}
"""All importances of Torch-Pruning by the names of this benchmark; its `Group...` classes are the same as those."""
