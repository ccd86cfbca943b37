"""Slim networks in other hands: `torch.export`, ONNX Runtime and `torch.compile`, each against the eager run."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Outputs = list[Tensor]


def outputs_of(module: Any, x: Tensor) -> Outputs:
    """Return all tensors that a network returns, in order."""
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(module(x)) if isinstance(t, Tensor)]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of an output, relative to the largest value of that output."""
    assert [t.shape for t in found] == [t.shape for t in expected]
    assert all(t.isfinite().all() and t.abs().max() > 0 for t in expected)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def dynamic_batch(x: Tensor) -> Any:
    """Return how exporters are told that the first size is free."""
    return ({0: torch.export.Dim("batch")},)


def exported(slim: nn.Module, x: Tensor, *, dynamic: bool = True) -> torch.export.ExportedProgram:
    """Export with a free batch size."""
    return torch.export.export(slim, (x,), dynamic_shapes=dynamic_batch(x) if dynamic else None)


def to_onnx(slim: nn.Module, x: Tensor, file: Path, *, dynamic: bool = True) -> None:
    """Write an ONNX file by the exporter that goes through `torch.export`, with a free batch size."""
    with quiet():
        program = torch.onnx.export(
            slim, (x,), dynamo=True, dynamic_shapes=dynamic_batch(x) if dynamic else None, verbose=False
        )
    assert program is not None
    program.save(file)


def run_onnx(file: Path, *batches: Tensor) -> list[Outputs]:
    """Run a file in ONNX Runtime; return the outputs of each batch, in order."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return [[torch.from_numpy(y) for y in session.run(None, {given.name: x.numpy()})] for x in batches]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters say about themselves."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
