"""What calibration has found of a network: moments of every layer, kept, saved, and used for many budgets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fxprune.coupling import Coupling
from fxprune.errors import ArtifactError, PlanError
from fxprune.layers import fingerprint_of
from fxprune.sums import Layer
from fxprune.tasks import Task

SCHEMA = 2
"""Version of the file of a calibration."""


@dataclass(frozen=True, slots=True)
class Moments:
    """What calibration data say of one weighted layer. All float64; n is inputs * taps, or inputs if taps share.

    Attributes:
        layer: which, and its sizes.
        shared_taps: `second` and `mean` are averages over the taps of the kernel.
        second: (blocks, n, n) E[x x^T] over samples and positions.
        mean: (blocks, n) E[x].
        sensitivity: task -> (blocks, outputs, outputs) E over samples of the sum over positions of g g^T; g is the
            gradient of the sample's loss at the layer's output.
        norm: running mean of the batch norm that the output goes straight into, if it does.
        between: (blocks, n, n) the part of `second` that the means of classes make: E over positions of m m^T, m the
            mean of x in the class of the position, where all that is of no class is one more; the mean over tasks. None
            where classes were not told apart.
        own_bias: no other layer adds the same bias.
    """

    layer: Layer
    shared_taps: bool
    second: torch.Tensor
    mean: torch.Tensor
    sensitivity: Mapping[str, torch.Tensor]
    norm: str | None
    between: torch.Tensor | None = None
    own_bias: bool = True

    @property
    def absorbs(self) -> bool:
        """Whether a constant in the output is taken up: by the layer's bias, or by the batch norm behind it."""
        return self.holder[0] is not None

    @property
    def holder(self) -> tuple[str | None, int]:
        """What takes it up: a bias, or the running mean of a batch norm; and the sign with which it is added there."""
        return (self.layer.bias, 1) if self.own_bias and self.layer.bias is not None else (self.norm, -1)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What one pass over the calibration data has gathered. Made by `calibrate`.

    Attributes:
        moments: weight -> what was seen at it.
        norms: running mean of a batch norm -> (2, channels) mean and variance of what it normalises, in float64.
        losses: task -> mean loss of the dense network.
        samples: how many samples were read, on all ranks.
        fingerprint: of the network it was gathered on: its weighted layers, and their weights.
        batches: the data of this rank, for what is measured later on; not saved.
        tasks: whose losses were differentiated; not saved.
        held_out: batches that were not read, for tolerances to be checked on; not saved.
    """

    moments: Mapping[str, Moments]
    norms: Mapping[str, torch.Tensor]
    losses: Mapping[str, float]
    samples: int
    fingerprint: str
    batches: Iterable[Any] | None = field(default=None, repr=False, compare=False)
    tasks: Mapping[str, Task] | None = field(default=None, repr=False, compare=False)
    held_out: Sequence[Any] = field(default=(), repr=False, compare=False)

    @staticmethod
    def of_batches(
        coupling: Coupling, batches: Iterable[Any], tasks: Mapping[str, Task] | None, held_out: Sequence[Any] = ()
    ) -> Calibration:
        """Return batches and tasks to measure losses on; nothing is gathered."""
        return Calibration({}, {}, {}, 0, fingerprint_of(coupling), batches, tasks, held_out)

    def check_network(self, coupling: Coupling) -> None:
        """Raise PlanError where it is not of this network."""
        if self.fingerprint != fingerprint_of(coupling):
            raise PlanError(
                "the calibration is of another network, or of other weights. Calibrate this one: "
                "`fxprune.calibrate(coupling, batches, tasks)`."
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; the folder is made if need be."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        about: dict[str, Any] = {}
        for name, m in self.moments.items():
            tensors[f"{name}|second"], tensors[f"{name}|mean"] = m.second.contiguous(), m.mean.contiguous()
            tensors |= {f"{name}|sensitivity|{task}": g.contiguous() for task, g in m.sensitivity.items()}
            tensors |= {} if m.between is None else {f"{name}|between": m.between.contiguous()}
            plain = {key: getattr(m, key) for key in ("shared_taps", "norm", "own_bias")}
            about[name] = {"layer": asdict(m.layer), **plain}
        tensors |= {f"{name}|norm": value for name, value in self.norms.items()}
        head = {"losses": dict(self.losses), "samples": self.samples, "fingerprint": self.fingerprint}
        save_file(tensors, path, {"fxprune": json.dumps({"schema": SCHEMA, "moments": about, **head})})

    @staticmethod
    def load(path: str | Path) -> Calibration:
        """Read what `save` has written.

        Raises:
            ArtifactError: no file, not such a file, or one of another version.
        """
        try:
            tensors = load_file(path)
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                data = json.loads(json.loads(file.read(size))["__metadata__"]["fxprune"])
        except OSError as error:
            raise ArtifactError(
                f"{path} cannot be read ({error}). Pass the file that `calibration.save` wrote."
            ) from error
        except (SafetensorError, KeyError, ValueError) as error:
            raise ArtifactError(
                f"{path} is no calibration ({error}). Write it again with `calibration.save`."
            ) from error
        if data.get("schema") != SCHEMA:
            raise ArtifactError(
                f"{path} has schema {data.get('schema')!r}, this version reads schema {SCHEMA}. Calibrate again."
            )
        moments = {
            name: Moments(
                Layer(**about["layer"]),
                about["shared_taps"],
                tensors[f"{name}|second"],
                tensors[f"{name}|mean"],
                {task: tensors[f"{name}|sensitivity|{task}"] for task in data["losses"]},
                about["norm"],
                tensors.get(f"{name}|between"),
                about.get("own_bias", True),
            )
            for name, about in data["moments"].items()
        }
        norms = {key.removesuffix("|norm"): value for key, value in tensors.items() if key.endswith("|norm")}
        return Calibration(moments, norms, data["losses"], data["samples"], data["fingerprint"])
