"""conv2d is torch's convolution by every algorithm, as an operator that autograd, the compiler and opcheck know."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from conv_cases import CASES, MEMORY, Called, Case, integers, randoms, relative_error
from robust.conv import functional
from robust.conv.algorithm import ALGORITHMS, algorithm
from robust.conv.functional import choose, conv2d, conv2d_frozen
from robust.conv.gates import poisoned
from robust.conv.geometry import Geometry

CPU = torch.device("cpu")
NAMES = [name for name in ALGORITHMS if name != "triton"]  # which computes no float64
LOSS = {"winograd2": 2.0, "winograd4": 4.0}  # how much more than √K·u an algorithm may be off; the others not at all
OPERATORS = torch.ops.robust

EVERY_AXIS, EMPTY = CASES[0], CASES[-1]
BY_NAME = {case.name: case for case in CASES}
SMALL_3X3 = Case("3x3, few pixels", 1, 2, 3, (4, 3), Geometry((3, 3), padding=(1, 0)))
SMALL = Case("every axis differs, few pixels", 2, 2, 4, (4, 3), Geometry((2, 1), (2, 1), (1, 0), (1, 2), 2))


def suits(name: str, geometry: Geometry, dtype: torch.dtype = torch.float64) -> bool:
    return name == "auto" or algorithm(name).misfit(geometry, dtype, CPU) is None


def suited(cases: list[Case], *also: str) -> list[Any]:
    """Every algorithm on each of the cases that it suits."""
    return [
        pytest.param(name, case, id=f"{name}, {case.name}")
        for name, case in product((*also, *NAMES), cases)
        if suits(name, case.geometry)
    ]


def how(geometry: Geometry) -> tuple[Any, ...]:
    return geometry.stride, geometry.padding, geometry.dilation, geometry.groups


def differentiated(f: Callable[..., Tensor], inputs: list[Tensor], g: Tensor) -> list[Tensor]:
    """The output of f, and the gradient at each of the inputs from g at the output."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


# The convolution and its gradients


@pytest.mark.parametrize(("name", "case"), suited([*CASES, SMALL, SMALL_3X3], "auto"))
def test_value_and_three_gradients_are_torchs(name: str, case: Case) -> None:
    """On whole numbers: to the last bit, but for Winograd's fractions."""
    x, weight, g = integers(case)
    bias = torch.arange(case.filters, dtype=torch.float64) - 1
    expected = differentiated(lambda *a: F.conv2d(*a, *how(case.geometry)), [x, weight, bias], g)
    found = differentiated(lambda *a: conv2d(*a, *how(case.geometry), name), [x, weight, bias], g)
    for result, torchs, terms in zip(found, expected, (*case.products, 1), strict=True):
        # Winograd's transforms alone sum up to 36 values.
        bound = LOSS[name] * max(terms, 36) ** 0.5 * 2**-53 if name in LOSS else 0
        assert result.dtype == torch.float64
        assert relative_error(result, torchs) <= bound


def test_a_number_stands_for_both_axes() -> None:
    x, weight, _ = integers(BY_NAME["3x3 stride 2"])
    assert torch.equal(conv2d(x, weight, stride=2, padding=1), F.conv2d(x, weight, stride=2, padding=1))


@pytest.mark.parametrize(("name", "case"), suited([EVERY_AXIS, BY_NAME["3x3"], BY_NAME["depthwise"]]))
@pytest.mark.parametrize("memory", MEMORY)
def test_any_memory_in_and_channels_last_out(name: str, case: Case, memory: str) -> None:
    x, weight, g = integers(case)
    expected = differentiated(lambda *a: F.conv2d(*a, None, *how(case.geometry)), [x, weight], g)
    x, weight, g = map(MEMORY[memory], (x, weight, g))
    with poisoned():
        found = differentiated(lambda *a: conv2d(*a, None, *how(case.geometry), name), [x, weight], g)
    for result, torchs in zip(found, expected, strict=True):
        like = torch.empty(result.shape, memory_format=torch.channels_last)
        assert result.stride() == like.stride()  # as the fake operators say
        assert torch.equal(result.round(), torchs)  # of Winograd's, whose fractions leave some 1e-15
        assert name in LOSS or torch.equal(result, torchs)


