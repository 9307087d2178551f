"""Receptive fields, and the rules by which the functions of torch take them from their inputs to their outputs."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from robust.conv.geometry import Pair
from robust.errors import InputError


@dataclass(frozen=True)
class Field:
    """Along one axis: of `cells` cells, number i sees the `size` pixels from start + i·stride on.

    The first and the last of these pixels reach the cell; between them there may be holes, where a window is dilated or
    paths of several lengths meet. What lies before pixel 0 or beyond the image is padding, and a cell whose field
    reaches there may see less of the image, too, or more, where the padding is not zeros but copies of pixels. A stride
    of 0 means one field for all cells together: after a global mean, or where they are no longer evenly spaced along an
    axis of their own (tokens, of which `cells` then counts one).
    """

    cells: int
    start: int = 0
    stride: int = 1
    size: int = 1

    def pixels(self, cell: int, image: int) -> range:
        """What a cell sees of an image of so many pixels."""
        first = self.start + cell * self.stride
        return range(max(first, 0), min(first + self.size, image))

    def window(self, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> "Field":
        """Of the cells of a layer whose window slides over these cells; how many there will be is not its business."""
        return replace(
            self,
            start=self.start - padding * self.stride,
            stride=self.stride * stride,
            size=self.size + (kernel - 1) * dilation * self.stride,
        )

    def whole(self, image: int) -> "Field":
        """One field for all cells: what any of them sees."""
        first, last = self.pixels(0, image), self.pixels(self.cells - 1, image)
        return Field(self.cells, first.start, 0, last.stop - first.start)


@dataclass(frozen=True)
class Axis:
    """The rows, or the columns, of a tensor: the dimension that counts them, None where none does, and their field."""

    dim: int | None
    field: Field


Axes = tuple[Axis, Axis]  # rows, columns


@dataclass
class Call:
    """One call of a function of torch, on tensors some of which were computed from the image."""

    name: str
    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    inputs: list[Tensor]  # those computed from the image
    axes: list[Axes]  # theirs
    outputs: list[Tensor]
    image: Pair  # (rows, columns) of pixels
    layer: str  # that calls, in words

    def argument(self, name: str, position: int, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


def output_axes(call: Call) -> list[Axes]:
    """Of each output. InputError where the function's rule is not known."""
    rule = RULES.get(call.name) or (_pointwise if _is_pointwise(call.name) else _unknown)
    if rule not in (_pointwise, _moved) and call.args and call.args[0] is not call.inputs[0]:
        rule = _unknown  # a constant, convolved with weights that were computed from the image
    return list(zip(rule(call, 0), rule(call, 1), strict=True))


