"""The sliding window in loops is what torch computes in float64, to the last bit where sums are exact."""

import doctest

import pytest
import torch
from torch.nn import functional as F

from conv_cases import CASES, MEMORY, NAMES, Case, assert_any_memory, assert_epilogue, assert_exact, assert_within_bound
from robust.conv import direct
from robust.conv.geometry import Geometry

EVERY_AXIS, EMPTY = CASES[0], CASES[-1]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_is_torchs_convolution_and_both_gradients_exactly(case: Case) -> None:
    assert_exact(direct, case)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_differs_from_torch_on_random_numbers_by_the_order_of_its_sums_only(case: Case) -> None:
    assert_within_bound(direct, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", [EVERY_AXIS, EMPTY], ids=lambda case: case.name)
def test_any_memory_and_dtype_in_and_channels_last_of_that_dtype_out(
    case: Case, memory: str, dtype: torch.dtype
) -> None:
    assert_any_memory(direct, case, memory, dtype)


def test_the_epilogue_and_the_mask_are_applied() -> None:
    assert_epilogue(direct, EVERY_AXIS)


def test_kernels_are_summed_over_the_channels_and_a_filter_has_one_bias() -> None:
    image = [[[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]], [[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]]  # two channels, 2 x 3
    first = [[[1.0, 0.0], [0.0, -1.0]], [[0.0, 1.0], [1.0, 0.0]]]
    second = [[[2.0 * tap for tap in row] for row in kernel] for kernel in first]
    y = direct.convolve(image, [first, second], [0.5, -3.0], Geometry((2, 2)))
    # The first filter, at the left (1 - 1) + (1 + 0) = 1, at the right (2 - 3) + (1 + 0) = 0; the second twice that.
    assert y == [[[1.5, 0.5]], [[-1.0, -3.0]]]
    weight, bias = torch.tensor([first, second]), torch.tensor([0.5, -3.0])
    assert y == F.conv2d(torch.tensor(image), weight, bias).tolist()


def test_the_example_in_its_docstring() -> None:
    assert doctest.testmod(direct) == (0, 2)
