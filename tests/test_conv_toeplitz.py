"""One sparse matrix is the convolution, its transpose the input gradient, exactly."""

import doctest

import pytest
import torch

from conv_cases import (
    CASES,
    MEMORY,
    NAMES,
    Case,
    assert_any_memory,
    assert_epilogue,
    assert_exact,
    assert_within_bound,
    integers,
    reference,
)
from robust.conv import toeplitz
from robust.conv.geometry import Geometry

EVERY_AXIS, EMPTY = CASES[0], CASES[-1]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_is_torchs_convolution_and_both_gradients_exactly(case: Case) -> None:
    assert_exact(toeplitz, case)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_differs_from_torch_on_random_numbers_by_the_order_of_its_sums_only(case: Case) -> None:
    assert_within_bound(toeplitz, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", [EVERY_AXIS, EMPTY], ids=lambda case: case.name)
def test_any_memory_and_dtype_in_and_channels_last_of_that_dtype_out(
    case: Case, memory: str, dtype: torch.dtype
) -> None:
    assert_any_memory(toeplitz, case, memory, dtype)


def test_the_epilogue_and_the_mask_are_applied() -> None:
    assert_epilogue(toeplitz, EVERY_AXIS)


def test_4x4_to_2x2_has_4x16_entries_of_which_9_values_differ() -> None:
    weight = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    dense = toeplitz.matrix(weight, Geometry((3, 3)), (4, 4)).to_dense()
    assert dense.shape == (4, 16)
    assert dense.unique().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]  # nine weights, and zeros
    # Each weight stands once in every row; 4 · 9 of the 64 entries, and the other 28 are 0.
    assert all((dense == value).sum(dim=1).tolist() == [1, 1, 1, 1] for value in range(1, 10))
    assert (dense == 0).sum() == 28
    # A row is the one above moved by a pixel; the third one begins a row of pixels further on.
    assert dense[0].tolist() == [1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 9, 0, 0, 0, 0, 0]
    for row, moved in ((1, 1), (2, 4), (3, 5)):
        assert torch.equal(dense[row], dense[0].roll(moved))


@pytest.mark.parametrize("case", [EVERY_AXIS, *CASES[-4:-1]], ids=lambda case: case.name)
def test_the_matrix_multiplies_as_the_convolution_and_its_transpose_as_the_input_gradient(case: Case) -> None:
    inputs = integers(case)
    expected = reference(inputs, case.geometry)
    m = toeplitz.matrix(inputs.weight, case.geometry, case.size)
    assert m.shape == (expected.y[0].numel(), inputs.x[0].numel())
    assert m.is_coalesced()
    for image, y, g, x_grad in zip(inputs.x, expected.y, inputs.g, expected.input_grad, strict=True):
        assert torch.equal(m @ image.flatten(), y.flatten())
        assert torch.equal(m.t() @ g.flatten(), x_grad.flatten())


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_entries_are_in_order_and_none_twice(case: Case) -> None:
    """Which is what the matrix claims of itself when it is made."""
    outputs, pixels, _ = toeplitz.entries(case.weight_shape, case.geometry, case.size)
    place = outputs * (case.channels * case.size[0] * case.size[1]) + pixels
    assert (place.diff() > 0).all()


def test_the_example_in_its_docstring() -> None:
    assert doctest.testmod(toeplitz) == (0, 1)
