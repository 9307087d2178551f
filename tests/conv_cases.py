"""The convolutions on which every algorithm is tested, what goes into them, and float64 torch to compare with."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as gradients
from torch.utils._python_dispatch import TorchDispatchMode

from robust.conv.algorithm import Algorithm, Epilogue
from robust.conv.gates import poisoned
from robust.conv.geometry import Geometry, Pair

T = TypeVar("T")


class Case(NamedTuple):
    name: str
    batch: int
    channels: int  # C
    filters: int  # K
    size: Pair  # (H, W)
    geometry: Geometry

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.channels, *self.size)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.filters, self.channels // self.geometry.groups, *self.geometry.kernel)

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.filters, *self.geometry.output_size(self.size))

    @property
    def products(self) -> "Results[int]":
        """How many are summed, at most, for one value of each result: the K of the bound √K·u."""
        r, s = self.geometry.kernel
        n, k, p, q = self.y_shape
        groups = self.geometry.groups
        return Results(self.channels // groups * r * s, k // groups * r * s, n * p * q)


class Results(NamedTuple, Generic[T]):
    y: T
    input_grad: T
    weight_grad: T


class Inputs(NamedTuple):
    x: Tensor  # (N, C, H, W)
    weight: Tensor  # (K, C / groups, R, S)
    g: Tensor  # (N, K, P, Q), the gradient at the output


# fmt: off
CASES = [
    Case("every axis differs", 2, 6, 4, (9, 7), Geometry((3, 2), (2, 1), (1, 0), (2, 1), 2)),
    Case("and the other way round", 3, 4, 6, (7, 10), Geometry((2, 3), (1, 2), (0, 1), (1, 2), 2)),
    Case("strides that share a factor with the dilation", 1, 3, 5, (17, 13), Geometry((3, 3), (4, 2), (3, 1), (2, 4))),
    Case("dilation a multiple of the stride", 2, 2, 3, (11, 9), Geometry((3, 2), (2, 3), (2, 1), (2, 3))),
    Case("3x3", 2, 5, 7, (9, 6), Geometry((3, 3), padding=(1, 1))),
    Case("3x3 without padding", 1, 4, 3, (6, 11), Geometry((3, 3))),
    Case("3x3 in groups, padding differs", 2, 6, 9, (5, 7), Geometry((3, 3), padding=(2, 0), groups=3)),
    Case("3x3 stride 2", 2, 4, 5, (8, 7), Geometry((3, 3), (2, 2), (1, 1))),
    Case("1x1", 3, 5, 8, (4, 6), Geometry((1, 1))),
    Case("1x1 stride 2", 2, 6, 3, (7, 8), Geometry((1, 1), (2, 2))),
    Case("1x1 in groups, stride differs", 2, 8, 4, (5, 9), Geometry((1, 1), (1, 3), groups=4)),
    Case("1x1 padded", 1, 3, 2, (4, 3), Geometry((1, 1), (1, 2), (1, 2))),
    Case("7x7 stride 2, a stem", 2, 3, 4, (13, 10), Geometry((7, 7), (2, 2), (3, 3))),
    Case("4x4 stride 4, a patch embedding", 2, 3, 5, (8, 12), Geometry((4, 4), (4, 4))),
    Case("depthwise", 2, 6, 6, (8, 5), Geometry((3, 3), (2, 1), (1, 1), groups=6)),
    Case("depthwise 7x7", 1, 4, 4, (9, 8), Geometry((7, 7), padding=(3, 3), groups=4)),
    Case("depthwise, two filters a channel", 2, 3, 6, (7, 6), Geometry((3, 2), (1, 2), (0, 1), (2, 1), 3)),
    Case("stride beyond the kernel", 2, 3, 4, (11, 10), Geometry((2, 1), (3, 4))),
    Case("pixels that no window reaches", 1, 2, 3, (10, 9), Geometry((2, 2), (3, 5), (1, 0), (3, 5))),
    Case("padding beyond the kernel", 1, 2, 3, (4, 3), Geometry((2, 3), (1, 2), (3, 4))),
    Case("one pixel", 3, 5, 4, (1, 1), Geometry((3, 3), (1, 1), (1, 1))),
    Case("one pixel, stride 2", 2, 3, 2, (1, 1), Geometry((3, 5), (2, 2), (1, 2))),
    Case("one row", 2, 3, 4, (1, 9), Geometry((1, 4), (1, 2), (0, 2))),
    Case("a window as large as the image", 2, 4, 6, (5, 4), Geometry((5, 4))),
    Case("one channel, one filter", 1, 1, 1, (5, 6), Geometry((3, 2))),
    Case("a batch of 33", 33, 2, 3, (4, 3), Geometry((2, 3), (1, 1), (1, 1))),
    Case("an empty batch", 0, 4, 6, (5, 7), Geometry((3, 2), (2, 1), (1, 0), (1, 2), 2)),
]
# fmt: on
NAMES = [case.name for case in CASES]


def integers(case: Case, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    """Whole numbers from -2 to 2, of which every sum is exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = case.x_shape, case.weight_shape, case.y_shape
    return Inputs(*(torch.randint(-2, 3, shape, generator=generator).to(dtype) for shape in shapes))


