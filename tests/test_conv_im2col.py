import math

import pytest
import torch

from conv_cases import (
    CASES,
    MEMORY,
    NAMES,
    assert_any_memory,
    assert_exact,
    assert_within_bound,
    computed,
    integers,
    randoms,
    reference,
    relative_error,
)
from robust.conv import im2col, product
from robust.conv.algorithm import Epilogue
from robust.conv.geometry import Geometry

DIFFERING = CASES[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_whole_numbers_are_exact(case, dtype):
    assert_exact(im2col, case, dtype)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_random_numbers_are_within_the_bound(case):
    assert_within_bound(im2col, case)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_float32_is_within_its_bound(case):
    inputs = randoms(case, dtype=torch.float32)
    expected, found = reference(inputs, case.geometry), computed(im2col, inputs, case.geometry)
    for name, terms in case.products._asdict().items():
        assert relative_error(getattr(found, name), getattr(expected, name)) <= max(terms, 1) ** 0.5 * 2**-24, name


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_any_memory_format(case, memory):
    assert_any_memory(im2col, case, memory, torch.float32)


@pytest.mark.parametrize("values", [1, 100, 1000])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_blocks_of_any_size(case, values, monkeypatch):
    """From a line at a time, which cuts through images, to several images."""
    monkeypatch.setattr(im2col, "WINDOW_VALUES", values)
    monkeypatch.setattr(im2col, "TAP_VALUES", values)
    assert_exact(im2col, case)
    inputs = integers(case, dtype=torch.float32)
    residual = torch.randint(-2, 3, case.y_shape).float()
    packed = im2col.pack(inputs.weight, case.geometry)
    y = im2col.forward(inputs.x, packed, case.geometry, Epilogue(residual=residual))
    assert torch.equal(y, (reference(inputs, case.geometry).y + residual).float())


@pytest.mark.parametrize("channels, scattered", [(1, True), (3, True), (4, False)])
def test_a_gradient_at_few_channels_is_scattered(channels, scattered):
    geometry = Geometry((5, 4), (2, 3), (2, 1), (1, 2))
    case = DIFFERING._replace(channels=channels, filters=12, geometry=geometry, size=(11, 13))
    packed = im2col.pack_input_grad(randoms(case).weight, geometry)
    assert (packed[0].ndim == 2) == scattered
    assert_exact(im2col, case)
    assert_within_bound(im2col, case)


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(product, "_has_onednn", lambda a: False)
    assert_exact(im2col, DIFFERING, torch.float32)


@pytest.mark.parametrize(
    "length, count", [(1, 1), (512, 1), (576, 2), (1152, 3), (1280, 4), (4608, 9), (1031, 3), (0, 1)]
)
def test_pieces(length, count):
    b = torch.arange(3.0 * length).view(3, length)
    found = product.pieces(b)
    assert found.shape == (count, 3, math.ceil(length / count)) and found.is_contiguous()
    joined = torch.cat([*found], 1)
    assert torch.equal(joined[:, :length], b) and not joined[:, length:].any()


@pytest.mark.parametrize("length", [4096, 4093])  # the second is prime
def test_long_sums_round_as_short_ones(length):
    """In one piece the error at 4,096 is 1.5 times that at 512, unless oneDNN itself cuts it, as some versions do."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, length, generator=generator), torch.randn(48, length, generator=generator)
    if not product._has_onednn(a):
        pytest.skip("by another library than oneDNN")
    short, long = (
        relative_error(product.product(x, product.pieces(w)), x.double() @ w.double().t())
        for x, w in ((a[:, :512].contiguous(), b[:, :512]), (a, b))
    )
    assert long < 1.2 * short


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("k, longest, count", [(8, 4, 2), (29, 6, 5)])  # in equal pieces, and with a shorter one
def test_product_and_its_epilogue(k, longest, count, shifted, added, relu, onednn, monkeypatch):
    monkeypatch.setattr(product, "LONGEST", longest)
    if not onednn:
        monkeypatch.setattr(product, "_has_onednn", lambda a: False)
    generator = torch.Generator().manual_seed(0)
    a, b, residual = (torch.randint(-3, 4, shape, generator=generator).float() for shape in ((5, k), (4, k), (5, 4)))
    shift = torch.tensor([-1.0, 0, 3, 8])
    epilogue = Epilogue(shift if shifted else None, residual if added else None, relu)
    assert len(product.pieces(b)) == count
    y = product.product(a, product.pieces(b), epilogue)
    expected = a @ b.t() + shifted * shift + added * residual
    assert torch.equal(y, expected.relu() if relu else expected)


@pytest.mark.parametrize("plant", ["shifted tap", "dropped channel", "wrong phase"])
def test_a_planted_fault_is_seen(plant, monkeypatch):
    """What the other tests would do if the code were wrong."""
    packed, pack_input_grad = im2col._packed, im2col.pack_input_grad
    if plant == "shifted tap":
        monkeypatch.setattr(im2col, "_packed", lambda weight, groups: packed(weight.roll(1, 3), groups))
    elif plant == "dropped channel":
        first = torch.tensor(0)
        monkeypatch.setattr(im2col, "_packed", lambda weight, groups: packed(weight.index_fill(1, first, 0), groups))
    else:
        monkeypatch.setattr(im2col, "pack_input_grad", lambda *given: pack_input_grad(*given)[::-1])
    with pytest.raises(AssertionError):
        assert_exact(im2col, DIFFERING._replace(geometry=Geometry((4, 4), (2, 2), (1, 1))))
