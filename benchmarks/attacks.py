"""PGD-40 beside foolbox, torchattacks and adversarial-robustness-toolbox; AutoAttack beside pyautoattack.

    pip install -e ".[bench]"
    python benchmarks/attacks.py --shared ../shared

Every method attacks the same images with the same batch size. PGD has the same step (eps / 10) and number of steps
everywhere, from a random start, and is timed beside the network alone; AutoAttack is the standard suite. Methods take
turns, and the ratio printed is the median over the rounds of (peer / robust): above 1, robust is faster. Each has a
process of its own, as its users would run it: what one leaves behind, such as the C library's memory, another would
profit from. Robust accuracy is counted on a fresh forward pass of what each method returns, over all images. "robust"
is the whole of `robust.run`: clean pass, attack, re-verification, 8-bit check, store. Under AutoAttack it leaves out
images that it certifies (`robust/certify/`), which no attack can break; "robust, all attacked" certifies nothing.

The others are called as their users call them: foolbox and adversarial-robustness-toolbox take the gradients of
unfrozen parameters too, and all but pyautoattack attack images that the network gets wrong anyway. With --alike all
have frozen parameters and the images that the network gets right.
"""

import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

# A script's own folder comes first, where this file would stand before the package of the same name; the processes
# that it starts do not have it.
HERE = str(Path(__file__).resolve().parent)
sys.path.insert(0, HERE)
from images import load_images

sys.path[:] = [folder for folder in sys.path if str(Path(folder).resolve()) != HERE]

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import robust

BATCH, STEPS = 64, 40
SUITE_BATCH = 250  # pyautoattack's own

