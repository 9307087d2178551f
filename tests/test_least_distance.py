"""Attacks on the least distance beside the optimum on linear networks, with the box in the way."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import Tensor, nn

import attacks
from attacks import engine
from attacks.closing import onto_l0
from attacks.fmn import vertex
from attacks.norms import NORMS
from toys import Outputs, at_their_own, conv_net, images, tasks

pytestmark = pytest.mark.long

CLOSING = [("fmn", "linf"), ("fmn", "l2"), ("fmn", "l1"), ("fmn", "l0"), ("ddn", "l2"), ("sigma-zero", "l0")]
ATTACKS = [*CLOSING, ("fab-t", "linf"), ("fab-t", "l2"), ("fab-t", "l1")]
FAR = [(name, norm) for name, norm in ATTACKS if norm != "l0"]


def linear(x: Tensor, classes: int, seed: int, shape: Callable[[Tensor], Tensor] = lambda w: w) -> nn.Sequential:
    """A linear network to which the mean of the images is as much of each class; its weights are shape(normal)."""
    weight = shape(torch.randn(classes, x[0].numel(), generator=torch.Generator().manual_seed(seed)))
    layer = nn.Linear(x[0].numel(), classes).requires_grad_(False)
    layer.weight.copy_(weight)
    layer.bias.copy_(-weight @ x.flatten(1).mean(0))
    return nn.Sequential(nn.Flatten(), layer)


def of_equal_size(weight: Tensor) -> Tensor:
    """Weights (K, d) of equal size in each class, but not in all of them, lest two be the same."""
    return weight.sign() * torch.linspace(1, 2, len(weight))[:, None]


def sketches(n: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Images of which three quarters of the values are 0 and an eighth 1, as in MNIST."""
    x = images(n, shape, seed)
    kind = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed + 100))
    return torch.where(kind < 0.75, 0.0, torch.where(kind < 0.875, 1.0, x))


def distances(model: nn.Module, name: str, norm: str, x: Tensor, y: Tensor) -> Tensor:
    """(B,) of what the attack finds; infinite where it finds nothing."""
    found = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for outcome in engine.run(model, attacks.make(name, norm), tasks(x, y), [1.0], slots=64, seed=0):
        if outcome.found:
            found[outcome.position] = NORMS[norm].distance(
                (outcome.x_adv.double() - x[outcome.position].double())[None]
            )
    return found


def optimum(norm: str, w: np.ndarray, x: np.ndarray, need: float) -> float:
    """The least change of x (d,) inside the box by which w · x rises by `need`; infinite where the box ends there."""
    w, room = np.abs(w[w != 0]), np.where(w > 0, 1 - x, x)[w != 0]
    if (w * room).sum() <= need:
        return np.inf
    if norm == "linf":
        return brentq(lambda r: (w * np.minimum(r, room)).sum() - need, 0, 1, xtol=1e-13)
    if norm == "l2":  # in proportion to the weights, as far as the box allows
        factor = brentq(lambda c: (w * np.minimum(c * w, room)).sum() - need, 0, 1 / w.min(), xtol=1e-13)
        return float(np.linalg.norm(np.minimum(factor * w, room)))
    if norm == "l0":
        return float(1 + np.searchsorted(np.sort(w * room)[::-1].cumsum(), need))
    order = np.argsort(-w)  # l1: the heaviest values first, each as far as the box allows
    before = (w * room)[order].cumsum() - (w * room)[order]
    return float(np.minimum(room[order], (need - before).clip(0) / w[order]).sum())


def least(model: nn.Module, norm: str, x: Tensor, y: Tensor) -> Tensor:
    """(B,): to the nearest of the wrong classes, of a linear network."""
    weight, bias = (part.double().numpy() for part in (model[1].weight, model[1].bias))
    flat = x.flatten(1).double().numpy()
    best = []
    for image, label in zip(flat, y.tolist(), strict=True):
        scores = weight @ image + bias
        wrong = [k for k in range(len(bias)) if k != label]
        best.append(min(optimum(norm, weight[k] - weight[label], image, scores[label] - scores[k]) for k in wrong))
    return torch.tensor(best, dtype=torch.float64)