def tensors(value: Any) -> Iterator[Tensor]:
    """All in any nesting of lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: changed(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([changed(item, change) for item in value])
    return value


# Rules: a call, and which axis of the image, 0 or 1 -> that axis in each output

Rule = Callable[[Call, int], list[Axis]]


def _pointwise(call: Call, a: int) -> list[Axis]:
    """Shapes are aligned at their ends, and single cells broadcast."""
    return [
        _envelope(
            [_aligned(x, axes[a], y, call.image[a]) for x, axes in zip(call.inputs, call.axes, strict=True)],
            y,
            call.image[a],
        )
        for y in call.outputs
    ]


def _mixing(dims_of: Callable[[Call], Iterable[int] | int | None]) -> Rule:
    """Along these dimensions (None: all) every value has a part in every other, or in what takes their place."""

    def rule(call: Call, a: int) -> list[Axis]:
        x, axis, dims = call.inputs[0], call.axes[0][a], dims_of(call)
        mixed = {dim % x.ndim for dim in (range(x.ndim) if dims is None else _tuple(dims))}
        if axis.dim in mixed:
            axis = replace(axis, field=axis.field.whole(call.image[a]))
        if call.outputs[0].ndim < x.ndim and axis.dim is not None:
            axis = replace(axis, dim=None if axis.dim in mixed else axis.dim - sum(dim < axis.dim for dim in mixed))
        return _with_the_others(call, a, axis)

    return rule


def _window(**position: int) -> Rule:
    """A convolution, with a weight, or a pooling, with a kernel_size, among its arguments at these positions."""

    def rule(call: Call, a: int) -> list[Axis]:
        given = {name: call.argument(name, at) for name, at in position.items()}
        kernel = _pair(given["kernel_size"] if "kernel_size" in given else given["weight"].shape[2:])
        stride = _pair(given.get("stride") or (kernel if "kernel_size" in given else 1))
        dilation = _pair(given.get("dilation") or 1)
        padding = given.get("padding") or 0
        if padding == "same":
            before = _pair((n - 1) * d // 2 for n, d in zip(kernel, dilation, strict=True))
        else:
            before = _pair(0 if padding == "valid" else padding)
        windows = list(zip(kernel, stride, before, dilation, strict=True))
        return _with_the_others(call, a, _slid(call, a, lambda field, i: field.window(*windows[i])))

    return rule


def _adaptive(call: Call, a: int) -> list[Axis]:
    wanted = call.outputs[0].shape[-2:]
    return _with_the_others(call, a, _slid(call, a, lambda field, i: _parted(field, wanted[i], call.image[a])))


def _padded(call: Call, a: int) -> list[Axis]:
    axis, amounts = call.axes[0][a], call.argument("pad", 1)
    if axis.dim is not None:
        nth = 2 * (call.inputs[0].ndim - 1 - axis.dim)  # the amounts begin with those of the last dimension
        axis = replace(axis, field=axis.field.window(1, padding=amounts[nth] if nth < len(amounts) else 0))
    return _with_the_others(call, a, axis)


def _moved(call: Call, a: int) -> list[Axis]:
    """Where a function takes the rows to it is asked itself, by calling it on tensors of the numbers of the rows."""
    counted = [axes[a] for axes in (call.axes[:1] if call.name.endswith("_as") else call.axes)]
    x = call.inputs[0]
    axis = _envelope(counted, x, call.image[a])
    dim = axis.dim
    if dim is None:
        return [axis for _ in call.outputs]

    def numbers(tensor: Tensor) -> Tensor:
        if tensor.ndim != x.ndim or not tensor.is_floating_point():
            return tensor  # an index
        rows = torch.arange(tensor.shape[dim], dtype=torch.int32).view(-1, *(1,) * (x.ndim - 1 - dim))
        return torch.empty_like(tensor.as_subclass(Tensor), dtype=torch.int32, device="cpu").copy_(rows)

    taken = call.function(*changed(call.args, numbers), **changed(call.kwargs, numbers))
    return [_taken(axis.field, rows, call.image[a]) for rows in tensors(taken)]


def _taken(field: Field, rows: Tensor, image: int) -> Axis:
    """The axis of a tensor whose values are the numbers of the cells that they came from."""
    found = []
    for dim in range(rows.ndim):
        others = [other for other in range(rows.ndim) if other != dim]
        low, high = (rows.amin(others), rows.amax(others)) if others else (rows, rows)
        steps, sizes = low.diff().unique().tolist(), (high - low + 1).unique().tolist()
        if len(steps) == len(sizes) == 1 and steps[0] > 0:
            window = field.window(sizes[0], steps[0], padding=-int(low[0]))
            found.append(Axis(dim, replace(window, cells=len(low))))
    if found:
        return min(found, key=lambda axis: axis.field.size)
    first, last = int(rows.min()), int(rows.max())
    these = replace(field.window(1, padding=-first), cells=last - first + 1)
    return Axis(None, replace(these.whole(image), cells=1))


def _extreme(call: Call, a: int) -> list[Axis]:
    """torch.max(x, dim), or torch.max(x, y)."""
    return (_pointwise if isinstance(call.argument("other", 1), Tensor) else _reducing)(call, a)


def _unknown(call: Call, a: int) -> list[Axis]:
    """No matter where all see the same as it is."""
    if not call.outputs or any(axis.field.stride for axes in call.axes for axis in axes):
        raise InputError(f"{call.layer}: which values of its inputs {call.name} makes an output of is not known")
    return [_envelope([Axis(None, axes[a].field) for axes in call.axes], y, call.image[a]) for y in call.outputs]


def believed_axes(module: Any, call: Call) -> Axes:
    """Of what a module returned for the call's inputs, by what it says of its window.

    InputError where that does not fit the output's shape. If `padding` is 0 or "same", and there is an output for every
    stride-th pixel, the image was padded on both sides alike; if by an odd number, after it by one more than before.
    """
    (y,) = call.outputs

    def slide(field: Field, i: int) -> Field:
        n, outputs = field.cells, y.shape[y.ndim - 2 + i]
        if not hasattr(module, "kernel_size"):
            return _parted(field, outputs, call.image[i])
        kernel, stride = _pair(module.kernel_size)[i], _pair(module.stride)[i]
        dilation = _pair(getattr(module, "dilation", 1))[i]
        extent = (kernel - 1) * dilation + 1
        padding = 0 if isinstance(module.padding, str) else _pair(module.padding)[i]
        if outputs != (n + 2 * padding - extent) // stride + 1:
            if padding or outputs != -(-n // stride):
                raise InputError(
                    f"{call.layer}: its kernel_size, stride and padding do not make {outputs} cells of {n}"
                )
            padding = ((outputs - 1) * stride + extent - n) // 2
        return field.window(kernel, stride, padding, dilation)

    def axis(a: int) -> Axis:
        others = zip(call.inputs[1:], call.axes[1:], strict=True)
        return _envelope(
            [_slid(call, a, slide), *(_aligned(x, axes[a], y, call.image[a]) for x, axes in others)], y, call.image[a]
        )

    return axis(0), axis(1)


def has_window(module: nn.Module) -> bool:
    """Whether a module that is not torch's, whose functions are known, says enough about its window."""
    if (
        type(module).__module__.startswith("torch.nn.")
        or any(module.children())
        or getattr(module, "transposed", False)
    ):
        return False
    return all(hasattr(module, name) for name in ("kernel_size", "stride", "padding")) or hasattr(module, "output_size")


