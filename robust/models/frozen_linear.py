"""Linear layers on a CPU that read images as they lie in memory, and by oneDNN's product where it is the faster one.

torch.nn.functional.linear calls MKL, which is slow at large layers, and with AVX-512 leaves half of the registers of
some CPUs idle; oneDNN uses the widest that there are, whoever made them. For smaller layers, calling it takes longer
than the sums.
"""

from typing import Any, NamedTuple, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from robust.conv.algorithm import Epilogue
from robust.conv.product import product
from robust.models.cpu import lanes

MOST = 2**24  # weights; of larger layers no second copy is kept


class FrozenLinear(nn.Module):
    """`linear` with frozen parameters: the same output, the same input gradient up to rounding.

    flattens: what it is given is flattened first, (N, ...) to (N, K). An image with its channels last in memory is
        read in that order, with weights put in the same order, for else it would have to be copied.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, flattens: bool = False):
        super().__init__()
        self.flattens = flattens
        self.packed = _Packed.of(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
        self.register_buffer("weight", self.packed.weight)  # which code around it may read
        self.register_buffer("bias", self.packed.bias)
        self.in_order: dict[torch.Size, _Packed] = {}  # shape of an image (C, H, W) ->

    @staticmethod
    def suits(linear: nn.Module, flattens: bool = False) -> TypeGuard[nn.Linear]:
        """Whether something is gained; where it flattens, of images with their channels last."""
        return (
            type(linear) is nn.Linear
            and (flattens or _by_onednn(linear.weight))
            and linear.weight.numel() <= MOST
            and linear.weight.device.type == "cpu"
            and linear.weight.dtype == torch.float32
        )

    @property
    def by_onednn(self) -> bool:
        return self.packed.transposed is not None

    def forward(self, x: Tensor) -> Tensor:
        if not self.flattens:
            rows = self.packed(x.reshape(-1, x.shape[-1]))
            return rows if x.ndim == 2 else rows.view(*x.shape[:-1], len(self.weight))
        if x.ndim != 4 or x.is_contiguous():
            return self.packed(x.flatten(1))
        image = x.shape[1:]
        if image not in self.in_order:
            weight = self.packed.weight.unflatten(1, image).permute(0, 2, 3, 1).flatten(1)
            self.in_order[image] = _Packed.of(weight, self.packed.bias)
        return self.in_order[image](x.permute(0, 2, 3, 1).flatten(1))


def _by_onednn(weight: Tensor) -> bool:
    """Whether its product is the faster one."""
    return weight.numel() >= (2**16 if lanes() == 16 else 2**22)


class _Packed(NamedTuple):
    """A layer: of rows (M, K), (M, N)."""

    weight: Tensor  # (N, K)
    bias: Tensor | None
    transposed: Tensor | None  # (K, N), for oneDNN's product; a view would take a thousand times as long

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Self:
        weight = weight.contiguous()
        return cls(weight, bias, weight.t().contiguous() if _by_onednn(weight) else None)

    def __call__(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight, self.bias) if self.transposed is None else _Product.apply(rows, self)


class _Product(torch.autograd.Function):
    by_rows = True  # see attacks/backward.py

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: _Packed) -> Tensor:
        ctx.transposed = packed.transposed
        return _product(x, packed.weight, packed.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _product(g, ctx.transposed, None), None


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows @ weight.T + bias: (M, K), (N, K), (N,) -> (M, N). No view: autograd lets nobody write to one in place."""
    return product(rows.contiguous(), weight[None], Epilogue(shift=bias))
