"""conv2d as one differentiable operator, whatever computes it; and a frozen one with its epilogue fused.

Convolution is bilinear, so three operators are closed under differentiation: the convolution, its gradient at the
input and its gradient at the weight are each other's derivatives. They are custom operators of torch: autograd of any
order, torch.compile and torch.library.opcheck know them. The frozen one is an operator for those who trace it; eager
code goes past torch's dispatcher.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from robust.conv.algorithm import ALGORITHMS, Algorithm, Epilogue, empty, masked
from robust.conv.algorithm import algorithm as _algorithm
from robust.conv.geometry import Geometry, Pair


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    algorithm: str = "auto",
) -> Tensor:
    """The convolution (N, K, P, Q) of x (N, C, H, W) with weight (K, C / groups, R, S), as torch's F.conv2d has it.

    y[n, k, p, q] = bias[k] + Σ over c, r, s of weight[k, c, r, s] · x[n, c, p·stride - padding + r·dilation, ...], with
    zeros around x. `algorithm` is one of `ALGORITHMS`, or "auto" for what suits (`choose`). The result is
    channels_last in memory. ValueError, which names the argument and the shapes, where they do not fit.
    """
    return torch.ops.robust.conv2d(
        x, weight, bias, _pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation), groups,
        algorithm,
    )  # fmt: skip


def conv2d_frozen(
    x: Tensor,
    packed: list[Tensor],
    packed_grad: list[Tensor],
    channels: Pair,
    geometry: Geometry,
    algorithm: str,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """relu(conv(x) + shift + residual) with weights packed once; differentiable, once, in x and residual.

    `channels` are (C, K). `packed` and `packed_grad` are what the algorithm's `pack` and `pack_input_grad` made of the
    weight; shift is (K,), residual of the output's shape. ValueError where x or the residual does not fit.
    """
    if type(x) is Tensor and not (x.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing()):
        return _FrozenConv2d.apply(x, residual, packed, packed_grad, shift, relu, channels, geometry, algorithm)
    return torch.ops.robust.conv2d_frozen(
        x, packed, packed_grad, shift, residual, relu, list(channels), list(geometry.kernel),
        list(geometry.stride), list(geometry.padding), list(geometry.dilation), geometry.groups, algorithm,
    )  # fmt: skip


def choose(geometry: Geometry, channels: Pair, dtype: torch.dtype, device: torch.device) -> str:
    """The algorithm for `channels` (C, K): a static table, from benchmarks/convolution.py.

    Winograd's transforms pay where many channels share them, and F(4 x 4) is accurate enough only there.
    """
    if device.type == "cuda" and dtype != torch.float64:
        return "triton"
    if device.type == "cpu" and dtype == torch.float32:
        for name, least in (("winograd4", 512), ("winograd2", 256)):
            if min(channels) >= least and _algorithm(name).misfit(geometry, dtype, device) is None:
                return name
    return "im2col"


def for_weight_grad(chosen: str) -> str:
    """What "auto" takes for the weight gradient where `choose` says `chosen`: Winograd loses too much in its sums."""
    return "im2col" if chosen.startswith("winograd") else chosen


# The operators. Lists of two are (rows, columns); what they mean is above and in `Algorithm`.


@torch.library.custom_op("robust::conv2d", mutates_args=())
def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    groups: int, algorithm: str,
) -> Tensor:  # fmt: skip
    geometry = _geometry(_taps(weight), stride, padding, dilation, groups)
    _check(x, weight, bias, geometry)
    chosen = _chosen(algorithm, geometry, (x.shape[1], weight.shape[0]), x)
    return _own(chosen.forward(x, chosen.pack(weight, geometry), geometry, Epilogue(shift=bias)))


@_conv2d.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    groups: int, algorithm: str,
) -> Tensor:  # fmt: skip
    geometry = _geometry(_taps(weight), stride, padding, dilation, groups)
    _check(x, weight, bias, geometry)
    return empty((x.shape[0], weight.shape[0], *geometry.output_size((x.shape[2], x.shape[3]))), x)


@torch.library.custom_op("robust::conv2d_input_grad", mutates_args=())
def _input_grad(
    g: Tensor, weight: Tensor, size: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, algorithm: str,
) -> Tensor:  # fmt: skip
    geometry = _geometry(_taps(weight), stride, padding, dilation, groups)
    chosen = _chosen(algorithm, geometry, (weight.shape[1] * groups, weight.shape[0]), g)
    return _own(chosen.input_grad(g, chosen.pack_input_grad(weight, geometry), geometry, (size[0], size[1])))


@_input_grad.register_fake
def _(
    g: Tensor, weight: Tensor, size: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, algorithm: str,
) -> Tensor:  # fmt: skip
    return empty((g.shape[0], weight.shape[1] * groups, *size), g)


@torch.library.custom_op("robust::conv2d_weight_grad", mutates_args=())
def _weight_grad(
    x: Tensor, g: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, algorithm: str,
) -> Tensor:  # fmt: skip
    geometry = _geometry(kernel, stride, padding, dilation, groups)
    if algorithm == "auto":
        algorithm = for_weight_grad(choose(geometry, (x.shape[1], g.shape[1]), x.dtype, x.device))
    chosen = _chosen(algorithm, geometry, (x.shape[1], g.shape[1]), x)
    return _own(chosen.weight_grad(x, g, geometry))


@_weight_grad.register_fake
def _(
    x: Tensor, g: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, algorithm: str,
) -> Tensor:  # fmt: skip
    return empty((g.shape[1], x.shape[1] // groups, *kernel), x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, *others = inputs
    ctx.save_for_backward(first, second)
    ctx.others = others[-5:]  # stride, padding, dilation, groups, algorithm


def _conv2d_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dx = torch.ops.robust.conv2d_input_grad(g, weight, list(x.shape[2:]), *ctx.others) if wanted[0] else None
    dw = torch.ops.robust.conv2d_weight_grad(x, g, list(weight.shape[2:]), *ctx.others) if wanted[1] else None
    return dx, dw, g.sum((0, 2, 3)) if wanted[2] else None, *[None] * 5


def _input_grad_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    g, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dg = torch.ops.robust.conv2d(ddx, weight, None, *ctx.others) if wanted[0] else None
    dw = torch.ops.robust.conv2d_weight_grad(ddx, g, list(weight.shape[2:]), *ctx.others) if wanted[1] else None
    return dg, dw, *[None] * 6


def _weight_grad_backward(ctx: Any, ddw: Tensor) -> tuple[Tensor | None, ...]:
    x, g = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dx = torch.ops.robust.conv2d_input_grad(g, ddw, list(x.shape[2:]), *ctx.others) if wanted[0] else None
    dg = torch.ops.robust.conv2d(x, ddw, None, *ctx.others) if wanted[1] else None
    return dx, dg, *[None] * 6


_conv2d.register_autograd(_conv2d_backward, setup_context=_keep)
_input_grad.register_autograd(_input_grad_backward, setup_context=_keep)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_keep)


@torch.library.custom_op("robust::conv2d_frozen", mutates_args=())
def _frozen(
    x: Tensor, packed: list[Tensor], packed_grad: list[Tensor], shift: Tensor | None, residual: Tensor | None,
    relu: bool, channels: list[int], kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, algorithm: str,
) -> Tensor:  # fmt: skip
    geometry = _geometry(kernel, stride, padding, dilation, groups)
    return _frozen_forward(x, packed, shift, residual, relu, channels, geometry, algorithm)


@_frozen.register_fake
def _(
    x: Tensor, packed: list[Tensor], packed_grad: list[Tensor], shift: Tensor | None, residual: Tensor | None,
    relu: bool, channels: list[int], kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, algorithm: str,
) -> Tensor:  # fmt: skip
    geometry = _geometry(kernel, stride, padding, dilation, groups)
    _check_frozen(x, packed[0], residual, channels, geometry)
    return empty((x.shape[0], channels[1], *geometry.output_size((x.shape[2], x.shape[3]))), x)


@torch.library.custom_op("robust::conv2d_frozen_grad", mutates_args=())
def _frozen_grad(
    g: Tensor, mask: Tensor | None, packed_grad: list[Tensor], channels: list[int], size: list[int],
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int, algorithm: str,
) -> Tensor:  # fmt: skip
    geometry = _geometry(kernel, stride, padding, dilation, groups)
    return _own(_algorithm(algorithm).input_grad(g, packed_grad, geometry, (size[0], size[1]), mask=mask))


@_frozen_grad.register_fake
def _(
    g: Tensor, mask: Tensor | None, packed_grad: list[Tensor], channels: list[int], size: list[int],
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int, algorithm: str,
) -> Tensor:  # fmt: skip
    return empty((g.shape[0], channels[0], *size), g)


def _keep_frozen(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, packed_grad, _, residual, relu, channels, *others = inputs
    ctx.channels, ctx.size, ctx.others = channels, list(x.shape[2:]), others
    ctx.with_residual, ctx.with_relu, ctx.packed = residual is not None, relu, len(packed)
    ctx.save_for_backward(*packed_grad, *([output] if relu else []))


def _frozen_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    packed_grad, y = list(ctx.saved_tensors), None
    if ctx.with_relu:
        *packed_grad, y = packed_grad
    g, mask = _through_relu(g, y, ahead=ctx.with_residual)  # both of a sum's terms want it masked
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.robust.conv2d_frozen_grad(g, mask, packed_grad, ctx.channels, ctx.size, *ctx.others)
    # A list of tensors has a list of gradients.
    frozen = [None] * ctx.packed, [None] * len(packed_grad)
    return dx, *frozen, None, g if ctx.with_residual else None, *[None] * 8


_frozen.register_autograd(_frozen_backward, setup_context=_keep_frozen)


def _frozen_forward(
    x: Tensor, packed: list[Tensor], shift: Tensor | None, residual: Tensor | None, relu: bool,
    channels: Sequence[int], geometry: Geometry, algorithm: str,
) -> Tensor:  # fmt: skip
    _check_frozen(x, packed[0], residual, channels, geometry)
    return _own(_algorithm(algorithm).forward(x, packed, geometry, Epilogue(shift, residual, relu)))


class _FrozenConv2d(torch.autograd.Function):
    """The same past torch's dispatcher, which takes longer, both ways, than a small convolution."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, packed: list[Tensor], packed_grad: list[Tensor],
        shift: Tensor | None, relu: bool, channels: Pair, geometry: Geometry, algorithm: str,
    ) -> Tensor:  # fmt: skip
        y = _frozen_forward(x, packed, shift, residual, relu, channels, geometry, algorithm)
        ctx.save_for_backward(*([y] if relu else []))
        ctx.with_residual, ctx.packed_grad = residual is not None, packed_grad
        ctx.size, ctx.geometry, ctx.algorithm = (x.shape[2], x.shape[3]), geometry, algorithm
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        g, mask = _through_relu(g, *ctx.saved_tensors, ahead=ctx.with_residual)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _own(_algorithm(ctx.algorithm).input_grad(g, ctx.packed_grad, ctx.geometry, ctx.size, mask=mask))
        return dx, g if ctx.with_residual else None, *[None] * 7


