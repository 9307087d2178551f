"""The functions of an Algorithm: memory layouts, packed weights, the phases of the input gradient."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from robust.conv.algorithm import Epilogue, empty, masked
from robust.conv.geometry import Geometry, Pair
from robust.conv.kernels.launch import INTERPRETED, convolve, weight_gradient
from robust.conv.kernels.tiles import LEAST

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def misfit(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> str | None:
    if dtype not in DTYPES:
        return f"computes in float32, float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if not INTERPRETED and device.type != "cuda":
        return f"needs a GPU: on a {device.type} it is interpreted, with TRITON_INTERPRET=1 set before it is imported"
    if INTERPRETED and _version(triton.__version__) < (3, 7) and _version(np.__version__) >= (2, 4):
        return f"{triton.__version__} is interpreted with numpy below 2.4 only, not {np.__version__}"  # triton#9171
    return None


def pack(weight: Tensor, geometry: Geometry) -> list[Tensor]:
    """(groups, K / groups, R, S, C / groups), widened; depthwise (1, R, S, K)."""
    if _is_depthwise(geometry, weight.shape[1]):
        return [weight.permute(1, 2, 3, 0).contiguous()]
    grouped = weight.unflatten(0, (geometry.groups, -1))  # (groups, K / groups, C / groups, R, S)
    return [_widened(grouped.permute(0, 1, 3, 4, 2), geometry).contiguous()]


def forward(x: Tensor, packed: list[Tensor], geometry: Geometry, epilogue: Epilogue) -> Tensor:
    (weight,) = packed
    y = empty((len(x), _channels(weight), *geometry.output_size((x.shape[2], x.shape[3]))), x)
    residual = None if epilogue.residual is None else _nhwc(epilogue.residual)
    convolve(
        _operand(x, geometry), weight, y, geometry.stride, _start(geometry), geometry.dilation,
        shift=epilogue.shift, residual=residual, relu=epilogue.relu,
    )  # fmt: skip
    return y


def pack_input_grad(weight: Tensor, geometry: Geometry) -> list[Tensor]:
    """Of each phase, (groups, C / groups, taps, taps, K / groups), widened; depthwise (K / C, taps, taps, C).

    In the order of `Geometry.phases`; a phase that no tap reaches has a weight without elements. Where there are but
    few channels, all phases in one: (stride, stride, C, taps, taps, K), see `_is_joined`.
    """
    grouped = weight.unflatten(0, (geometry.groups, -1))  # (groups, K / groups, C / groups, R, S)
    if _is_depthwise(geometry, weight.shape[1]):
        turned = grouped.squeeze(2).permute(1, 2, 3, 0)
    else:
        turned = _widened(grouped.permute(0, 2, 3, 4, 1), geometry)
    if _is_joined(geometry, weight.shape[1]):
        return [_joined(turned[0], geometry)]
    return [
        turned[..., list(row.taps), :, :][..., list(column.taps), :].contiguous()
        for row, column in geometry.phases(geometry.stride)
    ]


def input_grad(
    g: Tensor, packed: list[Tensor], geometry: Geometry, size: Pair, *, mask: Tensor | None = None
) -> Tensor:
    """With `mask`, a ReLU's output of g's shape: the gradient through that ReLU too.

    Within the kernel where it is read once. Each tap of a window would read it again: for the stem of ResNet-50 an H100
    took 5.8 ms, and 3.3 without a mask, which a pass of its own puts on in 0.4.
    """
    if replace(geometry, groups=1) != Geometry((1, 1)) or packed[0].dim() == 4:
        g, mask = masked(g, mask), None
    if packed[0].dim() == 6:
        return _input_grad_joined(_operand(g, geometry), packed[0], geometry, size)
    dx = empty((len(g), _channels(packed[0]), *size), g)
    phases = list(geometry.phases(size))
    if not all(row.taps and column.taps for row, column in phases):
        dx.zero_()  # one pass for all pixels that no output saw
    g, mask = _operand(g, geometry), None if mask is None else _operand(mask, geometry)
    for row, column in phases:
        if row.taps and column.taps:
            weight = packed[row.offset * geometry.stride[1] + column.offset]
            pixels = dx[:, :, row.offset :: geometry.stride[0], column.offset :: geometry.stride[1]]
            start, dilation = (-row.before, -column.before), (row.dilation, column.dilation)
            convolve(g, weight, pixels, (1, 1), start, dilation, mask=mask)
    return dx


def _is_joined(geometry: Geometry, channels: int) -> bool:
    """Whether one tile has room for all phases of the input gradient side by side: alone, each would fill as much.

    A window that reaches what every phase needs has ceil(kernel / stride) taps an axis, kernel in all phases together:
    16 in place of 49 for the stem of ResNet-50.
    """
    few = channels * math.prod(geometry.stride) <= LEAST
    return few and geometry.stride != (1, 1) and geometry.dilation == (1, 1) and geometry.groups == 1


def _joined(turned: Tensor, geometry: Geometry) -> Tensor:
    """(C, R, S, K) to (*stride, C, taps, taps, K): a weight for each pixel of a block of the stride."""
    before, after = _reach(geometry)
    c, _, _, k = turned.shape
    weight = turned.new_zeros(*geometry.stride, c, before[0] + after[0], before[1] + after[1], k)
    for row, column in geometry.phases(geometry.stride):
        top, left = before[0] - row.before, before[1] - column.before
        window = turned[:, list(row.taps)][:, :, list(column.taps)]
        weight[row.offset, column.offset, :, top : top + len(row.taps), left : left + len(column.taps)] = window
    return weight


@cache
def _reach(geometry: Geometry) -> tuple[Pair, Pair]:
    """From the output that a block of pixels begins at, by axis: how many before it the phases see, and from it on."""
    axes = [[phase for phase in axis if phase.taps] for axis in zip(*geometry.phases(geometry.stride), strict=True)]
    before = [max(phase.before for phase in axis) for axis in axes]
    after = [max(len(phase.taps) - phase.before for phase in axis) for axis in axes]
    return (before[0], before[1]), (after[0], after[1])


def _input_grad_joined(g: Tensor, weight: Tensor, geometry: Geometry, size: Pair) -> Tensor:
    (rows, columns, c), (before, _) = weight.shape[:3], _reach(geometry)
    blocks = empty((len(g), rows * columns * c, -(-size[0] // rows), -(-size[1] // columns)), g)
    convolve(g, weight.flatten(0, 2)[None], blocks, (1, 1), (-before[0], -before[1]), (1, 1))
    parted = blocks.permute(0, 2, 3, 1).unflatten(3, (rows, columns, c))  # (N, P, Q, rows, columns, C)
    pixels = parted.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]
    return pixels.contiguous().permute(0, 3, 1, 2)


def weight_grad(x: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
    c = x.shape[1] // geometry.groups
    if not g.numel():
        return x.new_zeros(g.shape[1], *geometry.kernel, c).permute(0, 3, 1, 2)
    sums = weight_gradient(
        _operand(x, geometry), _nhwc(g), geometry.groups, geometry.kernel,
        geometry.stride, _start(geometry), geometry.dilation,
    )  # fmt: skip
    # torch adds up in the same order every time.
    return sums[..., :c].sum(0).to(x.dtype).permute(0, 3, 1, 2)


def _is_depthwise(geometry: Geometry, channels: int) -> bool:
    """Whether groups have one input channel; that of a single group is multiplied as a matrix all the same."""
    return geometry.groups > 1 and channels == 1


def _channels(weight: Tensor) -> int:
    """Of the output that a packed weight makes."""
    return weight.shape[3] if weight.dim() == 4 else weight.shape[0] * weight.shape[1]


def _start(geometry: Geometry) -> Pair:
    return -geometry.padding[0], -geometry.padding[1]


def _operand(x: Tensor, geometry: Geometry) -> Tensor:
    """(N, H, W, channels), widened as the packed weight is."""
    return _widened(_nhwc(x).permute(0, 2, 3, 1), geometry).permute(0, 3, 1, 2)


def _widened(tensor: Tensor, geometry: Geometry) -> Tensor:
    """Of a single group, the last axis with zeros up to a multiple of 8 bytes: narrower loads are not prefetched."""
    missing = -tensor.shape[-1] % (8 // tensor.element_size())
    return F.pad(tensor, (0, missing)) if missing and geometry.groups == 1 else tensor


def _nhwc(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
