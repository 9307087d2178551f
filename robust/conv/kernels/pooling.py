"""Maximum pooling: forward it keeps which tap won, so that the gradient is gathered, without atomics."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust.conv.algorithm import empty
from robust.conv.geometry import Geometry, Pair
from robust.conv.kernels.launch import launch, window_of
from robust.conv.kernels.parts import PLAIN
from robust.conv.kernels.tiles import POOLING, ceil_div, clipped

MOST_TAPS = 255  # a tap's number is 8 bits, and one number means none


def max_pool(x: Tensor, geometry: Geometry, output: Pair) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) to the largest value of every window and, in uint8, the first tap that has it: (N, C, *output) both.

    Taps are numbered by rows, and may be MOST_TAPS; a NaN is larger than all numbers. A window without a tap on the
    image has -inf. `output` is of the geometry, or by ceil_mode one more along an axis.
    """
    shape = (*x.shape[:2], *output)
    y = empty(shape, x)
    taps = torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)
    if y.numel():
        x = x.contiguous(memory_format=torch.channels_last)
        _launch(_max_pool, x, y, geometry, math.prod(output), x_ptr=x, y_ptr=y, taps_ptr=taps)
    return y, taps


def max_pool_grad(g: Tensor, taps: Tensor, geometry: Geometry, size: Pair) -> Tensor:
    """The gradient (N, C, *size) at the input, from that at the output (N, C, P, Q) and the taps that won."""
    dx = empty((*g.shape[:2], *size), g)
    if dx.numel():
        g = g.contiguous(memory_format=torch.channels_last)
        _launch(_max_pool_grad, dx, g, geometry, math.prod(size), x_ptr=g, y_ptr=dx, taps_ptr=taps)
    return dx


def _launch(kernel: object, x: Tensor, y: Tensor, geometry: Geometry, pixels: int, **pointers: Tensor) -> None:
    """Over so many pixels an image, of x or of y."""
    rows, channels = len(x) * pixels, x.shape[1]
    start = (-geometry.padding[0], -geometry.padding[1])
    arguments = window_of(x, y, geometry.stride, start, geometry.dilation)
    arguments |= {"M": rows, "R": geometry.kernel[0], "S": geometry.kernel[1]}
    tile = clipped(POOLING, channels, 1)
    launch(kernel, (ceil_div(rows, tile.m), ceil_div(channels, tile.n)), tile, **pointers, **arguments)


# For windows m = (n, p, q) and channels c in parallel, BLOCK_M x BLOCK_N a program:
#
#   for r, s on the image:
#       if it is the first, or x[n, h, w, c] > y[m, c]:             h, w as in `gemm`
#           y[m, c], taps[m, c] = x[n, h, w, c], r·S + s


@triton.jit(do_not_specialize=PLAIN)
def _max_pool(
    x_ptr,  # (N, H, W, C)
    y_ptr,  # (N, P, Q, C)
    taps_ptr,  # (N, P, Q, C) uint8
    M,  # N·P·Q
    H,
    W,
    P,
    Q,
    R,
    S,
    x_w,  # C, in units of C_UNIT
    stride_h,
    stride_w,
    start_h,
    start_w,
    dilation_h,
    dilation_w,
    C_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    C = x_w * C_UNIT
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n, p, q = m // (P * Q), m // Q % P, m % Q
    exist = (m < M)[:, None] & (c < C)[None, :]

    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), dtype=tl.float32)
    taps = tl.full((BLOCK_M, BLOCK_N), 255, dtype=tl.int32)
    for tap in range(R * S):
        h = p * stride_h + start_h + tap // S * dilation_h
        w = q * stride_w + start_w + tap % S * dilation_w
        inside = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & exist
        pixel = (n.to(tl.int64) * H + h) * W + w
        x = tl.load(x_ptr + pixel[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        wins = inside & ((taps == 255) | (x > best) | ((x != x) & (best == best)))
        best = tl.where(wins, x, best)
        taps = tl.where(wins, tap, taps)

    offsets = m.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(y_ptr + offsets, best.to(y_ptr.dtype.element_ty), mask=exist)
    tl.store(taps_ptr + offsets, taps.to(tl.uint8), mask=exist)


# For pixels m = (n, h, w) and channels c in parallel, BLOCK_M x BLOCK_N a program:
#
#   for r, s and the window p, q that has the pixel as that tap:
#       if taps[n, p, q, c] is r·S + s:
#           dx[m, c] += g[n, p, q, c]


@triton.jit(do_not_specialize=PLAIN)
def _max_pool_grad(
    x_ptr,  # (N, P, Q, C): g
    taps_ptr,  # (N, P, Q, C) uint8
    y_ptr,  # (N, H, W, C): dx
    M,  # N·H·W
    H,
    W,
    P,
    Q,
    R,
    S,
    x_w,  # C, in units of C_UNIT
    stride_h,
    stride_w,
    start_h,
    start_w,
    dilation_h,
    dilation_w,
    C_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    C = x_w * C_UNIT
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n, h, w = m // (H * W), m // W % H, m % W
    exist = (m < M)[:, None] & (c < C)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tap in range(R * S):
        rows = h - start_h - tap // S * dilation_h  # p·stride, where a window has the pixel as this tap
        columns = w - start_w - tap % S * dilation_w
        p, q = rows // stride_h, columns // stride_w
        met = (rows >= 0) & (rows % stride_h == 0) & (p < P) & (columns >= 0) & (columns % stride_w == 0) & (q < Q)
        offsets = ((n.to(tl.int64) * P + p) * Q + q)[:, None] * C + c[None, :]
        won = tl.load(taps_ptr + offsets, mask=met[:, None] & exist, other=255).to(tl.int32) == tap
        acc += tl.load(x_ptr + offsets, mask=won, other=0.0).to(tl.float32)

    tl.store(y_ptr + m.to(tl.int64)[:, None] * C + c[None, :], acc.to(y_ptr.dtype.element_ty), mask=exist)
