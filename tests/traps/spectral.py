"""Fourier transforms and complex weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from traps.spec import IMAGE, TOKENS, trap


@trap("global filter, a real parameter read as complex", IMAGE, "first.weight 0, filter 0, last.weight 1")
class GlobalFilter(nn.Module):
    """GFNet: a product with learned weights in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 5, 1)
        self.filter = nn.Parameter(torch.randn(16, 8, 5, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft2(self.first(x), dim=(2, 3), norm="ortho")
        y = y * torch.view_as_complex(self.filter)
        return self.last(torch.relu(torch.fft.irfft2(y, s=(8, 8), dim=(2, 3), norm="ortho")))


@trap("global filter, channels last", TOKENS, "first.weight 0, filter 2, last.weight 1")
class GlobalFilterTokens(nn.Module):
    """As GFNet has it: tokens laid out in space, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 5)
        self.filter = nn.Parameter(torch.randn(2, 2, 24, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.first(x)
        y = torch.fft.rfft2(y.view(b, 2, 3, 24).to(torch.float32), dim=(1, 2), norm="ortho")
        y = torch.fft.irfft2(y * torch.view_as_complex(self.filter), s=(2, 3), dim=(1, 2), norm="ortho")
        return self.last(torch.relu(y.reshape(b, n, 24)))


@trap("phases written with a complex number", IMAGE, "first.weight 0, phases 0, phases 1, last.weight 1")
class Phases(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(12, 5, 1)
        self.phases = nn.Parameter(torch.randn(16, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bchw,cd->bdhw", torch.fft.rfft2(self.first(x)), torch.exp(1j * self.phases))
        return self.last(torch.relu(torch.fft.irfft2(y, s=(8, 8))))


@trap("a complex parameter", IMAGE, "first.weight 0, filter 0, last.weight 1")
class ComplexParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 5, 1)
        self.filter = nn.Parameter(torch.randn(16, 8, 8, dtype=torch.cfloat) / 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.fft2(self.first(x)) * self.filter
        return self.last(torch.relu(torch.fft.ifft2(y).real))


class SpectralConv(nn.Module):
    """A layer of a Fourier neural operator: the lowest frequencies, mixed over channels."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_in, c_out, 3, 3, dtype=torch.cfloat) / 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bixy,ioxy->boxy", torch.fft.rfft2(x)[:, :, :3, :3], self.weight)
        return torch.fft.irfft2(F.pad(y, (0, 2, 0, 5)), s=(x.shape[2], x.shape[3]))


FNO = "lift.weight 0, a.weight 0, a.weight 1, w.weight 0, w.weight 1, down.weight 1"


@trap("Fourier neural operator", IMAGE, FNO)
class FNO2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift, self.a, self.w = nn.Conv2d(3, 16, 1), SpectralConv(16, 16), nn.Conv2d(16, 16, 1)
        self.down = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        return self.down(F.gelu(self.a(x) + self.w(x)))


class WrittenSpectralConv(SpectralConv):
    """As the original writes it: into zeros."""

    def forward(self, x: Tensor) -> Tensor:
        ft = torch.fft.rfft2(x)
        out = torch.zeros(x.shape[0], self.weight.shape[1], x.size(-2), x.size(-1) // 2 + 1, dtype=torch.cfloat)
        out[:, :, :3, :3] = torch.einsum("bixy,ioxy->boxy", ft[:, :, :3, :3], self.weight)
        return torch.fft.irfft2(out, s=(x.size(-2), x.size(-1)))


@trap("Fourier neural operator written into zeros", IMAGE, FNO)
class WrittenFNO(FNO2d):
    def __init__(self) -> None:
        super().__init__()
        self.a = WrittenSpectralConv(16, 16)


@trap("real and imaginary parts apart", IMAGE, "first.weight 0, re 0, re 1, im 0, last.weight 1")
class Apart(nn.Module):
    """AFNO-like: complex products written out, and put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(12, 5, 1)
        self.re, self.im = nn.Parameter(torch.randn(12, 16) / 4), nn.Parameter(torch.randn(12, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft2(self.first(x), norm="ortho")
        re = torch.einsum("oi,bixy->boxy", self.re, y.real) - torch.einsum("oi,bixy->boxy", self.im, y.imag)
        im = torch.einsum("oi,bixy->boxy", self.re, y.imag) + torch.einsum("oi,bixy->boxy", self.im, y.real)
        z = torch.view_as_complex(torch.stack([torch.relu(re), torch.relu(im)], -1))
        return self.last(torch.fft.irfft2(z, s=x.shape[-2:], norm="ortho"))


@trap("amplitude and phase", IMAGE, "first.weight 0, mid.weight 0, last.weight 1")
class Polar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft2(self.first(x))
        z = torch.polar(F.softplus(self.mid(y.abs())), y.angle())
        return self.last(torch.fft.irfft2(z) + torch.fft.irfft2(torch.complex(y.real, y.imag.neg())))


@trap("a transform over channels", IMAGE, "last.weight 0", held={"first.weight 0": "_fft_r2c cannot shorten"}, macs=0.8)
class OverChannels(nn.Module):
    """FNet mixes the hidden dim too: every frequency needs every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.fft(torch.fft.fft(self.first(x), dim=1), dim=3).real
        return self.out(torch.relu(self.last(y)))


@trap("distances to prototypes", TOKENS, "first.weight 0, prototypes 1")
class Distances(nn.Module):
    """A head of distances: `cdist` sums over the features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.prototypes = nn.Linear(16, 24), nn.Parameter(torch.randn(5, 24))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(torch.relu(self.first(x)), self.prototypes)


@trap("tokens chosen by their score", TOKENS, "first.weight 0, score.weight 1, last.weight 1")
class Chosen(nn.Module):
    """EViT-like: `topk` over tokens, `gather` along them with every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.score, self.last = nn.Linear(16, 24), nn.Linear(24, 1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        best = self.score(y).squeeze(-1).topk(3, 1)[1]
        chosen = y.gather(1, best.unsqueeze(-1).expand(-1, -1, y.shape[-1]))
        return self.last(torch.cat([chosen, y.sort(1)[0][:, :2]], 1))


@trap(
    "sorted channels",
    TOKENS,
    "deep.weight 0, last.weight 1",
    held={"first.weight 0": "is ordered by its values"},
    macs=0.7,
)
class Sorted(nn.Module):
    """Sorting over channels: which comes where depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep, self.last = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.deep(self.first(x).sort(-1).values)))


@trap(
    "a matrix inverse",
    TOKENS,
    "deep.weight 0, last.weight 1",
    held={"first.weight 0": "linalg_inv_ex, which has no rule"},
    macs=0.7,
)
class Inverted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep, self.last = nn.Linear(16, 8), nn.Linear(8, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        inverse = torch.linalg.inv(y.transpose(1, 2) @ y + torch.eye(8))
        return self.last(torch.relu(self.deep(y @ inverse)))