# What the rules are made of


def _envelope(axes: list[Axis], y: Tensor, image: int) -> Axis:
    """One axis of y, whose values are made of all of these, which one dimension counts, or none."""
    dims = {axis.dim for axis in axes if axis.dim is not None}
    fields = [axis.field for axis in axes]
    if len(dims) > 1 or len({field.stride for field in fields}) > 1:
        fields = [field.whole(image) for field in fields]
    dim = dims.pop() if len(dims) == 1 else None
    start = min(field.start for field in fields)
    stop = max(field.start + field.size for field in fields)
    return Axis(dim, Field(1 if dim is None else y.shape[dim], start, fields[0].stride, stop - start))


def _with_the_others(call: Call, a: int, axis: Axis) -> list[Axis]:
    """The axis of the outputs, all of which all other inputs have a part in: weights that were computed."""
    others = [Axis(None, axes[a].field.whole(call.image[a])) for axes in call.axes[1:]]
    return [_envelope([axis, *others], y, call.image[a]) for y in call.outputs]


def _aligned(x: Tensor, axis: Axis, y: Tensor, image: int) -> Axis:
    """The axis of x as one of y, to which it broadcasts."""
    if axis.dim is None:
        return axis
    dim = axis.dim + y.ndim - x.ndim
    return Axis(dim, axis.field if y.shape[dim] == axis.field.cells else axis.field.whole(image))


def _slid(call: Call, a: int, slide: Callable[[Field, int], Field]) -> Axis:
    """Under a window that slides over the last two dimensions, to `slide` 0 and 1, and sums over the one before."""
    x, axis = call.inputs[0], call.axes[0][a]
    if axis.dim is None or axis.dim < x.ndim - 3:
        return axis
    if axis.dim == x.ndim - 3:
        return replace(axis, field=axis.field.whole(call.image[a]))
    return replace(axis, field=slide(axis.field, axis.dim - (x.ndim - 2)))


def _parted(field: Field, parts: int, image: int) -> Field:
    """Of adaptive pooling: part i from floor(i n / parts) to ceil((i + 1) n / parts)."""
    n = field.cells
    starts = [i * n // parts for i in range(parts)]
    sizes = {-(-(i + 1) * n // parts) - start for i, start in enumerate(starts)}
    steps = {after - before for before, after in pairwise(starts)}
    if len(sizes) == len(steps) == 1:
        return field.window(sizes.pop(), steps.pop())
    return field.whole(image)  # one part of all, or parts of several sizes


@lru_cache
def _is_pointwise(name: str) -> bool:
    """Whether torch says so of any of its functions of that name."""
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def _tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _pair(value: Any) -> Pair:
    """One number stands for both axes."""
    first, *rest = _tuple(value)
    return first, rest[0] if rest else first


_reducing = _mixing(lambda call: call.argument("dim", 1, call.kwargs.get("axis")))  # which torch takes for it
_features = _mixing(lambda call: range(1, call.inputs[0].ndim))

RULES: dict[str, Rule] = {
    "conv2d": _window(weight=1, stride=3, padding=4, dilation=5),
    "max_pool2d": _window(kernel_size=1, stride=2, padding=3, dilation=4),
    "avg_pool2d": _window(kernel_size=1, stride=2, padding=3),
    "lp_pool2d": _window(kernel_size=2, stride=3),
    "adaptive_avg_pool2d": _adaptive,
    "adaptive_max_pool2d": _adaptive,
    "pad": _padded,
    "linear": _mixing(lambda call: -1),
    "batch_norm": _mixing(lambda call: None if call.argument("training", 5) else ()),
    "layer_norm": _mixing(lambda call: range(-len(call.argument("normalized_shape", 1)), 0)),
    "group_norm": _features,
    "instance_norm": _features,
    "normalize": _mixing(lambda call: call.argument("dim", 2, 1)),
    "max": _extreme,
    "min": _extreme,
    **dict.fromkeys("mean sum amax amin std var logsumexp softmax log_softmax".split(), _reducing),
    **dict.fromkeys(
        "view view_as reshape reshape_as flatten unflatten squeeze unsqueeze permute transpose movedim expand "
        "expand_as contiguous clone detach data getitem select narrow chunk split unbind cat concat stack "
        "pixel_unshuffle channel_shuffle".split(),
        _moved,
    ),
    # Pointwise, beside all that torch itself says to be.
    **dict.fromkeys(
        "dropout dropout1d dropout2d alpha_dropout feature_alpha_dropout feature_dropout hardswish prelu rrelu "
        "logsigmoid local_response_norm divide multiply subtract rdiv to float double half bfloat16 type type_as "
        "requires_grad".split(),
        _pointwise,
    ),
}
"""A function's name, whether of torch, of torch.nn.functional or a tensor's method -> what it does to the fields."""
