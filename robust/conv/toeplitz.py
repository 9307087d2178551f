"""The matrix that a convolution is: sparse, of shape (outputs, pixels), the same few weights on every row.

Flatten an image to a vector x and its output to y, then y = M x. A dense layer would have a weight of its own for every
entry of M; here an entry is one of the filters' weights, or 0 where the window does not reach. So one product with M is
the convolution, and one with its transpose hands the gradient at y back to x.
"""

import torch
from torch import Tensor

from robust.conv.algorithm import Epilogue, masked, stored
from robust.conv.geometry import Geometry, Pair


def matrix(weight: Tensor, geometry: Geometry, size: Pair) -> Tensor:
    """(K·P·Q, C·H·W), sparse COO and coalesced, from (K, C / groups, R, S) and the image's (H, W), in weight's dtype.

    Row (k·P + p)·Q + q is output (k, p, q), column (c·H + h)·W + w is pixel (c, h, w). For small sizes: it has
    an entry for every multiplication of the convolution, also where the weight is 0.

    >>> matrix(torch.tensor([[[[1.0, 2.0]]]]), Geometry((1, 2)), (1, 4)).to_dense()
    tensor([[1., 2., 0., 0.],
            [0., 1., 2., 0.],
            [0., 0., 1., 2.]])
    """
    outputs, pixels, weights = entries(weight.shape, geometry, size, weight.device)
    (height, width), (rows, columns) = size, geometry.output_size(size)
    with torch.sparse.check_sparse_tensor_invariants(False):  # torch 2.11 warns of the argument of that name
        return torch.sparse_coo_tensor(
            torch.stack((outputs, pixels)),
            weight.flatten()[weights],
            (weight.shape[0] * rows * columns, weight.shape[1] * geometry.groups * height * width),
            is_coalesced=True,  # in order of outputs, and each one's of pixels, as they were made
        )


def entries(
    weight_shape: tuple[int, ...], geometry: Geometry, size: Pair, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Every multiplication of a convolution: which output it adds to, which pixel it reads, and which weight.

    Three vectors of indices into the flattened output (K, P, Q), image (C, H, W) and weight (K, C / groups, R, S).
    """
    filters, channels, *_ = weight_shape
    (P, Q), (H, W) = geometry.output_size(size), size
    ranges = (torch.arange(n, device=device) for n in (filters, P, Q, channels, *geometry.kernel))
    k, p, q, c, r, s = torch.meshgrid(*ranges, indexing="ij")
    group = k // (filters // geometry.groups)
    h = p * geometry.stride[0] - geometry.padding[0] + r * geometry.dilation[0]
    w = q * geometry.stride[1] - geometry.padding[1] + s * geometry.dilation[1]
    outputs = (k * P + p) * Q + q
    pixels = ((group * channels + c) * H + h) * W + w
    weights = ((k * channels + c) * geometry.kernel[0] + r) * geometry.kernel[1] + s
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    return outputs[inside], pixels[inside], weights[inside]


# As an Algorithm


def misfit(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> str | None:
    return None


def pack(weight: Tensor, geometry: Geometry) -> list[Tensor]:
    return [weight]


pack_input_grad = pack


def forward(x: Tensor, packed: list[Tensor], geometry: Geometry, epilogue: Epilogue) -> Tensor:
    (weight,), size = packed, (x.shape[2], x.shape[3])
    y = matrix(weight.double(), geometry, size) @ x.double().flatten(1).t()  # (K P Q, N)
    return stored(epilogue.apply_(y.t().unflatten(1, (len(weight), *geometry.output_size(size)))), x)


def input_grad(g: Tensor, packed: list[Tensor], geometry: Geometry, size: Pair, mask: Tensor | None = None) -> Tensor:
    (weight,) = packed
    g = masked(g, mask)
    x_grad = matrix(weight.double(), geometry, size).t() @ g.double().flatten(1).t()  # (C H W, N)
    return stored(x_grad.t().unflatten(1, (weight.shape[1] * geometry.groups, *size)), g)


def weight_grad(x: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
    """Every entry of the matrix has the gradient g xᵀ, and a weight that of all its entries together."""
    shape = (g.shape[1], x.shape[1] // geometry.groups, *geometry.kernel)
    outputs, pixels, weights = entries(shape, geometry, (x.shape[2], x.shape[3]), x.device)
    grads = (g.double().flatten(1)[:, outputs] * x.double().flatten(1)[:, pixels]).sum(0)
    weight_grad = grads.new_zeros(shape).flatten().index_add_(0, weights, grads)
    return stored(weight_grad.view(shape), x)
