"""Any CNN on the project's own convolution: the same parameters, every layer replaced, and a report of each.

The network is traced (torch.fx), so that a batch-norm, a residual and a ReLU that follow a convolution are fused into
it. A part that cannot be traced is kept whole: its layers are replaced, but not fused.
"""

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from attacks.generators import seeded
from robust.conv import layers
from robust.conv.frozen import FrozenConv2d
from robust.conv.functional import conv2d
from robust.conv.pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from robust.conv.shapes import inside
from robust.randomness import is_random

REPLACED = "replaced"  # by the project's own layer
FUSED = "fused"  # into another layer
LEFT = "left"  # as it was

COMPARED = 2  # images
TOLERANCE = 1e-8  # in float64, relative: rounding makes 1e-14, a fault 1e-3 or more
ROUNDED = 0.05  # in less: where rounding takes a value across 0, a ReLU passes another gradient

Make = Callable[[Any, str], nn.Module]


@dataclass(frozen=True)
class Layer:
    """What became of a layer, and why. `missed`: torch still computes it, though the project computes such layers."""

    name: str  # in the network, such as "layer1.0.conv1"
    kind: str  # its class, or its function
    fate: str  # REPLACED | FUSED | LEFT
    reason: str
    missed: bool = False


@dataclass(frozen=True)
class Converted:
    """`module` computes what the original does in eval mode; it is frozen, and differentiable in x alone."""

    module: nn.Module
    layers: tuple[Layer, ...]
    faults: dict[str, str]  # part that could not be traced ("" is the network itself) -> why

    @property
    def missed(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.missed)

    def summary(self) -> str:
        """'126 layers: 56 replaced, 70 fused, 0 left'; activations and the like, which stay torch's, do not count."""
        counted = Counter(layer.fate for layer in self.layers if layer.fate != LEFT or layer.missed)
        return f"{counted.total()} layers: {', '.join(f'{counted[fate]} {fate}' for fate in (REPLACED, FUSED, LEFT))}"

    def shortfall(self) -> str:
        """In words, what torch still computes and what could not be traced; empty where nothing is amiss."""
        named = [f"{layer.name or 'the network'} ({layer.kind}: {layer.reason})" for layer in self.missed]
        rest = f" and {len(named) - 3} more" if len(named) > 3 else ""
        left = [f"torch would still compute {', '.join(named[:3])}{rest}"] if named else []
        whole = [f"{part or 'the network'} cannot be traced: {fault}" for part, fault in self.faults.items()]
        return "; ".join(left + whole)


class NotConverted(ValueError):
    """The result is not the same network or, where that is asked, not all converted; the message says what and why."""


def convert(
    module: nn.Module, x: Tensor | None = None, *, algorithm: str = "auto", strict: bool = False, check: bool = True
) -> Converted:
    """A frozen copy of `module` whose convolutions, batch-norms, pooling and linear layers are the project's.

    x, (N, C, H, W), is a batch to try it on, best of two images at least. With it, residuals are fused too, whose
    shapes must be known; what torch computes all the same is found by watching; and logits and input gradient are
    compared with the module's in float64: where tracing or fusing has changed them, the layers are replaced without
    it, and `faults` says so; unless `check` is False. So they are where the network draws random numbers, of which
    tracing would make constants. `algorithm` is conv2d's. The copy can be differentiated once.

    NotConverted where even the layers alone compute something else, and, with `strict`, where a layer is missed or a
    part cannot be traced; ValueError for `strict` without x, as nothing else can tell.
    """
    if strict and x is None:
        raise ValueError("strict needs x, a batch to try the network on")
    random = x is not None and is_random(copy.deepcopy(module).eval(), x[:COMPARED])
    faults = {"": "it draws random numbers"} if random else {}
    converted = _converted(module, x, algorithm, trace=not random)
    if x is not None and check:
        fault = _difference(module, converted.module, x, algorithm, trace=not random)
        if fault and not random:
            faults = {"": f"traced and fused, it computes something else: {fault}"}
            converted = _converted(module, x, algorithm, trace=False)
            fault = _difference(module, converted.module, x, algorithm, trace=False)
        if fault:
            raise NotConverted(f"on the project's layers the network computes something else: {fault}")
    converted = replace(converted, faults=converted.faults | faults)
    if strict and (converted.missed or converted.faults):
        raise NotConverted(converted.shortfall())
    return converted


