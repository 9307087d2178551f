"""The gates are those of docs/convolution.md, the shapes those of the network, and the ladder sees planted faults."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from robust.agreement import Attacked, agree, attack, verdicts
from robust.conv import gates, im2col, ladder, toeplitz, winograd
from robust.conv.gates import Gate, Results
from robust.conv.geometry import Geometry
from robust.conv.shapes import Shape, miniatures, shapes
from robust.precision import arithmetic
from toys import conv_net, images

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf


# The gates


@pytest.mark.parametrize(
    ("value", "limit", "passed"),
    [
        (0.0, 0.0, True),  # the limit itself may be reached
        (1e-300, 0.0, False),
        (1.0, INF, True),  # reported only
        (NAN, 1.0, False),
        (NAN, INF, False),  # NaN is no measurement, and never passes
        (INF, 1.0, False),
    ],
)
def test_a_gate_passes_at_its_limit_and_never_with_nan(value: float, limit: float, passed: bool) -> None:
    assert Gate("bound", value, limit).passed is passed


def test_u_is_half_the_step_from_1_to_the_next_number() -> None:
    for dtype, bits in ((torch.float64, 53), (torch.float32, 24), (torch.float16, 11), (torch.bfloat16, 8)):
        assert gates.unit(dtype) == 2.0**-bits


@pytest.mark.parametrize(
    ("out", "ref", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0),
        ([3.0, 5.0], [3.0, 4.0], 0.2),  # ‖(0, 1)‖ / ‖(3, 4)‖
        ([0.0, 0.0], [0.0, 0.0], 0),  # a convolution of zeros is right
        ([1e-9, 0.0], [0.0, 0.0], INF),
        ([NAN, 4.0], [3.0, 4.0], NAN),
        ([], [], 0),
    ],
)
def test_the_error_is_relative_in_norm(out: list[float], ref: list[float], error: float) -> None:
    found = gates.error(torch.tensor(out, dtype=torch.float64), torch.tensor(ref, dtype=torch.float64))
    assert found == pytest.approx(error, nan_ok=True)


def test_the_error_is_taken_in_float64() -> None:
    ref = torch.tensor([1 + 2.0**-40], dtype=torch.float64)  # float32 would take it for 1
    assert gates.error(torch.ones(1), ref) == pytest.approx(2.0**-40, rel=1e-6)


@pytest.mark.parametrize(
    ("precision", "algorithm", "bound"),
    [
        ("float32", "im2col", 24 * 2**-24),  # √576 = 24
        ("float32", "winograd2", 24 * 2**-24),
        ("float32", "winograd4", 96 * 2**-24),  # its transforms cost four times as much
        ("float64", "toeplitz", 24 * 2**-53),
        ("bfloat16", "triton", 2**-8 + 24 * 2**-24),  # summed in float32, rounded once
        ("float16", "triton", 2**-11 + 24 * 2**-24),
        ("tf32", "triton", 1e-3),  # whose inputs are rounded, so the number of products matters little
    ],
)
def test_the_bound_of_576_products(precision: str, algorithm: str, bound: float) -> None:
    assert gates.bound(576, precision, algorithm) == bound


@pytest.mark.parametrize(
    ("out", "dtype", "differ"),
    [
        ([1.0, 257.0], torch.float32, 0),
        ([1.0, 256.0], torch.bfloat16, 0),  # 257 rounded once
        ([1.0, 258.0], torch.bfloat16, 1),  # the other neighbour
        ([1.0, NAN], torch.float32, 1),
        ([2.0, NAN], torch.float32, 2),
    ],
)
def test_exact_counts_the_values_that_are_not_float64s_rounded_once(
    out: list[float], dtype: torch.dtype, differ: int
) -> None:
    gate = gates.exact(torch.tensor(out, dtype=dtype), torch.tensor([1.0, 257.0], dtype=torch.float64))
    assert (gate.value, gate.limit) == (differ, 0)


@pytest.mark.parametrize(
    ("terms", "algorithm", "asked"),
    [
        (2**22 - 1, "im2col", True),
        (2**22, "im2col", False),  # 2^22 products of at most 4 may reach 2^24, beyond which float32 has gaps
        (9, "winograd2", False),  # its transforms have fractions
        (9, "winograd4", False),
    ],
)
def test_exact_is_asked_where_every_partial_sum_is_a_float32(terms: int, algorithm: str, asked: bool) -> None:
    assert gates.is_exact(terms, algorithm) is asked


@pytest.mark.parametrize(
    ("found", "torchs", "result", "held", "value", "passed"),
    [
        (2e-7, 1e-7, "forward", True, 2, True),
        (2.1e-7, 1e-7, "forward", True, 2.1, False),
        (3e-7, 1e-7, "input gradient", True, 3, True),  # gradients may be off by three times torch's error
        (3.1e-7, 1e-7, "weight gradient", True, 3.1, False),
        (9e-7, 1e-7, "forward", False, 9, True),  # auto would have picked another
        (0.0, 0.0, "forward", True, 0, True),  # both exact
        (1e-9, 0.0, "forward", True, INF, False),  # torch is exact, and we are not
        (NAN, 1e-7, "forward", False, NAN, False),
        (NAN, 0.0, "forward", True, INF, False),
    ],
)
def test_relative_to_torchs_own_error(
    found: float, torchs: float, result: str, held: bool, value: float, passed: bool
) -> None:
    gate = gates.relative(found, torchs, result, held)
    assert gate.value == pytest.approx(value, nan_ok=True)
    assert gate.passed is passed


def test_written_counts_nan_in_all_outputs() -> None:
    assert gates.written(torch.ones(3), torch.tensor([INF, NAN]), torch.full((2,), NAN)).value == 3


def test_empty_memory_is_full_of_nan_within_poisoned_and_only_there() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with gates.poisoned():
        assert torch.empty(1000).isnan().all()
        assert torch.ones(3, dtype=torch.bfloat16).new_empty(1000).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() is before
    with pytest.raises(ZeroDivisionError), gates.poisoned():
        raise ZeroDivisionError
    assert torch.are_deterministic_algorithms_enabled() is before


def test_arithmetic_is_put_back() -> None:
    def settings() -> tuple[Any, ...]:
        cudnn = torch.backends.cudnn
        return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark

    before = settings()
    with arithmetic("tf32"):
        assert settings() == ("high", True, True, False)
    with arithmetic("float32"):
        assert settings() == ("highest", False, True, False)
    assert settings() == before


def adjoint_of(change: Callable[[Results[Tensor]], Results[Tensor]]) -> Gate:
    """Of a 1 x 1 convolution with two channels, whose results are changed after they were computed."""
    x, weight, g = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, -2.0]]), torch.tensor([[2.0]])
    found = Results(x @ weight.t(), g @ weight, g.t() @ x)  # -5; (2, -4); (6, 8): every inner product is -10
    return gates.adjoint((x, weight, g), change(found), Results(1e-3, 1e-3, 1e-3))


def test_adjoint_compares_the_three_inner_products() -> None:
    assert adjoint_of(lambda found: found).value == 0
    # ⟨y, g⟩ = -8 instead of -10, over ‖y‖·‖g‖ = 4 · 2.
    assert adjoint_of(lambda found: found._replace(y=torch.tensor([[-4.0]]))).value == pytest.approx(2 / 8)
    # ⟨x, input_grad⟩ = -14, over 5 · 2; and the limit is 1e-3 (‖y‖·‖g‖ + ‖weight‖·‖weight_grad‖) over the same.
    gate = adjoint_of(lambda found: found._replace(input_grad=torch.tensor([[2.0, -5.0]])))
    assert gate.value == pytest.approx(4 / 10)
    assert gate.limit == pytest.approx(1e-3 * (10 + max(5 * 29**0.5, 5**0.5 * 10)) / 10)
    assert not gate.passed
    assert not adjoint_of(lambda found: found._replace(weight_grad=torch.full((1, 2), NAN))).passed
    assert not adjoint_of(lambda found: found._replace(y=torch.full((1, 1), NAN))).passed


EVERY_AXIS_DIFFERS = Shape(48, 40, (13, 11), Geometry((3, 2), (2, 1), (1, 0), (2, 1), 2))
TWO_FILTERS_A_CHANNEL = Shape(3, 6, (32, 32), Geometry((3, 3), padding=(1, 1), groups=3))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("im2col", EVERY_AXIS_DIFFERS), ("triton", EVERY_AXIS_DIFFERS), ("im2col", TWO_FILTERS_A_CHANNEL)],
)
def test_no_worse_than_torch(name: str, shape: Shape) -> None:
    if reason := ladder.misfit(name, shape, torch.float32, CPU):
        pytest.skip(f"{name} {reason}")
    ratios = {
        row.result: row.gate.value
        for row in ladder.measure(shape, 3, "float32", CPU, name)
        if row.gate.name == "relative"
    }
    assert ratios.keys() == gates.TORCHS.keys()
    assert all(ratio <= gates.TORCHS[result] for result, ratio in ratios.items())


# Of the whole network


@pytest.mark.parametrize(
    ("ours", "torchs", "passed"),
    [
        (0, 0, True),
        (11, 0, True),  # so few that it may be chance, or a flip: 9 + 0.002 · 1000
        (12, 0, False),
        (362, 100, True),  # 3 · 100 + 3 · √300 + 11 = 362.96
        (363, 100, False),
    ],
)
def test_signs_may_be_lost_three_times_as_often_as_by_torch_and_by_chance(ours: int, torchs: int, passed: bool) -> None:
    ref = torch.ones(1000)

    def lost(count: int) -> Tensor:
        return torch.where(torch.arange(1000) < count, -ref, ref)

    gate, own = gates.signs(lost(ours), lost(torchs), ref)
    assert (gate.passed, gate.value, own) == (passed, ours / 1000, torchs / 1000)


def test_a_gradient_of_nan_or_of_zeros_has_lost_its_signs() -> None:
    ref = torch.tensor([1.0, -1.0] * 20)
    for lost in (torch.full_like(ref, NAN), torch.zeros_like(ref)):
        assert not gates.signs(lost, ref, ref)[0].passed


@pytest.mark.parametrize(
    ("precision", "ours", "differ"),
    [
        ("float32", [1.0, 2.0, 0.0], 0),
        ("float32", [2.0, 1.9, 0.0], 1),  # whatever the reason
        # torch is off by 0.1, so we may be by 0.2: classes that float64 has 0.4 apart may change places, at 0.3 apart
        ("bfloat16", [2.0, 1.9, 0.0], 0),
        ("bfloat16", [0.0, 1.0, 2.0], 1),  # these are 1.5 apart
    ],
)
def test_top1_is_torchs_but_where_rounding_decides(precision: str, ours: list[float], differ: int) -> None:
    ref = torch.tensor([[1.7, 2.0, 0.5]], dtype=torch.float64)
    torchs = torch.tensor([[1.7, 2.1, 0.5]])
    assert gates.top1(torch.tensor([ours]), torchs, ref, precision).value == differ


# The convolutions of a network


class Scaled(nn.Conv2d):
    """A subclass that computes something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * 0.5, self.bias, groups=self.groups)


