"""Every configuration of the Triton kernel on every convolution of ResNet-50: is the table's choice the fastest?

    python benchmarks/tiles.py --dtype bfloat16 --batch-size 256                 # needs a GPU

Forward and input gradient with what a network fuses into them; in CUDA graphs, by turns. A configuration whose
result is not the table's, but for rounding, is said to be WRONG and not timed. Medians of the rounds are printed.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

# Run as a script, this folder would stand before packages of the same names.
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torchvision
import typer
from torch import Tensor

from benchmarks.convolution import DTYPES, Operands, Work, ceilings, interleaved
from robust.conv.algorithm import Epilogue
from robust.conv.geometry import Geometry
from robust.conv.kernels import launch
from robust.conv.kernels.tiles import Tile, clipped, convolution_tile
from robust.conv.shapes import Shape, shapes

# (m, n, k, warps, stages); k for 16-bit numbers, of which a tf32 takes two.
CANDIDATES = [
    (64, 64, 64, 4, 3), (64, 128, 64, 4, 3), (128, 64, 32, 4, 4), (128, 64, 64, 4, 3), (128, 64, 64, 4, 4),
    (128, 128, 32, 4, 3), (128, 128, 32, 4, 4), (128, 128, 32, 8, 3), (128, 128, 32, 8, 4), (128, 128, 64, 4, 2),
    (128, 128, 64, 4, 3), (128, 128, 64, 8, 2), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 32, 8, 3),
    (128, 256, 32, 8, 4), (128, 256, 64, 8, 3), (256, 128, 32, 8, 4), (256, 128, 64, 8, 3),
]  # fmt: skip
TABLE = "the table's"
WORKERS = 16  # that compile
TOLERANCE = 0.02  # of the largest value: 16-bit results are rounded to 1/256


def found_shapes() -> list[Shape]:
    network = torchvision.models.resnet50(weights=None).eval().requires_grad_(False)
    return list(shapes(network, torch.zeros(1, 3, 224, 224)))


@contextmanager
def tile_of(tile: Tile | None) -> Iterator[list[Tile]]:
    """All products with this tile, clipped to them, or with the table's; those used are added to the list."""
    used: list[Tile] = []

    def choose(how, m, n, k, **flags):
        used.append(convolution_tile(how, m, n, k, **flags) if tile is None else clipped(tile, n, k))
        return used[-1]

    with patch.object(launch, "convolution_tile", choose):
        yield used


def works(shape: Shape, batch: int, dtype: torch.dtype) -> dict[str, Work]:
    """With a residual where a block of the network ends; with a mask where the kernel puts it on."""
    operands = Operands.of(shape, batch, dtype, torch.device("cuda"))
    pointwise = shape.geometry == Geometry((1, 1))
    residual = operands.residual if pointwise and shape.filters > shape.channels else None
    mask = operands.residual if pointwise else None
    forward, _ = operands.ours(Epilogue(operands.bias, residual, relu=True))
    return {"forward": forward, "input gradient": operands.ours(mask=mask)[1]}


def candidates(dtype: torch.dtype) -> list[Tile]:
    return [Tile(m, n, k // (dtype.itemsize // 2), w, s) for m, n, k, w, s in CANDIDATES]


def compile_all(shape: Shape, dtype: torch.dtype) -> None:
    """Into Triton's cache on disk, by one small batch; what does not compile or fit is met again later."""
    for work in works(shape, 8, dtype).values():
        for tile in candidates(dtype):
            with tile_of(tile), suppress(Exception):  # Triton's own, by version
                work()


def with_tile(work: Work, tile: Tile | None) -> Work:
    def run() -> object:
        with tile_of(tile):
            return work()

    return run


def name(tile: Tile) -> str:
    return str((tile.m, tile.n, tile.k, tile.warps, tile.stages))


def agree(a: Tensor, b: Tensor) -> bool:
    return bool((a.float() - b.float()).abs().max() <= TOLERANCE * b.float().abs().max())


def main(
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bfloat16",
    tf32: Annotated[bool, typer.Option(help="Let the GPU round float32 to tf32.")] = False,
    batch_size: Annotated[int, typer.Option()] = 256,
    rounds: Annotated[int, typer.Option(help="Of which the median is taken.")] = 3,
    output: Annotated[Path | None, typer.Option(help="All that was measured, as JSON.")] = None,
) -> None:
    """Print the table as Markdown."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    of = DTYPES[dtype]
    found = found_shapes()
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        list(pool.map(compile_all, found, [of] * len(found)))
    copy, peak = ceilings(of)
    print(f"ResNet-50, batch {batch_size}, {'tf32' if tf32 else dtype}, {torch.cuda.get_device_name()}, "
          f"torch {torch.__version__}\n")  # fmt: skip
    print("| shape | pass | the table's | ms | of the floor | the fastest (m, n, k, warps, stages), ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    gains, measured = [], []
    for shape in found:
        operands = Operands.of(shape, batch_size, of, torch.device("cuda"))
        floor = max(operands.bytes / copy, operands.flops / peak)
        del operands
        for title, work in works(shape, batch_size, of).items():
            with tile_of(None) as used:
                expected = work()
            table = used[0]
            sides, said = {TABLE: with_tile(work, None)}, []
            for tile in candidates(of):
                with tile_of(tile) as used:
                    try:
                        result = work()
                    except Exception as error:  # Triton's own, by version: too much shared memory, mostly
                        said.append(f"{name(tile)}: {type(error).__name__}")
                        continue
                if agree(result, expected):
                    sides[name(used[0])] = with_tile(work, tile)  # once, of those that are clipped to the same
                else:
                    said.append(f"{name(tile)}: WRONG")
            taken = interleaved(sides, torch.device("cuda"), rounds)
            medians = {side: 1000 * statistics.median(times) for side, times in taken.items()}
            measured.append({"shape": str(shape), "pass": title, "table": name(table), "ms": medians.copy()})
            ours = medians.pop(TABLE)
            best = sorted(medians, key=medians.__getitem__)[:4]
            gains.append(ours / min(ours, medians[best[0]]))
            cells = [str(shape), title, name(table), f"{ours:.4f}"]
            cells += [f"{100_000 * floor / ours:.0f} %"]
            cells += ["; ".join([*(f"{side}: {medians[side]:.4f}" for side in best), *said])]
            print(f"| {' | '.join(cells)} |", flush=True)
    if output:
        output.write_text(json.dumps(measured))
    print(f"\nThe fastest for each instead of the table's: {statistics.geometric_mean(gains):.3f} times as fast.")


if __name__ == "__main__":
    typer.run(main)
