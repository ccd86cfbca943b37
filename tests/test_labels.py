"""The channel algebra against brute force: every position of small tensors, labelled one by one.

A program is a chain of movement ops and adds over parameters. Two models that know nothing of labels stand beside it:

* *elements*: each element carries the positions (parameter, dim, index) it needs; ops move these sets about. The
  library's labels, read element by element, must say the same.
* *worlds*: for every choice of positions that stay, the program is run on a cut copy whose elements know where they
  come from. A choice is right if every op of the cut program yields exactly the elements that the dense one leaves.
  The library may accept only right choices, and positions that agree in every right choice must be one channel.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

import fxprune
from fxprune.atoms import FIXED, Ledger
from fxprune.closing import close
from fxprune.coupling import Coupling
from fxprune.labels import align
from fxprune.planning import plan_of
from fxprune.records import Labelled

Position = tuple[str, int, int]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One op: `param` (args: shape), `view`, `permute`, `flip`, `slice`, `cat`, `add`; inputs are earlier steps."""

    op: str
    inputs: tuple[int, ...]
    args: tuple[int, ...] = ()


Program = tuple[Step, ...]

# the ops, on anything that has shapes


def view(x: Any, shape: Sequence[int]) -> Any:
    return x.reshape(tuple(shape))


def permute(x: Any, order: Sequence[int]) -> Any:
    return x.permute(tuple(order)) if isinstance(x, (torch.Tensor, fx.Proxy)) else x.transpose(tuple(order))


def shapes_of(program: Program) -> list[Shape]:
    shapes: list[Shape] = []
    for step in program:
        x = shapes[step.inputs[0]] if step.inputs else ()
        if step.op in ("param", "view"):
            shapes.append(step.args)
        elif step.op == "permute":
            shapes.append(tuple(x[d] for d in step.args))
        elif step.op == "flip":
            shapes.append(x)
        elif step.op == "slice":
            dim, start, stop = step.args
            shapes.append((*x[:dim], stop - start, *x[dim + 1 :]))
        elif step.op == "cat":
            (dim,) = step.args
            shapes.append((*x[:dim], sum(shapes[i][dim] for i in step.inputs), *x[dim + 1 :]))
        else:
            shapes.append(tuple(np.broadcast_shapes(*[shapes[i] for i in step.inputs])))
    return shapes


# drawing programs


