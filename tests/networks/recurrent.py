"""Networks with recurrent layers, as they are met: taggers, classifiers, captions, encoders and decoders."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tagger(nn.Module):
    """A linear layer, a recurrent one and a linear one, step by step."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        width = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
        self.first, self.layer, self.out = nn.Linear(6, layer.input_size), layer, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.layer(self.first(x))[0]))


class LastStep(nn.Module):
    """Classifies by the last step of a sequence of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(20, 8), nn.LSTM(8, 12, 2, batch_first=True)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.words(x))[0][:, -1])


class LastStates(nn.Module):
    """Reads the last states: of both directions of the last layer, of all layers together, and summed over them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(6, 12, 2, bidirectional=True)
        self.last, self.all, self.sum = nn.Linear(24, 5), nn.Linear(48, 5), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.layer(x)[1]
        summed = h.view(2, 2, -1, 12)[-1].sum(0)
        return (
            self.last(torch.cat([h[-2], h[-1]], -1)),
            self.all(h.transpose(0, 1).flatten(1)),
            self.sum(summed),
        )


class Projected(nn.Module):
    """Reads all that a projecting LSTM returns."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 16, 2, proj_size=6, bidirectional=True)
        self.sequence, self.hidden, self.cell = nn.Linear(12, 5), nn.Linear(6, 5), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, (h, c) = self.layer(x)
        return self.sequence(y), self.hidden(h[0]), self.cell(c[-1])


class Residual(nn.Module):
    """Recurrent layers with norms, each added to what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(6, 12), nn.Linear(12, 5)
        self.norm, self.one = nn.LayerNorm(12), nn.LSTM(12, 12, 2)
        self.both, self.twice = nn.GRU(12, 6, bidirectional=True), nn.RNN(12, 12, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.one(self.norm(x))[0]
        x = x + self.both(x)[0]
        return self.out(self.twice(self.twice(x)[0])[0])


class Captions(nn.Module):
    """Reads the columns of a map of features as a sequence (CRNN)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.layer, self.out = nn.LSTM(32, 12, 2, bidirectional=True), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        b, c, h, w = x.shape
        return self.out(self.layer(x.permute(3, 0, 1, 2).reshape(w, b, c * h))[0])


class ChannelByChannel(nn.Module):
    """Reads each channel as a sequence of its own: the channels are in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.layer, self.out = nn.Conv1d(3, 8, 3), nn.GRU(1, 6, batch_first=True), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        h = self.layer(x.reshape(x.shape[0] * 8, -1, 1))[1][0]
        return self.out(h.view(-1, 48))


class AlongTime(nn.Module):
    """A linear layer makes the steps: none of them may go."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.layer, self.out = nn.Linear(7, 9), nn.GRU(6, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.time(x.transpose(1, 2)).transpose(1, 2))[0])


class Translator(nn.Module):
    """The states of both directions of the encoder are where the decoder begins."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.LSTM(6, 8, 2, bidirectional=True), nn.LSTM(6, 16, 2)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, c) = self.encoder(x)
        states = tuple(torch.cat([t[0::2], t[1::2]], -1) for t in (h, c))
        return self.out(self.decoder(x, states)[0])


class FromZeros(nn.Module):
    """Begins with states that forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.LSTM(6, 12, 2, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, c = torch.zeros(2, x.size(0), 12, dtype=x.dtype), x.new_ones(2, x.size(0), 12)
        return self.out(self.layer(x, (h, c))[0])


class FromLearned(nn.Module):
    """Begins with a state that is a parameter; a second layer shares the weights of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other, self.out = nn.GRU(6, 12), nn.GRU(6, 12), nn.Linear(24, 5)
        self.other.weight_ih_l0, self.other.weight_hh_l0 = self.layer.weight_ih_l0, self.layer.weight_hh_l0
        self.begin = nn.Parameter(torch.randn(1, 1, 12))

    def forward(self, x: Tensor) -> Tensor:
        state = self.begin.expand(-1, x.shape[1], -1).contiguous()
        return self.out(torch.cat([self.layer(x, state)[0], self.other(x)[0]], -1))


class NoBatch(nn.Module):
    """Sequences without a batch dim, with and without initial states."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.next = nn.LSTM(6, 12, 2, bidirectional=True, batch_first=True), nn.LSTM(24, 12, 4)
        self.out, self.cell = nn.Linear(12, 5), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, states = self.layer(x)
        z, (_, c) = self.next(y, states)
        return self.out(z), self.cell(c[1])


class Cells(nn.Module):
    """Cells of all kinds, called step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(6, 12), nn.GRUCell(12, 8, bias=False)
        self.rnn, self.out = nn.RNNCell(8, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        states: Any = None
        g, r = x.new_zeros(x.shape[1], 8), None
        for step in range(3):
            states = self.lstm(x[step], states)
            g = self.gru(states[0], g)
            r = self.rnn(g, r)
        assert r is not None
        return self.out(r)


class LoopOverSteps(nn.Module):
    """A cell called as often as the input has steps: only `torch.export` traces it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.out = nn.Linear(6, 8), nn.LSTMCell(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[1], 12)
        seen = []
        for step in self.first(x):
            h, c = self.cell(step, (h, c))
            seen.append(h)
        return self.out(torch.stack(seen))
