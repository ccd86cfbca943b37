"""Draw a network, one step at a time, from any source of choices."""

from __future__ import annotations

from dataclasses import replace

from networks.ops import ALL, MAP, OPS, TOKENS, VECTOR, Args, Op, Picker, Shape
from networks.shrinking import without_dead_steps
from networks.spec import FORMS, Network, Step

MOST_STEPS = 18  # of which up to eight for the heads
MOST = {MAP: (48, 8, 8), TOKENS: (65, 64), VECTOR: (192,)}

# One entry per unit of weight, so that a choice is one integer; `again` calls an earlier step's module once more.
HEADS = {rank: [n for n, op in OPS.items() if rank in op.ranks and op.head] for rank in ALL}
TAKING = {rank: [n for n, op in OPS.items() if rank in op.ranks and not op.head] for rank in ALL}
BY_RANK = {r: [n for n in [*HEADS[r], *TAKING[r]] for _ in range(OPS[n].weight)] + ["again"] * 3 for r in ALL}


def fits(shape: Shape) -> bool:
    """Whether a value is of a size that keeps networks small, and not degenerate."""
    channels = shape[0] if len(shape) == MAP else shape[-1]
    return channels >= 2 and all(a <= b for a, b in zip(shape, MOST[len(shape)], strict=True))


class Growing:
    """A network in the making: the steps so far and the shapes of their values."""

    def __init__(self, pick: Picker, inputs: tuple[Shape, ...]) -> None:
        self.pick = pick
        self.inputs = inputs
        self.steps: list[Step] = []
        self.shapes: list[Shape] = list(inputs)
        self.used: set[int] = set()

    def value(self) -> int:
        """Pick a value: mostly a recent one that nothing uses yet, sometimes any."""
        values = [i for i in range(len(self.shapes)) if i not in self.used]
        if self.pick.integer(0, 2) == 2:
            values = list(range(len(self.shapes)))
        return values[-1 - self.pick.integer(0, min(len(values), 4) - 1)]

    def add(self, op: str, inputs: tuple[int, ...], args: Args, made: tuple[Shape, ...]) -> None:
        """Append a step."""
        self.steps.append(Step(op, inputs, args))
        self.shapes += made
        self.used.update(inputs)

    def partners(self, op: type[Op], first: int) -> tuple[int, ...] | None:
        """Pick the further inputs of an op, other values than the first where there are any."""
        pairs = [i for i, s in enumerate(self.shapes) if op.pairs(self.shapes[first], s)]
        others = [i for i in pairs if i != first]
        if others and (first not in pairs or self.pick.integer(0, 7) < 7):
            pairs = others[::-1]
        return tuple(self.pick.choice(pairs) for _ in range(op.arity - 1)) if pairs else None

    def try_op(self, name: str, first: int) -> bool:
        """Append the op on the value, if it takes it and makes values of a good size."""
        if name == "again":
            return self.try_again(first)
        op, shape = OPS[name], self.shapes[first]
        if not op.accepts(shape):
            return False
        further = self.partners(op, first) if op.arity > 1 else ()
        if further is None:
            return False
        shapes = tuple(self.shapes[i] for i in (first, *further))
        args = tuple(int(a) for a in op.draw(self.pick, *shapes))
        made = op.outputs(shapes, args)
        if not all(map(fits, made)):
            return False
        self.add(name, (first, *further), args, made)
        return True

    def try_again(self, first: int) -> bool:
        """Call the module of an earlier step with parameters on another value of the same shape."""
        can = [
            (number, value)
            for number, step in enumerate(self.steps)
            if step.op != "again" and OPS[step.op].shared
            for value, shape in enumerate(self.shapes)
            if value != step.inputs[0] and shape == self.shapes[step.inputs[0]]
        ]
        if not can:
            return False
        number, value = self.pick.choice(can)
        step = self.steps[number]
        self.add("again", (value,), (number,), OPS[step.op].outputs((self.shapes[value],), step.args))
        return True

    def grow(self) -> None:
        """Append one step, or none where a few tries find nothing that fits."""
        first = self.value()
        names = BY_RANK[len(self.shapes[first])]
        for _ in range(4):
            if self.try_op(self.pick.choice(names), first):
                return

    def finish(self) -> tuple[int, ...]:
        """Pick the outputs among the values that nothing uses, most of them behind a head."""
        ends = [i for i in range(len(self.shapes)) if i not in self.used]
        outputs = []
        for end in ends[-self.pick.choice((1, 2, 4)) :]:
            rank = len(self.shapes[end])
            if self.pick.integer(0, 3) < 3 and self.try_op(self.pick.choice(HEADS[rank]), end):
                end = len(self.shapes) - 1
                if rank > VECTOR and len(self.shapes[end]) == VECTOR and self.try_op("linear", end):
                    end += 1
            outputs.append(end)
        return tuple(outputs)


def grow(pick: Picker) -> Network:
    """Draw a network of about 3 to 18 steps; the smallest choices make the simplest one."""
    size = pick.choice((4, 8, 6))
    count = 1 + (pick.integer(0, 5) == 5)
    inputs = tuple((pick.choice((4, 6, 8)), size, size) for _ in range(count))
    growing = Growing(pick, inputs)
    for i in range(count):
        growing.try_op(pick.choice(("conv2d", "conv_block", "functional_conv")), i)
    for i in range(MOST_STEPS - 8):
        if i > 2 and pick.integer(0, 15) == 0:
            break
        growing.grow()
    outputs = growing.finish()
    form = pick.choice(FORMS if len(outputs) == 1 else FORMS[1:])
    network = Network(inputs, tuple(growing.steps), outputs, form)
    if pick.integer(0, 9) < 9:
        network = without_dead_steps(network)
    return replace(network, seed=pick.integer(0, 2**31 - 1))
