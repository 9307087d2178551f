"""What receptive fields say is what reaches a cell: seen by NaN sent through, and by the gradient that comes back."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import AvgPool2dSame, Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vgg import cfgs, make_layers

from robust.conv import layers
from robust.conv.fields import Field
from robust.conv.receptive import receptive_fields
from robust.errors import InputError
from toys import Outputs

Shape = tuple[int, int, int]


def meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Only the shapes of a network, which is all that its fields depend on."""
    with torch.device("meta"):
        return make().eval()


def same(field: Field) -> tuple[Field, Field]:
    return field, field


# What is known


def test_resnet50s_last_grid_is_7x7_and_each_cell_stands_for_32x32_pixels() -> None:
    fields = receptive_fields(meta(torchvision.models.resnet50), (3, 224, 224))
    assert fields["conv1"] == same(Field(112, start=-3, stride=2, size=7))
    assert fields["maxpool"] == same(Field(56, start=-5, stride=4, size=11))
    # The stem sees 11 pixels; then 3 windows of 3 at a stride of 4, 1 at 4 and 3 at 8, 1 at 8 and 5 at 16, 1 at 16 and
    # 2 at 32: 11 + 2 (3·4 + 4 + 3·8 + 8 + 5·16 + 16 + 2·32) = 427.
    assert fields["layer4"] == same(Field(7, start=-213, stride=32, size=427))
    assert fields["fc"] == same(Field(1, start=0, stride=0, size=224))


def test_the_resnet50_of_the_paper_sees_483_pixels() -> None:
    """Its strides are on the first convolution of a block, torchvision's on the second; Araujo et al. 2019 give 483."""
    network = meta(torchvision.models.resnet50)
    for block in ("layer2.0", "layer3.0", "layer4.0"):
        first, second = network.get_submodule(f"{block}.conv1"), network.get_submodule(f"{block}.conv2")
        first.stride, second.stride = second.stride, first.stride
    rows, columns = receptive_fields(network, (3, 224, 224))["layer4"]
    assert (rows.cells, rows.stride, rows.size) == (7, 32, 483) and rows == columns


def test_vgg16s_pool5_sees_212_pixels() -> None:
    network = meta(torchvision.models.vgg16)
    fields = receptive_fields(network, (3, 224, 224))
    assert fields["features"] == same(Field(7, start=-90, stride=32, size=212))
    assert fields["avgpool"] == fields["features"]  # adaptive, from 7 x 7 to 7 x 7
    assert receptive_fields(network, (3, 256, 256))["avgpool"][0] == Field(7, start=-90, stride=32, size=244)


def test_a_layer_alone_by_hand() -> None:
    layer = nn.Conv2d(1, 1, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(4, 1))
    rows, columns = receptive_fields(nn.Sequential(layer), (1, 20, 11))["0"]
    assert (rows, columns) == (Field(7, start=-1, stride=2, size=9), Field(4, start=0, stride=3, size=2))
    assert [rows.pixels(cell, 20) for cell in (0, 1, 6)] == [range(0, 8), range(1, 10), range(11, 20)]


# Against what reaches a cell


class Varied(nn.Module):
    """Dilation, strides and padding that differ by axis; branches, concatenation, pooling as modules and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (5, 4), stride=(2, 1), padding=(2, 1))
        self.pool = nn.MaxPool2d((3, 2), stride=(1, 2), padding=(1, 0))
        self.dilated = nn.Conv2d(8, 8, 3, padding=(2, 1), dilation=(2, 1), groups=2)
        self.narrow = nn.Conv2d(8, 8, 1)
        self.branches = Branches()
        self.same = Conv2dSame(20, 6, (3, 4), stride=2)
        self.mean = AvgPool2dSame(3, stride=(1, 2))
        self.shuffled = Shuffled()
        self.last = nn.Conv2d(3, 4, (2, 1), padding="same", dilation=(2, 1))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.stem(x)))
        x = torch.relu_(self.dilated(x)) + self.narrow(x)
        x = self.mean(self.same(self.branches(x)))
        return self.head(self.last(self.shuffled(x)).mean((2, 3)))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = nn.Conv2d(8, 6, (1, 5), padding=(0, 2)), nn.Conv2d(8, 6, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(F.pad(x, (0, 1, 2, 1)), kernel_size=(4, 2), stride=1, dilation=1)
        return torch.cat([self.wide(x), pooled, self.tall(x)], dim=1)


class Shuffled(nn.Module):
    """Channels last and back, cropped, split and merged: no pixel is mixed with another."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1).reshape(n, h, w, 2, c // 2).transpose(3, 4).flatten(3).permute(0, 3, 1, 2)
        first, second = x[:, :, 1:, ::2].chunk(2, dim=1)
        x = first * torch.sigmoid(second)
        return (1 - x) / (2 + x)