@pytest.mark.parametrize("name", ["auto", *NAMES])
def test_of_no_images_there_is_no_output_and_the_weights_gradient_is_zero(name: str) -> None:
    case = EMPTY if suits(name, EMPTY.geometry) else SMALL_3X3._replace(batch=0)
    x, weight, g = randoms(case)
    y, x_grad, weight_grad = differentiated(lambda *a: conv2d(*a, None, *how(case.geometry), name), [x, weight], g)
    assert (y.shape, x_grad.shape) == (case.y_shape, case.x_shape)
    assert torch.equal(weight_grad, torch.zeros(case.weight_shape, dtype=torch.float64))


@pytest.mark.parametrize(("name", "case"), suited([SMALL, SMALL_3X3]))
def test_first_and_second_derivatives_are_those_of_finite_differences(name: str, case: Case) -> None:
    x, weight, g = randoms(case)
    bias = torch.linspace(-1, 1, case.filters, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    f = lambda *a: conv2d(*a, *how(case.geometry), name)  # noqa: E731
    assert torch.autograd.gradcheck(f, inputs)
    # It is bilinear: half of the outputs say as much about the second derivatives as all.
    assert torch.autograd.gradgradcheck(lambda *a: f(*a)[:, ::2], inputs, g[:, ::2].requires_grad_())


def test_only_the_gradients_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a weight that wants none, as in an attack, it would cost as much as all the rest."""
    x, weight, g = integers(SMALL)
    chosen = algorithm("im2col")
    monkeypatch.setattr(chosen, "weight_grad", None)
    (x_grad,) = torch.autograd.grad(conv2d(x.requires_grad_(), weight, None, *how(SMALL.geometry)), x, g)
    assert x_grad.shape == x.shape
    monkeypatch.undo()
    monkeypatch.setattr(chosen, "input_grad", None)
    y = conv2d(x.detach(), weight.requires_grad_(), None, *how(SMALL.geometry))
    assert torch.autograd.grad(y, weight, g)[0].shape == weight.shape


# Frozen, with its epilogue

EPILOGUES = [dict(zip(("shift", "residual", "relu"), bits, strict=True)) for bits in product((0, 1), repeat=3)]


def frozen(name: str, case: Case, epilogue: dict[str, int], dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """conv2d_frozen and torch's words for it, each of (x, residual); and x, residual and the gradient at the output."""
    x, weight, g = randoms(case, dtype=dtype)
    shift = torch.linspace(-1, 1, case.filters, dtype=dtype) if epilogue["shift"] else None
    residual = torch.randn(g.shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    chosen, relu = algorithm(name), bool(epilogue["relu"])
    packed, packed_grad = chosen.pack(weight, case.geometry), chosen.pack_input_grad(weight, case.geometry)
    channels = (case.channels, case.filters)

    def ours(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return conv2d_frozen(x, packed, packed_grad, channels, case.geometry, name, shift, residual, relu)

    def torchs(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, weight, None, *how(case.geometry))
        y = y if shift is None else y + shift.view(-1, 1, 1)
        y = y if residual is None else y + residual
        return y.relu() if relu else y

    return ours, torchs, [x, residual] if epilogue["residual"] else [x], g


@pytest.mark.parametrize(("name", "case"), suited([EVERY_AXIS, BY_NAME["3x3"], BY_NAME["depthwise"]]))
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda e: "+".join(k for k, on in e.items() if on) or "bare")
def test_frozen_with_any_epilogue_is_torchs(name: str, case: Case, epilogue: dict[str, int]) -> None:
    ours, torchs, inputs, g = frozen(name, case, epilogue)
    found, expected = differentiated(ours, inputs, g), differentiated(torchs, inputs, g)
    assert len(found) == 2 + epilogue["residual"]
    for result, known in zip(found, expected, strict=True):
        assert relative_error(result, known) <= 1e-14


@pytest.mark.parametrize("epilogue", [EPILOGUES[0], EPILOGUES[-1]], ids=["bare", "full"])
def test_frozen_float32_takes_onednns_fused_product(epilogue: dict[str, int]) -> None:
    for case in (EVERY_AXIS, BY_NAME["1x1"], EMPTY):
        ours, torchs, inputs, g = frozen("im2col", case, epilogue, torch.float32)
        for result, known in zip(differentiated(ours, inputs, g), differentiated(torchs, inputs, g), strict=True):
            torch.testing.assert_close(result, known, rtol=1e-5, atol=1e-5)


def test_frozen_is_no_function_of_its_weights() -> None:
    """And says so, where zeros would be wrong."""
    ours, _, (x, residual), g = frozen("im2col", SMALL, EPILOGUES[-1])
    y = ours(x.requires_grad_(), residual)
    (x_grad,) = torch.autograd.grad(y, x, g.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        x_grad.square().sum().backward()


def test_frozen_without_the_dispatcher_is_the_operator() -> None:
    """The same bits, in the output and both gradients."""
    ours, _, inputs, g = frozen("im2col", SMALL, EPILOGUES[-1])
    direct = differentiated(ours, inputs, g)
    assert len(direct) == 3

    class Wrapped(Tensor):
        """A subclass, which only the dispatcher knows how to treat."""

    with Called() as seen:
        as_operator = differentiated(ours, [part.as_subclass(Wrapped) for part in inputs], g)
    assert {"conv2d_frozen", "conv2d_frozen_grad"} <= seen.names
    with Called() as seen:
        differentiated(ours, inputs, g)
    assert seen.names and not any("conv2d_frozen" in name for name in seen.names)
    assert all(torch.equal(a, b) for a, b in zip(direct, as_operator, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore:.*torch.jit.trace:FutureWarning")
def test_frozen_can_be_traced() -> None:
    ours, _, (x, residual), _ = frozen("im2col", SMALL, EPILOGUES[-1])
    traced = torch.jit.trace(ours, (x, residual))
    assert "robust::conv2d_frozen" in str(traced.graph)
    assert torch.equal(traced(2 * x, residual), ours(2 * x, residual))


# As an operator


def arguments(case: Case) -> dict[str, tuple[Any, ...]]:
    """Operator -> what to call it with."""
    name = "im2col"
    x, weight, g = randoms(case)
    bias = torch.linspace(1, 2, case.filters, dtype=torch.float64)
    kernel, *others = (list(pair) for pair in (case.geometry.kernel, *how(case.geometry)[:3]))
    rest = (*others, case.geometry.groups, name)
    chosen, size, channels = algorithm(name), list(x.shape[2:]), [case.channels, case.filters]
    packed, packed_grad = chosen.pack(weight, case.geometry), chosen.pack_input_grad(weight, case.geometry)
    return {
        "conv2d": (x.requires_grad_(), weight.requires_grad_(), bias.clone().requires_grad_(), *rest),
        "conv2d_input_grad": (g.clone().requires_grad_(), weight, size, *rest),
        "conv2d_weight_grad": (x, g.clone().requires_grad_(), kernel, *rest),
        "conv2d_frozen": (
            x, packed, packed_grad, bias, g.clone().requires_grad_(), True, channels, kernel, *rest,
        ),
        "conv2d_frozen_grad": (g, g, packed_grad, channels, size, kernel, *rest),
    }  # fmt: skip


@pytest.mark.parametrize(
    "operator", ["conv2d", "conv2d_input_grad", "conv2d_weight_grad", "conv2d_frozen", "conv2d_frozen_grad"]
)
@pytest.mark.parametrize("case", [EVERY_AXIS, EMPTY], ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_opcheck(operator: str, case: Case) -> None:
    torch.library.opcheck(getattr(OPERATORS, operator).default, arguments(case)[operator])


def test_there_are_no_other_operators() -> None:
    """Every one of them is checked above."""
    defined = {name for name in vars(functional).values() if isinstance(name, torch.library.CustomOpDef)}
    assert {definition._qualname for definition in defined} == {f"robust::{name}" for name in arguments(SMALL)}


@pytest.mark.parametrize(("name", "case"), [("auto", EVERY_AXIS), ("winograd2", BY_NAME["3x3"])])
def test_compiles_in_one_graph_forward_and_backward(name: str, case: Case) -> None:
    x, weight, g = randoms(case)
    bias = torch.linspace(-1, 1, case.filters, dtype=torch.float64)
    f = lambda *a: conv2d(*a, *how(case.geometry), name).relu()  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    eager, found = (differentiated(how, [x, weight, bias], g) for how in (f, compiled))
    for result, expected in zip(found, eager, strict=True):
        assert torch.equal(result, expected)


def test_frozen_compiles_in_one_graph_forward_and_backward() -> None:
    ours, _, inputs, g = frozen("im2col", EVERY_AXIS, EPILOGUES[-1])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for result, expected in zip(differentiated(compiled, inputs, g), differentiated(ours, inputs, g), strict=True):
        assert torch.equal(result, expected)


# What auto picks


@pytest.mark.parametrize(
    ("channels", "geometry", "dtype", "device", "name"),
    [
        ((512, 512), Geometry((3, 3), padding=(1, 1)), torch.float32, "cpu", "winograd4"),
        ((512, 511), Geometry((3, 3), padding=(1, 1)), torch.float32, "cpu", "winograd2"),  # one too few for F(4)
        ((256, 1024), Geometry((3, 3)), torch.float32, "cpu", "winograd2"),
        ((255, 1024), Geometry((3, 3)), torch.float32, "cpu", "im2col"),  # its transforms would not pay
        ((512, 512), Geometry((3, 3), (2, 2)), torch.float32, "cpu", "im2col"),  # Winograd's tiles have stride 1
        ((512, 512), Geometry((3, 3), groups=2), torch.float32, "cpu", "im2col"),
        ((512, 512), Geometry((1, 1)), torch.float32, "cpu", "im2col"),
        ((512, 512), Geometry((3, 3)), torch.bfloat16, "cpu", "im2col"),  # Winograd loses too much of 8 bits
        ((512, 512), Geometry((3, 3)), torch.float64, "cpu", "im2col"),
        ((512, 512), Geometry((3, 3)), torch.float32, "cuda", "triton"),
        ((3, 8), Geometry((7, 7), (2, 2)), torch.bfloat16, "cuda", "triton"),
        ((3, 8), Geometry((7, 7), (2, 2)), torch.float64, "cuda", "im2col"),  # Triton's are in float32 at most
    ],
)  # fmt: skip
def test_auto(channels: tuple[int, int], geometry: Geometry, dtype: torch.dtype, device: str, name: str) -> None:
    assert choose(geometry, channels, dtype, torch.device(device)) == name


# Bad input

X, WEIGHT = torch.zeros(2, 6, 9, 7), torch.zeros(4, 6, 3, 2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": X[0]}, r"x must be \(N, C, H, W\), not \(6, 9, 7\)"),
        ({"weight": WEIGHT[0]}, r"weight must be \(K, C / groups, R, S\), not \(6, 3, 2\)"),
        ({"x": X.long()}, "x must be floating point, not torch.int64"),
        (
            {"weight": torch.zeros(4, 5, 3, 2)},
            r"x \(2, 6, 9, 7\) has 6 channels, and weight \(4, 5, 3, 2\) with groups 1 reads 5",
        ),
        ({"groups": 2}, r"x \(2, 6, 9, 7\) has 6 channels, and weight \(4, 6, 3, 2\) with groups 2 reads 12"),
        ({"groups": 3}, r"groups 3 does not divide the 4 output channels of weight \(4, 6, 3, 2\)"),
        ({"groups": 0}, r"groups 0 does not divide the 4 output channels of weight \(4, 6, 3, 2\)"),
        ({"bias": torch.zeros(6)}, r"bias must be \(4,\) for weight \(4, 6, 3, 2\), not \(6,\)"),
        ({"bias": torch.zeros(4, 1)}, r"bias must be \(4,\) for weight \(4, 6, 3, 2\), not \(4, 1\)"),
        ({"weight": WEIGHT.double()}, "weight is torch.float64 on cpu, and x is torch.float32 on cpu"),
        ({"bias": torch.zeros(4).half()}, "bias is torch.float16 on cpu, and x is torch.float32 on cpu"),
        ({"weight": WEIGHT.to("meta")}, "weight is torch.float32 on meta, and x is torch.float32 on cpu"),
        ({"stride": 0}, r"stride must be at least 1, not \(0, 0\)"),
        ({"stride": (1, 2, 3)}, r"stride must be a number or \(rows, columns\), not \(1, 2, 3\)"),
        ({"padding": (0, -1)}, r"padding must be at least 0, not \(0, -1\)"),
        ({"dilation": (1, 0)}, r"dilation must be at least 1, not \(1, 0\)"),
        ({"weight": torch.zeros(4, 6, 0, 2)}, r"kernel must be at least 1, not \(0, 2\)"),
        (
            {"x": X[:, :, :2]},
            r"x \(2, 6, 2, 7\) padded by \(0, 0\) is smaller than the window of \(3, 2\) taps with dilation \(1, 1\), "
            r"which spans \(3, 2\)",
        ),
        ({"dilation": (1, 7)}, r"x \(2, 6, 9, 7\) padded by \(0, 0\) .* dilation \(1, 7\), which spans \(3, 8\)"),
        ({"algorithm": "fft"}, "algorithm 'fft' is none of auto, direct, toeplitz, im2col, winograd2"),
        ({"algorithm": "winograd4"}, "winograd4 computes 3 x 3 windows with stride 1, dilation 1 and one group only"),
    ],
)
def test_what_is_no_convolution_is_refused_by_argument_and_shapes(changes: dict[str, Any], says: str) -> None:
    given = {"x": X, "weight": WEIGHT} | changes
    with pytest.raises(ValueError, match=says):
        conv2d(**given)


@pytest.mark.parametrize(
    ("x", "residual", "says"),
    [
        (torch.zeros(2, 5, 4, 3), None, r"x \(2, 5, 4, 3\) has 5 channels, and the weight reads 2"),
        (torch.zeros(2, 2, 4), None, r"x must be \(N, C, H, W\), not \(2, 2, 4\)"),
        (torch.zeros(2, 2, 2, 1), torch.zeros(2, 4, 9, 9), r"residual must be \(2, 4, 2, 1\) for x \(2, 2, 2, 1\)"),
    ],
)
def test_what_a_frozen_convolution_cannot_take_is_refused(x: Tensor, residual: Tensor | None, says: str) -> None:
    ours, *_ = frozen("im2col", SMALL, EPILOGUES[0], torch.float32)
    for context in (nullcontext(), torch.device("meta")):
        with context, pytest.raises(ValueError, match=says):
            ours(x, residual)


def test_the_fake_operator_refuses_the_same() -> None:
    """So that a compiled program fails when it is compiled."""
    with pytest.raises(ValueError, match=r"weight \(4, 5, 3, 2\) with groups 1 reads 5"):
        conv2d(X.to("meta"), torch.zeros(4, 5, 3, 2, device="meta"))
