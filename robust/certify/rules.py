"""What each operation does to bounds: its interval, how far float32 is off there, and the way back along it.

Linear functions are exact, with their rounding; a ReLU is put between two lines; of what else rises with its inputs,
only the interval is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from robust.certify.bounds import Bounded, NoBounds, Node, Rule, rounding

MOST_CROSSING = 0.5  # share of a ReLU's inputs that may have either sign, beyond which bounds say nothing


def _node(value: Any) -> Node:
    if not isinstance(value, Bounded):
        raise NoBounds("there is no rule for weights that depend on the image")
    return value.node


def _constant(value: Any) -> Any:
    """As it enters arithmetic in float64."""
    if isinstance(value, Bounded):
        raise NoBounds("there is no rule for products of two activations")
    # A copy, for the code may write into the tensor afterwards.
    return value.to(torch.float64, copy=True) if isinstance(value, Tensor) else value


def _linear(
    node: Node,
    function: Callable[[Tensor], Tensor],
    spread: Callable[[Tensor], Tensor] | None = None,
    terms: int = 0,
    added: Tensor | float | None = None,
    view: bool = False,
) -> Bounded:
    """A linear function plus a constant, row by row.

    spread: the same with the absolute values of its coefficients, and without the constant; None where no coefficient
        is negative.
    terms: how many values are summed for each, constants and factors included; 0 where none is computed.
    added: the absolute values of all constants, where they are more than that of their sum.
    """
    point = node.middle.detach().requires_grad_()
    with torch.enable_grad():
        through = function(point)
    middle = through.detach()
    constant = function(torch.zeros_like(node.radius))
    widened = spread or (lambda r: function(r) - constant)
    radius: Tensor = widened(node.radius)
    off: Tensor | float = 0.0
    if terms:
        off = rounding(terms, widened(node.size) + (constant.abs() if added is None else added))
        radius = radius + off
    if len(middle) != len(node.middle):
        raise NoBounds("there is no rule for what mixes images")

    def back(coefficients: Tensor) -> tuple[Tensor, float]:
        # Of a sum: for gradients of what is no scalar, autograd imports a library that takes half a second.
        with torch.enable_grad():
            weighted = (through * coefficients).sum()
        return torch.autograd.grad(weighted, point, retain_graph=True)[0], 0.0

    node.shared = node.shared or view
    return Bounded.of(Node(middle, radius, node.tape, [(node, back)], view, off))


def _conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    weight, bias = _constant(weight), _constant(bias)
    if _node(x).middle.ndim != 4:
        raise NoBounds("there is no rule for a convolution of one image")
    how = (stride, padding, dilation, groups)
    return _linear(
        _node(x),
        lambda z: F.conv2d(z, weight, bias, *how),
        lambda r: F.conv2d(r, weight.abs(), None, *how),
        terms=weight[0].numel() + 1,
    )


def _dense(x, weight, bias=None):
    weight, bias = _constant(weight), _constant(bias)
    return _linear(
        _node(x),
        lambda z: F.linear(z, weight, bias),
        lambda r: F.linear(r, weight.abs()),
        terms=weight.shape[-1] + 1,
    )


def _batch_norm(x, mean, variance, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training or mean is None:
        raise NoBounds("there is no rule for statistics of a batch")
    mean, variance, weight, bias = map(_constant, (mean, variance, weight, bias))
    positive = None if weight is None else weight.abs()

    def normalised(z: Tensor, mean: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.batch_norm(z, mean, variance, weight, bias, False, momentum, eps)

    none = torch.zeros_like(mean)
    size = None if bias is None else bias.abs()
    return _linear(
        _node(x),
        lambda z: normalised(z, mean, weight, bias),
        lambda r: normalised(r, none, positive, None),
        # The deviation with eps and its inverse (of which a GPU's is off by two units), then as factor of the mean and
        # of the input; the weight, the product and the bias.
        terms=10,
        added=normalised(torch.zeros_like(_node(x).radius), -mean.abs(), positive, size),
    )


def _relu(x, inplace=False):
    node = _node(x)
    low, high = node.middle - node.radius, node.middle + node.radius
    crosses = (low < 0) & (high > 0)
    if crosses.double().mean() > MOST_CROSSING:
        raise NoBounds("its bounds are too wide to say anything")
    passes = (low >= 0).double()
    # Above: the chord from (low, 0) to (high, high). Below: 0 or the input, whichever leaves the smaller triangle.
    above = torch.where(crosses, high / (high - low).clamp(min=torch.finfo(high.dtype).tiny), passes)
    below = torch.where(crosses, (high > -low).double(), passes)
    low, high = low.clamp(min=0), high.clamp(min=0)
    middle, radius = (low + high) / 2, (high - low) / 2
    # At the middle of the input the chord lies at the middle of the output, and the line below it under that.
    drop = torch.where(crosses, below * node.middle - middle, 0.0)

    def back(coefficients: Tensor) -> tuple[Tensor, Tensor]:
        change = (coefficients.clamp(min=0) * drop).flatten(1).sum(1)
        return coefficients * torch.where(coefficients > 0, below, above), change

    return _written(x, Node(middle, radius, node.tape, [(node, back)]), inplace)


def _monotone(function: Callable[..., Tensor]) -> Rule:
    """Of what rises with each of its inputs, row by row, only the interval is known."""

    def rule(x, *args, **kwargs):
        node = _node(x)
        low = function(node.middle - node.radius, *args, **kwargs)
        high = function(node.middle + node.radius, *args, **kwargs)
        off = rounding(8, torch.maximum(low.abs(), high.abs()))  # of libraries' exponentials, a few units
        return Bounded.of(Node((low + high) / 2, (high - low) / 2 + off, node.tape))

    return rule


def _check_writable(x: Any, inplace: bool) -> None:
    if inplace and not isinstance(x, Bounded):
        raise NoBounds("there is no rule for writing into a constant")


def _written(x: Bounded, node: Node, inplace: bool) -> Bounded:
    """The new node, in place of what x was where that is asked for."""
    if not inplace:
        return Bounded.of(node)
    if x.node.shared:
        raise NoBounds("there is no rule for writing into a part of a tensor")
    x.node = node
    return x


def _sum(x, y, *, inplace: bool = False, sign: float = 1.0):
    """x + sign * y, of which one at least is bounded."""
    _check_writable(x, inplace)
    if isinstance(x, Bounded) and isinstance(y, Bounded):
        a, b = x.node, y.node
        if a.middle.shape != b.middle.shape or a.tape is not b.tape:
            raise NoBounds("there is no rule for sums of activations of two shapes or passes")
        sources = [(a, lambda c: (c, 0.0)), (b, lambda c: (sign * c, 0.0))]
        off = rounding(1, a.size + b.size)
        radius = a.radius + b.radius + off
        node = Node(a.middle + sign * b.middle, radius, a.tape, sources, rounding=off)
        return _written(x, node, inplace)
    if isinstance(x, Bounded):
        y = _constant(y)
        return _scaled(x, lambda z: z + sign * y, lambda r: r, inplace)
    x = _constant(x)
    return _scaled(y, lambda z: x + sign * z, lambda r: r)


def _product(x, y, *, inplace: bool = False):
    _check_writable(x, inplace)
    if not isinstance(x, Bounded):
        x, y = y, x
    y = _constant(y)
    return _scaled(x, lambda z: z * y, lambda r: r * abs(y), inplace)


def _quotient(x, y, *, inplace: bool = False):
    _node(x)
    y = _constant(y)
    return _scaled(x, lambda z: z / y, lambda r: r / abs(y), inplace)


def _scaled(x: Bounded, function, spread, inplace: bool = False) -> Bounded:
    """Value by value, with constants that broadcast to the shape of x."""
    made = _linear(x.node, function, spread, terms=3)  # a GPU divides by multiplying with the inverse
    if made.node.middle.shape != x.node.middle.shape:
        raise NoBounds("there is no rule for what is repeated")
    return _written(x, made.node, inplace)


def _plain(function: Callable[..., Tensor], view: bool = False) -> Rule:
    """Of what picks values, row by row."""

    def rule(x, *args, **kwargs):
        return _linear(_node(x), lambda z: function(z, *args, **kwargs), view=view)

    return rule


def _pool(function: Callable[..., Tensor]) -> Rule:
    """Of averages over windows."""

    def rule(x, *args, **kwargs):
        node = _node(x)
        terms = node.middle[0, 0].numel() + 1  # at most: of a channel, and the division
        return _linear(node, lambda z: function(z, *args, **kwargs), terms=terms)

    return rule


def _keep_rows(function: Callable[..., Tensor]) -> Rule:
    """As `_plain`, of what is told dimensions, which must not be the images'."""

    def rule(x, *dims):
        _check_dims(_node(x), dims)
        return _plain(function, view=True)(x, *dims)

    return rule


