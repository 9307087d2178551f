"""From tensors to a kernel, its grid and its configuration."""

import math
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from robust.conv.geometry import Pair
from robust.conv.kernels import depthwise, gemm
from robust.conv.kernels.tiles import (
    DEPTHWISE,
    ROOM,
    Tile,
    ceil_div,
    clipped,
    convolution_tile,
    precision,
    splits,
    weight_tile,
)

INTERPRETED = not isinstance(gemm.convolve, triton.JITFunction)  # as TRITON_INTERPRET was at the first import
MOST_FOLDED = 64  # channels times taps of a row that are read as one
WIDEST = 8  # 16-bit numbers in the widest load, of 16 bytes
UNITS = {"C": "C_UNIT", "x_w": "C_UNIT", "K": "K_UNIT", "y_n": "K_UNIT", "y_p": "K_UNIT", "y_q": "K_UNIT"}


def convolve(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    stride: Pair,
    start: Pair,
    dilation: Pair,
    *,
    mask: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> None:
    """y = relu(Σ x · weight + shift + residual), where the window of output p begins at input p·stride + start.

    x and mask (N, C, H, W) and residual (N, K, P, Q) are channels_last in memory; of y the channels are adjacent.
    weight is (groups, K / groups, R, S, C / groups), or (J, R, S, K) for the depthwise kernel, which takes no mask.
    """
    if not y.numel():
        return
    window = window_of(x, y, stride, start, dilation)
    m = window["M"]
    sizes: dict[str, Any]
    grid: tuple[int, ...]
    if weight.dim() == 4:
        j, r, s, k = weight.shape
        assert mask is None
        kernel, tile = depthwise.convolve, clipped(DEPTHWISE, k, 1)
        sizes = {"J": j, "K": k, "OUT": k * j // x.shape[1], "R": r, "S": s}
        grid = (ceil_div(m, tile.m), ceil_div(k, tile.n))
    else:
        groups, k, _, _, c = weight.shape
        kernel, how, sizes = gemm.convolve, precision(x.dtype), _product(window, y, *weight.shape)
        tile = convolution_tile(
            how, m, k, sizes["C"], groups=groups, pointwise=sizes["POINTWISE"], masked=mask is not None,
            thin=_is_thin(x, c, k), roomy=_is_roomy(x.device),
        )  # fmt: skip
        sizes |= {"BLOCK_K": tile.k, "PRECISION": "tf32" if how == "tf32" else "ieee", "mask_ptr": mask}
        grid = (ceil_div(m, tile.m) * ceil_div(k, tile.n), groups)
    launch(
        kernel, grid, tile, x_ptr=x, w_ptr=weight, y_ptr=y, shift_ptr=shift, residual_ptr=residual,
        RELU=relu, y_n=y.stride(0), y_p=y.stride(2), y_q=y.stride(3), **sizes, **window,
    )  # fmt: skip


def weight_gradient(
    x: Tensor, g: Tensor, groups: int, kernel: Pair, stride: Pair, start: Pair, dilation: Pair
) -> Tensor:
    """(splits, K, R, S, C / groups) in fp32: of Σ g · x by shares of the pixels; their sum is the gradient.

    x (N, C, H, W) and g (N, K, P, Q) are channels_last in memory.
    """
    window = window_of(x, g, stride, start, dilation)
    (r, s), c, channels = kernel, x.shape[1] // groups, g.shape[1]
    k = channels // groups
    sizes: dict[str, Any]
    grid: tuple[int, ...]
    if groups > 1 and c == 1:
        program, tile = depthwise.weight_gradient, clipped(DEPTHWISE, channels, 1)
        sizes = {"K": channels, "OUT": k, "R": r, "S": s}
        grid, depth = (ceil_div(channels, tile.n) * r * s,), tile.m
    else:
        program, how, sizes = gemm.weight_gradient, precision(x.dtype), _product(window, g, groups, k, r, s, c)
        tile = weight_tile(how, k, sizes["C"], thin=_is_thin(x, c, k), roomy=_is_roomy(x.device))
        sizes |= {"BLOCK_K": tile.k, "PRECISION": "tf32" if how == "tf32" else "ieee"}
        tiles = ceil_div(k, tile.m) * ceil_div(sizes["C"], tile.n) * sizes["R"] * sizes["S"]
        grid, depth = (tiles, groups), tile.k
    parts, share = splits(window["M"], depth, math.prod(grid))
    sums = torch.empty(parts, channels, r, s, c, dtype=torch.float32, device=x.device)
    grid = (grid[0], parts, *grid[1:])
    launch(program, grid, tile, g_ptr=g, x_ptr=x, sums_ptr=sums, share=share, **sizes, **window)
    return sums


def window_of(x: Tensor, y: Tensor, stride: Pair, start: Pair, dilation: Pair) -> dict[str, int]:
    n, channels, height, width = x.shape
    p, q = y.shape[2:]
    return {
        "M": n * p * q, "H": height, "W": width, "P": p, "Q": q, "x_w": channels,
        "stride_h": stride[0], "stride_w": stride[1], "start_h": start[0], "start_w": start[1],
        "dilation_h": dilation[0], "dilation_w": dilation[1],
    }  # fmt: skip


def _product(window: dict[str, int], y: Tensor, groups: int, k: int, r: int, s: int, c: int) -> dict[str, Any]:
    """The axes of the product, and which of the shorter ways to address x and y apply."""
    moves = (window["stride_h"], window["stride_w"], window["start_h"], window["start_w"])
    still = (r, s, *moves) == (1, 1, 1, 1, 0, 0) and (window["H"], window["W"]) == (window["P"], window["Q"])
    folded = groups == 1 and s > 1 and window["dilation_w"] == 1 and s * c <= MOST_FOLDED
    return {
        "R": r, "S": 1 if folded else s, "C": s * c if folded else c, "K": k,
        "FOLDED": folded, "POINTWISE": still and y.is_contiguous(memory_format=torch.channels_last),
    }  # fmt: skip


def _is_thin(x: Tensor, c: int, k: int) -> bool:
    """Whether so many channels side by side forbid wide loads, of c, or stores, of k where these are many."""
    return c * x.element_size() % 8 != 0 or (k > 16 and k * x.element_size() % 16 != 0)


@cache
def _is_roomy(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    has = torch.cuda.get_device_properties(device)
    return getattr(has, "shared_memory_per_block_optin", has.shared_memory_per_block) >= ROOM


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, **arguments: Any) -> None:
    """The numbers of UNITS are handed over in units, as the kernels take them."""
    used = {name: unit for name, unit in UNITS.items() if name in arguments}
    divisors = {
        unit: math.gcd(WIDEST, *(arguments[name] for name in used if used[name] == unit)) for unit in used.values()
    }
    arguments |= {name: arguments[name] // divisors[unit] for name, unit in used.items()}
    options = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "num_warps": tile.warps, "num_stages": tile.stages}
    # The interpreter multiplies bfloat16 as if they were integers, and makes them of fp32 without rounding.
    wide = {name: _float(value) for name, value in arguments.items() if INTERPRETED and _is_bfloat16(value)}
    with torch.cuda.device_of(arguments["x_ptr"]):
        kernel[grid](**{**arguments, **wide}, **divisors, **options)
    if "y_ptr" in wide:
        arguments["y_ptr"].copy_(wide["y_ptr"])


def _float(tensor: Tensor) -> Tensor:
    """With the same strides, gaps included."""
    wide = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.float32, device=tensor.device)
    return wide.copy_(tensor)


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16