class Turned(nn.Module):
    """Its rows are columns for a while; layers that are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 2, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x.transpose(2, 3), self.weight, None, (3, 1), groups=2)
        return F.avg_pool2d(x, (1, 2), padding=(0, 1), stride=1).transpose(2, 3)


class Squeezed(nn.Module):
    """A gate that sees all of the image, from the third layer on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.after = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.after(x * self.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid())


def outputs_of(module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Layer -> what it returned, the first time."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, part: nn.Module, inputs: tuple, output: Tensor) -> None:
        outputs.setdefault(name, output)

    handles = [part.register_forward_hook(partial(keep, name)) for name, part in module.named_modules() if name]
    module(images)
    for handle in handles:
        handle.remove()
    return {name: output for name, output in outputs.items() if output.ndim == 4}  # (N, C, P, Q)


def reached(module: nn.Module, size: Shape, axis: int, pixels: list[int]) -> dict[str, Tensor]:
    """Layer -> (pixels, cells) of bool, along one axis: which cells become NaN where these rows of pixels do."""
    images = torch.rand(len(pixels), *size, generator=torch.Generator().manual_seed(0)).double()
    for image, pixel in zip(images, pixels, strict=True):
        image.select(1 + axis, pixel).fill_(torch.nan)
    with torch.no_grad():  # in float64, where every output is a plain sum of products, not a transform of a tile
        outputs = outputs_of(module.double(), images)
    return {name: output.isnan().any(1).any(2 - axis) for name, output in outputs.items()}


def assert_fields_are(fields: dict[str, tuple[Field, Field]], network: nn.Module, size: Shape) -> None:
    """No pixel outside of its field reaches a cell; where the field lies inside the image, its first and last do."""
    for axis in (0, 1):
        image = size[1 + axis]
        for layer, seen in reached(network, size, axis, list(range(image))).items():
            field = fields[layer][axis]
            if not field.stride:  # one for all cells, which may be tokens
                seen = seen.any(1, keepdim=True)
            assert seen.shape[1] == field.cells or not field.stride, layer
            for cell in range(seen.shape[1]):
                pixels, claimed = seen[:, cell].nonzero().flatten().tolist(), field.pixels(cell, image)
                assert set(pixels) <= set(claimed), (layer, cell)
                if len(claimed) == field.size:
                    assert (pixels[0], pixels[-1]) == (claimed[0], claimed[-1]), (layer, cell)


NETS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "varied": (Varied, (3, 64, 53)),
    "space to depth": (lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, (3, 1)), Turned()), (3, 22, 36)),
    "squeezed": (Squeezed, (3, 14, 17)),
}


@pytest.mark.parametrize("name", NETS)
def test_nan_in_a_pixel_reaches_the_cells_whose_fields_it_is_in(name: str) -> None:
    """Every pixel, every cell, every layer."""
    make, size = NETS[name]
    network = make().eval()
    assert_fields_are(receptive_fields(network, size), network, size)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def over_columns(x: Tensor) -> Tensor:
    return F.linear(x, ones(x.shape[3], x.shape[3]))


def computed_weights(x: Tensor) -> Tensor:
    return F.conv2d(x, x.mean((0, 2, 3)).view(1, -1, 1, 1).expand(2, -1, 3, 1))