Method = Callable[[nn.Module, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Case:
    factory: str
    eps: float
    said: str
    images: int


CASES = (
    Case("cifar10_resnet20", 4 / 255, "4/255", 200),
    Case("cifar10_robust_8px", 8 / 255, "8/255", 500),
    Case("mnist_robust_03", 0.3, "0.3", 500),
)
SUITE_CASES = (
    Case("cifar10_resnet20", 8 / 255, "8/255", 200),
    Case("cifar10_robust_8px", 8 / 255, "8/255", 200),
    Case("mnist_robust_03", 0.3, "0.3", 200),
)


def ours(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    batches = zip(x.split(BATCH), y.split(BATCH), strict=True)
    run = robust.run(model, batches, attacks=["pgd"], eps=eps, steps=STEPS, batch_size=BATCH)
    return torch.tensor(run.samples.robust.to_numpy())


def foolbox(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    from foolbox import PyTorchModel
    from foolbox.attacks import LinfProjectedGradientDescentAttack

    judge = PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = LinfProjectedGradientDescentAttack(steps=STEPS, rel_stepsize=0.1)
    pairs = zip(x.split(BATCH), y.split(BATCH), strict=True)
    return torch.cat([stands(model, attack(judge, xs, ys, epsilons=eps)[1], ys) for xs, ys in pairs])


def torchattacks(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    from torchattacks import PGD

    attack = PGD(model, eps=eps, alpha=eps / 10, steps=STEPS, random_start=True)
    pairs = zip(x.split(BATCH), y.split(BATCH), strict=True)
    return torch.cat([stands(model, attack(xs, ys), ys) for xs, ys in pairs])


def art(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), nb_classes=10, clip_values=(0, 1), device_type="cpu"
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier, eps=eps, eps_step=eps / 10, max_iter=STEPS, num_random_init=1, batch_size=BATCH, verbose=False
    )
    x_adv = torch.from_numpy(attack.generate(x.numpy(), y.numpy()))
    pairs = zip(x_adv.split(BATCH), y.split(BATCH), strict=True)
    return torch.cat([stands(model, xs, ys) for xs, ys in pairs])


def bare(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """What the network alone costs: STEPS forwards and input gradients on every image, parameters frozen."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    for xs, ys in zip(x.split(BATCH), y.split(BATCH), strict=True):
        query = xs.clone().requires_grad_()
        for _ in range(STEPS):
            torch.autograd.grad(F.cross_entropy(model(query), ys, reduction="sum"), query)
    for parameter in trained:
        parameter.requires_grad_(True)
    return torch.ones(len(x), dtype=torch.bool)


def our_suite(model: nn.Module, x: Tensor, y: Tensor, eps: float, certify: bool | None = None) -> Tensor:
    run = robust.run(model, (x, y), attacks=["autoattack"], eps=eps, batch_size=SUITE_BATCH, certify=certify)
    return torch.tensor(run.samples.robust.to_numpy())


def pyautoattack(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    from pyautoattack import AutoAttack

    x_adv, _ = AutoAttack(model, norm="Linf", eps=eps, seed=0).run_standard_evaluation(x, y, batch_size=SUITE_BATCH)
    return stands(model, x_adv, y)


PGD: dict[str, Method] = {
    "robust": ours, "foolbox": foolbox, "torchattacks": torchattacks, "art": art, "bare loop": bare,
}  # fmt: skip
SUITE: dict[str, Method] = {
    "robust": our_suite, "robust, all attacked": partial(our_suite, certify=False), "pyautoattack": pyautoattack,
}  # fmt: skip


def stands(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x.detach()).argmax(1) == y


def compare(title: str, methods: Mapping[str, Method], case: Case, shared: Path, rounds: int, alike: bool) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    standing: dict[str, list[int]] = {name: [] for name in methods}
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))) for name in methods
        }
        for turn in range(rounds):
            order = list(methods)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                took, stood = processes[name].submit(take_turn, methods[name], case, shared, turn, alike).result()
                seconds[name].append(took)
                standing[name].append(stood)
    which = f"those right of {case.images}" if alike else str(case.images)
    print(f"\n{case.factory}, linf {case.said}, {which} images, {title}, {rounds} rounds\n")
    print("| method | seconds, median | ratio to robust | images that stand |\n|---|---|---|---|")
    for name in methods:
        ratios = [theirs / own for theirs, own in zip(seconds[name], seconds["robust"], strict=True)]
        range_of = "–" if name == "bare loop" else f"{min(standing[name])}–{max(standing[name])}"
        print(f"| {name} | {statistics.median(seconds[name]):.2f} | {statistics.median(ratios):.2f} | {range_of} |")


def take_turn(method: Method, case: Case, shared: Path, turn: int, alike: bool) -> tuple[float, int]:
    """Seconds that the method takes, and how many images stand; in its own process."""
    warnings.simplefilter("ignore")
    model, (x, y) = load_network(shared, case.factory), load_images(shared, case.factory, case.images)
    if alike:
        model.requires_grad_(False)
        with torch.no_grad():
            right = model(x).argmax(1) == y
        x, y = x[right], y[right]
    method(model, x[:8], y[:8], case.eps)  # warm up
    torch.manual_seed(turn)
    began = time.perf_counter()
    verdicts = method(model, x, y, case.eps)
    return time.perf_counter() - began, int(verdicts.sum())


def load_network(shared: Path, factory: str) -> nn.Module:
    if str(shared / "models") not in sys.path:
        sys.path.insert(0, str(shared / "models"))
    import architectures

    return getattr(architectures, factory)()


def ladder(shared: Path, rounds: int) -> None:
    """Ten eps in one run beside the smallest alone."""
    model, (x, y) = load_network(shared, "cifar10_resnet20"), load_images(shared, "cifar10_resnet20", 200)
    eps = [k / 255 for k in range(1, 11)]
    robust.run(model, [(x[:8], y[:8])], attacks=["pgd"], eps=eps, steps=2)  # warm up
    spent: dict[int, list[float]] = {1: [], 10: []}
    for _ in range(rounds):
        for rungs, times in spent.items():
            began = time.perf_counter()
            robust.run(model, [(x, y)], attacks=["pgd"], eps=eps[:rungs], steps=STEPS, batch_size=BATCH)
            times.append(time.perf_counter() - began)
    ratio = statistics.median(ten / one for ten, one in zip(spent[10], spent[1], strict=True))
    print(
        f"\nTen eps (1/255 .. 10/255) cost {ratio:.2f} times what 1/255 alone costs (cifar10_resnet20, {len(x)} images)"
    )


def main(
    shared: Annotated[Path, typer.Option(help="Folder with models/ and data/.")] = Path("../shared"),
    rounds: Annotated[int, typer.Option(help="Turns of every method.")] = 5,
    only: Annotated[str | None, typer.Option(help="Run one case, by the factory's name.")] = None,
    suite: Annotated[bool, typer.Option(help="AutoAttack instead of PGD.")] = False,
    alike: Annotated[bool, typer.Option("--alike", help="Frozen parameters and right images for all.")] = False,
) -> None:
    """Print the tables as Markdown."""
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU")
    title, methods, cases = (
        (f"AutoAttack, batch {SUITE_BATCH}", SUITE, SUITE_CASES)
        if suite
        else (f"PGD-{STEPS}, batch {BATCH}", PGD, CASES)
    )
    for case in cases:
        if only in (None, case.factory):
            compare(title, methods, case, shared, rounds, alike)
    if not suite and not alike and only in (None, "cifar10_resnet20"):
        ladder(shared, rounds)


if __name__ == "__main__":
    typer.run(main)
