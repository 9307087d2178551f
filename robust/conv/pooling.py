"""Pooling by shifted slices: what tap (r, s) of every window sees is one strided slice of the image."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from robust.conv.geometry import Geometry, Pair

Ints = int | Sequence[int]  # one number for both axes, or (rows, columns)
Slices = tuple[slice, slice]  # rows, columns


def max_pool2d(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """As torch.nn.functional.max_pool2d: (N, C, H, W) or (C, H, W) to the largest value of every window.

    The gradient goes to the first of equal values. A window with NaN has the maximum NaN, whose gradient goes to the
    window's first pixel. A dilated window none of whose taps is on the image has -inf, and no gradient. ValueError
    where the arguments do not fit the image.
    """
    geometry = _geometry(kernel_size, stride, padding, dilation)
    output = _output_size(x, geometry, ceil_mode)
    if _suits_gpu(x, geometry):
        return _MaxPoolOnGpu.apply(x, geometry, output)
    return _MaxPool.apply(x, geometry, output)


def avg_pool2d(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """As torch.nn.functional.avg_pool2d: (N, C, H, W) or (C, H, W) to the mean of every window.

    Half precision is summed in float32. ValueError where the arguments do not fit the image.
    """
    if divisor_override == 0:
        raise ValueError("divisor_override is 0")
    geometry = _geometry(kernel_size, stride, padding, 1)
    output = _output_size(x, geometry, ceil_mode)
    divisor = divisor_override or _pixels(x, geometry, output, count_include_pad)
    return _AvgPool.apply(x, geometry, output, divisor)


def adaptive_avg_pool2d(x: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """As torch.nn.functional.adaptive_avg_pool2d: (N, C, H, W) or (C, H, W) to the means of `output_size` windows.

    Of P windows along an axis of n pixels, the i-th is from floor(i n / P) up to, but without, ceil((i + 1) n / P).
    None keeps an axis as it is. Half precision is summed in float32. ValueError for a size below 0, or no pixels.
    """
    _require_image(x)
    wanted = tuple(output_size) if isinstance(output_size, Sequence) else (output_size, output_size)
    if len(wanted) != 2 or any(size is not None and size < 0 for size in wanted):
        raise ValueError(f"output_size must be one or two numbers from 0 on, or None, not {output_size!r}")
    height, width = x.shape[-2:]
    rows, columns = (n if size is None else size for n, size in zip((height, width), wanted, strict=True))
    if (rows, columns) == (1, 1):
        return x.mean((-2, -1), keepdim=True)
    if rows and columns and height % rows == 0 and width % columns == 0:
        return avg_pool2d(x, (height // rows, width // columns))
    means = _means(_means(x.to(wide(x)), -2, rows), -1, columns)
    return means.to(x.dtype, memory_format=_memory_format(x))


class _MaxPool(torch.autograd.Function):
    """Which tap was the largest is found again on the way back: to remember it would cost more than all the rest.

    So are the largest values, which an activation in place may have written over.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: Geometry, output: Pair) -> Tensor:
        ctx.save_for_backward(x)
        ctx.geometry, ctx.output = geometry, output
        return _largest(x, geometry, output).detach()  # see _AvgPool

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        y = _largest(x, ctx.geometry, ctx.output)
        grad = _filled_like(x, _size(x), 0, wide(x))  # (N, C, H, W)
        # By their bits, for torch.where is ten times slower on a CPU, and 0 · inf is NaN.
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[g.element_size()]
        left = g.clone().view(bits)  # what no pixel has got yet
        for windows, pixels in _taps(ctx.geometry, _size(x), _size(y)):
            largest = (x[..., *pixels] < y[..., *windows]).to(bits).sub_(1)  # all ones, or all zeros
            share = largest.bitwise_and_(left[..., *windows])
            left[..., *windows] ^= share
            grad[..., *pixels] += share.view(g.dtype)
        return grad.to(x.dtype), None, None


def _largest(x: Tensor, geometry: Geometry, output: Pair) -> Tensor:
    """(N, C, P, Q), the maximum of every window."""
    y = _filled_like(x, output, -torch.inf)
    for windows, pixels in _taps(geometry, _size(x), output):
        largest = y[..., *windows]
        largest.copy_(torch.maximum(largest, x[..., *pixels]))
    return y


class _MaxPoolOnGpu(torch.autograd.Function):
    """The same in one pass each way: which tap was the largest is kept, in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: Geometry, output: Pair) -> Tensor:
        from robust.conv.kernels.pooling import max_pool

        y, taps = max_pool(x, geometry, output)
        ctx.save_for_backward(taps)
        ctx.geometry, ctx.size = geometry, _size(x)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        from robust.conv.kernels.pooling import max_pool_grad

        (taps,) = ctx.saved_tensors
        return max_pool_grad(g, taps, ctx.geometry, ctx.size), None, None


def _suits_gpu(x: Tensor, geometry: Geometry) -> bool:
    if not x.is_cuda or x.dim() != 4 or find_spec("triton") is None:
        return False
    from robust.conv.kernels import misfit
    from robust.conv.kernels.pooling import MOST_TAPS

    return geometry.kernel[0] * geometry.kernel[1] <= MOST_TAPS and misfit(geometry, x.dtype, x.device) is None


class _AvgPool(torch.autograd.Function):
    """`divisor` is a number, or (P, Q)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: Geometry, output: Pair, divisor: Tensor | int) -> Tensor:
        ctx.geometry, ctx.size, ctx.divisor = geometry, _size(x), divisor
        y = _filled_like(x, output, 0, wide(x))  # (N, C, P, Q)
        for windows, pixels in _taps(geometry, _size(x), output):
            y[..., *windows] += x[..., *pixels]
        # A result that was written in place has no gradient in networks that torch 2.11 compiles, unless detached.
        return y.div_(divisor).to(x.dtype).detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        grad = _filled_like(g, ctx.size, 0, wide(g))  # (N, C, H, W)
        shares = g / ctx.divisor
        for windows, pixels in _taps(ctx.geometry, ctx.size, _size(g)):
            grad[..., *pixels] += shares[..., *windows]
        return grad.to(g.dtype), None, None, None


