"""The search of HBGS and HBGTS: offers of all groups, the best of which is committed, round by round."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fxprune import sharing
from fxprune.allocating import allocate
from fxprune.atoms import FIXED
from fxprune.calibrations import Calibration
from fxprune.criteria.approximation import Approximator
from fxprune.errors import PlanError
from fxprune.grouping import Group
from fxprune.judging import EndJudge, LayerJudge
from fxprune.offers import Branch, Found, Offer, written
from fxprune.paths import paths_in_any_order
from fxprune.problems import Problem
from fxprune.rerunning import Rerun
from fxprune.resuming import read_state, sums_over, write_state
from fxprune.shares import Share
from fxprune.shrinking import Shrinker, Shrunk
from fxprune.trimming import trim
from fxprune.units import Candidates, Units

if TYPE_CHECKING:
    from fxprune.committing import HBGS, HBGTS

logger = logging.getLogger(__name__)

Spent = tuple[int, float, int]
"""Offers measured; runs of the network, those of the rerun's parts as parts; runs of the published search."""


class Offering:
    """Runs rounds until a budget is met.

    Rounds do not depend on budgets before one is met: asked for a smaller one next, the search goes on from there,
    unless it has a beam, which budgets prune, is tuned or is noted in a file.
    """

    def __init__(self, problem: Problem, method: HBGS | HBGTS, *, judge: str, beam: int = 1) -> None:
        """Prepare.

        Args:
            problem: what is asked.
            method: the settings.
            judge: "layers", "outputs" or "loss".
            beam: how many networks are carried on.
        """
        self.method = method
        self.coupling = problem.coupling
        self._limits = replace(problem.constraints, min_width=max(problem.constraints.min_width, 1))
        self.units = Units(self.coupling, self._limits, 2)
        self._check(problem.bounds)
        reads = method.compensate or method.on == "activations"
        self.data: Calibration = problem.data(method, moments=reads, losses=judge == "loss")
        self.approximator = Approximator(
            self.coupling, self.data, on=method.on, search="backward" if method.backward else "omp"
        )
        moments = self.data.moments if method.compensate else {}
        self.shrinker = Shrinker(self.coupling, moments, method.damping)
        self._layerwise = judge == "layers"
        self._power = 2 if judge == "outputs" else 1
        self._beam = beam
        self._touched = [self.shrinker.touched(self._members(group)) for group in self.coupling.groups()]
        share = Share.of(() if self.data.batches is None else self.data.batches)
        device = next((t.device for _, t, _ in self.coupling.traced.state), torch.device("cpu"))
        batches = share.everywhere(share, device)  # with several ranks, each measures its part of the offers on all
        self.rerun = Rerun(self.coupling, batches, self._touched)
        if not self.rerun.batches:
            raise PlanError(f"{type(method).__name__} has no calibration batches. Pass a list that is not empty.")
        tasks = self.data.tasks if judge == "loss" else None
        self.judge = LayerJudge(self.coupling, self.rerun) if self._layerwise else EndJudge(self.rerun, tasks)
        self.evaluations, self.published = 0, 0
        self._passed: tuple[Branch, int, Spent] | None = None
        self.about: dict[str, Any] = {
            "network": self.coupling.fingerprint,
            "method": repr(method),
            "constraints": repr(problem.constraints),
            "tasks": list(self.data.tasks or {}),
            "weights": float(
                sum(t.double().abs().sum() for t in self.shrinker.state.values() if t.is_floating_point())
            ),
        }

    @property
    def _spent(self) -> Spent:
        return self.evaluations, self.rerun.work, self.published

    @_spent.setter
    def _spent(self, spent: Spent) -> None:
        self.evaluations, self.rerun.work, self.published = spent

    def _members(self, group: Group) -> np.ndarray:
        return self.coupling.in_group(group)[:FIXED]

    def _check(self, bounds: Mapping[str, float]) -> None:
        """Raise PlanError where nothing meets some bounds."""
        allocate(self.coupling, paths_in_any_order(self.coupling), "uniform", self._limits, bounds)

    def run(self, bounds: Mapping[str, float]) -> Found:
        """Return what to keep.

        Args:
            bounds: resource -> the most it may cost, absolute.

        Raises:
            PlanError: the bounds cannot be met, or the checkpoint is of another search.
        """
        self._check(bounds)
        self.bounds = bounds
        self.about["budget"] = dict(bounds)
        beam, best, number = self._resumed()
        while beam:
            here = beam[0], number, self._spent
            children = self._children(beam, number)
            if not children:
                if best is None:
                    raise PlanError(self._stuck(beam[0]))
                break
            number += 1
            beam = []
            for parent, offer in children:
                done = self._finished(parent, offer)
                if done is not None:
                    self._passed = here
                    best = done if best is None or done.error < best.error else best
                else:
                    beam.append(self._committed(parent, offer))
            beam = [b for b in beam if best is None or b.error < best.error]
            self._note(beam, best, number)
        assert best is not None
        tuned = self.shrinker.state if self.method.tune is not None else None
        found = Found(best.now.keep, best.error, best.commits, self.evaluations, self.rerun.work, self.published, tuned)
        logger.info(
            "%s: %d offers measured, for the price of %.0f runs of the network; published: %d",
            type(self.method).__name__, found.evaluations, found.forwards, found.published,
        )  # fmt: skip
        return found

    def _children(self, beam: list[Branch], number: int) -> list[tuple[Branch, Offer]]:
        """Return the best offers of all networks of the beam, of each set of channels the first."""
        found: list[tuple[Branch, Offer]] = []
        for i, branch in enumerate(beam):
            beam[i] = branch = self._with_offers(branch, number)
            found += [(branch, offer) for offer in self._best(branch, number)]
        found.sort(key=lambda pair: pair[1].error)
        distinct = {self._after(branch, offer).tobytes(): (branch, offer) for branch, offer in reversed(found)}
        return sorted(distinct.values(), key=lambda pair: pair[1].error)[: self._beam]

    def _with_offers(self, branch: Branch, number: int) -> Branch:
        """Return a network with offers of all groups; go over to it, for them to be measured."""
        alone = self._beam == 1
        self.rerun.commit(branch.now.values, branch.now.keep if alone else None)
        offers = dict(branch.offers) if self.method.remember else {}
        missing = [group for group in self.coupling.groups() if group.index not in offers]
        made = sharing.spread("offers", lambda group: self._offer(branch, group, number), missing)
        offers |= {group.index: offer for group, offer in zip(missing, made, strict=True)}
        self.published += sum(offer is not None for offer in offers.values())
        return replace(branch, offers=offers)

    def _best(self, branch: Branch, number: int) -> list[Offer]:
        """Return the offers with the least error, as many as the beam is wide, measured anew where others changed."""
        offers = dict(branch.offers)

        def expected(offer: Offer) -> float:
            return offer.error if self._layerwise else branch.error**self._power + offer.rise

        while True:
            known = sorted((o for o in offers.values() if o is not None), key=lambda o: (expected(o), o.group))
            stale = [o for o in known[: self._beam] if o.round < number and not self._layerwise]
            if not stale:
                return known[: self._beam]
            for offer in stale:
                group = self.coupling.groups()[offer.group]
                offers[offer.group] = (
                    self._measured(branch, offer.group, offer.choices, number)
                    if offer.choices
                    else self._offer(branch, group, number)
                )

    def _offer(self, branch: Branch, group: Group, number: int) -> Offer | None:
        """Return what a group offers; None where its limits, or a balance, let nothing go."""
        wanted = max(self.method.filters_per_round // sum(group.takes), 1)
        keep = branch.now.keep
        rest = np.where(keep & ~self.coupling.is_frozen, 0.0, np.inf)
        limits = self.units.candidates(group, keep, group.path(rest)).allowed
        larger = limits[limits >= wanted]
        count = int(larger[0] if len(larger) else limits[-1])
        if not count:
            return None
        choices = self.approximator.next(group, keep, branch.now.values, count)
        if len(choices) < count or self.coupling.violation(self.units.without(keep, choices)):
            return None
        return self._measured(branch, group.index, tuple(map(int, choices.ravel())), number)

    def _measured(self, branch: Branch, group: int, choices: tuple[int, ...], number: int) -> Offer:
        trial = self.shrinker.without(branch.now, self.units.without(branch.now.keep, np.array(choices)), trial=True)
        error = self.judge.error(group, trial.keep, trial.values)
        self.evaluations += 1
        error = error if math.isfinite(error) else math.inf
        return Offer(group, choices, error, error**self._power - branch.error**self._power, number)

    def _after(self, branch: Branch, offer: Offer) -> np.ndarray:
        return self.units.without(branch.now.keep, np.array(offer.choices))

    def _committed(self, branch: Branch, offer: Offer) -> Branch:
        """Return the network without what an offer takes.

        What its neighbours have offered is forgotten; of the rise of the network's error, it is taken for a bound.
        """
        now = self.shrinker.without(branch.now, self._after(branch, offer))
        if self.method.tune is not None:
            now = self._tuned(now)
        mine = self._touched[offer.group]
        offers: dict[int, Offer | None] = {}
        for i, known in branch.offers.items():
            if mine.isdisjoint(self._touched[i]):
                offers[i] = known
            elif not self._layerwise and known is not None:
                offers[i] = replace(offer if i == offer.group else known, choices=(), round=-1)
        tuned = self.method.tune is not None
        return Branch(now, offer.error, {} if tuned else offers, self._noted(branch, offer))

    def _noted(self, branch: Branch, offer: Offer) -> tuple[tuple[int, int, float], ...]:
        return (*branch.commits, (offer.group, len(offer.choices), offer.error))

    def _finished(self, branch: Branch, offer: Offer) -> Branch | None:
        """Return the network without as much of an offer as meets the budget; None where all of it does not."""
        keep = self._after(branch, offer)
        if not self.coupling.costs.within(keep, self.bounds):
            return None
        group = self.coupling.groups()[offer.group]
        rows = np.array(offer.choices).reshape(-1, sum(group.takes))
        unit: Candidates = self.units.candidates(group, branch.now.keep, rows)
        keep = trim(self.units, self.bounds, branch.now.keep, [(unit, len(rows))])
        now = self.shrinker.without(branch.now, keep) if (branch.now.keep | ~keep).all() else Shrunk(keep, {}, {})
        return Branch(now, offer.error, {}, self._noted(branch, offer))

    def _tuned(self, now: Shrunk) -> Shrunk:
        """Let the user train the network; what has gone stays zero."""
        assert self.method.tune is not None
        traced = self.coupling.traced
        student, teacher = copy.deepcopy(traced.module), copy.deepcopy(traced.module)
        names = dict(student.named_parameters()) | dict(student.named_buffers())
        with torch.no_grad():
            for name, value in now.values.items():
                names[name].copy_(value)
        self.method.tune(student, teacher)
        there = [name for name in self.shrinker.state if name in names]
        mine = [names[name].detach().clone() for name in there]
        found = sharing.send("trained weights", 0, mine) if sharing.size() > 1 else mine
        trained = {name: value for name, value in zip(there, found, strict=True) if value is not None}
        self._check_trained(trained)
        values = self.shrinker.take_over(self.shrinker.state | trained, now.keep)
        return Shrunk(now.keep, values, {})

    def _check_trained(self, trained: Mapping[str, torch.Tensor]) -> None:
        """Raise PlanError where training has made a tensor infinite or NaN that was not."""
        for name, value in trained.items():
            if not value.isfinite().all() and self.shrinker.state[name].isfinite().all():
                raise PlanError(
                    f"`tune` left {name!r} with values that are not finite. Lower its learning rate, or look at its "
                    "loss."
                )

    def _stuck(self, branch: Branch) -> str:
        costs = self.coupling.costs(branch.now.keep).to_dict()
        asked = ", ".join(f"{name} {bound:,.0f}" for name, bound in self.bounds.items())
        return (
            f"{self.method} has nothing left to give up, at {costs}; asked were at most {asked}. Loosen the "
            "constraints, or raise the budget."
        )

    # what survives being killed

    def _note(self, beam: list[Branch], best: Branch | None, number: int) -> None:
        if self.method.checkpoint is None or sharing.rank() > 0:
            return
        state = {
            "number": number,
            "beam": [written(b) for b in beam],
            "best": None if best is None else written(best),
            "spent": self._spent,
            "data": self._of_data,
        }
        write_state(self.method.checkpoint, self.about, state)

    @cached_property
    def _of_data(self) -> list[float]:
        """Return what tells the batches from others, whatever their order."""
        return [*sums_over(self.rerun.batches), *(() if isinstance(self.judge, LayerJudge) else self.judge.losses)]

    def _resumed(self) -> tuple[list[Branch], Branch | None, int]:
        if self._passed is not None and self._goes_on(self._passed[0]):
            branch, number, self._spent = self._passed
            return [branch], None, number
        self._spent = 0, 0.0, 0
        dense = Branch(self.shrinker.dense(), 0.0, {}, ())
        if self.coupling.costs.within(dense.now.keep, self.bounds):
            return [], dense, 0
        path = self.method.checkpoint
        known: dict[str, Any] | None = None
        if path is not None:
            known = sharing.from_first("the checkpoint", lambda: read_state(path, self.about))
        if known is None:
            return [dense], None, 0
        before, now = known.get("data", ()), self._of_data
        if len(before) != len(now) or not np.allclose(before, now, rtol=1e-5, atol=0, equal_nan=True):
            raise PlanError(
                f"the checkpoint {path} is of other data: the calibration batches held other numbers. Delete it, or "
                "pass another path."
            )
        self._spent = known["spent"]
        best = None if known["best"] is None else self._read(known["best"])
        return [self._read(b) for b in known["beam"]], best, known["number"]

    def _goes_on(self, branch: Branch) -> bool:
        """Return whether a search for the bounds would come past this network."""
        alone = self._beam == 1 and self.method.tune is None and self.method.checkpoint is None
        return alone and not self.coupling.costs.within(branch.now.keep, self.bounds)

    def _read(self, state: dict[str, Any]) -> Branch:
        keep = np.ones(self.coupling.num_channels, dtype=bool)
        keep[state["gone"]] = False
        offers: dict[int, Offer | None] = {
            int(i): None if o is None else Offer(**(o | {"choices": tuple(o["choices"])}))
            for i, o in state["offers"].items()
        }
        commits = tuple((group, count, error) for group, count, error in state["commits"])
        return Branch(self.shrinker.without(self.shrinker.dense(), keep), state["error"], offers, commits)
