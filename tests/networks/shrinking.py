"""Make networks smaller: without what no output needs, and step by step while a failure remains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from networks.spec import Network, Step


def numbering(network: Network) -> list[range]:
    """The values that each step makes."""
    made, shapes = [], list(network.inputs)
    for step in network.steps:
        start = len(shapes)
        shapes += network.output_shapes(step, tuple(shapes[i] for i in step.inputs))
        made.append(range(start, len(shapes)))
    return made


def reaching(network: Network, roots: tuple[int, ...]) -> Network | None:
    """The steps that the outputs need, with the values `roots` as inputs; None if they need another input."""
    made = numbering(network)
    needed, kept = set(network.outputs) - set(roots), set()
    for number in reversed(range(len(network.steps))):
        step = network.steps[number]
        if number in kept or needed.intersection(made[number]):
            kept.add(number)
            needed.update(set(step.inputs) - set(roots))
            kept.update(step.args[:1] if step.op == "again" else ())
    if not needed <= {i for number in kept for i in made[number]}:
        return None
    shapes, order = network.shapes(), sorted(kept)
    values = [*roots, *(i for number in order for i in made[number])]
    place = {old: new for new, old in reversed(list(enumerate(values)))}  # a root's first place is as an input
    steps = []
    for number in order:
        step = network.steps[number]
        args = (order.index(step.args[0]),) if step.op == "again" else step.args
        steps.append(Step(step.op, tuple(place[i] for i in step.inputs), args))
    inputs, outputs = tuple(shapes[i] for i in roots), tuple(place[i] for i in network.outputs)
    return replace(network, inputs=inputs, steps=tuple(steps), outputs=outputs)


def without_dead_steps(network: Network) -> Network:
    """Drop the steps that no output needs, and number the rest anew."""
    found = reaching(network, tuple(range(len(network.inputs))))
    return network if found is None else found


def instead(network: Network, old: int, new: int) -> Network:
    """Use the value `new` wherever `old` is used."""
    steps = (replace(s, inputs=tuple(new if i == old else i for i in s.inputs)) for s in network.steps)
    return replace(network, steps=tuple(steps), outputs=tuple(new if i == old else i for i in network.outputs))


def smaller(network: Network) -> Iterator[Network]:
    """Networks one move simpler: one output, a value as the only input, a value replaced by an earlier one."""
    shapes = network.shapes()
    inputs = len(network.inputs)
    for i in [*network.outputs, *range(inputs, len(shapes))]:
        yield without_dead_steps(replace(network, outputs=(i,), form="tensor"))
    for i in range(len(shapes)):
        found = reaching(network, (i,))
        if found is not None:
            yield found
    for old in range(len(shapes) - 1, 0, -1):
        for new in range(old):
            if shapes[new] == shapes[old]:
                yield without_dead_steps(instead(network, old, new))
    if network.form != "tensor":
        yield replace(network, outputs=network.outputs[:1], form="tensor")


def size(network: Network) -> tuple[int, ...]:
    """What shrinking makes smaller."""
    return len(network.steps), len(network.inputs), len(network.outputs), int(network.form != "tensor")


def shrink(network: Network, fails: Callable[[Network], bool]) -> Network:
    """Simplify a network as long as `fails` holds, one move at a time.

    Args:
        network: a network for which `fails` is true.
        fails: whether a network still shows the failure; it should catch what it does not look for.
    """
    for candidate in sorted(smaller(network), key=size):
        if candidate.steps and size(candidate) < size(network) and fails(candidate):
            return shrink(candidate, fails)
    return network
