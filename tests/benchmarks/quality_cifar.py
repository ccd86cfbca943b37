"""CIFAR-10 from its python batches, in a folder or in the archive as it is downloaded."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_data import Counts, Splits, Table

FOLDER = "cifar-10-batches-py"
TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
TEST = ["test_batch"]

_NEEDED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
_NEEDED |= {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}


class _Arrays(pickle.Unpickler):
    """Reads arrays and plain data, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NEEDED:
            raise ValueError(f"a CIFAR-10 batch refers to {module}.{name}. Download the archive again from its home.")
        return super().find_class(module, name)


def cifar_splits(path: Path, counts: Counts) -> Splits:
    """Read images (n, 3, 32, 32), about zero mean and unit variance, and their classes as `label` (n,).

    Args:
        path: `cifar-10-python.tar.gz`, or the folder `cifar-10-batches-py`, or the folder around it.
        counts: how many samples to use of each split. Calibration takes the last of the training batches.

    Raises:
        ValueError: the path holds something else, or fewer samples than are asked for.
    """
    read = _opener(path)
    train, test = _load(read, TRAIN), _load(read, TEST)
    if counts.train + counts.calibration > len(train) or counts.test > len(test):
        raise ValueError(
            f"{path} has {len(train)} training and {len(test)} test images; {counts} asks for more. Pass the whole set."
        )
    return Splits(
        _part(train, 0, counts.train),
        _part(train, len(train) - counts.calibration, len(train)),
        _part(test, 0, counts.test),
    )


def _opener(path: Path) -> Callable[[str], bytes]:
    """Return what reads a batch by its name."""
    if path.is_file():

        def from_archive(name: str) -> bytes:
            with tarfile.open(path) as archive:
                file = archive.extractfile(f"{FOLDER}/{name}")
                assert file is not None
                return file.read()

        return from_archive
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    missing = [name for name in TRAIN + TEST if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}. Pass cifar-10-python.tar.gz, or the folder {FOLDER}.")
    return lambda name: (folder / name).read_bytes()


def _load(read: Callable[[str], bytes], names: list[str]) -> Table:
    batches = [_Arrays(BytesIO(read(name)), encoding="bytes").load() for name in names]
    pixels = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([np.asarray(batch[b"labels"], dtype=np.int64) for batch in batches])
    images = (torch.from_numpy(pixels).float() / 255 - 0.47) / 0.25
    return Table(images, {"label": torch.from_numpy(labels)})


def _part(table: Table, start: int, stop: int) -> Table:
    return Table(table.inputs[start:stop], {name: target[start:stop] for name, target in table.targets.items()})