def _converted(module: nn.Module, x: Tensor | None, algorithm: str, trace: bool) -> Converted:
    # In a box, so that the network itself may be a layer.
    whole: nn.Module = nn.Sequential(copy.deepcopy(module).requires_grad_(False)).eval()
    report = _replace(whole, algorithm)
    faults: dict[str, str] = {}
    if trace:
        traced, faults = _trace(whole)
        if traced is not None:
            report |= _replace_functions(traced)
            report |= _fuse(traced, x)
            whole = traced
    for name, part in list(whole.named_modules(remove_duplicate=False)):
        if isinstance(part, layers.Conv2d) and not _is_read(whole, name):
            whole.set_submodule(name, FrozenConv2d(part))
    whole.eval()
    rows = list(report.values())
    if x is not None:
        rows += _watch(whole, x, known={row.name for row in rows if row.missed})
    return Converted(whole, tuple(rows), faults)


def _difference(module: nn.Module, converted: nn.Module, x: Tensor, algorithm: str, trace: bool) -> str | None:
    """How output or input gradient of the two differ on a few images; None where they agree.

    The conversion is repeated in float64, where rounding hides nothing; where the network's code, or the algorithm,
    cannot do that, the two are compared as they are.
    """
    x = x[:COMPARED].detach()
    try:
        exact = copy.deepcopy(module).double()
        pair = exact, _converted(exact, x.double(), algorithm, trace).module
        answers, tolerance = [_answers(network, x.double()) for network in pair], TOLERANCE
    except Exception:  # of code that somebody else wrote
        answers, tolerance = [_answers(network, x) for network in (module, converted)], ROUNDED
    for name, expected, found in zip(("output", "input gradient", "output without gradients"), *answers, strict=True):
        off = (found - expected).norm() / expected.norm().clamp(min=torch.finfo(x.dtype).tiny)
        if not off <= tolerance:
            return f"its {name} is off by {off:.1e}, relative"
    return None


def _answers(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the gradient at x of a sum of it, each value weighted differently, and the output under no_grad."""
    network = copy.deepcopy(network)
    network.eval()  # whose own train() need not return it
    network.requires_grad_(False)
    with seeded(), torch.no_grad():
        unwatched = network(x)
    with seeded(), torch.enable_grad():
        query = x.clone().requires_grad_()
        y = network(query)
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
        (gradient,) = torch.autograd.grad((y * weights).sum(), query)
    return y.detach(), gradient, unwatched


def _unboxed(name: str) -> str:
    return name.partition(".")[2]


# Replacing


def _replace(whole: nn.Module, algorithm: str) -> dict[str, Layer]:
    """Put the project's layers in place of torch's; by name, what became of each."""
    makers, report = _makers(), {}
    shared: dict[nn.Module, nn.Module] = {}  # a layer that goes by two names stays one
    for name, part in list(whole.named_modules(remove_duplicate=False)):
        if not name or (any(part.children()) and not isinstance(part, _COMPUTED)):
            continue
        kind, fate, reason, missed = type(part).__name__, LEFT, "nothing that convolution needs", False
        if isinstance(part, _COMPUTED):
            try:
                made = shared[part] = shared.get(part) or _made(part, makers, algorithm)
                whole.set_submodule(name, made)
                fate, reason = REPLACED, f"by {type(made).__name__}"
            except ValueError as error:
                reason, missed = str(error), True
        elif not _unboxed(name):
            continue  # the network itself, whose code is looked into
        report[name] = Layer(_unboxed(name), kind, fate, reason, missed)
    return report


# What the project computes, and all that is derived from it.
_COMPUTED = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._LPPoolNd,
    nn.Linear,
)


def _made(part: nn.Module, makers: dict[type, Make], algorithm: str) -> nn.Module:
    """The project's layer for torch's; ValueError, with the reason, where there is none."""
    kind = type(part).__name__
    make = makers.get(type(part))
    if make is None:
        torchs = next((base.__name__ for base in type(part).__mro__[1:] if base in makers), None)
        raise ValueError(f"{kind} is a {torchs} that may compute something else" if torchs else f"no {kind} here")
    if _is_altered(part):
        raise ValueError("it has hooks, or a forward of its own")
    return make(part, algorithm)


def _is_altered(part: nn.Module) -> bool:
    """Whether somebody has attached code to this one instance."""
    hooks = part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks
    return any(hooks) or "forward" in vars(part)


def _makers() -> dict[type, Make]:
    """torch's class -> what makes ours of it. Exactly these: a subclass may compute something else."""
    from timm import layers as timms
    from timm.layers.linear import Linear

    return {
        nn.Conv2d: layers.Conv2d.from_torch,
        timms.Conv2dSame: layers.Conv2dSame.from_torch,
        nn.BatchNorm2d: lambda norm, _: layers.BatchNorm2d.from_torch(norm),
        timms.BatchNormAct2d: lambda norm, _: layers.BatchNormAct2d.from_torch(norm),
        nn.MaxPool2d: lambda pool, _: layers.MaxPool2d.from_torch(pool),
        nn.AvgPool2d: lambda pool, _: layers.AvgPool2d.from_torch(pool),
        nn.AdaptiveAvgPool2d: lambda pool, _: layers.AdaptiveAvgPool2d.from_torch(pool),
        nn.Linear: lambda linear, _: layers.Linear.from_torch(linear),
        Linear: lambda linear, _: layers.Linear.from_torch(linear),
    }


_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    F.conv2d: conv2d,
    F.linear: layers.linear,
    F.max_pool2d: max_pool2d,
    F.avg_pool2d: avg_pool2d,
    F.adaptive_avg_pool2d: adaptive_avg_pool2d,
}


