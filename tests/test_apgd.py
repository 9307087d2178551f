"""APGD and AutoAttack: the step's schedule, the closed form, the stages of the ensemble."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import attacks
from attacks import apgd_l1, autoattack, engine
from attacks.attack import MinimalState, Outcome
from attacks.fgsm import FGSM
from attacks.losses import difference, dlr, margin, targeted_dlr
from attacks.norms import NORMS
from attacks.pgd import PGD
from attacks.uniform import UniformNoise
from toys import Linear, at_their_own, begin, conv_net, images, queries, tasks

NAMES = ("apgd-ce", "apgd-dlr", "apgd-t")


def run(model, attack, x, y, eps, slots=64, **options):
    outcomes = attacks.run(model, attack, tasks(x, y), eps, slots=slots, seed=0, **options)
    return sorted(outcomes, key=lambda o: o.position)


def labels(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


class Many(nn.Module):
    """K linear scores of few pixels; between any two classes the boundary is a plane."""

    def __init__(self, d: int, classes: int):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(classes, d, generator=g))

    def forward(self, x):
        return (x.flatten(1) - 0.5) @ self.weight.T

    def distance(self, x, y, norm):
        """(B,) to the nearest boundary, away from the box."""
        z = self(x)
        gaps = z.gather(1, y[:, None]) - z
        dual = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
        sizes = (self.weight[y][:, None] - self.weight[None]).norm(dual, dim=2)
        return (gaps / sizes.clamp(min=1e-12)).scatter(1, y[:, None], torch.inf).amin(1).detach()


class WithUnlikelyClass(nn.Module):
    """The model's classes and one that it never chooses."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        logits = self.model(x)
        return torch.cat([logits, 0 * logits[:, :1] - 50], 1)


def grey(n, d=(3, 3, 3)):
    return 0.5 + 0.02 * (images(n, d) - 0.5)


# Losses


def test_losses_by_hand():
    logits = torch.tensor([[4.0, 1.0, 3.0, -2.0], [0.0, 2.0, 1.0, 0.5]])
    y, target = torch.tensor([0, 2]), torch.tensor([1, 3])
    assert margin(logits, y).tolist() == [3 - 4, 2 - 1]
    assert difference(logits, y, target).tolist() == [1 - 4, 0.5 - 1]
    # z1 - z3: 4 - 1 and 2 - 0.5.
    torch.testing.assert_close(dlr(logits, y), torch.tensor([-1 / 3, 1 / 1.5]))
    # z1 - (z3 + z4) / 2: 4 - (1 - 2) / 2 and 2 - (0.5 + 0) / 2.
    torch.testing.assert_close(targeted_dlr(logits, y, target), torch.tensor([-3 / 4.5, -0.5 / 1.75]))
    scaled = dlr(1000 * logits + 7, y)
    torch.testing.assert_close(scaled, dlr(logits, y), atol=1e-4, rtol=0)


# APGD