def assert_optimal(model: nn.Module, name: str, norm: str, x: Tensor) -> None:
    y = model(x).argmax(1)
    best, found = least(model, norm, x, y), distances(model, name, norm, x, y)
    reachable = best.isfinite()
    assert bool(found[~reachable].isinf().all())
    best, found = best[reachable], found[reachable]
    if not len(best):
        return
    if norm == "l0":
        assert found.tolist() == best.tolist()
    else:
        # Rounding moves the boundary by as much for a near image as for a far one.
        assert float((found - best).min()) > -2e-5 * float(best.max())
        far = best > 1e-3  # nearer, rounding would have a say
        assert bool((found <= 1.01 * best)[far].all())


@pytest.mark.parametrize(("shape", "classes"), [((3, 8, 8), 10), ((1, 28, 28), 2), ((1, 28, 28), 10)])
@pytest.mark.parametrize(("name", "norm"), ATTACKS)
def test_linear_networks_break_at_the_closed_form(name, norm, shape, classes):
    x = torch.cat([images(16, shape, 5), sketches(16, shape, 5)])
    assert_optimal(linear(x, classes, seed=3), name, norm, x)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    classes=st.integers(2, 10),
    channels=st.sampled_from([1, 3]),
    side=st.integers(1, 7),
    make=st.sampled_from([images, sketches]),
    weights=st.sampled_from([lambda w: w, lambda w: w**3, of_equal_size]),
)
@pytest.mark.parametrize(("name", "norm"), ATTACKS)
def test_linear_networks_of_every_kind_break_at_the_closed_form(
    name, norm, seed, classes, channels, side, make, weights
):
    x = make(16, (channels, side, side), seed)
    assert_optimal(linear(x, classes, seed, weights), name, norm, x)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    classes=st.integers(2, 10),
    side=st.integers(1, 6),
    weights=st.sampled_from([lambda w: w, lambda w: w**3, of_equal_size]),
)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_autoattack_finds_every_success_within_reach(norm, seed, classes, side, weights):
    """A hundredth beyond the optimum; by itself APGD, like its original, misses some in all norms."""
    x = images(3, (1, side, side), seed)
    model = linear(x, classes, seed, weights)
    y = model(x).argmax(1)
    best = least(model, norm, x, y)
    far = (best > 1e-3) & best.isfinite()
    attack = attacks.make("autoattack", norm, classes=classes)
    if bool(far.any()):
        assert all(at_their_own(attack, model, x[far], y[far], (1.01 * best[far]).tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "norm"), FAR)
def test_boundaries_very_near_are_found_there(name, norm, dtype):
    """At most a thousandth away in l2; where rounding does not decide, a millionth."""
    farthest = 1e-3 if dtype == torch.float32 else 1e-6
    x = images(1, (3, 8, 8), 5).repeat(24, 1, 1, 1)
    model = linear(x, 2, seed=3)
    x = (0.25 + x / 2).double()
    difference = (model[1].weight[1] - model[1].weight[0]).double()
    for _ in range(2):  # onto the boundary, once more for rounding
        z = x.flatten(1) @ difference + (model[1].bias[1] - model[1].bias[0]).double()
        x = x - (z / difference.square().sum())[:, None].mul(difference).view_as(x)
    away = torch.linspace(-farthest, farthest, 24, dtype=torch.float64)[:, None] * difference / difference.norm()
    model, x = model.to(dtype), (x + away.view_as(x)).to(dtype)
    y = model(x).argmax(1)
    best = least(model, norm, x, y)
    assert float(best.max()) < 20 * farthest and y.unique().tolist() == [0, 1]
    found = distances(model, name, norm, x, y)
    # So far from the boundary rounding decides: the error of the logits, whose sums are of these terms, over the slope.
    terms = x.double().abs().flatten(1) @ model[1].weight.double().abs().sum(0)
    slope = torch.linalg.vector_norm(difference, {"linf": 1, "l2": 2, "l1": torch.inf}[norm])
    decides = 2 * torch.finfo(dtype).eps * terms / slope
    assert (found > (1 - 1e-6) * best - decides).all() and (found < 1.01 * best + decides).all()


