"""The project's convolution beside torch's: every distinct shape of a network, and the whole of it.

    python benchmarks/convolution.py                                             # ResNet-50, float32, on a CPU
    python benchmarks/convolution.py --device cuda --dtype bfloat16 --batch-size 256

Weights are frozen on both sides, and ours packed beforehand, as in an evaluation; both take turns, and a ratio is the
median over the rounds of (torch / ours): above 1, ours is faster. On a CPU torch runs in its default memory format (and
in channels_last, for the whole network); on a GPU in channels_last, and besides by cuDNN's operators with a fused
epilogue and by torch.compile. There, what each shape achieves is set against what the device reaches in a large copy
and in a large matrix product.

On a GPU the shapes are timed in CUDA graphs, so that what the host takes to launch a kernel, several times what a small
one takes to run, is left out; the whole network both so and as it is called.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

# Run as a script, this folder would stand before packages of the same names.
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import torch
import torchvision
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from robust.conv.algorithm import BARE, Epilogue, algorithm
from robust.conv.convert import convert
from robust.conv.functional import choose
from robust.conv.shapes import Shape, shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Work = Callable[[], object]


CALLS = 10  # on a GPU, at a time


def seconds(work: Work, device: torch.device) -> float:
    """Of one call; on a GPU, the mean of CALLS, which a `Captured` makes at once."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(1 if isinstance(work, Captured) else CALLS):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / CALLS


class Captured:
    """CALLS calls as one CUDA graph, without the host's part of them; graphs of one `pool` share its memory."""

    def __init__(self, work: Work, pool: object):
        self.work = work  # for a graph does not keep alive what it reads
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(warm)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            for _ in range(CALLS):
                work()

    def __call__(self) -> None:
        self.graph.replay()


def interleaved(
    works: dict[str, Work], device: torch.device, rounds: int, captured: bool = True
) -> dict[str, list[float]]:
    """By name, the seconds of each round; one round to warm up. On a GPU in graphs, unless not `captured`."""
    if device.type == "cuda" and captured:
        pool = torch.cuda.graph_pool_handle()  # one will do: what they return is not read, and they take turns
        works = {name: Captured(work, pool) for name, work in works.items()}
    taken: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(rounds + 1):
        for name, work in works.items():
            spent = seconds(work, device)
            if round_:
                taken[name].append(spent)
    return taken


def ratio(taken: dict[str, list[float]], peer: str, ours: str = "ours") -> float:
    return statistics.median(a / b for a, b in zip(taken[peer], taken[ours], strict=True))