def factorings(n: int, most: int = 3) -> list[Shape]:
    """Return the shapes of n elements without ones, of up to `most` dims."""
    found = {(n,)}
    for a in range(2, n):
        if n % a == 0 and most > 1:
            found |= {(a, *rest) for rest in factorings(n // a, most - 1)}
    return sorted(found)


def draw(seed: int, length: int, adds: bool, concats: bool = True) -> Program:
    """Draw a program; small shapes, so that all choices of positions can be tried."""
    rng = random.Random(seed)
    shape = rng.choice([(4,), (6,), (8,), (2, 2), (2, 3), (2, 4), (4, 2), (2, 2, 2)])
    steps = [Step("param", (), shape)]
    kinds = ["view", "view", "permute", "flip", "slice"] + ["cat"] * concats + ["add"] * 2 * adds
    while len(steps) < length:
        shapes = shapes_of(tuple(steps))
        at = len(steps) - 1
        x, kind = shapes[at], rng.choice(kinds)
        if kind == "view":
            steps.append(Step("view", (at,), rng.choice(factorings(math.prod(x)))))
        elif kind == "permute" and len(x) > 1:
            steps.append(Step("permute", (at,), tuple(rng.sample(range(len(x)), len(x)))))
        elif kind == "flip":
            steps.append(Step("flip", (at,), (rng.randrange(len(x)),)))
        elif kind == "slice" and max(x) > 2:
            dim = x.index(max(x))
            size = rng.randrange(2, x[dim])
            start = rng.randrange(x[dim] - size + 1)
            steps.append(Step("slice", (at,), (dim, start, start + size)))
        elif kind == "cat" and math.prod(x) <= 6:
            dim = rng.randrange(len(x))
            other = (*x[:dim], 2, *x[dim + 1 :])
            steps += [Step("param", (), other), Step("cat", rng.choice([(at, at + 1), (at + 1, at)]), (dim,))]
        elif kind == "add":
            other = tuple(n if rng.random() < 0.7 else 1 for n in x)[rng.randrange(len(x)) :]
            if math.prod(other) > 1:
                steps += [Step("param", (), other), Step("add", rng.choice([(at, at + 1), (at + 1, at)]))]
    if adds and any(step.op == "cat" for step in steps):  # without a consumer, nothing says what lies in one line
        steps += [Step("param", (), shapes_of(tuple(steps))[-1]), Step("add", (len(steps) - 1, len(steps)))]
    return tuple(steps)


def variables(program: Program) -> list[Position]:
    """Return every position of every dim longer than one of every parameter."""
    params = [(f"p{i}", s.args) for i, s in enumerate(program) if s.op == "param"]
    return [(name, d, i) for name, shape in params for d, n in enumerate(shape) if n > 1 for i in range(n)]


# the library


def coupling_of(program: Program) -> Coupling:
    """Couple the program as the graph of a module; its last value is summed, so that no output holds its channels."""
    root, graph = nn.Module(), fx.Graph()
    proxies: list[fx.Proxy] = []
    tracer = fx.proxy.GraphAppendingTracer(graph)
    x = fx.Proxy(graph.placeholder("x"), tracer)
    for i, step in enumerate(program):
        ins = [proxies[j] for j in step.inputs]
        if step.op == "param":
            root.register_parameter(f"p{i}", nn.Parameter(torch.zeros(step.args)))
            proxies.append(fx.Proxy(graph.get_attr(f"p{i}"), tracer))
        elif step.op == "view":
            proxies.append(view(ins[0], step.args))
        elif step.op == "permute":
            proxies.append(permute(ins[0], step.args))
        elif step.op == "flip":
            proxies.append(ins[0].flip(step.args))
        elif step.op == "slice":
            dim, start, stop = step.args
            proxies.append(ins[0][(*[slice(None)] * dim, slice(start, stop))])
        elif step.op == "cat":
            proxies.append(torch.cat(ins, step.args[0]))
        else:
            proxies.append(ins[0] + ins[1])
    graph.output((x + proxies[-1].sum()).node)
    return fxprune.couple(fxprune.trace(fx.GraphModule(root, graph), torch.zeros(1)))


def last_value(coupling: Coupling) -> Labelled:
    """Return shape and channels of what is summed in the end."""
    total = next(n for n in coupling.traced.module.graph.nodes if n.op == "call_method" and n.target == "sum")
    return coupling.at(total.all_input_nodes[0].name)[0]


def channel_of(coupling: Coupling) -> dict[Position, int]:
    """Return the channel at each position of each parameter."""
    return {(s.name, s.dim, i): int(c) for s in coupling.sites for i, c in enumerate(s.channels.ravel())}


# elements


def element_sets(program: Program) -> np.ndarray:
    """Return, for each element of the last value, the frozenset of positions that it needs."""
    values: list[np.ndarray] = []
    for i, step in enumerate(program):
        ins = [values[j] for j in step.inputs]
        if step.op == "param":
            value = np.empty(step.args, dtype=object)
            for at in np.ndindex(step.args):
                value[at] = frozenset((f"p{i}", d, j) for d, j in enumerate(at) if step.args[d] > 1)
        elif step.op == "view":
            value = view(ins[0], step.args)
        elif step.op == "permute":
            value = permute(ins[0], step.args)
        elif step.op == "flip":
            value = np.flip(ins[0], step.args)
        elif step.op == "slice":
            value = ins[0].take(range(*step.args[1:]), axis=step.args[0])
        elif step.op == "cat":
            value = np.concatenate(ins, step.args[0])
        else:
            value = np.empty(np.broadcast_shapes(ins[0].shape, ins[1].shape), dtype=object)
            wide = np.broadcast_arrays(*ins)
            for at in np.ndindex(value.shape):
                value[at] = wide[0][at] | wide[1][at]
        values.append(value)
    return values[-1]


def needed(coupling: Coupling, channels: set[int]) -> frozenset[int]:
    """Return the plain channels behind some channels: crossings are their parents, a row is implied by its members."""
    parents = {
        c: {a, b}
        for c, a, b in zip(*(getattr(coupling.products, k).tolist() for k in ("channel", "row", "column")), strict=True)
    }
    inside: dict[int, set[int]] = {}
    for batch in coupling.rows:
        for row, columns in zip(batch.row.tolist(), batch.columns.tolist(), strict=True):
            inside.setdefault(row, set()).update(*({c, *parents.get(c, ())} for c in columns))
    while crossings := channels & parents.keys():
        channels = (channels - crossings).union(*(parents[c] for c in crossings))

    def members(row: int, seen: frozenset[int]) -> set[int]:
        found = inside.get(row, set()) - seen
        return found.union(*(members(c, seen | found | {row}) for c in found))

    channels = {c for c in channels if not (members(c, frozenset({c})) - {c}) & channels}
    return frozenset(c for c in channels if c != FIXED)


def library_sets(coupling: Coupling) -> np.ndarray:
    """Return, for each element of the last value, the channels that it needs."""
    value = last_value(coupling)
    sets = np.empty(value.shape, dtype=object)
    wide = [np.broadcast_to(ids, value.shape) for ids in value.labels if ids is not None]
    for at in np.ndindex(value.shape):
        sets[at] = needed(coupling, {int(ids[at]) for ids in wide})
    return sets


# worlds


@dataclass(frozen=True)
class Value:
    """A value whose elements know where they come from: one array of element numbers for each term of the sum."""

    terms: tuple[np.ndarray, ...]

    @property
    def shape(self) -> Shape:
        return self.terms[0].shape

    def map(self, function: Any) -> Value:
        return Value(tuple(function(t) for t in self.terms))

    def rows(self) -> list[tuple[int, ...]]:
        return list(zip(*(t.ravel().tolist() for t in self.terms), strict=True))


def add(x: Value, y: Value) -> Value:
    shape = np.broadcast_shapes(x.shape, y.shape)
    return Value(tuple(np.broadcast_to(t, shape) for t in (*x.terms, *y.terms)))


def cut_sizes(count: int, shape: Shape) -> Iterator[Shape]:
    """Yield the shapes of `count` elements that are nowhere longer than `shape`."""
    for sizes in itertools.product(*(range(1, n + 1) for n in shape)):
        if math.prod(sizes) == count:
            yield sizes


class World:
    """All elements of all parameters, numbered, and which of them a choice of positions leaves."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.dense: list[Value] = []
        self.needs: list[frozenset[Position]] = []
        for i, step in enumerate(program):
            if step.op == "param":
                first = len(self.needs)
                self.needs += [
                    frozenset((f"p{i}", d, j) for d, j in enumerate(at) if step.args[d] > 1)
                    for at in np.ndindex(step.args)
                ]
                self.dense.append(Value((np.arange(first, len(self.needs)).reshape(step.args),)))
            else:
                self.dense.append(next(self._run(i, [self.dense[j] for j in step.inputs], None)))

    def _run(self, at: int, ins: list[Value], left: list[tuple[int, ...]] | None) -> Iterator[Value]:
        """Yield what a cut op may return (`left`: which elements it must have), or what the dense op returns (None)."""
        step, x = self.program[at], ins[0]
        if step.op == "view":
            for sizes in [step.args] if left is None else cut_sizes(math.prod(x.shape), step.args):
                yield x.map(lambda t, s=sizes: view(t, s))
        elif step.op == "permute":
            yield x.map(lambda t: permute(t, step.args))
        elif step.op == "flip":
            yield x.map(lambda t: np.flip(t, step.args))
        elif step.op == "slice":
            dim, start, stop = step.args
            bounds = [(start, stop)] if left is None else itertools.combinations(range(x.shape[dim] + 1), 2)
            for a, b in bounds:
                yield x.map(lambda t, a=a, b=b: t.take(range(a, b), axis=dim))
        elif step.op == "cat":
            (dim,) = step.args
            if len({(*v.shape[:dim], *v.shape[dim + 1 :]) for v in ins}) == 1:
                terms = itertools.zip_longest(*(v.terms for v in ins))
                whole = [
                    [np.full(v.shape, -1) if t is None else t for t, v in zip(ts, ins, strict=True)] for ts in terms
                ]
                yield Value(tuple(np.concatenate(ts, dim) for ts in whole))
        else:
            try:
                yield add(*ins)
            except ValueError:
                return

    def leaves_something(self, keep: set[Position]) -> bool:
        """Say whether something of every value stays; emptying one is for the planner to avoid."""
        here = [*(need <= keep for need in self.needs), True]
        return all(any(all(here[e] for e in row) for row in value.rows()) for value in self.dense)

    def right(self, keep: set[Position]) -> bool:
        """Say whether the program can be cut to the positions that stay."""
        here = [*(need <= keep for need in self.needs), True]  # -1 is no element

        def go(at: int, cut: list[Value]) -> bool:
            if at == len(self.program):
                return True
            step = self.program[at]
            left = [row for row in self.dense[at].rows() if all(here[e] for e in row)]
            if step.op == "param":
                sizes = [
                    sum((f"p{at}", d, j) in keep for j in range(n)) if n > 1 else 1 for d, n in enumerate(step.args)
                ]
                return bool(left) and go(at + 1, [*cut, Value((np.array([e for (e,) in left]).reshape(sizes),))])
            wanted = sorted(left)
            return any(
                sorted(value.rows()) == wanted and go(at + 1, [*cut, value])
                for value in self._run(at, [cut[j] for j in step.inputs], left)
            )

        return go(0, [])


def choices(program: Program) -> Iterator[set[Position]]:
    """Yield every choice of positions that leaves something of every dim."""
    by_dim: dict[tuple[str, int], list[Position]] = {}
    for position in variables(program):
        by_dim.setdefault(position[:2], []).append(position)
    options = [[c for k in range(1, len(ps) + 1) for c in itertools.combinations(ps, k)] for ps in by_dim.values()]
    for chosen in itertools.product(*options):
        yield set(itertools.chain(*chosen))


def accepted(coupling: Coupling, channels: dict[Position, int], keep: set[Position]) -> bool:
    """Say whether the library takes a choice."""
    flags = np.ones(coupling.num_channels, dtype=bool)
    for position, channel in channels.items():
        if position not in keep:
            if channel == FIXED:
                return False
            flags[channel] = False
    if any(channel != FIXED and not flags[channel] for position, channel in channels.items() if position in keep):
        return False
    settled = coupling.settle(flags)
    if any(channel != FIXED and not settled[channel] for position, channel in channels.items() if position in keep):
        return False
    return coupling.violation(settled) is None


def agreeing(rights: list[set[Position]], positions: list[Position]) -> Classes:
    """Return the classes of positions that agree in every right choice, and those that stay in all of them."""
    always = frozenset(p for p in positions if all(p in keep for keep in rights))
    seen: dict[tuple[bool, ...], set[Position]] = {}
    for p in positions:
        if p not in always:
            seen.setdefault(tuple(p in keep for keep in rights), set()).add(p)
    return frozenset(map(frozenset, seen.values())), always


Classes = tuple[frozenset[frozenset[Position]], frozenset[Position]]


def coarser(ours: Classes, theirs: Classes) -> bool:
    """Say whether all positions that are together in `theirs` are together in `ours`, or stay."""
    return all(any(part <= whole for whole in (*ours[0], ours[1])) for part in theirs[0])


def refused(coupling: Coupling, channels: dict[Position, int], keep: set[Position]) -> bool:
    """Say whether the rewriter refuses a choice: a bound of a slice that would differ from row to row, for instance."""
    flags = np.ones(coupling.num_channels, dtype=bool)
    flags[[c for p, c in channels.items() if p not in keep]] = False
    try:
        fxprune.rewrite(coupling, plan_of(coupling, coupling.settle(flags)))
    except fxprune.RewriteError:
        return True
    return False


def blocks(before: Shape, after: Shape) -> Iterator[tuple[int, int]]:
    """Yield how many dims each smallest block of equal product has before and after a view."""
    i = j = 0
    while i < len(before):
        m, n, a, b = before[i], after[j], 1, 1
        while m != n:
            if m < n:
                m, a = m * before[i + a], a + 1
            else:
                n, b = n * after[j + b], b + 1
        yield a, b
        i, j = i + a, j + b


def cuts_across(program: Program) -> bool:
    """Say whether a view cuts dims at another place than they were merged at: there the library aligns early."""
    shapes = shapes_of(program)
    merged = False
    for step, shape in zip(program, shapes, strict=True):
        if step.op == "view":
            found = list(blocks(*(tuple(n for n in s if n > 1) for s in (shapes[step.inputs[0]], shape))))
            if any(b > 1 and (a > 1 or merged) for a, b in found):
                return True
            merged = merged or any(a > 1 for a, _ in found)
    return False


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_every_element_needs_what_it_needs_one_by_one(first: int) -> None:
    for seed in range(first, first + 100):
        program = draw(seed, 3 + seed % 6, adds=False, concats=seed % 2 == 0)
        if cuts_across(program):
            continue
        coupling = coupling_of(program)
        channels = channel_of(coupling)
        expected, found = element_sets(program), library_sets(coupling)
        assert found.shape == expected.shape
        for at in np.ndindex(expected.shape):
            need = needed(coupling, {channels[position] for position in expected[at]})
            assert _loose(coupling, found[at]) == _loose(coupling, need), (seed, program, at)


def _loose(coupling: Coupling, channels: frozenset[int]) -> frozenset[int]:
    return frozenset(c for c in channels if not coupling.is_frozen[c])


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_channels_are_what_all_right_choices_agree_on(first: int) -> None:
    exact = straight = 0
    for seed in range(first, first + 100):
        program = draw(seed, 3 + seed % 6, adds=True)
        positions = variables(program)
        if len(positions) > 12:
            continue
        coupling, world = coupling_of(program), World(program)
        channels = channel_of(coupling)
        possible = [keep for keep in choices(program) if world.leaves_something(keep)]
        rights = [keep for keep in possible if world.right(keep)]
        taken = [keep for keep in possible if accepted(coupling, channels, keep)]
        taken = [keep for keep in taken if keep in rights or not refused(coupling, channels, keep)]
        wrong = [keep for keep in taken if keep not in rights]
        assert not wrong, (seed, program, sorted(wrong[0]))
        ours, theirs = agreeing(taken, positions), agreeing(rights, positions)
        assert coarser(ours, theirs), (seed, program)
        straight += not cuts_across(program)
        exact += ours == theirs and not cuts_across(program)
    assert straight >= 25
    assert exact >= 0.95 * straight  # the rest is aligned earlier than it must be: sound, and less is free


@pytest.mark.parametrize("vector", [False, True])
def test_rows_repeated_for_every_token_do_not_hold_the_tokens(vector: bool) -> None:
    # (tokens, heads x dims): tokens are merged with heads, which repeats the dims of a head for every token
    program = (Step("param", (), (2, 4)), Step("view", (0,), (2, 2, 2)), Step("view", (1,), (4, 2)))
    if vector:
        program += (Step("param", (), (2,)), Step("add", (2, 3)))  # the same dims in every head
    coupling, world = coupling_of(program), World(program)
    channels = channel_of(coupling)
    rights = [keep for keep in choices(program) if world.leaves_something(keep) and world.right(keep)]
    taken = [keep for keep in choices(program) if accepted(coupling, channels, keep)]
    taken = [keep for keep in taken if not refused(coupling, channels, keep)]
    assert all(keep in rights for keep in taken)
    assert any(("p0", 0, 0) not in keep for keep in taken)
    assert agreeing(taken, variables(program)) == agreeing(rights, variables(program))


def test_columns_are_aligned_over_the_rows_they_differ_in_alone() -> None:
    ledger = Ledger()
    tokens, heads = ledger.fresh((3, 1, 1)), ledger.fresh((1, 4, 1))
    dims = ledger.fresh((1, 4, 2))
    (aligned,) = align(ledger, (None, ledger.product(tokens, heads), dims), 2, [1])[2:]
    assert aligned is not None
    assert aligned.shape == (1, 1, 2)
    classes = close(ledger)
    assert len(np.unique(classes.of(tokens))) == 3
    assert len(np.unique(classes.of(heads))) == 4
    assert (classes.frozen_by < 0).all()


def test_worlds_know_wrong_from_right() -> None:
    # shuffle: (4,) -> (2, 2), transposed, flattened, added to a vector; then b and c must not change places
    program = (
        Step("param", (), (4,)), Step("view", (0,), (2, 2)), Step("permute", (1,), (1, 0)), Step("view", (2,), (4,)),
        Step("param", (), (4,)), Step("add", (3, 4)),
    )  # fmt: skip
    world = World(program)
    order = [0, 2, 1, 3]  # where p4's positions are in p0

    def both(kept: set[int]) -> set[Position]:
        return {("p0", 0, i) for i in kept} | {("p4", 0, j) for j in range(4) if order[j] in kept}

    assert world.right(both({0, 1, 2, 3}))
    assert world.right(both({0, 2}))
    assert world.right(both({0, 1}))
    assert not world.right(both({1, 2}))  # the cut view is (2, 1): b before c, and c before b in the dense network
    assert not world.right(both({0, 1, 2}))
    assert not world.right(both({0, 2}) - {("p4", 0, 0)} | {("p4", 0, 3)})
