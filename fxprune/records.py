"""What one interpretation of a graph has recorded: shapes and labels at every node, work, memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fxprune.atoms import Ledger
from fxprune.labels import Extent, Labels, Shape
from fxprune.workspaces import Convolving, Machine


@dataclass(frozen=True, slots=True)
class Labelled:
    """A tensor seen at a node: its shape, what its positions are called, and its dtype."""

    shape: Shape
    labels: Labels
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-accumulates at one node: `fixed` times the kept size of each labelled dim."""

    node: str
    fixed: int
    dims: tuple[Extent, ...]


Term = tuple[int, tuple[Extent, ...]]
"""A product: a number, times the kept size of each labelled dim."""


Follows = bool | tuple[bool, ...]
"""Whether a number follows the size of the input; of a tuple of numbers, for each."""


@dataclass(slots=True)
class Buffer:
    """One allocation: the step that made it and the last that reads it. Dims without labels are in `fixed` bytes."""

    fixed: int
    dims: tuple[Extent, ...]
    born: int
    dies: int
    unlike: tuple[Term, Term] | None = None
    """It is only made where these two sizes differ."""


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution on the CPU: its step, its node, what its workspace depends on, `dims` of input, weight, output."""

    step: int
    node: str
    run: Convolving
    dims: list[tuple[Shape, Labels]]


@dataclass(slots=True)
class Interpretation:
    """All that one run has recorded."""

    ledger: Ledger
    machine: Machine
    issued: dict[str, tuple[Shape, Labels, int, bool]] = field(default_factory=dict)
    """Parameter or buffer -> shape, labels, bytes per element, is a parameter; in order of first use."""
    named_at: dict[str, str] = field(default_factory=dict)
    """Parameter or buffer -> the node that used it first."""
    nodes: dict[str, list[Labelled]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    """Node -> what it returned, where that is no tensor."""
    follows: dict[str, Follows] = field(default_factory=dict)
    """Node -> whether what it returned follows the input: see `lengths`."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Node -> the values of the constant integer tensor that it returned."""
    work: list[Work] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    convolutions: list[Convolution] = field(default_factory=list)
    paired: list[np.ndarray] = field(default_factory=list)
    """Atoms of dims over which two activations are multiplied and summed: head dims of queries and keys."""
    keeps_shape: set[str] = field(default_factory=set)
    """Nodes all of whose ops are pointwise or batch norms, with one tensor that goes in."""
    whole: set[str] = field(default_factory=set)
    """Nodes that call a function of the user's which only runs on values."""
    unknown: list[tuple[str, str]] = field(default_factory=list)
    freeze: dict[str, str] = field(default_factory=dict)
    """Node -> reason, of those that the caller froze."""
    steps: int = 0
