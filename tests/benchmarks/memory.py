"""Measure the peak memory of inference against the prediction, and write a Markdown table.

Each network is planned to a share of its predicted peak memory (`Budget(memory=...)`, ranked by magnitude, no data).
Then the dense and the slim network run once, each in a fresh process. Measured are the bytes that torch's allocator
has handed out, by its own record, which is what fxprune predicts: weights, buffers, inputs, activations and the
workspaces of convolutions; and the resident bytes of the process beyond those it has without the network, with the C
library as it is, and told to return every large block to the system as soon as it is free.

Run: ``python tests/benchmarks/memory.py [--networks NAME:PX ...] [--shares ...] [--batch N] [--threads N]
[--out FILE]``
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands import answer, command, header, markdown
from tqdm import tqdm

NETWORKS = ("scene:32", "resnet18:64", "resnet50:128", "mobilenet_v3_large:64", "densenet121:64", "convnext_tiny:64",
            "vit_b_16:64", "resnext101_32x8d:224")  # fmt: skip
PACKAGES = ("fxprune", "torch", "torchvision", "numpy")
SHARES = (0.5, 0.2)
JOBS = Path(__file__).with_name("memory_jobs.py")
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""How glibc is told to return blocks from 128 KiB on, which it does at first, and not once it has seen larger ones."""
TIMEOUT = 1800  # seconds for one process

Result = dict[str, Any]


def in_child(job: str, network: str, file: Path, share: float, args: argparse.Namespace, **settings: str) -> Result:
    """Do one of `memory_jobs.py` in a fresh process, in an environment; return its answer, or its error's last line."""
    name, _, px = network.partition(":")
    words = [str(JOBS), job, name, str(file), "--share", str(share)]
    words += ["--batch", str(args.batch), "--px", px, "--threads", str(args.threads)]
    return answer(words, args.threads, TIMEOUT, **settings)


def measured(network: str, args: argparse.Namespace) -> list[dict[str, str]]:
    """Return a row of the table for the dense network and for each share."""
    rows: list[dict[str, str]] = []
    dense: Result | None = None
    for share in (1.0, *args.shares):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "network.pt"
            found = in_child("plan", network, file, share, args)
            if "error" not in found:
                found |= in_child("measure", network, file, share, args)
                found["returning"] = in_child("measure", network, file, share, args, **RETURNING)["resident"]
        dense = found if dense is None else dense
        rows.append({"network": network, "asked": "dense" if share == 1 else f"{share:.0%}"} | row(found, dense))
    return rows


def row(found: Result, dense: Result) -> dict[str, str]:
    """Write the figures of one network; shares are those of the dense one."""
    if "error" in found:
        return {"predicted (MB)": found["error"]}
    cells = {f"{key} (MB)": f"{found[key] / 1e6:.1f}" for key in ("predicted", "allocated", "returning", "resident")}
    cells["predicted / allocated"] = f"{found['predicted'] / found['allocated']:.3f}"
    for key in ("allocated", "returning", "resident"):
        cells[f"{key}, of dense"] = f"{found[key] / dense[key]:.3f}" if key in dense else "-"
    return cells | {"macs": f"{found['macs']:.1%}", "params": f"{found['params']:.1%}"}


NOTE = (
    "Peak memory of one inference. `predicted` is `plan.costs.after.memory`; `allocated` is what torch's allocator "
    "records. `resident` is what the process grows by, when it has run the network before and let go of it; "
    "`returning`, the same with `MALLOC_MMAP_THRESHOLD_=131072` in the environment. By itself, glibc keeps blocks of "
    "up to 32 MB once it has seen so large ones, and activations then lie scattered: the smaller the network, the more "
    "of them. The dense network too is run as the graph that fxprune makes of it, which lets go of every tensor after "
    "its last use: as written in Python, a module may hold on to more. Where a budget cannot be met, the row says what "
    "the least is."
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="scene or torchvision names, with pixels")
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES), help="of the dense network's memory")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/memory.md"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it."""
    args = parse(argv)
    rows = [cells for network in tqdm(args.networks, disable=None) for cells in measured(network, args)]
    data = f"{args.batch} random images, random weights"
    head = header("Memory", PACKAGES, f"{args.threads} thread(s)", data=data, command=f"`{command()}`")
    report = f"{head}\n\n{NOTE}\n\n{markdown('keys', rows)}\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
