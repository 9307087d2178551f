"""Convolution as a matrix product: every window is written out as a row, and meets all kernels at once.

A window is R·S·C / groups values, a kernel as many; for a 1 x 1 convolution the image is its own matrix. The input
gradient is the same thing on the output's gradient, a phase of the stride at a time (`Geometry.phases`). Two special
cases have no use for it: where each channel has its own kernel (depthwise) the taps are summed one by one, and at few
input channels, such as a picture's, the gradient is cheaper scattered from the outputs than gathered.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from robust.conv.algorithm import BARE, Epilogue, masked
from robust.conv.geometry import Axes, Geometry, Pair
from robust.conv.product import pieces, product

WINDOW_VALUES = 2**20  # written out at once: a few MB, for the product to find in cache
TAP_VALUES = 2**18  # of the output, summed tap by tap at once
FEW_CHANNELS = 4  # times as many output channels as input channels, and the gradient is scattered


def misfit(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> str | None:
    return None


def pack(weight: Tensor, geometry: Geometry) -> list[Tensor]:
    return [_packed(weight, geometry.groups)]


def forward(x: Tensor, packed: list[Tensor], geometry: Geometry, epilogue: Epilogue) -> Tensor:
    if epilogue.residual is not None:
        epilogue = replace(epilogue, residual=pixels_first(epilogue.residual))
    axes = geometry.whole((x.shape[2], x.shape[3]))
    return _correlate(pixels_first(x), packed[0], axes, geometry.stride, epilogue).permute(0, 3, 1, 2)


def pack_input_grad(weight: Tensor, geometry: Geometry) -> list[Tensor]:
    """By phase, the taps that it has; where the gradient is scattered, one (R·S·C, K)."""
    if geometry.groups == 1 and geometry.kernel != (1, 1) and FEW_CHANNELS * weight.shape[1] <= weight.shape[0]:
        return [weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous()]
    turned = weight.unflatten(0, (geometry.groups, -1)).transpose(1, 2).flatten(0, 1)  # (C, K / groups, R, S)
    return [
        _packed(turned[:, :, list(rows.taps)][:, :, :, list(columns.taps)], geometry.groups)
        for rows, columns in geometry.phases(geometry.stride)
    ]


def input_grad(g: Tensor, packed: list[Tensor], geometry: Geometry, size: Pair, mask: Tensor | None = None) -> Tensor:
    g = pixels_first(g)
    mask = None if mask is None else pixels_first(mask)
    if geometry.groups == 1 and packed[0].ndim == 2:
        return _scatter(masked(g, mask), packed[0], geometry, size)
    if geometry.stride == (1, 1):
        (axes,) = geometry.phases(size)
        return _correlate(g, packed[0], axes, mask=mask).permute(0, 3, 1, 2)
    g = masked(g, mask)
    channels = packed[0].shape[1] if packed[0].ndim == 2 else packed[0].shape[0] * packed[0].shape[2]
    dx = g.new_zeros(len(g), *size, channels)
    for rows, columns in geometry.phases(size):
        if rows.taps and columns.taps:
            matrix = packed[rows.offset * geometry.stride[1] + columns.offset]
            pixels = dx[:, rows.offset :: geometry.stride[0], columns.offset :: geometry.stride[1]]
            pixels.copy_(_correlate(g, matrix, (rows, columns)))
    return dx.permute(0, 3, 1, 2)


def weight_grad(x: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
    x, g = pixels_first(x), pixels_first(g)
    groups, k, c = geometry.groups, g.shape[3], x.shape[3]
    rows, columns = geometry.whole((x.shape[1], x.shape[2]))
    window = c * len(rows.taps) * len(columns.taps)
    # Summed over blocks, so in float32 at least.
    total = x.new_zeros(groups, k // groups, window // groups, dtype=torch.promote_types(x.dtype, torch.float32))
    for images, lines in _blocks(len(x), rows.count, columns.count * window):
        seen = _windows(x[images], (rows.part(lines, geometry.stride[0]), columns), geometry.stride, groups)
        theirs = g[images, lines].reshape(-1, groups, k // groups).permute(1, 2, 0)  # (groups, K / groups, M)
        if 1 < groups and k // groups <= columns.count and theirs.dtype == total.dtype:
            # Of a group's few kernels by line: one sum over all pixels would be off by several times torch's error.
            theirs = theirs.unflatten(2, (-1, columns.count)).transpose(1, 2)
            total += (theirs @ seen.unflatten(1, (-1, columns.count))).sum(1)
        else:
            total += torch.bmm(theirs, seen)
    return total.to(x.dtype).view(k, *geometry.kernel, c // groups).permute(0, 3, 1, 2)


def pixels_first(x: Tensor) -> Tensor:
    """(N, H, W, C), contiguous, from (N, C, H, W)."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _packed(weight: Tensor, groups: int) -> Tensor:
    """(groups, pieces, K / groups, length) of R·S·C / groups columns, see `pieces`; depthwise, (R·S, K)."""
    k = weight.shape[0]
    if groups > 1 and weight.shape[1] == 1:
        return weight.flatten(1).t().contiguous()
    matrix = weight.permute(0, 2, 3, 1).reshape(groups, k // groups, -1).contiguous()
    return pieces(matrix[0]).unsqueeze(0) if groups == 1 else matrix.unsqueeze(1)


def _correlate(
    x: Tensor,
    matrix: Tensor,
    axes: Axes,
    stride: Pair = (1, 1),
    epilogue: Epilogue = BARE,
    mask: Tensor | None = None,
) -> Tensor:
    """(N, P, Q, K) from (N, H, W, C), P and Q being the counts of the axes, and a packed matrix."""
    if matrix.ndim == 2:
        return _tap_by_tap(masked(x, mask), matrix, axes, stride, epilogue)
    rows, columns = axes
    groups, _, k, _ = matrix.shape
    window = len(rows.taps) * len(columns.taps) * x.shape[3] // groups
    y = x.new_empty(len(x), rows.count, columns.count, groups * k)
    values = columns.count * groups * window
    if window * groups == x.shape[3]:  # 1 x 1: nothing is written out
        values = 0
    for images, lines in _blocks(len(x), rows.count, values):
        block = y[images, lines].flatten(0, 2)  # (M, K)
        part = epilogue
        if epilogue.residual is not None:
            part = replace(epilogue, residual=epilogue.residual[images, lines].flatten(0, 2))
        seen = masked(x[images], None if mask is None else mask[images])
        seen = _windows(seen, (rows.part(lines, stride[0]), columns), stride, groups)  # (groups, M, R·S·C / groups)
        if groups == 1:
            sums = product(seen[0], matrix[0], part)
            if len(sums) == y.shape[:3].numel():
                return sums.view(y.shape)
            block.copy_(sums)
        else:
            block.unflatten(1, (groups, k)).copy_(torch.bmm(seen, matrix[:, 0].transpose(1, 2)).transpose(0, 1))
            part.apply_(block, axis=-1)
    return y


def _blocks(images: int, lines: int, values: int) -> Iterator[tuple[slice, slice]]:
    """Images and lines of the output that fit into WINDOW_VALUES, at `values` a line; all of both, where 0."""
    if lines * values <= WINDOW_VALUES:
        step = max(1, WINDOW_VALUES // max(1, lines * values)) if values else max(1, images)
        for first in range(0, images, step):
            yield slice(first, min(images, first + step)), slice(0, lines)
    else:
        step = max(1, WINDOW_VALUES // values)
        for image in range(images):
            for first in range(0, lines, step):
                yield slice(image, image + 1), slice(first, min(lines, first + step))


def _windows(x: Tensor, axes: Axes, stride: Pair, groups: int) -> Tensor:
    """(groups, N·P·Q, R·S·C / groups) from (N, H, W, C); a view where no value is in two windows."""
    windows = _view(x, axes, stride)  # (N, P, Q, R, S, C)
    n, p, q, r, s, c = windows.shape
    if groups == 1:
        return windows.reshape(1, n * p * q, r * s * c)
    apart = windows.view(n, p, q, r, s, groups, c // groups).permute(5, 0, 1, 2, 3, 4, 6)
    return apart.reshape(groups, n * p * q, r * s * c // groups)


def _view(x: Tensor, axes: Axes, stride: Pair) -> Tensor:
    """(N, P, Q, R, S, C), without a copy but for padding, from (N, H, W, C)."""
    (rows, columns), (n, h, w, c) = axes, x.shape
    edges = (*columns.edges(w, stride[1]), *rows.edges(h, stride[0]))
    if any(edges):
        x = F.pad(x, (0, 0, *edges))
    line, pixel = x.stride(1), x.stride(2)
    return x.as_strided(
        (n, rows.count, columns.count, len(rows.taps), len(columns.taps), c),
        (x.stride(0), stride[0] * line, stride[1] * pixel, rows.dilation * line, columns.dilation * pixel, 1),
    )


def _tap_by_tap(x: Tensor, taps: Tensor, axes: Axes, stride: Pair, epilogue: Epilogue) -> Tensor:
    """(N, P, Q, K): channel k is the window of channel k·C // K times taps (R·S, K)."""
    (rows, columns), (n, _, _, c), k = axes, x.shape, taps.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty(n, rows.count, columns.count, k, dtype=wide)
    taps = taps.to(wide).view(len(rows.taps), len(columns.taps), k)
    few = max(1, TAP_VALUES // (columns.count * k))
    for image in range(n):
        seen = x[image : image + 1].to(wide)
        windows = _view(seen.repeat_interleave(k // c, dim=3) if k > c else seen, axes, stride)[0]  # (P, Q, R, S, K)
        for first in range(0, rows.count, few):
            lines = slice(first, first + few)
            sums = y[image, lines]
            torch.mul(windows[lines, :, 0, 0], taps[0, 0], out=sums)
            for tap in range(1, taps[..., 0].numel()):
                r, s = divmod(tap, len(columns.taps))
                sums.addcmul_(windows[lines, :, r, s], taps[r, s])
    return epilogue.apply_(y, axis=-1).to(x.dtype)


def _scatter(g: Tensor, matrix: Tensor, geometry: Geometry, size: Pair) -> Tensor:
    """The input gradient (N, C, *size): each output hands back to its window what it got from there."""
    (r, s), (down, across) = geometry.kernel, geometry.stride
    n, p, q = g.shape[:3]
    c = len(matrix) // (r * s)
    # As far as the windows reach on all sides.
    tall, wide = (
        max(count + 2 * padding, (outputs - 1) * stride + extent)
        for count, padding, outputs, stride, extent in zip(
            size, geometry.padding, (p, q), geometry.stride, geometry.extent, strict=True
        )
    )
    top, left = geometry.padding
    dx = g.new_empty(n, *size, c)
    for images, _ in _blocks(n, 1, p * q * len(matrix)):
        theirs = g[images]
        shares = product(matrix, theirs.flatten(0, 2).unsqueeze(0)).view(r, s, c, len(theirs), p, q)
        sums = g.new_zeros(c, len(theirs), tall, wide, dtype=torch.promote_types(g.dtype, torch.float32))
        for i in range(r):
            for j in range(s):
                lines, pixels = i * geometry.dilation[0], j * geometry.dilation[1]
                seen = sums[
                    :, :, lines : lines + (p - 1) * down + 1 : down, pixels : pixels + (q - 1) * across + 1 : across
                ]
                seen += shares[i, j]
        dx[images] = sums[:, :, top : top + size[0], left : left + size[1]].permute(1, 2, 3, 0)
    return dx.permute(0, 3, 1, 2)