class Every(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Sequential(nn.Conv2d(3, 8, (3, 2), (2, 1), (1, 0), (2, 1)), nn.Identity())
        self.again = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.same = Conv2dSame(8, 6, 3, stride=2, padding=0)
        self.around = nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular")
        self.scaled = Scaled(6, 4, 1, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.kernel = nn.Parameter(torch.zeros(2, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.again(self.plain(x)))
        x = self.up(self.scaled(self.around(self.same(x))))
        F.conv1d(x.flatten(2), self.kernel.flatten(2))
        return F.conv2d(x, self.kernel).mean((2, 3))


def test_every_convolution_is_seen_padded_as_it_is_computed() -> None:
    net = Every()
    found = shapes(net, torch.zeros(1, 3, 13, 9))
    assert found == {
        Shape(3, 8, (13, 9), Geometry((3, 2), (2, 1), (1, 0), (2, 1))): ("plain.0",),
        Shape(8, 8, (6, 8), Geometry((3, 3), padding=(1, 1), groups=8)): ("again", "again"),
        Shape(8, 6, (7, 9), Geometry((3, 3), (2, 2))): ("same",),  # 6 x 8, one more below and to the right
        Shape(6, 6, (5, 6), Geometry((3, 3))): ("around",),  # wrapped round by one on all sides
        Shape(6, 4, (3, 4), Geometry((1, 1), groups=2)): ("scaled",),
        Shape(4, 2, (4, 5), Geometry((1, 1))): ("",),  # the network's own code
    }
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


def test_a_network_that_fails_is_left_without_hooks() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 5))
    with pytest.raises(RuntimeError):
        shapes(net, torch.zeros(1, 3, 9, 9))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (Shape(64, 256, (56, 56), Geometry((1, 1))), "64 → 256, 1×1 at 56×56"),
        (Shape(3, 64, (224, 224), Geometry((7, 7), (2, 2), (3, 3))), "3 → 64, 7×7/2 at 224×224"),
        (
            Shape(96, 96, (113, 113), Geometry((3, 3), (2, 2), groups=96)),
            "96 → 96, 3×3/2 pad 0 depthwise at 113×113",
        ),
        (
            Shape(6, 4, (9, 7), Geometry((3, 2), (2, 1), (1, 0), (2, 1), 2)),
            "6 → 4, 3×2/2×1 pad 1×0 dilation 2×1 in 2 groups at 9×7",
        ),
    ],
)
def test_shapes_are_said_in_one_line(shape: Shape, text: str) -> None:
    assert str(shape) == text