def randoms(case: Case, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    """Standard normal, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = case.x_shape, case.weight_shape, case.y_shape
    return Inputs(*(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes))


def reference(inputs: Inputs, geometry: Geometry) -> Results[Tensor]:
    """By torch, in float64."""
    x, weight, g = (tensor.double() for tensor in inputs)
    how = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    return Results(
        F.conv2d(x, weight, None, *how),
        gradients.conv2d_input(x.shape, weight, g, *how),
        gradients.conv2d_weight(x, weight.shape, g, *how),
    )


def computed(algorithm: Algorithm, inputs: Inputs, geometry: Geometry) -> Results[Tensor]:
    """By `algorithm`, without an epilogue."""
    x, weight, g = inputs
    height, width = x.shape[2:]
    return Results(
        algorithm.forward(x, algorithm.pack(weight, geometry), geometry, Epilogue()),
        algorithm.input_grad(g, algorithm.pack_input_grad(weight, geometry), geometry, (height, width)),
        algorithm.weight_grad(x, g, geometry),
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖, 0 for two zeros; NaN where `found` has one."""
    error, size = (found.double() - expected).norm().item(), expected.norm().item()
    return 0.0 if error == 0 else error / size if size else float("inf")


def adjoint_gap(inputs: Inputs, results: Results[Tensor]) -> float:
    """By how much ⟨conv x, g⟩ = ⟨x, input_grad⟩ = ⟨weight, weight_grad⟩ is missed, relative to the norms."""
    y, input_grad, weight_grad = (result.double() for result in results)
    x, weight, g = (tensor.double() for tensor in inputs)
    first, second, third = (y * g).sum(), (x * input_grad).sum(), (weight * weight_grad).sum()
    gap = torch.maximum((first - second).abs(), (first - third).abs())
    return (gap / (y.norm() * g.norm()).clamp(min=1e-300)).item()


def sliced(tensor: Tensor) -> Tensor:
    """The same values at an odd place between NaNs, no axis dense; reading beside them is seen in the result."""
    wide = torch.full([2 * n + 3 for n in tensor.shape], torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = wide[tuple(slice(1, 1 + 2 * n, 2) for n in tensor.shape)]
    return view.copy_(tensor)


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "channels_last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    "sliced": sliced,
}
"""Name -> the same values laid out so in memory."""


def assert_exact(algorithm: Algorithm, case: Case, dtype: torch.dtype = torch.float64) -> None:
    """On whole numbers, every bit of y and of both gradients is that of float64, rounded once; and so adjoint."""
    inputs = integers(case, dtype=dtype)
    expected, found = reference(inputs, case.geometry), computed(algorithm, inputs, case.geometry)
    for name in found._fields:
        assert torch.equal(getattr(found, name), getattr(expected, name).to(dtype)), name
    if dtype == torch.float64:
        assert adjoint_gap(inputs, found) == 0


def assert_within_bound(algorithm: Algorithm, case: Case) -> None:
    """On random numbers in float64, y and both gradients differ from torch's by at most the √K·u of their sums."""
    inputs = randoms(case)
    expected, found = reference(inputs, case.geometry), computed(algorithm, inputs, case.geometry)
    for name, terms in case.products._asdict().items():
        assert relative_error(getattr(found, name), getattr(expected, name)) <= terms**0.5 * 2**-53, name
    assert adjoint_gap(inputs, found) < 1e-14


def assert_any_memory(algorithm: Algorithm, case: Case, memory: str, dtype: torch.dtype) -> None:
    """However the inputs lie in memory, the results are right, of their dtype, channels last, and all written."""
    inputs = integers(case, dtype=dtype)
    expected = reference(inputs, case.geometry)
    with poisoned():
        found = computed(algorithm, Inputs(*map(MEMORY[memory], inputs)), case.geometry)
    for name in found._fields:
        result = getattr(found, name)
        like = torch.empty(result.shape, memory_format=torch.channels_last)
        assert (result.dtype, result.stride()) == (dtype, like.stride()), name
        assert torch.equal(result, getattr(expected, name).to(dtype)), name


def assert_epilogue(algorithm: Algorithm, case: Case) -> None:
    """Shift, residual and ReLU before the one rounding to float32; a mask before the input gradient."""
    x, weight, g = randoms(case, dtype=torch.float32)
    shift = torch.linspace(-1, 1, case.filters)
    residual, mask = torch.randn(2, *g.shape, generator=torch.Generator().manual_seed(1))
    sums = reference(Inputs(x, weight, g), case.geometry).y
    packed = algorithm.pack(weight, case.geometry)
    y = algorithm.forward(x, packed, case.geometry, Epilogue(shift, residual, relu=True))
    expected = (sums + shift.double().view(-1, 1, 1) + residual.double()).relu()
    torch.testing.assert_close(y, expected.float(), rtol=2**-23, atol=1e-12)

    packed = algorithm.pack_input_grad(weight, case.geometry)
    x_grad = algorithm.input_grad(g, packed, case.geometry, case.size, mask)
    expected = reference(Inputs(x, weight, g * (mask > 0)), case.geometry).input_grad
    torch.testing.assert_close(x_grad, expected.float(), rtol=2**-23, atol=1e-12)


class Called(TorchDispatchMode):
    """Keeps the names of the operators that torch's dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))
