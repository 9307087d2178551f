"""What a convolution costs, beside the dense layer in whose place it stands."""

from dataclasses import dataclass
from math import prod

from robust.conv.geometry import Geometry, Pair


@dataclass(frozen=True)
class Cost:
    """Of one layer: how many numbers it learns, and its multiply-adds for one image.

    A multiply-add is one product and its addition to a sum, two FLOPs. Adding a bias is not counted.
    """

    parameters: int
    multiply_adds: int

    @property
    def flops(self) -> int:
        return 2 * self.multiply_adds


def convolution(channels: int, filters: int, size: Pair, geometry: Geometry, bias: bool = False) -> Cost:
    """Of one from (C, *size) to (K, P, Q): K · C / groups · R · S weights, each used once for every output pixel.

    Multiply-adds with padding are counted too. ValueError where the window does not fit, or the groups do not divide.

    >>> convolution(1, 1, (5, 5), Geometry((3, 3)))
    Cost(parameters=9, multiply_adds=81)
    """
    output = _output_size(channels, filters, size, geometry)
    weights = filters * channels // geometry.groups * prod(geometry.kernel)
    return Cost(weights + filters * bias, weights * prod(output))


def dense(inputs: int, outputs: int, bias: bool = False) -> Cost:
    """Of a fully connected layer: a weight for every pair of an input and an output, used once."""
    return Cost(inputs * outputs + outputs * bias, inputs * outputs)


def dense_instead(channels: int, filters: int, size: Pair, geometry: Geometry, bias: bool = False) -> Cost:
    """Of the dense layer from as many values to as many values as a convolution: one bias for every output, too.

    >>> dense_instead(1, 1, (5, 5), Geometry((3, 3)))
    Cost(parameters=225, multiply_adds=225)
    """
    output = _output_size(channels, filters, size, geometry)
    return dense(channels * prod(size), filters * prod(output), bias)


def _output_size(channels: int, filters: int, size: Pair, geometry: Geometry) -> Pair:
    if channels % geometry.groups or filters % geometry.groups:
        raise ValueError(f"groups = {geometry.groups} does not divide {channels} channels and {filters} filters")
    output = geometry.output_size(size)
    if min(output) < 1:
        raise ValueError(f"size {size} with padding {geometry.padding} is smaller than the window's {geometry.extent}")
    return output
