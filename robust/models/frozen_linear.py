"""Linear layers on a CPU by oneDNN's product, forward and backward.

torch.nn.functional.linear calls MKL, which leaves half of the registers of some CPUs idle; oneDNN uses the widest that
there are, whoever made them. It is not called for small layers, where calling it takes longer than the sums.
"""

from typing import Any, NamedTuple, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from robust.conv.algorithm import Epilogue
from robust.conv.product import product

LEAST, MOST = 2**16, 2**24  # weights; of the largest layers no second copy is kept


class FrozenLinear(nn.Module):
    """`linear` with frozen parameters: the same output, the same input gradient up to rounding; differentiable once.

    flattens: what it is given is flattened first, (N, ...) to (N, K). An image with its channels last in memory is
        read in that order, with weights put in the same order, for else it would have to be copied.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, flattens: bool = False):
        super().__init__()
        self.flattens = flattens
        self.packed = _Packed.of(linear.weight.detach(), linear.bias)
        self.register_buffer("weight", self.packed.weight)  # which code around it may read
        self.register_buffer("bias", self.packed.bias)
        self.in_order: dict[torch.Size, _Packed] = {}  # shape of an image (C, H, W) ->

    @staticmethod
    def suits(linear: nn.Module) -> TypeGuard[nn.Linear]:
        return (
            type(linear) is nn.Linear
            and LEAST <= linear.weight.numel() <= MOST
            and linear.weight.device.type == "cpu"
            and linear.weight.dtype == torch.float32
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.flattens:
            rows = _Product.apply(x.reshape(-1, x.shape[-1]), self.packed)
            return rows if x.ndim == 2 else rows.view(*x.shape[:-1], len(self.weight))
        if x.ndim != 4 or x.is_contiguous():
            return _Product.apply(x.flatten(1), self.packed)
        image = x.shape[1:]
        if image not in self.in_order:
            weight = self.packed.weight.unflatten(1, image).permute(0, 2, 3, 1).flatten(1)
            self.in_order[image] = _Packed.of(weight, self.packed.bias)
        return _Product.apply(x.permute(0, 2, 3, 1).flatten(1), self.in_order[image])


class _Packed(NamedTuple):
    weight: Tensor  # (N, K)
    transposed: Tensor  # (K, N); a view would take a thousand times as long
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Self:
        return cls(weight.contiguous(), weight.t().contiguous(), None if bias is None else bias.detach())


class _Product(torch.autograd.Function):
    by_row = True  # see attacks/backward.py

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
