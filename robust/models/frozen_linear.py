"""Linear layers on a CPU that read images as they lie in memory. What they make of a row does not depend on how many
others there are; of large layers, which go to oneDNN's product, the faster one there, only up to rounding.

torch.nn.functional.linear calls MKL, which is slow at large layers, and with AVX-512 leaves half of the registers of
some CPUs idle; oneDNN uses the widest that there are, whoever made them.
"""

from typing import Any, NamedTuple, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.backward import FEWEST, filled
from robust.conv.algorithm import Epilogue
from robust.conv.product import product
from robust.models.cpu import lanes

LARGE = {8: 2**22, 16: 2**19}  # values in a register -> weights from which oneDNN is the faster one
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
    def suits(linear: nn.Module) -> TypeGuard[nn.Linear]:
        return (
            type(linear) is nn.Linear
            and linear.weight.numel() <= MOST
            and linear.weight.device.type == "cpu"
            and linear.weight.dtype == torch.float32
        )

    @property
    def by_onednn(self) -> bool:
        return self.packed.by_onednn

    def forward(self, x: Tensor) -> Tensor:
        if not self.flattens:
            if x.ndim == 2:
                return self.packed(x)
            return self.packed(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], len(self.weight))
        if x.ndim != 4 or x.is_contiguous():
            return self.packed(x.flatten(1))
        image = x.shape[1:]
        if image not in self.in_order:
            weight = self.packed.weight.unflatten(1, image).permute(0, 2, 3, 1).flatten(1)
            self.in_order[image] = _Packed.of(weight, self.packed.bias)
        return self.in_order[image](x.permute(0, 2, 3, 1).flatten(1))


class _Packed(NamedTuple):
    """A layer: of rows (M, K), (M, N)."""

    weight: Tensor  # (N, K)
    bias: Tensor | None
    transposed: Tensor  # (K, N); for oneDNN's product, to which a view would take a thousand times as long, a copy
    by_onednn: bool

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Self:
        weight = weight.contiguous()
        by_onednn = weight.numel() >= LARGE[lanes()]
        return cls(weight, bias, weight.t().contiguous() if by_onednn else weight.t(), by_onednn)

    def __call__(self, rows: Tensor) -> Tensor:
        if not self.by_onednn and len(rows) >= FEWEST:
            return F.linear(rows, self.weight, self.bias)
        if rows.requires_grad:
            return _Product.apply(rows, self)
        return _product(rows, self.weight, self.bias, self.by_onednn)


class _Product(torch.autograd.Function):
    by_rows = True  # see attacks/backward.py

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: _Packed) -> Tensor:
        ctx.packed = packed
        return _product(x, packed.weight, packed.bias, packed.by_onednn)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        if g.requires_grad:  # what torch's `once_differentiable` says, which takes longer than the sums
            raise RuntimeError("a linear layer of a twin is differentiable once")
        packed = ctx.packed
        return _product(g, packed.transposed, None, packed.by_onednn), None


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, by_onednn: bool) -> Tensor:
    """rows @ weight.T + bias: (M, K), (N, K), (N,) -> (M, N)."""
    if by_onednn:
        return product(rows.contiguous(), weight[None], Epilogue(shift=bias))
    y = F.linear(filled(rows), weight, bias)
    return y if len(y) == len(rows) else y.narrow_copy(0, 0, len(rows))  # no view, which nobody may write to
