"""The convolutions that a network computes, seen in one forward pass; and small ones of the same geometry."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robust.conv.gates import Results
from robust.conv.geometry import Geometry, Pair

MINIATURE: Pair = (5, 7)  # outputs: more than one of Winograd's tiles along each axis, and no whole number of them


@dataclass(frozen=True)
class Shape:
    """A convolution but for its numbers and its batch."""

    channels: int  # C
    filters: int  # K
    size: Pair  # (H, W), of an image that is padded already but for what the geometry's zeros do
    geometry: Geometry

    def __str__(self) -> str:
        """'64 → 256, 1×1 at 56×56', '96 → 96, 3×3/2 pad 0 depthwise at 113×113'; pad stands where it is not half."""
        geometry = self.geometry
        half = tuple((extent - 1) // 2 for extent in geometry.extent)
        said = [f"{self.channels} → {self.filters}, {_by(geometry.kernel)}"]
        said[0] += "" if geometry.stride == (1, 1) else f"/{_by(geometry.stride, short=True)}"
        said += [] if geometry.padding == half else [f"pad {_by(geometry.padding, short=True)}"]
        said += [] if geometry.dilation == (1, 1) else [f"dilation {_by(geometry.dilation, short=True)}"]
        if geometry.groups > 1:
            said += ["depthwise" if geometry.groups == self.channels else f"in {geometry.groups} groups"]
        return " ".join([*said, "at", _by(self.size)])

    def x_shape(self, batch: int) -> tuple[int, int, int, int]:
        return (batch, self.channels, *self.size)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.filters, self.channels // self.geometry.groups, *self.geometry.kernel)

    def y_shape(self, batch: int) -> tuple[int, int, int, int]:
        return (batch, self.filters, *self.geometry.output_size(self.size))

    def terms(self, batch: int) -> Results[int]:
        """How many products are summed, at most, for one value of each result."""
        (r, s), groups = self.geometry.kernel, self.geometry.groups
        n, k, p, q = self.y_shape(batch)
        return Results(self.channels // groups * r * s, k // groups * r * s, n * p * q)


def shapes(module: nn.Module, x: Tensor) -> dict[Shape, tuple[str, ...]]:
    """Every distinct 2-D convolution of module(x) -> the layers that compute it, in the order of the pass.

    It is torch's operator that is watched, whoever calls it: layers of any class, padded beforehand or not, and
    functions ("" is the network's own code). Transposed convolutions are none.
    """
    found: dict[Shape, list[str]] = {}
    stack = [""]

    def saw(shape: Shape) -> None:
        found.setdefault(shape, []).append(stack[-1])

    with torch.no_grad(), inside(module, stack), _Watch(saw):
        module(x)
    return {shape: tuple(layers) for shape, layers in found.items()}


def miniatures(of: Iterable[Shape]) -> list[Shape]:
    """One small convolution for every distinct geometry, no two of its axes alike where the geometry allows it."""
    return list(dict.fromkeys(_miniature(shape) for shape in of))


def _miniature(shape: Shape) -> Shape:
    geometry = shape.geometry
    channels, filters = shape.channels // geometry.groups, shape.filters // geometry.groups  # of a group
    groups = 1 if geometry.groups == 1 else 3 if channels == 1 else 2
    # The last stride - 1 pixels of each axis are seen by no window, as it happens in networks too.
    rows, columns = (
        max(1, (count - 1) * stride + extent - 2 * padding + stride - 1)
        for count, stride, extent, padding in zip(
            MINIATURE, geometry.stride, geometry.extent, geometry.padding, strict=True
        )
    )
    few = min(filters, 4 if groups == 1 else 2)
    return Shape(groups * min(channels, 3), groups * few, (rows, columns), replace(geometry, groups=groups))


class _Watch(TorchDispatchMode):
    def __init__(self, saw: Callable[[Shape], None]):
        super().__init__()
        self.saw = saw

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, padding, dilation, transposed, _, groups = args
            if x.ndim == 4 and not transposed:
                kernel, size = tuple(weight.shape[2:]), tuple(x.shape[2:])
                geometry = Geometry(kernel, tuple(stride), tuple(padding), tuple(dilation), groups)
                self.saw(Shape(x.shape[1], weight.shape[0], size, geometry))
        return func(*args, **(kwargs or {}))


@contextmanager
def inside(module: nn.Module, stack: list[str]) -> Iterator[None]:
    """While the block runs, the last of `stack` is the name of the part whose forward runs."""
    handles = []
    for name, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(part.register_forward_hook(lambda *_: (stack.pop(), None)[1], always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by(pair: Pair, short: bool = False) -> str:
    """'3×2'; short, one number for two that are alike."""
    return str(pair[0]) if short and pair[0] == pair[1] else "×".join(map(str, pair))
