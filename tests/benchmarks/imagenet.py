"""ImageNet: a trained network of torchvision, pruned by several methods and tested on a folder of images.

The folder has `train/` and `val/`, each with a folder of images per class, as `torchvision.datasets.ImageFolder` reads
them; classes are numbered in the order of their folders' names, as the weights of torchvision take them. Calibration
images are drawn by chance from `train/`, and `val/` is for testing alone. Nothing is fine-tuned.

Results are JSON, one line for each, appended as they come (`imagenet.jsonl`), and a Markdown table (`imagenet.md`).

Run: ``python tests/benchmarks/imagenet.py FOLDER [--network resnet50] [--weights DEFAULT] [--methods ...]
[--budgets ...] [--calibration N] [--test N] [--px PX] [--workers N] [--resume] [--out DIR]``
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from commands import Row, append, command, commands_of, header, markdown, rows_file, rows_in
from quality_data import Batch, Counts, Splits
from quality_measure import told
from quality_methods import CONTENDERS
from quality_problems import Problem, Recipe
from quality_training import macs_of, params_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.models import get_model
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor
from tqdm import tqdm

from fxprune.commands.networks import fill

METHODS = ("joint", "joint-sequential", "magnitude-global", "tp-magnitude-global", "tp-taylor-global")
BUDGETS = (0.7, 0.5)
PACKAGES = ("fxprune", "torch", "torchvision", "torch-pruning")
SHORTER = 8 / 7
"""Shorter side of an image before its middle is cut out, over that of the middle."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(folder: Path, split: str, px: int, count: int | None = None) -> Subset[tuple[Tensor, int]]:
    """Return images (3, px, px), about zero mean and unit variance, with their classes; some by chance, if counted.

    Args:
        folder: has a folder for each split, which has one for each class.
        split: "train" or "val".
        px: height and width.
        count: how many images; None for all.

    Raises:
        ValueError: there is no such folder, or fewer images are there.
    """
    if not (folder / split).is_dir():
        raise ValueError(f"{folder} has no folder {split!r}. Pass a folder with 'train' and 'val', each with classes.")
    steps = [Resize(round(px * SHORTER)), CenterCrop(px), ToTensor(), Normalize(MEAN, STD)]
    found = ImageFolder(str(folder / split), Compose(steps))
    if count is not None and count > len(found):
        raise ValueError(f"{folder / split} has {len(found)} images, and {count} are asked for. Ask for fewer.")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return Subset(found, order[:count].tolist())


def batches(data: Subset[tuple[Tensor, int]], size: int, workers: int) -> Iterator[Batch]:
    """Yield `(inputs, {"label": classes})`."""
    for inputs, labels in DataLoader(data, size, num_workers=workers):
        yield inputs, {"label": labels}


def classification(name: str) -> Problem:
    """Return what methods are told of a network that tells classes apart."""

    def loss(outputs: Tensor, batch: Batch) -> Tensor:
        return cross_entropy(outputs, batch[1]["label"])

    return Problem(name, partial(get_model, name), _no_tables, {"label": loss}, {}, Recipe())


def _no_tables(counts: Counts) -> Splits:
    raise ValueError(f"{counts} of ImageNet are too many for memory: they are read batch by batch.")


@torch.no_grad()
def accuracies(network: nn.Module, data: Iterator[Batch]) -> Row:
    """Return the shares of images whose class is the network's first answer, and among its first five."""
    ranks = []
    for inputs, targets in data:
        best = network.eval()(inputs).topk(5).indices
        ranks.append(best == targets["label"][:, None])
    hits = torch.cat(ranks).float()
    return {"top1": hits[:, 0].mean().item(), "top5": hits.sum(1).mean().item()}


def measure(args: argparse.Namespace, there: Sequence[Row]) -> Iterator[Row]:
    """Yield the rows that are missing, the dense network's first."""
    network = get_model(args.network, weights="DEFAULT" if args.weights == "DEFAULT" else None).eval()
    if args.weights != "DEFAULT":
        fill(network, Path(args.weights))
    test = images(args.folder, "val", args.px, args.test)
    known = list(batches(images(args.folder, "train", args.px, args.calibration), args.batch_size, args.workers))
    example = known[0][0][:1]
    dense, params = macs_of(network, example), params_of(network)
    done = {(r["method"], r["budget"]) for r in there if r["network"] == args.network}

    def row(method: str, budget: float, slim: nn.Module, seconds: float) -> Row:
        about = {"network": args.network, "method": method, "budget": budget, "seconds": seconds}
        costs = {"macs": macs_of(slim, example) / dense, "params": params_of(slim) / params}
        return about | costs | accuracies(slim, batches(test, args.batch_size, args.workers))

    if ("dense", 1.0) not in done:
        yield row("dense", 1.0, network, 0.0)
    for method in args.methods:
        left = [budget for budget in args.budgets if (method, budget) not in done]
        began = time.perf_counter()
        prune = CONTENDERS[method].start(network, classification(args.network), known) if left else None
        prepared = time.perf_counter() - began
        for budget in left:
            assert prune is not None
            began = time.perf_counter()
            try:
                slim = prune(budget)
                yield row(method, budget, slim, prepared + time.perf_counter() - began)
            except Exception as error:  # whatever goes wrong in a method is part of the report
                yield {"network": args.network, "method": method, "budget": budget, "error": told(error)}


def report(rows: Sequence[Row]) -> str:
    """Put the page together."""
    table = [
        [r["network"], r["method"], f"{r['budget']:g}", r["error"], "", "", "", ""]
        if "error" in r
        else [r["network"], r["method"], f"{r['budget']:g}", f"{100 * r['top1']:.2f}", f"{100 * r['top5']:.2f}",
              f"{r['macs']:.3f}", f"{r['params']:.3f}", f"{r['seconds']:.0f}"]
        for r in rows
    ]  # fmt: skip
    heads = ["network", "method", "budget", "top 1, %", "top 5, %", "macs", "params", "seconds to compile"]
    text = "Accuracy on images of `val/`, right after pruning; macs and params as shares of the dense network's."
    return "\n\n".join([header("ImageNet", PACKAGES, command=commands_of(rows)), text, markdown(heads, table)]) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, help="has train/ and val/, each with a folder of images for every class")
    add("--network", default="resnet50", help="a classifier of torchvision (default: %(default)s)")
    add("--weights", default="DEFAULT", help="a file, or DEFAULT for torchvision's, which it downloads")
    add("--methods", nargs="+", choices=list(CONTENDERS), default=list(METHODS), metavar="METHOD", help=str(METHODS))
    add("--budgets", nargs="+", type=float, default=list(BUDGETS), help=f"shares of the macs (default: {BUDGETS})")
    add("--calibration", type=int, default=512, help="how many training images methods see (default: %(default)s)")
    add("--test", type=int, help="how many images of val/ to test on (default: all)")
    add("--px", type=int, default=224)
    add("--batch-size", type=int, default=32)
    add("--workers", type=int, default=0, help="processes that read images")
    add("--resume", action="store_true", help="keep the rows there are, and run the others")
    add("--out", type=Path, default=Path("docs/benchmarks"), help="where imagenet.jsonl and imagenet.md go")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the page of all rows there are."""
    args = parse(argv)
    path = rows_file(args, "imagenet.jsonl")
    for row in tqdm(measure(args, rows_in(path)), unit="row", disable=None):
        append(path, row | {"command": command()})
    rows = rows_in(path)
    (args.out / "imagenet.md").write_text(report(rows), encoding="utf-8")
    print(report(rows))


if __name__ == "__main__":
    main()
