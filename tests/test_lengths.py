"""Lengths that follow the input: what is cut by them stays whole, and the slim network takes other lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import settled
from torch import Tensor, nn

import fxprune
from fxprune.masking import AbsentIsNaN
from fxprune.verifying import masked_copy, run_in

GENERATOR = torch.Generator().manual_seed(0)


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 6, dtype=torch.float64, generator=GENERATOR)


def images(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=GENERATOR)


class Sequence(nn.Module):
    """Tokens of 24 channels, a function of them and of a table that is longer than the example, and an MLP."""

    def __init__(self, op: Callable[[Tensor, Any], Tensor], *shape: int) -> None:
        super().__init__()
        self.embed, self.table, self.op = nn.Linear(6, 24), nn.Parameter(torch.randn(shape)), op
        self.hidden, self.head = nn.Linear(24, 48), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.op(self.embed(x), self.table))))


class Maps(nn.Module):
    """Positions of a map, the upper left of a larger one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pos = nn.Conv2d(3, 16, 3, padding=1), nn.Parameter(torch.randn(1, 16, 20, 20))
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        height, width = h.shape[-2:]
        return self.head(F.relu(h + self.pos[:, :, :height, :width]))


class Attention(nn.Module):
    """Four heads with a causal mask, a bias table for each pair of places, and a rotation of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 3 * 32), nn.Linear(32, 5)
        self.bias = nn.Parameter(torch.randn(4, 20, 20))
        angles = torch.arange(20.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())
        self.register_buffer("mask", torch.full((20, 20), float("-inf")).triu(1)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        cos, sin = self.cos[:length], self.sin.narrow(0, 0, length)
        q, k = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (q, k))
        scores = q @ k.transpose(-2, -1) * 8**-0.5 + self.mask[:, :, :length, :length] + self.bias[:, :length, :length]
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))


class Convolved(nn.Module):
    """A long convolution by Fourier transforms: its kernel is cut to the length of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.kernel, self.head = nn.Linear(6, 16), nn.Parameter(torch.randn(16, 64)), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).transpose(1, 2)
        n = h.size(-1)
        y = torch.fft.rfft(h, n=2 * n) * torch.fft.rfft(self.kernel[:, :n], n=2 * n)
        return self.head(torch.fft.irfft(y, n=2 * n)[..., :n].transpose(1, 2))


