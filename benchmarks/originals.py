"""AutoAttack's parts beside pyautoattack's from the same random numbers: what differs then is not chance.

    pip install -e ".[bench]"
    python benchmarks/originals.py --shared ../shared

One line for each network, norm and part: how many images each leaves standing, and on how many they disagree.
In float64, as in float32 two runs of a search part where rounding decides. FAB draws no random numbers. pyautoattack's
Square puts one window on all images of a batch, so that here it gets them one by one. Last, PGD-40 beside foolbox's, of
which the last point alone is judged.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

# Run as a script, this file's neighbours would stand before the packages of the same names.
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import pyautoattack.square
import torch
import typer
from pyautoattack import autopgd_base, fab_pt
from torch import Tensor, nn

import attacks
from attacks import square
from attacks.attack import State
from attacks.fab import FAB, FABState
from attacks.noise import Noise, sample_key
from attacks.norms import NORMS, project_l1_box
from benchmarks.images import load_images
from benchmarks.verdicts import BATCH, CASES, PARTS, THEIR_NORM, Case, predicted

SEED = 0
DUST = 1e-13  # what rounding leaves in float64 of values that did not change


@contextmanager
def exactly() -> Iterator[None]:
    """Both in float64, and alike in what is a matter of rounding alone."""
    rows = Noise._rows
    with ExitStack() as stack:
        for where, name, instead in [
            (Noise, "_rows", lambda *args: rows(*args).double()),
            (Tensor, "float", Tensor.double),  # pyautoattack's FAB asks for it
            # In l1 its APGD counts the values that differ from the image's, and so does ours.
            (type(NORMS["l0"]), "distance", staticmethod(changed)),
            (autopgd_base, "L0_norm", changed),
            # Its projection is in float32, and its Square takes a millionth off eps.
            (autopgd_base, "L1_projection", nearest),
            (pyautoattack.square, "L1_projection", lambda x, delta, eps: nearest(x, delta, eps / (1 - 1e-6))),
            (square, "ROUNDING", 1e-9),
            (square, "AHEAD", 1),  # it asks about proposals that change nothing, too
        ]:
            stack.enter_context(patch.object(where, name, instead))
        square._windows.cache_clear()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
            square._windows.cache_clear()


def changed(delta: Tensor) -> Tensor:
    return (delta.abs() > DUST).flatten(1).sum(1)


def nearest(x: Tensor, delta: Tensor, eps: float) -> Tensor:
    """What takes a perturbation to the nearest in the l1 ball and the box."""
    return project_l1_box(x, delta, torch.full((len(x),), eps)) - delta


def dusted(x: Tensor, clean: Tensor) -> Tensor:
    """x without dust, which Square divides by its own size where there is nothing else in a window."""
    return torch.where((x - clean).abs() < DUST, clean, x)


class OurFAB(FAB):
    """Without the search at the end; judged where theirs is, which is not at the points drawn back to, though they are
    nearer; and blind, as theirs in l2 and l1, to gradients below 1e-8, which count where the box ends before the plane.
    """

    def fools(self, pred: Tensor, state: State) -> Tensor:
        return super().fools(pred, state) & getattr(state, "ahead", True)

    def step(self, state: FABState, logits: Tensor, grad: Tensor | None) -> FABState:
        if grad is not None and self.norm != "linf":
            grad = torch.where(grad.abs() > 1e-8, grad, 0)
        return super().step(state, logits, grad)


class OurSquare(square.Square):
    def step(self, state: square.SquareState, logits: Tensor, grad: None) -> square.SquareState:
        state.query = dusted(state.query, state.x)
        return super().step(state, logits, grad)


class TheirSquare(pyautoattack.square.SquareAttack):
    def init_hyperparam(self, x: Tensor) -> None:
        super().init_hyperparam(x)
        self.clean = x

    def check_shape(self, x: Tensor) -> Tensor:  # of every point
        return dusted(super().check_shape(x), self.clean)


def noise(x: Tensor, run: int) -> Noise:
    """What the engine gives to that run on the images, numbered from 0."""
    return Noise(SEED, [sample_key(str(k)) for k in range(len(x))], [run] * len(x), tuple(x.shape[1:]), x.device)


def begin(attack: attacks.Attack, x: Tensor, y: Tensor, eps: float, drawn: Noise) -> State:
    """The state in which our attack begins on the images."""
    none = torch.zeros(len(x), dtype=torch.long)
    known = {"x": x, "y": y, "target": y, "eps": torch.full((len(x),), eps), "query": x.clone(), "asked": none}
    return attack.init(State(**known, graded=none.clone(), fooled=none.bool()), drawn)


def in_their_order(attack: square.Square, moves: Tensor, drawn: Noise, x: Tensor) -> Iterator[Tensor]:
    """The numbers in [0, 1) that make pyautoattack's Square draw the start and the moves (queries - 1, K) of ours on x,
    one image.
    """
    _, c, h, w = x.shape
    if attack.norm == "linf":
        yield drawn.uniform(shape=(c, 1, w))
    else:
        rows, cols = (n // (h // 5) for n in (h, w))
        u = drawn.uniform(shape=(1 + c, rows, 1, cols, 1))[0, :, :, 0, :, 0]
        for i in range(rows):
            for j in range(cols):
                yield 1 - u[:1, i, j]
                yield u[1:, i, j]
    windows = attack._windows(x)
    sides = windows.sides[windows.phase(torch.arange(len(moves)))].tolist()
    for move, side in zip(moves.to(x.dtype), sides, strict=True):
        signs, places = move[:c], move[c:] if attack.norm == "linf" else move[c:-1]
        for place, n in zip(places, (h, w, h, w), strict=False):  # of one window or two
            yield (place + 0.5) / max(n - side, 1)
        if attack.norm != "linf":
            yield move[-1:]  # whether the peaks are turned
        yield signs


def their_square(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float) -> Tensor:
    """(n, C, H, W): where pyautoattack's Square ends."""
    attack, points = OurSquare(norm=norm), []
    theirs = TheirSquare(model, norm=THEIR_NORM[norm], n_queries=attack.queries - 1, eps=eps, resc_schedule=False)
    for k in range(len(x)):
        image, label = x[k : k + 1], y[k : k + 1]
        drawn = Noise(SEED, [sample_key(str(k))], [0], tuple(x.shape[1:]), x.device)
        numbers = in_their_order(attack, begin(attack, image, label, eps, drawn).moves[0], drawn, image)
        theirs.init_hyperparam(image)
        with patch.object(torch, "rand", lambda shape, numbers=numbers: next(numbers).reshape(shape)):
            points.append(theirs.attack_single_run(image, label)[1])
    return torch.cat(points)


