"""Refit a slim network layer by layer: every weight for what the layers before it, refitted already, now feed it.

The corrections of `correcting` take every input that stays for what it is in the dense network. It is not: layers
before it have lost inputs too, and errors add up with depth. Here the dense and the slim network walk side by side
through the same batches; each layer is fitted by least squares to what the dense one answers there, from what the slim
one reads there, before the walk goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from fxprune import sharing
from fxprune.accumulating import Gram, Spread
from fxprune.calibrating import samples_in
from fxprune.coupling import Coupling
from fxprune.errors import PlanError
from fxprune.fitting import Answers, best_fit
from fxprune.gathering import Call, rows_made, rows_read, some_places
from fxprune.norms import Norm
from fxprune.pairing import Pair, Place, pairs_of, survey
from fxprune.plans import Plan
from fxprune.shares import Share
from fxprune.sums import gram_of_all, spreads_of_all
from fxprune.tasks import evaluating, inputs_of
from fxprune.values import bind, tensors_in
from fxprune.walking import Seen, Walk

MAX_BYTES = 4 << 30
"""What the values of both networks may take on their way, and the fit of a layer besides: no more batches are read,
and no larger layers refitted."""
POSITIONS = 256
"""How many positions of each sample are read in a layer, at most."""
ROWS = 32
"""How many positions are read for each input of a layer."""
CHECK = 4
"""Every so manieth sample is one to check fits on."""


def refit(
    coupling: Coupling,
    plan: Plan,
    slim: fx.GraphModule,
    norms: Mapping[str, Norm],
    batches: Iterable[Any],
    damping: float,
) -> tuple[str, ...]:
    """Fit the weights of a slim network in place, from its first layer to its last.

    With y what the dense layer answers, x what the slim one reads, and W its weight: that becomes
    W + (C - W H) (H + d)^-1, H = E[x x^T], C = E[y x^T], both centred where a bias or a batch norm behind it takes up
    constants. Where the output is added to something computed before, as to a shortcut, y has what that misses on top.
    Weights that are used in several places stay as they are.

    Args:
        coupling: of the dense network.
        plan: what stays.
        slim: from `rewrite(coupling, plan)`, corrected or not.
        norms: running mean -> what the dense network's batch norm did to the data; its statistics are set as the walk
            comes to it.
        batches: of this rank; as many are read as the values of both networks fit into memory.
        damping: d, as a share of the mean diagonal of H; more where that is better on samples that a fit has not seen.

    Returns:
        The weights that were refitted.

    Raises:
        PlanError: there are too few samples to check a fit on.

    Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks (2017), section 3.2.
    """
    traced = coupling.traced
    with evaluating(traced.root), evaluating(slim), torch.no_grad():
        example = bind(traced.graph, traced.args, traced.kwargs)
        known, mine = survey(traced.root, traced.graph, example), survey(slim, slim.graph, example)
        share = Share.of(batches)
        bound = ((samples_in(batch), bind(traced.graph, *inputs_of(batch))) for batch in share.batches)
        read = _first(bound, MAX_BYTES / (known.peak + mine.peak) * _elements(example))
        seeing = _Seeing.of(share, [count for count, _ in read])
        given = [values for _, values in read]
        dense, thin = Walk(traced.root, traced.graph, given), Walk(slim, slim.graph, given)
        walks = _Walks(
            plan, traced.by_name,
            dict(slim.named_parameters()) | dict(slim.named_buffers()), dict(norms), dense, dense.nodes(), thin,
        )  # fmt: skip
        return tuple(walks.fit(mine.places, pairs_of(known, mine, norms, MAX_BYTES), seeing, damping))


def _elements(values: Any) -> int:
    return max(sum(t.numel() for t in tensors_in(values)), 1)


def _first(batches: Iterable[tuple[int, Any]], elements: float) -> list[tuple[int, Any]]:
    """Return the first batches of so many elements, one at least."""
    found: list[tuple[int, Any]] = []
    for count, values in batches:
        elements -= _elements(values)
        if found and elements < 0:
            break
        found.append((count, values))
    return found


@dataclass(frozen=True, slots=True)
class _Walks:
    """The dense and the slim network, on their way through the same batches.

    Attributes:
        plan: what stays.
        state: parameters and buffers of the dense network.
        there: those of the slim one.
        norms: running mean -> what the batch norm is to do to the data.
        dense: the walk of the dense network.
        ahead: its nodes that are left.
        thin: the walk of the slim one.
    """

    plan: Plan
    state: Mapping[str, torch.Tensor]
    there: Mapping[str, torch.Tensor]
    norms: dict[str, Norm]
    dense: Walk
    ahead: Iterator[fx.Node]
    thin: Walk

    def fit(
        self, places: Mapping[fx.Node, Place], pairs: Mapping[fx.Node, Pair], seeing: _Seeing, damping: float
    ) -> Iterator[str]:
        """Walk to the end, and fit and set what comes; yield the weights that were fitted."""
        for n in self.thin.nodes():
            seen, place, pair = self.thin.run(n), places.get(n), pairs.get(n)
            if pair is not None:
                layer = pair.call.layer
                answers, norm = self._answers(pair)
                grams = seeing.grams(pair.call, [s for (s,) in seen], answers)
                if not all(gram.rows for gram in grams):  # nothing to check a fit on
                    continue
                _fit(self.there[layer.name], self.there.get(layer.bias or ""), grams, pair, damping)
                self.norms.update(norm)
                yield layer.name
            elif place is not None and place.name in self.norms and place.call is None:
                spread = _spread(place.name, (s.x for (s,) in seen))
                self.norms[place.name].write(*_statistics(self.there, place.name), spread, place.eps)
            else:
                continue
            self.thin.run(n)

    def _answers(self, pair: Pair) -> tuple[list[torch.Tensor], dict[str, Norm]]:
        """Walk the dense network on to a layer; return what the slim network's is to answer, by batch.

        Where that makes up for what its output is added to, the batch norm in between is to take it to another level:
        running mean -> what that is to do then.
        """
        name, dim = pair.call.layer.name, pair.call.dim
        kept = _outputs(self.plan, name, self.state[name])
        answers = [answer.index_select(dim, kept) for answer in _until(pair.home, self.dense, self.ahead)]
        if pair.additions is None:
            return answers, {}
        dense, slim = pair.additions
        others = [
            (theirs[dense.other].index_select(dim, kept), mine[slim.other])
            for theirs, mine in zip(self.dense.values, self.thin.values, strict=True)
        ]
        if any(not a.shape == b.shape == y.shape for (a, b), y in zip(others, answers, strict=True)):
            return answers, {}  # alike for the example inputs alone
        mean, var = (None, None) if dense.norm is None else _statistics(self.state, dense.norm.name)
        answers = [y + dense.owed(a - b, dim, var, kept) for (a, b), y in zip(others, answers, strict=True)]
        if dense.norm is None or mean is None or var is None:
            return answers, {}
        spread = _spread(dense.norm.name, answers)
        level = Norm.of(spread.mean, spread.var, mean[kept], var[kept], dense.norm.eps).level
        return answers, {dense.norm.name: replace(self.norms[dense.norm.name], level=level)}


def _statistics(state: Mapping[str, torch.Tensor], mean: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the running mean of a batch norm, and its running variance."""
    return state[mean], state[f"{mean.removesuffix('mean')}var"]


