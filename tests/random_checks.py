"""Everything that is asked of one random network: a random legal plan, and of some a budget and a step of training."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from networks.spec import Network
from plans import random_keep
from strategies import build, example_inputs, random_network
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune import methods
from fxprune.allocating import steps_of_all
from fxprune.freezing import frozen_rows
from fxprune.masking import AbsentIsNaN
from fxprune.paths import paths_in_any_order
from fxprune.planning import plan_of
from fxprune.verifying import masked_copy, run_in

TOLERANCE = 1e-9
ATTEMPTS = 8  # every round freezes a node more, as in `compile`
TRAINED = 8  # one network in so many is trained and run on another batch size
COMPILED = 8  # and another one in so many is compiled to a budget
FAILURES = ("mismatch", "crash", "unreported")
T = TypeVar("T")


class Timed(Protocol):
    """Calls a function on behalf of a stage, and adds up its seconds."""

    def __call__(self, stage: str, call: Callable[[], T]) -> T: ...


@dataclass
class Outcome:
    """What became of one network.

    Attributes:
        seed: of the network and of its plan.
        ops: the kinds of its steps.
        error: the first line of what was raised, or "".
        failure: one of `FAILURES`, or "".
        frontend: how it was traced, or "".
        refrozen: node -> why its sizes could not be rewritten.
        unreported: what nothing was said about, as "parameter[dim]: count".
        removed: whether the plan removed anything.
        stuck: what holds a network from which nothing can go, most channels first; None where something can.
        share: parameters after / before.
        trained: whether the slim network was trained for a step, which the dense one takes too.
        budget: of one that was also compiled to a budget, "met" or "out of reach"; else "".
        finite: whether the slim network returns finite numbers only, so that the comparison says something.
        seconds: stage -> seconds.
    """

    seed: int
    ops: list[str] = field(default_factory=list)
    error: str = ""
    failure: str = ""
    frontend: str = ""
    refrozen: dict[str, str] = field(default_factory=dict)
    unreported: list[str] = field(default_factory=list)
    removed: bool = False
    stuck: list[str] | None = None
    share: float = 1.0
    trained: bool = False
    budget: str = ""
    finite: bool = True
    seconds: dict[str, float] = field(default_factory=dict)


def unreported(coupling: fxprune.Coupling) -> list[str]:
    """Return the sites of channels that no group decides over and that are not frozen with a reason either."""
    known = np.zeros(coupling.num_channels + 1, dtype=bool)
    known[-1] = True  # fixed positions
    for frozen in coupling.frozen:
        known[frozen.channels] |= bool(frozen.node and frozen.reason)
    for group in coupling.groups():
        known |= coupling.in_group(group)
    found = []
    for site in coupling.sites:
        channels = np.unique(site.channels)
        count = int((~known[channels]).sum())
        if count:
            found.append(f"{site.name}[{site.dim}]: {count} of {len(channels)}")
    return found


def check(seed: int) -> Outcome:
    """Run the network of a seed."""
    outcome = Outcome(seed)
    try:
        _run(seed, outcome)
    except fxprune.VerificationError as error:
        outcome.failure, outcome.error = "mismatch", _first_line(error)
    except Exception as error:
        outcome.failure, outcome.error = "crash", f"{type(error).__name__}: {_first_line(error)}"
    if outcome.unreported and not outcome.failure:
        outcome.failure, outcome.error = "unreported", "; ".join(outcome.unreported)
    return outcome


def _first_line(error: Exception) -> str:
    """Return the first line of a message, with the next one where it only announces a list."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])


def _run(seed: int, outcome: Outcome) -> None:
    def timed(stage: str, call: Callable[[], T]) -> T:
        start = time.perf_counter()
        try:
            return call()
        finally:
            outcome.seconds[stage] = outcome.seconds.get(stage, 0.0) + time.perf_counter() - start

    network = random_network(seed)
    outcome.ops = [step.op for step in network.steps]
    model, inputs = timed("build", lambda: (build(network), example_inputs(network)))
    traced = timed("trace", lambda: fxprune.trace(model, inputs))
    outcome.frontend = traced.frontend
    coupling, plan, slim = _cut(traced, seed, outcome, timed)
    outcome.removed = plan.costs.after != plan.costs.before
    outcome.share = plan.costs.share("params")
    result = timed("verify", lambda: fxprune.verify(coupling, plan, slim))
    if result.worst > TOLERANCE:
        raise fxprune.VerificationError(f"worst error {result.worst:.1e}")
    found = sum(p.numel() for p in slim.parameters())
    if found != plan.costs.after.params:
        raise fxprune.VerificationError(f"{found} parameters are left, {plan.costs.after.params} were predicted")
    with torch.no_grad():
        ours, dense = tensors(slim(*inputs)), tensors(model(*inputs))
    if [t.shape for t in ours] != [t.shape for t in dense]:
        raise fxprune.VerificationError("the outputs are of other shapes")
    outcome.finite = all(bool(t.isfinite().all()) for t in ours)
    if seed % TRAINED == 0:
        timed("other batch", lambda: compare_on(network, model, plan, slim, batch=3))
        outcome.trained = timed("train", lambda: trains_like(model, slim, inputs))
    if seed % COMPILED == COMPILED // 2:
        outcome.budget = timed("compile", lambda: compiled(model, inputs, seed))


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors of an output, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def assert_close(found: Any, expected: Any) -> None:
    """Assert equality to within the tolerance, relative to the largest entry of each output."""
    found, expected = tensors(found), tensors(expected)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        here = b.isfinite()
        assert torch.equal(a.isfinite(), here)
        scale = b[here].abs().max().item() if here.any() else 0.0
        difference = (a - b)[here].abs().max().item() if here.any() else 0.0
        assert difference <= TOLERANCE * (scale or 1.0)


