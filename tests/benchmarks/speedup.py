"""ResNet-50 at half of its multiply-accumulates: how much faster it runs, and which ops fall short.

All networks take turns on one thread of the CPU, with random weights: the dense one, plans by `Magnitude()` with and
without `multiple_of`, what Torch-Pruning makes for the same macs with and without `round_to`, and dense ResNet-50s that
are uniformly narrower: what this machine has to give. Writes `docs/benchmarks/speedup.md`.

Run: ``python tests/benchmarks/speedup.py [--batches N ...] [--rounds N ...] [--px N] [--eager-only] [--out FILE]``
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from commands import command, header, markdown
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import Bottleneck, ResNet, resnet50

import fxprune
from fxprune.timing import take_turns

BUDGET = 0.5
MULTIPLES = (1, 8, 16, 32)
ROUND_TO = (None, 16)
NARROW = (45, 48)  # channels of the stem, of 64: half of the macs; the next multiple of 16
ENOUGH = 0.85  # of the ideal speed-up
OPS = ("dense", "fxprune", "fxprune, multiple_of=16", f"narrow, stem of {NARROW[0]}")
COMPILED = (*OPS, "Torch-Pruning")
OP_ROUNDS = 5
PACKAGES = ("torch", "torchvision", "torch-pruning")

Networks = dict[str, nn.Module]


def slim(dense: nn.Module, x: torch.Tensor, multiple: int) -> nn.Module:
    """Prune with fxprune."""
    coupling = fxprune.couple(fxprune.trace(dense, x))
    constraints = fxprune.Constraints(multiple_of=multiple)
    plan = fxprune.plan(coupling, fxprune.Budget(macs=BUDGET), constraints=constraints)
    return fxprune.rewrite(coupling, plan).eval()


def torch_pruned(dense: nn.Module, x: torch.Tensor, round_to: int | None) -> nn.Module:
    """Prune with Torch-Pruning, at the smallest ratio, in thousandths, that meets the budget."""
    import torch_pruning as tp

    most = macs(dense, x) * BUDGET

    def at(ratio: float) -> nn.Module:
        model: Any = copy.deepcopy(dense)
        pruner = tp.pruner.MagnitudePruner(
            model,
            example_inputs=x,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            round_to=round_to,
            ignored_layers=[model.fc],
        )
        pruner.step()
        return model.eval()

    low, high = 200, 400
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if macs(at(middle / 1000), x) <= most else (middle + 1, high)
    return at(high / 1000)


def narrow(width: int) -> nn.Module:
    """Return a ResNet-50 in which every layer has width / 64 of its channels, as torchvision would write it."""
    model = ResNet(Bottleneck, [3, 4, 6, 3])
    model.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    model.inplanes = width
    for i, blocks in enumerate((3, 4, 6, 3)):
        setattr(model, f"layer{i + 1}", model._make_layer(Bottleneck, width * 2**i, blocks, stride=1 + (i > 0)))
    model.fc = nn.Linear(width * 32, 1000)
    return model.eval()


def macs(model: nn.Module, x: torch.Tensor) -> int:
    """Count multiply-accumulates by PyTorch's own counter, which belongs to neither tool."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def networks(x: torch.Tensor) -> Networks:
    """Return all that take turns, by name; the dense one first."""
    torch.manual_seed(0)
    dense = resnet50().eval()
    found: Networks = {"dense": dense}
    for multiple in MULTIPLES:
        found["fxprune" + (f", multiple_of={multiple}" if multiple > 1 else "")] = slim(dense, x, multiple)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Torch-Pruning tells which parameters it does not know
        for round_to in ROUND_TO:
            name = "Torch-Pruning" + (f", round_to={round_to}" if round_to else "")
            found[name] = torch_pruned(dense, x, round_to)
    return found | {f"narrow, stem of {width}": narrow(width) for width in NARROW}


def measure(
    found: Mapping[str, Callable[..., Any]], shares: Mapping[str, float], batch: int, rounds: int, px: int
) -> list[dict[str, str]]:
    """Return a row per network: milliseconds, and how much faster than the dense one in the same round."""
    x = torch.randn(batch, 3, px, px)
    seconds = take_turns(list(found.values()), (x,), {}, rounds, torch.device("cpu"))
    rows = []
    for name, own in zip(found, seconds, strict=True):
        low, middle, high = np.quantile(seconds[0] / own, (0.25, 0.5, 0.75))
        rows.append(
            {
                "network": name,
                "macs": f"{shares[name]:.1%}",
                "ms": f"{np.median(own) * 1e3:.1f}",
                "times faster (quartiles)": f"{middle:.2f} ({low:.2f} .. {high:.2f})",
                "of the ideal": f"{middle * shares[name]:.0%}",
            }
        )
    return rows


