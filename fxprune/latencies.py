"""How long a network takes, for any choice of channels: a latency model, measured once on the machine that will run it.

Every op takes a time that grows with what it reads and what it writes: `w0 + w1 x + w2 y + w3 x y + w4 h`, where x and
y are the shares that are left of the elements that go in and come out, h is by how much x + y is over one (wide layers
leave the caches), and no weight is negative. Where a convolution pads to blocks as wide as a vector register, x or y
count whole blocks: a channel more costs nothing, or a block. So the time of a network is a sum that never falls when a
channel is kept: what searches for widths can rely on that, as for macs.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxprune.errors import ArtifactError

SCHEMA = 1
"""Version of the JSON form of a latency model."""
TERMS = 5
"""How many weights an op has."""


@dataclass(frozen=True, slots=True)
class OpLatency:
    """How long ops of one class take, all of the same kind and shapes.

    Attributes:
        kind: what they call.
        nodes: their names in the graph.
        inputs: elements that go into each in the dense network, parameters not counted.
        outputs: elements that come out.
        channels_in: channels that go in; 0 where they do not come in blocks.
        channels_out: channels that come out; 0 where they do not come in blocks.
        weights: (5,) microseconds: what the terms above are multiplied by.
    """

    kind: str
    nodes: tuple[str, ...]
    inputs: int
    outputs: int
    channels_in: int
    channels_out: int
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Predicts how long a traced network takes for any choice of channels. Made by `LatencyModel.measure`.

    Attributes:
        ops: one entry for each class of ops.
        block: channels per block, where an op takes channels in blocks.
        scale: what a network takes as a whole, for each microsecond of its ops.
        overhead: microseconds that any choice takes besides.
        error: median over the networks measured of how far the prediction is off, relative.
        device: the device it was measured on, such as "cpu".
        batch: how many examples at once.
        machine: what ran it.
        torch: version of torch.
        threads: how many threads torch used.
        curve: what a network takes besides, for the square of the microseconds of its ops: large ones crowd the caches.
    """

    ops: tuple[OpLatency, ...] = field(repr=False)
    block: int
    scale: float
    overhead: float
    error: float
    device: str
    batch: int
    machine: str
    torch: str
    threads: int
    curve: float = 0.0

    @staticmethod
    def measure(traced: Any, device: str = "cpu", batch: int = 1) -> LatencyModel:
        """Run a network at several dozen choices of widths, op by op and as a whole, and fit how long each op takes.

        Args:
            traced: from `trace`, with example inputs of the size that counts.
            device: "cpu" or "cuda"; the model may be on another.
            batch: how many examples at once: dim 0 of the example inputs is cut or repeated to that.

        Raises:
            PlanError: the batch is no positive number, or there is no such device.
            TraceError: the network does not run on a batch of that size.
        """
        from fxprune.measuring import measure  # it rewrites, and rewriting reads costs

        return measure(traced, device, batch)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of all nodes that were measured, in the order of the classes."""
        return tuple(node for op in self.ops for node in op.nodes)

    def at(self, places: Sequence[int]) -> OpTimes:
        """Return how long the calls at some of the `nodes` take, by their places."""
        ops = [op for op in self.ops for _ in op.nodes]
        return OpTimes([ops[place] for place in places], self)

    def warnings(self) -> tuple[str, ...]:
        """Return in which ways this process differs from the one that measured: what the model tells may be off."""
        facts = (
            ("machine", self.machine, machine(self.device)),
            ("torch", self.torch, torch.__version__),
            ("threads", self.threads, torch.get_num_threads()),
        )
        return tuple(
            f"the latency model was measured with {what} {there!r}, and this is {here!r}: its predictions may be off; "
            "measure it where the network will run"
            for what, there, here in facts
            if there != here
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save as JSON; the folder is made if need be."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"schema": SCHEMA, **asdict(self)}), encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> LatencyModel:
        """Read what `save` has written.

        Raises:
            ArtifactError: there is no such file, or it is no latency model of this schema.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ArtifactError(
                f"{path} cannot be read ({error}). Pass what `LatencyModel.save` has written."
            ) from error
        except ValueError as error:
            raise ArtifactError(f"{path}: not a latency model: damaged JSON ({error}). Measure it again.") from error
        found = data.pop("schema", None) if isinstance(data, dict) else type(data).__name__
        if found != SCHEMA:
            raise ArtifactError(
                f"{path}: the latency model has schema {found!r}, this version reads schema {SCHEMA}. Measure it again "
                "with this version."
            )
        try:
            ops = tuple(_op(entry) for entry in data.pop("ops"))
            return LatencyModel(ops, **_typed(data, MODEL))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path}: the latency model is damaged: {error}. Measure it again.") from error