@dataclass(frozen=True)
class Operands:
    """What one shape is measured on; channels_last where `last`, as torch has them by default where not."""

    shape: Shape
    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor
    g: Tensor

    @classmethod
    def of(cls, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> "Operands":
        made = (shape.x_shape(batch), shape.weight_shape, (shape.filters,), shape.y_shape(batch), shape.y_shape(batch))
        tensors = [torch.randn(size, device=device).to(dtype) for size in made]
        return cls(shape, *(_last(tensor) for tensor in tensors))

    def how(self) -> tuple:
        geometry = self.shape.geometry
        return geometry.stride, geometry.padding, geometry.dilation, geometry.groups

    def torchs(self, last: bool) -> tuple[Work, Work]:
        """Forward, and the input gradient."""
        lay = _last if last else torch.Tensor.contiguous
        x, weight, g = (lay(tensor) for tensor in (self.x, self.weight, self.g))
        stride, padding, dilation, groups = self.how()

        def gradient() -> object:
            return torch.ops.aten.convolution_backward(
                g, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (True, False, False)
            )

        return lambda: F.conv2d(x, weight, None, stride, padding, dilation, groups), gradient

    def ours(self, epilogue: Epilogue = BARE, mask: Tensor | None = None) -> tuple[Work, Work]:
        geometry, size = self.shape.geometry, self.shape.size
        name = choose(geometry, (self.shape.channels, self.shape.filters), self.x.dtype, self.x.device)
        by = algorithm(name)
        packed, packed_grad = by.pack(self.weight, geometry), by.pack_input_grad(self.weight, geometry)
        return (
            lambda: by.forward(self.x, packed, geometry, epilogue),
            lambda: by.input_grad(self.g, packed_grad, geometry, size, mask=mask),
        )

    @property
    def flops(self) -> int:
        """Of one pass; the gradient's are as many. A multiply-add is two."""
        return 2 * self.g.numel() * self.weight[0].numel()

    @property
    def bytes(self) -> int:
        """What one pass must move at the least: each tensor once."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.x, self.weight, self.g))


def per_shape(network: nn.Module, batch: int, dtype: torch.dtype, device: torch.device, rounds: int) -> None:
    """A table of all shapes, and the geometric means over them."""
    gpu = device.type == "cuda"
    found = shapes(network.cpu(), torch.zeros(1, 3, 224, 224))
    copy, peak = ceilings(dtype) if gpu else (0.0, 0.0)
    if gpu:
        print(f"A copy moves {copy / 1e12:.2f} TB/s, a matrix product of 8192³ makes {peak / 1e12:.0f} TFLOP/s.\n")
    heads = ["shape", "layers", "by", "forward ms", "torch / ours", "input gradient ms", "torch / ours"]
    heads += ["TB/s", "TFLOP/s", "of the floor", "fused: cuDNN / ours", "with residual"] if gpu else []
    _row(heads)
    _row(["---"] * len(heads))
    means: dict[str, list[float]] = {head: [] for head in ("forward", "input gradient", "both", "fused", "residual")}
    for shape, layers in found.items():
        operands = Operands.of(shape, batch, dtype, device)
        theirs, mine = operands.torchs(last=gpu), operands.ours()
        forward = interleaved({"torch": theirs[0], "ours": mine[0]}, device, rounds)
        gradient = interleaved({"torch": theirs[1], "ours": mine[1]}, device, rounds)
        both = {side: [a + b for a, b in zip(forward[side], gradient[side], strict=True)] for side in forward}
        cells = [
            str(shape), str(len(layers)), choose(shape.geometry, (shape.channels, shape.filters), dtype, device),
            f"{1000 * statistics.median(forward['ours']):.3g}", f"{ratio(forward, 'torch'):.2f}",
            f"{1000 * statistics.median(gradient['ours']):.3g}", f"{ratio(gradient, 'torch'):.2f}",
        ]  # fmt: skip
        for head, taken in (("forward", forward), ("input gradient", gradient), ("both", both)):
            means[head].append(ratio(taken, "torch"))
        if gpu:
            floor = max(operands.bytes / copy, operands.flops / peak)
            fused = fused_ratios(operands, device, rounds)
            spent = statistics.median(forward["ours"])
            cells += [f"{operands.bytes / spent / 1e12:.2f}", f"{operands.flops / spent / 1e12:.0f}"]
            cells += [f"{100 * floor / spent:.0f} %", *(f"{value:.2f}" for value in fused)]
            means["fused"].append(fused[0])
            means["residual"].append(fused[1])
        _row(cells)
        del operands, theirs, mine
    said = ", ".join(f"{head} {statistics.geometric_mean(values):.2f}" for head, values in means.items() if values)
    print(f"\nGeometric means of torch / ours over the {len(found)} shapes: {said}.")


def fused_ratios(operands: Operands, device: torch.device, rounds: int) -> list[float]:
    """cuDNN's convolution with bias and ReLU over ours, and both with a residual."""
    x, weight, bias, residual = operands.x, operands.weight, operands.bias, operands.residual
    stride, padding, dilation, groups = operands.how()
    aten = torch.ops.aten
    pairs = (
        (
            lambda: aten.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups),
            operands.ours(Epilogue(shift=bias, relu=True))[0],
        ),
        (
            lambda: aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, dilation, groups),
            operands.ours(Epilogue(shift=bias, residual=residual, relu=True))[0],
        ),
    )
    return [ratio(interleaved({"torch": a, "ours": b}, device, rounds), "torch") for a, b in pairs]


