"""What `memory.py` measures, in a process of its own: one job, one network; prints one line of JSON.

Run: ``python tests/benchmarks/memory_jobs.py {plan,measure} NETWORK FILE [OPTIONS]``
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from memory import allocated, peak, resident


def build(name: str, batch: int, px: int) -> tuple[nn.Module, torch.Tensor]:
    """Return the demo's network, or one of torchvision, in eval mode, and example inputs."""
    torch.manual_seed(0)
    if name == "scene":
        from fxprune.examples.networks import SceneNet

        return SceneNet().eval(), torch.randn(batch, 1, px, px)
    import torchvision

    sized = {"image_size": px} if name.startswith("vit") else {}
    return torchvision.models.get_model(name, weights=None, **sized).eval(), torch.randn(batch, 3, px, px)


def plan(name: str, file: Path, share: float, batch: int, px: int) -> dict[str, Any]:
    """Write a network as `rewrite` makes it, slim where `share` is below 1, to a file; return the predicted bytes."""
    import fxprune

    model, x = build(name, batch, px)
    coupling = fxprune.couple(fxprune.trace(model, x))
    try:
        chosen = fxprune.plan(coupling, fxprune.Budget(memory=share), method=fxprune.methods.Magnitude())
    except fxprune.PlanError as error:
        return {"error": next(line.strip() for line in str(error).splitlines() if "least possible" in line)}
    torch.save(fxprune.rewrite(coupling, chosen), file)
    costs = chosen.costs
    return {"predicted": costs.after.memory, "macs": costs.share("macs"), "params": costs.share("params")}


def measure(name: str, file: Path, batch: int, px: int) -> dict[str, Any]:
    """Return the most resident bytes of one inference beyond the process without the network, and what torch allocated.

    The process has run the network before, and let go of it: what is loaded lazily and what is compiled for its sizes
    is there.
    """
    run_once(name, file, batch, px)
    bare = resident()
    model, x, most = run_once(name, file, batch, px)
    return {"resident": most - bare, "bare": bare, "allocated": allocated(model, x)}


def run_once(name: str, file: Path, batch: int, px: int) -> tuple[nn.Module, torch.Tensor, int]:
    """Load a network and run it; return both, its inputs and the peak resident bytes of the run."""
    model = torch.load(file, weights_only=False)
    x = torch.randn(batch, 1 if name == "scene" else 3, px, px)
    resident()
    with torch.no_grad():
        model(x)
    return model, x, peak()


def main() -> None:
    """Do one job and print its answer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("job", choices=("plan", "measure"))
    parser.add_argument("network", help="scene, or a torchvision name")
    parser.add_argument("file", type=Path, help="where the network is kept")
    parser.add_argument("--share", type=float, default=1.0, help="of the dense network's memory")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.job == "plan":
        answer = plan(args.network, args.file, args.share, args.batch, args.px)
    else:
        import torchvision  # noqa: F401 (the bare process has them too)

        import fxprune.examples.networks  # noqa: F401

        answer = measure(args.network, args.file, args.batch, args.px)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
