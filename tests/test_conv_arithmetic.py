"""Figures that the literature states, each computed here."""

import doctest
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from robust.conv import arithmetic
from robust.conv.arithmetic import Cost, convolution, dense, dense_instead
from robust.conv.geometry import Geometry


def test_5x5_to_3x3_takes_9_weights_where_a_dense_layer_takes_225() -> None:
    assert Geometry((3, 3)).output_size((5, 5)) == (3, 3)
    assert convolution(1, 1, (5, 5), Geometry((3, 3))).parameters == 9
    assert dense_instead(1, 1, (5, 5), Geometry((3, 3))).parameters == 225 == 25 * 9


def test_4x4_to_2x2_takes_9_weights_where_a_dense_layer_takes_64() -> None:
    assert Geometry((3, 3)).output_size((4, 4)) == (2, 2)
    assert convolution(1, 1, (4, 4), Geometry((3, 3))).parameters == 9
    assert dense_instead(1, 1, (4, 4), Geometry((3, 3))).parameters == 64 == 16 * 4


def test_a_dense_layer_that_halves_an_image_of_224x224x3_needs_over_ten_billion() -> None:
    values = 224 * 224 * 3
    assert dense(values, values // 2).parameters == 150_528 * 75_264 > 10_000_000_000


def test_resnet50_has_25_6_million_parameters_and_4_1_billion_multiply_adds() -> None:
    with torch.device("meta"):
        network, image = torchvision.models.resnet50().eval(), torch.zeros(1, 3, 224, 224)
    costs = []

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            how = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups
            size = tuple(inputs[0].shape[2:])
            costs.append(convolution(layer.in_channels, layer.out_channels, size, Geometry(*how)))
        elif isinstance(layer, nn.Linear):
            costs.append(dense(layer.in_features, layer.out_features, bias=True))
        elif isinstance(layer, nn.BatchNorm2d):
            costs.append(Cost(2 * layer.num_features, 0))

    for layer in network.modules():
        layer.register_forward_hook(count)
    network(image)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert sum(cost.parameters for cost in costs) == parameters == 25_557_032
    # torchvision states 4.089 billion.
    stated = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["_ops"]
    assert round(sum(cost.multiply_adds for cost in costs) / 1e9, 3) == stated


def test_the_cost_of_groups_biases_and_strides() -> None:
    geometry = Geometry((3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 1), groups=2)
    cost = convolution(6, 4, (9, 7), geometry, bias=True)
    # 4 filters of 3 channels of 3 x 2, and a bias each; outputs of 4 x 6.
    assert (cost.parameters, cost.multiply_adds, cost.flops) == (4 * 3 * 6 + 4, 4 * 3 * 6 * 24, 2 * 4 * 3 * 6 * 24)
    instead = dense_instead(6, 4, (9, 7), geometry, bias=True)
    assert (instead.parameters, instead.multiply_adds) == (6 * 63 * 4 * 24 + 4 * 24, 6 * 63 * 4 * 24)
    layer = nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 0), (2, 1), 2)
    assert cost.parameters == sum(parameter.numel() for parameter in layer.parameters())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"groups = 2 does not divide 3 channels and 4 filters"):
        convolution(3, 4, (5, 5), Geometry((3, 3), groups=2))
    with pytest.raises(ValueError, match=r"size \(4, 9\) with padding \(0, 0\) is smaller than the window's \(5, 3\)"):
        dense_instead(3, 4, (4, 9), Geometry((3, 3), dilation=(2, 1)))


def test_the_examples_in_its_docstrings() -> None:
    assert doctest.testmod(arithmetic) == (0, 2)


def test_the_examples_in_the_documentation() -> None:
    page = Path(__file__).parents[1] / "docs" / "convolution.md"
    failed, tried = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert (failed, tried > 20) == (0, True)
