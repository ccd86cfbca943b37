"""Budgets: upper bounds on what the slim network may cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxprune.costs import COMBINED, RESOURCES, Costs
from fxprune.errors import PlanError
from fxprune.latencies import LatencyModel
from fxprune.weighing import Combinations, check_combinations


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper bounds; at least one, several at once. A value up to 1.0 is a share of the dense network's cost.

    Attributes:
        macs: multiply-accumulates of one forward pass over the example inputs.
        params: elements of all parameters.
        latency: microseconds of a forward pass, as `latency_model` predicts.
        memory: peak bytes of a forward pass: parameters, buffers, inputs and live activations.
        latency_model: from `LatencyModel.measure`, on the network and the machine that count; also without a bound on
            latency, so that plans and reports tell it.
        combinations: for networks of several tasks, which run some of them now and others later: count macs and params
            over combinations of tasks instead. "mean" over all combinations, "max" for the most that any takes (all
            tasks together), or tasks -> share for a mean weighted by how often each combination runs, such as
            `{("seg",): 0.5, ("seg", "depth"): 0.5}`; shares are divided by their sum. Tasks are outputs, called as in
            `select_tasks`; a combination takes what the network that `select_tasks` makes of it takes. Bounds as
            shares are of the dense network's mean. Memory and latency are those of all tasks together.

    Raises:
        PlanError: a value that is not positive, none at all, a latency without its model, or combinations that are
            none or have nothing to count.

    Example:
        >>> Budget(macs=0.5, params=2_000_000)
        Budget(macs=0.5, params=2000000, latency=None, memory=None, combinations=None)
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    memory: float | None = None
    latency_model: LatencyModel | None = field(default=None, repr=False, compare=False)
    combinations: Combinations | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if self.latency_model is not None and not isinstance(self.latency_model, LatencyModel):
            raise PlanError(
                f"latency_model={self.latency_model!r:.60} is no latency model. Pass what "
                "`fxprune.LatencyModel.measure(traced)` or `fxprune.LatencyModel.load(path)` returned."
            )
        if self.latency is not None and self.latency_model is None:
            raise PlanError(
                "Budget(latency=...) needs a latency model of the network on its target. Pass "
                "`latency_model=fxprune.LatencyModel.measure(fxprune.trace(model, example_inputs))`."
            )
        given = {name: getattr(self, name) for name in RESOURCES if getattr(self, name) is not None}
        if not given:
            raise PlanError(
                "Budget() bounds nothing. Pass at least one of `macs=`, `params=`, `memory=`, `latency=`, such "
                "as `Budget(macs=0.5)`."
            )
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise PlanError(
                    f"Budget({name}={value!r}) is not a positive number. Pass a share such as 0.5, or an absolute "
                    f"bound above 1."
                )
        if self.combinations is not None:
            check_combinations(self.combinations)
            if given.keys().isdisjoint(COMBINED):
                raise PlanError(
                    f"Budget(combinations={self.combinations!r}) bounds neither macs nor params, which are what is "
                    "counted over combinations. Pass one of them too, such as `macs=0.5`."
                )

    def bounds(self, dense: Costs) -> dict[str, float]:
        """Return the absolute bound of every resource that has one."""
        return {name: value * getattr(dense, name) if value <= 1 else value for name, value in self.to_dict().items()}

    def to_dict(self) -> dict[str, float]:
        """Return the bounds that were given, by the name of what they bound among costs."""
        given = {name: getattr(self, name) for name in RESOURCES if getattr(self, name) is not None}
        return given if self.combinations is None else {COMBINED.get(name, name): v for name, v in given.items()}
