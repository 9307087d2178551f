"""What every rung of the ladder offers: a convolution and its two gradients, on weights packed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from robust.conv.geometry import Geometry, Pair


@dataclass(frozen=True)
class Epilogue:
    """What is done with a sum before it is stored: y = relu(sum + shift + residual), each part optional.

    `shift` is (K,), a bias, or what `frozen.fold` made of it and a batch-norm; `residual` is of the output's shape.
    """

    shift: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False

    def apply_(self, y: Tensor, axis: int = 1) -> Tensor:
        """In place on y, whose channels are on `axis`, for algorithms that do not fuse it."""
        if self.shift is not None:
            y.add_(self.shift.view(-1, *(1,) * (y.ndim - 1 - axis % y.ndim)))
        if self.residual is not None:
            y.add_(self.residual)
        return y.relu_() if self.relu else y


BARE = Epilogue()  # the sum itself


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory for a result of that shape, channels_last, in `like`'s dtype."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def stored(result: Tensor, like: Tensor) -> Tensor:
    """A result in `like`'s dtype, rounded once, and channels_last in memory."""
    return empty(result.shape, like).copy_(result)


def masked(g: Tensor, mask: Tensor | None) -> Tensor:
    """g, but 0 where mask <= 0: what ReLU passes back, in one pass. A NaN in the mask passes it, as in torch."""
    return g if mask is None else torch.ops.aten.threshold_backward(g, mask, 0)


class Algorithm(Protocol):
    """One way to compute a convolution; a module or an object.

    x is (N, C, H, W), weight (K, C / groups, R, S), y and its gradient g (N, K, P, Q). Tensors come in any memory
    format, on one device and of one dtype, with shapes that fit: `functional` has checked them. Results are
    channels_last in memory. N may be 0.
    """

    def misfit(self, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot do this, in words that complete "winograd ...", or None."""

    def pack(self, weight: Tensor, geometry: Geometry) -> list[Tensor]:
        """The weight as `forward` wants it; for frozen networks this is done once."""

    def forward(self, x: Tensor, packed: list[Tensor], geometry: Geometry, epilogue: Epilogue) -> Tensor:
        """y, (N, K, P, Q)."""

    def pack_input_grad(self, weight: Tensor, geometry: Geometry) -> list[Tensor]:
        """The weight as `input_grad` wants it."""

    def input_grad(
        self, g: Tensor, packed: list[Tensor], geometry: Geometry, size: Pair, mask: Tensor | None = None
    ) -> Tensor:
        """The gradient (N, C, *size) at the input, from that at the output: `masked`, if there is a mask.

        The mask is a ReLU's output: its gradient then needs no pass over memory of its own, where that pays.
        """

    def weight_grad(self, x: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
        """The gradient (K, C / groups, R, S) at the weight."""


ALGORITHMS = {
    "direct": "robust.conv.direct",  # the sliding window, in loops
    "toeplitz": "robust.conv.toeplitz",  # one sparse matrix
    "im2col": "robust.conv.im2col",  # windows as rows, one matrix product
    "winograd2": "robust.conv.winograd:F2",  # 3 x 3 windows, 2 x 2 outputs from 16 products
    "winograd4": "robust.conv.winograd:F4",  # 3 x 3 windows, 4 x 4 outputs from 36 products
    "triton": "robust.conv.kernels",  # implicit matrix product on a GPU, or in Triton's interpreter
}
"""Name -> module, or module:object, that is the Algorithm; imported on use, for Triton may be missing."""


def algorithm(name: str) -> Algorithm:
    """The algorithm of that name. KeyError for an unknown one, ImportError where what it needs is missing."""
    module, _, attribute = ALGORITHMS[name].partition(":")
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"algorithm {name} needs the package {error.name}, which torch for CUDA brings") from error
    return getattr(found, attribute) if attribute else found
