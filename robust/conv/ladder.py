"""The ladder climbed: every algorithm in miniature, from the loops up, and at full size, against torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from robust.conv import gates
from robust.conv.algorithm import ALGORITHMS, algorithm
from robust.conv.functional import choose, conv2d, for_weight_grad
from robust.conv.gates import NAMES, PRECISIONS, Gate, Results
from robust.conv.shapes import Shape
from robust.precision import arithmetic

MINIATURE_BATCH = 2
MINIATURE_ONLY = ("direct", "toeplitz")  # whose cost at full size is out of all proportion


@dataclass(frozen=True)
class Measurement:
    """One gate, and what it was asked of."""

    part: str  # "ladder" | "shapes" | "network" | "verdicts"
    subject: str  # such as a shape
    algorithm: str
    result: str  # such as "input gradient"
    gate: Gate
    torch: float | None = None  # the same measured of torch itself

    def __str__(self) -> str:
        """'64 → 64, 3×3 at 56×56 by im2col, forward: 2.26 times torch's error, at most 2'."""
        by = f" by {self.algorithm}" if self.algorithm else ""
        limit = "" if self.gate.limit == gates.REPORTED else f", at most {self.gate.limit:.3g}"
        return f"{self.subject}{by}, {self.result}: {SAID[self.gate.name].format(self.gate.value)}{limit}"


SAID = {
    "exact": "{:.0f} values differ",
    "bound": "error {:.3g}",
    "relative": "{:.3g} times torch's error",
    "written": "{:.0f} values are NaN",
    "adjoint": "{:.3g} apart",
    "error": "error {:.3g}",
    "signs": "a share of {:.3g} of the signs differs",
    "top-1": "{:.0f} images differ",
    "differ": "{:.0f} images differ",
    "left to torch": "{:.0f} are left to torch",
    "refuted": "{:.0f} images do not fool the other",
}
"""Gate -> its value in words."""


