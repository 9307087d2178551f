from fractions import Fraction

import pytest
import torch

from conv_cases import CASES, MEMORY, Case, adjoint_gap, assert_any_memory, computed, randoms, reference, relative_error
from robust.conv import im2col
from robust.conv.algorithm import Epilogue
from robust.conv.functional import choose, conv2d
from robust.conv.geometry import Geometry
from robust.conv.winograd import F2, F4, Winograd

PAPER = Winograd(4, tuple(map(Fraction, (0, 1, -1, 2, -2))))  # the points of arXiv 1509.09308
ALGORITHMS = [F2, F4, PAPER, Winograd(1, (Fraction(0), Fraction(1))), Winograd(3, tuple(map(Fraction, (0, 1, -1, 2))))]
SUITED = [case for case in CASES if F2.misfit(case.geometry, torch.float32, torch.device("cpu")) is None]
LARGER = [
    Case(f"{size}, padding {padding}", 3, 5, 4, size, Geometry((3, 3), padding=padding))
    for size in ((8, 8), (9, 14), (3, 3), (1, 7))
    for padding in ((1, 1), (0, 2), (3, 1))
    if min(Geometry((3, 3), padding=padding).output_size(size)) > 0
]


def name(value):
    return value.name if isinstance(value, Case) else f"F({value.m})"


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=name)
def test_the_transforms_are_a_convolution(algorithm):
    """Aᵀ [(G w) ⊙ (Bᵀ d)] is exact, in fractions, for every basis vector of w and d: both sides are bilinear."""
    m, n = algorithm.m, algorithm.n
    a, g, b = algorithm.transforms()
    for tap in range(3):
        for pixel in range(n):
            y = a @ (g[:, tap] * b[:, pixel])
            expected = torch.tensor([float(pixel == out + tap) for out in range(m)])
            torch.testing.assert_close(y, expected.double(), rtol=0, atol=1e-13)


def test_the_papers_matrices():
    """With the points 0, 1, -1 the transforms of F(2 x 2) are those printed in arXiv 1509.09308, up to signs."""
    a, g, b = F2.transforms()
    assert g.abs().tolist() == [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0, 0, 1]]
    assert a.abs().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert b.abs().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize("case", [*SUITED, *LARGER], ids=name)
@pytest.mark.parametrize("algorithm", [F2, F4], ids=name)
def test_agrees_with_torch_in_float64(algorithm, case):
    inputs = randoms(case)
    expected, found = reference(inputs, case.geometry), computed(algorithm, inputs, case.geometry)
    for result, terms in case.products._asdict().items():
        bound = 4 * max(terms, 9) ** 0.5 * 2**-53
        assert relative_error(getattr(found, result), getattr(expected, result)) <= bound, result
    assert adjoint_gap(inputs, found) < 1e-14


@pytest.mark.parametrize("channels", [8, 64])
@pytest.mark.parametrize("algorithm, factor", [(F2, 1), (F4, 4)], ids=["F(2)", "F(4)"])
def test_float32_is_within_its_bound(algorithm, factor, channels):
    """√K·u, and 4 times that for F(4 x 4)."""
    case = Case("", 2, channels, channels + 8, (16, 12), Geometry((3, 3), padding=(1, 1)))
    inputs = randoms(case, dtype=torch.float32)
    expected, found = reference(inputs, case.geometry), computed(algorithm, inputs, case.geometry)
    for result, terms in case.products._asdict().items():
        assert relative_error(getattr(found, result), getattr(expected, result)) <= factor * terms**0.5 * 2**-24, result


def test_these_points_lose_less_than_the_papers():
    case = Case("", 2, 64, 64, (16, 16), Geometry((3, 3), padding=(1, 1)))
    inputs = randoms(case, dtype=torch.float32)
    expected = reference(inputs, case.geometry).y
    ours, theirs = (relative_error(computed(kind, inputs, case.geometry).y, expected) for kind in (F4, PAPER))
    assert ours < 0.6 * theirs


@pytest.mark.parametrize("memory", MEMORY)
def test_any_memory_format(memory):
    """On whole numbers F(2 x 2) is exact: its fractions are halves."""
    for case in SUITED:
        assert_any_memory(F2, case, memory, torch.float64)


@pytest.mark.parametrize("values", [1, 4000])
def test_a_few_images_at_a_time(values, monkeypatch):
    monkeypatch.setattr("robust.conv.winograd.TILE_VALUES", values)
    case = Case("", 5, 3, 4, (7, 6), Geometry((3, 3), padding=(1, 1)))
    inputs = randoms(case)
    for found, expected in zip(computed(F4, inputs, case.geometry), reference(inputs, case.geometry), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [(8, 8), (7, 6)])
def test_epilogue_and_mask(size):
    case = Case("", 2, 3, 4, size, Geometry((3, 3), padding=(1, 1)))
    x, weight, g = randoms(case)
    shift = torch.linspace(-1, 1, 4).double()
    residual, mask = torch.randn(2, *g.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    epilogue = Epilogue(shift, residual, relu=True)
    y = F4.forward(x, F4.pack(weight, case.geometry), case.geometry, epilogue)
    expected = reference((x, weight, g), case.geometry).y + shift.view(-1, 1, 1) + residual
    torch.testing.assert_close(y, expected.relu())
    dx = F4.input_grad(g, F4.pack_input_grad(weight, case.geometry), case.geometry, size, mask)
    torch.testing.assert_close(dx, reference((x, weight, g * (mask > 0)), case.geometry).input_grad)


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry((3, 2)),
        Geometry((3, 3), (2, 1)),
        Geometry((3, 3), dilation=(1, 2)),
        Geometry((3, 3), groups=2),
    ],
    ids=str,
)
def test_what_it_does_not_do(geometry):
    assert "3 x 3" in F4.misfit(geometry, torch.float32, torch.device("cpu"))


def test_half_precision_is_refused():
    assert "accuracy" in F2.misfit(Geometry((3, 3)), torch.bfloat16, torch.device("cpu"))


def test_a_planted_fault_is_seen(monkeypatch):
    case = LARGER[0]
    monkeypatch.setattr(Winograd, "pack", lambda self, weight, geometry: _pack(self, weight.flip(2), geometry))
    with pytest.raises(AssertionError):
        test_agrees_with_torch_in_float64(F4, case)


_pack = Winograd.pack


def test_auto_leaves_the_weight_gradient_to_im2col():
    """Of sums over all pixels, Winograd's lose too much."""
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(2, 512, 7, 7, generator=generator) for _ in range(2))
    geometry = Geometry((3, 3), padding=(1, 1))
    assert choose(geometry, (512, 512), torch.float32, torch.device("cpu")) == "winograd4"
    weight = torch.randn(512, 512, 3, 3, generator=generator).requires_grad_()
    (found,) = torch.autograd.grad(conv2d(x, weight, padding=1), weight, g)
    assert torch.equal(found, im2col.weight_grad(x, g, geometry))