def _mean(x, dim, keepdim=False):
    node, dims = _node(x), tuple(dim) if isinstance(dim, Sequence) else (dim,)
    _check_dims(node, dims)
    terms = math.prod(node.middle.shape[dim] for dim in dims) + 1  # and the division
    return _linear(node, lambda z: z.mean(dims, keepdim), terms=terms)


def _check_dims(node: Node, dims: Sequence[Any]) -> None:
    if any(not isinstance(dim, int) or dim % node.middle.ndim == 0 for dim in dims):
        raise NoBounds("there is no rule for what mixes images")


def _avg_pool2d(x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True):
    return _pool(F.avg_pool2d)(x, kernel_size, stride, padding, ceil_mode, count_include_pad)


def _pad(x, pad, mode="constant", value=None):
    if len(pad) > 2 * (_node(x).middle.ndim - 1):
        raise NoBounds("there is no rule for what mixes images")
    return _plain(F.pad)(x, pad, mode, value and torch.tensor(value).item())  # as float32 has it


def _permute(x, *dims):
    order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    if order[0] != 0:
        raise NoBounds("there is no rule for what mixes images")
    return _plain(Tensor.permute, view=True)(x, *order)


def _reshape(x, *shape):
    """Rows stay what they are as long as there are as many."""
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return _linear(_node(x), lambda z: z.reshape(*sizes), view=True)


