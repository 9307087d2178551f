"""FAB, and the projection onto a hyperplane inside the box, against exact optima."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor, nn

from attacks import engine
from attacks.fab import FAB
from attacks.hyperplane import ONTO
from attacks.norms import NORMS
from toys import Linear, begin, conv_net, images, tasks

NORM_NAMES = ("linf", "l2", "l1")


def run(model, attack, x, y, eps=0.1, slots=64, enough=0.0):
    outcomes = list(engine.run(model, attack, tasks(x, y), [eps], slots=slots, seed=0, enough=enough))
    assert len(outcomes) == len(x)
    return sorted(outcomes, key=lambda o: o.position)


def predictions(model, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


def distances(norm: str, outcomes, x: Tensor) -> Tensor:
    return NORMS[norm].distance(torch.stack([o.x_adv for o in outcomes]) - x)


def least(norm: str, z: np.ndarray, w: np.ndarray, c: float) -> float | None:
    """The least norm of a delta with w · delta = c and z + delta in [0, 1], exactly; None where there is none."""
    d = len(z)
    if norm == "l2":
        return least_l2(z, w, c)
    if norm == "linf":  # delta and its bound: -t <= delta_i <= t
        cost = np.append(np.zeros(d), 1)
        eye, ones = np.eye(d), np.ones((d, 1))
        upper = np.block([[eye, -ones], [-eye, -ones]])
        solved = linprog(
            cost, A_ub=upper, b_ub=np.zeros(2 * d), A_eq=[[*w, 0]], b_eq=[c],
            bounds=[*zip(-z, 1 - z, strict=True), (0, None)],
        )  # fmt: skip
    else:  # what is added and what is taken away
        bounds = [(0, room) for room in [*(1 - z), *z]]
        solved = linprog(np.ones(2 * d), A_eq=[[*w, *-w]], b_eq=[c], bounds=bounds)
    return solved.fun if solved.status == 0 else None


def least_l2(z: np.ndarray, w: np.ndarray, c: float) -> float | None:
    """Every choice of the values that go to the edge of the box; of those that fit, the shortest."""
    w, c = w * np.sign(c), abs(c)
    room = np.where(w > 0, 1 - z, z)
    found = []
    for full in product([False, True], repeat=len(z)):
        at_edge = np.array(full)
        rest = c - (np.abs(w) * room)[at_edge].sum()
        squares = (w**2)[~at_edge].sum()
        t = rest / squares if squares > 0 else 0
        size = np.where(at_edge, room, t * np.abs(w))
        if t >= 0 and (size <= room + 1e-12).all() and np.isclose((np.abs(w) * size).sum(), c, rtol=1e-9, atol=1e-12):
            found.append(np.linalg.norm(size))
    return min(found, default=None)


# The projection


@st.composite
def problems(draw, d=6):
    """A point with values on the edges of the box, weights with zeros and of unlike sizes, and a gap."""
    values = st.floats(0, 1, width=32) | st.sampled_from([0.0, 1.0])
    weights = st.floats(-4, 4, width=32).filter(lambda w: abs(w) > 1e-3) | st.sampled_from([0.0, 1e-3, -1.0])
    z = draw(st.lists(values, min_size=d, max_size=d))
    w = draw(st.lists(weights, min_size=d, max_size=d))
    return np.array(z), np.array(w), draw(st.floats(-6, 6, width=32).filter(lambda c: abs(c) > 1e-3))


def project(norm: str, z: np.ndarray, w: np.ndarray, c: float) -> np.ndarray:
    z, w, c = (torch.tensor(v, dtype=torch.float32) for v in (z[None, None], w[None], [[c]]))
    return ONTO[norm](z, w, c)[0, 0].double().numpy()


@pytest.mark.parametrize("norm", NORM_NAMES)
@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_projection_is_the_shortest_way_inside_the_box(norm, problem):
    z, w, c = problem
    delta = project(norm, z, w, c)
    assert (z + delta >= -1e-6).all() and (z + delta <= 1 + 1e-6).all()
    assert not delta[w == 0].any()
    assert (np.sign(delta) * np.sign(w) * np.sign(c) >= 0).all()
    room = np.where(w * c > 0, 1 - z, z) * (w != 0)
    reach = (np.abs(w) * room).sum()
    if reach < abs(c) * (1 - 1e-5):  # as far as it goes
        np.testing.assert_allclose(np.abs(delta), room, atol=1e-6)
    elif reach > abs(c) * (1 + 1e-5):
        np.testing.assert_allclose(w @ delta, c, rtol=1e-5)
        expected = least(norm, z, w, c)
        assert expected is not None
        order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
        assert np.linalg.norm(delta, order) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("norm", NORM_NAMES)
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_projection_of_many_values_meets_the_conditions_of_an_optimum(norm, share):
    g = torch.Generator().manual_seed(0)
    z, w = images(8, (2, 1500)).double(), torch.randn(8, 1500, generator=g, dtype=torch.float64)
    w = w.sign() * w.abs().pow(3) * (torch.rand(w.shape, generator=g) > 0.3)  # of very unlike sizes, many zero
    sign = torch.tensor([1.0, -1.0]).expand(8, 2)
    room = torch.where(w[:, None] * sign[:, :, None] > 0, 1 - z, z)
    c = share * sign * (room * w.abs()[:, None]).sum(2)
    delta = ONTO[norm](z.float(), w.float(), c.float()).double()
    torch.testing.assert_close((delta * w[:, None]).sum(2), c, rtol=1e-5, atol=0)
    size, weight = delta.abs(), w.abs()[:, None].expand_as(delta)
    moves = size > 0
    assert bool((size <= room + 1e-6).all()) and not bool((moves & (weight == 0)).any())
    free = (size < room - 1e-5) & (weight > 0)
    if norm == "l1":  # whoever has room left weighs no more than whoever moves
        heaviest = torch.where(free, weight, 0).amax(2)
        lightest = torch.where(moves, weight, torch.inf).amin(2)
        assert bool((heaviest <= lightest + 1e-6).all()) and int((free & moves).sum(2).max()) <= 1
    else:  # one level for whoever has room left, no less than that of the others
        level = size if norm == "linf" else size / weight.clamp(min=1e-30)
        t = torch.where(free, level, 0).amax(2, keepdim=True)
        torch.testing.assert_close(torch.where(free, level, t), t.expand_as(level), rtol=1e-4, atol=1e-6)
        assert bool((torch.where(weight > 0, level, 0) <= t * (1 + 1e-4) + 1e-6).all())


@pytest.mark.parametrize("norm", NORM_NAMES)
def test_projection_where_nothing_can_move_stays(norm):
    z = torch.tensor([[[0.0, 1.0, 0.5]], [[0.3, 0.4, 0.5]], [[0.3, 0.4, 0.5]], [[0.0, 1.0, 0.5]]])
    w = torch.tensor([[-1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [torch.nan, 1.0, 1.0]])
    c = torch.tensor([[1.0], [1.0], [0.0], [1.0]])  # in a corner; no direction; already there; no gradient at all
    assert not ONTO[norm](z, w, c)[:3].any()


@pytest.mark.parametrize("norm", NORM_NAMES)
@pytest.mark.parametrize("span", [20, 50])
def test_projection_ends_inside_the_box_however_unlike_the_sizes_are(norm, span):
    g = torch.Generator().manual_seed(span)

    def powers(*shape):
        return 10 ** ((torch.rand(*shape, generator=g) - 0.5) * span)

    for _ in range(20):
        z, w, c = images(4, (2, 100)), powers(4, 100) * torch.randn(4, 100, generator=g).sign(), powers(4, 2)
        point = z + ONTO[norm](z, w, c)
        assert float(point.min()) >= -1e-6 and float(point.max()) <= 1 + 1e-6


@pytest.mark.parametrize("norm", NORM_NAMES)
def test_points_that_share_a_hyperplane_are_projected_independently(norm):
    g = torch.Generator().manual_seed(1)
    z, w, c = images(5, (3, 200)), torch.randn(5, 200, generator=g), torch.randn(5, 3, generator=g) * 20
    together = ONTO[norm](z, w, c)
    for b, m in product(range(5), range(3)):
        alone = ONTO[norm](z[b : b + 1, m : m + 1], w[b : b + 1], c[b : b + 1, m : m + 1])
        torch.testing.assert_close(alone[0, 0], together[b, m], atol=1e-6, rtol=1e-5)


# The attack


@pytest.mark.parametrize("norm", NORM_NAMES)
@pytest.mark.parametrize("contrast", [0.02, 1.0], ids=["far from the box", "on the box"])
def test_linear_model_ends_within_one_percent_of_the_optimum(norm, contrast):
    model = Linear(6)
    x = 0.5 + contrast * (images(12, (1, 2, 3)) - 0.5)
    outcomes = run(model, FAB(norm=norm), x, predictions(model, x))
    w, score = model.weight.detach().double().numpy(), model.score(x).detach().double()
    optimum = [least(norm, p.flatten().double().numpy(), w, -float(f)) for p, f in zip(x, score, strict=True)]
    ratio = distances(norm, outcomes, x) / torch.tensor(optimum)
    assert all(o.found for o in outcomes)
    assert 1 - 1e-4 <= float(ratio.min()) and float(ratio.max()) <= 1.01


@pytest.mark.parametrize("norm", NORM_NAMES)
def test_rung_is_the_first_eps_beyond_the_distance(norm):
    model = Linear(27)
    x = 0.5 + 0.1 * (images(20, (3, 3, 3)) - 0.5)
    y = predictions(model, x)
    found = distances(norm, run(model, FAB(norm=norm, steps=20), x, y), x)
    eps = [float(found.quantile(q)) for q in (0.25, 0.5, 0.75)]
    outcomes = sorted(
        engine.run(model, FAB(norm=norm, steps=20), tasks(x, y), eps, slots=8, seed=0), key=lambda o: o.position
    )
    expected = [next((k for k, e in enumerate(eps) if d <= e), None) for d in found.tolist()]
    assert [o.rung for o in outcomes] == expected


class Stands(nn.Module):
    """Right about everything (class 0 of K), with a gradient; remembers what it was asked."""

    def __init__(self, classes: int = 2):
        super().__init__()
        self.classes, self.asked = classes, []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        scale = torch.arange(self.classes, dtype=x.dtype)
        return x.flatten(1).mean(1, keepdim=True) * scale - 2 * self.classes * (scale > 0)


@pytest.mark.parametrize(("classes", "targets"), [(2, 1), (5, 4), (12, 9)])
def test_cost_of_a_sample_that_no_step_breaks_and_targets_are_the_other_classes_at_most(classes, targets):
    for o in run(Stands(classes), FAB(norm="linf", steps=4, search=2), images(3), torch.zeros(3, dtype=int)):
        assert not o.found and o.rung is None
        # One to choose the targets; for each of them where a step begins and where it ends, and once more before it is
        # known that there is nothing to search from.
        assert o.forwards == (1 + targets * (8 + 1),)
        assert o.gradients == (targets * 4,)


def test_draws_back_from_what_fools_and_searches_at_the_end():
    model = Linear(27)
    x = 0.5 + 0.1 * (images(1, (3, 3, 3)) - 0.5)
    asked = []
    recorded = lambda q: (asked.append(q[:1].detach().clone()), model(q))[1]  # noqa: E731
    attack = FAB(norm="l2", steps=5, beta=0.7, search=3)
    (outcome,) = run(recorded, attack, x, predictions(model, x))
    assert len(asked) == 1 + attack.queries == 14 and outcome.forwards == (14,)
    points = asked[1:11]  # the first chose the target
    # On a linear model every step ahead overshoots into the other class, and is drawn back from, save the last.
    torch.testing.assert_close(points[0], x)
    for ahead, back in zip(points[1::2], points[2::2], strict=False):
        assert predictions(model, ahead) != predictions(model, x)
        torch.testing.assert_close(back, x + 0.7 * (ahead - x))
    assert predictions(model, points[-1]) != predictions(model, x)
    # Each forward of the search halves what it tries to save, from the nearest point so far.
    fools = lambda point: bool(predictions(model, point) != predictions(model, x))  # noqa: E731
    best = min((point for point in points if fools(point)), key=lambda point: float((point - x).norm()))
    for point, saved in zip(asked[11:], (0.02, 0.01, 0.005), strict=True):
        torch.testing.assert_close(point, best + saved * (x - best))
        best = point if fools(point) else best
    assert best is not points[-1]
    torch.testing.assert_close(outcome.x_adv[None], best)


@pytest.mark.parametrize("norm", NORM_NAMES)
def test_aims_at_one_class_after_another_likeliest_first(norm):
    def model(x):
        a, b = (x.flatten(1) - 0.5).unbind(1)
        # Class 1 is the likelier and out of reach in the box; class 2 is 0.1 away, along b.
        return torch.stack([0 * a, 0.1 * a - 0.1, 2 * b - 0.2], 1)

    x, y = torch.full((1, 1, 1, 2), 0.5), torch.tensor([0])
    (one,) = run(model, FAB(norm=norm, steps=20, n_targets=1), x, y)
    assert not one.found
    (two,) = run(model, FAB(norm=norm, steps=20, n_targets=2), x, y)
    assert two.found and two.restart == 1
    assert distances(norm, [two], x).item() == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("norm", NORM_NAMES)
def test_every_point_is_in_the_box_also_where_the_hyperplane_is_not(norm):
    model = Stands()
    run(model, FAB(norm=norm, steps=4), images(6), torch.zeros(6, dtype=int))
    points = torch.cat(model.asked)
    assert float(points.min()) == 0 and float(points.max()) == 1


def test_a_point_drawn_back_to_is_not_drawn_back_from():
    attack, x = FAB(norm="linf"), images(2)
    state = begin(attack, x, torch.zeros(2, dtype=int), 0.1, torch.ones(2, dtype=int))
    wrong, grad = torch.tensor([[0.0, 1.0]]).expand(2, 2), torch.ones_like(x)
    starts, state.fooled = state.query.clone(), torch.tensor([True, True])
    state = attack.step(state, wrong, grad.clone())
    assert state.iteration.tolist() == [1, 1] and not attack.wants_grad(state).any()
    ahead = state.query.clone()
    assert not torch.equal(ahead, starts)
    state.fooled = torch.tensor([True, False])
    state = attack.step(state, wrong, None)
    # One step failed: the next begins where it ended.
    torch.testing.assert_close(state.query, torch.stack([torch.lerp(x[0], ahead[0], 0.9), ahead[1]]))
    assert state.iteration.tolist() == [1, 1] and attack.wants_grad(state).all()
    attack.step(state, wrong, grad.clone())
    assert state.iteration.tolist() == [2, 2]


def test_step_goes_to_the_mean_of_both_projections():
    """A step in one dimension, by hand."""
    attack = FAB(norm="linf", alpha_max=0.1, eta=1.05)
    x = torch.full((1, 1, 1, 1), 0.2)
    state = begin(attack, x, torch.tensor([0]), 0.1, torch.tensor([1]))
    state.query = torch.full((1, 1, 1, 1), 0.4)
    # z1 - z0 = -0.6 and rises by 2 a unit: the tie is at 0.4 + 0.3 = 0.7, 0.5 away from x.
    state = attack.step(state, torch.tensor([[0.6, 0.0]]), torch.full((1, 1, 1, 1), 2.0))
    from_query, from_x = 0.4 + 1.05 * 0.3, 0.2 + 1.05 * 0.5
    assert state.query.item() == pytest.approx(0.9 * from_query + 0.1 * from_x)  # 0.3 / 0.8 is above alpha_max


@pytest.mark.parametrize("norm", NORM_NAMES)
def test_targeted_reaches_the_given_class_only(norm):
    model, x = conv_net(), images(9)
    with torch.no_grad():
        goal = model(x).topk(2).indices[:, 1]
    attack = FAB(norm=norm, targeted=True, steps=30)
    assert attack.targets == 0
    outcomes = run(model, attack, x, goal)
    reached = [o for o in outcomes if o.found]
    assert len(reached) > 4
    for o in reached:
        assert predictions(model, o.x_adv[None]).item() == goal[o.position]
    untargeted = run(model, FAB(norm=norm, steps=30), x, predictions(model, x))
    for o in reached:  # to reach one class is never nearer than to leave another, but for what a search misses
        leave = distances(norm, [untargeted[o.position]], x[o.position][None])
        assert float(distances(norm, [o], x[o.position][None])) >= 0.98 * float(leave)


@pytest.mark.parametrize("norm", NORM_NAMES)
def test_restarts_begin_half_of_eps_away_and_only_they(norm):
    model, x, eps = Stands(), torch.full((2, 3, 4, 4), 0.5), 0.2
    run(model, FAB(norm=norm, steps=1, restarts=3, search=0), x, torch.zeros(2, dtype=int), eps, slots=2)
    first, second, third = model.asked[1::2]  # each followed by its step; what chose the target comes before all
    torch.testing.assert_close(first, x)
    for start in (second, third):
        torch.testing.assert_close(NORMS[norm].distance(start - x), torch.full((2,), eps / 2))
    assert not torch.equal(second, third)


def test_stops_once_it_is_near_enough():
    model = conv_net()
    x = images(6)
    y = predictions(model, x)
    attack = FAB(norm="linf", steps=20)
    full = run(model, attack, x, y)
    enough = 1.5 * float(distances("linf", full, x).max())
    early = run(model, attack, x, y, enough=enough)
    assert all(0 < float(d) <= enough for d in distances("linf", early, x))
    assert sum(o.forwards[0] for o in early) < sum(o.forwards[0] for o in full) / 4


def test_a_gradient_of_zero_neither_fails_nor_leaves_the_box():
    flat = lambda x: torch.tensor([1.0, 0.0]) + 0 * x.flatten(1).sum(1, keepdim=True)  # noqa: E731
    for norm in NORM_NAMES:
        for o in run(flat, FAB(norm=norm, steps=3), images(3), torch.zeros(3, dtype=int)):
            assert not o.found and bool(o.x_adv.isfinite().all())


@pytest.mark.parametrize(("option", "least"), [("steps", 1), ("n_targets", 1), ("restarts", 1), ("search", 0)])
def test_impossible_options_are_refused(option, least):
    with pytest.raises(ValueError, match=f"{option} must be at least {least}, not {least - 1}"):
        FAB(norm="linf", **{option: least - 1})
