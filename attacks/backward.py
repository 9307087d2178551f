"""The gradient of some rows of a batch, by the autograd graph of all of them.

autograd goes back through a graph with every row. Of the points that an attack asks about, those that fool the model
need no gradient. So the graph is read here, and gone back through with the other rows only, by a rule for each
operation of the usual convolutional networks. Others are left to autograd.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Shape = tuple[int, ...]
# From a node of the graph, the gradient of some rows of its output, which these are (R,), and the shape (R, ...) of
# theirs in the first input that wants a gradient, to the gradients of its inputs.
Rule = Callable[[Any, Tensor, Tensor, Shape], Sequence[Tensor | None]]

aten = torch.ops.aten
FEWEST = 12  # rows; see `filled`


class NoRule(Exception):
    """The graph has a part that cannot be gone back through row by row here."""


def gradient_of_rows(output: Tensor, x: Tensor, rows: Tensor, slopes: Tensor) -> Tensor:
    """(R, ...): the gradient at x[rows] of the sum of output[rows] * slopes, as autograd has it, up to rounding.

    output: (N, K), made from the leaf x (N, ...), row by row. Its graph is kept.
    rows: (R,), as many as N at most; slopes: (R, K). NoRule where autograd has to be asked.
    """
    if len(rows) > len(output):
        raise ValueError(f"{len(rows)} rows of {len(output)}")
    if output.grad_fn is None:
        raise NoRule("no graph")
    try:
        return _walk(output, x, rows, slopes)
    except Exception as error:  # another version of torch may keep other things
        raise NoRule(str(error)) from error


@torch.no_grad()
def _walk(output: Tensor, x: Tensor, rows: Tensor, slopes: Tensor) -> Tensor:
    unread = readers(output)
    rules = {node: _rule(node) for node in unread if not hasattr(node, "variable")}
    gradients: dict[Any, Tensor] = {output.grad_fn: slopes}
    ready: list[Any] = [output.grad_fn]
    while ready:
        node = ready.pop()
        inputs = [_shape(source, len(output), len(rows)) for source, _ in node.next_functions]
        passed = rules[node](node, gradients.pop(node), rows, next(shape for shape in inputs if shape))
        for (source, at), shape, part in zip(node.next_functions, inputs, passed, strict=True):
            if shape is None:
                continue
            if part is None or at > 0 or part.ndim != len(shape):
                raise NoRule(node.name())
            part = part.sum_to_size(shape).to(source._input_metadata[0].dtype)  # of what was broadcast, or promoted
            gradients[source] = gradients[source] + part if source in gradients else part
            unread[source] -= 1
            if not unread[source] and source in rules:
                ready.append(source)
    leaf, *others = gradients
    if others or leaf.variable is not x:
        raise NoRule("another leaf")
    return gradients[leaf]


def readers(output: Tensor) -> Counter[Any]:
    """Every node of the autograd graph behind `output` -> how many inputs of other nodes it feeds."""
    counts: Counter[Any] = Counter({output.grad_fn: 0})
    stack: list[Any] = [output.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                counts[node] += 1
                if counts[node] == 1:
                    stack.append(node)
    return counts


def filled(rows: Tensor) -> Tensor:
    """(R, K), on a CPU with zeros behind it up to FEWEST rows.

    Of fewer rows, MKL adds up the products in another order, and what a row comes to would depend on how many others
    there are.
    """
    extra = FEWEST - len(rows) if rows.device.type == "cpu" else 0
    return torch.constant_pad_nd(rows, (0, 0, 0, extra)) if extra > 0 else rows


def _rule(node: Any) -> Rule:
    if getattr(getattr(node, "_forward_cls", None), "by_rows", False):
        return _function
    rule = RULES.get(node.name())
    if rule is None:
        raise NoRule(node.name())
    return rule


def _shape(source: Any, batch: int, n: int) -> Shape | None:
    """What n rows of it are like; None of what needs no gradient."""
    if source is None:
        return None
    shape = source._input_metadata[0].shape
    if not shape or shape[0] != batch:
        raise NoRule(f"{source.name()} is not in rows")
    return (n, *shape[1:])


def _some(value: Any, rows: Tensor, ndim: int) -> Any:
    """These rows of a tensor, which lie in memory as they did; all of what is no tensor of a batch."""
    if not isinstance(value, Tensor) or value.ndim < ndim or len(value) == 1:
        return value
    if value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last):
        return value.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return value.index_select(0, rows)


def _signed(number: int) -> int:
    """As it was given: some of a graph's negative numbers have lost their sign."""
    return number if number < 2**63 else number - 2**64