def test_products_are_counted_for_each_result() -> None:
    shape = Shape(6, 4, (9, 7), Geometry((3, 2), (2, 1), (1, 0), (2, 1), 2))
    assert shape.y_shape(2) == (2, 4, 4, 6)
    assert shape.terms(2) == (3 * 6, 2 * 6, 2 * 4 * 6)


def test_miniatures_are_small_and_one_a_geometry() -> None:
    large = [
        Shape(64, 64, (56, 56), Geometry((3, 3), padding=(1, 1))),
        Shape(128, 256, (28, 28), Geometry((3, 3), padding=(1, 1))),  # the same but for its size
        Shape(64, 64, (56, 56), Geometry((3, 3), padding=(1, 1), groups=64)),
        Shape(96, 192, (28, 28), Geometry((3, 3), padding=(1, 1), groups=96)),  # two filters a channel
        Shape(64, 64, (56, 56), Geometry((3, 3), padding=(1, 1), groups=32)),
        Shape(3, 64, (224, 224), Geometry((7, 7), (2, 2), (3, 3))),
        Shape(3, 768, (224, 224), Geometry((16, 16), (16, 16))),
        Shape(2, 1, (4, 4), Geometry((1, 1), padding=(9, 9))),  # more padding than outputs
    ]
    small = miniatures(large)
    assert [(s.channels, s.filters, s.size, s.geometry.groups) for s in small] == [
        (3, 4, (5, 7), 1),
        (3, 3, (5, 7), 3),
        (3, 6, (5, 7), 3),
        (4, 4, (5, 7), 2),
        (3, 4, (10, 14), 1),
        (3, 4, (95, 127), 1),
        (2, 1, (1, 1), 1),
    ]
    assert [s.y_shape(2)[2:] for s in small[:-1]] == [(5, 7)] * 6


