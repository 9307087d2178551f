"""The convolution itself: a window that slides over the image, as plain loops in float64. The specification.

A layer has K filters. A filter is a stack of kernels, one for each channel that it reads; each kernel slides over its
own channel, what they give is summed over the channels, and the filter's one bias is added. (What is called a
convolution here is a correlation: no kernel is flipped.)

Both gradients follow from the same loops: wherever the convolution multiplied a pixel by a weight and added the product
to an output, the gradient at that output, times the one factor, is handed back to the other.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from robust.conv.algorithm import Epilogue, masked, stored
from robust.conv.geometry import Geometry, Pair

Maps = list[list[list[float]]]  # an image's channels, or an output's: [channel][row][column]
Filters = list[list[list[list[float]]]]  # [filter][channel that it reads][kernel row][kernel column]


def convolve(x: Maps, filters: Filters, biases: list[float], geometry: Geometry) -> Maps:
    """One image (C, H, W) through K filters: (K, P, Q).

    >>> image = [[[1.0, 2.0, 0.0], [0.0, 1.0, 3.0], [2.0, 1.0, 1.0]]]
    >>> convolve(image, [[[[1.0, 0.0], [0.0, -1.0]]]], [0.5], Geometry((2, 2)))
    [[[0.5, -0.5], [-0.5, 0.5]]]
    """
    y = _filled(biases, geometry.output_size(_size(x)))
    for k, kernels in enumerate(filters):
        first = _first_channel(k, filters, geometry)
        for c, kernel in enumerate(kernels):
            for p, q, r, s, h, w in window(geometry, _size(x)):
                y[k][p][q] += kernel[r][s] * x[first + c][h][w]
    return y


def image_gradient(g: Maps, filters: Filters, geometry: Geometry, size: Pair) -> Maps:
    """The gradient at the image, (C, *size), from `g`, (K, P, Q), that at the output."""
    x_grad = _filled([0.0] * (len(filters[0]) * geometry.groups), size)
    for k, kernels in enumerate(filters):
        first = _first_channel(k, filters, geometry)
        for c, kernel in enumerate(kernels):
            for p, q, r, s, h, w in window(geometry, size):
                x_grad[first + c][h][w] += kernel[r][s] * g[k][p][q]
    return x_grad


def filters_gradient(x: Maps, g: Maps, geometry: Geometry) -> Filters:
    """The gradient at the filters, (K, C / groups, R, S), from `g`, (K, P, Q), that at the output."""
    grads = [_filled([0.0] * (len(x) // geometry.groups), geometry.kernel) for _ in g]
    for k, kernels in enumerate(grads):
        first = _first_channel(k, grads, geometry)
        for c, kernel in enumerate(kernels):
            for p, q, r, s, h, w in window(geometry, _size(x)):
                kernel[r][s] += x[first + c][h][w] * g[k][p][q]
    return grads


def window(geometry: Geometry, size: Pair) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Every (p, q, r, s, h, w): output (p, q) sees pixel (h, w) through tap (r, s). What it sees of padding is 0."""
    (P, Q), (R, S) = geometry.output_size(size), geometry.kernel
    for p in range(P):
        for q in range(Q):
            for r in range(R):
                for s in range(S):
                    h = p * geometry.stride[0] - geometry.padding[0] + r * geometry.dilation[0]
                    w = q * geometry.stride[1] - geometry.padding[1] + s * geometry.dilation[1]
                    if 0 <= h < size[0] and 0 <= w < size[1]:
                        yield p, q, r, s, h, w


def _first_channel(k: int, filters: Filters, geometry: Geometry) -> int:
    """Of those that filter k reads: the filters come in as many groups as the channels."""
    group = k // (len(filters) // geometry.groups)
    return group * len(filters[0])


def _size(maps: Maps) -> Pair:
    return len(maps[0]), len(maps[0][0])


def _filled(values: list[float], size: Pair) -> Maps:
    """A map of this size for each value, full of it."""
    return [[[value] * size[1] for _ in range(size[0])] for value in values]


# As an Algorithm


def misfit(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> str | None:
    return None


def pack(weight: Tensor, geometry: Geometry) -> list[Tensor]:
    return [weight]


pack_input_grad = pack


def forward(x: Tensor, packed: list[Tensor], geometry: Geometry, epilogue: Epilogue) -> Tensor:
    filters: Filters = packed[0].double().tolist()
    images = [convolve(image, filters, [0.0] * len(filters), geometry) for image in x.double().tolist()]
    y = _tensor(images, (len(x), len(filters), *geometry.output_size((x.shape[2], x.shape[3]))), x)
    return stored(epilogue.apply_(y), x)


def input_grad(g: Tensor, packed: list[Tensor], geometry: Geometry, size: Pair, mask: Tensor | None = None) -> Tensor:
    filters: Filters = packed[0].double().tolist()
    g = masked(g, mask)
    grads = [image_gradient(maps, filters, geometry, size) for maps in g.double().tolist()]
    return stored(_tensor(grads, (len(g), len(filters[0]) * geometry.groups, *size), g), g)


def weight_grad(x: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
    pairs = zip(x.double().tolist(), g.double().tolist(), strict=True)
    grads = [filters_gradient(image, maps, geometry) for image, maps in pairs]
    shape = (g.shape[1], x.shape[1] // geometry.groups, *geometry.kernel)
    return stored(_tensor(grads, (len(x), *shape), x).sum(0), x)


def _tensor(lists: list, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """In float64; of no images, an empty list says no more than that."""
    return torch.tensor(lists, dtype=torch.float64, device=like.device).reshape(shape)
