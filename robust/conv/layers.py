"""Layers on the project's own convolution, with the constructors, parameters and buffers of torch.nn's.

State dicts fit both ways; `from_torch` makes the layer that shares the very parameters and buffers of torch's. It
raises ValueError for a subclass, and for parameters that are not its own, for these may compute something else. Images
are (N, C, H, W); the pooling layers take a single (C, H, W) too.
"""

import math
from collections.abc import Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from robust.conv.functional import conv2d
from robust.conv.geometry import Pair
from robust.conv.pooling import Ints, adaptive_avg_pool2d, avg_pool2d, max_pool2d, pair, wide
from robust.conv.window import Window

Layer = TypeVar("Layer", bound=nn.Module)
Device = torch.device | str | None

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class Conv2d(nn.Module):
    """torch.nn.Conv2d by `robust.conv.functional.conv2d`; `algorithm` is one that it knows.

    ValueError for channels that `groups` does not divide, and for whatever `conv2d` refuses.
    """

    weight: nn.Parameter  # (K, C / groups, R, S)
    bias: nn.Parameter | None  # (K,)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints | str = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        algorithm: str = "auto",
    ):
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups {groups} must divide in_channels {in_channels} and out_channels {out_channels}")
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, not {padding_mode!r}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = pair("kernel_size", kernel_size, 1), pair("stride", stride, 1)
        self.padding = _padding(padding, self.stride)
        self.dilation, self.groups = pair("dilation", dilation, 1), groups
        self.padding_mode, self.algorithm = padding_mode, algorithm
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_torch(cls, module: nn.Conv2d, algorithm: str = "auto") -> Self:
        _require_type(module, nn.Conv2d)
        return cls._like(module, algorithm)

    @classmethod
    def _like(cls, module: nn.Conv2d, algorithm: str) -> Self:
        layer = cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.bias is not None,
            module.padding_mode,
            device="meta",
            algorithm=algorithm,
        )
        return _sharing(layer, module)

    def reset_parameters(self) -> None:
        _initialise(self.weight, self.bias)

    @property
    def window(self) -> Window:
        return Window(self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"x must be (N, C, H, W), not {tuple(x.shape)}")
        x, on_it = self.window.lay_on(x)
        return conv2d(
            x, self.weight, self.bias, on_it.stride, on_it.padding, on_it.dilation, on_it.groups, self.algorithm
        )

    def extra_repr(self) -> str:
        rest = "" if self.bias is not None else ", bias=False"
        rest += "" if self.padding_mode == "zeros" else f", padding_mode={self.padding_mode}"
        rest += "" if self.algorithm == "auto" else f", algorithm={self.algorithm}"
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}{rest}"
        )


class Conv2dSame(Conv2d):
    """TensorFlow's SAME padding, as timm.layers.Conv2dSame: the output has ceil(size / stride) pixels.

    What that takes depends on the image, and one more goes to the right and the bottom where it is odd.
    """

    @classmethod
    def from_torch(cls, module: nn.Conv2d, algorithm: str = "auto") -> Self:
        """From timm.layers.Conv2dSame."""
        from timm.layers import Conv2dSame as Timms

        _require_type(module, Timms)
        return cls._like(module, algorithm)

    @property
    def window(self) -> Window:
        return Window(self.kernel_size, self.stride, "SAME", self.dilation, self.groups)