def _until(home: fx.Node, walk: Walk, nodes: Iterator[fx.Node]) -> list[torch.Tensor]:
    """Walk on to a node of one layer; return what came out of it, by batch."""
    for n in nodes:
        seen = walk.run(n)
        if n is home:
            return [s.out for (s,) in seen]
    raise AssertionError(f"{home} was passed")


def _outputs(plan: Plan, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return which outputs of the dense layer the slim one has."""
    numbers = torch.arange(len(weight), device=weight.device).reshape(-1, *[1] * (weight.ndim - 1)).expand(weight.shape)
    return plan.cut(name, numbers).flatten(1)[:, 0]


@dataclass(frozen=True, slots=True)
class _Seeing:
    """What is read of the batches.

    Attributes:
        places: of each batch, among those of all ranks.
        counts: samples in each.
        starts: samples in the batches before each, of all ranks.
        samples: of all batches of all ranks.
    """

    places: Sequence[int]
    counts: Sequence[int]
    starts: Sequence[int]
    samples: int

    @staticmethod
    def of(share: Share, counts: Sequence[int]) -> _Seeing:
        """Number the samples of all ranks; these are the counts of the first batches of this one.

        Raises:
            PlanError: there are too few.
        """
        places = share.places[: len(counts)]
        parts = sharing.gather("samples", list(zip(places, counts, strict=True)))
        every = dict(sorted(pair for part in parts for pair in part))
        starts = dict(zip(every, accumulate(every.values(), initial=0), strict=False))
        total = sum(every.values())
        if total < CHECK:
            raise PlanError(
                f"sequential=True has {total} sample(s) to read: fits are checked on every {CHECK}th. Pass more of "
                "them as calibration, some hundreds if there are."
            )
        return _Seeing(places, counts, [starts[place] for place in places], total)

    def grams(self, call: Call, seen: Sequence[Seen], answers: Sequence[torch.Tensor]) -> tuple[Gram, Gram]:
        """Return sums over (blocks, rows, inputs * taps + outputs): what the slim layer reads, and is to answer.

        Both are read at the same positions. The second sums are of every fourth sample, to check a fit on.
        """
        layer, grams, is_conv = call.layer, (Gram(), Gram()), bool(call.kernel)
        most = min(POSITIONS, max(4, math.ceil(ROWS * layer.inputs * layer.taps / self.samples)))
        batches = zip(self.places, self.counts, self.starts, seen, answers, strict=True)
        for place, count, start, s, wanted in batches:
            answer = call.batched(wanted)
            positions = some_places(answer, most, f"{layer.name} {place}", is_conv=is_conv)
            positions = _some(positions, most * count, place)
            made = rows_made(answer, layer.blocks, positions, is_conv=is_conv)
            rows = torch.cat([rows_read(call, call.batched(s.x), positions).flatten(2).double(), made.double()], 2)
            checks = (start + _samples(positions, answer, count, is_conv=is_conv)) % CHECK == CHECK - 1
            for gram, which in zip(grams, (~checks, checks), strict=True):
                if which.any():
                    gram.add(rows[:, which])
        fitted, checked = (gram_of_all(f"{layer.name} {i}", gram) for i, gram in enumerate(grams))
        return fitted, checked


def _some(positions: tuple[torch.Tensor, ...], most: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Return so many of the positions, by chance: where several dims are one, there are more than asked for."""
    if len(positions[0]) <= most:
        return positions
    picked = torch.randperm(len(positions[0]), generator=torch.Generator().manual_seed(seed))[:most].sort().values
    return tuple(index[picked.to(index.device)] for index in positions)


def _samples(positions: tuple[torch.Tensor, ...], out: torch.Tensor, count: int, *, is_conv: bool) -> torch.Tensor:
    """Return which sample of its batch each position is of: by the first dim, alone or with others, or the second."""
    if len(out) != count and not is_conv and out.ndim > 2 and out.shape[1] == count:
        return positions[1]
    return positions[0] * count // len(out)


def _fit(weight: torch.Tensor, bias: torch.Tensor | None, grams: tuple[Gram, Gram], pair: Pair, damping: float) -> None:
    """Write a layer's weight and bias."""
    layer = pair.call.layer
    n = layer.inputs * layer.taps
    most, others, every = (Answers.of(some, n, centred=pair.absorbs) for some in (grams[:1], grams[1:], grams))
    old = weight.to(every.own).reshape(layer.blocks, layer.outputs, n).transpose(1, 2)
    new = best_fit(old, most, others, every, damping)
    weight.copy_(new.transpose(1, 2).reshape(weight.shape))
    if bias is not None:
        bias.copy_(every.bias(new))


def _spread(name: str, read: Iterable[torch.Tensor]) -> Spread:
    """Return the spread of what a batch norm reads, on all ranks."""
    found: dict[str, Spread] = {}
    for x in read:
        found.setdefault(name, Spread()).add(x)
    return spreads_of_all(found)[name]
