"""Linear layers on a CPU by oneDNN's product, forward and backward.

torch.nn.functional.linear calls MKL, which leaves half of the registers of some CPUs idle; oneDNN uses the widest that
there are, whoever made them. It is not called for small layers, where calling it takes longer than the sums.
"""

from typing import Any

import torch
from torch import Tensor, nn

from robust.conv.algorithm import Epilogue
from robust.conv.product import product

LEAST, MOST = 2**16, 2**24  # weights; of the largest layers no second copy is kept


class FrozenLinear(nn.Module):
    """`linear` with frozen parameters: the same output, the same input gradient up to rounding."""

    weight: Tensor
    transposed: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("transposed", weight.t().contiguous())  # a view would take a thousand times as long
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @staticmethod
    def suits(linear: nn.Module) -> bool:
        return (
            type(linear) is nn.Linear
            and LEAST <= linear.weight.numel() <= MOST
            and linear.weight.device.type == "cpu"
            and linear.weight.dtype == torch.float32
        )

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.transposed = linear.transposed
        return _product(x, linear.weight, linear.bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _product(g, ctx.transposed, None), None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias: (..., K), (N, K), (N,) -> (..., N)."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return product(rows, weight[None], Epilogue(shift=bias)).view(*x.shape[:-1], len(weight))