def _replace_functions(traced: fx.GraphModule) -> dict[str, Layer]:
    """The same for functions that the network's code calls, as far as ours take the same arguments."""
    report = {}
    for node in traced.graph.nodes:
        ours = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
        if ours is not None and not node.kwargs.get("return_indices"):
            # torch calls x "input", and has an argument that ours lack.
            given = {"x" if name == "input" else name: value for name, value in node.kwargs.items()}
            given.pop("return_indices", None)
            try:
                inspect.signature(ours).bind(*node.args, **given)
            except TypeError:
                continue  # what then runs is torch's, and is watched
            if any(isinstance(value, str) for value in (*node.args, *given.values())):
                continue  # padding by name
            report[node.name] = Layer(node.name, node.target.__name__, REPLACED, "by the function of that name")
            node.target, node.kwargs = ours, given
        elif (
            node.op == "call_method"
            and node.target == "view"
            and not any(isinstance(value, torch.dtype) for value in node.args)
        ):
            node.target = "reshape"  # the project's results have their channels last in memory
    traced.recompile()
    return report


# Tracing


class _Tracer(fx.Tracer):
    """Looks into everything but layers; what it cannot look into becomes a layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__ == layers.__name__ or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        outside, last = self.module_stack.copy(), next(iter(reversed(self.graph.nodes)), None)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # of code that wants to know a value, or that somebody else wrote
            self.module_stack = outside
            for node in list(reversed(self.graph.nodes)):  # what was traced of it before it failed
                if node is last:
                    break
                self.graph.erase_node(node)
            name = self.path_of_module(m)
            self.faults[_unboxed(name)] = " ".join(str(error).split())[:200]
            return self.create_proxy("call_module", name, args, kwargs)


def _trace(whole: nn.Module) -> tuple[fx.GraphModule | None, dict[str, str]]:
    """The network as a graph of layers; None where not even its outermost code can be traced."""
    tracer = _Tracer()
    graph = tracer.trace(whole)
    if "" in tracer.faults:
        return None, tracer.faults
    return fx.GraphModule(whole, graph), tracer.faults


# Fusing


def _fuse(traced: fx.GraphModule, x: Tensor | None) -> dict[str, Layer]:
    """Batch-norm, residual and ReLU into the convolution before them; by name, the layers that are fused."""
    if x is not None:
        with torch.no_grad():
            _Shapes(traced).run(x)
    report: dict[str, Layer] = {}
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    frozen: set[fx.Node] = set()  # convolutions
    for node in list(traced.graph.nodes):
        conv = _called(traced, node, layers.Conv2d)
        if conv is None or calls[str(node.target)] > 1 or _is_read(traced, str(node.target)):
            continue
        frozen.add(node)
        reader = _only_reader(node)
        norm = _called(traced, reader, layers.BatchNorm2d)
        if reader is None or norm is None or norm.running_mean is None or calls[str(reader.target)] > 1:
            traced.set_submodule(str(node.target), FrozenConv2d(conv))
            continue
        traced.set_submodule(str(node.target), FrozenConv2d(conv, norm))
        report[str(reader.target)] = _fused(traced, reader, node)
        if isinstance(norm, layers.BatchNormAct2d) and not isinstance(norm.act, nn.Identity):
            traced.set_submodule(str(reader.target), norm.act)  # what remains of it
        else:
            _bypass(reader, node)
    for node in list(traced.graph.nodes):
        if node in frozen:
            node = _take_residual(traced, node, frozen)
            reader = _only_reader(node)
            if reader is not None and _is_relu(traced, reader):
                traced.get_submodule(str(node.target)).relu = True  # type: ignore[assignment]
                if reader.op == "call_module":
                    report.setdefault(str(reader.target), _fused(traced, reader, node))
                _bypass(reader, node)
    traced.graph.lint()
    traced.recompile()
    traced.delete_all_unused_submodules()
    return report


def _take_residual(traced: fx.GraphModule, node: fx.Node, frozen: set[fx.Node]) -> fx.Node:
    """The convolution, moved to where its output is added to another tensor, which it then adds itself."""
    reader = _only_reader(node)
    if reader is None or not _is_sum(reader):
        return node
    other = next(arg for arg in reader.all_input_nodes if arg is not node)
    if reader.target in (operator.iadd, "add_") and reader.args[0] is not node:
        return node  # it is the other one that is written to
    if other in frozen and other > node and len(other.users) == 1:
        return node  # that one comes later, and will take this one
    if None in (mine := node.meta.get("shape"), its := other.meta.get("shape")) or mine != its:
        return node
    with traced.graph.inserting_before(reader):
        moved = traced.graph.call_module(str(node.target), (node.args[0], other))
    moved.meta = dict(reader.meta)
    reader.replace_all_uses_with(moved)
    traced.graph.erase_node(reader)
    traced.graph.erase_node(node)
    return moved


class _Shapes(fx.Interpreter):
    """Notes the shape and dtype of each tensor in the graph."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = (result.shape, result.dtype)
        return result