def test_a_nearer_class_is_preferred_to_a_likelier():
    """Class 1 is the likelier, but class 2, of a steep slope, is nearer; classes 3 and 4 would be, were the box no
    obstacle: there is no room for one, and for the other a two thousandth too little.
    """
    layer = nn.Linear(4, 5).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[0.0] * 4, [0.1, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 5.0, 0], [0, 0, 0, 4.0]]))
    layer.bias.copy_(torch.tensor([0.0, -0.08, -1.2, -5.04, -4.00002]))  # here: 0, -0.03, -0.2, -0.04, -0.04002
    x, y = torch.tensor([0.5, 0.5, 1.0, 0.99]).view(1, 1, 2, 2), torch.tensor([0])
    model = nn.Sequential(nn.Flatten(), layer)
    for name, norm in FAR:
        assert distances(model, name, norm, x, y).item() == pytest.approx(0.1, rel=1e-2)
    for name in ("fmn", "sigma-zero"):
        assert distances(model, name, "l0", x, y).item() == 1


def test_the_search_leaves_alone_what_the_box_has_stopped():
    """The heavy value has room for 0.72, the light one has to go to 0.75."""
    layer = nn.Linear(2, 2).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.02]]))
    layer.bias.copy_(torch.tensor([0.0, -1 - 0.02 * 0.97]))
    x, y = torch.tensor([0.28, 0.22]).view(1, 1, 1, 2), torch.tensor([0])
    for name in ("fab-t", "fmn"):
        found = distances(nn.Sequential(nn.Flatten(), layer), name, "linf", x, y).item()
        assert 0.75 - 1e-4 < found < 1.01 * 0.75


@pytest.mark.parametrize(("name", "norm"), FAR)
def test_a_boundary_through_a_corner_of_the_box_is_crossed(name, norm):
    """In l1 the nearest point has its first and third value turned round, and nothing left to turn farther."""
    layer = nn.Linear(4, 2, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[1.02, 0.71, 1.71, 0.93], [-0.17, 1.28, -0.19, -0.18]]))
    model, x, y = nn.Sequential(nn.Flatten(), layer), torch.tensor([1.0, 0, 1, 0]).view(1, 1, 2, 2), torch.tensor([0])
    delta = distances(model, name, norm, x, y)
    layer.bias = nn.Parameter(torch.zeros(2), False)
    assert bool((delta <= 1.01 * least(model, norm, x, y)).all())


@pytest.mark.parametrize(("name", "norm"), ATTACKS)
def test_classes_that_are_level_at_the_image_are_told_apart_beside_it(name, norm):
    x = torch.zeros(1, 3, 4, 4)
    model = linear(x, 5, seed=3)  # without a bias that is not zero
    found = distances(model, name, norm, x, model(x).argmax(1)).item()
    assert found == 1 if norm == "l0" else found < 1e-3


@pytest.mark.parametrize(("name", "norm"), [each for each in CLOSING if each[0] != "sigma-zero"])
def test_the_scale_of_logits_changes_no_distance(name, norm):
    """Which boundary is nearest does not depend on it. sigma-zero weighs logits against the number of values."""
    model, x = conv_net(), images(10, seed=2)
    y = model(x).argmax(1)
    as_it_is = distances(model, name, norm, x, y)
    for scale in (2.0**-40, 2.0**40):  # exact
        assert torch.equal(distances(Outputs(lambda x, scale=scale: model(x) * scale), name, norm, x, y), as_it_is)


@pytest.mark.parametrize(("name", "norm"), CLOSING)
def test_without_a_gradient_points_are_images_nevertheless(name, norm):
    """A linear model's boundary is then at infinity, and the ball must not grow beyond the box."""
    asked = []

    def level(x: Tensor) -> Tensor:
        asked.append(x.detach())
        return x.flatten(1)[:, :2] * 0 + torch.tensor([1.0, 0.0])

    assert distances(Outputs(level), name, norm, images(4), torch.zeros(4, dtype=torch.long)).isinf().all()
    assert all(bool(((x >= 0) & (x <= 1)).all()) for x in asked)  # of NaN, neither


