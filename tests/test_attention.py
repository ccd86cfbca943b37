"""nn.MultiheadAttention and the layers of nn.Transformer: the same numbers, and exact when heads and head dims go."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Budget
from fxprune.attention import MultiheadAttention

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "other widths": {"kdim": 16, "vdim": 24},
    "sequence first": {"batch_first": False},
}


class Attending(nn.Module):
    """One attention between linear layers; to itself, or to another sequence."""

    def __init__(self, cross: bool, weights: bool | None, **more: Any) -> None:
        super().__init__()
        self.cross, self.weights = cross, weights
        self.inner, self.norm = nn.Linear(12, 32), nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, **{"batch_first": True, **more})
        self.key, self.value = nn.Linear(12, more.get("kdim", 32)), nn.Linear(12, more.get("vdim", 32))
        self.outer = nn.Linear(32, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Any:
        hidden = self.inner(x)
        query = self.norm(hidden)
        key, value = (self.key(x), self.value(x)) if self.cross else (query, query)
        more = {"need_weights": self.weights is not None, "average_attn_weights": bool(self.weights)}
        out, weights = self.attention(query, key, value, attn_mask=mask, key_padding_mask=padding, **more)
        out = self.outer(hidden + out)
        return out if weights is None else (out, weights)


def randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.3)
    return model.eval()


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


CASES = [
    pytest.param(cross, weights, name, id=f"{'cross' if cross else 'self'}, {name}, weights {weights}")
    for cross in (False, True)
    for weights in (None, False, True)
    for name in VARIANTS
    if cross or name != "other widths"
]


@pytest.mark.parametrize(("cross", "weights", "name"), CASES)
def test_attention_is_traced_and_pruned_exactly(cross: bool, weights: bool | None, name: str) -> None:
    model = randomized(Attending(cross, weights, **VARIANTS[name]))
    x = torch.randn(2, 7, 12)
    for a, b in zip(flat(fxprune.trace(model, x).module(x)), flat(model(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    slim = fxprune.compile(model, x, Budget(macs=0.5), progress=False)
    report = fxprune.report(slim)
    assert report.verification is not None
    assert report.verification.worst < 1e-12
    attention = slim.get_submodule("attention")
    assert isinstance(attention, MultiheadAttention)
    assert attention.sizes[0] == attention.sizes[1] < 32
    assert attention.sizes[2] < 32
    assert attention.scale == pytest.approx(8**-0.5)
    assert set(slim.state_dict()) <= set(model.state_dict())
    assert [t.shape for t in flat(slim(x))] == [t.shape for t in flat(model(x))]


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("per_head", [False, True])
def test_masks(kind: torch.dtype, per_head: bool) -> None:
    model, x = randomized(Attending(False, True)), torch.randn(2, 7, 12)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    if kind is not torch.bool:
        mask, padding = (torch.zeros(m.shape).masked_fill(m, float("-inf")) for m in (mask, padding))
    mask = mask.repeat(8, 1, 1) if per_head else mask
    inputs = {"x": x, "mask": mask, "padding": padding}
    for a, b in zip(fxprune.trace(model, inputs).module(**inputs), model(**inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    slim = fxprune.compile(model, inputs, Budget(macs=0.6), progress=False)
    heads = slim.get_submodule("attention").num_heads
    assert heads == 4 or not per_head  # a mask for each of four heads keeps four


def test_whole_heads_go() -> None:
    model, x = randomized(Attending(False, None)), torch.randn(2, 7, 12)
    with torch.no_grad():  # the second head of four adds nothing
        model.get_parameter("attention.in_proj_weight").view(3, 4, 8, 32)[:, 1] *= 1e-6
        model.get_parameter("attention.out_proj.weight").view(32, 4, 8)[:, 1] *= 1e-6
    coupling = fxprune.couple(fxprune.trace(model, x))
    method = fxprune.methods.Magnitude(scope="global")
    slim = fxprune.rewrite(coupling, fxprune.plan(coupling, Budget(macs=0.8), method=method))
    assert slim.get_submodule("attention").num_heads == 3
    torch.testing.assert_close(slim(x).shape, model(x).shape)


def test_slim_attention_lives_like_any_module() -> None:
    model, x = randomized(Attending(False, None)), torch.randn(2, 7, 12)
    slim = fxprune.compile(model, x, Budget(macs=0.5), progress=False)
    expected = slim(x)
    for twin in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        torch.testing.assert_close(twin(x), expected)
    slim.train()
    loss = slim(x).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in slim.parameters())
    assert slim(torch.randn(3, 11, 12)).shape == (3, 11, 5)


def transformer(norm_first: bool) -> tuple[nn.Module, Any]:
    return nn.Transformer(32, 4, 2, 2, 64, norm_first=norm_first), (torch.randn(7, 2, 32), torch.randn(5, 2, 32))


def encoder(norm_first: bool) -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, norm_first=norm_first, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 7, 32)


def decoder(norm_first: bool) -> tuple[nn.Module, Any]:
    layer = nn.TransformerDecoderLayer(32, 4, 64, norm_first=norm_first, batch_first=True)
    return nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(32)), (torch.randn(2, 7, 32), torch.randn(2, 5, 32))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # which nn.Transformer cannot be told
@pytest.mark.parametrize("make", [transformer, encoder, decoder])
@pytest.mark.parametrize("norm_first", [False, True])
def test_layers_of_torch(make: Any, norm_first: bool) -> None:
    model, inputs = make(norm_first)
    model = randomized(model)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    traced = fxprune.trace(model, inputs)
    torch.testing.assert_close(traced.module(*args), model(*args), rtol=1e-4, atol=1e-5)
    slim = fxprune.compile(model, inputs, Budget(macs=0.5), progress=False)
    report = fxprune.report(slim)
    assert report.frontend == "symbolic_trace"
    assert report.verification is not None
    assert report.verification.worst < 1e-12
    assert set(slim.state_dict()) == set(model.state_dict())
    assert not any("frozen" in note for note in report.notes)