# Function -> the strides of rows and columns that it leaves of 2 and 1.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, int]]] = {
    "max pool, stride left out": (lambda x: F.max_pool2d(x, (2, 3)), (4, 3)),
    "average pool, stride left out": (lambda x: F.avg_pool2d(x, kernel_size=2), (4, 2)),
    "lp pool": (lambda x: F.lp_pool2d(x, 2, 3, stride=(1, 2)), (2, 2)),
    "adaptive, even": (lambda x: F.adaptive_max_pool2d(x, (5, 8)), (4, 2)),
    "adaptive, uneven": (lambda x: F.adaptive_avg_pool2d(x, (4, 7)), (0, 0)),
    "convolution by keywords": (lambda x: F.conv2d(weight=ones(1, 4, 2, 2), input=x, dilation=3), (2, 1)),
    "convolution with computed weights": (computed_weights, (0, 0)),
    "pad one side": (lambda x: F.pad(x, (3, 0)), (2, 1)),
    "crop": (lambda x: F.pad(x, (0, 0, -2, 1)), (2, 1)),
    "replicate": (lambda x: F.avg_pool2d(F.pad(x, (2, 1, 1, 0), "replicate"), 3), (6, 3)),
    "linear over columns": (over_columns, (2, 0)),
    "linear over channels": (lambda x: F.linear(x.permute(0, 2, 3, 1), ones(3, 4)).permute(0, 3, 1, 2), (2, 1)),
    "layer norm over columns": (lambda x: F.layer_norm(x, x.shape[3:]), (2, 0)),
    "group norm": (lambda x: F.group_norm(x, 2), (0, 0)),
    "instance norm": (lambda x: F.instance_norm(x), (0, 0)),
    "batch norm of the batch": (lambda x: F.batch_norm(x, None, None, training=True), (0, 0)),
    "batch norm": (lambda x: F.batch_norm(x, ones(4), ones(4)), (2, 1)),
    "softmax over channels": (lambda x: x.softmax(1), (2, 1)),
    "softmax over rows": (lambda x: F.softmax(x, dim=-2), (0, 1)),
    "normalize": (lambda x: F.normalize(x), (2, 1)),
    "local response norm": (lambda x: F.local_response_norm(x, 2), (2, 1)),
    "mean of rows": (lambda x: x.mean(2, keepdim=True), (0, 1)),
    "mean of rows, as numpy says it": (lambda x: x.mean(axis=2, keepdim=True), (0, 1)),
    "sum of channels": (lambda x: x.sum(1).unsqueeze(1), (2, 1)),
    "largest by channel": (lambda x: torch.max(x, dim=1, keepdim=True).values, (2, 1)),
    "largest of column": (lambda x: torch.amax(x, 3).unsqueeze(3), (2, 0)),
    "larger of two": (lambda x: torch.max(x, 1 - x), (2, 1)),
    "a row for all": (lambda x: x + x[:, :, 2:3], (0, 1)),
    "a row in place of all": (lambda x: x[:, :, 2:3].expand_as(x), (0, 1)),
    "a convolution for all": (lambda x: x + F.conv2d(x, ones(1, *x.shape[1:])), (0, 0)),
    "rows as channels": (lambda x: F.conv2d(x.transpose(1, 2), ones(2, x.shape[2], 1, 3)), (0, 1)),
    "a mean for all": (lambda x: x - x.mean((2, 3), keepdim=True).expand_as(x), (0, 0)),
    "where": (lambda x: torch.where(x > 0, x, 0.1 * x), (2, 1)),
    "index and new axis": (lambda x: x[:, 1][:, None], (2, 1)),
    "index by tensor": (lambda x: x[:, torch.tensor([2, 0, 1])], (2, 1)),
    "index by mask": (lambda x: x[torch.ones(x.shape, dtype=torch.bool)].view(x.shape), (0, 0)),
    "every third column, from the second": (lambda x: x[..., 1::3], (2, 3)),
    "narrow": (lambda x: x.narrow(2, 3, 5), (2, 1)),
    "select": (lambda x: x.select(1, 2).unsqueeze(1), (2, 1)),
    "stack and merge": (lambda x: torch.stack([x, 2 * x], dim=2).flatten(1, 2), (2, 1)),
    "split": (lambda x: x.split([1, 3], dim=1)[1], (2, 1)),
    "with constants": (lambda x: torch.cat([x, torch.ones_like(x[:, :1])], dim=1), (2, 1)),
    "rows below rows": (lambda x: torch.cat([x, x], dim=2), (0, 1)),
    "squeeze": (lambda x: x[:, :1].squeeze(1).unsqueeze(1), (2, 1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_in_a_pixel_reaches_the_cells_whose_fields_it_is_in_after(name: str) -> None:
    function, strides = FUNCTIONS[name]
    network = nn.Sequential(nn.Conv2d(3, 4, (3, 2), stride=(2, 1)), Outputs(function)).double().eval()
    fields = receptive_fields(network, (3, 21, 17))
    assert tuple(field.stride for field in fields["1"]) == strides
    assert_fields_are(fields, network, (3, 21, 17))


# Whole networks, an image so long that the fields of some of the last cells lie inside it, and one of these cells.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "resnet18": (torchvision.models.resnet18, 512, "layer4"),
    "resnet50": (torchvision.models.resnet50, 512, "layer4"),
    "vgg11": (lambda: nn.Sequential(make_layers(cfgs["A"])), 256, "0"),
    "googlenet": (lambda: torchvision.models.googlenet(init_weights=False), 512, "inception5b"),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 3, 2, 2), 16), 640, "features"),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 640, "features"),
    "shufflenet": (torchvision.models.shufflenet_v2_x0_5, 640, "conv5"),
    "squeezenet": (torchvision.models.squeezenet1_1, 256, "features"),
    "convnext": (lambda: timm.create_model("convnext_atto"), 1280, "stages.2"),
    "tf_efficientnet_lite0": (lambda: timm.create_model("tf_efficientnet_lite0"), 960, "blocks"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_nan_at_the_edges_of_a_field_of_a_whole_network(name: str) -> None:
    make, rows, last = NETWORKS[name]
    fields = receptive_fields(meta(make), (3, rows, 32))
    field = fields[last][0]
    cell = field.cells // 2
    pixels = field.pixels(cell, rows)
    assert len(pixels) == field.size, "the image is too short"
    around = [pixels[0] - 1, pixels[0], pixels[-1], pixels[-1] + 1]
    seen = reached(make().eval(), (3, rows, 32), 0, around)
    assert seen[last][:, cell].tolist() == [False, True, True, False]
    # And all layers before it, if not at their edges.
    for layer, cells in seen.items():
        field = fields[layer][0]
        for cell in range(field.cells):
            assert set(cells[:, cell].nonzero().flatten().tolist()) <= {
                number for number, pixel in enumerate(around) if pixel in field.pixels(cell, rows)
            }, (layer, cell)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_support_of_a_cells_gradient_is_its_field(name: str) -> None:
    """With positive weights no two paths from a pixel to a cell cancel, and no ReLU closes one."""
    make, rows, _ = NETWORKS[name]
    network = make().double().eval()
    for parameter_name, parameter in network.named_parameters():
        generator = torch.Generator().manual_seed(len(parameter_name))
        nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        if parameter.ndim == 4:
            parameter.data /= parameter[0].numel()
    network.maxpool = nn.AvgPool2d(3, 2, 1)  # for the largest alone has a gradient
    fields = receptive_fields(network, (3, rows, 40))
    image = torch.rand(1, 3, rows, 40).double().requires_grad_()
    outputs = outputs_of(network, image)
    for layer in ("conv1", "maxpool", "layer1", "layer2.0.conv2", "layer2.0.downsample", "layer3", "layer4"):
        row, column = outputs[layer].shape[2] // 2, outputs[layer].shape[3] // 2
        (gradient,) = torch.autograd.grad(outputs[layer][0, 0, row, column], image, retain_graph=True)
        support = gradient[0].abs().sum(0).nonzero()  # (pixels, 2)
        for axis, cell in ((0, row), (1, column)):
            seen = fields[layer][axis].pixels(cell, image.shape[2 + axis])
            assert (support[:, axis].min(), support[:, axis].max()) == (seen[0], seen[-1]), (layer, axis)


# What it is told, and what it refuses


class Opaque(nn.Module):
    """A convolution in a way that cannot be followed; what it says of its window need not be true."""

    def __init__(self, **says: object) -> None:
        super().__init__()
        window = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
        for name, value in (window | says).items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, torch.ones(1, x.shape[1], 3, 2), None, (2, 1), (1, 0), (1, 2))
        return torch.from_numpy(y.numpy())