def _through_relu(g: Tensor, y: Tensor | None = None, *, ahead: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient g before a ReLU of output y, if there was one: masked `ahead`, or else with the mask to apply."""
    if y is None or not ahead:
        return g, y
    return masked(g, y), None


def _chosen(name: str, geometry: Geometry, channels: Pair, x: Tensor) -> Algorithm:
    if name == "auto":
        name = choose(geometry, channels, x.dtype, x.device)
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm {name!r} is none of auto, {', '.join(ALGORITHMS)}")
    chosen = _algorithm(name)
    if reason := chosen.misfit(geometry, x.dtype, x.device):
        raise ValueError(f"{name} {reason}")
    return chosen


def _own(y: Tensor) -> Tensor:
    """Not a view of the matrix that it was computed as: autograd lets nobody change views in place."""
    return y.detach()


def _geometry(
    kernel: Sequence[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Geometry:
    return Geometry(_two(kernel), _two(stride), _two(padding), _two(dilation), groups)


def _taps(weight: Tensor) -> Sequence[int]:
    if weight.ndim != 4:
        raise ValueError(f"weight must be (K, C / groups, R, S), not {_shape(weight)}")
    return weight.shape[2:]


def _pair(name: str, value: int | Sequence[int]) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a number or (rows, columns), not {value}")
    return pair


def _two(values: Sequence[int]) -> Pair:
    return values[0], values[1]


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
    """ValueError, naming the argument and the shapes, for what is no convolution."""
    _check_window(x, geometry)
    groups, k = geometry.groups, weight.shape[0]
    if groups < 1 or k % groups:
        raise ValueError(f"groups {groups} does not divide the {k} output channels of weight {_shape(weight)}")
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"x {_shape(x)} has {x.shape[1]} channels, and weight {_shape(weight)} with groups {groups} reads "
            f"{weight.shape[1] * groups}"
        )
    if bias is not None and bias.shape != (k,):
        raise ValueError(f"bias must be ({k},) for weight {_shape(weight)}, not {_shape(bias)}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and (other.dtype, other.device) != (x.dtype, x.device):
            raise ValueError(f"{name} is {other.dtype} on {other.device}, and x is {x.dtype} on {x.device}")


def _check_frozen(
    x: Tensor, weight: Tensor, residual: Tensor | None, channels: Sequence[int], geometry: Geometry
) -> None:
    _check_window(x, geometry)
    for name, other in (("the weight", weight), ("residual", residual)):
        if other is not None and (other.dtype, other.device) != (x.dtype, x.device):
            raise ValueError(f"{name} is {other.dtype} on {other.device}, and x is {x.dtype} on {x.device}")
    if x.shape[1] != channels[0]:
        raise ValueError(f"x {_shape(x)} has {x.shape[1]} channels, and the weight reads {channels[0]}")
    expected = (x.shape[0], channels[1], *geometry.output_size((x.shape[2], x.shape[3])))
    if residual is not None and residual.shape != expected:
        raise ValueError(f"residual must be {expected} for x {_shape(x)}, not {_shape(residual)}")


def _check_window(x: Tensor, geometry: Geometry) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be (N, C, H, W), not {_shape(x)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, not {x.dtype}")
    for name, values, least in (
        ("kernel", geometry.kernel, 1), ("stride", geometry.stride, 1), ("padding", geometry.padding, 0),
        ("dilation", geometry.dilation, 1),
    ):  # fmt: skip
        if min(values) < least:
            raise ValueError(f"{name} must be at least {least}, not {values}")
    if min(geometry.output_size((x.shape[2], x.shape[3]))) < 1:
        raise ValueError(
            f"x {_shape(x)} padded by {geometry.padding} is smaller than the window of {geometry.kernel} taps with "
            f"dilation {geometry.dilation}, which spans {geometry.extent}"
        )
