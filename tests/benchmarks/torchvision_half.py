"""Compile torchvision's networks to half of their multiply-accumulates, prove each, and write a Markdown table.

Every network runs in a process of its own: random weights, norms and running statistics drawn so that they matter, one
random image (299 px for Inception, 224 px for the others, `--segmentation` for the two that label pixels), then
``fxprune.compile(model, image, Budget(macs=0.5))``, whose last step compares the slim network with the masked original
in float64. PyTorch's own counter measures the share of multiply-accumulates a second time.

Run: ``python tests/benchmarks/torchvision_half.py [--models ...] [--budget 0.5] [--threads N] [--out FILE]``
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import fxprune
from fxprune import compiling

CLASSIFIERS = (
    "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg16_bn", "densenet121", "mobilenet_v2",
    "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "mnasnet1_0", "squeezenet1_0", "googlenet",
    "inception_v3", "regnet_y_400mf", "shufflenet_v2_x1_0", "convnext_tiny",
)  # fmt: skip
SEGMENTERS = ("fcn_resnet50", "deeplabv3_resnet50")
STAGES = {"trace": "trace", "couple": "couple", "plan": "plan", "rewrite": "rewrite", "verify_slim": "verify"}
TOLERANCE = 1e-9
SENSITIVE = 1e-3  # how much the outputs must change with the image, so that their equality says something
TIMEOUT = 3600  # seconds for one network


def build(name: str) -> nn.Module:
    """Return a network in eval mode with random weights, of which the norms and running statistics matter too."""
    import torchvision

    more: dict[str, Any] = {}
    if name in SEGMENTERS:
        more = {"weights_backbone": None, "aux_loss": True}
    elif name in ("googlenet", "inception_v3"):
        more = {"init_weights": False}  # which takes long, and is drawn anew below
    model = torchvision.models.get_model(name, weights=None, **more)
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor_name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor_name.endswith(("running_mean", "bias")):
                tensor.normal_(0.0, 0.2)
            elif tensor.ndim == 1 or tensor_name.endswith("layer_scale"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim > 1:
                tensor.normal_(0.0, (2 * tensor.shape[0] / tensor.numel()) ** 0.5)
    return model.eval()


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Count multiply-accumulates with PyTorch's counter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


def leaves(value: Any) -> list[Tensor]:
    """Return the tensors in a network's output."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def sensitivity(model: nn.Module, image: Tensor) -> float:
    """Return how much the least changing output changes with another image, relative; 0 if any is not finite."""
    with torch.no_grad():
        pairs = list(zip(leaves(model(image)), leaves(model(3 * image.flip(-1))), strict=True))
    if not all(bool(a.isfinite().all()) for a, _ in pairs):
        return 0.0
    return min(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def run(name: str, size: int, budget: float) -> dict[str, Any]:
    """Compile one network; return its row."""
    torch.manual_seed(0)
    model, image = build(name), torch.randn(1, 3, size, size)
    seconds = dict.fromkeys(STAGES.values(), 0.0)
    for attribute, stage in STAGES.items():
        setattr(compiling, attribute, clocked(getattr(compiling, attribute), stage, seconds))
    slim = fxprune.compile(model, image, fxprune.Budget(macs=budget), progress=False)
    report = fxprune.report(slim)
    assert report.verification is not None
    return {
        "frontend": report.frontend,
        "macs": report.costs.share("macs"),
        "counted": count_macs(slim, image) / count_macs(model, image),
        "params": report.costs.share("params"),
        "groups": len(report.groups),
        "outputs": len(report.verification.errors),
        "error": report.verification.worst,
        "sensitivity": sensitivity(slim, image),
        "seconds": seconds,
        "notes": list(report.notes),
    }


def clocked(function: Callable[..., Any], stage: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """Return a function that adds the seconds of each call to those of a stage."""

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[stage] += time.perf_counter() - start

    return timed


def in_child(name: str, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one network in a fresh process and return its row, or the last line of what it raised."""
    command = [sys.executable, __file__, "--child", "--models", name, "--size", str(size)]
    command += ["--budget", str(args.budget), "--threads", str(args.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT, check=True)
    except subprocess.CalledProcessError as error:
        return {"failure": (error.stderr.strip().splitlines() or [f"ended with code {error.returncode}"])[-1]}
    except subprocess.TimeoutExpired:
        return {"failure": f"longer than {TIMEOUT} s"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def problems(row: dict[str, Any], budget: float) -> list[str]:
    """Return what is wrong with a row."""
    if "failure" in row:
        return [row["failure"]]
    found = []
    if row["macs"] > budget or row["counted"] > budget:
        found.append("over budget")
    if not row["error"] <= TOLERANCE:
        found.append("differs from the masked original")
    if row["sensitivity"] < SENSITIVE:
        found.append(f"an output hardly depends on the image ({row['sensitivity']:.1e}): equality says little")
    return found


def table(rows: dict[str, dict[str, Any]], sizes: dict[str, int], budget: float) -> str:
    """Format the table, and a list of notes under it."""
    lines, notes = [], []
    for name, row in rows.items():
        notes += [f"* {name}: {note}" for note in (*problems(row, budget), *row.get("notes", []))]
        if "failure" in row:
            lines.append({"network": name, "px": sizes[name], "front end": "failed, see below"})
            continue
        lines.append({
            "network": name, "px": sizes[name], "front end": row["frontend"], "macs": f"{row['macs']:.2%}",
            "macs, PyTorch's counter": f"{row['counted']:.2%}", "params": f"{row['params']:.1%}",
            "groups": row["groups"], "outputs": row["outputs"], "worst error": f"{row['error']:.1e}",
            "change with the image": f"{row['sensitivity']:.0%}",
            **{f"{stage} (s)": f"{seconds:.2f}" for stage, seconds in row["seconds"].items()},
        })  # fmt: skip
    made = tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)
    return "\n\n".join([made, *(["## Notes\n\n" + "\n".join(notes)] if notes else [])])


def header(args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> str:
    """Describe when, where, with what and how the table was made, and what came out."""
    packages = ("fxprune", "torch", "torchvision", "numpy", "networkx")
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    found["fxprune"] = fxprune.__version__
    good = sum(not problems(row, args.budget) for row in rows.values())
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} CPUs, {args.threads} thread(s)",
        "versions": ", ".join([f"python {platform.python_version()}"] + [f"{p} {found.get(p, '-')}" for p in packages]),
        "command": f"`python tests/benchmarks/torchvision_half.py {' '.join(sys.argv[1:])}`".replace(" `", "`"),
        "result": f"{good} of {len(rows)} networks at {args.budget:.0%} of their macs or less, equal to the masked "
        f"original to {TOLERANCE:.0e} in float64, with outputs that depend on the image",
    }
    return "\n".join(f"* {key}: {value}" for key, value in facts.items())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=[*CLASSIFIERS, *SEGMENTERS], help="torchvision names")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the macs to keep (default: %(default)s)")
    parser.add_argument("--segmentation", type=int, default=224, help="px for the segmenters (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/torchvision.md"))
    parser.add_argument("--size", type=int, default=224, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile every network, print the report and write it.

    Returns:
        The exit code: 1 if any network failed.
    """
    args = parse(argv)
    if args.child:
        torch.set_num_threads(args.threads)
        warnings.simplefilter("ignore")  # torchvision's, about initialisation
        print(json.dumps(run(args.models[0], args.size, args.budget)))
        return 0
    sizes = {name: args.segmentation if name in SEGMENTERS else 224 for name in args.models}
    sizes |= {name: 299 for name in args.models if name.startswith("inception")}
    rows = {}
    for name in (bar := tqdm(args.models, unit="network")):
        bar.set_description(name)
        rows[name] = in_child(name, sizes[name], args)
        if wrong := problems(rows[name], args.budget):
            bar.write(f"{name}: {'; '.join(wrong)}")
    report = f"# Torchvision at half the cost\n\n{header(args, rows)}\n\n{table(rows, sizes, args.budget)}\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report)
    print(report)
    return int(any(problems(row, args.budget) for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
