"""Budgets: upper bounds on what the slim network may cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxprune.costs import RESOURCES, Costs
from fxprune.errors import PlanError
from fxprune.latencies import LatencyModel


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

    Raises:
        PlanError: a value that is not positive, none at all, or a latency without its model.

    Example:
        >>> Budget(macs=0.5, params=2_000_000)
        Budget(macs=0.5, params=2000000, latency=None, memory=None)
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    memory: float | None = None
    latency_model: LatencyModel | None = field(default=None, repr=False, compare=False)

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

    def bounds(self, dense: Costs) -> dict[str, float]:
        """Return the absolute bound of every resource that has one."""
        given = {name: getattr(self, name) for name in RESOURCES if getattr(self, name) is not None}
        return {name: value * getattr(dense, name) if value <= 1 else value for name, value in given.items()}

    def to_dict(self) -> dict[str, float]:
        """Return the bounds that were given, by name."""
        return {name: getattr(self, name) for name in RESOURCES if getattr(self, name) is not None}
