"""The geometry that every algorithm shares: output sizes, and the input gradient by phases, for any window."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from conv_cases import CASES, NAMES, Case, integers, reference
from robust.conv.geometry import Geometry, Pair, Phase


def pairs(least: int, most: int) -> st.SearchStrategy[Pair]:
    return st.tuples(st.integers(least, most), st.integers(least, most))


geometries = st.builds(
    Geometry, kernel=pairs(1, 5), stride=pairs(1, 5), padding=pairs(0, 6), dilation=pairs(1, 4), groups=st.just(1)
)


@given(geometries, pairs(1, 13))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_output_size_is_torchs(geometry: Geometry, size: Pair) -> None:
    rows, columns = geometry.output_size(size)
    x, weight = torch.zeros(1, 1, *size), torch.zeros(1, 1, *geometry.kernel)
    how = geometry.stride, geometry.padding, geometry.dilation
    if min(rows, columns) >= 1:
        assert F.conv2d(x, weight, None, *how).shape == (1, 1, rows, columns)
    else:
        with pytest.raises(RuntimeError, match=r"Kernel size can't be greater|Output size is too small"):
            F.conv2d(x, weight, None, *how)


def test_output_size_rounds_down_below_zero_too() -> None:
    """A window that misses by a pixel makes no output, whatever the stride."""
    assert Geometry((3, 3), (4, 4)).output_size((2, 3)) == (0, 1)


def input_grad_by_phases(g: Tensor, weight: Tensor, geometry: Geometry, size: Pair) -> Tensor:
    """As the docstring of `Phase` says it, for groups = 1."""
    result = torch.full((len(g), weight.shape[1], *size), torch.nan, dtype=g.dtype)
    for row, column in geometry.phases(size):
        taps = weight[:, :, list(row.taps)][..., list(column.taps)].transpose(0, 1)  # (C, K, taps, taps)
        pixels = torch.zeros(len(g), weight.shape[1], row.count, column.count, dtype=g.dtype)
        if row.taps and column.taps:
            padded = F.pad(g, (*_margins(column, g.shape[3]), *_margins(row, g.shape[2])))
            pixels = F.conv2d(padded, taps, dilation=(row.dilation, column.dilation))
        result[:, :, row.offset :: geometry.stride[0], column.offset :: geometry.stride[1]] = pixels
    return result


def _margins(phase: Phase, outputs: int) -> Pair:
    """Zeros to add (or outputs to drop) on both sides, so that the window has exactly `count` places."""
    extent = (len(phase.taps) - 1) * phase.dilation + 1
    return phase.before, phase.count + extent - 1 - phase.before - outputs


@st.composite
def fitting(draw: st.DrawFn) -> tuple[Geometry, Pair]:
    """A geometry and a size that leaves at least one output along each axis."""
    geometry = draw(geometries)
    least = [max(1, extent - 2 * padding) for extent, padding in zip(geometry.extent, geometry.padding, strict=True)]
    return geometry, (least[0] + draw(st.integers(0, 12)), least[1] + draw(st.integers(0, 12)))


@given(fitting(), st.integers(0, 2**31))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_phases_give_the_input_gradient(fit: tuple[Geometry, Pair], seed: int) -> None:
    geometry, size = fit
    inputs = integers(Case("any", 1, 2, 3, size, geometry), seed)
    found = input_grad_by_phases(inputs.g, inputs.weight, geometry, size)
    assert torch.equal(found, reference(inputs, geometry).input_grad)


@given(geometries, pairs(1, 13))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_phases_part_the_pixels_and_no_product_is_spent_on_zeros(geometry: Geometry, size: Pair) -> None:
    seen = torch.zeros(size)
    taps = torch.zeros(geometry.kernel)
    for row, column in geometry.phases(size):
        pixels = seen[row.offset :: geometry.stride[0], column.offset :: geometry.stride[1]]
        assert pixels.shape == (row.count, column.count)
        pixels += 1
        for r in row.taps:
            taps[r, list(column.taps)] += 1
    assert (seen == 1).all()
    assert (taps <= 1).all()  # a tap reaches the pixels of one phase only: strides x fewer products than zero-dilation


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_phases_on_the_shared_cases(case: Case) -> None:
    """Group by group."""
    inputs, groups = integers(case), case.geometry.groups
    parts = zip(inputs.g.chunk(groups, 1), inputs.weight.chunk(groups), strict=True)
    found = [input_grad_by_phases(g, weight, case.geometry, case.size) for g, weight in parts]
    assert torch.equal(torch.cat(found, 1), reference(inputs, case.geometry).input_grad)
