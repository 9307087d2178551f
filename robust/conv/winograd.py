"""Winograd's convolution for 3 x 3 windows: fewer products, paid for with sums (arXiv 1509.09308).

Two polynomials are multiplied by evaluating both at enough points, multiplying there, and reading the product's
coefficients off the values. So for a tile of m x m outputs: Y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ d B)] A, (m + 2)² products a channel
instead of 9 m², and the products of all channels and tiles are (m + 2)² matrix products. What it costs is accuracy,
for small and large values meet in the sums; it depends on the points (arXiv 2201.10369).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from robust.conv.algorithm import BARE, Epilogue, masked
from robust.conv.geometry import Geometry, Pair
from robust.conv.im2col import pixels_first
from robust.conv.product import pieces, product

TILE_VALUES = 2**21  # transformed at once
R = 3


@dataclass(frozen=True)
class Winograd:
    """F(m x m, 3 x 3), by the values at m + 1 points and at infinity."""

    m: int  # outputs of a tile, along an axis
    points: tuple[Fraction, ...]

    @property
    def n(self) -> int:
        """Inputs of a tile along an axis."""
        return self.m + R - 1

    def transforms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Aᵀ (m, n), G (n, 3), Bᵀ (n, n), in float64: Toom and Cook's, transposed.

        Row i of G evaluates the kernel at point i, over the scale Π (p_i - p_j) that Lagrange's interpolation divides
        by; row i of Bᵀ holds the coefficients of Π (x - p_j); Aᵀ holds the powers of the points. The last is infinity.
        """
        finite, infinite = range(len(self.points)), [Fraction(0)] * (self.n - 1) + [Fraction(1)]
        scales = [_product(p - q for q in self.points if q != p) for p in self.points]
        a = [[p**i for p in self.points] + [Fraction(i == self.m - 1)] for i in range(self.m)]
        g = [[p**j / scale for j in range(R)] for p, scale in zip(self.points, scales, strict=True)]
        b = [[*_coefficients([self.points[j] for j in finite if j != i]), Fraction(0)] for i in finite]
        return _tensor(a), _tensor([*g, infinite[-R:]]), _tensor([*b, _coefficients(self.points)])

    @cached_property
    def tiles_to_values(self) -> Tensor:
        """Bᵀ ⊗ Bᵀ, (n², n²): both axes of a tile in one product."""
        _, _, b = self.transforms()
        return torch.kron(b, b)

    @cached_property
    def kernels_to_values(self) -> Tensor:
        """G ⊗ G, (n², 9)."""
        _, g, _ = self.transforms()
        return torch.kron(g, g)

    @cached_property
    def values_to_outputs(self) -> Tensor:
        """Aᵀ ⊗ Aᵀ, (m², n²)."""
        a, _, _ = self.transforms()
        return torch.kron(a, a)

    def misfit(self, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> str | None:
        if (geometry.kernel, geometry.stride, geometry.dilation, geometry.groups) != ((R, R), (1, 1), (1, 1), 1):
            return "computes 3 x 3 windows with stride 1, dilation 1 and one group only"
        if dtype not in (torch.float32, torch.float64):
            return f"loses too much accuracy in {dtype}"
        return None

    def pack(self, weight: Tensor, geometry: Geometry) -> list[Tensor]:
        """[(n², K, C)], transformed in float64."""
        values = self.kernels_to_values.to(weight.device) @ weight.double().flatten(2).permute(2, 0, 1).flatten(1)
        return [values.view(-1, *weight.shape[:2]).to(weight.dtype)]

    def forward(self, x: Tensor, packed: list[Tensor], geometry: Geometry, epilogue: Epilogue) -> Tensor:
        size = geometry.output_size((x.shape[2], x.shape[3]))
        if epilogue.residual is not None:
            epilogue = replace(epilogue, residual=pixels_first(epilogue.residual))
        return self._convolve(pixels_first(x), packed[0], geometry.padding, size, epilogue)

    def pack_input_grad(self, weight: Tensor, geometry: Geometry) -> list[Tensor]:
        """The weight turned round: the input gradient is a convolution with it."""
        return self.pack(weight.transpose(0, 1).flip(2, 3), geometry)

    def input_grad(
        self, g: Tensor, packed: list[Tensor], geometry: Geometry, size: Pair, mask: Tensor | None = None
    ) -> Tensor:
        before = (R - 1 - geometry.padding[0], R - 1 - geometry.padding[1])
        g = masked(pixels_first(g), None if mask is None else pixels_first(mask))
        return self._convolve(g, packed[0], before, size, BARE)

    def weight_grad(self, x: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
        """The transposed algorithm: Gᵀ [Σ over tiles (A g Aᵀ) ⊙ (Bᵀ d B)] G."""
        x, g = pixels_first(x), pixels_first(g)
        total = x.new_zeros(self.n**2, g.shape[3], x.shape[3])
        for images, inputs in self._transformed(x, geometry.padding, (g.shape[1], g.shape[2])):
            tiles = self._tiles(g[images], (0, 0), (g.shape[1], g.shape[2]), self.m)
            outputs = torch.mm(self.values_to_outputs.t().to(g), tiles.flatten(1)).view(self.n**2, -1, g.shape[3])
            total += torch.bmm(outputs.transpose(1, 2), inputs)
        grad = torch.mm(self.kernels_to_values.t().to(x), total.flatten(1))
        return grad.view(R, R, g.shape[3], x.shape[3]).permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)

    def _convolve(self, x: Tensor, kernels: Tensor, before: Pair, size: Pair, epilogue: Epilogue) -> Tensor:
        """(N, K, *size) from (N, H, W, C); kernels (n², K, C)."""
        k, m = kernels.shape[1], self.m
        th, tw = (-(-count // m) for count in size)
        y = x.new_empty(len(x), *size, k)
        for images, inputs in self._transformed(x, before, size):
            values = torch.stack([product(a, pieces(b)) for a, b in zip(inputs, kernels, strict=True)])  # (n², T, K)
            outputs = torch.mm(self.values_to_outputs.to(x), values.flatten(1)).view(m, m, -1, th, tw, k)
            whole = outputs.permute(2, 3, 0, 4, 1, 5)  # (N, th, m, tw, m, K)
            if size == (th * m, tw * m):
                y[images].view(whole.shape).copy_(whole)
            else:
                y[images] = whole.reshape(-1, th * m, tw * m, k)[:, : size[0], : size[1]]
            part = epilogue
            if epilogue.residual is not None:
                part = replace(epilogue, residual=epilogue.residual[images])
            part.apply_(y[images], axis=-1)
        return y.permute(0, 3, 1, 2)

    def _transformed(self, x: Tensor, before: Pair, size: Pair) -> Iterator[tuple[slice, Tensor]]:
        """Bᵀ d B of all tiles of a few images at a time: (n², T, C) from (N, H, W, C)."""
        tiles = -(-size[0] // self.m) * -(-size[1] // self.m)
        step = max(1, TILE_VALUES // (self.n**2 * tiles * x.shape[3]))
        transform = self.tiles_to_values.to(x)
        for first in range(0, len(x), step):
            images = slice(first, min(len(x), first + step))
            d = self._tiles(x[images], before, size, self.n)
            yield images, torch.mm(transform, d.flatten(1)).view(d.shape)

    def _tiles(self, x: Tensor, before: Pair, size: Pair, side: int) -> Tensor:
        """(side², T, C): the tiles of `side` x `side` pixels, m apart, that cover `size` outputs."""
        n, h, w, c = x.shape
        th, tw = (-(-count // self.m) for count in size)
        after = [
            (count - 1) * self.m + side - start - have
            for count, start, have in zip((th, tw), before, (h, w), strict=True)
        ]
        edges = (before[1], after[1], before[0], after[0])
        if any(edges):
            x = F.pad(x, (0, 0, *edges))
        image, line, pixel = x.stride()[:3]
        tiles = x.as_strided((side, side, n, th, tw, c), (line, pixel, image, self.m * line, self.m * pixel, 1))
        return tiles.reshape(side**2, n * th * tw, c)


def _product(factors: Iterator[Fraction]) -> Fraction:
    product = Fraction(1)
    for factor in factors:
        product *= factor
    return product


def _coefficients(roots: list[Fraction] | tuple[Fraction, ...]) -> list[Fraction]:
    """Of Π (x - root), the lowest first."""
    polynomial = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *polynomial]
        polynomial = [high - root * low for high, low in zip(shifted, [*polynomial, Fraction(0)], strict=True)]
    return polynomial


def _tensor(rows: list[list[Fraction]]) -> Tensor:
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)


F2 = Winograd(2, tuple(map(Fraction, ("0", "1", "-1"))))
# Pairs p and 1/p of either sign keep small what is summed: 0, ±1, ±2 of the paper lose twice as much.
F4 = Winograd(4, tuple(map(Fraction, ("0", "2/3", "-2/3", "3/2", "-3/2"))))
