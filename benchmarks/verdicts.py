"""What AutoAttack and each of its parts leave standing beside pyautoattack; least distances beside adv-lib and foolbox.

    pip install -e ".[bench]" && pip install --no-deps adv-lib
    python benchmarks/verdicts.py --shared ../shared
    python benchmarks/verdicts.py --shared ../shared --part distances

The same images of the networks in --shared, batches of 250. A fresh forward pass of what each method returns counts
what stands, over all images, and which of its distances count.
"""

import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

# Run as a script, this file's neighbours would stand before the packages of the same names.
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import torch
import typer
from torch import Tensor, nn

import attacks
from attacks.noise import sample_key
from benchmarks.images import load_images

BATCH = 250
PARTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")
THEIR_NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@dataclass(frozen=True)
class Case:
    factory: str
    norm: str
    eps: float
    said: str


CASES = (
    Case("cifar10_resnet20", "linf", 8 / 255, "8/255"),
    Case("cifar10_robust_8px", "linf", 8 / 255, "8/255"),
    Case("cifar10_robust_8px", "l2", 0.25, "0.25"),
    Case("cifar10_robust_8px", "l1", 5.0, "5"),
    Case("mnist_robust_03", "linf", 0.3, "0.3"),
    Case("mnist_robust_03", "l2", 1.5, "1.5"),
    Case("mnist_robust_03", "l1", 8.0, "8"),
)


def ours(model: nn.Module, x: Tensor, y: Tensor, case: Case, name: str) -> int:
    """Images that stand: right on the clean image and not broken within eps."""
    attack = attacks.make(name, case.norm, classes=10)
    right = (predicted(model, x) == y).nonzero().squeeze(1).tolist()
    tasks = [attacks.Task(k, sample_key(str(k)), x[k], int(y[k])) for k in right]
    outcomes = attacks.run(model, attack, tasks, [case.eps], slots=BATCH, seed=0)
    return sum(outcome.rung is None for outcome in outcomes)


def theirs(model: nn.Module, x: Tensor, y: Tensor, case: Case, name: str) -> int:
    from pyautoattack import AutoAttack

    if name == "autoattack":
        suite = AutoAttack(model, norm=THEIR_NORM[case.norm], eps=case.eps, seed=0)
    else:
        suite = AutoAttack(model, norm=THEIR_NORM[case.norm], eps=case.eps, seed=0, version="custom", attacks=[name])
        suite.apgd.n_restarts = suite.fab.n_restarts = 1
        if case.norm == "l1":
            suite.apgd.use_largereps = suite.apgd_targeted.use_largereps = True
    x_adv, _ = suite.run_standard_evaluation(x, y, batch_size=BATCH)
    return int((predicted(model, x_adv) == y).sum())


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(BATCH)])


def adv_lib(name: str, norm: str, steps: int) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """adversarial-library's function for one of our attacks on the least distance."""
    sys.modules.setdefault("visdom", types.ModuleType("visdom"))  # it is imported for plots that nobody asks for
    from adv_lib.attacks import ddn, fmn, sigma_zero

    return {
        "fmn": lambda *a: fmn(*a, norm={"linf": float("inf"), "l2": 2, "l1": 1, "l0": 0}[norm], steps=steps),
        "ddn": lambda *a: ddn(*a, steps=steps, levels=None),
        "sigma-zero": lambda *a: sigma_zero(*a, num_steps=steps),
    }[name]


def foolbox(name: str, norm: str, steps: int) -> Callable[[nn.Module, Tensor, Tensor], Tensor] | None:
    """foolbox's, None where it has none."""
    import foolbox as fb

    kind = f"{norm.replace('linf', 'LInf').replace('l', 'L')}FMNAttack" if name == "fmn" else "DDNAttack"
    if name == "sigma-zero":
        return None
    attack = getattr(fb.attacks, kind)(steps=steps)

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return attack(fb.PyTorchModel(model, bounds=(0, 1), device=x.device), x, y, epsilons=None)[1]

    return run