def test_the_projects_own_layers_see_what_torchs_see() -> None:
    def network(of: Any, same: Any) -> nn.Module:
        return nn.Sequential(
            of.Conv2d(3, 4, (4, 3), (2, 1), (1, 2), (1, 3)),
            of.BatchNorm2d(4),
            of.ReLU(),
            of.MaxPool2d((3, 2), (1, 2), (1, 0)),
            of.Conv2d(4, 4, (5, 3), padding="same", groups=2),
            same(4, 2, (3, 4), stride=2),
            of.AvgPool2d(2, padding=(0, 1)),
            of.AdaptiveAvgPool2d((3, 1)),
        )

    fields = receptive_fields(network(nn, Conv2dSame), (3, 50, 41))
    assert receptive_fields(network(layers, layers.Conv2dSame), (3, 50, 41)) == fields
    assert fields["7"][0].stride > 0 and fields["7"][1] == Field(1, start=0, stride=0, size=41)


class Deformable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Conv2d(2, 18, 3, padding=1)
        self.conv = torchvision.ops.DeformConv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.offset(x))


class Overwritten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :, 1:] = x[:, :, :-1]
        return y


def test_a_module_that_cannot_be_followed_is_believed_what_it_says_of_its_window() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 3), Opaque())
    torchs = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 1, (3, 2), (2, 1), (1, 0), (1, 2)))
    assert receptive_fields(network, (3, 20, 17)) == receptive_fields(torchs, (3, 20, 17))


