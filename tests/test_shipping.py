"""Slim networks in other hands: saved and loaded, then `torch.export`, ONNX Runtime and `torch.compile`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shipping import difference, exported, outputs_of, quiet, run_onnx, to_onnx
from torch import Tensor, nn
from zoo import NETWORKS
from zoo_weights import awaken

import fxprune
from fxprune.examples.networks import SceneNet

TOLERANCE = 1e-4
SHIPPED = ("scene", "torchvision-resnet", "torchvision-vit")


def fresh(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network with weights of its own, and one input."""
    torch.manual_seed(0)
    return (awaken(SceneNet()), torch.randn(1, 1, 32, 32)) if name == "scene" else NETWORKS[name].build()


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor]:
    """A slim network that was saved and loaded, and a batch of two."""
    model, x = fresh(request.param)
    x = torch.cat([x, torch.randn_like(x)])
    slim = fxprune.compile(model, x, fxprune.Budget(macs=0.5), progress=False)
    folder = tmp_path_factory.mktemp("slim")
    fxprune.save(slim, folder)
    loaded = fxprune.load(folder, fresh(request.param)[0]).eval()
    assert difference(outputs_of(loaded, x), outputs_of(slim, x)) == 0
    assert difference(outputs_of(loaded, x), outputs_of(model, x)) > 100 * TOLERANCE  # else this says nothing
    return loaded, x


def test_exported_programs_answer_alike_for_any_batch(shipped: tuple[nn.Module, Tensor]) -> None:
    slim, x = shipped
    with quiet():
        program = exported(slim, x).module()
    for batch in (x, torch.randn(5, *x.shape[1:])):
        assert difference(outputs_of(program, batch), outputs_of(slim, batch)) < TOLERANCE


def test_onnx_runtime_answers_alike_for_any_batch(shipped: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    slim, x = shipped
    to_onnx(slim, x, tmp_path / "slim.onnx")
    batches = (x, torch.randn(5, *x.shape[1:]))
    for batch, found in zip(batches, run_onnx(tmp_path / "slim.onnx", *batches), strict=True):
        assert difference(found, outputs_of(slim, batch)) < TOLERANCE


def test_torch_compile_takes_the_whole_graph(shipped: tuple[nn.Module, Tensor]) -> None:
    slim, x = shipped
    torch._dynamo.reset()
    compiled = torch.compile(slim, backend="aot_eager", fullgraph=True)
    assert difference(outputs_of(compiled, x), outputs_of(slim, x)) < TOLERANCE