@pytest.mark.long
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", NAMES)
def test_linear_networks_break_just_outside_the_closed_form_and_nowhere_inside(name, norm):
    # Of several classes only the targeted attack is sure to find the nearest; the others meet two that matter.
    model, x = Many(27, 5 if name == "apgd-t" else 2), grey(20)
    if name == "apgd-dlr":
        model = WithUnlikelyClass(model)
    y = labels(model, x)
    distance = (model if name != "apgd-dlr" else model.model).distance(x, y, norm)
    # In l1 the nearest point changes one value. Some walks end with two, hence the five restarts of the standard; and
    # the targeted loss is slow to see which.
    attack = attacks.make(name, norm, restarts=5 if norm == "l1" else 1)
    just_outside = 1.2 if (name, norm) == ("apgd-t", "l1") else 1.02
    for factor, fooled in ((just_outside, True), (0.98, False)):
        assert at_their_own(attack, model, x, y, (factor * distance).tolist()) == [fooled] * len(x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", NAMES)
def test_every_point_stays_in_the_ball_and_the_box(name, norm):
    model, x = conv_net(), images(6)
    for point in queries(attacks.make(name, norm, steps=12), model, x, labels(model, x), 0.3):
        assert 0 <= float(point.min()) and float(point.max()) <= 1
        assert float(NORMS[norm].distance(point.double() - x.double()).max()) <= 0.3 + 1e-6


def test_in_l1_the_ball_shrinks_to_eps_and_only_points_inside_it_count():
    model, x, eps = conv_net(), images(6), 2.0
    points = queries(attacks.make("apgd-ce", "l1", steps=20), model, x, labels(model, x), eps)
    assert len(points) == apgd_l1.queries(20) == 23
    sizes = [float(NORMS["l1"].distance(point - x).max()) for point in points]
    limits = [3 * eps] * 7 + [2 * eps] * 7 + [eps] * 9
    assert all(size <= limit * (1 + 1e-5) for size, limit in zip(sizes, limits, strict=True))
    assert sizes[0] > 2 * eps and sizes[7] > eps
    # A network that errs on everything but the clean image breaks at the first point inside the ball, not before.
    wrong = lambda x: torch.stack([x.flatten(1).sum(1) * 0, 1 + x.flatten(1).sum(1) * 0], 1)  # noqa: E731
    (outcome,) = run(wrong, attacks.make("apgd-ce", "l1", steps=20), x[:1], torch.tensor([0]), [eps])
    assert outcome.forwards == (15,) and outcome.rung == 0


def test_the_step_is_halved_at_the_papers_checkpoints_where_the_loss_stands_still():
    # Checkpoints of 100 steps: 22, then windows shorter by 3 down to 6 (section 3.2 of the paper).
    attack = attacks.make("apgd-ce", "linf")
    x = images(1)
    state = begin(attack, x, torch.tensor([0]), 0.1)
    sizes = []
    for _ in range(100):
        state.asked += 1
        sizes.append(float(state.size))
        state = attack.step(state, torch.tensor([[0.0, 0.0]]), torch.ones_like(x))
    halved = [k for k in range(1, 100) if sizes[k] < sizes[k - 1]]
    # sizes[k] is the step made after k others. No step ever raised the loss: every checkpoint halves, unless stalled
    # is all there is and the last one halved; "too few rises" needs no such mercy.
    assert halved == [23, 42, 58, 71, 81, 88, 94]
    assert sizes[0] == pytest.approx(0.2) and sizes[-1] == pytest.approx(0.2 / 2**7)


def test_a_loss_that_keeps_rising_keeps_its_step():
    attack, x = attacks.make("apgd-ce", "linf"), images(1)
    state = begin(attack, x, torch.tensor([0]), 0.1)
    for k in range(100):
        state.asked += 1
        state = attack.step(state, torch.tensor([[-0.1 * k, 0.0]]), torch.ones_like(x))
    assert float(state.size) == pytest.approx(0.2)


def test_apgd_is_no_weaker_than_pgd_with_as_many_steps():
    model, x = conv_net(), images(60)
    y = labels(model, x)
    for norm, eps in (("linf", 0.02), ("l2", 0.4)):
        broken = {}
        for name in ("pgd", "apgd-ce"):
            outcomes = run(model, attacks.make(name, norm, steps=50), x, y, [eps])
            broken[name] = sum(o.found for o in outcomes)
        assert 5 < broken["pgd"] < 55
        assert broken["apgd-ce"] >= broken["pgd"] - 1


def test_targets_are_the_likeliest_wrong_classes_in_turn_and_capped():
    model, x = Many(27, 5), grey(3)
    y = labels(model, x)
    seen = []

    class Watched(attacks.ATTACKS["apgd-t"]):
        def init(self, state, noise):
            seen.append(state.target.tolist())
            return super().init(state, noise)

    outcomes = run(model, Watched(norm="linf", steps=2, n_targets=9), x, y, [1e-6], slots=3)
    order = model(x).argsort(1, descending=True)[:, 1:]
    assert seen == order.T.tolist()
    # One forward to rank the classes, then 3 points for each of 4 targets.
    assert all(o.forwards == (1 + 4 * 3,) and o.gradients == (4 * 2,) for o in outcomes)


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [("apgd-dlr", 2, "needs 3 classes.* the model has 2"), ("apgd-t", 3, "needs 4 classes.* the model has 3")],
)
def test_losses_that_need_more_classes_are_refused(name, classes, message):
    with pytest.raises(ValueError, match=message):
        attacks.make(name, "linf", classes=classes)


def test_an_attack_with_targets_of_its_own_takes_none():
    for name in ("apgd-t", "autoattack"):
        with pytest.raises(ValueError, match="chooses its targets itself"):
            attacks.make(name, "linf", targeted=True)


# AutoAttack


