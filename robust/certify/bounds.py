"""A pass of a network's own code over boxes: a tensor that knows its bounds, and the tape to trace them back along.

The tensor itself has no values (it is on the meta device), so that what gets around the rules, such as a scripted
part, works on nothing and is seen to do so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Rule = Callable[..., "Bounded"]  # in place of a function of torch, with its arguments

UNIT = torch.finfo(torch.float32).eps / 2  # u, the largest relative error of rounding to float32
LOST = 2 * torch.finfo(torch.float32).tiny  # of a product and a sum, at most, where they underflow


class NoBounds(Exception):
    """Why a network, or these images, cannot be bounded."""


@contextmanager
def no_bounds(what: str) -> Iterator[None]:
    """NoBounds for whatever a user's module raises."""
    try:
        yield
    except (NoBounds, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise NoBounds(f"{what} ({type(error).__name__})") from error


@dataclass(eq=False)
class Tape:
    """One pass under bounds."""

    rules: Mapping[Any, Rule]
    nodes: list[Node] = field(default_factory=list)  # in the order they are made
    fault: str = ""  # why nothing follows from it


@dataclass(eq=False)
class Node:
    """Values between middle - radius and middle + radius, (N, ...) in float64, row by row.

    rounding: how much of the radius float32 itself may add here.
    sources: the nodes that they are computed from, each with what takes coefficients (N, ...) on these values to
    coefficients on the source's, and to what a lower bound of their sum changes by, (N,). Of what has none, the
    interval is all that is known.
    """

    middle: Tensor
    radius: Tensor
    tape: Tape = field(repr=False)
    sources: Sequence[tuple[Node, Callable[[Tensor], tuple[Tensor, Tensor | float]]]] = ()
    shared: bool = False  # with another tensor, which would change along with this one
    rounding: Tensor | float = 0.0

    def __post_init__(self) -> None:
        self.tape.nodes.append(self)

    @property
    def size(self) -> Tensor:
        """The most that the absolute values can be."""
        return self.middle.abs() + self.radius


def rounding(terms: int, size: Tensor) -> Tensor:
    """How far float32 may be off sums of so many terms, whose absolute values sum up to `size`.

    NoBounds where the sums may overflow.
    """
    if not bool((size <= torch.finfo(torch.float32).max).all()):
        raise NoBounds("its values may be too large for float32")
    return terms * (UNIT * size + LOST)


def trace_back(logits: Node, image: Node, coefficients: Tensor) -> tuple[Tensor, Tensor]:
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


class Bounded(Tensor):
    """What a module under bounds is given in place of images and activations. It has no values of its own."""

    node: Node

    @staticmethod
    def of(node: Node) -> Bounded:
        bounded = Tensor._make_subclass(Bounded, torch.empty(node.middle.shape, device="meta"))
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
            rule = next(_bounded_among(args, kwargs)).node.tape.rules.get(func)
            if rule is None or "out" in kwargs:
                raise NoBounds(f"there is no rule for {getattr(func, '__name__', func)}")
            if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
                raise NoBounds("there is no rule for autocast")
            return rule(*args, **kwargs)
        except Exception as error:
            # The module may catch it, and take another way than it does with images.
            for value in _bounded_among(args, kwargs):
                value.node.tape.fault = str(error) if isinstance(error, NoBounds) else type(error).__name__
            raise


def _bounded_among(args: Any, kwargs: Any) -> Iterator[Bounded]:
    return (value for value in tree_leaves((args, kwargs)) if isinstance(value, Bounded))


class Watch(TorchDispatchMode):
    """Sees every operation, and notes on the tape those on tensors without values: they got around the rules."""

    def __init__(self, tape: Tape):
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


# Asking for these gives no value away.
_SHAPES = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "layout", "requires_grad", "is_sparse")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, torch.is_floating_point),
}
# Of the tensor that a bounded one stands for.
_TOLD: dict[Any, Callable[[Tensor], Any]] = {
    getattr(Tensor, name).__get__: attrgetter(name) for name in ("device", "is_cuda", "is_cpu", "is_meta")
}