def misfit(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why an algorithm cannot compute this, or None."""
    try:
        return algorithm(name).misfit(shape.geometry, dtype, device)
    except ImportError as error:
        return f"cannot be imported: {error}"


def climb(shape: Shape, device: torch.device) -> Iterator[Measurement]:
    """One miniature through all the algorithms that suit it, forward and both gradients, on whole numbers, in float64.

    Each is held against torch, so that those which are exact equal one another to the last bit, and a fault is that of
    the rung where it is seen. Triton's kernels compute no float64, and are held in float32, which is as exact here.
    """
    x, weight, g = _integers(shape, MINIATURE_BATCH, torch.float64, device)
    terms = shape.terms(MINIATURE_BATCH)
    expected = _results(_torchs(shape), x, weight, g)
    for name in ALGORITHMS:
        precision = next((p for p in ("float64", "float32") if misfit(name, shape, PRECISIONS[p], device) is None), "")
        if not precision:
            continue
        dtype = PRECISIONS[precision]
        cast = x.to(dtype), weight.to(dtype), g.to(dtype)
        with gates.poisoned():
            found = _results(_by(name, shape), *cast)
        bounds = Results(*(gates.bound(count, precision, name) for count in terms))
        exact = all(gates.is_exact(count, name) for count in terms)
        for result, out, ref, limit in zip(NAMES, found, expected, bounds, strict=True):
            gate = gates.exact(out, ref) if exact else Gate("bound", gates.error(out, ref), limit)
            yield Measurement("ladder", str(shape), name, result, gate)
        gate = gates.adjoint(cast, found, Results(0.0, 0.0, 0.0) if exact else bounds)
        yield Measurement("ladder", str(shape), name, "inner products", gate)
        yield Measurement("ladder", str(shape), name, "outputs", gates.written(*found))


def measure(shape: Shape, batch: int, precision: str, device: torch.device, asked: str = "auto") -> list[Measurement]:
    """A full-size convolution, forward and both gradients, by all gates; `asked` where it suits, else what auto picks.

    Gate 3 is asked of what auto picks. Another algorithm may be as much less accurate as gate 2 says: its ratio to
    torch's error is reported.
    """
    dtype, terms = PRECISIONS[precision], shape.terms(batch)
    picked = choose(shape.geometry, (shape.channels, shape.filters), dtype, device)
    name = "auto" if asked in ("auto", picked) or misfit(asked, shape, dtype, device) else asked
    names = Results(picked, picked, for_weight_grad(picked)) if name == "auto" else Results(name, name, name)
    with arithmetic(precision):
        rows = [*_on_randoms(shape, batch, precision, device, name, names)]
        if all(gates.is_exact(count, by) for count, by in zip(terms, names, strict=True)):
            rows += _on_integers(shape, batch, dtype, device, name)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the next shape's tensors have other sizes
    by = dict(zip(NAMES, names, strict=True))
    return [
        Measurement("shapes", str(shape), by.get(result, names.y), result, gate, torchs)
        for result, gate, torchs in rows
    ]


Row = tuple[str, Gate, float | None]


def _on_randoms(
    shape: Shape, batch: int, precision: str, device: torch.device, name: str, names: Results[str]
) -> Iterator[Row]:
    """`name` is what is asked for, `names` what computes each result then."""
    dtype = PRECISIONS[precision]
    inputs = _randoms(shape, batch, dtype, device)
    ref = _results(_torchs(shape), *(tensor.double() for tensor in inputs))
    # At equal layout: what torch computes for other layouts sums in another order.
    laid = [tensor.contiguous(memory_format=torch.channels_last) for tensor in inputs]
    own = Results(*map(gates.error, _results(_torchs(shape), *laid), ref))
    with gates.poisoned():
        found = _results(_by(name, shape), *inputs)
    bounds = Results(*(gates.bound(n, precision, by) for n, by in zip(shape.terms(batch), names, strict=True)))
    for result, out, known, torchs, limit in zip(NAMES, found, ref, own, bounds, strict=True):
        error = gates.error(out, known)
        yield result, Gate("bound", error, limit), torchs
        yield result, gates.relative(error, torchs, result, held=name == "auto"), torchs
    yield "inner products", gates.adjoint(inputs, found, bounds), None
    yield "outputs", gates.written(*found), None


def _on_integers(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, name: str) -> Iterator[Row]:
    inputs = _integers(shape, batch, dtype, device)
    ref = _results(_torchs(shape), *(tensor.double() for tensor in inputs))
    with gates.poisoned():
        found = _results(_by(name, shape), *inputs)
    for result, out, known in zip(NAMES, found, ref, strict=True):
        yield result, gates.exact(out, known), None


def _results(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, g: Tensor) -> Results[Tensor]:
    """f(x, weight) and its gradients, from g at the output."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = f(x, weight)
    return Results(y.detach(), *torch.autograd.grad(y, (x, weight), g))


def _torchs(shape: Shape) -> Callable[[Tensor, Tensor], Tensor]:
    how = shape.geometry
    return lambda x, weight: F.conv2d(x, weight, None, how.stride, how.padding, how.dilation, how.groups)


def _by(name: str, shape: Shape) -> Callable[[Tensor, Tensor], Tensor]:
    how = shape.geometry
    return lambda x, weight: conv2d(x, weight, None, how.stride, how.padding, how.dilation, how.groups, name)


def _integers(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and the gradient at the output: whole numbers from -2 to 2, the same on every machine."""
    made = torch.Generator().manual_seed(0)
    x, weight, g = (
        torch.randint(-2, 3, size, generator=made, dtype=torch.int8).to(device, dtype)
        for size in (shape.x_shape(batch), shape.weight_shape, shape.y_shape(batch))
    )
    return x, weight, g


def _randoms(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The same, standard normal."""
    made = torch.Generator().manual_seed(0)
    x, weight, g = (
        torch.randn(size, generator=made).to(device, dtype)
        for size in (shape.x_shape(batch), shape.weight_shape, shape.y_shape(batch))
    )
    return x, weight, g
