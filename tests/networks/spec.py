"""A network as data: what was drawn, how it prints, and the module it stands for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Defining an op enters it in the table.
from networks import (  # noqa: F401
    attentions,
    blocks,
    convolutions,
    functions,
    joins,
    linears,
    mixing,
    moves,
    reshapes,
    sequences,
    sizes,
    transformers,
    weights,
)
from networks.ops import OPS, Args, Op, Shape

FORMS = ("tensor", "tuple", "dict", "nested")


@dataclass(frozen=True)
class Step:
    """One op on earlier values; `op` is a name in `OPS`, or `again`: step `args[0]`'s module on another value."""

    op: str
    inputs: tuple[int, ...]
    args: Args = ()


@dataclass(frozen=True)
class Network:
    """Values are numbered: first the inputs, then what each step makes. Seed fixes weights and example inputs."""

    inputs: tuple[Shape, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    form: str = "tensor"
    seed: int = 0

    def shapes(self) -> tuple[Shape, ...]:
        """The shape of every value, without the batch dim."""
        shapes = list(self.inputs)
        for step in self.steps:
            shapes += self.output_shapes(step, tuple(shapes[i] for i in step.inputs))
        return tuple(shapes)

    def output_shapes(self, step: Step, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        """The shapes of the values that one step makes."""
        made_by = self.steps[step.args[0]] if step.op == "again" else step
        return OPS[made_by.op].outputs(shapes, made_by.args)

    def to_json(self) -> str:
        """Everything in one line of text."""
        steps = [[s.op, s.inputs, s.args] for s in self.steps]
        return json.dumps([self.inputs, steps, self.outputs, self.form, self.seed])

    @classmethod
    def from_json(cls, text: str) -> Network:
        """The network that `to_json` wrote."""
        inputs, steps, outputs, form, seed = json.loads(text)
        made = tuple(Step(op, tuple(ins), tuple(args)) for op, ins, args in steps)
        return cls(tuple(tuple(x) for x in inputs), made, tuple(outputs), form, seed)

    def __str__(self) -> str:
        lines = [f"v{i} = input {shape}" for i, shape in enumerate(self.inputs)]
        shapes = list(self.inputs)
        for number, step in enumerate(self.steps):
            made = self.output_shapes(step, tuple(shapes[i] for i in step.inputs))
            names = ", ".join(f"v{len(shapes) + i}" for i in range(len(made)))
            values = ", ".join(f"v{i}" for i in step.inputs)
            lines.append(f"{names} = {step.op}_{number}({values}; {', '.join(map(str, step.args))})  # {made}")
            shapes += made
        return "\n".join([*lines, f"return {self.form} of " + ", ".join(f"v{i}" for i in self.outputs)])


class Stepping(nn.Module):
    """The module of a network, whatever its inputs; each step is a submodule called `<op>_<step>`."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.names: list[str] = []
        shapes = list(network.inputs)
        for number, step in enumerate(network.steps):
            ins = tuple(shapes[i] for i in step.inputs)
            if step.op == "again":
                self.names.append(self.names[step.args[0]])
            else:
                self.names.append(f"{step.op}_{number}")
                self.add_module(self.names[-1], OPS[step.op](ins, step.args))
            shapes += network.output_shapes(step, ins)

    def run(self, *inputs: Tensor) -> Any:
        values = list(inputs)
        for name, step in zip(self.names, self.network.steps, strict=True):
            module: Op = getattr(self, name)
            made = module(*(values[i] for i in step.inputs))
            count = len(self.network.output_shapes(step, module.shapes))
            values += [made] if count == 1 else [made[i] for i in range(count)]
        return arranged([values[i] for i in self.network.outputs], self.network.form)


class OneInput(Stepping):
    """The module of a network with one input."""

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class TwoInputs(Stepping):
    """The module of a network with a second input."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.run(x, y)


def arranged(values: list[Any], form: str) -> Any:
    """Outputs in one of `FORMS`."""
    if form == "tensor":
        return values[0]
    if form == "tuple":
        return tuple(values)
    heads = {f"head{i}": value for i, value in enumerate(values)}
    return heads if form == "dict" else {"first": values[0], "all": [heads, tuple(values)]}


def fill(name: str, tensor: Tensor) -> None:
    """Give a parameter or buffer random values that make every channel matter and keep activations tame."""
    if not tensor.is_floating_point():
        return
    if name.endswith("running_var"):
        tensor.uniform_(0.5, 2.0)
    elif name.endswith(("bias", "running_mean")):
        tensor.normal_(0.0, 0.3)
    elif name.endswith("scale") or tensor.dim() < 2:
        tensor.uniform_(0.5, 1.5)
    else:
        tensor.normal_(0.0, 1.3 * (tensor.shape[0] / tensor.numel()) ** 0.5)


def build(network: Network, *, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Make the module of a network, in eval mode; the same for the same network, whatever the global seed."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(network.seed)
        module = (OneInput if len(network.inputs) == 1 else TwoInputs)(network).to(dtype)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            fill(name, tensor)
    return module.eval()


def example_inputs(network: Network, *, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Random inputs for the module of a network."""
    generator = torch.Generator().manual_seed(network.seed + 1)
    return tuple(torch.randn(batch, *shape, generator=generator, dtype=dtype) for shape in network.inputs)
