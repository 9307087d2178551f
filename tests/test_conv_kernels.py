"""The kernels against torch in float64, compiled where there is a GPU and interpreted where there is none."""

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

triton = pytest.importorskip("triton")

from robust.conv import kernels  # noqa: E402
from robust.conv.algorithm import Epilogue, algorithm  # noqa: E402
from robust.conv.geometry import Geometry, Pair, Phase  # noqa: E402
from robust.conv.kernels import launch, pooling, tiles  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = kernels.misfit(Geometry((1, 1)), torch.float32, DEVICE)
if REASON and "numpy" in REASON:
    pytest.skip(f"triton {REASON}", allow_module_level=True)

DTYPES = {
    "float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip


class Case(NamedTuple):
    geometry: Geometry
    n: int
    c: int
    k: int
    size: Pair

    @property
    def y_shape(self) -> tuple[int, ...]:
        return self.n, self.k, *self.geometry.output_size(self.size)

    def numbers(self, draw: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """x, weight and the gradient at y."""
        generator = torch.Generator().manual_seed(0)
        weight = (self.k, self.c // self.geometry.groups, *self.geometry.kernel)
        shapes = ((self.n, self.c, *self.size), weight, self.y_shape)
        x, weight, g = (draw(shape, generator=generator).to(dtype) for shape in shapes)
        return x, weight, g


WIDE = Geometry((3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 1))
CASES = {
    "every axis differs": Case(replace(WIDE, groups=2), 3, 10, 6, (7, 6)),
    "taps of a row read as one": Case(WIDE, 3, 5, 7, (7, 6)),
    "every phase has taps": Case(Geometry((3, 4), stride=(2, 3), padding=(1, 2)), 2, 3, 18, (5, 7)),
    "channels in blocks": Case(Geometry((2, 3), (1, 2), (1, 2), (1, 2)), 2, 70, 18, (4, 5)),
    "depthwise": Case(Geometry((3, 2), (2, 3), (1, 1), (1, 2), groups=70), 2, 70, 70, (5, 6)),
    "channel multiplier": Case(Geometry((3, 2), (2, 3), (1, 1), (1, 2), groups=5), 3, 5, 10, (7, 8)),
    "pointwise": Case(Geometry((1, 1)), 3, 20, 18, (3, 4)),
    "pointwise in groups": Case(Geometry((1, 1), groups=2), 3, 6, 10, (3, 4)),
    "pixels that no output saw": Case(Geometry((1, 1), stride=(2, 3)), 2, 4, 6, (5, 4)),
    "one column": Case(Geometry((1, 1), stride=(1, 2)), 3, 4, 6, (5, 1)),
    "stride past the image": Case(Geometry((2, 1), stride=(3, 4), padding=(1, 0)), 2, 3, 5, (2, 3)),
    "padding past the kernel": Case(Geometry((1, 2), padding=(2, 3), dilation=(1, 2)), 2, 3, 5, (2, 3)),
    "phases side by side": Case(Geometry((4, 5), (2, 2), (1, 2)), 2, 3, 6, (7, 8)),
    "phases side by side, some without taps": Case(Geometry((2, 1), (3, 4), (0, 1)), 2, 1, 5, (8, 9)),
    "phases side by side, one tap": Case(Geometry((2, 2), (2, 2)), 2, 4, 5, (7, 8)),
    "no images": Case(replace(WIDE, groups=2), 0, 10, 6, (7, 6)),
    "no images, one group": Case(WIDE, 0, 5, 7, (7, 6)),
    "no images, depthwise": Case(replace(WIDE, groups=5), 0, 5, 5, (7, 6)),
}
SMALL = CASES["every axis differs"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written is NaN, or a tap that no window has."""
    empty = torch.empty

    def poison(*size: object, **options: object) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan if tensor.is_floating_point() else 99)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture(params=DTYPES)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if request.param == "tf32" else "ieee"
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before


def integers(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(-2, 3, shape, generator=generator)


def ours(case: Case, x: Tensor, weight: Tensor, g: Tensor) -> list[Tensor]:
    """y, and the gradients at x and at weight."""
    geometry, x, weight, g = case.geometry, x.to(DEVICE), weight.to(DEVICE), g.to(DEVICE)
    y = kernels.forward(x, kernels.pack(weight, geometry), geometry, Epilogue())
    dx = kernels.input_grad(g, kernels.pack_input_grad(weight, geometry), geometry, case.size)
    return [result.cpu() for result in (y, dx, kernels.weight_grad(x, g, geometry))]


def torchs(case: Case, x: Tensor, weight: Tensor, g: Tensor) -> list[Tensor]:
    _, stride, padding, dilation, groups = astuple(case.geometry)
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), g)]


def expected(case: Case, *operands: Tensor) -> list[Tensor]:
    return torchs(case, *(operand.double() for operand in operands))


def error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference).norm() / reference.norm())


def terms(case: Case) -> list[int]:
    """How many products are summed for one value of y, and of the gradients at x and at weight."""
    taps, groups = math.prod(case.geometry.kernel), case.geometry.groups
    return [case.c // groups * taps, case.k // groups * taps, math.prod(case.y_shape) // case.k]


def check_exact(case: Case, dtype: torch.dtype) -> None:
    operands = case.numbers(integers, dtype)
    for out, reference in zip(ours(case, *operands), expected(case, *operands), strict=True):
        assert (out.shape, out.dtype) == (reference.shape, dtype)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, reference.to(dtype))


@pytest.mark.parametrize("name", CASES)
def test_exact_on_whole_numbers(name: str, precision: str) -> None:
    check_exact(CASES[name], DTYPES[precision])


@pytest.mark.parametrize("name", ["every axis differs", "taps of a row read as one", "depthwise", "pointwise"])
def test_errors_are_those_of_rounding(name: str, precision: str) -> None:
    """Within the bound of each dtype, and of torch's own error."""
    case, dtype = CASES[name], DTYPES[precision]
    operands = case.numbers(torch.randn, dtype)
    unit = torch.finfo(dtype).eps / 2
    references, own = expected(case, *operands), torchs(case, *operands)
    if precision == "tf32" and name != "depthwise":  # which sums without tensor cores
        own = expected(case, *map(as_tf32, operands))
    for out, reference, torch_out, k, factor in zip(
        ours(case, *operands), references, own, terms(case), (2, 3, 3), strict=True
    ):
        bounds = {"float32": math.sqrt(k) * unit, "tf32": 1e-3}
        assert error(out, reference) <= bounds.get(precision, unit + math.sqrt(k) * 2**-24)
        assert error(out, reference) <= factor * error(torch_out, reference)


def as_tf32(x: Tensor) -> Tensor:
    """Rounded to 11 bits, half away from zero."""
    mantissa, exponent = torch.frexp(x.double())
    whole = (mantissa.abs() * 2**11 + 0.5).floor() * mantissa.sign()
    return torch.ldexp(whole / 2**11, exponent)


@pytest.mark.parametrize("name", ["every axis differs", "pointwise", "phases side by side"])
def test_tf32_rounds_both_operands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuDNN does. Tensor cores alone drop bits: each product would be too small."""
    monkeypatch.setattr(launch, "precision", lambda dtype: "tf32")
    case = CASES[name]
    operands = case.numbers(torch.randn)
    for out, reference in zip(ours(case, *operands), expected(case, *map(as_tf32, operands)), strict=True):
        assert error(out, reference) <= 1e-5
    assert error(expected(case, *operands)[0], reference=expected(case, *map(as_tf32, operands))[0]) > 1e-4


def test_tf32_keeps_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "precision", lambda dtype: "tf32")
    bits = torch.tensor([0x7FFFFFFF, 0x7F800000, 0x7F7FFFFF], dtype=torch.int32)  # NaN, infinite, rounded to it
    x = bits.view(torch.float32).expand(1, 16, 1, 3).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(16, 16, 1, 1)
    weight[:, 0] = 1
    x[:, 1:] = 0
    y = kernels.forward(x.to(DEVICE), kernels.pack(weight.to(DEVICE), Geometry((1, 1))), Geometry((1, 1)), Epilogue())
    torch.testing.assert_close(y[0, 0, 0].cpu(), torch.tensor([math.nan, math.inf, math.inf]), equal_nan=True)


def test_the_gradients_are_adjoint() -> None:
    """⟨conv x, g⟩ = ⟨x, input_grad g⟩ = ⟨weight, weight_grad⟩; of whole numbers exactly."""
    x, weight, g = SMALL.numbers(integers)
    y, dx, dw = ours(SMALL, x, weight, g)
    product = (y.double() * g).sum()
    assert product != 0
    assert product == (x * dx.double()).sum() == (weight * dw.double()).sum()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "every second": lambda t: t.repeat_interleave(2, 1).repeat_interleave(2, 3)[:, ::2, :, 1::2],
    "backwards": lambda t: t.flip(1, 2).contiguous(memory_format=torch.channels_last).flip(1, 2),
    "requires a gradient": lambda t: t.clone().requires_grad_(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory(layout: str) -> None:
    operands = SMALL.numbers(integers)
    given = [LAYOUTS[layout](operand) for operand in operands]
    assert all(torch.equal(a, b) for a, b in zip(given, operands, strict=True))
    for out, reference in zip(ours(SMALL, *given), expected(SMALL, *operands), strict=True):
        assert torch.equal(out, reference.float())


def test_no_launch_for_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(launch, "launch")
    for name, case in CASES.items():
        if not case.n:
            y, dx, dw = ours(case, *case.numbers(integers))
            assert (y.shape, dx.shape) == (case.y_shape, (0, case.c, *case.size)), name
            assert torch.equal(dw, torch.zeros(case.k, case.c // case.geometry.groups, 3, 2))


# Configurations


@pytest.mark.parametrize("key", tiles.TILES, ids="-".join)
def test_every_configuration_of_the_table(key: tuple[tiles.Precision, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, input gradient and weight gradient, with more than one tile along the axes that a tile cuts."""
    tile = tiles.TILES[key]
    rows = tile.m // 32 + 1
    monkeypatch.setattr(launch, "convolution_tile", lambda how, m, n, k, **flags: tiles.clipped(tile, n, k))
    monkeypatch.setattr(launch, "weight_tile", lambda how, m, n, **flags: tiles.clipped(tile, n, tile.k))
    monkeypatch.setattr(launch, "precision", lambda dtype: key[0])
    for geometry in (Geometry((1, 1)), Geometry((2, 1), padding=(1, 0))):
        case = Case(geometry, 1, tile.k + 6, tile.n + 2, (rows, 32))
        check_exact(case, torch.float16 if key[0] == "half" else torch.float32)


def bytes_of(how: tiles.Precision, tile: tiles.Tile) -> int:
    """In shared memory: both operands, as often as there are stages."""
    return (tile.m + tile.n) * tile.k * tile.stages * (2 if how == "half" else 4)


NAMES = ("pointwise", "masked", "thin", "roomy")
FLAGS = [dict(zip(NAMES, bits, strict=True)) for bits in itertools.product((False, True), repeat=len(NAMES))]


@pytest.mark.parametrize("how", ["half", "tf32", "ieee"])
def test_tiles_that_fit_and_that_tensor_cores_take(how: tiles.Precision) -> None:
    for m, n, k in itertools.product((49, 10**6), (1, 3, 16, 40, 64, 512, 2048), (1, 20, 64, 2048)):
        found = [tiles.convolution_tile(how, m, n, k, groups=1, **flags) for flags in FLAGS]
        weights = [tiles.weight_tile(how, m, n, thin=flags["thin"], roomy=flags["roomy"]) for flags in FLAGS]
        for tile, flags in zip(found + weights, FLAGS * 2, strict=True):
            assert bytes_of(how, tile) <= (tiles.ROOM if flags["roomy"] else 64 * 1024)
            assert min(tile.m, tile.n, tile.k) >= 16
            assert all(size & (size - 1) == 0 for size in (tile.m, tile.n, tile.k))
            assert how == "ieee" or tile.m % 64 == 0


@pytest.mark.parametrize(("most", "roomy"), [(99, False), (163, True), (227, True)])  # KiB: RTX 4090, A100, H100
def test_room_is_what_a_program_may_ask_for(most: int, roomy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=most * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert launch._is_roomy.__wrapped__(torch.device("cuda", 0)) is roomy
    assert launch._is_roomy(torch.device("cpu"))


def test_splits_cover_all_pixels_once() -> None:
    for pixels, tile, programs in itertools.product((1, 63, 64, 1000, 802816), (16, 64), (1, 9, 2000)):
        parts, share = tiles.splits(pixels, tile, programs)
        assert share % tile == 0
        assert (parts - 1) * share < pixels <= parts * share
        assert parts == 1 or (parts * programs <= 4 * tiles.FULL and share >= tiles.LEAST_SHARE * tile)
    assert tiles.splits(802816, 64, 1) == (523, 1536)  # 12544 tiles, 24 a share


SPLIT = {
    "gemm": Case(Geometry((2, 1), padding=(1, 0)), 2, 5, 6, (5, 7)),  # 84 pixels are 6 tiles of 16
    "depthwise": Case(Geometry((1, 2), padding=(0, 1), groups=4), 2, 4, 8, (10, 8)),  # 180 are 6 tiles of 32
}


@pytest.mark.parametrize("name", SPLIT)
def test_weight_gradient_in_splits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, found = SPLIT[name], []
    monkeypatch.setattr(tiles, "LEAST_SHARE", 2)
    monkeypatch.setattr(launch, "splits", lambda *sizes: found.append(tiles.splits(*sizes)) or found[-1])
    check_exact(case, torch.float32)
    assert [parts for parts, _ in found] == [3]
    first, second = (ours(case, *case.numbers(torch.randn)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# What is fused


@pytest.mark.parametrize("name", ["every axis differs", "taps of a row read as one", "depthwise", "pointwise"])
def test_every_epilogue(name: str) -> None:
    case = CASES[name]
    x, weight, g = (operand.to(DEVICE) for operand in case.numbers(integers, torch.bfloat16))
    shift = (torch.arange(case.k, device=DEVICE) % 4 - 2).bfloat16()
    plain = expected(case, x.cpu(), weight.cpu(), g.cpu())[0]
    for used in itertools.product((False, True), repeat=3):
        parts = [part if use else None for part, use in zip((shift, g), used[:2], strict=True)]
        y = kernels.forward(x, kernels.pack(weight, case.geometry), case.geometry, Epilogue(*parts, relu=used[2]))
        on_cpu = Epilogue(*(None if part is None else part.cpu().double() for part in parts), relu=used[2])
        assert torch.equal(y.cpu(), on_cpu.apply_(plain.clone()).bfloat16()), used


def test_relu_keeps_nan() -> None:
    x, weight, _ = (operand.to(DEVICE) for operand in SMALL.numbers(integers))
    x[0, 0, 1, 0] = math.nan
    y = kernels.forward(x, kernels.pack(weight, SMALL.geometry), SMALL.geometry, Epilogue(relu=True)).cpu()
    reference = torchs(SMALL, x.cpu(), weight.cpu(), torch.zeros(SMALL.y_shape))[0].relu()
    assert reference.isnan().any()
    torch.testing.assert_close(y, reference, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    ["every axis differs", "channel multiplier", "pointwise", "pointwise in groups", "pixels that no output saw"],
)
def test_mask_of_a_relu(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    _, weight, g = (operand.to(DEVICE) for operand in case.numbers(integers, dtype))
    mask = g.roll(1, 0) - g.flip(2)
    mask[0, 0, 0, 0] = math.nan
    packed = kernels.pack_input_grad(weight, case.geometry)
    masked = kernels.input_grad(g, packed, case.geometry, case.size, mask=mask)
    through = torch.where(mask <= 0, 0, g)
    assert torch.equal(masked, kernels.input_grad(through, packed, case.geometry, case.size))
    assert not torch.equal(masked, kernels.input_grad(g, packed, case.geometry, case.size))


# Pooling


POOLS = {
    "every axis differs": (Geometry((3, 2), (2, 1), (1, 0), (1, 2)), (2, 70, 7, 6), False),
    "windows that overlap": (Geometry((3, 2)), (2, 3, 5, 4), False),
    "the last window hangs over": (Geometry((2, 3), (2, 2), (1, 1)), (2, 3, 6, 6), True),
    "pixels that no window has": (Geometry((1, 2), (3, 2)), (3, 5, 7, 5), False),
    "no images": (Geometry((2, 2), (2, 2)), (0, 5, 6, 4), False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", POOLS)
def test_max_pool(name: str, dtype: torch.dtype) -> None:
    """Equal to torch's, with many equal values, and images of -inf alone."""
    geometry, shape, ceil_mode = POOLS[name]
    generator = torch.Generator().manual_seed(0)
    x = integers(shape, generator).to(dtype)
    x[:, :2] = -math.inf
    x.requires_grad_()
    window = (geometry.kernel, geometry.stride, geometry.padding, geometry.dilation)
    y = F.max_pool2d(x, *window, ceil_mode)
    g = integers(y.shape, generator).to(dtype)
    (dx,) = torch.autograd.grad(y, x, g)
    out, taps = pooling.max_pool(x.detach().to(DEVICE), geometry, y.shape[2:])
    assert torch.equal(out.cpu(), y)
    assert torch.equal(pooling.max_pool_grad(g.to(DEVICE), taps, geometry, shape[2:]).cpu(), dx)


def test_max_pool_of_nan() -> None:
    """It wins, the first one where there are more, and takes the gradient."""
    x = torch.tensor([[1.0, math.nan, 3.0, math.nan], [5.0, 2.0, 7.0, 8.0]], device=DEVICE)[None, None]
    geometry = Geometry((1, 4), (1, 4))
    y, taps = pooling.max_pool(x, geometry, (2, 1))
    assert y[0, 0, 0, 0].isnan() and y[0, 0, 1, 0] == 8
    dx = pooling.max_pool_grad(torch.ones_like(y), taps, geometry, (2, 4)).cpu()
    assert dx[0, 0].tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


# What the gates are for


def shifted_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = kernels.pack
    monkeypatch.setattr(kernels, "pack", lambda weight, geometry: pack(weight.roll(1, 2), geometry))


def dropped_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    convolve = launch.convolve

    def dropping(x: Tensor, *others: object, **options: object) -> None:
        convolve(x.clone().index_fill_(1, torch.tensor(x.shape[1] - 1, device=DEVICE), 0), *others, **options)

    monkeypatch.setattr("robust.conv.kernels.algorithm.convolve", dropping)


def wrong_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    of = Phase.of

    def late(offset: int, *axis: int) -> Phase:
        phase = of(offset, *axis)
        return replace(phase, before=phase.before + 1) if offset == 1 else phase

    monkeypatch.setattr(Phase, "of", late)


def unwritten_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    phases = Geometry.phases
    monkeypatch.setattr(Geometry, "phases", lambda self, size: list(phases(self, size))[: self.stride[0]][:1])


def lost_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "splits", lambda pixels, tile, programs: (1, tile))


@pytest.mark.parametrize("plant", [shifted_tap, dropped_channel, wrong_phase, unwritten_pixels, lost_split])
def test_planted_faults_are_seen(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"torch\.equal"):
        check_exact(SMALL, torch.float32)


# What it cannot do


def test_misfit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert algorithm("triton") is kernels

    def misfit(dtype: torch.dtype = torch.float32, device: str = "cpu") -> str | None:
        return kernels.misfit(Geometry((1, 1)), dtype, torch.device(device))

    assert [misfit(dtype, DEVICE.type) for dtype in DTYPES.values()] == [None] * 4
    assert misfit(torch.float64) == "computes in float32, float16 and bfloat16, not in float64"
    monkeypatch.setattr("robust.conv.kernels.algorithm.INTERPRETED", True)
    monkeypatch.setattr(triton, "__version__", "3.7.0")
    assert misfit() is None
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(np, "__version__", "2.3.5")
    assert misfit() is None
    monkeypatch.setattr(np, "__version__", "2.4.0")
    assert misfit() == "3.6.0 is interpreted with numpy below 2.4 only, not 2.4.0"
    monkeypatch.setattr("robust.conv.kernels.algorithm.INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in str(misfit())
    assert misfit(device="cuda") is None


def test_compiled_for_hopper_without_a_gpu(tmp_path: Path) -> None:
    """Every kernel that real networks would launch: tensor cores by wgmma wherever they can be used, and no spills."""
    script = Path(__file__).with_name("conv_compile.py")
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not all((binaries / tool).is_file() for tool in ("ptxas", "cuobjdump")):
        pytest.skip("this build of Triton has no assembler for NVIDIA")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(script.parents[1]), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    records = json.loads(run.stdout)
    for record in records:
        assert (record["STACK"], record["LOCAL"]) == (0, 0), record
        assert record["wgmma"] == (record["precision"] != "ieee" and record["dots"]), record
    seen = {(record["precision"], record["purpose"]) for record in records}
    purposes = ("forward", "input_grad", "weight_grad", "max_pool")
    assert seen == {*itertools.product(("bf16", "fp16", "tf32", "ieee"), purposes)} - {("ieee", "max_pool")}
    compiled = {(record["precision"], *record["tile"]) for record in records}
    wanted = {("bf16" if how == "half" else how, *astuple(tile)) for (how, _), tile in tiles.TILES.items()}
    assert wanted <= compiled
