"""Ship slim networks: `torch.export`, ONNX Runtime and `torch.compile` against the eager slim network.

Networks of torchvision and timm, with random weights of which none is zero, and the demo's with three heads, are
compiled to half of their multiply-accumulates, each in a process of its own with limits on time and memory. Writes
`docs/benchmarks/shipping.md`.

Run: ``python tests/benchmarks/shipping.py [--networks NAME:PX ...] [--backend NAME] [--limit S] [--memory GB]
[--threads N] [--out FILE]``; it needs onnx, onnxruntime and onnxscript.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands import command, header, markdown
from tqdm import tqdm

NETWORKS = (
    "scene:32", "resnet50:64", "resnext50_32x4d:64", "vgg11_bn:64", "densenet121:64", "googlenet:64",
    "shufflenet_v2_x1_0:64", "mobilenet_v3_large:64", "efficientnet_b0:64", "regnet_y_400mf:64", "convnext_tiny:64",
    "vit_b_16:64", "swin_t:64", "deeplabv3_mobilenet_v3_large:64", "timm/ghostnet_050:64", "timm/res2net50_14w_8s:64",
    "timm/nf_regnet_b0:64", "timm/deit_tiny_patch16_224:64", "timm/eva02_tiny_patch14_224:56", "timm/levit_128s:64",
    "timm/pvt_v2_b0:64", "timm/coat_tiny:64", "timm/xcit_nano_12_p16_224:64",
)  # fmt: skip
PACKAGES = ("fxprune", "torch", "torchvision", "timm", "onnx", "onnxruntime", "onnxscript")
JOB = Path(__file__).with_name("shipping_job.py")
TOLERANCE = 1e-4
COLUMNS = {
    "export": "torch.export", "export, other batch": "other batch size", "onnx": "ONNX Runtime",
    "onnx, other batch": "other batch size", "compile": "torch.compile",
}  # fmt: skip

Result = dict[str, Any]


def in_child(network: str, args: argparse.Namespace) -> Result:
    """Measure one network in a fresh process; return what it printed last, and how it ended."""
    name, _, px = network.partition(":")
    words = [sys.executable, str(JOB), name, px, "--backend", args.backend, "--memory", str(args.memory)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    try:
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=args.limit, check=False)
        said, ended = done.stdout, (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        said, ended = (late.stdout or b"").decode(), f"longer than {args.limit:g} s"
    lines = [line for line in said.splitlines() if line.startswith("{")]
    return (json.loads(lines[-1]) if lines else {}) | ({"ended": ended} if ended else {})


def row(network: str, found: Result) -> list[str]:
    """Write one row: differences, or in their place the reasons why there are none."""
    missing = found.get("ended", "-")
    cells = [found.get(key, missing) for key in COLUMNS]
    macs = f"{found['macs']:.1%}" if "macs" in found else missing
    return [network, macs, *(f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in cells)]


def summary(results: dict[str, Result]) -> str:
    """Count in how many networks each differs by less than the tolerance."""
    lines = []
    for key in COLUMNS:
        good = sum(isinstance(r.get(key), float) and r[key] < TOLERANCE for r in results.values())
        lines.append(f"* {key}: {good} of {len(results)} differ by less than {TOLERANCE:g}")
    return "\n".join(lines)


def heading(args: argparse.Namespace) -> str:
    """Describe when, where, with what and how the table was made."""
    limits = f"{args.limit:g} s and {args.memory:g} GB for a network"
    return header("Shipping", PACKAGES, f"{args.threads} thread(s)", command=f"`{command()}`", limits=limits)


def note(args: argparse.Namespace) -> str:
    """Say what the columns are."""
    return (
        "Slim networks at half of their macs, random weights, batches of 2, outputs in other hands against those of "
        "the slim network itself in eager mode: the largest difference of any output, relative to that output's "
        "largest value. `torch.export`: the exported program, exported with a free batch size, then run; `ONNX "
        "Runtime`: the file that `torch.onnx.export(slim, ..., dynamo=True)` writes, also with a free batch size; the "
        "columns after each: the same program with a batch of 3 (a dash: only with the batch size fixed). "
        f'`torch.compile`: backend "{args.backend}", one graph (`fullgraph=True`).'
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--networks", nargs="+", default=list(NETWORKS), help="scene, torchvision or timm/, with pixels"
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile; aot_eager needs no C++ compiler")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for a network")
    parser.add_argument("--memory", type=float, default=18, help="GB for a network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/shipping.md"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it after every network."""
    args = parse(argv)
    results: dict[str, Result] = {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for network in tqdm(args.networks, disable=None):
        results[network] = in_child(network, args)
        rows = [row(name, found) for name, found in results.items()]
        table = markdown(["network", "macs", *COLUMNS.values()], rows)
        args.out.write_text(f"{heading(args)}\n\n{note(args)}\n\n{summary(results)}\n\n{table}\n", encoding="utf-8")
    print(args.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
