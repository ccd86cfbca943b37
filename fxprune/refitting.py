"""Refit a slim network layer by layer: every weight for what the layers before it, refitted already, now feed it.

The corrections of `correcting` take every input that stays for what it is in the dense network. It is not: layers
before it have lost inputs too, and errors add up with depth. Here the dense and the slim network walk side by side
through the same batches; each layer is fitted by least squares to what the dense one answers there, from what the slim
one reads there, before the walk goes on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
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
    constants. Weights that are used in several places stay as they are; so do depthwise convolutions, which have one
    input for each output.

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
    networks = (traced.root, traced.graph), (slim, slim.graph)
    with evaluating(traced.root), evaluating(slim), torch.inference_mode(False), torch.no_grad():
        example = bind(traced.graph, traced.args, traced.kwargs)
        known, mine = (_survey(Walk(*network, [example])) for network in networks)
        room = MAX_BYTES / (known.peak + mine.peak) * samples_in(example)
        share = Share.of(batches)
        read = _first(share, room)
        given = [bind(traced.graph, *inputs_of(batch)) for batch in read]
        dense, thin = (Walk(*network, given) for network in networks)
        seeing = _Seeing(share.places, sum(sharing.gather("samples", sum(map(samples_in, read)))))
        pairs = _pairs(known, mine, norms)
        state = {name: tensor for name, tensor, _ in traced.state}
        there = dict(slim.named_parameters()) | dict(slim.named_buffers())
        ahead, fitted = dense.nodes(), []
        for n in thin.nodes():
            seen, place = thin.run(n), mine.places.get(n)
            if n in pairs:
                pair, layer = pairs[n], pairs[n].call.layer
                kept = _outputs(plan, layer.name, state[layer.name])
                answers = _until(pair.home, dense, ahead)
                grams = seeing.grams(pair.call, [s for (s,) in seen], answers, kept)
                if not all(gram.rows for gram in grams):  # too few samples to check a fit on
                    continue
                _fit(there[layer.name], there.get(layer.bias or ""), grams, pair, damping)
                fitted.append(layer.name)
            elif place is not None and place.name in norms and place.call is None:
                variance = there[f"{place.name.removesuffix('mean')}var"]
                norms[place.name].write(there[place.name], variance, _spread(place.name, seen), place.eps)
            else:
                continue
            thin.run(n)
    return tuple(fitted)


@dataclass(frozen=True, slots=True)
class _Survey:
    """Where a network uses what.

    Attributes:
        places: node -> the layer or batch norm that it runs, where that is one, and is run nowhere else.
        peak: the most bytes that values take.
    """

    places: Mapping[fx.Node, Seen]
    peak: int


def _survey(walk: Walk) -> _Survey:
    seen = {n: walk.run(n)[0] for n in walk.nodes()}
    often = Counter(s.name for found in seen.values() for s in found)
    return _Survey({n: s[0] for n, s in seen.items() if len(s) == 1 and often[s[0].name] == 1}, walk.peak)


def _first(batches: Iterable[Any], samples: float) -> list[Any]:
    """Return the first batches of so many samples, one at least."""
    found: list[Any] = []
    for batch in batches:
        samples -= samples_in(batch)
        if found and samples < 0:
            break
        found.append(batch)
    return found


@dataclass(frozen=True, slots=True)
class _Pair:
    """A layer that the dense network has too.

    Attributes:
        home: the dense network's node of the weight.
        call: how the slim network uses it.
        absorbs: whether a constant in the output is taken up: by the layer's bias, or by the batch norm behind it.
    """

    home: fx.Node
    call: Call
    absorbs: bool


def _pairs(known: _Survey, mine: _Survey, norms: Container[str]) -> dict[fx.Node, _Pair]:
    """Return node of the slim network -> its layer, of those that both networks come to in the same order."""
    order = {n: i for i, n in enumerate(known.places)}
    homes = {s.name: n for n, s in known.places.items() if s.call is not None}
    normed = {id(s.x) for s in mine.places.values() if s.call is None and s.name in norms}
    found: dict[fx.Node, _Pair] = {}
    last = -1
    for n, seen in mine.places.items():
        home = homes.get(seen.name)
        if seen.call is None or home is None or order[home] < last or not _is_alike(seen, known.places[home]):
            continue
        found[n] = _Pair(home, seen.call, seen.call.layer.bias is not None or id(seen.out) in normed)
        last = order[home]
    return found


def _is_alike(seen: Seen, dense: Seen) -> bool:
    """Say whether two outputs have the same positions, and the moment of the layer fits into memory."""
    assert seen.call is not None
    layer, dim = seen.call.layer, 1 if seen.call.kernel else -1
    n = layer.inputs * layer.taps + layer.outputs
    return seen.out.select(dim, 0).shape == dense.out.select(dim, 0).shape and 8 * layer.blocks * n * n <= MAX_BYTES


def _until(home: fx.Node, walk: Walk, nodes: Iterator[fx.Node]) -> list[torch.Tensor]:
    """Walk on to a node of one layer; return what came out of it, by batch."""
    for n in nodes:
        seen = walk.run(n)
        if n is home:
            return [s.out for (s,) in seen]
    raise AssertionError(f"{home} was passed")


def _outputs(plan: Plan, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return which outputs of the dense layer the slim one has."""
    numbers = torch.arange(len(weight)).reshape(-1, *[1] * (weight.ndim - 1)).expand(weight.shape)
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

    def grams(
        self, call: Call, seen: Sequence[Seen], answers: Sequence[torch.Tensor], kept: torch.Tensor
    ) -> tuple[Gram, Gram]:
        """Return sums over (blocks, rows, inputs * taps + outputs): what the slim layer reads, and the dense answers.

        Both networks are read at the same positions. The second sums are of every fourth sample, to check a fit on.
        """
        layer, grams, is_conv = call.layer, (Gram(), Gram()), bool(call.kernel)
        count = min(POSITIONS, max(4, math.ceil(ROWS * layer.inputs * layer.taps / max(self.samples, 1))))
        for place, s, answer in zip(self.places, seen, answers, strict=False):
            positions = some_places(answer, count, f"{layer.name} {place}", is_conv=is_conv)
            wanted = answer.index_select(1 if is_conv else -1, kept.to(answer.device))
            made = rows_made(wanted, layer.blocks, positions, is_conv=is_conv)
            rows = torch.cat([rows_read(call, s.x, positions).flatten(2).double(), made.double()], 2)
            checks = (positions[0] + place) % 4 == 3
            for gram, which in zip(grams, (~checks, checks), strict=True):
                if which.any():
                    gram.add(rows[:, which])
        most, others = (gram_of_all(f"{layer.name} {i}", gram) for i, gram in enumerate(grams))
        return most, others


def _fit(
    weight: torch.Tensor, bias: torch.Tensor | None, grams: tuple[Gram, Gram], pair: _Pair, damping: float
) -> None:
    """Write a layer's weight and bias."""
    layer = pair.call.layer
    n = layer.inputs * layer.taps
    most, others, every = (Answers.of(some, n, centred=pair.absorbs) for some in (grams[:1], grams[1:], grams))
    old = weight.to(every.own).reshape(layer.blocks, layer.outputs, n).transpose(1, 2)
    new = best_fit(old, most, others, every, damping)
    weight.copy_(new.transpose(1, 2).reshape(weight.shape))
    if bias is not None:
        bias.copy_(every.bias(new))


def _spread(name: str, seen: Iterable[Sequence[Seen]]) -> Spread:
    """Return the spread of what a batch norm reads, on all ranks."""
    found: dict[str, Spread] = {}
    for (s,) in seen:
        found.setdefault(name, Spread()).add(s.x)
    return spreads_of_all(found)[name]
