"""Certified robustness: which images no change within eps can take from their class, proved by bounds on the logits.

CROWN-IBP (Zhang et al. 2020, arXiv 1906.06316) in linf. Interval arithmetic carries the box around an image through
the layers; then, from the logits back to the image, each ReLU is put between two lines, and what is left is a linear
function, whose least value over the box is known. It tells something of networks that were trained for it
(arXiv 1805.12514), and of others at small eps only.

The module's own code runs, on a tensor that knows its bounds and refuses every operation without a rule here. What
gets around that, such as a scripted part, finds nothing but NaN in the tensor, which proves nothing either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust.models.prepare import copied

MOST_VALUES = 2**18  # of the images bounded at once
MOST_PARAMETERS = 2**24  # of larger networks bounds say nothing
MOST_CLASSES = 100  # that bounds on the logits alone do not rule out
MOST_CROSSING = 0.5  # share of a ReLU's inputs that may have either sign, beyond which bounds say nothing
# What float32 may make of the network that is bounded in float64, as a share of the largest logit.
ROUNDING = 1e-4


class NoBounds(Exception):
    """Why a network, or these images, cannot be bounded."""


class Certifier:
    """Bounds the logits of one network, which is in eval mode and not random."""

    def __init__(self, module: nn.Module, rows: int = 64):
        """rows: images that the module is given at once, at most.

        NoBounds for a network that is too large, compiled, or neither in float32 nor in float64.
        """
        tensors = [*module.parameters(), *module.buffers()]
        if sum(tensor.numel() for tensor in tensors) > MOST_PARAMETERS:
            raise NoBounds("the network is too large")
        if any(map(_is_compiled, module.modules())):
            raise NoBounds("the network is compiled")
        if any(t.is_floating_point() and t.dtype not in (torch.float32, torch.float64) for t in tensors):
            raise NoBounds("the network is not in float32")
        self.module, self.rows = module, rows
        with _no_bounds("the network cannot be copied"):
            self._exact = copied(module).double()

    def certifies(self, x: Tensor, y: Tensor, eps: float, target: int | None = None) -> Tensor:
        """(N,) bool: whether every point of [0, 1] within eps in linf of x (N, C, H, W) is of class y (N,).

        target: prove only that none is of this class. NoBounds as for `margins`.
        """
        return self.margins(x, y, eps, target) > 0

    def margins(self, x: Tensor, y: Tensor, eps: float, target: int | None = None) -> Tensor:
        """(N,) lower bounds on logit y less the largest other (or the target's), within eps, less room for rounding.

        NoBounds where the network has a part without a rule, where the bounds are so wide that they say nothing, or
        where the network does not keep to them.
        """
        rows = max(1, min(self.rows, MOST_VALUES // x[0].numel()))
        parts = zip(x.split(rows), y.split(rows), strict=True)
        return torch.cat([self._margins(some, labels, eps, target) for some, labels in parts])

    @torch.no_grad()
    def _margins(self, x: Tensor, y: Tensor, eps: float, target: int | None) -> Tensor:
        low, high = (x.double() - eps).clamp(min=0), (x.double() + eps).clamp(max=1)
        image = _Node((low + high) / 2, (high - low) / 2, tape=[])
        with _no_bounds("its code takes no bounds"):
            said = self._exact(_Bounded.of(image))
        if not isinstance(said, _Bounded) or said.node.middle.ndim != 2:
            raise NoBounds("its code takes no bounds")
        logits = said.node
        others = list(range(logits.middle.shape[1])) if target is None else [target]
        least, slopes = _least(logits, image, y, others)
        room = ROUNDING * (logits.middle.abs() + logits.radius).amax(1)
        # The network itself, at the corners that the bounds point to.
        with _no_bounds("the network fails at the corner of a box"):
            said = self.module((image.middle - image.radius * slopes.sign()).to(x)).double()
        above = said.gather(1, y[:, None]) - said[:, others]
        above[y[:, None] == torch.tensor(others, device=y.device)] = math.inf
        if not bool((above.amin(1) >= least - room).all()):
            raise NoBounds("the network does not keep to its bounds")
        return least - room


@contextmanager
def _no_bounds(what: str) -> Iterator[None]:
    """NoBounds for whatever a user's module raises."""
    try:
        yield
    except (NoBounds, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise NoBounds(f"{what} ({type(error).__name__})") from error


def _is_compiled(part: nn.Module) -> bool:
    return (
        isinstance(part, torch.jit.ScriptModule)
        or hasattr(part, "_orig_mod")
        or getattr(part, "_compiled_call_impl", None) is not None
    )


@dataclass(eq=False)
class _Node:
    """Values between middle - radius and middle + radius, (N, ...) in float64, row by row.

    sources: the nodes that they are computed from, each with what takes coefficients (N, ...) on these values to
    coefficients on the source's, and to what a lower bound of their sum changes by, (N,). Of what has none, the
    interval is all that is known.
    """

    middle: Tensor
    radius: Tensor
    tape: list[_Node] = field(repr=False)  # all nodes, in the order they are made
    sources: Sequence[tuple[_Node, Callable[[Tensor], tuple[Tensor, Tensor | float]]]] = ()
    shared: bool = False  # with another tensor, which would change along with this one

    def __post_init__(self) -> None:
        self.tape.append(self)


def _least(logits: _Node, image: _Node, y: Tensor, others: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(N,) lower bound of logit y less the largest of the other classes; (N, C, H, W) slopes of it at the image."""
    low, high = logits.middle - logits.radius, logits.middle + logits.radius
    apart = low.gather(1, y[:, None]) - high
    apart.scatter_(1, y[:, None], math.inf)
    ruled_out = (apart > 0).all(0)  # for every image
    least = apart.where(ruled_out, math.inf)[:, others].amin(1)
    near = [other for other in others if not ruled_out[other]]
    if len(near) > MOST_CLASSES:
        raise NoBounds("too many classes may be the largest")
    slopes = torch.zeros_like(image.middle)
    ones = torch.eye(low.shape[1], dtype=torch.float64, device=y.device)
    for other in near:
        bound, slope = _trace_back(logits, image, ones[y] - ones[other])
        bound = torch.maximum(bound, apart[:, other])
        lower = (y != other) & ~(bound >= least)  # NaN is no bound
        least = torch.where(lower, bound, least)
        slopes = torch.where(lower[:, None, None, None], slope, slopes)
    return least, slopes


def _trace_back(logits: _Node, image: _Node, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) lower bounds of sums of logits, weighted by (N, K); (N, C, H, W) their slopes at the image."""
    least = (coefficients * logits.middle).sum(1)
    of = {logits: coefficients}
    slopes = torch.zeros_like(image.middle)
    for node in reversed(logits.tape):
        here = of.pop(node, None)
        if here is None:
            continue
        if not node.sources:
            least = least - (here.abs() * node.radius).flatten(1).sum(1)
        if node is image:
            slopes = here
        for source, back in node.sources:
            passed, change = back(here)
            least = least + change
            of[source] = of[source] + passed if source in of else passed
    return least, slopes


class _Bounded(Tensor):
    """What a module under bounds is given in place of images and activations. Its own values are NaN."""

    node: _Node

    @staticmethod
    def of(node: _Node) -> _Bounded:
        nothing = torch.full((), math.nan, dtype=torch.float64, device=node.middle.device)
        bounded = Tensor._make_subclass(_Bounded, nothing.expand(node.middle.shape))
        bounded.node = node
        return bounded

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SHAPES:
            return super().__torch_function__(func, types, args, kwargs or {})
        rule = _RULES.get(func)
        if rule is None or "out" in (kwargs or {}):
            name = getattr(func, "__name__", str(func))
            raise NoBounds(f"there is no rule for {name}")
        return rule(*args, **(kwargs or {}))


def _node(value: Any) -> _Node:
    if not isinstance(value, _Bounded):
        raise NoBounds("there is no rule for weights that depend on the image")
    return value.node


def _constant(value: Any) -> Any:
    if isinstance(value, _Bounded):
        raise NoBounds("there is no rule for products of two activations")
    return value


def _linear(
    node: _Node,
    function: Callable[[Tensor], Tensor],
    spread: Callable[[Tensor], Tensor] | None = None,
    view: bool = False,
) -> _Bounded:
    """A linear function plus a constant, row by row. spread: the same with the absolute values of its coefficients,
    and without the constant; None where no coefficient is negative."""
    point = node.middle.detach().requires_grad_()
    with torch.enable_grad():
        through = function(point)
    middle = through.detach()
    if spread is None:
        radius = function(node.radius) - function(torch.zeros_like(node.radius))
    else:
        radius = spread(node.radius)
    if len(middle) != len(node.middle):
        raise NoBounds("there is no rule for what mixes images")

    def back(coefficients: Tensor) -> tuple[Tensor, float]:
        # Of a sum: for gradients of what is no scalar, autograd imports a library that takes half a second.
        with torch.enable_grad():
            weighted = (through * coefficients).sum()
        return torch.autograd.grad(weighted, point, retain_graph=True)[0], 0.0

    node.shared = node.shared or view
    return _Bounded.of(_Node(middle, radius, node.tape, [(node, back)], shared=view))


def _conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    _constant(weight), _constant(bias)
    how = (stride, padding, dilation, groups)
    return _linear(
        _node(x),
        lambda z: F.conv2d(z, weight, bias, *how),
        lambda r: F.conv2d(r, weight.abs(), None, *how),
    )


def _dense(x, weight, bias=None):
    _constant(weight), _constant(bias)
    return _linear(_node(x), lambda z: F.linear(z, weight, bias), lambda r: F.linear(r, weight.abs()))


def _batch_norm(x, mean, variance, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training or mean is None:
        raise NoBounds("there is no rule for statistics of a batch")
    positive = None if weight is None else weight.abs()
    return _linear(
        _node(x),
        lambda z: F.batch_norm(z, mean, variance, weight, bias, False, momentum, eps),
        lambda r: F.batch_norm(r, torch.zeros_like(mean), variance, positive, None, False, momentum, eps),
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

    return _written(x, _Node(middle, radius, node.tape, [(node, back)]), inplace)


def _monotone(function: Callable[..., Tensor]) -> Callable[..., _Bounded]:
    """Of what rises with each of its inputs, row by row, only the interval is known."""

    def rule(x, *args, **kwargs):
        node = _node(x)
        low = function(node.middle - node.radius, *args, **kwargs)
        high = function(node.middle + node.radius, *args, **kwargs)
        return _Bounded.of(_Node((low + high) / 2, (high - low) / 2, node.tape))

    return rule


def _check_writable(x: Any, inplace: bool) -> None:
    if inplace and not isinstance(x, _Bounded):
        raise NoBounds("there is no rule for writing into a constant")


def _written(x: _Bounded, node: _Node, inplace: bool) -> _Bounded:
    """The new node, in place of what x was where that is asked for."""
    if not inplace:
        return _Bounded.of(node)
    if x.node.shared:
        raise NoBounds("there is no rule for writing into a part of a tensor")
    x.node = node
    return x


def _sum(x, y, inplace: bool = False, sign: float = 1.0):
    """x + sign * y, of which one at least is bounded."""
    _check_writable(x, inplace)
    if isinstance(x, _Bounded) and isinstance(y, _Bounded):
        a, b = x.node, y.node
        if a.middle.shape != b.middle.shape:
            raise NoBounds("there is no rule for sums of activations of two shapes")
        sources = [(a, lambda c: (c, 0.0)), (b, lambda c: (sign * c, 0.0))]
        return _written(x, _Node(a.middle + sign * b.middle, a.radius + b.radius, a.tape, sources), inplace)
    if isinstance(x, _Bounded):
        return _scaled(x, lambda z: z + sign * y, lambda r: r, inplace)
    return _scaled(y, lambda z: x + sign * z, lambda r: r)


def _product(x, y, inplace: bool = False):
    _check_writable(x, inplace)
    if not isinstance(x, _Bounded):
        x, y = y, x
    _constant(y)
    return _scaled(x, lambda z: z * y, lambda r: r * abs(y), inplace)


def _quotient(x, y, inplace: bool = False):
    _node(x), _constant(y)
    return _scaled(x, lambda z: z / y, lambda r: r / abs(y), inplace)


def _scaled(x: _Bounded, function, spread, inplace: bool = False) -> _Bounded:
    """Value by value, with constants that broadcast to the shape of x."""
    made = _linear(x.node, function, spread)
    if made.node.middle.shape != x.node.middle.shape:
        raise NoBounds("there is no rule for what is repeated")
    return _written(x, made.node, inplace)


def _plain(function: Callable[..., Tensor], view: bool = False) -> Callable[..., _Bounded]:
    """Of what picks or averages values, row by row."""

    def rule(x, *args, **kwargs):
        return _linear(_node(x), lambda z: function(z, *args, **kwargs), view=view)

    return rule


def _keep_rows(function: Callable[..., Tensor], dims: Callable[..., Any], view: bool = True) -> Callable[..., _Bounded]:
    """As `_plain`, of what is told dimensions, which must not be the images'."""

    def rule(x, *args, **kwargs):
        node = _node(x)
        named = dims(*args, **kwargs)
        named = named if isinstance(named, Sequence) else [named]
        if any(not isinstance(dim, int) or dim % node.middle.ndim == 0 for dim in named):
            raise NoBounds("there is no rule for what mixes images")
        return _plain(function, view)(x, *args, **kwargs)

    return rule


def _pad(x, pad, mode="constant", value=None):
    if len(pad) > 2 * (_node(x).middle.ndim - 1):
        raise NoBounds("there is no rule for what mixes images")
    return _plain(F.pad)(x, pad, mode, value)


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
    """What changes no value, or takes it to float32 and back."""
    node = _node(x)
    node.shared = True
    return _Bounded.of(_Node(node.middle, node.radius, node.tape, [(node, lambda c: (c, 0.0))], shared=True))


def _to(x, *args, **kwargs):
    """To another device or memory format: the values stay what they are. To a smaller dtype they would not."""
    dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype | Tensor)]
    if any(value not in (torch.float32, torch.float64) for value in dtypes):
        raise NoBounds("there is no rule for another dtype")
    return _same(x)


def _contiguous(x, memory_format=torch.contiguous_format):
    return _same(x)


def _dropout(x, p=0.5, training=True, inplace=False):
    if training:
        raise NoBounds("there is no rule for dropout in training mode")
    return _same(x)


def _rules() -> dict[Any, Callable[..., Any]]:
    rules: dict[Any, Callable[..., Any]] = {}

    def give(rule: Callable[..., Any], *functions: Any) -> None:
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
    plain: list[Any] = [F.avg_pool2d, F.adaptive_avg_pool2d]
    rising: list[Any] = [F.max_pool2d, torch.sigmoid, Tensor.sigmoid, torch.tanh, Tensor.tanh]
    turning: list[Any] = [torch.transpose, Tensor.transpose, torch.squeeze, Tensor.squeeze, Tensor.unsqueeze]
    means: list[Any] = [torch.mean, Tensor.mean]
    rules |= {function: _plain(function) for function in plain}
    rules |= {function: _monotone(function) for function in rising}
    rules |= {function: _keep_rows(function, lambda *dims: dims) for function in turning}
    rules |= {function: _keep_rows(function, lambda dim, keepdim=False: dim, view=False) for function in means}
    give(_pad, F.pad)
    give(_flatten, torch.flatten, Tensor.flatten)
    give(_reshape, torch.reshape, Tensor.reshape, Tensor.view)
    give(_permute, Tensor.permute)
    give(_getitem, Tensor.__getitem__)
    give(_same, Tensor.clone, Tensor.detach, Tensor.float, Tensor.double)
    give(_contiguous, Tensor.contiguous)
    give(_to, Tensor.to)
    give(_dropout, F.dropout)
    return rules


_RULES = _rules()
# Asking for these gives no value away.
_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_sparse", "is_quantized")
_SHAPES = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__),
}
