"""The parts of AutoAttack beside pyautoattack's: from the same random numbers they ask about the same points.

In float64, where rounding cannot hide a difference, nor make one.
"""

from functools import partial

import pytest
import torch
from pyautoattack.fab_pt import FABAttack_PT
from torch import Tensor, nn

import attacks
import toys
from attacks import engine
from attacks.fab import FAB
from benchmarks.originals import OurSquare, TheirSquare, exactly, in_their_order, make_their_apgd
from benchmarks.verdicts import THEIR_NORM
from toys import begin, conv_net, images, queries, tasks

pytestmark = pytest.mark.long

NORM_NAMES = ("linf", "l2", "l1")


@pytest.fixture(autouse=True)
def float64():
    with exactly():
        yield


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


@pytest.mark.parametrize(("norm", "eps", "steps"), [("linf", 0.01, 100), ("l2", 0.1, 100), ("l1", 6.0, 200)])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t"])
def test_apgd(monkeypatch, name, norm, eps, steps):
    # In l1 of 200 steps, for it then looks at its step after every second or third of them.
    model, x = network(), images(10).double()
    y, target = model(x).topk(2).indices.T.contiguous()
    monkeypatch.setattr(toys, "begin", partial(begin, target=target))
    own = queries(attacks.make(name, norm, steps=steps), model, x, y, eps)

    attack = make_their_apgd(name, model, n_iter=steps, norm=THEIR_NORM[norm], eps=eps)
    attack.init_hyperparam(x)
    attack.y_target = target
    model.asked.clear()
    if norm == "l1":
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
    FABAttack_PT(model, n_restarts=1, **options).perturb(x, y)
    # For each target they look at the images twice before, and at the result behind.
    rounds = torch.stack(model.asked[1:]).unflatten(0, (targets, 2 * steps + 3))
    assert_same(own, list(rounds[:, 2:-1].flatten(0, 1)), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.01), ("l2", 0.1), ("l1", 1.0)])
def test_square(monkeypatch, norm, eps, channels):
    count = 250
    model, x = network(channels), images(3, (channels, 16, 16)).double()
    y = model(x).argmax(1)
    attack = OurSquare(norm=norm, queries=count)
    for k in range(len(x)):  # a window of theirs is the same on all images of a batch
        image, label = x[k : k + 1], y[k : k + 1]
        state = begin(attack, image, label, eps)
        own = []
        for _ in range(count):
            own.append(state.query.clone())
            state = attack.step(state, model(state.query), None)
        model.asked.clear()
        options = {"norm": THEIR_NORM[norm], "n_queries": count - 1, "eps": eps, "resc_schedule": False}
        theirs = TheirSquare(model, **options)
        theirs.init_hyperparam(image)
        drawn = in_their_order(attack, state.moves[0], toys.noise(1, tuple(image.shape[1:])), image)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "rand", lambda shape, drawn=drawn: next(drawn).reshape(shape))
            theirs.attack_single_run(image, label)
        assert_same(own, model.asked, atol=1e-7)