class BatchNorm2d(nn.Module):
    """torch.nn.BatchNorm2d, arXiv 1502.03167: y = (x - mean) / sqrt(var + eps) · weight + bias, channel by channel.

    The mean and the variance are the batch's in train mode, and the running ones in eval mode. ValueError for another
    number of channels, and for a batch of a single value a channel in train mode, which has no variance.
    """

    weight: nn.Parameter | None  # (C,), as all others
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None  # ()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        ones, zeros = (make(num_features, device=device, dtype=dtype) for make in (torch.ones, torch.zeros))
        self.weight, self.bias = (nn.Parameter(ones), nn.Parameter(zeros)) if affine else (None, None)
        tracked = track_running_stats
        self.register_buffer("running_mean", zeros.clone() if tracked else None)
        self.register_buffer("running_var", ones.clone() if tracked else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device) if tracked else None)

    @classmethod
    def from_torch(cls, module: nn.BatchNorm2d) -> Self:
        _require_type(module, nn.BatchNorm2d)
        return cls._like(module)

    @classmethod
    def _like(cls, module: nn.BatchNorm2d) -> Self:
        tracked = module.running_mean is not None
        layer = cls(module.num_features, module.eps, module.momentum, module.affine, tracked, device="meta")
        layer.track_running_stats = module.track_running_stats
        layer.bias = layer.bias if module.bias is not None else None
        return _sharing(layer, module)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"x must be (N, {self.num_features}, H, W), as num_features says, not {tuple(x.shape)}")
        _require_dtype(x, self.weight, {x.dtype, wide(x)})
        if self.training or self.running_mean is None or self.running_var is None:
            mean, var = self._observe(x)
        else:
            mean, var = self.running_mean, self.running_var
        # In one pass over the image, (x · scale + shift), as torch does on a CPU.
        exact = wide(x)
        scale = (var.to(exact) + self.eps).rsqrt()
        shift = -mean.to(exact) * scale
        if self.weight is not None:
            scale, shift = scale * self.weight, shift * self.weight
        if self.bias is not None:
            shift = shift + self.bias
        return torch.addcmul(shift[:, None, None], x.to(exact), scale[:, None, None]).to(x.dtype)

    def _observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the batch, (C,) each; they are added to the running ones."""
        values = x.numel() // self.num_features
        if values == 1:
            raise ValueError(f"x of shape {tuple(x.shape)} has one value a channel, of which there is no variance")
        if values == 0:
            mean, var = x.new_zeros(2, self.num_features)
        else:
            mean = x.mean((0, 2, 3), dtype=wide(x))  # with the variance apart: torch.var_mean is ten times slower
            var = (x - mean[:, None, None]).square().mean((0, 2, 3))
        if self.training and self.track_running_stats:
            self._track(mean.detach(), var.detach(), values)
        return mean, var

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, values: int) -> None:
        """Moves the running statistics by `momentum`; where that is None, they are the mean over all batches."""
        running_mean, running_var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if running_mean is None or running_var is None or batches is None:
            return
        batches += 1
        if values:
            momentum = 1 / batches.to(running_mean.dtype) if self.momentum is None else self.momentum
            running_mean += momentum * (mean.to(running_mean.dtype) - running_mean)
            unbiased = var * (values / (values - 1))
            running_var += momentum * (unbiased.to(running_var.dtype) - running_var)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )


class BatchNormAct2d(BatchNorm2d):
    """timm.layers.BatchNormAct2d: a batch-norm with the activation after it inside, and maybe a dropout between."""

    drop: nn.Module
    act: nn.Module

    @classmethod
    def from_torch(cls, module: nn.BatchNorm2d) -> Self:
        """From timm.layers.BatchNormAct2d, whose activation module becomes this one's."""
        from timm.layers import BatchNormAct2d as Timms

        _require_type(module, Timms)
        layer = cls._like(module)
        layer.drop, layer.act = module.get_submodule("drop"), module.get_submodule("act")
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class MaxPool2d(nn.Module):
    """torch.nn.MaxPool2d but for `return_indices`; see `robust.conv.pooling.max_pool2d`."""

    def __init__(
        self,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Ints = 0,
        dilation: Ints = 1,
        ceil_mode: bool = False,
    ):
        super().__init__()
        self.kernel_size, self.stride = kernel_size, kernel_size if stride is None else stride
        self.padding, self.dilation, self.ceil_mode = padding, dilation, ceil_mode

    @classmethod
    def from_torch(cls, module: nn.MaxPool2d) -> Self:
        _require_type(module, nn.MaxPool2d)
        if module.return_indices:
            raise ValueError("return_indices: the indices of the maxima are not kept")
        layer = cls(module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
        return _sharing(layer, module)

    def forward(self, x: Tensor) -> Tensor:
        return max_pool2d(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, ceil_mode={self.ceil_mode}"
        )


class AvgPool2d(nn.Module):
    """torch.nn.AvgPool2d; see `robust.conv.pooling.avg_pool2d`."""

    def __init__(
        self,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Ints = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ):
        super().__init__()
        self.kernel_size, self.stride = kernel_size, kernel_size if stride is None else stride
        self.padding, self.ceil_mode = padding, ceil_mode
        self.count_include_pad, self.divisor_override = count_include_pad, divisor_override

    @classmethod
    def from_torch(cls, module: nn.AvgPool2d) -> Self:
        _require_type(module, nn.AvgPool2d)
        layer = cls(
            module.kernel_size,
            module.stride,
            module.padding,
            module.ceil_mode,
            module.count_include_pad,
            module.divisor_override,
        )
        return _sharing(layer, module)

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool2d(
            x,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"ceil_mode={self.ceil_mode}, count_include_pad={self.count_include_pad}, "
            f"divisor_override={self.divisor_override}"
        )


class AdaptiveAvgPool2d(nn.Module):
    """torch.nn.AdaptiveAvgPool2d; see `robust.conv.pooling.adaptive_avg_pool2d`."""

    def __init__(self, output_size: int | Sequence[int | None] | None):
        super().__init__()
        self.output_size = output_size

    @classmethod
    def from_torch(cls, module: nn.AdaptiveAvgPool2d) -> Self:
        _require_type(module, nn.AdaptiveAvgPool2d)
        return _sharing(cls(module.output_size), module)

    def forward(self, x: Tensor) -> Tensor:
        return adaptive_avg_pool2d(x, self.output_size)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


class Linear(nn.Module):
    """torch.nn.Linear: (..., in_features) @ weight.T + bias. ValueError for another number of features."""

    weight: nn.Parameter  # (out_features, in_features)
    bias: nn.Parameter | None  # (out_features,)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_torch(cls, module: nn.Linear) -> Self:
        from timm.layers.linear import Linear as Timms  # the same, but for its casts under TorchScript

        _require_type(module, Timms if isinstance(module, Timms) else nn.Linear)
        return _sharing(cls(module.in_features, module.out_features, module.bias is not None, device="meta"), module)

    def reset_parameters(self) -> None:
        _initialise(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x of shape {tuple(x.shape)} must end in the {self.in_features} features of weight "
                f"{tuple(self.weight.shape)}"
            )
        _require_dtype(x, self.weight, {x.dtype})
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (..., C), (K, C), (K,) -> (..., K)."""
    if bias is not None and x.dim() == 2:
        return torch.addmm(bias, x, weight.t())
    y = x @ weight.t()
    return y if bias is None else y + bias


class ReLU(nn.Module):
    """max(x, 0), with the gradient 0 at 0; NaN stays NaN.

    By torch's elementwise function: a mask made of other operators takes ten times as long on a CPU.
    """

    def __init__(self, inplace: bool = False):
        super().__init__()
        self.inplace = inplace

    @classmethod
    def from_torch(cls, module: nn.ReLU) -> Self:
        _require_type(module, nn.ReLU)
        return _sharing(cls(module.inplace), module)

    def forward(self, x: Tensor) -> Tensor:
        return x.relu_() if self.inplace else x.relu()

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


def _require_type(module: nn.Module, kind: type[nn.Module]) -> None:
    if type(module) is not kind:
        found = f"{type(module).__module__}.{type(module).__qualname__}"
        raise ValueError(f"module must be a {kind.__module__}.{kind.__qualname__} and no subclass of it, not {found}")


def _require_dtype(x: Tensor, weight: Tensor | None, dtypes: set[torch.dtype]) -> None:
    if weight is not None and (weight.dtype not in dtypes or weight.device != x.device):
        raise ValueError(f"weight is {weight.dtype} on {weight.device}, and x is {x.dtype} on {x.device}")


def _sharing(layer: Layer, module: nn.Module) -> Layer:
    """`layer`, given the parameters and buffers of `module` and its mode."""
    tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    if tensors.keys() != layer.state_dict().keys():
        raise ValueError(f"module has the parameters and buffers {sorted(tensors)}, not {sorted(layer.state_dict())}")
    for name, tensor in tensors.items():
        setattr(layer, name, tensor)
    return layer.train(module.training)


def _initialise(weight: Tensor, bias: Tensor | None) -> None:
    """As torch does: uniform within 1 / sqrt(fan-in); from the same seed, the same values."""
    bound = 1 / math.sqrt(max(1, weight[0].numel()))
    for parameter in (weight, bias):
        if parameter is not None:
            nn.init.uniform_(parameter, -bound, bound)


def _padding(padding: Ints | str, stride: Pair) -> Pair | str:
    if not isinstance(padding, str):
        return pair("padding", padding, 0)
    if padding not in ("same", "valid"):
        raise ValueError(f"padding must be numbers, 'same' or 'valid', not {padding!r}")
    if padding == "same" and stride != (1, 1):
        raise ValueError(f"padding 'same' needs stride (1, 1), not {stride}")
    return padding