@pytest.mark.parametrize(("name", "norm"), [each for each in CLOSING if each[1] != "l0"])
def test_curved_networks_break_as_near_as_to_fab(name, norm):
    """FAB spends nine times as many evaluations, one run for each class."""
    model, x = conv_net(), images(40, seed=2)
    y = model(x).argmax(1)
    ratio = distances(model, name, norm, x, y) / distances(model, "fab-t", norm, x, y)
    assert float(ratio.log().mean()) < 0 and float(ratio.max()) < 1.1


def test_curved_networks_break_in_l0_by_equally_few_values():
    """Two searches that have only their beginning and end in common; there 36 of 40 images still stand."""
    model, x = conv_net(), images(40, seed=2)
    y = model(x).argmax(1)
    fmn, sigma_zero = (distances(model, name, "l0", x, y) for name in ("fmn", "sigma-zero"))
    assert float((fmn - sigma_zero).abs().max()) <= 2
    assert float((fmn / sigma_zero).log().mean()) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize(("module", "name"), [(attacks.fmn, "fmn"), (attacks.sigma_zero, "sigma-zero")])
def test_the_last_steps_in_l0_leave_out_values(monkeypatch, module, name):
    model, x = conv_net(), images(40, seed=2)
    y = model(x).argmax(1)
    thinned = distances(model, name, "l0", x, y)
    monkeypatch.setattr(module, "thinned", lambda best, turn: best)
    whole = distances(model, name, "l0", x, y)
    assert bool((thinned <= whole).all()) and bool((thinned < whole).any())


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), radius=st.floats(0.0, 20.0))
def test_the_vertex_is_the_best_of_ball_and_box(seed, radius):
    x = images(1, (1, 3, 3), seed)
    grad = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(seed))
    delta = vertex(x, grad, torch.tensor([radius]))
    assert float(delta.abs().sum()) <= radius + 1e-5 and bool(((x + delta >= 0) & (x + delta <= 1)).all())
    gained = float((delta * grad).sum())
    if (most := float((grad.abs() * torch.where(grad > 0, 1 - x, x)).sum())) <= gained + 1e-5:
        assert gained == pytest.approx(most, abs=1e-5)  # the whole box
    else:  # what it gained can be had for no less
        assert optimum("l1", grad.flatten().double().numpy(), x.flatten().double().numpy(), gained) == pytest.approx(
            radius, abs=1e-4
        )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), share=st.floats(-0.99, 0.99))
def test_onto_l0_changes_as_few_values_as_it_takes(seed, share):
    x = images(1, (1, 3, 3), seed).flatten(1)
    w = torch.randn(1, 9, generator=torch.Generator().manual_seed(seed))
    towards = w if share > 0 else -w
    gap = abs(share) * (w.abs() * torch.where(towards > 0, 1 - x, x)).sum(1)
    delta = onto_l0(x, w, gap.copysign(torch.tensor(share)))
    assert float((delta * towards).sum()) >= float(gap) - 1e-5
    if float(gap) > 1e-4:
        few = optimum("l0", towards[0].double().numpy(), x[0].double().numpy(), float(gap))
        assert int((delta != 0).sum()) == few


@pytest.mark.parametrize(("name", "norm"), CLOSING)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 15])
def test_few_steps_cost_what_they_say(name, norm, steps, targeted):
    x = images(5, (3, 4, 4), seed=5)
    model = linear(x, 5, seed=3)
    right = model(x).argmax(1)
    attack = attacks.make(name, norm, steps=steps, targeted=targeted)
    y = (right + 1) % 5 if targeted else right
    for outcome in engine.run(model, attack, tasks(x, y), [1.0], slots=3, seed=0):
        assert outcome.forwards == (steps + 1,) and outcome.gradients == (steps,)
        assert not outcome.found or attack.fools(model(outcome.x_adv[None]).argmax(1), _state(y, outcome.position))


def _state(y: Tensor, k: int):
    return type("Only", (), {"y": y[k : k + 1]})