def own_distances(model: nn.Module, x: Tensor, y: Tensor, name: str, norm: str) -> Tensor:
    """(B,), infinite where nothing is found."""
    tasks = [attacks.Task(k, sample_key(str(k)), x[k], int(y[k])) for k in range(len(x))]
    found = torch.full((len(x),), torch.inf)
    for outcome in attacks.run(model, attacks.make(name, norm), tasks, [1e-9], slots=BATCH, seed=0):
        if outcome.found:
            k = outcome.position
            found[k] = attacks.NORMS[norm].distance(outcome.x_adv[None] - x[k : k + 1])[0]
    return found


def compared(own: Tensor, peer: Tensor) -> str:
    """Cells: the peer's median and misses; the ratio of the medians; the geometric mean of the ratios by image."""
    both = own.isfinite() & peer.isfinite()
    median, by_image = float(own.median() / peer.median()), float((own / peer)[both].log().mean().exp())
    return f"{peer.median():.5g} ({int(peer.isinf().sum())}) | {median:.3f} | {by_image:.3f}"


def print_distances(shared: Path, factories: list[str], images: int) -> None:
    import architectures

    versions = ", ".join(f"{name} {version(name)}" for name in ("adv-lib", "foolbox"))
    print(f"\nMedian least distances, and in brackets the images on which nothing was found; {versions}\n")
    heads = "median (none found) | ratio of medians | mean ratio by image"
    print(f"| network | attack | norm | robust: median (none found) | adv-lib: {heads} | foolbox: {heads} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for factory in factories:
        model = getattr(architectures, factory)().requires_grad_(False)
        x, y = (part.contiguous() for part in load_images(shared, factory, images))
        right = predicted(model, x) == y
        x, y = x[right], y[right]
        for name in ("fmn", "ddn", "sigma-zero"):
            for norm in attacks.ATTACKS[name].norms:
                own = own_distances(model, x, y, name, norm)
                cells = [f"{own.median():.5g} ({int(own.isinf().sum())})"]
                for peer in (adv_lib, foolbox):
                    function = peer(name, norm, attacks.make(name, norm).steps)
                    if function is None:
                        cells.append("| |")
                        continue
                    x_adv = function(model, x, y).detach()
                    size = attacks.NORMS[norm].distance(x_adv - x)
                    cells.append(compared(own, torch.where(predicted(model, x_adv) != y, size, torch.inf)))
                print(f"| {factory} | {name} | {norm} | {' | '.join(cells)} |", flush=True)


def print_verdicts(shared: Path, cases: list[Case], images: int) -> None:
    import architectures

    print("| network | norm, eps | attack | robust: stand | pyautoattack: stand | seconds | its seconds |")
    print("|---|---|---|---|---|---|---|")
    for case in cases:
        model = getattr(architectures, case.factory)().requires_grad_(False)
        x, y = (part.contiguous() for part in load_images(shared, case.factory, images))
        for name in ("autoattack", *PARTS):
            began = time.perf_counter()
            mine = ours(model, x, y, case, name)
            middle = time.perf_counter()
            other = theirs(model, x, y, case, name)
            spent = f"{middle - began:.1f} | {time.perf_counter() - middle:.1f}"
            print(f"| {case.factory} | {case.norm} {case.said} | {name} | {mine} | {other} | {spent} |", flush=True)


class Part(StrEnum):
    ALL = "all"
    VERDICTS = "verdicts"
    DISTANCES = "distances"


def main(
    shared: Annotated[Path, typer.Option(help="Folder with models/ and data/.")] = Path("../shared"),
    images: Annotated[int, typer.Option(help="Images of each case.")] = 200,
    only: Annotated[str | None, typer.Option(help="Run the cases of one factory.")] = None,
    norms: Annotated[str, typer.Option(help="Run the cases of these norms.")] = "linf,l2,l1",
    part: Annotated[Part, typer.Option(help="Print one of the tables only.")] = Part.ALL,
) -> None:
    """Print the tables as Markdown."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(shared / "models"))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU\n")
    chosen = [case for case in CASES if only in (None, case.factory) and case.norm in norms.split(",")]
    if part != Part.DISTANCES:
        print_verdicts(shared, chosen, images)
    if part != Part.VERDICTS:
        print_distances(shared, list(dict.fromkeys(case.factory for case in chosen)), images)


if __name__ == "__main__":
    typer.run(main)