def test_the_standard_ensemble_is_the_papers():
    for norm, restarts, targets in (("linf", 1, 9), ("l2", 1, 9), ("l1", 5, 5)):
        stages = attacks.make("autoattack", norm, classes=10).stages
        assert [stage.name for stage in stages] == ["apgd-ce", "apgd-t", "fab-t", "square"]
        assert [stage.steps for stage in stages[:3]] == [100, 100, 100]
        assert stages[3].queries == 5000
        assert [stage.restarts for stage in stages] == [restarts, 1, 1, 1]
        assert [stage.targets for stage in stages] == [0, targets, 9, 0]


@pytest.mark.parametrize(
    ("classes", "stages", "left_out"),
    [
        (4, ["apgd-ce", "apgd-t", "fab-t", "square"], ""),
        (3, ["apgd-ce", "apgd-dlr", "fab-t", "square"], "gives way"),
        (2, ["apgd-ce", "fab-t", "square"], "left out"),
    ],
)
def test_few_classes(classes, stages, left_out):
    ensemble = attacks.make("autoattack", "linf", classes=classes)
    assert [stage.name for stage in ensemble.stages] == stages
    assert left_out in " ".join(ensemble.left_out) and bool(ensemble.left_out) == bool(left_out)


def test_later_stages_see_only_what_stands_on_the_eps_where_it_stands():
    model, x = conv_net(), images(40)
    y = labels(model, x)
    eps = [0.004, 0.01, 0.8]
    first, second = UniformNoise(norm="linf", restarts=5), PGD(norm="linf", steps=5)
    ensemble = autoattack.Ensemble(name="two", norm="linf", stages=(first, second))
    alone = run(model, first, x, y, eps)
    both = run(model, ensemble, x, y, eps)
    for one, two in zip(alone, both, strict=True):
        spent = [b - a for a, b in zip(one.forwards, two.forwards, strict=True)]
        broken = 3 if one.rung is None else one.rung
        assert all(n == 0 for n in spent[broken:]) and all(n > 0 for n in spent[: min(broken, 1)])
        assert two.component == ("noise" if two.rung == one.rung and one.found else "pgd")
        assert two.rung is None or one.rung is None or two.rung <= one.rung
    assert {"noise", "pgd"} == {o.component for o in both if o.found}
    worst = [min(o.rung for o in pair if o.found) if any(o.found for o in pair) else None
             for pair in zip(alone, run(model, second, x, y, eps), strict=True)]  # fmt: skip
    assert [o.rung for o in both] == worst


# What the engine does for them


def test_attacks_on_the_least_distance_keep_their_nearest_point():
    class Walk(attacks.Attack):
        """Asks about x + 0.5, + 0.2, + 0.4, + 0.1 in turn."""

        name, source, norms, budget, queries = "walk", "", ("linf",), "minimal", 4
        path = (0.5, 0.2, 0.4, 0.1)

        def init(self, state, noise):
            assert isinstance(state, MinimalState)
            return self._ask(state, 0)

        def loss(self, logits, state):
            return logits[:, 0]

        def step(self, state, logits, grad):
            return self._ask(state, int(state.asked[0]))

        def _ask(self, state, k):
            state.query = state.x + self.path[k]
            return state

    def beyond(limit):
        return lambda x: torch.stack([limit - x.flatten(1).amax(1), x.flatten(1).amax(1) - limit], 1)

    x, y = torch.zeros(1, 1, 2, 2), torch.tensor([0])
    for limit, distance, rung in ((0.15, 0.2, 1), (0.3, 0.4, None), (0.45, 0.5, None)):
        (outcome,) = run(beyond(limit), Walk(norm="linf"), x, y, [0.1, 0.3])
        assert outcome.found and outcome.rung == rung
        assert float(outcome.x_adv.max()) == pytest.approx(distance)
        assert (outcome.forwards, outcome.gradients) == ((4, 0), (3, 0))
    (outcome,) = run(beyond(0.9), Walk(norm="linf"), x, y, [0.1, 0.3])
    assert not outcome.found and outcome.rung is None and torch.equal(outcome.x_adv, x[0])
    soon = list(engine.run(beyond(0.15), Walk(norm="linf"), tasks(x, y), [0.1, 0.3], slots=1, seed=0, enough=0.3))
    assert soon[0].forwards == (2, 0)
    # A point on the sphere of radius eps is inside, though 0.2 is a little more in float32.
    (outcome,) = engine.run(beyond(0.15), Walk(norm="linf"), tasks(x, y), [0.2], slots=1, seed=0, enough=0.2)
    assert outcome.forwards == (2,) and outcome.rung == 0


