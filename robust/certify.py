"""Certified robustness: which images no change within eps can take from their class, proved by bounds on the logits.

CROWN-IBP (Zhang et al. 2020, arXiv 1906.06316) in linf. Interval arithmetic carries the box around an image through
the layers; then, from the logits back to the image, each ReLU is put between two lines, and what is left is a linear
function, whose least value over the box is known. It tells something of networks that were trained for it
(arXiv 1805.12514), and of others at small eps only.

A copy of the module runs its own code, on a tensor that knows its bounds and refuses every operation without a rule
here. The tensor itself has no values (it is on the meta device), so that what gets around the rules, such as a scripted
part, works on nothing and is seen to do so. Bounds are in float64, on what float32 makes of the network: each operation
adds the most that rounding can change there, n·u times the absolute values of the n that are summed (Higham, Accuracy
and Stability of Numerical Algorithms, 2002, section 3.1), which is traced back like any other change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robust.models.prepare import copied, has_hooks, is_compiled

MOST_VALUES = 2**18  # of the images bounded at once
MOST_PARAMETERS = 2**24  # of larger networks bounds say nothing
MOST_CLASSES = 100  # that bounds on the logits alone do not rule out
MOST_CROSSING = 0.5  # share of a ReLU's inputs that may have either sign, beyond which bounds say nothing
UNIT = torch.finfo(torch.float32).eps / 2  # u, the largest relative error of rounding to float32
# Room for algorithms that sum transformed values (Winograd's): a share of the largest logit, and so many times how far
# the logits are seen to be off at the corner of the box.
ROOM = 1e-4
TIMES = 10
ALIKE = 1e-2  # share of the largest logit, beyond which that is no rounding


class NoBounds(Exception):
    """Why a network, or these images, cannot be bounded."""


class Contradiction(NoBounds):
    """The network does what its bounds rule out: there is a fault in them, here or on other images."""


class Certifier:
    """Bounds the logits of one network, which is in eval mode and not random."""

    def __init__(self, module: nn.Module, rows: int = 64):
        """rows: images that the module is given at once, at most.

        NoBounds for a network that is too large, compiled, not in float32, or that hooks look into.
        """
        tensors = [*module.parameters(), *module.buffers()]
        if sum(tensor.numel() for tensor in tensors) > MOST_PARAMETERS:
            raise NoBounds("the network is too large")
        if any(map(is_compiled, module.modules())):
            raise NoBounds("the network is compiled")
        if has_hooks(module):
            raise NoBounds("the network has hooks")
        if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in tensors):
            raise NoBounds("the network is not in float32")
        self.module, self.rows = module, rows
        with _no_bounds("the network cannot be copied"):
            self._copy = copied(module)

    def certifies(self, x: Tensor, y: Tensor, eps: float, target: int | None = None) -> Tensor:
        """(N,) bool: whether every point of [0, 1] within eps in linf of x (N, C, H, W) is of class y (N,).

        target: prove only that none is of this class. NoBounds as for `margins`.
        """
        return self.margins(x, y, eps, target) > 0

    def margins(self, x: Tensor, y: Tensor, eps: float, target: int | None = None) -> Tensor:
        """(N,) lower bounds on logit y less the largest other (or the target's), within eps, less room for rounding.

        NoBounds where the network has a part without a rule, or the bounds are so wide that they say nothing;
        Contradiction where the network itself, at the corners of the boxes that they point to, does not keep to them.
        """
        rows = max(1, min(self.rows, MOST_VALUES // x[0].numel()))
        parts = zip(x.split(rows), y.split(rows), strict=True)
        return torch.cat([self._margins(some, labels, eps, target) for some, labels in parts])

    @torch.no_grad()
    def _margins(self, x: Tensor, y: Tensor, eps: float, target: int | None) -> Tensor:
        low, high = (x.double() - eps).clamp(min=0), (x.double() + eps).clamp(max=1)
        with _no_bounds("the network fails"):
            self._copy(x)  # so that what its code keeps for later, such as grids of this size, is of images
        image, logits = self._bounded((low + high) / 2, (high - low) / 2)
        size = (logits.middle.abs() + logits.radius).amax(1)
        if not bool(size.isfinite().all()):
            raise NoBounds("its bounds are not finite")
        room = ROOM * size
        # By intervals alone, which rule most classes out on some networks.
        least = (logits.middle - logits.radius).gather(1, y[:, None]) - (logits.middle + logits.radius)
        least.scatter_(1, y[:, None], math.inf)
        others = list(range(least.shape[1])) if target is None else [target]
        near = [other for other in others if not bool((least[:, other] > room).all())]
        if len(near) > MOST_CLASSES:
            raise NoBounds("too many classes may be the largest")
        worst, corner = torch.full_like(room, math.inf), x
        gap = worst.clone()  # between what the network says at the corners that the bounds point to, and the bounds
        ones = torch.eye(least.shape[1], dtype=torch.float64, device=y.device)
        for other in near:
            with _no_bounds("its bounds cannot be traced back"):
                bound, slopes = _trace_back(logits, image, ones[y] - ones[other])
            there = (image.middle - image.radius * slopes.sign()).to(x)
            said = self._say(there)
            margin = said.gather(1, y[:, None])[:, 0] - said[:, other]
            gap = torch.minimum(gap, torch.where(y == other, math.inf, margin - bound))
            least[:, other] = torch.maximum(least[:, other], bound.where(y != other, math.inf))
            lower = least[:, other] < worst
            worst = torch.where(lower, least[:, other], worst)
            corner = torch.where(lower[:, None, None, None], there, corner)
        room = torch.maximum(room, TIMES * self._off(corner, size))
        if not bool((gap >= -room).all()):
            raise Contradiction("the network does not keep to its bounds")
        return least[:, others].amin(1) - room

    def _say(self, corner: Tensor) -> Tensor:
        """(N, K) the logits of the network itself."""
        with _no_bounds("the network fails at the corner of a box"):
            return self.module(corner).double()

    def _off(self, corner: Tensor, size: Tensor) -> Tensor:
        """(N,) how far the network's logits, which are of this size (N,) in the box, are off those in float64."""
        _, exact = self._bounded(corner.double(), torch.zeros_like(corner, dtype=torch.float64))
        off = (self._say(corner) - exact.middle).abs().amax(1)
        if not bool((off <= ALIKE * size + exact.radius.amax(1)).all()):
            raise Contradiction("the network says something else than its copy")
        return off

    def _bounded(self, middle: Tensor, radius: Tensor) -> tuple[_Node, _Node]:
        """The image and the logits under bounds."""
        tape = _Tape()
        image = _Node(middle, radius, tape)
        with _Watch(tape), _no_bounds("its code takes no bounds"):
            logits = self._copy(_Bounded.of(image))
        if tape.fault:  # whatever the code did about it
            raise NoBounds(tape.fault)
        if not isinstance(logits, _Bounded) or logits.node.tape is not tape or logits.node.middle.ndim != 2:
            raise NoBounds("its code takes no bounds")
        return image, logits.node


@contextmanager
def _no_bounds(what: str) -> Iterator[None]:
    """NoBounds for whatever a user's module raises."""
    try:
        yield
    except (NoBounds, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise NoBounds(f"{what} ({type(error).__name__})") from error


@dataclass(eq=False)
class _Tape:
    """One pass under bounds."""

    nodes: list[_Node] = field(default_factory=list)  # in the order they are made
    fault: str = ""  # why nothing follows from it


@dataclass(eq=False)
class _Node:
    """Values between middle - radius and middle + radius, (N, ...) in float64, row by row.

    rounding: how much of the radius float32 itself may add here.
    sources: the nodes that they are computed from, each with what takes coefficients (N, ...) on these values to
    coefficients on the source's, and to what a lower bound of their sum changes by, (N,). Of what has none, the
    interval is all that is known.
    """

    middle: Tensor
    radius: Tensor
    tape: _Tape = field(repr=False)
    sources: Sequence[tuple[_Node, Callable[[Tensor], tuple[Tensor, Tensor | float]]]] = ()
    shared: bool = False  # with another tensor, which would change along with this one
    rounding: Tensor | float = 0.0

    @property
    def size(self) -> Tensor:
        """The most that the absolute values can be."""
        return self.middle.abs() + self.radius

    def __post_init__(self) -> None:
        self.tape.nodes.append(self)


def _trace_back(logits: _Node, image: _Node, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) lower bounds of sums of logits, weighted by (N, K); (N, C, H, W) their slopes at the image."""
    least = (coefficients * logits.middle).sum(1)
    of = {logits: coefficients}
    slopes = torch.zeros_like(image.middle)
    for node in reversed(logits.tape.nodes):
        here = of.pop(node, None)
        if here is None:
            continue
        unknown = node.rounding if node.sources else node.radius
        if isinstance(unknown, Tensor):
            least = least - (here.abs() * unknown).reshape(len(here), -1).sum(1)
        if node is image:
            slopes = here
        for source, back in node.sources:
            passed, change = back(here)
            least = least + change
            of[source] = of[source] + passed if source in of else passed
    return least, slopes


class _Bounded(Tensor):
    """What a module under bounds is given in place of images and activations. It has no values of its own."""

    node: _Node

    @staticmethod
    def of(node: _Node) -> _Bounded:
        bounded = Tensor._make_subclass(_Bounded, torch.empty(node.middle.shape, device="meta"))
        bounded.node = node
        return bounded

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TOLD:
            return _TOLD[func](args[0].node.middle)
        if func in _SHAPES:
            return super().__torch_function__(func, types, args, kwargs)
        try:
            rule = _RULES.get(func)
            if rule is None or "out" in kwargs:
                raise NoBounds(f"there is no rule for {getattr(func, '__name__', func)}")
            if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
                raise NoBounds("there is no rule for autocast")
            return rule(*args, **kwargs)
        except Exception as error:
            # The module may catch it, and take another way than it does with images.
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, _Bounded):
                    value.node.tape.fault = str(error) if isinstance(error, NoBounds) else type(error).__name__
            raise


class _Watch(TorchDispatchMode):
    """Sees every operation, and notes on the tape those on tensors without values: they got around the rules."""

    def __init__(self, tape: _Tape):
        super().__init__()
        self.tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch's compiler is imported, which takes two seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.detach.default:  # of which _make_subclass is one
            if any(isinstance(value, Tensor) and value.is_meta for value in tree_leaves((args, kwargs))):
                self.tape.fault = f"{func} gets around the rules"
        return func(*args, **(kwargs or {}))


def _node(value: Any) -> _Node:
    if not isinstance(value, _Bounded):
        raise NoBounds("there is no rule for weights that depend on the image")
    return value.node


def _constant(value: Any) -> Any:
    """As it enters arithmetic in float64."""
    if isinstance(value, _Bounded):
        raise NoBounds("there is no rule for products of two activations")
    # A copy, for the code may write into the tensor afterwards.
    return value.to(torch.float64, copy=True) if isinstance(value, Tensor) else value


def _linear(
    node: _Node,
    function: Callable[[Tensor], Tensor],
    spread: Callable[[Tensor], Tensor] | None = None,
    terms: int = 0,
    added: Tensor | float | None = None,
    view: bool = False,
) -> _Bounded:
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
    rounding: Tensor | float = 0.0
    if terms:
        rounding = terms * UNIT * (widened(node.size) + (constant.abs() if added is None else added))
        radius = radius + rounding
    if len(middle) != len(node.middle):
        raise NoBounds("there is no rule for what mixes images")

    def back(coefficients: Tensor) -> tuple[Tensor, float]:
        # Of a sum: for gradients of what is no scalar, autograd imports a library that takes half a second.
        with torch.enable_grad():
            weighted = (through * coefficients).sum()
        return torch.autograd.grad(weighted, point, retain_graph=True)[0], 0.0

    node.shared = node.shared or view
    return _Bounded.of(_Node(middle, radius, node.tape, [(node, back)], view, rounding))


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

    return _written(x, _Node(middle, radius, node.tape, [(node, back)]), inplace)


def _monotone(function: Callable[..., Tensor]) -> Callable[..., _Bounded]:
    """Of what rises with each of its inputs, row by row, only the interval is known."""

    def rule(x, *args, **kwargs):
        node = _node(x)
        low = function(node.middle - node.radius, *args, **kwargs)
        high = function(node.middle + node.radius, *args, **kwargs)
        rounding = 8 * UNIT * torch.maximum(low.abs(), high.abs())  # of libraries' exponentials, a few units
        return _Bounded.of(_Node((low + high) / 2, (high - low) / 2 + rounding, node.tape))

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


def _sum(x, y, *, inplace: bool = False, sign: float = 1.0):
    """x + sign * y, of which one at least is bounded."""
    _check_writable(x, inplace)
    if isinstance(x, _Bounded) and isinstance(y, _Bounded):
        a, b = x.node, y.node
        if a.middle.shape != b.middle.shape or a.tape is not b.tape:
            raise NoBounds("there is no rule for sums of activations of two shapes or passes")
        sources = [(a, lambda c: (c, 0.0)), (b, lambda c: (sign * c, 0.0))]
        rounding = UNIT * (a.size + b.size)
        radius = a.radius + b.radius + rounding
        node = _Node(a.middle + sign * b.middle, radius, a.tape, sources, rounding=rounding)
        return _written(x, node, inplace)
    if isinstance(x, _Bounded):
        y = _constant(y)
        return _scaled(x, lambda z: z + sign * y, lambda r: r, inplace)
    x = _constant(x)
    return _scaled(y, lambda z: x + sign * z, lambda r: r)


def _product(x, y, *, inplace: bool = False):
    _check_writable(x, inplace)
    if not isinstance(x, _Bounded):
        x, y = y, x
    y = _constant(y)
    return _scaled(x, lambda z: z * y, lambda r: r * abs(y), inplace)


def _quotient(x, y, *, inplace: bool = False):
    _node(x)
    y = _constant(y)
    return _scaled(x, lambda z: z / y, lambda r: r / abs(y), inplace)


def _scaled(x: _Bounded, function, spread, inplace: bool = False) -> _Bounded:
    """Value by value, with constants that broadcast to the shape of x."""
    made = _linear(x.node, function, spread, terms=3)  # a GPU divides by multiplying with the inverse
    if made.node.middle.shape != x.node.middle.shape:
        raise NoBounds("there is no rule for what is repeated")
    return _written(x, made.node, inplace)


def _plain(function: Callable[..., Tensor], view: bool = False) -> Callable[..., _Bounded]:
    """Of what picks values, row by row."""

    def rule(x, *args, **kwargs):
        return _linear(_node(x), lambda z: function(z, *args, **kwargs), view=view)

    return rule


def _pool(function: Callable[..., Tensor]) -> Callable[..., _Bounded]:
    """Of averages over windows."""

    def rule(x, *args, **kwargs):
        node = _node(x)
        terms = node.middle[0, 0].numel() + 1  # at most: of a channel, and the division
        return _linear(node, lambda z: function(z, *args, **kwargs), terms=terms)

    return rule


def _keep_rows(function: Callable[..., Tensor]) -> Callable[..., _Bounded]:
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


def _check_dims(node: _Node, dims: Sequence[Any]) -> None:
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
    return _Bounded.of(_Node(node.middle, node.radius, node.tape, [(node, lambda c: (c, 0.0))], shared=True))


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


_RULES = _rules()
# Asking for these gives no value away.
_SHAPES = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "layout", "requires_grad", "is_sparse")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, torch.is_floating_point),
}
# Of the tensor that a bounded one stands for.
_TOLD: dict[Any, Callable[[Tensor], Any]] = {
    getattr(Tensor, name).__get__: attrgetter(name) for name in ("device", "is_cuda", "is_cpu", "is_meta")
}
