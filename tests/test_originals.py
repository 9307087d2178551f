"""The parts of AutoAttack beside pyautoattack's: from the same random numbers they ask about the same points.

In float64, where rounding cannot hide a difference, nor make one.
"""

from collections.abc import Iterator
from functools import partial

import pyautoattack.square as their_square
import pytest
import torch
from pyautoattack import autopgd_base as autopgd
from pyautoattack import fab_pt as fab
from torch import Tensor, nn

import attacks
import toys
from attacks import engine, square
from attacks.fab import FAB
from attacks.noise import Noise
from attacks.norms import NORMS, project_l1_box
from toys import begin, conv_net, images, queries, tasks

NORM_NAMES = ("linf", "l2", "l1")
THEIR_NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    rows = Noise._rows
    monkeypatch.setattr(Noise, "_rows", lambda *args: rows(*args).double())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # FAB's original asks for it
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Watched(nn.Module):
    """Remembers what the network is asked."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.asked = model, []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        return self.model(x)


def network(channels: int = 3) -> Watched:
    return Watched(conv_net(channels).double().requires_grad_(False))


def assert_same(own: list[Tensor], theirs: list[Tensor], atol: float = 1e-8) -> None:
    torch.testing.assert_close(torch.stack(own), torch.stack(theirs), atol=atol, rtol=0)


def nearest(x: Tensor, delta: Tensor, eps: float) -> Tensor:
    """What takes a perturbation to the nearest in the l1 ball and the box."""
    return project_l1_box(x, delta, torch.full((len(x),), eps)) - delta


@pytest.mark.parametrize(("norm", "eps", "steps"), [("linf", 0.01, 100), ("l2", 0.1, 100), ("l1", 6.0, 200)])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t"])
def test_apgd(monkeypatch, name, norm, eps, steps):
    # In l1 of 200 steps, for it then looks at its step after every second or third of them; with our projection, as
    # theirs is in float32; and on neither side does what rounding leaves of a change count as one.
    model, x = network(), images(10).double()
    y, target = model(x).topk(2).indices.T.contiguous()
    monkeypatch.setattr(toys, "begin", partial(begin, target=target))
    changed = lambda delta: (delta.abs() > 1e-9).flatten(1).sum(1)  # noqa: E731
    monkeypatch.setattr(type(NORMS["l0"]), "distance", staticmethod(changed))
    own = queries(attacks.make(name, norm, steps=steps), model, x, y, eps)

    kind, loss = {
        "apgd-ce": (autopgd.APGDAttack, {"loss": "ce"}),
        "apgd-dlr": (autopgd.APGDAttack, {"loss": "dlr"}),
        "apgd-t": (autopgd.APGDAttack_targeted, {}),
    }[name]
    attack = kind(model, n_iter=steps, norm=THEIR_NORM[norm], eps=eps, **loss)
    attack.init_hyperparam(x)
    attack.y_target = target
    model.asked.clear()
    if norm == "l1":
        monkeypatch.setattr(autopgd, "L1_projection", nearest)
        monkeypatch.setattr(autopgd, "L0_norm", changed)
        start = toys.noise(len(x), tuple(x.shape[1:])).normal()
        monkeypatch.setattr(torch, "randn_like", lambda _: start)
        attack.decr_eps_pgd(x, y, [3 * eps, 2 * eps, eps], [60, 60, 80])
    else:
        attack.attack_single_run(x, y, x_init=own[0])
    assert_same(own, model.asked)


@pytest.mark.parametrize("norm", NORM_NAMES)
def test_fab(norm):
    steps, targets, eps = 30, 4, 1e-9  # that nobody comes so near keeps everybody in the batch
    model, x = network(), images(10).double()
    y = model(x).argmax(1)
    model.asked.clear()
    attack = FAB(norm=norm, steps=steps, search=0)
    found = list(engine.run(model, attack, tasks(x, y), [eps], slots=len(x), seed=0))
    assert all(outcome.found for outcome in found)
    own = model.asked[1:]  # after what ranked the classes
    assert len(own) == targets * 2 * steps

    model.asked.clear()
    options = {"norm": THEIR_NORM[norm], "n_iter": steps, "eps": eps, "targeted": True, "n_target_classes": targets}
    fab.FABAttack_PT(model, n_restarts=1, **options).perturb(x, y)
    # For each target they look at the images twice before, and at the result behind.
    rounds = torch.stack(model.asked[1:]).unflatten(0, (targets, 2 * steps + 3))
    assert_same(own, list(rounds[:, 2:-1].flatten(0, 1)), atol=1e-6)


def dusted(x: Tensor, clean: Tensor) -> Tensor:
    """x without what rounding leaves of values that did not change; Square makes it large where it divides by it."""
    return torch.where((x - clean).abs() < 1e-13, clean, x)


class DustedSquare(their_square.SquareAttack):
    def init_hyperparam(self, x: Tensor) -> None:
        super().init_hyperparam(x)
        self.clean = x

    def check_shape(self, x: Tensor) -> Tensor:  # of every point
        return dusted(super().check_shape(x), self.clean)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.01), ("l2", 0.1), ("l1", 1.0)])
def test_square(monkeypatch, norm, eps, channels):
    count = 400
    monkeypatch.setattr(square, "AHEAD", 1)  # theirs asks about proposals that change nothing, too
    monkeypatch.setattr(square, "ROUNDING", 1e-9)
    # Theirs takes a millionth off eps, and projects in float32.
    monkeypatch.setattr(their_square, "L1_projection", lambda x, delta, radius: nearest(x, delta, eps))
    model, x = network(channels), images(4, (channels, 16, 16)).double()
    y = model(x).argmax(1)
    attack = attacks.make("square", norm, queries=count)
    for k in range(len(x)):  # a window of theirs is the same on all images of a batch
        image, label = x[k : k + 1], y[k : k + 1]
        state = begin(attack, image, label, eps)
        own = []
        for _ in range(count):
            state.query = dusted(state.query, image)
            own.append(state.query.clone())
            state = attack.step(state, model(state.query), None)
        model.asked.clear()
        options = {"norm": THEIR_NORM[norm], "n_queries": count - 1, "eps": eps, "resc_schedule": False}
        theirs = DustedSquare(model, **options)
        theirs.init_hyperparam(image)
        drawn = in_their_order(norm, state.moves[0].double(), toys.noise(1, tuple(image.shape[1:])), image)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "rand", lambda shape, drawn=drawn: next(drawn).reshape(shape))
            theirs.attack_single_run(image, label)
        assert_same(own, model.asked, atol=1e-7)


def in_their_order(norm: str, moves: Tensor, noise: Noise, x: Tensor) -> Iterator[Tensor]:
    """Numbers in [0, 1) that make the original draw the start and the moves (queries - 1, K) of our search."""
    _, c, h, w = x.shape
    if norm == "linf":
        yield noise.uniform(shape=(c, 1, w))
    else:
        rows, cols = (n // (h // 5) for n in (h, w))
        u = noise.uniform(shape=(1 + c, rows, 1, cols, 1))[0, :, :, 0, :, 0]
        for i in range(rows):
            for j in range(cols):
                yield 1 - u[:1, i, j]
                yield u[1:, i, j]
    windows = square._windows(norm, 0.8, h, w, x.device)
    sides = windows.sides[windows.phase(torch.arange(len(moves)))].tolist()
    for move, side in zip(moves, sides, strict=True):
        signs, places, turned = move[:c], move[c:], move[-1:]
        if norm != "linf":
            places = places[:-1]
        for place, n in zip(places, (h, w, h, w), strict=False):
            yield (place + 0.5) / max(n - side, 1)
        if norm != "linf":
            yield turned
        yield signs