def _function(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    """A torch.autograd.Function with `by_rows`: of one tensor, of which it keeps nothing."""
    return node._forward_cls.backward(node, g)[:1]


def _pointwise(saved: str, backward: Callable[..., Tensor], *options: str) -> Rule:
    def rule(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
        given = (getattr(node, f"_saved_{option}") for option in options)
        return (backward(g, _some(getattr(node, f"_saved_{saved}"), rows, g.ndim), *given),)

    return rule


def _convolution(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    like = node._saved_input[: len(rows)]  # of which the shape is read, not the values
    how = (
        node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_transposed,
        node._saved_output_padding, node._saved_groups, (True, False, False),
    )  # fmt: skip
    return aten.convolution_backward(g, like, node._saved_weight, None, *how)


def _batch_norm(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    if node._saved_training:
        raise NoRule("statistics of the batch")
    scale = (node._saved_running_var + node._saved_eps).rsqrt()
    if node._saved_weight is not None:
        scale = scale * node._saved_weight
    return g * scale.view(-1, *[1] * (g.ndim - 2)), None, None


def _max_pool(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    where = _some(node._saved_result1, rows, g.ndim)
    how = (node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_dilation)
    return (
        aten.max_pool2d_with_indices_backward(g, node._saved_self[: len(rows)], *how, node._saved_ceil_mode, where),
    )


def _average_pool(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    how = (
        node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_ceil_mode,
        node._saved_count_include_pad, node._saved_divisor_override,
    )  # fmt: skip
    return (aten.avg_pool2d_backward(g, node._saved_self[: len(rows)], *how),)


def _adaptive_pool(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    return (aten._adaptive_avg_pool2d_backward(g, node._saved_self[: len(rows)]),)


def _mean(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    over = {_signed(dim) % len(shape) for dim in node._saved_dim}
    if 0 in over:
        raise NoRule("across rows")
    kept = [1 if dim in over else size for dim, size in enumerate(shape)]
    return ((g / math.prod(shape[dim] for dim in over)).reshape(kept).expand(shape),)


def _product(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    return tuple(
        None if other is None else g * _some(other, rows, g.ndim) for other in (node._saved_other, node._saved_self)
    )


def _quotient(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    return g / _some(node._saved_other, rows, g.ndim), None


def _sum(sign: int) -> Rule:
    return lambda node, g, rows, shape: (g, g * (sign * node._saved_alpha) if node.next_functions[1][0] else None)


def _dense(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    return None, (filled(g) @ node._saved_mat2.t())[: len(g)] * node._saved_alpha, None


def _plain_dense(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    return (filled(g) @ node._saved_mat2.t())[: len(g)], None


def _reshape(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    return (g.reshape(shape),)


def _restride(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    """What adaptive_avg_pool2d ends with, to have its channels last: one value a channel."""
    behind = node.next_functions[0][0].name()
    if behind != "MeanBackward1" or g.shape != shape or tuple(node._saved_stride[:2]) != (shape[1], 1):
        raise NoRule("as_strided")
    return (g,)


def _pad(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    if len(node._saved_pad) > 2 * (g.ndim - 1):
        raise NoRule("across rows")
    return (F.pad(g, [-_signed(size) for size in node._saved_pad]) if any(node._saved_pad) else g,)


def _slice(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    if g.shape == shape and node._saved_step == 1:
        return (g,)
    where = map(_signed, (node._saved_dim, node._saved_start, node._saved_end, node._saved_step))
    return (aten.slice_backward(g, shape, *where),)


def _concatenate(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    dim = _signed(node._saved_dim)
    if any(source is None for source, _ in node.next_functions):
        raise NoRule("beside a constant")
    return g.split([source._input_metadata[0].shape[dim] for source, _ in node.next_functions], dim)


def _permute(node: Any, g: Tensor, rows: Tensor, shape: Shape) -> Sequence[Tensor | None]:
    order = [_signed(dim) % g.ndim for dim in node._saved_dims]
    if order[0] != 0:
        raise NoRule("across rows")
    return (g.permute(sorted(range(g.ndim), key=order.__getitem__)),)


RULES: dict[str, Rule] = {
    "ConvolutionBackward0": _convolution,
    "NativeBatchNormBackward0": _batch_norm,
    "ReluBackward0": _pointwise("result", lambda g, y: aten.threshold_backward(g, y, 0)),
    "HardtanhBackward0": _pointwise("self", aten.hardtanh_backward, "min_val", "max_val"),
    "LeakyReluBackward0": _pointwise("self", partial(aten.leaky_relu_backward, self_is_result=False), "negative_slope"),
    "GeluBackward0": _pointwise("self", lambda g, x, how: aten.gelu_backward(g, x, approximate=how), "approximate"),
    "SiluBackward0": _pointwise("self", aten.silu_backward),
    "HardswishBackward0": _pointwise("self", aten.hardswish_backward),
    "HardsigmoidBackward0": _pointwise("self", aten.hardsigmoid_backward),
    "SigmoidBackward0": _pointwise("result", aten.sigmoid_backward),
    "TanhBackward0": _pointwise("result", aten.tanh_backward),
    "MaxPool2DWithIndicesBackward0": _max_pool,
    "AvgPool2DBackward0": _average_pool,
    "AdaptiveAvgPool2DBackward0": _adaptive_pool,
    "MeanBackward1": _mean,
    "AddBackward0": _sum(1),
    "SubBackward0": _sum(-1),
    "RsubBackward1": lambda node, g, rows, shape: (g * -node._saved_alpha,),
    "MulBackward0": _product,
    "DivBackward0": _quotient,
    "AddmmBackward0": _dense,
    "MmBackward0": _plain_dense,
    "CatBackward0": _concatenate,
    "ConstantPadNdBackward0": _pad,
    "SliceBackward0": _slice,
    "PermuteBackward0": _permute,
    "AsStridedBackward1": _restride,
    "AliasBackward0": _reshape,
    "CloneBackward0": _reshape,
    "ReshapeAliasBackward0": _reshape,
    "SqueezeBackward1": _reshape,
    "UnsafeViewBackward0": _reshape,
    "UnsqueezeBackward0": _reshape,
    "ViewBackward0": _reshape,
}
