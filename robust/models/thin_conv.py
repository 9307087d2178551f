"""Convolutions of few channels, with an input gradient several times as fast as oneDNN's on a CPU.

The gradient with respect to a picture of one or three channels fills a fraction of a vector register, and a strided
one is computed as if over an image full of zeros. Both go away when one output position of an ordinary convolution
computes a whole block of pixels: dx[b q + r] = sum over taps t of w[r + p - s t] g[(b / s) q + t], for the b x b
offsets r of a block, each of which becomes an output channel.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust.models.cpu import lanes

IMAGE = 4  # channels at most
FULL = 12  # pixels times channels in a block, at least


class ThinConv2d(nn.Module):
    """`conv` with frozen parameters: the same output, the same input gradient up to rounding."""

    weight: Tensor
    bias: Tensor | None
    blocks: Tensor

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.channels, self.stride, self.padding = conv.in_channels, conv.stride, conv.padding
        self.register_buffer("weight", conv.weight.detach())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())
        stride, padding = conv.stride[0], (int(conv.padding[0]), int(conv.padding[1]))
        self.block = stride
        while self.block**2 * conv.in_channels < FULL:
            self.block += stride
        # The first block may begin outside of the image, so that the same outputs reach all pixels of a block. On a
        # picture, cutting off what is outside would cost more than that saves.
        self.outside = (0, 0) if conv.in_channels <= IMAGE else (padding[0] % stride, padding[1] % stride)
        (rows, self.top), (columns, self.left) = (
            _taps(conv.kernel_size[axis], stride, padding[axis] - self.outside[axis], self.block) for axis in (0, 1)
        )
        blocks = torch.einsum(
            "ocij,ati,buj->abcotu", conv.weight.detach(), rows.to(conv.weight), columns.to(conv.weight)
        )
        self.register_buffer("blocks", blocks.flatten(0, 2).contiguous())  # (b b C, O, T, T)

    @staticmethod
    def suits(conv: nn.Module) -> bool:
        return (
            type(conv) is nn.Conv2d
            # With more channels than that, the registers are full as it is.
            and (conv.in_channels <= IMAGE or (conv.in_channels <= lanes() and _is_whole(conv)))
            and conv.weight.device.type == "cpu"
            and conv.padding_mode == "zeros"
            and not isinstance(conv.padding, str)
            and conv.stride[0] == conv.stride[1]
            and (conv.groups, conv.dilation) == (1, (1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        return _Convolve.apply(x, self)

    def input_gradient(self, g: Tensor, size: tuple[int, int]) -> Tensor:
        """(N, C, *size) from the gradient (N, O, h, w) at the output."""
        step, before = self.block // self.stride[0], (-self.top, -self.left)
        counts = [-(-(n + outside) // self.block) for n, outside in zip(size, self.outside, strict=True)]
        after = [
            (counts[axis] - 1) * step + self.blocks.shape[2 + axis] - before[axis] - g.shape[2 + axis]
            for axis in (0, 1)
        ]
        if all(0 <= b and a <= b for a, b in zip(after, before, strict=True)):
            blocks = F.conv2d(g, self.blocks, stride=step, padding=before)
        else:
            # A negative pad cuts off what no pixel of the image has a part in.
            g = F.pad(g, (before[1], after[1], before[0], after[0]))
            blocks = F.conv2d(g, self.blocks, stride=step)
        # From (N, b b C, h, w), whose memory has the channels last, to pixels; F.pixel_shuffle takes far longer.
        n, _, h, w = blocks.shape
        apart = blocks.permute(0, 2, 3, 1).reshape(n, h, w, self.block, self.block, self.channels)
        pixels = apart.transpose(2, 3).reshape(n, h * self.block, w * self.block, self.channels)
        (top, left), (height, width) = self.outside, size
        return pixels.permute(0, 3, 1, 2)[:, :, top : top + height, left : left + width]


def _is_whole(conv: nn.Conv2d) -> bool:
    """Whether a block's pixels have equally many taps, more than one pixel to a block."""
    return conv.stride[0] > 1 and all(kernel % conv.stride[0] == 0 for kernel in conv.kernel_size)


class _Convolve(torch.autograd.Function):
    by_rows = True  # see attacks/backward.py

    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: ThinConv2d) -> Tensor:
        ctx.conv, ctx.size = conv, x.shape[2:]
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.conv.input_gradient(g, ctx.size), None


def _taps(kernel: int, stride: int, padding: int, block: int) -> tuple[Tensor, int]:
    """(block, T, kernel) of 0 and 1: which value of the kernel links each pixel of a block with each output; and the
    first of those outputs, relative to the block's.
    """
    linked = [
        (r, (r + padding - j) // stride, j)
        for r in range(block)
        for j in range(kernel)
        if (r + padding - j) % stride == 0
    ]
    first = min(t for _, t, _ in linked)
    links = torch.zeros(block, max(t for _, t, _ in linked) - first + 1, kernel)
    for r, t, j in linked:
        links[r, t - first, j] = 1
    return links, first
