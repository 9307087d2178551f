"""The static table of configurations: how much of a product one program computes, by the shape of the product.

Of 16-bit numbers by what was measured on an H200 (benchmarks/tiles.py), of others by analogy; and by what the compiler
says of sm_90 (registers, spills).
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

Precision = Literal["half", "tf32", "ieee"]
ROOM = 160 * 1024  # bytes of shared memory that the largest tiles need: a datacentre GPU of 2020 or later has them
FULL = 132  # programs at once that a large GPU has room for: an H100 has as many multiprocessors
LEAST = 16  # rows and columns of a product that tensor cores take
LEAST_SHARE = 8  # tiles of pixels in a split, at least: below, adding the splits up costs more than they save


@dataclass(frozen=True)
class Tile:
    """(m, n) of a product's result, and k of the axis that is summed, at a time."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3


# 64 16-bit or 32 32-bit numbers are 128 bytes, the row of a swizzled tile. Without tensor cores, products are bound by
# arithmetic and a tile by its registers.
TILES: dict[tuple[Precision, str], Tile] = {
    ("half", "wide"): Tile(128, 128, 64, warps=8),
    ("half", "deep"): Tile(128, 256, 64, warps=8),
    ("half", "slim"): Tile(128, 64, 64),
    ("half", "few"): Tile(64, 64, 64),
    ("half", "thin"): Tile(64, 64, 32),
    ("half", "weight"): Tile(128, 128, 64),
    ("tf32", "wide"): Tile(128, 128, 32, warps=8),
    ("tf32", "deep"): Tile(128, 256, 32, warps=8),
    ("tf32", "slim"): Tile(128, 64, 32),
    ("tf32", "few"): Tile(64, 64, 32),
    ("tf32", "thin"): Tile(64, 64, 16),
    ("tf32", "weight"): Tile(128, 128, 32),
    ("ieee", "wide"): Tile(64, 64, 16),
    ("ieee", "deep"): Tile(64, 64, 16),
    ("ieee", "slim"): Tile(64, 64, 16),
    ("ieee", "few"): Tile(64, 32, 16),
    ("ieee", "thin"): Tile(32, 64, 16),
    ("ieee", "weight"): Tile(64, 64, 16),
}
DEPTHWISE = POOLING = Tile(32, 64, 1)  # m pixels and n channels


def precision(dtype: torch.dtype) -> Precision:
    """How products are formed: those of fp32 by tf32 where torch's matrix products are."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@cache
def convolution_tile(
    how: Precision, m: int, n: int, k: int, *, groups: int, pointwise: bool, masked: bool, thin: bool, roomy: bool
) -> Tile:
    """For `groups` products of (m, taps·k) with (taps·k, n), k channels of a tap at a time.

    `thin`: loads are narrower than 8 bytes, so that more addresses than usual have to fit the registers. `roomy`: a
    program may have ROOM.
    """
    wide, deep = TILES[how, "wide"], TILES[how, "deep"]
    if thin:
        shape = "thin"
    elif not roomy or _programs(m, n, wide) * groups < FULL:
        shape = "few"
    elif n <= 64:
        shape = "slim"
    elif (masked or not pointwise) and min(n, k) >= 256 and _programs(m, n, deep) * groups >= 2 * FULL:
        shape = "deep"  # where reading x is what takes long: half as many programs read it
    else:
        shape = "wide"
    return clipped(TILES[how, shape], n, k)


@cache
def weight_tile(how: Precision, m: int, n: int, *, thin: bool, roomy: bool) -> Tile:
    """For products of (m, pixels) with (pixels, n)."""
    tile = TILES[how, "thin" if thin else "few" if m <= 64 or not roomy else "weight"]
    return clipped(tile, n, tile.k)


@cache
def clipped(tile: Tile, n: int, k: int) -> Tile:
    """No larger than the product, but at least LEAST."""
    return replace(tile, n=min(tile.n, _power(n)), k=min(tile.k, _power(k)))


def splits(pixels: int, tile: int, programs: int) -> tuple[int, int]:
    """Into how many shares to cut the pixels, in whole tiles, where a share takes `programs`; and pixels in a share."""
    tiles = ceil_div(pixels, tile)
    share = ceil_div(tiles, max(1, min(4 * FULL // programs, tiles // LEAST_SHARE)))
    return ceil_div(tiles, share), share * tile


def _programs(m: int, n: int, tile: Tile) -> int:
    return ceil_div(m, tile.m) * ceil_div(n, tile.n)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power(n: int) -> int:
    return max(LEAST, 1 << (n - 1).bit_length())
