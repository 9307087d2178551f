"""The Algorithm: memory layouts, the phases of the input gradient, launches."""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from robust.conv.algorithm import Epilogue
from robust.conv.geometry import Geometry, Pair
from robust.conv.kernels import depthwise, gemm
from robust.conv.kernels.tiles import DEPTHWISE, Tile, clipped, convolution_tile, precision, splits, weight_tile

INTERPRETED = not isinstance(gemm.convolve, triton.JITFunction)  # as TRITON_INTERPRET was at the first import
EMPTY = Epilogue()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_ALIGNED = 8  # 16-bit numbers in the widest load, of 16 bytes
MOST_FOLDED = 64  # channels times taps of a row that are read as one


def misfit(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> str | None:
    if dtype not in DTYPES:
        return f"computes in float32, float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda" and not INTERPRETED:
        return f"needs a GPU; on a {device.type} only its interpreter runs: set TRITON_INTERPRET=1 before the first import"
    return None


def pack(weight: Tensor, geometry: Geometry) -> list[Tensor]:
    """(groups, K / groups, R, S, C / groups), of a single group with C rounded up; depthwise (1, R, S, K)."""
    if _is_depthwise(geometry, weight.shape[1]):
        return [weight.permute(1, 2, 3, 0).contiguous()]
    grouped = weight.unflatten(0, (geometry.groups, -1))  # (groups, K / groups, C / groups, R, S)
    return [_widened(grouped.permute(0, 1, 3, 4, 2), geometry.groups).contiguous()]


def forward(x: Tensor, packed: list[Tensor], geometry: Geometry, epilogue: Epilogue) -> Tensor:
    (weight,) = packed
    y = _empty(x, _channels(weight), geometry.output_size((x.shape[2], x.shape[3])))
    _convolve(_operand(x, geometry), weight, y, geometry.stride, _start(geometry), geometry.dilation, epilogue=epilogue)
    return y


def pack_input_grad(weight: Tensor, geometry: Geometry) -> list[Tensor]:
    """Of each phase, (groups, C / groups, taps, taps, K / groups), K rounded up as C above; depthwise (K / C, taps, taps, C).

    In the order of `Geometry.phases`; a phase that no tap reaches has a weight without elements.
    """
    grouped = weight.unflatten(0, (geometry.groups, -1))
    if _is_depthwise(geometry, weight.shape[1]):
        turned = grouped.squeeze(2).permute(1, 2, 3, 0)
    else:
        turned = _widened(grouped.permute(0, 2, 3, 4, 1), geometry.groups)
    return [
        turned[..., list(row.taps), :, :][..., list(column.taps), :].contiguous()
        for row, column in geometry.phases(geometry.stride)
    ]


def input_grad(
    g: Tensor, packed: list[Tensor], geometry: Geometry, size: Pair, *, mask: Tensor | None = None
) -> Tensor:
    """With `mask`, of g's shape, g counts only where that is positive: so a ReLU's output takes in that ReLU's gradient."""
    dx = _empty(g, _channels(packed[0]), size)
    phases = list(geometry.phases(size))
    if not all(row.taps and column.taps for row, column in phases):
        dx.zero_()  # faster than one launch a phase
    g, mask = _operand(g, geometry), None if mask is None else _operand(mask, geometry)
    for row, column in phases:
        if row.taps and column.taps:
            weight = packed[row.offset * geometry.stride[1] + column.offset]
            pixels = dx[:, :, row.offset :: geometry.stride[0], column.offset :: geometry.stride[1]]
            start, dilation = (-row.before, -column.before), (row.dilation, column.dilation)
            _convolve(g, weight, pixels, (1, 1), start, dilation, mask=mask)
    return dx


def weight_grad(x: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
    k, groups, (r, s), channels = g.shape[1], geometry.groups, geometry.kernel, x.shape[1] // geometry.groups
    if not g.numel():
        return x.new_zeros(k, r, s, channels).permute(0, 3, 1, 2)
    x, g = _operand(x, geometry), _nhwc(g)
    c = x.shape[1] // groups
    window = _window(x, g, geometry.stride, _start(geometry), geometry.dilation)
    sizes: dict[str, Any]
    if _is_depthwise(geometry, c):
        kernel, tile = depthwise.weight_gradient, clipped(DEPTHWISE, k, 1)
        sizes = {"K": k, "OUT": k // groups, "R": r, "S": s}
        grid, pixels = (triton.cdiv(k, tile.n) * r * s,), tile.m
    else:
        kernel, how = gemm.weight_gradient, precision(x.dtype)
        sizes = _product(window, g, groups, k // groups, r, s, c)
        tile = weight_tile(how, sizes["K"], sizes["C"], thin=_is_thin(x, c, sizes["K"]))
        tiles = triton.cdiv(sizes["K"], tile.m) * triton.cdiv(sizes["C"], tile.n) * sizes["R"] * sizes["S"]
        grid, pixels = (tiles, groups), tile.k
        sizes |= {"BLOCK_K": tile.k, "PRECISION": "tf32" if how == "tf32" else "ieee"}
    parts, share = splits(window["M"], pixels, math.prod(grid))
    sums = torch.empty(parts, k, r, s, c, dtype=torch.float32, device=x.device)
    _launch(kernel, (grid[0], parts, *grid[1:]), tile, g_ptr=g, x_ptr=x, sums_ptr=sums, share=share, **sizes, **window)
    return sums.sum(0)[..., :channels].to(x.dtype).permute(0, 3, 1, 2)


def _convolve(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    stride: Pair,
    start: Pair,
    dilation: Pair,
    mask: Tensor | None = None,
    epilogue: Epilogue = EMPTY,
) -> None:
    """y = epilogue(Σ x · weight), where the window of output p begins at input p·stride + start."""
    if not y.numel():
        return
    window = _window(x, y, stride, start, dilation)
    sizes: dict[str, Any]
    if weight.dim() == 4:
        j, r, s, k = weight.shape
        kernel, tile = depthwise.convolve, clipped(DEPTHWISE, k, 1)
        sizes = {"J": j, "K": k, "OUT": k * j // x.shape[1], "R": r, "S": s}
        grid = (triton.cdiv(window["M"], tile.m), triton.cdiv(k, tile.n))
    else:
        kernel, how = gemm.convolve, precision(x.dtype)
        groups, k, _, _, c = weight.shape
        sizes = _product(window, y, *weight.shape)
        tile = convolution_tile(
            how, window["M"], k, sizes["C"], groups=groups, pointwise=sizes["POINTWISE"], masked=mask is not None,
            thin=_is_thin(x, c, k),
        )  # fmt: skip
        grid = (triton.cdiv(window["M"], tile.m) * triton.cdiv(k, tile.n), groups)
        sizes |= {"BLOCK_K": tile.k, "PRECISION": "tf32" if how == "tf32" else "ieee"}
    residual = None if epilogue.residual is None else _nhwc(epilogue.residual)
    _launch(
        kernel, grid, tile, x_ptr=x, w_ptr=weight, y_ptr=y, mask_ptr=mask, scale_ptr=epilogue.scale,
        shift_ptr=epilogue.shift, residual_ptr=residual, RELU=epilogue.relu,
        y_n=y.stride(0), y_p=y.stride(2), y_q=y.stride(3), **sizes, **window,
    )  # fmt: skip


def _window(x: Tensor, y: Tensor, stride: Pair, start: Pair, dilation: Pair) -> dict[str, int]:
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
    still = (r, s, *moves) == (1, 1, 1, 1, 0, 0)
    folded = groups == 1 and s > 1 and window["dilation_w"] == 1 and s * c <= MOST_FOLDED
    return {
        "R": r, "S": 1 if folded else s, "C": s * c if folded else c, "K": k,
        "FOLDED": folded, "POINTWISE": still and y.is_contiguous(memory_format=torch.channels_last),
    }  # fmt: skip


def _launch(kernel: Any, grid: tuple[int, ...], tile: Tile, **arguments: Any) -> None:
    """Channels, by whose number addresses are computed, are handed over in units that the compiler knows."""
    units = {"C": "C_UNIT", "x_w": "C_UNIT", "K": "K_UNIT", "y_n": "K_UNIT", "y_p": "K_UNIT", "y_q": "K_UNIT"}
    divisors = {
        unit: math.gcd(MOST_ALIGNED, *(arguments[name] for name in units if units[name] == unit and name in arguments))
        for unit in ("C_UNIT", "K_UNIT")
    }
    arguments |= {name: arguments[name] // divisors[unit] for name, unit in units.items() if name in arguments}
    blocks = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "num_warps": tile.warps, "num_stages": tile.stages}
    # The interpreter computes wrongly with bfloat16, and stores fp32 as bfloat16 without rounding.
    wide = {name: _float(value) for name, value in arguments.items() if INTERPRETED and _is_bfloat16(value)}
    with torch.cuda.device_of(arguments["x_ptr"]):
        kernel[grid](**{**arguments, **wide}, **divisors, **blocks)
    if "y_ptr" in wide:
        arguments["y_ptr"].copy_(wide["y_ptr"])


def _float(tensor: Tensor) -> Tensor:
    """With the same strides, gaps included."""
    wide = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.float32, device=tensor.device)
    return wide.copy_(tensor)


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _is_depthwise(geometry: Geometry, channels: int) -> bool:
    """With one of `channels` a group; a single group is a matrix product all the same."""
    return geometry.groups > 1 and channels == 1


def _is_thin(x: Tensor, c: int, k: int) -> bool:
    """Whether so many channels side by side forbid wide loads, of c, or stores, of k where these are many."""
    return c * x.element_size() % 8 != 0 or (k > 16 and k * x.element_size() % 16 != 0)


def _start(geometry: Geometry) -> Pair:
    return -geometry.padding[0], -geometry.padding[1]


def _channels(weight: Tensor) -> int:
    """Of the output that a packed weight makes."""
    return weight.shape[3] if weight.dim() == 4 else weight.shape[0] * weight.shape[1]


def _operand(x: Tensor, geometry: Geometry) -> Tensor:
    """In NHWC; of a single group, with as many channels as `_widened` gives the weight."""
    nhwc = _nhwc(x).permute(0, 2, 3, 1)
    return _widened(nhwc, geometry.groups).permute(0, 3, 1, 2)


def _widened(tensor: Tensor, groups: int) -> Tensor:
    """With zeros for channels, the last axis, up to a multiple of 8 bytes: narrower loads cannot be made ahead of time."""
    missing = -tensor.shape[-1] % (8 // tensor.element_size())
    return F.pad(tensor, (0, missing)) if groups == 1 and missing else tensor


def _nhwc(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, channels: int, size: Pair) -> Tensor:
    return torch.empty(
        (len(like), channels, *size), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )
