"""Attacks against closed-form optima and against foolbox."""

import random
import sys
import warnings

import eagerpy
import foolbox
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attacks
from attacks.norms import NORMS, project_l1_box
from toys import Linear, at_their_own, conv_net, images, noise, queries, tasks


def predictions(model, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


# Against foolbox


@pytest.mark.parametrize(
    ("norm", "theirs"),
    [("linf", foolbox.attacks.LinfFastGradientAttack), ("l2", foolbox.attacks.L2FastGradientAttack)],
)
def test_fgsm_equals_foolbox_image_for_image(norm, theirs):
    model, x = conv_net(), images(16)
    y, eps = predictions(model, x), 0.03
    judge = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    expected = theirs().run(judge, x, foolbox.Misclassification(y), epsilon=eps)
    *_, ours = queries(attacks.make("fgsm", norm), model, x, y, eps)
    assert not torch.equal(ours, x)
    torch.testing.assert_close(ours, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("norm", "theirs", "eps"),
    [
        ("linf", foolbox.attacks.LinfProjectedGradientDescentAttack, 0.05),
        ("l2", foolbox.attacks.L2ProjectedGradientDescentAttack, 0.8),
    ],
)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_has_foolbox_iterates(monkeypatch, norm, theirs, eps, targeted, random_start):
    model, x = conv_net(), images(8)
    y = predictions(model, x)
    goal = (y + 1) % 5 if targeted else y
    criterion = foolbox.TargetedMisclassification(goal) if targeted else foolbox.Misclassification(goal)
    judge = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    pgd = attacks.make("pgd", norm, targeted, steps=12, step_size=0.15, random_start=random_start)
    iterates = queries(pgd, model, x, goal, eps)
    assert len(iterates) == 13 and torch.equal(iterates[0], x) != random_start
    monkeypatch.setattr(theirs, "get_random_start", lambda *_: eagerpy.astensor(iterates[0]))
    for steps, ours in enumerate(iterates[1:], start=1):
        reference = theirs(steps=steps, rel_stepsize=0.15, random_start=random_start)
        expected = reference.run(judge, x, criterion, epsilon=eps)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_any_foolbox_attack_gives_foolbox_verdicts_and_exact_counts():
    model, x = conv_net(), images(10)
    y, eps = predictions(model, x), [0.002, 0.01, 0.05]
    judge = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    deepfool = foolbox.attacks.LinfDeepFoolAttack()
    *_, success = deepfool(judge, x, foolbox.Misclassification(y), epsilons=eps)
    rows = Counter(model)
    outcomes = run(rows, attacks.make("foolbox:LinfDeepFoolAttack", "linf"), x, y, eps, slots=10)
    ours = [[o.rung is not None and o.rung <= k for o in outcomes] for k in range(3)]
    assert ours == success.tolist()
    assert 0 < sum(map(sum, ours)) < 30
    assert sum(sum(o.forwards) for o in outcomes) == rows.forwards


@pytest.mark.parametrize("targeted", [False, True])
def test_what_a_foolbox_search_found_too_far_out_is_drawn_back_to_each_eps(targeted):
    model, x = conv_net(), images(40)
    y, eps = predictions(model, x), [0.3, 0.6, 1.2]
    goal = (y + 1) % 5 if targeted else y
    name = "L2CarliniWagnerAttack" if targeted else "NewtonFoolAttack"
    options = {"steps": 10} if targeted else {}
    attack = attacks.make(f"foolbox:{name}", "l2", targeted, **options)
    outcomes = run(model, attack, x, goal, eps, slots=40)
    assert [o.position for o in outcomes] == list(range(40))
    criterion = foolbox.TargetedMisclassification(goal) if targeted else foolbox.Misclassification(y)
    judge = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    raw, _, success = getattr(foolbox.attacks, name)(**options)(judge, x, criterion, epsilons=eps)
    for k, radius in enumerate(eps):
        found = torch.tensor([o.found and o.rung <= k for o in outcomes])
        assert torch.equal(found, success[: k + 1].any(0)), radius
    assert all((o.x_adv - x[o.position]).norm() <= eps[o.rung] * 1.000001 for o in outcomes if o.found)
    if not targeted:  # it mattered
        assert ((raw[0] - x).flatten(1).norm(dim=1) <= eps[-1]).sum() < success.any(0).sum()


def test_foolbox_fixed_eps_attack_is_tried_only_on_what_stands():
    model, x = conv_net(), images(10)
    y, eps = predictions(model, x), [0.001, 0.02, 0.3]
    attack = attacks.make("foolbox:LinfFastGradientAttack", "linf")
    outcomes = run(Counter(model), attack, x, y, eps, slots=10)
    for o in outcomes:
        # One gradient for each rung tried, none above the rung that broke it.
        tried = 3 if o.rung is None else o.rung + 1
        assert o.gradients == (1,) * tried + (0,) * (3 - tried)
    assert len({o.rung for o in outcomes}) > 1


@pytest.mark.parametrize("name", ["foolbox:LinfFastGradientAttack", "foolbox:LinfDeepFoolAttack"])
def test_foolbox_attacks_a_single_image(name):
    model, x = conv_net(), images(1)
    y = predictions(model, x)
    rows = Counter(model)
    (outcome,) = run(rows, attacks.make(name, "linf"), x, y, [1e-5, 0.3], slots=10)
    assert outcome.rung == 1 and sum(outcome.forwards) == rows.forwards > 0


def test_foolbox_leaves_the_global_generators_alone():
    model, x = conv_net(), images(4)
    attack = attacks.make("foolbox:LinfRepeatedAdditiveUniformNoiseAttack", "linf")

    def state():
        return torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = state()
    first = run(model, attack, x, predictions(model, x), [0.1])
    assert state() == before
    torch.rand(3)  # another global state must not matter
    second = run(model, attack, x, predictions(model, x), [0.1])
    assert all(torch.equal(a.x_adv, b.x_adv) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("name", "norm", "message"),
    [
        ("foolbox:L2DeepFoolAttack", "linf", "measures its perturbations in l2"),
        ("foolbox:VirtualAdversarialAttack", "l2", "needs steps"),
        ("foolbox:PointwiseAttack", "l0", "cannot be used"),
        ("foolbox:GenAttack", "linf", "runs with a target only"),
    ],
)
def test_foolbox_attack_that_does_not_fit_is_refused(name, norm, message):
    with pytest.raises(ValueError, match=message):
        attacks.make(name, norm)


def test_foolbox_attack_that_reaches_no_target_is_refused():
    with pytest.raises(ValueError, match="NewtonFoolAttack runs without a target only"):
        attacks.make("foolbox:NewtonFoolAttack", "l2", targeted=True)
    assert attacks.make("foolbox:GenAttack", "linf", targeted=True).targeted


def test_foolbox_is_imported_where_warnings_are_errors(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "foolbox"]:
        monkeypatch.delitem(sys.modules, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "foolbox:LinfDeepFoolAttack" in attacks.names()


def test_foolbox_attack_that_raises_is_named():
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise ZeroDivisionError("no luck")

    attack = attacks.make("foolbox:LinfDeepFoolAttack", "linf")
    with pytest.raises(attacks.AttackFailed, match=r"foolbox:LinfDeepFoolAttack raised ZeroDivisionError: no luck"):
        run(Broken(), attack, images(2), torch.tensor([0, 1]), [0.1])


@pytest.mark.parametrize("name", ["LinfFastGradientAttack", "LinfDeepFoolAttack"])
def test_foolbox_points_that_are_no_numbers_are_nothing_found(monkeypatch, name):
    """Of NaN a network may say any class."""

    def call(self, judge, x, criterion, epsilons):
        points = x.clone()
        points[1] = torch.nan
        points[2] = 1 - x[2]
        return points, points, torch.tensor([False, True, True])

    monkeypatch.setattr(getattr(foolbox.attacks, name), "__call__", call)
    model, x = conv_net(), images(3)
    found = run(model, attacks.make(f"foolbox:{name}", "linf"), x, predictions(model, x), [1.0])
    assert [(o.found, o.rung) for o in found] == [(False, None), (False, None), (True, 0)]
    assert torch.equal(found[1].x_adv, x[1]) and torch.equal(found[2].x_adv, 1 - x[2])


# Against the closed form


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_linear_model_every_reachable_success_and_no_other(norm, name):
    model = Linear(27)
    x = 0.5 + 0.02 * (images(40, (3, 3, 3)) - 0.5)
    y = predictions(model, x)
    distance = model.distance(x, norm)
    for factor, fooled in ((1.01, True), (0.99, False)):
        broken = at_their_own(attacks.make(name, norm), model, x, y, (factor * distance).tolist())
        assert broken == [fooled] * len(x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ladder_ends_on_the_rung_of_the_closed_form(norm):
    model = Linear(27)
    x = 0.5 + 0.02 * (images(30, (3, 3, 3)) - 0.5)
    distance = model.distance(x, norm)
    eps = [float(distance.quantile(q)) * 1.0001 for q in (0.1, 0.3, 0.5, 0.7)]
    outcomes = run(model, attacks.make("pgd", norm), x, predictions(model, x), eps, slots=7)
    expected = [next((k for k, e in enumerate(eps) if d < e), None) for d in distance.tolist()]
    assert [o.rung for o in outcomes] == expected
    assert None in expected and len(set(expected)) > 3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_mi_fgsm_by_hand(norm):
    """Steps of eps / steps along the sum of the gradients so far, each of l1 size 1 (arXiv 1710.06081)."""
    model, x, eps = conv_net().double(), images(6).double(), 1 / 64  # exact in float32, as is a quarter
    y, point, momentum = predictions(model, x), images(6).double(), torch.zeros(6, 3, 12, 12, dtype=torch.float64)
    for asked in queries(attacks.make("mi-fgsm", norm, steps=4), model, x, y, eps):
        torch.testing.assert_close(asked, point, atol=1e-12, rtol=0)
        query = point.requires_grad_()
        (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(query), y, reduction="sum"), query)
        momentum = momentum + grad / grad.abs().sum((1, 2, 3), keepdim=True)
        way = momentum.sign() if norm == "linf" else momentum / momentum.square().sum((1, 2, 3), keepdim=True).sqrt()
        point = (point.detach() + eps / 4 * way).clamp(0, 1)


# What every attack keeps


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["fgsm", "pgd", "noise"])
def test_every_point_stays_in_the_ball_and_the_box(name, norm):
    model, x, eps = conv_net(), images(8), 0.3
    attack = attacks.make(name, norm, steps=5)
    for point in queries(attack, model, x, predictions(model, x), eps):
        assert float(point.min()) >= 0 and float(point.max()) <= 1
        assert float(NORMS[norm].distance(point.double() - x.double()).max()) <= eps + 1e-6


@pytest.mark.parametrize(
    ("name", "norm"),
    [(name, norm) for name, kind in attacks.ATTACKS.items() if name != "transfer" for norm in kind.norms],
)
def test_images_in_float64_stay_so(name, norm):
    model, x = conv_net().double(), images(4).double()
    options = {"queries": 50, "steps": 12, "restarts": 2}
    options = {option: value for option, value in options.items() if option in attacks.takes(name)}
    attack = attacks.make(name, norm, **options)
    outcomes = list(attacks.run(model, attack, tasks(x, predictions(model, x)), [0.1], slots=4, seed=0))
    assert [outcome.x_adv.dtype for outcome in outcomes] == [torch.float64] * 4


def test_noise_is_weaker_than_the_gradient_of_the_same_size():
    model = Linear(300)
    x = 0.5 + 0.02 * (images(40, (3, 10, 10)) - 0.5)
    y, eps = predictions(model, x), [2 * float(model.distance(x, "linf").max())]
    assert all(o.rung == 0 for o in run(model, attacks.make("pgd", "linf"), x, y, eps))
    assert sum(o.rung is None for o in run(model, attacks.make("noise", "linf"), x, y, eps)) > 10


def test_targeted_attack_counts_only_the_target():
    model, x = conv_net(), images(12)
    y = (predictions(model, x) + 2) % 5
    outcomes = run(model, attacks.make("pgd", "linf", targeted=True, steps=20), x, y, [0.5])
    reached = [o for o in outcomes if o.rung is not None]
    assert reached
    for o in reached:
        assert predictions(model, o.x_adv[None]).item() == y[o.position]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "steps must be at least 1"), ({"restarts": 0}, "restarts must be at least 1")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attacks.make("pgd", "linf", **options)


def test_norm_that_an_attack_lacks_is_refused():
    with pytest.raises(ValueError, match="pgd has no norm 'l7'; it has linf, l2"):
        attacks.make("pgd", "l7")


# Norms


@settings(max_examples=40, deadline=None)
@given(norm=st.sampled_from(sorted(NORMS)), seed=st.integers(0, 2**16), eps=st.floats(1e-3, 10))
def test_projection_is_inside_idempotent_and_moves_nothing_that_is_inside(norm, seed, eps):
    ball = NORMS[norm]
    delta = torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(seed)) * eps
    radius = torch.full((4,), eps)
    once = ball.project_(delta.clone(), radius)
    assert bool((ball.distance(once) <= eps * (1 + 1e-6)).all())
    torch.testing.assert_close(ball.project_(once.clone(), radius), once)
    small = 0.99 * once
    torch.testing.assert_close(ball.project_(small.clone(), radius), small)


@settings(max_examples=40, deadline=None)
@given(norm=st.sampled_from(sorted(NORMS)), seed=st.integers(0, 2**16))
def test_steepest_step_reaches_the_dual_norm(norm, seed):
    grad = torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(seed))
    step = NORMS[norm].steepest_(grad.clone())
    # Of l0 inside a box of side 1, as of l1, the largest value alone.
    dual = grad.flatten(1).norm({"linf": 1, "l2": 2, "l1": torch.inf, "l0": torch.inf}[norm], dim=1)
    torch.testing.assert_close((grad * step).flatten(1).sum(1), dual)
    torch.testing.assert_close(NORMS[norm].distance(step), torch.ones(4))
    assert not NORMS[norm].steepest_(torch.zeros(1, 1, 2, 2)).any()