def whole(
    network: nn.Module, batch: int, dtype: torch.dtype, device: torch.device, rounds: int, compiled: bool
) -> None:
    """A table of the whole network, forward alone and with the gradient of the image."""
    network = network.to(device, dtype)
    x = torch.rand(batch, 3, 224, 224, device=device).to(dtype)
    ours = convert(network, x[:1], strict=True).module
    last = torchvision.models.resnet50(weights=None).eval().requires_grad_(False).to(device, dtype)
    last.load_state_dict(network.state_dict())
    last = last.to(memory_format=torch.channels_last)
    sides: dict[str, tuple[nn.Module, Tensor]] = {"ours": (ours, _last(x)), "torch, channels_last": (last, _last(x))}
    if device.type != "cuda":
        sides["torch"] = (network, x)
    elif compiled:
        sides["torch.compile, channels_last"] = (torch.compile(last), _last(x))

    def forward(side: str) -> object:
        module, given = sides[side]
        with torch.no_grad():
            return module(given)

    def both(side: str) -> object:
        module, given = sides[side]
        query = given.detach().requires_grad_()
        return torch.autograd.grad(module(query).float().sum(), query)

    ways = {"whole network": False} | ({"in a CUDA graph": True} if device.type == "cuda" else {})
    for title, captured in ways.items():
        _row([title, "forward: images/s", "over ours", "and input gradient: images/s", "over ours"])
        _row(["---"] * 5)
        taken = [
            interleaved({side: lambda side=side, run=run: run(side) for side in sides}, device, rounds, captured)
            for run in (forward, both)
        ]
        for side in sides:
            cells = [side]
            for by_side in taken:
                cells += [f"{batch / statistics.median(by_side[side]):,.3g}", f"{1 / ratio(by_side, side):.2f}"]
            _row(cells)
        print()
    print('"over ours": how many times as fast as ours; its inverse is torch / ours.')


def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a large copy, reads and writes; operations a second of a large matrix product."""
    device = torch.device("cuda")
    source = torch.rand(2**29, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device).to(dtype) for _ in range(2))
    # By a kernel: what a graph makes of a plain copy moves less than the convolutions do.
    sides = {"copy": lambda: torch.neg(source, out=target), "product": lambda: a @ b}
    taken = interleaved(sides, device, rounds=5)
    return 2 * source.nbytes / min(taken["copy"]), 2 * 8192**3 / min(taken["product"])


def _last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _row(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "float32",
    tf32: Annotated[bool, typer.Option(help="Let a GPU round float32 to tf32.")] = False,
    batch_size: Annotated[int, typer.Option()] = 16,
    rounds: Annotated[int, typer.Option(help="Of which the median is taken.")] = 5,
    whole_too: Annotated[bool, typer.Option("--whole/--no-whole", help="The table of the whole network.")] = True,
    compiled: Annotated[bool, typer.Option(help="On a GPU, torch.compile too, which takes a minute.")] = True,
    shapes_too: Annotated[bool, typer.Option("--shapes/--no-shapes", help="The table by shape.")] = True,
) -> None:
    """Print the tables as Markdown."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
    where = torch.device(device)
    name = torch.cuda.get_device_name() if where.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"ResNet-50, batch {batch_size}, {'tf32' if tf32 else dtype}, {name}, torch {torch.__version__}\n")
    network = torchvision.models.resnet50(weights=None).eval().requires_grad_(False)
    if whole_too:
        whole(network, batch_size, DTYPES[dtype], where, rounds, compiled)
        print()
    if shapes_too:
        per_shape(network.float(), batch_size, DTYPES[dtype], where, rounds)


if __name__ == "__main__":
    typer.run(main)