class Clocked(fx.Interpreter):
    """Runs a graph and adds up the seconds of each kind of op."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module if isinstance(module, fx.GraphModule) else fx.symbolic_trace(module))
        self.seconds: dict[str, float] = defaultdict(float)

    def run_node(self, n: fx.Node) -> Any:
        start = time.thread_time()
        result = super().run_node(n)
        self.seconds[self._kind(n)] += time.thread_time() - start
        return result

    def _kind(self, n: fx.Node) -> str:
        if n.op != "call_module":
            return "additions" if "add" in n.name else "other"
        module = self.module.get_submodule(str(n.target))
        if isinstance(module, nn.Conv2d):
            size = module.kernel_size[0]
            strided = ", stride 2" if module.stride[0] > 1 else ""
            return f"convolutions {size}x{size}{strided}"
        return {nn.BatchNorm2d: "batch norms", nn.ReLU: "ReLUs"}.get(type(module), "other")


@torch.no_grad()
def by_op(found: Mapping[str, nn.Module], batch: int, px: int) -> list[dict[str, str]]:
    """Return a row per kind of op: its milliseconds in the dense network, and how much faster the others do it."""
    x = torch.randn(batch, 3, px, px)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in found}
    for turn in range(OP_ROUNDS + 1):
        for name, network in found.items():
            clocked = Clocked(network)
            clocked.run(x)
            if turn:  # the first is a warm-up
                runs[name].append(clocked.seconds)
    medians = {
        name: {kind: float(np.median([run[kind] for run in own])) for kind in own[0]} for name, own in runs.items()
    }
    dense = medians.pop("dense")
    total = sum(dense.values())
    return [
        {"op": kind, "dense (ms)": f"{dense[kind] * 1e3:.1f}", "of its time": f"{dense[kind] / total:.0%}"}
        | {name: f"{dense[kind] / own[kind]:.2f}" for name, own in medians.items()}
        for kind in sorted(dense, key=lambda kind: -dense[kind])
    ]


def introduction(px: int) -> str:
    """Say with what the tables were made, and how to read them."""
    return (
        header("Speed-up", PACKAGES, "one thread", command=f"`{command()}`") + "\n\n"
        f"ResNet-50, {px} px, at half of its multiply-accumulates, random weights, float32, on a machine that others "
        "used at the same time. Networks take turns; counted is the time that the thread has computed, and `times "
        "faster` is the median over rounds of the dense network's time by the own time in that round.\n\n"
        f"`of the ideal`: times faster by how many times fewer macs; the aim is {ENOUGH:.0%}, "
        f"{ENOUGH / BUDGET:.1f} times for half of the macs. `narrow`: a dense ResNet-50 whose layers all have the same "
        "share of their channels, which no tool has touched: what the machine has to give for such widths. Macs are as "
        "PyTorch's own counter counts them. Compiled: `torch.compile` with its default settings.\n\n"
        "Half of the macs leave 71% of the channels of every activation. Batch norms, ReLUs and additions only read "
        "and write these: about 1.41 times faster is what to expect, unless `torch.compile` fuses them. Convolutions "
        "run in blocks of 16 channels where there is AVX512 (oneDNN); the tables by op show what it costs not to fill "
        "them."
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", nargs="+", type=int, default=[30, 10], help="for each batch size")
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--eager-only", action="store_true", help="where torch.compile finds no compiler")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/speedup.md"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    args = parse(argv)
    torch.set_num_threads(1)
    x = torch.randn(1, 3, args.px, args.px)
    found = networks(x)
    count = {name: macs(network, x) for name, network in found.items()}
    shares = {name: number / count["dense"] for name, number in count.items()}
    batches = list(zip(args.batches, args.rounds, strict=True))
    few = {name: found[name] for name in COMPILED}
    parts = [introduction(args.px)]

    def add(title: str, rows: Sequence[Mapping[str, str]]) -> None:
        parts.append(f"## {title}\n\n{markdown('keys', rows)}")
        args.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")  # what is known so far

    args.out.parent.mkdir(parents=True, exist_ok=True)
    for batch, rounds in batches:
        rows = measure(found, shares, batch, rounds, args.px)
        add(f"Eager, batch of {batch}, {rounds} rounds", rows)
    for batch, _ in batches:
        add(f"Times faster by op, eager, batch of {batch}", by_op({name: found[name] for name in OPS}, batch, args.px))
    for batch, rounds in batches if not args.eager_only else []:
        torch._dynamo.reset()
        compiled = {name: torch.compile(network, dynamic=False) for name, network in few.items()}
        add(f"Compiled, batch of {batch}, {rounds} rounds", measure(compiled, shares, batch, rounds, args.px))
    print(args.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
