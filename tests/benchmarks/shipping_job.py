"""What `shipping.py` measures, in a process of its own: one network; prints its result as JSON, again as it grows.

Run: ``python tests/benchmarks/shipping_job.py NETWORK PX [--backend NAME] [--memory GB]``
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shipping import difference, exported, outputs_of, quiet, run_onnx, to_onnx
from zoo_weights import awaken

import fxprune

Result = dict[str, Any]


def build(name: str, px: int) -> tuple[nn.Module, Tensor]:
    """Return a network in eval mode and a batch of 2."""
    torch.manual_seed(0)
    if name == "scene":
        from fxprune.examples.networks import SceneNet

        return awaken(SceneNet()), torch.randn(2, 1, px, px)
    return awaken(_timm(name[5:], px) if name.startswith("timm/") else _torchvision(name, px)), torch.randn(
        2, 3, px, px
    )


def _timm(name: str, px: int) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, img_size=px)
    except TypeError:  # takes any size
        return timm.create_model(name)


def _torchvision(name: str, px: int) -> nn.Module:
    import torchvision

    more: dict[str, Any] = {"image_size": px} if name.startswith("vit") else {}
    if name.startswith(("deeplab", "fcn")):
        more["weights_backbone"] = None
    elif name == "googlenet":
        more = {"init_weights": False, "aux_logits": False}
    return torchvision.models.get_model(name, weights=None, **more)


def attempt(result: Result, key: str, work: Callable[[], Any]) -> Any:
    """Do something; where it raises, write down what."""
    try:
        with quiet():
            return work()
    except Exception as error:
        result[key] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]
        return None


def tell(result: Result) -> None:
    """Print what is known so far."""
    print(json.dumps(result), flush=True)


def measure(name: str, px: int, backend: str) -> None:
    """Compile one network, and run it in all hands."""
    model, x = build(name, px)
    slim = fxprune.compile(model, x, fxprune.Budget(macs=0.5), method=fxprune.methods.Magnitude(), progress=False)
    other = torch.randn(3, *x.shape[1:])
    expected, wide = outputs_of(slim, x), outputs_of(slim, other)
    result: Result = {"macs": fxprune.report(slim).plan.costs.share("macs")}
    tell(result)
    by_export(result, slim, (x, other), (expected, wide))
    tell(result)
    by_onnx(result, slim, (x, other), (expected, wide))
    tell(result)
    compiled = torch.compile(slim, backend=backend, fullgraph=True)
    found = attempt(result, "compile", lambda: outputs_of(compiled, x))
    if found:
        result["compile"] = difference(found, expected)
    tell(result)


def by_export(result: Result, slim: nn.Module, xs: tuple[Tensor, Tensor], expected: Any) -> None:
    """Run what `torch.export` makes, on both batch sizes if it can, else on the one it was exported with."""
    for dynamic in (True, False):
        program = attempt(result, "export", lambda dynamic=dynamic: exported(slim, xs[0], dynamic=dynamic).module())
        if program is not None:
            result["export"] = difference(outputs_of(program, xs[0]), expected[0])
            if dynamic:
                result["export, other batch"] = difference(outputs_of(program, xs[1]), expected[1])
            return


def by_onnx(result: Result, slim: nn.Module, xs: tuple[Tensor, Tensor], expected: Any) -> None:
    """Run what ONNX Runtime makes of the ONNX file, on both batch sizes if it can."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "slim.onnx"

        def there_and_back(dynamic: bool) -> list[list[Tensor]]:
            to_onnx(slim, xs[0], file, dynamic=dynamic)
            return run_onnx(file, *xs[: 1 + dynamic])

        for dynamic in (True, False):
            found = attempt(result, "onnx", lambda dynamic=dynamic: there_and_back(dynamic))
            if found:
                result["onnx"] = difference(found[0], expected[0])
                if dynamic:
                    result["onnx, other batch"] = difference(found[1], expected[1])
                return


def main() -> None:
    """Do the job."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("network", help="scene, a torchvision name, or timm/NAME")
    parser.add_argument("px", type=int)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--memory", type=float, default=18, help="GB")
    args = parser.parse_args()
    most = int(args.memory * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    measure(args.network, args.px, args.backend)


if __name__ == "__main__":
    main()