def _flatten(x, start_dim=0, end_dim=-1):
    return _reshape(x, *_node(x).middle.flatten(start_dim, end_dim).shape)


def _getitem(x, index):
    picks = index if isinstance(index, tuple) else (index,)
    # After an ellipsis, too few to reach the images' dimension.
    keeps = picks[0] == slice(None) or (picks[0] is Ellipsis and len(picks) <= _node(x).middle.ndim)
    if not keeps or not all(type(pick) in (int, slice, EllipsisType) for pick in picks):
        raise NoBounds("there is no rule for picking images")
    return _plain(Tensor.__getitem__, view=True)(x, index)


def _same(x):
    """What changes no value."""
    node = _node(x)
    node.shared = True
    return Bounded.of(Node(node.middle, node.radius, node.tape, [(node, lambda c: (c, 0.0))], shared=True))


def _to(x, *args, **kwargs):
    """To another device or memory format: the values stay what they are. In another dtype they would not."""
    dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype | Tensor)]
    if any(value is not torch.float32 for value in dtypes):
        raise NoBounds("there is no rule for another dtype")
    return _same(x)


def _contiguous(x, memory_format=torch.contiguous_format):
    return _same(x)


def _dropout(x, p=0.5, training=True, inplace=False):
    if training:
        raise NoBounds("there is no rule for dropout in training mode")
    return _same(x)


def _rules() -> dict[Any, Rule]:
    rules: dict[Any, Rule] = {}

    def give(rule: Rule, *functions: Any) -> None:
        rules.update(dict.fromkeys(functions, rule))

    give(_conv2d, F.conv2d)
    give(_dense, F.linear)
    give(_batch_norm, F.batch_norm)
    give(_relu, F.relu, torch.relu, Tensor.relu)
    give(partial(_relu, inplace=True), torch.relu_, Tensor.relu_)
    give(_sum, torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
    give(partial(_sum, inplace=True), Tensor.add_, Tensor.__iadd__)
    give(partial(_sum, sign=-1.0), torch.sub, Tensor.sub, Tensor.__sub__)
    give(partial(_sum, sign=-1.0, inplace=True), Tensor.sub_, Tensor.__isub__)
    give(lambda x, y: _sum(y, x, sign=-1.0), Tensor.__rsub__)
    give(_product, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
    give(partial(_product, inplace=True), Tensor.mul_, Tensor.__imul__)
    give(_quotient, torch.div, Tensor.div, Tensor.__truediv__)
    give(partial(_quotient, inplace=True), Tensor.div_, Tensor.__itruediv__)
    rising: list[Any] = [F.max_pool2d, torch.sigmoid, Tensor.sigmoid, torch.tanh, Tensor.tanh]
    turning: list[Any] = [torch.transpose, Tensor.transpose, torch.squeeze, Tensor.squeeze, Tensor.unsqueeze]
    rules |= {function: _monotone(function) for function in rising}
    rules |= {function: _keep_rows(function) for function in turning}
    give(_mean, torch.mean, Tensor.mean)
    give(_pad, F.pad)
    give(_avg_pool2d, F.avg_pool2d)
    give(_pool(F.adaptive_avg_pool2d), F.adaptive_avg_pool2d)
    give(_flatten, torch.flatten, Tensor.flatten)
    give(_reshape, torch.reshape, Tensor.reshape, Tensor.view)
    give(_permute, Tensor.permute)
    give(_getitem, Tensor.__getitem__)
    give(_same, Tensor.clone, Tensor.detach, Tensor.float)
    give(_contiguous, Tensor.contiguous)
    give(_to, Tensor.to)
    give(_dropout, F.dropout)
    return rules


RULES = _rules()