class OpTimes:
    """How long calls take, for any number of elements that go in and come out."""

    def __init__(self, ops: Sequence[OpLatency], model: LatencyModel) -> None:
        """Lay out the `ops` of all calls as arrays, (calls,)."""
        names = ("inputs", "outputs", "channels_in", "channels_out")
        self._inputs, self._outputs, self._channels_in, self._channels_out = (
            np.array([getattr(op, name) for op in ops], dtype=np.int64) for name in names
        )
        self._weights = np.array([op.weights for op in ops], dtype=np.float64).reshape(-1, TERMS)
        self._model = model

    def each(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Return (calls,) microseconds, at (calls,) elements that go in and come out."""
        x = shares(inputs, self._inputs, self._channels_in, self._model.block)
        y = shares(outputs, self._outputs, self._channels_out, self._model.block)
        return (self._weights * terms(x, y)).sum(axis=1)

    def whole(self, inputs: np.ndarray, outputs: np.ndarray) -> int:
        """Return what the network of these calls takes, in whole microseconds."""
        total, model = float(self.each(inputs, outputs).sum()), self._model
        return round(model.overhead + model.scale * total + model.curve * total**2)


MODEL = {
    "block": int, "scale": float, "overhead": float, "error": float, "device": str, "batch": int, "machine": str,
    "torch": str, "threads": int, "curve": float,
}  # fmt: skip
OP = {"kind": str, "nodes": list, "inputs": int, "outputs": int, "channels_in": int, "channels_out": int}


def _typed(entry: Mapping[str, Any], types: Mapping[str, type]) -> dict[str, Any]:
    for name, kind in types.items():
        if type(entry[name]) is not kind or (kind in (int, float) and not 0 <= entry[name] < np.inf):
            raise ValueError(f"{name!r} is {entry[name]!r:.60}, not {kind.__name__}")
    return dict(entry)


def _op(entry: Mapping[str, Any]) -> OpLatency:
    weights = tuple(map(float, entry["weights"]))
    if len(weights) != TERMS or not all(0 <= w < np.inf for w in weights):  # else more channels could take less time
        raise ValueError(f"weights are {entry['weights']!r:.60}, not five numbers that are not negative")
    return OpLatency(**{**_typed(entry, OP), "nodes": tuple(map(str, entry["nodes"])), "weights": weights})


def shares(elements: np.ndarray, dense: np.ndarray | int, channels: np.ndarray | int, block: int) -> np.ndarray:
    """Return which shares are left of elements, of whole blocks where there are channels; 1 of nothing."""
    dense, channels = np.asarray(dense), np.asarray(channels)
    left = np.where(dense > 0, elements / np.maximum(dense, 1), 1.0)
    whole = np.maximum(-(-channels // block), 1)
    kept = -(-np.round(left * channels) // block)
    return np.where(channels > 0, kept / whole, left)


def terms(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return (n, TERMS) what the weights of an op are multiplied by, at shares (n,) of inputs and outputs."""
    return np.stack([np.ones_like(x), x, y, x * y, np.maximum(x + y - 1, 0)], axis=1)


def fit(rows: np.ndarray, microseconds: np.ndarray, counts: np.ndarray) -> tuple[tuple[float, ...], float]:
    """Return weights that are not negative, with the least squared relative errors, and the sum of these.

    They are few: the solution is the best of those of all sets of weights that are not held at zero.

    Args:
        rows: (n, weights) what the weights are multiplied by.
        microseconds: (n,) measured.
        counts: (n,) how much the error of each counts.
    """
    first, _ = _least_squares(rows, microseconds, np.sqrt(counts) / np.maximum(microseconds, 1e-3))
    weights, rest = _least_squares(rows, microseconds, np.sqrt(counts) / np.maximum(rows @ first, 1e-3))
    return tuple(map(float, weights)), rest  # relative to the first prediction: relative to noise, it would be too low


def _least_squares(rows: np.ndarray, goal: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, float]:
    """Return weights that are not negative with the least squared errors times `scale`, and the sum of these."""
    count, rows, goal = rows.shape[1], rows * scale[:, None], goal * scale
    best, least = np.zeros(count), np.inf
    for number in range(1, 2**count):
        chosen = [i for i in range(count) if number >> i & 1]
        found = np.linalg.lstsq(rows[:, chosen], goal, rcond=None)[0]
        rest = float(((rows[:, chosen] @ found - goal) ** 2).sum())
        if (found >= 0).all() and rest < least - 1e-12:
            best, least = np.zeros(count), rest
            best[chosen] = found
    return best, least


def machine(device: str) -> str:
    """Describe the machine, or its accelerator."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.system()} {platform.machine()} {_processor()}, {torch.backends.cpu.get_cpu_capability()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names: Sequence[str] = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