# The ladder, and faults planted in it

SMALL = Shape(3, 4, (6, 7), Geometry((3, 3), padding=(1, 1)))
STRIDED = Shape(3, 4, (8, 11), Geometry((3, 2), (2, 2), (1, 0)))


def failures(rows: list[ladder.Measurement]) -> set[tuple[str, str, str]]:
    """(algorithm, result, gate) of those that fail."""
    return {(row.algorithm, row.result, row.gate.name) for row in rows if not row.gate.passed}


def test_the_ladder_is_climbed_from_torch_to_winograd() -> None:
    rows = list(ladder.climb(SMALL, CPU))
    assert failures(rows) == set()
    climbed = list(dict.fromkeys(row.algorithm for row in rows))
    assert climbed[:5] == ["direct", "toeplitz", "im2col", "winograd2", "winograd4"]  # triton where it can
    for name in climbed:
        measured = {row.result: row.gate for row in rows if row.algorithm == name}
        assert set(measured) == {"forward", "input gradient", "weight gradient", "inner products", "outputs"}
        assert measured["forward"].name == ("bound" if name.startswith("winograd") else "exact")


def test_each_convolution_is_measured_by_all_gates() -> None:
    rows = ladder.measure(SMALL, 2, "float32", CPU)
    assert failures(rows) == set()
    assert [(row.result, row.gate.name) for row in rows] == [
        *((result, gate) for result in gates.NAMES for gate in ("bound", "relative")),
        ("inner products", "adjoint"),
        ("outputs", "written"),
        *((result, "exact") for result in gates.NAMES),
    ]
    assert {row.algorithm for row in rows} == {"im2col"}
    assert all(row.torch for row in rows if row.gate.name in ("bound", "relative"))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_and_in_low_precision(precision: str) -> None:
    assert failures(ladder.measure(STRIDED, 2, precision, CPU)) == set()


