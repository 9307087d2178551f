"""A model made ready to be attacked: frozen in place, or as a faster twin that says the same."""

import copy
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attacks.backward import NoRule, gradient_of_rows, readers
from robust.conv.frozen import fold
from robust.models.frozen_linear import FrozenLinear
from robust.models.probe import apart, describe
from robust.models.thin_conv import ThinConv2d

ALIKE = 0.95  # the least cosine between the input gradients of a twin and its module
TWIN_TOLERANCE = 5e-3  # of a twin's logits, as a share of the largest; a wrong fold is off by about 1, TF32 by 1e-3
ROUNDING = 1e-4  # of one module's logits, by the order of its sums, as a share of the largest; seen are 2e-6


def in_training(module: nn.Module) -> bool:
    """Whether any part of it is in training mode; torch.jit.freeze leaves parts that have no mode."""
    return any(getattr(part, "training", False) for part in module.modules())


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """The module in eval mode, without gradients for its parameters, and as it was written where it is compiled; all is
    put back, part by part, and so are buffers that its code writes into."""
    training = [(part, part.training) for part in module.modules() if hasattr(part, "training")]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers() if _is_plain(buffer)]
    try:
        with suppress(NotImplementedError):  # an exported program has no modes
            module.eval()
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        # Batches come in many sizes, for each of which torch would compile anew, and at last warn and give up.
        compiled = any(map(_is_to_compile, module.modules()))
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield module
    finally:
        for part, mode in training:
            part.training = mode
        for parameter, required in requires_grad:
            parameter.requires_grad_(required)
        for buffer, value in buffers:
            if _is_overwritten(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def _is_plain(buffer: Tensor) -> bool:
    """Whether it is a tensor with values that may be compared, and written outside of torch.inference_mode."""
    plain = buffer.layout == torch.strided and 0 not in buffer.stride()  # as after expand
    return plain and not buffer.is_meta and not buffer.is_inference()


def _is_overwritten(buffer: Tensor, value: Tensor) -> bool:
    """Whether it holds other values; what has grown or moved is a cache, and goes with what else its module knows."""
    if (buffer.shape, buffer.dtype, buffer.device) != (value.shape, value.dtype, value.device):
        return False
    return not torch.equal(buffer, value)  # the version counts no writes of batch-norms


class Twin(NamedTuple):
    """A network to attack in place of another."""

    module: nn.Module
    description: str
    by_rows: bool  # whether attacks/backward.py may take its gradient


def fast_twin(module: nn.Module, x: Tensor) -> Twin:
    """A faster equivalent of `module` for its forward and input gradient, with what is to be known of it.

    A copy in eval mode with frozen parameters, each batch-norm folded into its convolution, in channels_last, and on
    a CPU with input gradients of few channels computed by blocks of pixels, images flattened in the order of memory,
    and large linear layers by oneDNN.
    It must agree with the module on `x`, real images (N, C, H, W): the same argmax in every row, logits within
    TWIN_TOLERANCE of the largest, a finite input gradient. Where it does not, or cannot be made, a plain frozen copy
    is tried, then `module` itself is returned, with the reason. `module` is left exactly as it was.

    A twin is almost the module: what is found on it is to be confirmed on the module.
    """
    faults: list[str] = []
    for make in (_folded_copy, _frozen_copy):
        try:
            twin, description = make(module, x)
            with frozen(module):
                expected = look(module, x)
            seen = look(twin, x, by_rows=True)
            fault = difference(seen, expected)
        except Exception as error:  # a user's module may raise anything; all that is lost is speed
            fault = describe(error)
        if fault is None:
            return Twin(twin, ": ".join([description, *faults]), seen.by_rows)
        faults.append(fault)
    return Twin(module, f"the model itself: {faults[-1]}", False)


def copied(module: nn.Module) -> nn.Module:
    """A deep copy, in eval mode and frozen. ValueError where it is the module itself or holds parts or weights of it,
    as classes may decide by a __deepcopy__ of their own: what is done to the copy would be done to the module."""
    twin = copy.deepcopy(module)
    parts = ({id(part) for part in net.modules()} for net in (module, twin))
    tensors = ({t.data_ptr() for t in (*net.parameters(), *net.buffers()) if t.numel()} for net in (module, twin))
    if not set.isdisjoint(*parts) or not set.isdisjoint(*tensors):
        raise ValueError("its copy shares parts with it")
    twin.eval()  # whose own train() need not return it
    return twin.requires_grad_(False)


def _frozen_copy(module: nn.Module, x: Tensor) -> tuple[nn.Module, str]:
    return copied(module), "frozen copy"


def _folded_copy(module: nn.Module, x: Tensor) -> tuple[nn.Module, str]:
    twin, description = _frozen_copy(module, x)
    done = []
    channels_last = _suits_channels_last(twin, x.device)
    if not has_hooks(module):
        if _fold_batch_norms(twin, x[:2]):
            done.append("batch-norm folded")
        for part in list(twin.modules()):
            if channels_last and type(part) is nn.Sequential and _take_flattening(part):
                done.append("flattening in the order of memory")
        for name, part in list(twin.named_modules()):
            if name and ThinConv2d.suits(part):
                twin.set_submodule(name, ThinConv2d(part))
                done.append("input gradients by blocks")
            elif name and FrozenLinear.suits(part):
                twin.set_submodule(name, FrozenLinear(part))
        if any(isinstance(part, FrozenLinear) and part.by_onednn for part in twin.modules()):
            done.append("linear layers by oneDNN")
    if channels_last:
        twin = twin.to(memory_format=torch.channels_last)
        done.append("channels_last")
    return twin, ", ".join(dict.fromkeys(done)) or description


def judging_format(module: nn.Module, x: Tensor, logits: Tensor) -> torch.memory_format:
    """How images are to lie in memory when `module` itself judges them, which says `logits` of x (N, C, H, W).

    On a CPU with the channels last, which makes convolutions up to twice as fast, if it says the same so. Not every
    module does: one that reshapes by `view` raises, and custom operations may read them wrongly.
    """
    convolves = any(isinstance(part, nn.Conv2d) for part in module.modules())
    if convolves and x.device.type == "cpu" and not any(map(is_compiled, module.modules())):
        with suppress(Exception), torch.no_grad():
            if apart(logits, module(x.contiguous(memory_format=torch.channels_last))) <= ROUNDING:
                return torch.channels_last
    return torch.contiguous_format


def is_compiled(part: nn.Module) -> bool:
    """Whether what runs is not the layers' own code, but made of it by torch."""
    return isinstance(part, torch.jit.ScriptModule) or _is_to_compile(part)


def _is_to_compile(part: nn.Module) -> bool:
    """Whether torch.compile has been asked to."""
    return hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None


def _suits_channels_last(module: nn.Module, device: torch.device) -> bool:
    """Whether there are convolutions, and, on a GPU, no depthwise ones.

    Those torch computes itself in its default format, and leaves to cuDNN in channels_last, which prepares them for
    seconds for each new number of rows (benchmarks/results/h200.md).
    """
    convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    depthwise = any(conv.groups == conv.in_channels > 1 for conv in convolutions)
    return bool(convolutions) and not (device.type == "cuda" and depthwise)


@dataclass(frozen=True)
class Seen:
    """What a network said of images, and the gradient of a weighted sum of its logits, which, unlike the loss of a sure
    classifier, does not go flat.
    """

    logits: Tensor  # (N, K)
    gradient: Tensor  # (N, C, H, W)
    by_rows: bool = False  # whether attacks/backward.py makes the same gradient of some rows


def look(network: nn.Module, x: Tensor, by_rows: bool = False) -> Seen:
    """What the network, in eval mode, says of images x (N, C, H, W).

    by_rows: find out about that too; never so on a GPU, where nobody has looked what it gains.
    """
    by_rows = by_rows and x.device.type == "cpu" and not any(map(is_compiled, network.modules()))
    hooks = _Hooks()
    with torch.enable_grad(), hooks if by_rows else nullcontext():
        query = x.detach().clone().requires_grad_()
        logits = network(query)
    slopes = torch.linspace(-1, 1, logits.shape[1]).to(logits).expand_as(logits)
    some, ours = torch.arange(len(x) - 1, -1, -2), None
    if by_rows and not hooks.registered:
        with suppress(NoRule):  # before autograd, which does not keep the graph
            ours = gradient_of_rows(logits, query, some, slopes[some])
    (gradient,) = torch.autograd.grad(logits, query, slopes)
    return Seen(logits.detach().clone(), gradient, ours is not None and _same(ours, gradient[some]))


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether gradients (N, ...) agree in every row; of zeros nothing follows."""
    off, size = ((ours - theirs).flatten(1).abs().amax(1), theirs.flatten(1).abs().amax(1))
    return bool(((off <= ROUNDING * size) & (size > 0)).all())


class _Hooks(TorchFunctionMode):
    """Sees whether code hooks into the gradients of its tensors: such hooks are in no graph."""

    registered = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.registered |= func is Tensor.register_hook
        return func(*args, **(kwargs or {}))


def difference(twin: Seen, module: Seen) -> str | None:
    """Why one network cannot stand in for another, by what both said of the same images, or None."""
    off = apart(module.logits, twin.logits)
    if not off <= TWIN_TOLERANCE:  # NaN is no agreement either
        return f"a copy's logits are off by {off:.2g} of the largest"
    if not torch.equal(twin.logits.argmax(dim=1), module.logits.argmax(dim=1)):
        return "a copy classifies some images differently"
    if not twin.gradient.isfinite().all():
        return "the input gradient is not finite"
    # Single values may differ, where rounding takes a ReLU's input across 0.
    gradient, wanted = twin.gradient.double(), module.gradient.double()  # whose norms may be tiny
    alike = (gradient * wanted).sum() / (gradient.norm() * wanted.norm())
    if wanted.norm() > 0 and not alike >= ALIKE:
        return f"a copy's input gradient points elsewhere (cosine {alike:.3g})"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches or changes what passes between the layers, which folding would change."""
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in module.modules()
    )


