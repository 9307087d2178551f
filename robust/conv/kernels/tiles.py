"""The static table of configurations: how much of a product one program computes, by the shape of the product.

Chosen by arithmetic and by what the compiler says of sm_90 (registers, spills), not by measurements.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

Precision = Literal["half", "tf32", "ieee"]
ROOM = 160 * 1024  # bytes of shared memory that the largest tiles need: a datacentre GPU of 2020 or later has them
FULL = 132  # programs at once that a large GPU has room for: an H100 has as many multiprocessors
LEAST_SHARE = 8  # tiles of pixels in a split, at least: below, adding the splits up costs more than they save


@dataclass(frozen=True)
class Tile:
    """(m, n) of a product's result, and k of the axis that is summed, at a time."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3


# 64 16-bit or 32 32-bit numbers are 128 bytes, the row of a swizzled tile. Four warps are one warpgroup, whose
# registers hold the sums of 128 x 128, and three stages leave room for a second program on a multiprocessor, which
# computes while the first one stores. Eight warps only where `gemm` has no loop over taps. Without tensor cores,
# products are bound by arithmetic and a tile by its registers.
TILES: dict[tuple[Precision, str], Tile] = {
    ("half", "wide"): Tile(128, 128, 64),
    ("half", "point"): Tile(128, 128, 64, warps=8),
    ("half", "deep"): Tile(128, 256, 64, warps=8),
    ("half", "few"): Tile(64, 64, 64),
    ("half", "thin"): Tile(64, 64, 32),
    ("tf32", "wide"): Tile(128, 128, 32),
    ("tf32", "point"): Tile(128, 128, 32, warps=8),
    ("tf32", "deep"): Tile(128, 256, 32, warps=8),
    ("tf32", "few"): Tile(64, 64, 32),
    ("tf32", "thin"): Tile(64, 64, 16),
    ("ieee", "wide"): Tile(64, 64, 16),
    ("ieee", "point"): Tile(64, 64, 16),
    ("ieee", "deep"): Tile(64, 64, 16),
    ("ieee", "few"): Tile(64, 32, 16),
    ("ieee", "thin"): Tile(32, 64, 16),
}
DEPTHWISE = POOLING = Tile(32, 64, 1)  # m pixels and n channels


def precision(dtype: torch.dtype) -> Precision:
    """How products are formed: those of fp32 by tf32 where torch's matrix products are."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@cache
def convolution_tile(
    how: Precision, m: int, n: int, k: int, *, groups: int, pointwise: bool, thin: bool, roomy: bool
) -> Tile:
    """For `groups` products of (m, taps·k) with (taps·k, n), k channels of a tap at a time.

    `thin`: loads are narrower than 8 bytes, so that more addresses than usual have to fit the registers. `roomy`: a
    program may have ROOM.
    """
    wide = TILES[how, "wide"]
    if thin:
        shape = "thin"
    elif not roomy or ceil_div(m, wide.m) * ceil_div(n, wide.n) * groups < FULL:
        shape = "few"
    elif pointwise:
        # Smaller tiles than the deep ones want more bytes from the cache than it gives while they are computed.
        shape = "deep" if n >= 256 and k >= 512 else "point"
    else:
        shape = "wide"
    return clipped(TILES[how, shape], n, k)


@cache
def weight_tile(how: Precision, m: int, n: int, *, thin: bool, roomy: bool) -> Tile:
    """For products of (m, pixels) with (pixels, n)."""
    tile = TILES[how, "thin" if thin else "few" if m <= 64 or not roomy else "wide"]
    return clipped(tile, n, tile.k)


@cache
def clipped(tile: Tile, n: int, k: int) -> Tile:
    """No larger than the product, but at least 16, the least that tensor cores take."""
    return replace(tile, n=min(tile.n, _power(n)), k=min(tile.k, _power(k)))


def splits(pixels: int, tile: int, programs: int) -> tuple[int, int]:
    """Into how many shares to cut the pixels, in whole tiles, where a share takes `programs`; and pixels in a share."""
    tiles = ceil_div(pixels, tile)
    share = ceil_div(tiles, max(1, min(4 * FULL // programs, tiles // LEAST_SHARE)))
    return ceil_div(tiles, share), share * tile


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())
