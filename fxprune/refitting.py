"""Refit a slim network layer by layer: every weight for what the layers before it, refitted already, now feed it.

The corrections of `correcting` take every input that stays for what it is in the dense network. It is not: layers
before it have lost inputs too, and errors add up with depth. Here the dense and the slim network walk side by side
through the same batches; each layer is fitted by least squares to what the dense one answers there, from what the slim
one reads there, before the walk goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune import sharing
from fxprune.accumulating import Gram, Spread
from fxprune.calibrating import samples_in
from fxprune.coupling import Coupling
from fxprune.fitting import Answers, best_fit
from fxprune.gathering import Call, rows_made, rows_read, some_places
from fxprune.norms import Norm
from fxprune.pairing import Pair, pairs_of, survey
from fxprune.plans import Plan
from fxprune.shares import Share
from fxprune.sums import gram_of_all, spreads_of_all
from fxprune.tasks import evaluating, inputs_of
from fxprune.values import bind
from fxprune.walking import Seen, Walk

MAX_BYTES = 4 << 30
"""What the values of both networks may take on their way, and the moment of a layer besides: no more batches are read,
and no larger layers refitted."""
POSITIONS = 256
"""How many positions of each sample are read in a layer, at most."""
ROWS = 32
"""How many positions are read for each input of a layer."""


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

    Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks (2017), section 3.2.
    """
    traced = coupling.traced
    with evaluating(traced.root), evaluating(slim), torch.inference_mode(False), torch.no_grad():
        example = bind(traced.graph, traced.args, traced.kwargs)
        known, mine = survey(traced.root, traced.graph, example), survey(slim, slim.graph, example)
        share = Share.of(batches)
        read = _first(share, MAX_BYTES / (known.peak + mine.peak) * samples_in(example))
        given = [bind(traced.graph, *inputs_of(batch)) for batch in read]
        dense, thin = Walk(traced.root, traced.graph, given), Walk(slim, slim.graph, given)
        walks = _Walks(
            plan, {name: tensor for name, tensor, _ in traced.state},
            dict(slim.named_parameters()) | dict(slim.named_buffers()), dict(norms), dense, dense.nodes(), thin,
        )  # fmt: skip
        seeing = _Seeing(share.places, sum(sharing.gather("samples", sum(map(samples_in, read)))))
        return tuple(walks.fit(mine.places, pairs_of(known, mine, norms, MAX_BYTES), seeing, damping))


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
        self, places: Mapping[fx.Node, Seen], pairs: Mapping[fx.Node, Pair], seeing: _Seeing, damping: float
    ) -> Iterator[str]:
        """Walk to the end, and fit and set what comes; yield the weights that were fitted."""
        for n in self.thin.nodes():
            seen, place, pair = self.thin.run(n), places.get(n), pairs.get(n)
            if pair is not None:
                layer = pair.call.layer
                grams = seeing.grams(pair.call, [s for (s,) in seen], self._answers(pair))
                if not all(gram.rows for gram in grams):  # too few samples to check a fit on
                    continue
                _fit(self.there[layer.name], self.there.get(layer.bias or ""), grams, pair, damping)
                yield layer.name
            elif place is not None and place.name in self.norms and place.call is None:
                spread = _spread(place.name, (s.x for (s,) in seen))
                self.norms[place.name].write(*_statistics(self.there, place.name), spread, place.eps)
            else:
                continue
            self.thin.run(n)

    def _answers(self, pair: Pair) -> list[torch.Tensor]:
        """Walk the dense network on to a layer; return what the slim network's is to answer, by batch.

        Where that makes up for what its output is added to, the batch norm in between is to expect as much.
        """
        name, dim = pair.call.layer.name, pair.call.dim
        kept = _outputs(self.plan, name, self.state[name])
        answers = [answer.index_select(dim, kept) for answer in _until(pair.home, self.dense, self.ahead)]
        if pair.additions is None:
            return answers
        dense, slim = pair.additions
        mean, var = (None, None) if dense.norm is None else _statistics(self.state, dense.norm.name)
        for i, (theirs, mine) in enumerate(zip(self.dense.values, self.thin.values, strict=True)):
            missing = theirs[dense.other].index_select(dim, kept) - mine[slim.other]
            answers[i] = answers[i] + dense.owed(missing, dim, var, kept)
        if dense.norm is not None and mean is not None and var is not None:
            spread = _spread(dense.norm.name, answers)
            self.norms[dense.norm.name] = Norm.of(spread.mean, spread.var, mean[kept], var[kept])
        return answers


def _statistics(state: Mapping[str, torch.Tensor], mean: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the running mean of a batch norm, and its running variance."""
    return state[mean], state[f"{mean.removesuffix('mean')}var"]


def _first(batches: Iterable[Any], samples: float) -> list[Any]:
    """Return the first batches of so many samples, one at least."""
    found: list[Any] = []
    for batch in batches:
        samples -= samples_in(batch)
        if found and samples < 0:
            break
        found.append(batch)
    return found


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
        samples: of all of them.
    """

    places: Sequence[int]
    samples: int

    def grams(self, call: Call, seen: Sequence[Seen], answers: Sequence[torch.Tensor]) -> tuple[Gram, Gram]:
        """Return sums over (blocks, rows, inputs * taps + outputs): what the slim layer reads, and is to answer.

        Both are read at the same positions. The second sums are of every fourth sample, to check a fit on.
        """
        layer, grams, is_conv = call.layer, (Gram(), Gram()), bool(call.kernel)
        count = min(POSITIONS, max(4, math.ceil(ROWS * layer.inputs * layer.taps / max(self.samples, 1))))
        for place, s, answer in zip(self.places, seen, answers, strict=False):
            positions = some_places(answer, count, f"{layer.name} {place}", is_conv=is_conv)
            made = rows_made(answer, layer.blocks, positions, is_conv=is_conv)
            rows = torch.cat([rows_read(call, s.x, positions).flatten(2).double(), made.double()], 2)
            checks = (positions[0] + place) % 4 == 3
            for gram, which in zip(grams, (~checks, checks), strict=True):
                if which.any():
                    gram.add(rows[:, which])
        most, others = (gram_of_all(f"{layer.name} {i}", gram) for i, gram in enumerate(grams))
        return most, others


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