def _fold_batch_norms(module: nn.Module, x: Tensor) -> int:
    """Fold, in place, every batch-norm that alone reads the output of a convolution; how many there were.

    Who reads what is seen in the autograd graph of one forward pass, so the module may be any Python code. None is
    folded where that pass left some of these layers out: other images may take another way through them.
    Types are compared exactly: a subclass of Conv2d may change its weights before it uses them.
    """
    convolutions, norms = _foldable_types()
    made_by: dict[Any, Any] = {}  # graph node -> the convolution whose output it made
    read_by: dict[nn.Module, Any] = {}  # batch-norm -> the graph node that made its input
    calls: Counter[nn.Module] = Counter()

    def watch_convolution(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.grad_fn is not None:  # of a constant, such as a grid of positions
            made_by[output.grad_fn] = conv
        calls[conv] += 1

    def watch_norm(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        read_by[norm] = inputs[0].grad_fn
        calls[norm] += 1

    parts = list(module.named_modules())
    watched = [part for _, part in parts if type(part) in (*convolutions, *norms)]
    handles = [part.register_forward_hook(watch_norm if type(part) in norms else watch_convolution) for part in watched]
    with torch.enable_grad():
        reads = readers(module(x.detach().clone().requires_grad_()))
    for handle in handles:
        handle.remove()
    if len(calls) < len(watched):
        return 0

    folded = 0
    for name, norm in parts:
        node = read_by.get(norm)
        conv = made_by.get(node)
        if conv is None or norm.running_mean is None or (reads[node], calls[conv], calls[norm]) != (1, 1, 1):
            continue
        # New parameters, as layers may share theirs.
        conv.weight, conv.bias = (nn.Parameter(value, False) for value in fold(conv.weight, conv.bias, norm))
        # What remains of timm's BatchNormAct2d are its activation and dropout; of BatchNorm2d, nothing.
        module.set_submodule(name, nn.Sequential(*norm.children()))
        folded += 1
    return folded


def _take_flattening(layers: nn.Sequential) -> bool:
    """Let, in place, linear layers flatten what an nn.Flatten before them would have; whether any does."""
    taken = False
    for (at, flatten), (name, linear) in pairwise(list(layers._modules.items())):  # named_children() skips repeats
        whole = type(flatten) is nn.Flatten and (flatten.start_dim, flatten.end_dim) == (1, -1)
        if whole and FrozenLinear.suits(linear):
            layers.set_submodule(at, nn.Identity())
            layers.set_submodule(name, FrozenLinear(linear, flattens=True))
            taken = True
    return taken


def _foldable_types() -> tuple[tuple[type, ...], tuple[type, ...]]:
    layers = sys.modules.get("timm.layers")  # not imported: the model has none of them
    if layers is None:
        return (nn.Conv2d,), (nn.BatchNorm2d,)
    return (nn.Conv2d, layers.Conv2dSame), (nn.BatchNorm2d, layers.BatchNormAct2d)