class Embedded(nn.Module):
    """Positions are the first rows of an embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pos, self.head = nn.Linear(6, 24), nn.Embedding(40, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.embed(x) + self.pos.weight[: x.shape[1]]))


class Modulated(nn.Module):
    """A convolution with weights of its own for each image, as a grouped one: its groups are the batch."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem, self.style, self.groups = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(8, 16 // groups), groups
        self.weight, self.head = nn.Parameter(torch.randn(1, 16, 16 // groups, 3, 3)), nn.Conv2d(16, 1, 1)

    def forward(self, image: Tensor, z: Tensor) -> Tensor:
        h = self.stem(image)
        b, c, height, width = h.shape
        weight = (self.weight * (self.style(z).view(b, 1, -1, 1, 1) + 1)).flatten(0, 1)
        h = F.conv2d(h.view(1, b * c, height, width), weight, padding=1, groups=b * self.groups)
        return self.head(h.view(b, -1, height, width))


class Unconvolved(nn.Module):
    """The same, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.style = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(8, 16)
        self.weight, self.head = nn.Parameter(torch.randn(1, 16, 16, 3, 3)), nn.Conv2d(16, 1, 1)

    def forward(self, image: Tensor, z: Tensor) -> Tensor:
        h = self.stem(image)
        b, c, height, width = h.shape
        weight = (self.weight * (self.style(z).view(b, c, 1, 1, 1) + 1)).flatten(0, 1)
        h = F.conv_transpose2d(h.view(1, b * c, height, width), weight, padding=1, groups=b)
        return self.head(h.view(b, -1, height, width))


class Both(nn.Module):
    """A bound and a scale that the length and the width, which shrinks, both have a part in."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.table = nn.Linear(6, 24), nn.Parameter(torch.randn(80, 24))
        self.hidden, self.head = nn.Linear(24, 48), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        e = self.embed(x)
        h = F.relu(self.hidden(e))
        size = h.shape[1:]
        e = e + self.table[h.shape[2] : h.shape[2] + h.shape[1]] / (size[0] * h.shape[2])
        return self.head(F.relu(self.hidden(e)))


class Dealt(nn.Module):
    """Attention over places, whose result is read as maps without a transposition: runs of channels become places."""

    def __init__(self, open_size: bool = False) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 1), nn.Conv2d(24, 5, 1)
        self.open_size = open_size

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        b, _, height, width = h.shape
        places = h.flatten(2)
        mixed = (places.transpose(1, 2) @ places).softmax(-1) @ places.transpose(1, 2)
        dealt = mixed.reshape(b, 16, -1) if self.open_size else mixed.reshape(b, 16, height, width)
        return self.head(F.relu(self.hidden(h + dealt.view_as(h))))


OPS: dict[str, tuple[Callable[[Tensor, Any], Tensor], tuple[int, ...]]] = {
    "slice": (lambda h, t: h + t[:, : h.shape[1]], (1, 40, 24)),
    "slice_of_size": (lambda h, t: h + t[: h.size(1)], (40, 24)),
    "slice_last": (lambda h, t: h + t[-h.shape[1] :], (40, 24)),
    "slice_shifted": (lambda h, t: h + t[2 : h.shape[1] + 2], (40, 24)),
    "slice_like_a_slice": (lambda h, t: h + t[: t[: h.shape[1]].shape[0]], (40, 24)),
    "slice_like_ones": (lambda h, t: h + t[: torch.ones(h.shape[:2]).shape[1]], (40, 24)),
    "setitem": (lambda h, t: _written(h, t), (1, 40, 24)),
    "narrow": (lambda h, t: h + t.narrow(1, 0, h.shape[1]), (1, 40, 24)),
    "split": (lambda h, t: h + t.split([h.shape[1], 40 - h.shape[1]], 1)[0], (1, 40, 24)),
    "pad": (lambda h, t: h + F.pad(t, (0, 0, 0, h.shape[1] - 40)), (1, 40, 24)),
    "pad_longer": (lambda h, t: h + F.pad(t, (0, 0, 0, h.shape[1] - 1)), (1, 1, 24)),
    "index_select": (lambda h, t: h + t.index_select(0, torch.arange(h.shape[1])), (40, 24)),
    "index": (lambda h, t: h + t[torch.arange(h.shape[1])], (40, 24)),
    "index_reversed": (lambda h, t: h + t[h.shape[1] - 1 - torch.arange(h.shape[1])], (40, 24)),
    "roll": (lambda h, t: h + t.roll(h.shape[1], 0)[: h.shape[1]], (40, 24)),
    "last": (lambda h, t: h + t[h.shape[1] - 1], (40, 24)),
}


def _written(h: Tensor, table: Tensor) -> Tensor:
    room = h.new_zeros(h.shape[0], 40, 24)
    room[:, : h.shape[1]] = h
    return (room + table)[:, : h.shape[1]]


def check(model: nn.Module, example: Any, others: list[Any], macs: float = 0.5) -> Any:
    """Compile, and compare with the masked original on other inputs."""
    model = settled(model).double()
    slim = fxprune.compile(model, example, fxprune.Budget(macs=macs), progress=False)
    masked = masked_copy(model, fxprune.report(slim).plan)
    for inputs in others:
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        expected = run_in(AbsentIsNaN(), masked, inputs, {})
        torch.testing.assert_close(slim(*inputs), expected, rtol=1e-9, atol=1e-9)
    return slim


@torch.fx.wrap
def pad(x: Tensor, amount: int) -> Tensor:
    """No pad of torch: what it takes is another."""
    return x + 0 * amount


@pytest.mark.parametrize("op", OPS)
def test_tables_are_cut_to_any_length(op: str) -> None:
    slim = check(Sequence(*_op(op)), tokens(10), [tokens(n, batch) for n, batch in ((10, 2), (1, 2), (7, 3), (33, 1))])
    assert slim.get_parameter("hidden.weight").shape < (48, 24)


def _op(name: str) -> tuple[Any, ...]:
    function, shape = OPS[name]
    return function, *shape


@pytest.mark.parametrize("model", [Embedded, Attention, Convolved, Both])
def test_networks_of_tokens_take_other_lengths(model: type[nn.Module]) -> None:
    slim = check(model(), tokens(10), [tokens(n, batch) for n, batch in ((10, 2), (1, 2), (7, 3), (13, 1))])
    assert fxprune.report(slim).costs.share("macs") < 0.6


def test_functions_of_the_user_may_have_the_name_of_an_op() -> None:
    check(Sequence(lambda h, t: pad(h, h.shape[1]) + t, 24), tokens(10), [tokens(10)])


def test_maps_take_other_heights_and_widths() -> None:
    slim = check(Maps(), images(8, 8), [images(8, 8), images(1, 1), images(12, 5, 3), images(20, 20, 1)])
    assert slim.get_parameter("pos").shape[2:] == (20, 20)


@pytest.mark.parametrize("macs", [1.0, 0.5])
@pytest.mark.parametrize("model", [Modulated, lambda: Modulated(4), Unconvolved], ids=["one", "four", "transposed"])
def test_groups_may_be_the_batch(model: Callable[[], nn.Module], macs: float) -> None:
    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        return images(8, 8, batch), torch.randn(batch, 8, dtype=torch.float64, generator=GENERATOR)

    check(model(), inputs(2), [inputs(2), inputs(3), inputs(1)], macs)


@pytest.mark.parametrize("open_size", [False, True])
def test_channels_that_are_dealt_out_over_places_stay(open_size: bool) -> None:
    slim = check(Dealt(open_size), images(2, 4), [images(2, 4), images(4, 4, 1), images(2, 2), images(3, 5)], 0.7)
    assert slim.get_parameter("hidden.weight").shape[0] < 24
    reason = {row.reason for row in fxprune.report(slim).frozen if row.node == "reshape"}
    assert reason == {"is cut where the size of the input says"}


def test_heads_as_wide_as_the_input_says_may_go() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(6, 24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            heads = self.embed(x).reshape(b, n, 4, c).transpose(1, 2).softmax(2)
            return self.head(heads.transpose(1, 2).reshape(b, n, 4 * c))

    slim = check(Heads(), tokens(10), [tokens(10), tokens(3)])
    assert slim.get_parameter("embed.weight").shape[0] < 24


def test_why_frozen_names_the_cut() -> None:
    coupling = fxprune.couple(fxprune.trace(Sequence(*_op("slice")), tokens(10).float()))
    said = coupling.why_frozen(("table", 1))
    assert "40 of 40 channels may not go" in said
    assert "is cut where the size of the input says" in said
    assert coupling.coverage().macs == 1.0


def test_bounds_from_channels_and_from_numbers_are_still_found_again() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(6, 24), nn.Linear(12, 5)
            self.scale = nn.Parameter(torch.randn(40))

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            half = h.shape[-1] // 2
            return self.head(h[..., :half].sigmoid() * h.narrow(-1, half, half) * self.scale[:half])

    slim = check(Halves(), tokens(10), [tokens(10), tokens(3)])
    assert slim.get_parameter("embed.weight").shape[0] < 24
    assert slim.get_parameter("head.weight").shape[1] < 12
    assert slim.get_parameter("scale").shape[0] < 40  # what the number 12 does not reach, no input will


def test_lengths_are_followed_in_exported_graphs() -> None:
    class Asking(Sequence):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, torch.fx.Proxy):
                raise ValueError("symbolic values are not taken")
            return super().forward(x)

    slim = check(Asking(*_op("slice")), tokens(10), [tokens(10), tokens(7), tokens(13)])
    assert fxprune.report(slim).frontend == "export"
