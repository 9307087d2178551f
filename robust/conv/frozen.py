"""A convolution whose weights no longer change: batch-norm folded in, packed once, its epilogue fused."""

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from robust.conv.algorithm import algorithm as named
from robust.conv.functional import choose, conv2d_frozen
from robust.conv.layers import BatchNorm2d, Conv2d


class FrozenConv2d(nn.Module):
    """relu(norm(conv(x)) + residual) with the weights of `conv` and the running statistics of `norm`.

    The norm is folded into weight and shift in float64 and costs nothing. `relu` may be set later. Differentiable in x
    and the residual alone. Moved to another device or dtype, it packs its weights anew.
    """

    weight: Tensor  # (K, C / groups, R, S)
    shift: Tensor | None  # (K,)

    def __init__(self, conv: Conv2d, norm: BatchNorm2d | None = None, relu: bool = False):
        super().__init__()
        self.window = conv.window
        self.algorithm, self.relu = conv.algorithm, relu
        weight, shift = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        if norm is not None:
            weight, shift = fold(weight, shift, norm)
        self.register_buffer("weight", weight)
        self.register_buffer("shift", shift)
        self._pack()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x, geometry = self.window.lay_on(x)
        return conv2d_frozen(
            x, self.packed, self.packed_grad, self.channels, geometry, self.chosen,
            shift=self.shift, residual=residual, relu=self.relu,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.channels[0]}, {self.channels[1]}, {self.window}, algorithm={self.chosen}, relu={self.relu}"

    def _pack(self) -> None:
        geometry = self.window.geometry
        self.channels = (self.weight.shape[1] * geometry.groups, self.weight.shape[0])
        self.chosen = self.algorithm
        if self.algorithm == "auto":
            self.chosen = choose(geometry, self.channels, self.weight.dtype, self.weight.device)
        packing = named(self.chosen)
        if reason := packing.misfit(geometry, self.weight.dtype, self.weight.device):
            raise ValueError(f"{self.chosen} {reason}")
        self.packed = packing.pack(self.weight, geometry)
        self.packed_grad = packing.pack_input_grad(self.weight, geometry)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._pack()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._pack()
        return self


def fold(weight: Tensor, bias: Tensor | None, norm: BatchNorm2d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight (K, C / groups, R, S) and bias (K,) of a convolution and the batch-norm behind it, in eval mode, in one.

    Computed in float64, so that folding costs no accuracy.
    """
    scale, shift = scale_and_shift(norm)
    if bias is not None:
        shift = shift + scale * bias.double()
    return (scale.view(-1, 1, 1, 1) * weight.double()).to(weight), shift.to(weight)


def scale_and_shift(norm: BatchNorm2d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(C,) each, in float64: what a batch-norm does in eval mode, x · scale + shift."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()