def test_a_module_that_pads_as_the_image_needs_is_seen_by_its_output() -> None:
    """18 rows at stride 2 make 9: (9 - 1)·2 + 3 - 18 = 1 row of padding, and it comes after the image."""
    fields = receptive_fields(nn.Sequential(Conv2dSame(3, 2, 3, stride=2)), (3, 18, 17))
    assert fields["0"] == (Field(9, start=0, stride=2, size=3), Field(9, start=-1, stride=2, size=3))


MISFIT = "its kernel_size, stride and padding do not make 9 cells of 18"
REFUSED = {
    "upsampling": (nn.Upsample(scale_factor=2), "which values of its inputs interpolate makes an output of"),
    "transposed": (nn.ConvTranspose2d(2, 2, 3), "which values of its inputs conv_transpose2d makes an output of"),
    "image as weights": (Outputs(lambda x: F.conv2d(torch.ones(1, 2, 20, 20), x)), "which values of its inputs conv2d"),
    "in place": (Overwritten(), "which values of its inputs setitem makes an output of"),
    "into a part": (
        Outputs(lambda x: x[:, :1].add_(F.avg_pool2d(x, 5, 1, 2)[:, :1]) * 0 + x),
        "add writes into a part",
    ),
    "another stride": (Opaque(stride=(5, 1)), MISFIT),
    "another kernel": (Opaque(kernel_size=(7, 2)), MISFIT),
    "opaque": (Opaque(transposed=True), "what it returns was not computed by functions of torch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_cannot_be_followed_is_named(name: str) -> None:
    layer, words = REFUSED[name]
    with pytest.raises(InputError, match=rf"^layer 1 \({type(layer).__name__}\): {words}"):
        receptive_fields(nn.Sequential(nn.Conv2d(3, 2, 3), layer), (3, 20, 17))


def test_a_window_that_another_input_moves_is_not_believed() -> None:
    words = r"^layer 1.conv \(DeformConv2d\): which values of its inputs deform_conv2d makes an output of is not known"
    with pytest.raises(InputError, match=words):
        receptive_fields(nn.Sequential(nn.Conv2d(3, 2, 3), Deformable()), (3, 20, 17))


def test_control_flow_is_followed_and_every_run_of_a_layer_has_its_field() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.max() > 2 or x.shape[-1] < 5:
                raise ValueError("not on a black image of this size")
            for _ in range(2):
                x = self.conv(x) * 2
            return x

    rows = {name: field.size for name, (field, _) in receptive_fields(Twice(), (3, 9, 9)).items()}
    assert rows == {"max": 9, "gt": 9, "conv": 3, "mul": 3, "conv_1": 5, "mul_1": 5}


def test_tokens_see_what_their_sum_sees() -> None:
    """Where no dimension counts the rows any longer, the field is that of the tensor as a whole."""
    fields = receptive_fields(meta(lambda: timm.create_model("vit_tiny_patch16_224")), (3, 224, 224))
    assert fields["patch_embed.proj"] == same(Field(14, start=0, stride=16, size=16))
    assert fields["blocks.0"] == fields["head"] == same(Field(1, start=0, stride=0, size=224))


def test_the_network_is_left_as_it_was() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Upsample(scale_factor=2)).train()
    with pytest.raises(InputError):
        receptive_fields(network, (3, 9, 9))
    for part in network.modules():
        assert part.training and not part._forward_hooks and not part._forward_pre_hooks
    assert network[1].num_batches_tracked == 0
    assert all(parameter.requires_grad for parameter in network.parameters())