def _fused(traced: fx.GraphModule, reader: fx.Node, node: fx.Node) -> Layer:
    kind = type(traced.get_submodule(str(reader.target))).__name__
    return Layer(_unboxed(str(reader.target)), kind, FUSED, f"into {_unboxed(str(node.target))}")


def _bypass(reader: fx.Node, node: fx.Node) -> None:
    reader.replace_all_uses_with(node)
    reader.graph.erase_node(reader)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _called(traced: fx.GraphModule, node: fx.Node | None, kind: type) -> Any:
    """The module that the node calls, if it is of the kind and is given one argument."""
    if node is None or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    part = traced.get_submodule(str(node.target))
    return part if isinstance(part, kind) else None


def _is_relu(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        part = traced.get_submodule(str(node.target))
        return isinstance(part, nn.ReLU | layers.ReLU) and not _is_altered(part)
    functions = (F.relu, torch.relu, torch.relu_) if node.op == "call_function" else ("relu", "relu_")
    return node.target in functions and node.op in ("call_function", "call_method") and len(node.args) == 1


def _is_read(whole: nn.Module, name: str) -> bool:
    """Whether the code also takes the parameters of this layer for itself."""
    nodes = whole.graph.nodes if isinstance(whole, fx.GraphModule) else ()
    return any(node.op == "get_attr" and str(node.target).startswith(f"{name}.") for node in nodes)


def _is_sum(node: fx.Node) -> bool:
    """Of two different tensors."""
    functions = (operator.add, operator.iadd, torch.add) if node.op == "call_function" else ("add", "add_")
    if node.target not in functions or node.op not in ("call_function", "call_method") or node.kwargs:
        return False
    return len(node.args) == len(node.all_input_nodes) == 2


# Watching


class _Watch(TorchDispatchMode):
    """Which of torch's own operators are called, of those that the project computes itself, and in which module."""

    NAMES = ("convolution", "batch_norm", "max_pool", "avg_pool")

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack = stack
        self.seen: dict[tuple[str, str], None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if func.namespace in ("aten", "mkldnn") and any(part in name for part in self.NAMES):
            self.seen[_unboxed(self.stack[-1]), name] = None
        return func(*args, **(kwargs or {}))


def _watch(whole: nn.Module, x: Tensor, known: set[str]) -> Iterator[Layer]:
    """What torch computes all the same in a forward pass on x, in modules that are not `known` for it."""
    stack = [""]
    with torch.no_grad(), inside(whole, stack), _Watch(stack) as watch:
        whole(x)
    for name, kind in watch.seen:
        if name not in known:
            yield Layer(name, kind, LEFT, "called by code that is not traced", True)
