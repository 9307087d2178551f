"""What an evaluation of a network costs, with its gradient: the module as it is, and its fast twin, by memory format.

    python benchmarks/twin.py
    python benchmarks/twin.py --model resnet50 --weights FILE --device cuda

The first evaluation of a number of rows stands beside later ones, for a library may prepare kernels for each size. Of
the twin in both formats, the one that an evaluation takes comes first.
"""

import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

# Run as a script, this folder would stand before packages of the same names.
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import torch
import typer
from torch import Tensor, nn

from robust.device import pick_device
from robust.models import load_model
from robust.models.prepare import fast_twin
from robust.precision import arithmetic


def seconds(module: nn.Module, x: Tensor) -> float:
    """Of one evaluation with the gradient at x."""
    began = time.perf_counter()
    query = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(query).logsumexp(1).sum(), query)
    gradient.sum().item()  # waits for a GPU
    return time.perf_counter() - began


def main(
    model: Annotated[str, typer.Option(help="As for robust.evaluate.")] = "efficientnet_lite0",
    weights: Annotated[Path | None, typer.Option()] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rows: Annotated[str, typer.Option(help="How many at once, as a comma list.")] = "1,5,14,20,64",
    repeats: Annotated[int, typer.Option(help="After the first; their median is printed.")] = 3,
) -> None:
    """Print the table as Markdown, in ms."""
    where = pick_device(device)
    loaded = load_model(model, weights)
    module = loaded.module.to(where).eval().requires_grad_(False)
    name = torch.cuda.get_device_name() if where.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{model}, forward and input gradient, {name}, torch {torch.__version__}; ms, the first time and later\n")
    sizes = [int(number) for number in rows.split(",")]
    print(f"| rows | {' | '.join(map(str, sizes))} |\n|{'---|' * (len(sizes) + 1)}", flush=True)
    with arithmetic("float32"):
        x = torch.rand(max(sizes), *loaded.input_size, device=where)
        twin, description, _ = fast_twin(module, x[:2])
        last = "channels_last" in description
        other = torch.contiguous_format if last else torch.channels_last
        sides = {
            "the module": module,
            f"its twin ({description})": twin,
            f"in {'the default format' if last else 'channels_last'}": copy.deepcopy(twin).to(memory_format=other),
        }
        for side, network in sides.items():
            cells = []
            for n in sizes:
                first, *later = (1000 * seconds(network, x[:n]) for _ in range(1 + repeats))
                cells.append(f"{first:.1f}, {statistics.median(later):.1f}")
            print(f"| {side} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