def test_a_random_models_verdict_is_the_vote_and_its_gradient_the_mean():
    class Dice(nn.Module):
        """Errs on one call in three; its gradient is 1, 2, 3 in turn."""

        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            score = -1.0 if self.calls % 3 == 0 else 1.0
            total = x.flatten(1).sum(1)
            return torch.stack([score + 0 * total, (total - total.detach()) * (1 + (self.calls - 1) % 3)], 1)

    seen = []

    class Watch(FGSM):
        def loss(self, logits, state):
            return logits[:, 1]

        def step(self, state, logits, grad):
            seen.append(float(grad.mean()))
            return super().step(state, logits, grad)

    x, y = images(1), torch.tensor([0])
    (lucky,) = run(Dice(), PGD(norm="linf", steps=3), x, y, [0.1])
    assert lucky.found  # a single draw errs sooner or later
    (sober,) = run(Dice(), Watch(norm="linf"), x, y, [0.1], draws=3)
    assert not sober.found and seen == [2.0]
    assert (sober.forwards, sober.gradients) == ((6,), (3,))


def test_outcomes_are_in_the_ladders_terms():
    model = Linear(27)
    x = grey(5)
    for outcome in run(model, attacks.make("pgd", "linf", steps=5), x, labels(model, x), [1e-6, 0.3]):
        assert isinstance(outcome, Outcome) and outcome.found and outcome.rung == 1


# Transfer


def test_transfer_judges_the_last_point_of_a_run_on_the_surrogate():
    model, surrogate, x = conv_net(seed=0), conv_net(seed=0), images(30)
    y = labels(model, x)
    transfer = attacks.make("transfer", "linf", surrogate=surrogate, steps=6)
    mifgsm = attacks.make("mi-fgsm", "linf", steps=6)
    *_, last = queries(mifgsm, model, x, y, 0.01)
    for outcome, point, wrong in zip(run(model, transfer, x, y, [0.01]), last, labels(model, last) != y, strict=True):
        torch.testing.assert_close(outcome.x_adv, point)
        assert outcome.found == bool(wrong)
        assert (outcome.forwards, outcome.gradients) == ((1,), (0,))
    other = attacks.make("transfer", "linf", surrogate=conv_net(seed=9), steps=6)
    eps = [0.01, 0.05]
    broken = [sum(o.found for o in run(model, attack, x, y, eps)) for attack in (other, transfer, mifgsm)]
    assert broken[0] < broken[1] <= broken[2] + 1


@pytest.mark.parametrize("name", ["transfer", "pgd", "apgd-t", "noise", "foolbox:LinfPGD"])
def test_every_attack_begins_on_the_rung_of_the_task(name):
    model, x = conv_net(), images(3)
    attack = attacks.make(name, "linf", surrogate=conv_net(seed=9))
    begun = [replace(task, first=k) for k, task in enumerate(tasks(x, labels(model, x)))]
    outcomes = list(attacks.run(model, attack, begun, [1e-6, 2e-6, 3e-6], slots=4, seed=0))
    asked = {outcome.position: [count > 0 for count in outcome.forwards] for outcome in outcomes}
    assert asked == {first: [rung >= first for rung in range(3)] for first in range(3)}


def test_an_ensemble_is_done_with_a_sample_that_breaks_at_the_rung_it_began_on():
    """The harness begins there what a random model refuted at the smaller eps; nobody asks about those again."""
    lean = torch.tensor([1e-6, -1e-6])  # so that a step moves
    always = lambda x: torch.tensor([0.0, 1.0]) + lean * x.flatten(1).sum(1, keepdim=True)  # noqa: E731
    stages = (FGSM(norm="linf"), UniformNoise(norm="linf"))
    ensemble = autoattack.Ensemble(name="both", norm="linf", stages=stages)
    first, second = tasks(images(2), torch.zeros(2, dtype=int))
    begun = [replace(first, first=1), replace(second, first=2)]
    outcomes = sorted(ensemble.run(always, begun, [0.1, 0.2, 0.3], slots=4, seed=0), key=lambda o: o.position)
    assert [(o.rung, o.component) for o in outcomes] == [(1, "fgsm"), (2, "fgsm")]
    assert [o.forwards for o in outcomes] == [(0, 2, 0), (0, 0, 2)]
