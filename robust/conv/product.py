"""The matrix product under the CPU's convolutions, with its epilogue fused where the library can."""

import torch
from torch import Tensor

from robust.conv.algorithm import BARE, Epilogue


def product(a: Tensor, b: Tensor, epilogue: Epilogue = BARE) -> Tensor:
    """relu(a @ b.T · scale + shift + residual), each part optional: (M, K), (N, K) -> (M, N).

    In float32 by oneDNN's product, which uses a CPU's widest registers whoever made it, and does the epilogue while the
    sums are in cache; torch.mm calls MKL, which leaves half of them idle on some.
    """
    if epilogue.scale is not None or not _has_onednn(a):
        return epilogue.apply_(torch.mm(a, b.t()), axis=-1)
    if epilogue.residual is None:
        activation = "relu" if epilogue.relu else "none"
        return torch.ops.mkldnn._linear_pointwise(a, b, epilogue.shift, activation, [], "")
    y = torch.ops.mkldnn._linear_pointwise.binary(a, epilogue.residual, b, epilogue.shift, "add")
    return y.relu_() if epilogue.relu else y


def _has_onednn(a: Tensor) -> bool:
    return (
        a.dtype == torch.float32
        and a.device.type == "cpu"
        and a.numel() > 0
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
