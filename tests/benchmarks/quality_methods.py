"""Every method of the quality benchmark: fxprune's, and all importances of Torch-Pruning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from quality_data import Batch
from quality_problems import Problem
from quality_torch_pruning import TORCH_PRUNING
from torch import nn

import fxprune
from fxprune import methods
from fxprune.calibrating import calibrate
from fxprune.methods import AnyMethod, PathMethod


class Contender(Protocol):
    """What the benchmark asks of a method."""

    def start(self, network: nn.Module, problem: Problem, batches: Sequence[Batch]) -> Callable[[float], nn.Module]:
        """Look at a network and calibration data; return what makes the slim network of a share of the macs."""
        ...


@dataclass(frozen=True, slots=True)
class Ours:
    """A method of fxprune, in `fxprune.compile`.

    Attributes:
        method: which.
        one_score: it is shown the sum of the losses in place of each task's.
    """

    method: AnyMethod
    one_score: bool = False

    def start(self, network: nn.Module, problem: Problem, batches: Sequence[Batch]) -> Callable[[float], nn.Module]:
        """Calibrate once, if the method reads moments; return what compiles to a budget."""
        losses = {"sum": problem.loss} if self.one_score else problem.losses
        tasks = {name: fxprune.Task(loss, target=None if self.one_score else name) for name, loss in losses.items()}
        examples, known = batches[0][0][:1], batches
        if isinstance(self.method, PathMethod):
            coupling = fxprune.couple(fxprune.trace(network, examples))
            known = calibrate(coupling, batches, tasks, by_class=getattr(self.method, "within", 1.0) < 1)

        def compiled(share: float) -> nn.Module:
            return fxprune.compile(
                network,
                examples,
                fxprune.Budget(macs=share),
                method=self.method,
                calibration=known,
                tasks=tasks,
                verify=False,
                progress=False,
            )

        return compiled


OURS: dict[str, Contender] = {
    "joint": Ours(methods.Joint()),
    "joint-sequential": Ours(methods.Joint(sequential=True)),
    "joint-one-score": Ours(methods.Joint(), one_score=True),
    "joint-uniform": Ours(methods.Joint(scope="uniform")),
    "joint-classes": Ours(methods.Joint(within=0.2)),
    "joint-plain": Ours(methods.Joint(compensate=False)),
    "pagcp": Ours(methods.PAGCP()),
    "pagcp-fast": Ours(methods.PAGCP(fast=True)),
    "catro": Ours(methods.CATRO()),
    "hbgs": Ours(methods.HBGS()),
    "hbgs-backward": Ours(methods.HBGS(backward=True)),
    "hbgs-decompose": Ours(methods.HBGS(backward=True, decompose=True)),
    "hbgts": Ours(methods.HBGTS()),
    "hbgts-backward": Ours(methods.HBGTS(backward=True)),
    "hbgts-loss": Ours(methods.HBGTS(backward=True, judge="loss")),
    "filter-omp": Ours(methods.FilterOMP()),
    "filter-backward": Ours(methods.FilterBackward()),
    "filter-backward-activations": Ours(methods.FilterBackward(on="activations")),
    "magnitude": Ours(methods.Magnitude()),
    "magnitude-global": Ours(methods.Magnitude(scope="global")),
    "taylor": Ours(methods.Taylor()),
    "taylor-global": Ours(methods.Taylor(scope="global")),
    "bn-scale": Ours(methods.BatchNormScale()),
    "bn-scale-global": Ours(methods.BatchNormScale(scope="global")),
    "random": Ours(methods.Random()),
}
CONTENDERS: dict[str, Contender] = {**OURS, **TORCH_PRUNING}