def make_their_apgd(name: str, *args, **options) -> autopgd_base.APGDAttack:
    if name == "apgd-t":
        return autopgd_base.APGDAttack_targeted(*args, **options)
    return autopgd_base.APGDAttack(*args, loss=name.removeprefix("apgd-"), **options)


def their_apgd(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, name: str) -> Tensor:
    """(n, C, H, W): where pyautoattack's APGD ends."""
    own = attacks.make(name, norm, classes=10)
    theirs = make_their_apgd(name, model, n_iter=own.steps, norm=THEIR_NORM[norm], eps=eps)
    theirs.init_hyperparam(x)
    with torch.no_grad():
        wrong = model(x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    x_adv = x.clone()
    for run in range(max(1, own.targets)):
        rows = (predicted(model, x_adv) == y).nonzero().squeeze(1)
        if not len(rows):
            break
        theirs.y_target = wrong[rows, run]
        drawn = noise(x, run)
        if norm == "l1":
            start, lengths = drawn.normal()[rows], [int(share * own.steps) for share in (0.3, 0.3, 0.4)]
            with patch.object(torch, "randn_like", lambda _, start=start: start):
                found = theirs.decr_eps_pgd(x[rows], y[rows], [3 * eps, 2 * eps, eps], lengths)[3]
        else:
            start = begin(own, x, y, eps, drawn).query[rows]
            found = theirs.attack_single_run(x[rows], y[rows], x_init=start)[3]
        x_adv[rows] = found
    return x_adv


def their_fab(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float) -> Tensor:
    """(n, C, H, W): where pyautoattack's FAB ends."""
    return fab_pt.FABAttack_PT(model, norm=THEIR_NORM[norm], eps=eps, targeted=True, n_restarts=1).perturb(x, y)


def their_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """(n, C, H, W): where foolbox's PGD in linf ends."""
    import eagerpy
    import foolbox

    start = begin(attacks.make("pgd", "linf"), x, y, eps, noise(x, 0)).query
    theirs = foolbox.attacks.LinfProjectedGradientDescentAttack(steps=40, rel_stepsize=0.1)
    with patch.object(theirs, "get_random_start", lambda *_: eagerpy.astensor(start)):
        judge = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        return theirs.run(judge, x, foolbox.Misclassification(y), epsilon=eps)


def theirs(model: nn.Module, x: Tensor, y: Tensor, case: Case, name: str) -> Tensor:
    """(n,): which images stand."""
    if name == "pgd":
        x_adv = their_pgd(model, x, y, case.eps)
    elif name == "square":
        x_adv = their_square(model, x, y, case.norm, case.eps)
    elif name == "fab-t":
        x_adv = their_fab(model, x, y, case.norm, case.eps)
    else:
        x_adv = their_apgd(model, x, y, case.norm, case.eps, name)
    return predicted(model, x_adv) == y


def ours(model: nn.Module, x: Tensor, y: Tensor, case: Case, name: str) -> Tensor:
    """(n,): which images stand."""
    made = {"fab-t": OurFAB(norm=case.norm, search=0), "square": OurSquare(norm=case.norm)}
    attack = made.get(name) or attacks.make(name, case.norm, classes=10)
    tasks = [attacks.Task(k, sample_key(str(k)), x[k], int(y[k])) for k in range(len(x))]
    stand = torch.ones(len(x), dtype=torch.bool)
    for outcome in attacks.run(model, attack, tasks, [case.eps], slots=BATCH, seed=SEED):
        stand[outcome.position] = outcome.rung is None
    return stand


def main(
    shared: Annotated[Path, typer.Option(help="Folder with models/ and data/.")] = Path("../shared"),
    images: Annotated[int, typer.Option(help="Images of each case.")] = 200,
    only: Annotated[str | None, typer.Option(help="Run the cases of one factory.")] = None,
    norms: Annotated[str, typer.Option(help="Run the cases of these norms.")] = "linf,l2,l1",
) -> None:
    """Print the table as Markdown."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(shared / "models"))
    import architectures

    print("| network | norm, eps | part | clean: right | robust: stand | original: stand | verdicts that differ |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        if only not in (None, case.factory) or case.norm not in norms.split(","):
            continue
        model = getattr(architectures, case.factory)().requires_grad_(False).double()
        x, y = load_images(shared, case.factory, images)
        x = x.double()
        right = predicted(model, x) == y
        x, y = x[right].contiguous(), y[right]
        for name in (*PARTS, "pgd") if case.norm == "linf" else PARTS:
            with exactly():
                own, other = ours(model, x, y, case, name), theirs(model, x, y, case, name)
            counts = f"{len(x)} | {int(own.sum())} | {int(other.sum())} | {int((own != other).sum())}"
            print(f"| {case.factory} | {case.norm} {case.said} | {name} | {counts} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
