"""What `speed.py` measures, in a process of its own: one job, one model; prints one line of JSON.

Run: ``python tests/benchmarks/speed_jobs.py {time,memory} MODEL [--tools ...] [--repeats N] [--threads N]``
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

BUDGET = 0.5
RATIO = 1 - BUDGET**0.5  # a share r of the channels leaves about (1 - r) ** 2 of the macs

Stages = dict[str, float]


class Block(nn.Module):
    """One residual block of the chain whose length is varied."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


def residual(blocks: int, width: int = 8) -> nn.Module:
    """Build a chain of residual blocks between a stem and a classifier."""
    body = (Block(width) for _ in range(blocks))
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)
    )


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return the model called ``name`` (``residual:N``, or torchvision's) in eval mode, and an example input."""
    torch.manual_seed(0)
    if name.startswith("residual:"):
        return residual(int(name.partition(":")[2])).eval(), torch.randn(1, 3, 16, 16)
    import torchvision

    return torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)


def run_fxprune(model: nn.Module, example: torch.Tensor) -> tuple[nn.Module, Stages]:
    """Prune with fxprune; return the slim model and the seconds of each stage."""
    import fxprune

    seconds: Stages = {}

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        seconds[stage] = time.perf_counter() - start
        return result

    traced = timed("trace", lambda: fxprune.trace(model, example))
    coupling = timed("couple", lambda: fxprune.couple(traced))
    budget, method = fxprune.Budget(macs=BUDGET), fxprune.methods.Magnitude()
    plan = timed("plan", lambda: fxprune.plan(coupling, budget, method=method))
    return timed("rewrite", lambda: fxprune.rewrite(coupling, plan)), seconds


def run_torch_pruning(model: nn.Module, example: torch.Tensor) -> tuple[nn.Module, Stages]:
    """Prune ``model`` in place with Torch-Pruning; return it and the seconds of each stage."""
    import torch_pruning as tp

    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    start = time.perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        model,
        example_inputs=example,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=[classifier],
    )
    built = time.perf_counter()
    pruner.step()
    return model, {"build": built - start, "step": time.perf_counter() - built}


RUN: dict[str, Callable[[nn.Module, torch.Tensor], tuple[nn.Module, Stages]]] = {
    "fxprune": run_fxprune,
    "torch-pruning": run_torch_pruning,
}


def count_macs(model: nn.Module, example: torch.Tensor) -> int:
    """Count multiply-accumulates by PyTorch's own counter, which belongs to neither tool."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example)
    return counter.get_total_flops() // 2


def weight_bytes(model: nn.Module) -> int:
    """Sum the bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def time_tools(name: str, tools: Sequence[str], repeats: int) -> dict[str, Any]:
    """Alternate the tools on one model; return each one's runs (seconds per stage) and the share of macs it left."""
    model, example = build(name)
    dense = count_macs(model, example)
    runs: dict[str, list[Stages]] = {tool: [] for tool in tools}
    share: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for tool in tools if repeat % 2 else tools[::-1]:
            subject = copy.deepcopy(model)
            gc.collect()
            slim, seconds = RUN[tool](subject, example)
            if repeat:
                runs[tool].append(seconds)
            else:
                share[tool] = count_macs(slim, example) / dense
    return {"runs": runs, "share": share}


def resident() -> int:
    """Return the resident bytes of this process, its peak forgotten as far as the system can."""
    gc.collect()
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Return the peak resident bytes, since `resident` was last called where the system can tell."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def measure_memory(name: str, tool: str) -> dict[str, Any]:
    """Return the bytes of the model's weights, and the most that one run of ``tool`` held on top of the model."""
    RUN[tool](*build("residual:1"))
    model, example = build(name)
    weights, before = weight_bytes(model), resident()
    slim, _ = RUN[tool](model, example)
    extra = peak() - before
    return {"weights": weights, "extra": extra, "slim": weight_bytes(slim)}


def main() -> None:
    """Do one job and print its answer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("job", choices=("time", "memory"))
    parser.add_argument("model", help="a torchvision name, or residual:BLOCKS")
    parser.add_argument("--tools", nargs="+", default=list(RUN), choices=RUN)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # Torch-Pruning warns of ops that it takes for element-wise
    if args.job == "time":
        answer = time_tools(args.model, args.tools, args.repeats)
    else:
        (tool,) = args.tools  # what one tool leaves behind must not hide what the next one needs
        answer = measure_memory(args.model, tool)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
