"""A plan is data: which positions of every parameter stay, made once and applied to any checkpoint of a network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from fxprune import notebooks
from fxprune.costs import CostChange, Costs
from fxprune.errors import ArtifactError

SCHEMA = 1
"""Version of the JSON form of a plan."""


@dataclass(frozen=True, slots=True)
class GroupWidth:
    """What a plan does to one group: `before` and `after` count its channels, `sites` the dims it cuts."""

    name: str
    kind: str
    sites: int
    before: int
    after: int

    @property
    def share(self) -> str:
        """Which part is kept, as text."""
        return f"{self.after / self.before:.0%}" if self.after else "branch removed"


@dataclass(frozen=True, slots=True)
class Plan:
    """Which positions of every parameter and buffer stay. Made by `plan`, applied by `rewrite`.

    Attributes:
        kept: (parameter name, dim) -> ascending positions that stay, (n,). For the second dim of a grouped convolution,
            whose groups choose their own inputs: (rows that stay, n).
        sizes: (parameter name, dim) -> size in the dense network.
        costs: before and after, exact.
        groups: one entry per group, in graph order.
        method: how the plan was made.
        budget: what was asked.
        fingerprint: of the coupling it was made for.
        classes: output -> the classes that its rows (dim 1) stand for, in order, where a task asked for these alone.
    """

    kept: Mapping[tuple[str, int], np.ndarray]
    sizes: Mapping[tuple[str, int], int]
    costs: CostChange
    groups: tuple[GroupWidth, ...]
    method: str
    budget: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    keep: np.ndarray | None = field(default=None, repr=False, compare=False)
    """(channels,) which stay, on the coupling of this fingerprint; None for a plan that was read."""
    classes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    weights: Mapping[str, torch.Tensor] | None = field(default=None, repr=False, compare=False)
    """What the method has trained, of the dense shapes, for `compile` to take over; None for a plan that was read."""

    @property
    def empties(self) -> bool:
        """Whether some dims keep nothing: the branches that they are in are removed."""
        return any(not positions.size for positions in self.kept.values())

    @property
    def digest(self) -> str:
        """A hash of what stays, and of which network: equal for equal plans, on every machine."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for (name, dim), positions in sorted(self.kept.items(), key=lambda item: item[0]):
            digest.update(f"{name}:{dim}:{positions.shape}".encode())
            digest.update(positions.astype("<i8").tobytes())
        return digest.hexdigest()

    def __str__(self) -> str:
        rows = [[i, g.name, g.kind, g.sites, g.before, g.after, g.share] for i, g in enumerate(self.groups)]
        table = tabulate(rows, headers=["group", "first site", "kind", "sites", "before", "after", "kept"])
        return f"{table}\n\n{costs_table(self.costs)}"

    def _repr_html_(self) -> str:
        return notebooks.plan_html(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def cut(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Cut a tensor of the shape of a dense parameter (its momentum, its average) as the plan cuts the parameter.

        Args:
            name: of the parameter or buffer.
            value: the tensor.

        Returns:
            A new tensor.
        """
        value = value.detach().clone()
        ragged = {d: k for (n, d), k in self.kept.items() if n == name and k.ndim > 1}
        plain = {d: k for (n, d), k in self.kept.items() if n == name and k.ndim == 1}
        for dim, positions in plain.items():
            value = value.index_select(dim, torch.from_numpy(positions.copy()).to(value.device))
        for dim, positions in ragged.items():
            index = torch.from_numpy(positions.copy()).to(value.device)
            wide = index.reshape(len(positions), *[positions.shape[1] if d == dim else 1 for d in range(1, value.ndim)])
            sizes = [positions.shape[1] if d == dim else n for d, n in enumerate(value.shape)]
            value = value.gather(dim, wide.expand(sizes))
        return value

    def to_json(self) -> str:
        """Return the plan as JSON, with a schema version."""
        sites = [
            {"name": name, "dim": dim, "size": self.sizes[name, dim], "kept": positions.tolist()}
            for (name, dim), positions in self.kept.items()
        ]
        data = {
            "schema": SCHEMA, "fingerprint": self.fingerprint, "method": self.method, "budget": dict(self.budget),
            "costs": {"before": self.costs.before.to_dict(), "after": self.costs.after.to_dict()},
            "groups": [asdict(g) for g in self.groups], "sites": sites,
            "classes": {output: list(rows) for output, rows in self.classes.items()},
        }  # fmt: skip
        return json.dumps(data)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan.

        Raises:
            ArtifactError: not the JSON of a plan, or of another schema version, or an entry of the wrong type.
        """
        if not isinstance(text, (str, bytes)):
            raise ArtifactError(f"a plan is read from JSON, and this is a {type(text).__name__}. Pass the text of it.")
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ArtifactError(
                f"not a plan: the JSON breaks off or is damaged ({error}). Save the plan again."
            ) from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ArtifactError(
                f"the plan has schema {found!r}, this version reads schema {SCHEMA}. Save it again with this version."
            )
        try:
            sites = {_site_of(s): s for s in data["sites"]}
            return Plan(
                {key: _positions_of(s) for key, s in sites.items()},
                {key: s["size"] for key, s in sites.items()},
                CostChange(*(Costs(**_typed(data["costs"][k], COSTS, f"costs.{k}")) for k in ("before", "after"))),
                tuple(GroupWidth(**_typed(g, GROUP, f"groups[{i}]")) for i, g in enumerate(data["groups"])),
                **_typed({k: data[k] for k in HEAD}, HEAD, "the plan"),
                classes=_classes_of(data.get("classes", {})),
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                f"the plan lacks a field or has one too many: {error}. Save it again with this version."
            ) from error


HEAD = {"method": str, "budget": dict, "fingerprint": str}
COSTS: dict[str, type] = dict.fromkeys((f.name for f in fields(Costs)), int)
GROUP = {"name": str, "kind": str, "sites": int, "before": int, "after": int}


def _typed(entry: Any, types: Mapping[str, type], where: str) -> dict[str, Any]:
    """Return an entry of the JSON of a plan, whose fields have the types they should have."""
    if not isinstance(entry, dict):
        raise ArtifactError(_damaged(f"{where}: expected an object, found {entry!r:.60}"))
    for name, kind in types.items():
        if name in entry and (not isinstance(entry[name], kind) or isinstance(entry[name], bool)):
            raise ArtifactError(_damaged(f"{where}: {name!r}: expected {kind.__name__}, found {entry[name]!r:.60}"))
    return entry


def _damaged(what: str) -> str:
    return f"the plan is damaged: {what}. Save it again."


def _site_of(site: Any) -> tuple[str, int]:
    _typed(site, {"name": str, "dim": int, "size": int}, "sites")
    if site["dim"] < 0 or site["size"] < 1:
        raise ArtifactError(_damaged(f"{site['name']!r} has dim {site['dim']} of size {site['size']}"))
    return site["name"], site["dim"]


def _classes_of(classes: Any) -> dict[str, tuple[int, ...]]:
    """Return what the rows of outputs stand for: ascending whole numbers, for each output by its name."""
    for name, rows in _typed(classes, {}, "classes").items():
        fits = isinstance(rows, list) and rows and all(type(row) is int and row >= 0 for row in rows)
        if not fits or sorted(set(rows)) != rows:
            raise ArtifactError(_damaged(f"output {name!r}: expected ascending classes, found {rows!r:.60}"))
    return {name: tuple(rows) for name, rows in classes.items()}


def _positions_of(site: Mapping[str, Any]) -> np.ndarray:
    """Return what a site keeps: whole numbers, or rows of equally many."""
    kept = site["kept"]
    rows = kept if isinstance(kept, list) and kept and all(isinstance(row, list) for row in kept) else [kept]
    where = f"{site['name']!r} along dim {site['dim']}"
    for row in rows:
        if not isinstance(row, list) or any(type(k) is not int or abs(k) >> 62 for k in row):
            raise ArtifactError(_damaged(f"{where}: expected positions (whole numbers), found {row!r:.60}"))
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        raise ArtifactError(_damaged(f"{where}: expected rows of one length, found {sorted(lengths)}"))
    return frozen(np.array(kept, dtype=np.int64))


def frozen(array: np.ndarray) -> np.ndarray:
    """Make an array read-only and return it."""
    array.setflags(write=False)
    return array


def costs_table(costs: CostChange) -> str:
    """Return all costs that are known before and after, as text."""
    rows = [[name, f"{before:,}", f"{after:,}", f"{share:.1%}"] for name, before, after, share in costs.rows()]
    return tabulate(
        rows,
        headers=["cost", "before", "after", "share"],
        disable_numparse=True,
        colalign=("left", "right", "right", "right"),
    )