def _taps(geometry: Geometry, size: Pair, output: Pair) -> Iterator[tuple[Slices, Slices]]:
    """For every tap in order: the windows in which it lies on an image of `size`, and the pixels it sees from there."""
    rows, columns = (
        [_along(r * dilation - padding, n, stride, windows) for r in range(kernel)]
        for n, windows, kernel, stride, padding, dilation in zip(
            size, output, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True
        )
    )
    for row in rows:
        for column in columns:
            if row and column:
                yield (row[0], column[0]), (row[1], column[1])


def _along(offset: int, size: int, stride: int, windows: int) -> Slices | None:
    """Along one axis, the windows i with 0 <= i·stride + offset < size, and these pixels; None if there are none."""
    first, last = max(0, -(offset // stride)), min(windows - 1, (size - 1 - offset) // stride)
    if first > last:
        return None
    return slice(first, last + 1), slice(first * stride + offset, last * stride + offset + 1, stride)


def _pixels(x: Tensor, geometry: Geometry, output: Pair, count_padding: bool) -> Tensor | int:
    """How many pixels each window has, (P, Q) or one number for all; beyond the padding there are none."""
    by_axis = zip(x.shape[-2:], output, geometry.kernel, geometry.stride, geometry.padding, strict=True)
    counts: list[Tensor | int] = []
    for n, windows, kernel, stride, padding in by_axis:
        low, high = (-padding, n + padding) if count_padding else (0, n)
        if low == -padding and (windows - 1) * stride - padding + kernel <= high:
            counts.append(kernel)
        else:
            start = torch.arange(windows, device=x.device) * stride - padding
            counts.append((start + kernel).clamp(max=high) - start.clamp(min=low))
    rows, columns = counts
    return (rows[:, None] if isinstance(rows, Tensor) else rows) * columns


def _means(x: Tensor, axis: int, windows: int) -> Tensor:
    """Along one axis, the means of `windows` parts; see `adaptive_avg_pool2d`."""
    n = x.shape[axis]
    ends = [(i * n // windows, -(-(i + 1) * n // windows)) for i in range(windows)]
    means = [x.narrow(axis, start, stop - start).mean(axis, keepdim=True) for start, stop in ends]
    return torch.cat(means, axis) if means else x.narrow(axis, 0, 0)


def _filled_like(x: Tensor, size: Pair, value: float, dtype: torch.dtype | None = None) -> Tensor:
    """(..., *size) in x's memory format."""
    shape = (*x.shape[:-2], *size)
    empty = torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=_memory_format(x))
    return empty.fill_(value)


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.dim() == 4 and x.stride(1) == 1 and x.shape[1] > 1
    return torch.channels_last if channels_last else torch.contiguous_format


def _size(x: Tensor) -> Pair:
    return x.shape[-2], x.shape[-1]


def wide(x: Tensor) -> torch.dtype:
    """What to sum in."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _geometry(kernel_size: Ints, stride: Ints | None, padding: Ints, dilation: Ints) -> Geometry:
    kernel = pair("kernel_size", kernel_size, 1)
    geometry = Geometry(
        kernel=kernel,
        stride=kernel if stride is None else pair("stride", stride, 1),
        padding=pair("padding", padding, 0),
        dilation=pair("dilation", dilation, 1),
    )
    if any(2 * padding > kernel for padding, kernel in zip(geometry.padding, geometry.kernel, strict=True)):
        raise ValueError(f"padding {geometry.padding} must be at most half of kernel_size {geometry.kernel}")
    return geometry


def pair(name: str, value: Ints, least: int) -> Pair:
    """(rows, columns) from one number or two, each at least `least`; else ValueError."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    rows, columns = values if len(values) == 2 else values * 2 if len(values) == 1 else (None, None)
    if not isinstance(rows, int) or not isinstance(columns, int) or min(rows, columns) < least:
        raise ValueError(f"{name} must be one or two whole numbers from {least} on, not {value!r}")
    return rows, columns


def _output_size(x: Tensor, geometry: Geometry, ceil_mode: bool) -> Pair:
    """In `ceil_mode`, windows that reach beyond the padded image count too if they begin before its right padding."""
    _require_image(x)
    size = _size(x)
    rows, columns = geometry.output_size(size)
    if ceil_mode:
        rows, columns = (
            windows + int((n + 2 * padding - extent) % stride > 0 and windows * stride < n + padding)
            for windows, n, padding, extent, stride in zip(
                (rows, columns), size, geometry.padding, geometry.extent, geometry.stride, strict=True
            )
        )
    if rows < 1 or columns < 1:
        raise ValueError(
            f"kernel_size {geometry.kernel}, which spans {geometry.extent} pixels, does not fit into x of shape "
            f"{tuple(x.shape)} with padding {geometry.padding}: the output would be {(rows, columns)}"
        )
    return rows, columns


def _require_image(x: Tensor) -> None:
    if x.dim() not in (3, 4) or 0 in x.shape[-3:]:
        raise ValueError(f"x must be (N, C, H, W) or (C, H, W) with C, H, W of at least 1, not {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must have a floating-point dtype, not {x.dtype}")
