"""The matrix product under the CPU's convolutions, with its epilogue fused where the library can."""

import torch
from torch import Tensor
from torch.nn import functional as F

from robust.conv.algorithm import BARE, Epilogue

LONGEST = 512  # products in one sum


def pieces(b: Tensor) -> Tensor:
    """(pieces, N, length) from (N, K): each sum in as few equal pieces as are not longer than LONGEST.

    Where that would take far more of them than necessary, the last one is shorter, and filled up with zeros.
    """
    k = b.shape[1]
    fewest = max(1, -(-k // LONGEST))
    count = next((n for n in range(fewest, 4 * fewest) if k % n == 0), fewest)
    length = -(-k // count)
    return F.pad(b, (0, count * length - k)).view(len(b), count, length).transpose(0, 1).contiguous()


def product(a: Tensor, b: Tensor, epilogue: Epilogue = BARE) -> Tensor:
    """relu(a @ b.T + shift + residual), each part optional: (M, K), `pieces` of (N, K) -> (M, N).

    In float32 by oneDNN's product, which uses a CPU's widest registers whoever made it, and does the epilogue while the
    sums are in cache; torch.mm calls MKL, which leaves half of them idle on some. oneDNN adds up the products one after
    the other: in pieces, the rounding errors of a long sum stay as small as those of a short one.
    """
    if not _has_onednn(a):
        return epilogue.apply_(torch.mm(a, b.transpose(0, 1).flatten(1)[:, : a.shape[1]].t()), axis=-1)
    linear, y, shift = torch.ops.mkldnn._linear_pointwise, epilogue.residual, epilogue.shift
    if len(b) == 1 and y is None:
        return linear(a, b[0], shift, "relu" if epilogue.relu else "none", [], "")
    for columns, piece in zip(a.split(b.shape[2], dim=1), b, strict=False):  # a piece of zeros alone has no columns
        # oneDNN takes a thousand times as long for others.
        columns, piece = columns.contiguous(), piece[:, : columns.shape[1]].contiguous()
        y = (
            linear(columns, piece, shift, "none", [], "")
            if y is None
            else linear.binary(columns, y, piece, shift, "add")
        )
        shift = None
    assert y is not None
    return y.relu_() if epilogue.relu else y


def _has_onednn(a: Tensor) -> bool:
    return (
        a.dtype == torch.float32
        and a.device.type == "cpu"
        and a.numel() > 0
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
