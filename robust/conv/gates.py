"""When a convolution counts as verified against torch: what is measured, and the limit that it is held against.

An error is ‖out - ref‖ / ‖ref‖, where ref is torch's in float64 on the same inputs, which are rounded to the precision
under test already. u is half the step from 1 to the next number of the dtype, and K how many products are summed for
one value: C/g·R·S forward, K_out/g·R·S for the input gradient, N·P·Q for the weight gradient.

1. exact     on whole numbers from -2 to 2, every value is that of float64 rounded once, while no sum can reach 2^24.
             Not of Winograd's algorithm, whose transforms have fractions.
2. bound     the error is at most √K·u in float32, 4√K·u by Winograd's F(4 x 4), u + √K·2^-24 in bfloat16 and
             float16 (sums are kept in float32 and rounded once), 1e-3 in tf32, which rounds inputs to 11 bits.
3. relative  the error is at most 2 times torch's own in the same precision, 3 times for gradients.
4. written   no value is left as it was in memory, which is full of NaN before each call; and
   adjoint   ⟨conv x, g⟩ = ⟨x, input_grad g⟩ = ⟨w, weight_grad⟩, to what gate 2 leaves open.
5. whole networks: in float64 logits and input gradient to rounding; in the precision under test logits by gate 3, the
   signs of the input gradient, the top-1, attacks' verdicts; and no layer is left to torch.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,  # products of a GPU's tensor cores
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""Name -> the dtype of its tensors."""

EXACT_BELOW = 2**24  # float32 holds every whole number up to here
LOSS = {"winograd4": 4.0}  # algorithm -> how many times √K·u it may be off; 1 for all others
TORCHS = {"forward": 2.0, "input gradient": 3.0, "weight gradient": 3.0}  # result -> how many times torch's own error
FLIPS = 2e-3  # of an image's signs: of twenty photographs, the most that torch lost so was 8e-4
REPORTED = math.inf  # the limit of what is measured, and not held against anything but NaN


class Results(NamedTuple, Generic[T]):
    """Of each of a convolution's three results; named for people by `NAMES`."""

    y: T
    input_grad: T
    weight_grad: T


NAMES = Results("forward", "input gradient", "weight gradient")


@dataclass(frozen=True)
class Gate:
    """A measured value, and the most that it may be."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit  # never so of NaN


def unit(dtype: torch.dtype) -> float:
    """u, the largest relative error of rounding to the dtype."""
    return torch.finfo(dtype).eps / 2


def error(out: Tensor, ref: Tensor) -> float:
    """‖out - ref‖ / ‖ref‖ in float64; 0 for two zeros, NaN where `out` holds one."""
    off, size = (out.double() - ref.double()).norm().item(), ref.double().norm().item()
    return off / size if size else math.inf if off else off


def bound(terms: int, precision: str, algorithm: str) -> float:
    """The limit of gate 2 for sums of `terms` products."""
    if precision == "tf32":
        return 1e-3
    u = unit(PRECISIONS[precision])
    if precision in ("bfloat16", "float16"):
        return u + math.sqrt(terms) * unit(torch.float32)
    return LOSS.get(algorithm, 1.0) * math.sqrt(terms) * u


def exact(out: Tensor, ref: Tensor) -> Gate:
    """How many values differ from those of `ref`, rounded once."""
    return Gate("exact", (out != ref.to(out)).sum().item(), 0)


def is_exact(terms: int, algorithm: str) -> bool:
    """Whether gate 1 is to be asked of sums of `terms` products, which are at most 4 each."""
    return not algorithm.startswith("winograd") and 4 * terms < EXACT_BELOW


def relative(found: float, torchs: float, result: str, held: bool = True) -> Gate:
    """An error over torch's own; where it is not `held` against the limit, it is reported only."""
    ratio = found / torchs if torchs else math.inf if found else found
    return Gate("relative", ratio, TORCHS[result] if held else REPORTED)


def written(*outs: Tensor) -> Gate:
    """How many values are NaN; the outputs are to be made within `poisoned`."""
    return Gate("written", sum(out.isnan().sum().item() for out in outs), 0)


def adjoint(inputs: tuple[Tensor, Tensor, Tensor], found: Results[Tensor], bounds: Results[float]) -> Gate:
    """How far apart the three inner products are, over ‖y‖·‖g‖; the limit is what errors within `bounds` can make.

    `inputs` are x, the weight, and the gradient at the output.
    """
    x, weight, g = inputs
    inner = [_inner(a, b) for a, b in zip((g, x, weight), found, strict=True)]
    sizes = [_norm(a) * _norm(b) for a, b in zip((g, x, weight), found, strict=True)]
    apart = _largest([abs(inner[0] - other) for other in inner[1:]])
    allowed = [bound * size for bound, size in zip(bounds, sizes, strict=True)]
    if not sizes[0]:
        return Gate("adjoint", apart, 0)
    return Gate("adjoint", apart / sizes[0], (allowed[0] + _largest(allowed[1:])) / sizes[0])


def signs(found: Tensor, torchs: Tensor, ref: Tensor) -> tuple[Gate, float]:
    """The share of an input gradient's signs that are not those of float64; and torch's own.

    A sign is lost where the gradient is smaller than its error, so the share grows as the error does, and may be 3
    times torch's for the same reason as that. So few may be lost that chance counts: on top come 3 standard deviations
    of such a count (Poisson), and 9 signs; and FLIPS, for where rounding takes a single value across 0, its ReLU passes
    another gradient to a whole receptive field.
    """
    n, (ours, lost) = max(1, ref.numel()), ((side.sign() != ref.sign()).sum().item() for side in (found, torchs))
    most = TORCHS["input gradient"] * lost
    return Gate("signs", ours / n, min(1.0, (most + 3 * math.sqrt(most) + 9) / n + FLIPS)), lost / n


def top1(found: Tensor, torchs: Tensor, ref: Tensor, precision: str) -> Gate:
    """On how many images of (N, classes) logits the largest is another than torch's; none.

    But in less than float32 two classes may be so close that rounding decides. Where torch's logits are off by e at
    most, and others by 2e, two classes more than 4e apart in float64 keep their order; closer ones do not count.
    """
    ours, theirs = found.argmax(1), torchs.argmax(1)
    if precision == "float32":
        return Gate("top-1", (ours != theirs).sum().item(), 0)
    apart = (ref.gather(1, ours[:, None]) - ref.gather(1, theirs[:, None])).abs().squeeze(1)
    decided = apart > 4 * (torchs.double() - ref).abs().amax(1)
    return Gate("top-1", ((ours != theirs) & decided).sum().item(), 0)


@contextmanager
def poisoned() -> Iterator[None]:
    """What torch hands out as empty memory is full of NaN, so that no result can rest on what was there."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*determinis", UserWarning)  # of kernels that are not: no matter here
            yield
    finally:
        memory.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _largest(values: list[float]) -> float:
    """NaN where one is, which `max` may overlook."""
    return torch.tensor(values, dtype=torch.float64).max().item()


def _inner(a: Tensor, b: Tensor) -> float:
    return (a.double() * b.double()).sum().item()


def _norm(a: Tensor) -> float:
    return a.double().norm().item()