@pytest.mark.parametrize("size", [1e-37, 1e-20, 1, 1e15])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_steepest_step_has_its_size_whatever_the_gradients(norm, size):
    """Those of a sure classifier are small; ones that float32 holds are no reason to stand still."""
    grad = torch.zeros(1, 1, 2, 2).index_fill_(3, torch.tensor([1]), size)
    for row in (NORMS[norm].steepest_(grad), NORMS[norm].steepest_(torch.zeros_like(grad))):
        assert float(NORMS[norm].distance(row)) == pytest.approx(float(row.any()))
    assert grad.any()


def test_random_points_are_uniform_in_the_ball():
    n, eps = 4000, 0.7
    radius = torch.full((n,), eps)
    linf = NORMS["linf"].random(noise(n, (1, 1, 2)), radius)
    assert abs(float(linf.mean())) < 0.02
    # Uniform on [-eps, eps] has the variance eps² / 3.
    assert float(linf.var()) == pytest.approx(eps**2 / 3, rel=0.05)
    # In two dimensions the radius of a uniform point is eps * sqrt(u): its square is uniform.
    square = (NORMS["l2"].distance(NORMS["l2"].random(noise(n, (1, 1, 2)), radius)) / eps) ** 2
    assert float(square.max()) <= 1 + 1e-6
    assert float(square.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(square.var()) == pytest.approx(1 / 12, rel=0.05)
    # So it is of l1, whose ball of radius r has the area 2 r².
    l1 = NORMS["l1"].random(noise(n, (1, 1, 2)), radius)
    square = (NORMS["l1"].distance(l1) / eps) ** 2
    assert float(square.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(square.var()) == pytest.approx(1 / 12, rel=0.05)
    assert abs(float(l1.mean())) < 0.02
    l0 = NORMS["l0"].random(noise(n, (1, 2, 4)), torch.full((n,), 3.0))
    assert (NORMS["l0"].distance(l0) == 3).all()
    assert float((l0 != 0).float().mean(0).std()) < 0.02  # every value is as likely to change


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), eps=st.floats(1e-3, 20), scale=st.floats(0.01, 3))
def test_projection_onto_the_l1_ball_and_the_box_is_the_nearest_point(seed, eps, scale):
    g = torch.Generator().manual_seed(seed)
    x = (torch.rand(3, 2, 3, 4, generator=g) * 1.4 - 0.2).clamp(0, 1)
    delta = torch.randn(3, 2, 3, 4, generator=g) * scale
    ours = project_l1_box(x, delta, torch.full((3,), eps))
    assert float(NORMS["l1"].distance(ours).max()) <= eps * (1 + 1e-5)
    assert float((x + ours).min()) >= -1e-6 and float((x + ours).max()) <= 1 + 1e-6
    # The condition of optimality: values move by one common amount, or to zero, or to the side of the box. That
    # amount by bisection, in float64.
    for point, d, got in zip(x.double(), delta.double(), ours, strict=True):
        room = torch.where(d > 0, 1 - point, point)
        low, high = 0.0, float(d.abs().max())
        for _ in range(100):
            middle = (low + high) / 2
            kept = (d.abs() - middle).clamp(min=0).minimum(room)
            low, high = (middle, high) if kept.sum() > eps else (low, middle)
        kept = (d.abs() - (high if kept.sum() > eps or low else 0.0)).clamp(min=0).minimum(room)
        torch.testing.assert_close(got.double(), d.sign() * kept, atol=1e-5, rtol=1e-4)


def test_noise_depends_on_its_keys_only():
    shape = (3, 4, 5)
    together, alone = noise(6, shape, seed=3), noise(1, shape, seed=3)
    torch.testing.assert_close(together.uniform()[:1], alone.uniform(), atol=0, rtol=0)
    draws = [
        together.uniform(),
        together.uniform(step=1),
        together.uniform(stream=1),
        noise(6, shape, seed=4).uniform(),
        noise(6, shape, seed=3, restart=1).uniform(),
    ]
    flat = torch.stack([draw.flatten() for draw in draws])
    correlation = torch.corrcoef(flat) - torch.eye(len(draws))
    assert float(correlation.abs().max()) < 0.2


def test_large_seeds_are_told_apart():
    one, two = (noise(1, (8,), seed=2**63 + k).uniform() for k in (1, 2))
    assert not torch.equal(one, two)


# Helpers


class Counter(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.forwards = model, 0

    def forward(self, x):
        self.forwards += len(x)
        return self.model(x)


def run(model, attack, x, y, eps, slots=64, seed=0):
    outcomes = attacks.run(model, attack, tasks(x, y), eps, slots=slots, seed=seed)
    return sorted(outcomes, key=lambda o: o.position)
