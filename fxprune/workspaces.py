"""Memory that a convolution uses on the CPU while it runs, beside what goes in and what comes out.

Torch runs most of them by oneDNN, which works in a layout of its own: channels in blocks as wide as a vector register.
So there are copies of the input, the weight and the output for a moment, padded to whole blocks. Groups that do not
fill blocks, and small jobs, are matrix products of patches instead, which are laid out first. All of that goes through
torch's allocator, and follows from sizes, the instruction set and the number of threads.

Sources: `ConvParams::use_mkldnn` in torch's Convolution.cpp; `convolution_forward` in ideep; oneDNN's jit kernels; what
torch 2.15 allocates. Other devices make no such copies, and what they take for a workspace is not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch

SMALL = 20480
"""Up to so many elements, torch does not hand a single image without groups to oneDNN."""
MANY = 16
"""From so many images on, one thread too has oneDNN multiply by a 1 x 1 kernel."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides how the CPU convolves.

    Attributes:
        threads: how many threads torch uses.
        block: channels per block.
        multiple: the channels of a group are blocked if they are a multiple of this.
        blocked: dtypes that oneDNN takes.
    """

    threads: int
    block: int
    multiple: int
    blocked: frozenset[torch.dtype]


def this_machine() -> Machine:
    """Return the machine this runs on, as torch sees it."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return Machine(torch.get_num_threads(), *((16, 4) if wide else (8, 8)), _blocked_dtypes())


@functools.cache
def _blocked_dtypes() -> frozenset[torch.dtype]:
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    half = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return frozenset({torch.float32, *(dtype for dtype, is_supported in half.items() if is_supported())})


class Convolving(NamedTuple):
    """What stays the same of a convolution, whatever channels go.

    Attributes:
        itemsize: bytes of an element.
        blocked: oneDNN takes its dtype.
        half: its dtype is shorter than float32.
        batch: images.
        taps: positions of the kernel.
        space_in: positions of an image.
        space_out: positions of a result.
        deep: positions along the last of three dims in space; 1 for fewer.
        thin: the kernel has size 1 along its last two dims.
        large: the kernel has more than size 3 along its last two dims.
        strided: the stride is not 1.
        dilated: the dilation is not 1.
        padded: there is padding.
        outside: along some dim there is more padding than image.
        transposed: it is a transposed convolution.
        biased: there is a bias.
        channels_last: its input or weight is stored channels last.
        restrided: the weight is not, and is copied first.
    """

    itemsize: int
    blocked: bool
    half: bool
    batch: int
    taps: int
    space_in: int
    space_out: int
    deep: int
    thin: bool
    large: bool
    strided: bool
    dilated: bool
    padded: bool
    outside: bool
    transposed: bool
    biased: bool
    channels_last: bool
    restrided: bool


def _per_dim(padding: Sequence[int], space: Sequence[int]) -> list[int]:
    return list(padding) * len(space) if len(padding) == 1 else list(padding)


def convolving(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    machine: Machine,
) -> Convolving:
    """Return what stays the same of a convolution.

    Args:
        x: (b, c_in, *space).
        weight: (c_out, c_in / g, *kernel), or (c_in, c_out / g, *kernel) of a transposed one.
        bias: (c_out,) or None.
        out: (b, c_out, *space).
        stride: along every dim in space.
        padding: along every dim in space.
        dilation: along every dim in space.
        transposed: whether it is a transposed convolution.
        machine: where it runs.
    """
    space, kernel = x.shape[2:], weight.shape[2:]
    channels_last = _is_channels_last(x) or _is_channels_last(weight)
    last = (1, *kernel)[-2:]  # along one dim, torch adds one
    return Convolving(
        itemsize=x.element_size(),
        blocked=x.dtype in machine.blocked,
        half=x.dtype in (torch.float16, torch.bfloat16),
        batch=x.shape[0],
        taps=kernel.numel(),
        space_in=space.numel(),
        space_out=out.shape[2:].numel(),
        deep=space[-1] if len(space) > 2 else 1,
        thin=max(last) == 1,
        large=min(last) > 3,
        strided=max(stride) > 1,
        dilated=max(dilation) > 1,
        padded=max(padding) > 0,
        outside=any(p > n for p, n in zip(_per_dim(padding, space), space, strict=True)),
        transposed=transposed,
        biased=bias is not None,
        channels_last=channels_last,
        restrided=channels_last and not weight.is_contiguous(memory_format=_LAST[weight.ndim]),
    )


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _is_channels_last(t: torch.Tensor) -> bool:
    return t.ndim in _LAST and not t.is_contiguous() and t.is_contiguous(memory_format=_LAST[t.ndim])