def compare_on(network: Network, model: nn.Module, plan: fxprune.Plan, slim: nn.Module, batch: int) -> None:
    """Compare the slim network with the masked one on inputs of another batch size."""
    inputs = example_inputs(network, batch=batch)
    with torch.no_grad():
        masked = run_in(AbsentIsNaN(), masked_copy(model, plan), copy.deepcopy(inputs), {})
        assert_close(slim(*copy.deepcopy(inputs)), masked)


def trains_like(model: nn.Module, slim: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Train both networks for a step on copies; say whether the dense one can, and then the slim one must."""
    try:
        touched = step_of(copy.deepcopy(model), inputs)
    except Exception:  # whatever stops the dense network is none of the slim one's business
        return False
    ours = step_of(copy.deepcopy(slim), inputs)
    assert ours <= touched, f"{min(ours - touched, default='')} has a gradient, and had none"
    lost = (touched - ours) & dict(slim.named_parameters()).keys()
    assert not lost, f"{min(lost)} has no gradient"
    return bool(ours)


def step_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> set[str]:
    """Train for a step; return which parameters have a gradient."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    outputs = [t for t in tensors(model(*(x.clone() for x in inputs))) if t.requires_grad]
    if not outputs:
        return set()
    torch.stack([t.square().mean() for t in outputs]).sum().backward()
    optimizer.step()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def compiled(model: nn.Module, inputs: tuple[Tensor, ...], seed: int) -> str:
    """Compile a network to a random budget; say whether it was met."""
    rng = np.random.default_rng(seed)
    resource, share = ("macs", "params")[int(rng.integers(2))], float(rng.uniform(0.25, 0.95))
    method = methods.Magnitude(scope=("uniform", "global")[int(rng.integers(2))])
    try:
        slim = fxprune.compile(model, inputs, fxprune.Budget(**{resource: share}), method=method, progress=False)
    except fxprune.PlanError as error:
        if "least possible" not in str(error):  # a plan that breaks a rule is a failure
            raise
        return "out of reach"
    report = fxprune.report(slim)
    assert report.verification is not None
    assert report.verification.worst <= TOLERANCE
    return "met"


def _cut(
    traced: fxprune.Traced, seed: int, outcome: Outcome, timed: Timed
) -> tuple[fxprune.Coupling, fxprune.Plan, fx.GraphModule]:
    """Couple, plan at random and rewrite; freeze nodes whose sizes cannot be rewritten, and start over."""
    attempts = 0
    while True:
        attempts += 1
        coupling = timed("couple", lambda: fxprune.couple(traced, freeze=outcome.refrozen))
        outcome.unreported += [site for site in unreported(coupling) if site not in outcome.unreported]
        if attempts == 1:
            outcome.stuck = _what_holds(coupling)
        plan = timed("plan", lambda coupling=coupling: plan_of(coupling, random_keep(coupling, seed)))
        try:
            slim = timed("rewrite", lambda coupling=coupling, plan=plan: fxprune.rewrite(coupling, plan))
            slim.graph.lint()
            return coupling, plan, slim
        except fxprune.RewriteError as error:
            fresh = {node: reason for node, reason in error.nodes.items() if node not in outcome.refrozen}
            if not fresh or attempts == ATTEMPTS:
                raise
            outcome.refrozen |= fresh


def _what_holds(coupling: fxprune.Coupling) -> list[str] | None:
    """Return why nothing can go, most channels first, or None when something can."""
    everything = steps_of_all(coupling, paths_in_any_order(coupling), "uniform", fxprune.Constraints())
    if len(everything):
        return None
    reasons = list(dict.fromkeys(row.reason for row in frozen_rows(coupling)))
    if (coupling.has_site & ~coupling.is_frozen).any():
        reasons.append("keeps the one step it has: nothing would be left of a group")
    return reasons or ["has no parameters"]
