"""Grouped, regrouped, transposed and computed convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from traps.spec import IMAGE, trap


class Regrouped(nn.Module):
    """Two grouped convolutions in a row, whose groups cut the channels between them in two ways."""

    def __init__(self, first: int, second: int, residual: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.a = nn.Conv2d(24, 24, 3, padding=1, groups=first)
        self.b = nn.Conv2d(24, 24, 3, padding=1, groups=second)
        self.head, self.residual = nn.Conv2d(24, 5, 1), residual

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.b(torch.relu(self.a(x)))
        return self.head(x + y if self.residual else y)


for _first, _second in ((4, 6), (2, 8), (8, 2), (24, 4)):
    for _residual in (False, True):
        trap(
            f"groups {_first} then {_second}{' with a residual' if _residual else ''}",
            IMAGE,
            "stem.weight 0, a.weight 0, b.weight 0, head.weight 1",
        )(lambda first=_first, second=_second, residual=_residual: Regrouped(first, second, residual))


@trap("grouped transposed convolution", IMAGE, "stem.weight 0, up.weight 0, up.weight 1, head.weight 1")
class Upward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(12, 5, 1)
        self.up = nn.ConvTranspose2d(24, 12, 2, 2, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(torch.relu(self.stem(x)))))


@trap("depthwise transposed convolution", IMAGE, "stem.weight 0, up.weight 0, head.weight 1")
class UpwardDepthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 5, 1)
        self.up = nn.ConvTranspose2d(24, 24, 2, 2, groups=24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(torch.relu(self.stem(x)))))


@trap("functional weights", IMAGE, "w 0, bias 0, deep 0, deep 1, up 0, up 1, v 1")
class Functional(nn.Module):
    """Weights that are parameters of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.bias = nn.Parameter(torch.randn(16, 3, 3, 3) / 5), nn.Parameter(torch.randn(16))
        self.deep = nn.Parameter(torch.randn(16, 4, 3, 3) / 6)
        self.up, self.v = nn.Parameter(torch.randn(16, 3, 2, 2) / 4), nn.Parameter(torch.randn(5, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(F.conv2d(x, self.w, self.bias, padding=1))
        x = torch.relu(F.conv2d(x, self.deep, padding=1, groups=4))
        x = F.conv_transpose2d(x, self.up, stride=2, groups=4)
        return F.linear(torch.relu(x).mean((2, 3)), self.v)


@trap("computed weights", IMAGE, "w 0, gain 0, deep 0, deep 1, v 1, u 0")
class Computed(nn.Module):
    """A gated kernel, a symmetric one, and a product of two matrices as the weight of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.gain = nn.Parameter(torch.randn(16, 3, 3, 3) / 5), nn.Parameter(torch.rand(16, 1, 1, 1) + 0.5)
        self.deep = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.u, self.v = nn.Parameter(torch.randn(8, 5) / 3), nn.Parameter(torch.randn(8, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(F.conv2d(x, self.w * self.gain.sigmoid(), padding=1))
        x = torch.relu(F.conv2d(x, self.deep + self.deep.flip(-1), padding=1))
        return F.linear(x.mean((2, 3)), self.u.t() @ self.v)


class Standardised(nn.Conv2d):
    """Weight standardisation, as in ResNets with GroupNorm."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        mean, var = w.mean((1, 2, 3), keepdim=True), w.var((1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(
            x, (w - mean) / (var + 1e-5).sqrt(), self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class ScaledStandardised(nn.Conv2d):
    """Standardisation by a batch norm over the flattened weight, as timm writes it."""

    def forward(self, x: Tensor) -> Tensor:
        w = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-6
        ).reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Normed(nn.Module):
    def __init__(self, kind: type[nn.Conv2d], groups: int) -> None:
        super().__init__()
        self.a, self.b = kind(3, 24, 3, padding=1), kind(24, 24, 3, padding=1, groups=groups)
        self.norm, self.head = nn.GroupNorm(4, 24), nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.b(torch.relu(self.a(x))))))


STANDARD = "a.weight 0, b.weight 0, b.weight 1, norm.weight 0, head.weight 1"
trap("weight standardisation", IMAGE, STANDARD)(lambda: Normed(Standardised, 1))
trap("weight standardisation with groups", IMAGE, STANDARD)(lambda: Normed(Standardised, 4))
trap("weight standardisation by batch norm", IMAGE, STANDARD)(lambda: Normed(ScaledStandardised, 1))


@trap("mixture of kernels", IMAGE, "stem.weight 0, experts 1, experts 2, head.weight 1")
class Dynamic(nn.Module):
    """CondConv: every sample has a kernel of its own, in one grouped convolution over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.route = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 3)
        self.experts, self.head = nn.Parameter(torch.randn(3, 16, 16, 3, 3) / 12), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        b, c, h, w = x.shape
        kernel = torch.einsum("be,eoihw->boihw", self.route(x.mean((2, 3))).softmax(1), self.experts)
        y = F.conv2d(x.reshape(1, b * c, h, w), kernel.reshape(-1, c, 3, 3), padding=1, groups=b)
        return self.head(torch.relu(y.reshape(b, -1, h, w)))


@trap("convolution as unfold and matmul", IMAGE, "stem.weight 0, w 0, w 1, head.weight 1")
class Unfolded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.w, self.head = nn.Conv2d(3, 12, 1), nn.Parameter(torch.randn(16, 108) / 10), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(torch.relu(self.stem(x)), 3, padding=1)
        return self.head((self.w @ patches).unflatten(-1, (x.shape[2], x.shape[3])))


@trap("involution", IMAGE, "stem.weight 0, reduce.weight 0, head.weight 1")
class Involution(nn.Module):
    """A kernel per position, computed from the input, shared by the channels of a group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.reduce, self.span = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 36, 1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        kernel = self.span(torch.relu(self.reduce(x))).view(b, 4, 1, 9, h, w)
        patches = F.unfold(x, 3, padding=1).view(b, 4, c // 4, 9, h, w)
        return self.head((kernel * patches).sum(3).view(b, c, h, w))


@trap("branches of one kernel", IMAGE, "stem.weight 0, w 0, w 1, head.weight 1")
class SharedKernel(nn.Module):
    """One kernel at three dilations (as in DetectoRS), and its sum as a pointwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(16, 5, 1)
        self.w = nn.Parameter(torch.randn(16, 12, 3, 3) / 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = F.conv2d(x, self.w, padding=1) + F.conv2d(x, self.w, padding=2, dilation=2)
        return self.head(torch.relu(y - F.conv2d(x, self.w.sum((2, 3), keepdim=True))))


@trap("a volume read at places", (2, 3, 4, 4, 4), "stem.weight 0, inner.weight 0, head.weight 1")
class Warped(nn.Module):
    """The network says where a volume is read, and the volume is warped so."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv3d(3, 12, 3, padding=1), nn.Conv3d(12, 8, 3, padding=1)
        self.places, self.head = nn.Conv3d(8, 3, 1), nn.Conv3d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        places = torch.tanh(self.places(torch.relu(self.inner(x)))).permute(0, 2, 3, 4, 1)
        return self.head(F.grid_sample(x, places, align_corners=False))