def test_an_algorithm_asked_for_is_taken_where_it_suits_and_its_ratio_is_reported() -> None:
    rows = ladder.measure(SMALL, 2, "float32", CPU, "winograd4")
    assert {row.algorithm for row in rows} == {"winograd4"}
    assert {row.gate.limit for row in rows if row.gate.name == "relative"} == {INF}  # auto would take im2col
    assert not any(row.gate.name == "exact" for row in rows)
    rows = ladder.measure(STRIDED, 2, "float32", CPU, "winograd4")
    assert {row.algorithm for row in rows} == {"im2col"}
    assert {row.gate.limit for row in rows if row.gate.name == "relative"} == {2, 3}


def shift_a_tap(patch: pytest.MonkeyPatch) -> None:
    right = im2col.pack
    patch.setattr(im2col, "pack", lambda weight, geometry: right(weight.roll(1, 3), geometry))


def drop_a_channel(patch: pytest.MonkeyPatch) -> None:
    right = im2col.weight_grad

    def wrong(x: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
        grad = right(x, g, geometry)
        grad[:, -1] = 0
        return grad

    patch.setattr(im2col, "weight_grad", wrong)


def swap_the_phases(patch: pytest.MonkeyPatch) -> None:
    right = im2col.pack_input_grad

    def wrong(weight: Tensor, geometry: Geometry) -> list[Tensor]:
        first, second, third, fourth = right(weight, geometry)
        return [second, first, fourth, third]

    patch.setattr(im2col, "pack_input_grad", wrong)


def leave_a_line(patch: pytest.MonkeyPatch) -> None:
    """The last line of the output is not written, which fresh memory may hide."""
    right = im2col.forward

    def wrong(*arguments: Any) -> Tensor:
        y = right(*arguments)
        y[:, :, -1] = torch.empty_like(y[:, :, -1])
        return y

    patch.setattr(im2col, "forward", wrong)


def round_the_sums(patch: pytest.MonkeyPatch) -> None:
    """Inputs rounded to 11 bits, as in tf32: whole numbers do not show it."""
    right = im2col.forward

    def wrong(x: Tensor, *others: Any) -> Tensor:
        return right(x.half().to(x), *others)

    patch.setattr(im2col, "forward", wrong)


@pytest.mark.parametrize(
    ("plant", "in_miniature", "at_full_size"),
    [
        (shift_a_tap, {("forward", "exact")}, {("forward", "exact"), ("forward", "bound"), ("forward", "relative")}),
        (
            drop_a_channel,
            {("weight gradient", "exact")},
            {("weight gradient", "exact"), ("weight gradient", "bound"), ("weight gradient", "relative")},
        ),
        (
            swap_the_phases,
            {("input gradient", "exact")},
            {("input gradient", "exact"), ("input gradient", "bound"), ("input gradient", "relative")},
        ),
        (
            leave_a_line,
            {("forward", "exact"), ("outputs", "written")},
            {("outputs", "written"), ("forward", "exact"), ("forward", "bound"), ("forward", "relative")},
        ),
        (round_the_sums, set(), {("forward", "bound"), ("forward", "relative")}),
    ],
)
def test_a_planted_fault_is_seen(
    plant: Callable[[pytest.MonkeyPatch], None],
    in_miniature: set[tuple[str, str]],
    at_full_size: set[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    rung = {(result, gate) for name, result, gate in failures(list(ladder.climb(STRIDED, CPU))) if name == "im2col"}
    full = {(result, gate) for _, result, gate in failures(ladder.measure(STRIDED, 2, "float32", CPU))}
    # Where a fault is in one result alone, the inner products part too.
    assert rung - {("inner products", "adjoint")} == in_miniature
    assert (("inner products", "adjoint") in rung) == bool(in_miniature)
    assert full - {("inner products", "adjoint")} == at_full_size


def test_a_fault_on_one_rung_is_blamed_on_it_and_not_on_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    right = toeplitz.forward
    monkeypatch.setattr(toeplitz, "forward", lambda *a: right(*a) + 1)
    rows = list(ladder.climb(SMALL, CPU))
    assert {name for name, *_ in failures(rows)} == {"toeplitz"}


def test_a_fault_of_winograds_is_beyond_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    right = winograd.Winograd.pack
    monkeypatch.setattr(winograd.Winograd, "pack", lambda self, *a: [right(self, *a)[0] * (1 + 1e-14 * (self.m == 4))])
    found = failures(list(ladder.climb(SMALL, CPU)))
    assert ("winograd4", "forward", "bound") in found
    assert not any(name == "winograd2" for name, *_ in found)


# Whole networks


class Moved(nn.Module):
    """A network whose logits are moved, as a wrong conversion may do it; `inside` says on which inputs."""

    def __init__(self, net: nn.Module, by: float):
        super().__init__()
        self.net, self.by = net, by

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.by * x.mean((2, 3))[:, :1] * torch.arange(5.0, dtype=x.dtype)


def compared(converted: nn.Module) -> list[ladder.Measurement]:
    net, x = conv_net().requires_grad_(False), images(6)
    exact = copy.deepcopy(converted).double()
    return list(agree(net, converted, conv_net().double(), exact, x, torch.arange(6) % 5, "float32", 4))


def test_a_network_agrees_with_itself() -> None:
    rows = compared(conv_net())
    assert failures(rows) == set()
    assert [(row.result, row.gate.name) for row in rows] == [
        ("logits", "error"), ("logits", "relative"), ("input gradient", "error"), ("input gradient", "relative"),
        ("logits in float64", "error"), ("input gradient in float64", "error"),
        ("outputs", "written"), ("input gradient", "signs"), ("logits", "top-1"),
    ]  # fmt: skip
    assert rows[1].gate.value == rows[3].gate.value == 1


def test_another_network_does_not() -> None:
    assert failures(compared(Moved(conv_net(), 1e-4))) == {
        ("", "logits", "relative"), ("", "logits in float64", "error"), ("", "input gradient in float64", "error"),
    }  # fmt: skip
    far = failures(compared(Moved(conv_net(), 10.0)))
    assert {("", "input gradient", "signs"), ("", "logits", "top-1")} < far


def test_attacks_come_to_the_same_on_the_same_network() -> None:
    net, x = conv_net().requires_grad_(False), images(6)
    for name in ("fgsm", "pgd"):
        attacked = attack(net, conv_net().requires_grad_(False), x, list("abcdef"), name, 0.05, 4, 0, 4)
        assert attacked.same == 6
        assert 0 < sum(attacked.original_fell)
        assert attacked.original_confirmed == tuple(True if fell else None for fell in attacked.original_fell)
        assert all(row.gate.passed for row in verdicts(attacked))


def test_attacks_do_not_on_another() -> None:
    net, x = conv_net().requires_grad_(False), images(6)
    attacked = attack(net, Moved(conv_net().requires_grad_(False), 10.0), x, list("abcdef"), "pgd", 0.02, 4, 0, 4)
    rows = {row.result: row.gate for row in verdicts(attacked)}
    assert rows["verdicts"].value == 6 - attacked.same > 0
    assert not rows["adversarials found on the converted network"].passed


def test_verdicts_count_what_differs_and_what_the_other_refutes() -> None:
    attacked = Attacked(
        "pgd", 0.1, tuple("abc"), (True, True, False), (True, False, False), (True, False, None), (False, None, None)
    )
    assert [row.gate.value for row in verdicts(attacked)] == [1, 1, 1]