@dataclass(frozen=True, slots=True)
class Sizes:
    """What changes with the channels that stay. All arrays: (convolutions,).

    Attributes:
        x: elements of the input.
        weight: elements of the weight.
        out: elements of the output.
        c_in: channels of the input.
        c_out: channels of the output.
        second: size of the weight's second dim.
    """

    x: np.ndarray
    weight: np.ndarray
    out: np.ndarray
    c_in: np.ndarray
    c_out: np.ndarray
    second: np.ndarray


class Workspaces:
    """The workspaces of several convolutions, for any number of channels."""

    def __init__(self, runs: Sequence[Convolving], machine: Machine) -> None:
        """Lay out what stays the same as arrays, (convolutions,)."""
        self._machine = machine
        columns = map(np.array, zip(*runs, strict=True)) if runs else repeat(np.empty(0, dtype=bool))
        self._of = of = dict(zip(Convolving._fields, columns, strict=False))
        of["point"] = of["taps"] == 1
        of["plain"] = of["point"] & ~of["strided"] & ~of["padded"] & ~of["transposed"]
        of["worth"] = of["strided"] | of["dilated"] | ~of["thin"] | (of["batch"] >= MANY) | (machine.threads > 1)
        of["big"] = of["large"] | (of["batch"] > 1)

    def __call__(self, sizes: Sizes) -> np.ndarray:
        """Return (convolutions,) the most bytes that each uses at a time, beyond its operands and its output."""
        of = self._of
        groups = np.where(of["transposed"], sizes.c_out, sizes.c_in) // np.maximum(sizes.second, 1)
        groups = np.maximum(groups, 1)
        big = of["big"] | (groups > 1) | (sizes.x // of["deep"] > SMALL)
        by_onednn = of["blocked"] & (of["half"] | (of["worth"] & big))
        elements = np.where(by_onednn, self._in_blocks(sizes, groups), self._as_patches(sizes, groups))
        restrided = of["restrided"] & (sizes.c_in > 1)
        return of["itemsize"] * (np.maximum(elements, 0) + np.where(restrided, sizes.weight, 0))

    def _in_blocks(self, sizes: Sizes, groups: np.ndarray) -> np.ndarray:
        """Return the elements that oneDNN uses: it copies what goes in, computes its output, and copies that."""
        of, block = self._of, self._machine.block
        one, depthwise = groups == 1, (groups == sizes.c_in) & (groups == sizes.c_out)
        each_in, each_out = sizes.c_in // groups, sizes.c_out // groups
        whole = (each_in % self._machine.multiple == 0) & (each_out % self._machine.multiple == 0)
        fits = (one | depthwise | whole) & ~of["outside"]
        pads = fits & (one | depthwise)
        c_in = np.where(pads, -(-sizes.c_in // block) * block, sizes.c_in)
        c_out = np.where(pads, -(-sizes.c_out // block) * block, sizes.c_out)
        flat = one & ~of["point"] & (sizes.c_in < block) & ~of["transposed"]  # such an input is read as it is
        x = np.where(fits & ~flat, of["batch"] * of["space_in"] * c_in, 0)
        out = of["batch"] * of["space_out"] * c_out
        weight = np.where(flat, sizes.c_in, c_in) * np.where(one, c_out, 1) * of["taps"]
        weight = np.where(fits, np.where(pads, weight, sizes.weight), 0)
        patches = np.where(fits | of["point"], 0, each_in * of["taps"])
        taken = np.where(of["point"] & of["strided"] & one, c_in, patches)  # what one thread lays out: an image
        patches = self._machine.threads * taken * of["space_out"]
        usual = np.maximum(x + weight + patches + out - sizes.out, out)
        twice = of["transposed"] & (of["strided"] | of["biased"]) & fits & ~depthwise  # not in blocks, but copied twice
        usual = np.where(twice, np.maximum(sizes.x + sizes.weight, 2 * sizes.out), usual)
        return np.where(of["channels_last"] & (sizes.c_in > 1), weight, usual)  # of a single channel, all is contiguous

    def _as_patches(self, sizes: Sizes, groups: np.ndarray) -> np.ndarray:
        """Return the elements of the patches that torch lays out itself, for all images at once unless dilated."""
        of = self._of
        images = np.where(of["dilated"], 1, of["batch"])
        columns = np.where(of["transposed"], sizes.c_out * of["space_in"], sizes.c_in * of["space_out"])
        patches = np.where(of["plain"], 0, images * columns * of["taps"] // groups)
        parts = np.maximum(sizes.x // groups + patches, sizes.out)  # group after group, all results joined at the end
        return np.where(groups > 1, parts, patches)
