"""The engine: exact counts, every point judged, verdicts that do not depend on company."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attacks
from attacks import engine, evaluation
from attacks.evaluation import even, padded
from toys import Linear, Outputs, conv_net, images, tasks


class Recorder(nn.Module):
    """A model that remembers how many rows it saw in each call and how many gradients it passed back."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.calls, self.gradients = model, [], 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        if x.requires_grad:
            x.register_hook(self._count)
        return self.model(x)

    def _count(self, grad: Tensor) -> None:
        self.gradients += len(grad)


class Script(nn.Module):
    """Errs (class 1 instead of 0) only on its calls whose number is in `wrong`, whatever the image."""

    def __init__(self, wrong: set[int]):
        super().__init__()
        self.wrong, self.call = wrong, -1

    def forward(self, x: Tensor) -> Tensor:
        self.call += 1
        right = -1.0 if self.call in self.wrong else 1.0
        return torch.stack([right + 0 * x.flatten(1).sum(1), x.flatten(1).mean(1) * 0], 1)


def run(model, attack, x, y, eps, slots=64, seed=0):
    outcomes = list(engine.run(model, attack, tasks(x, y), eps, slots=slots, seed=seed))
    assert len(outcomes) == len(x)
    return sorted(outcomes, key=lambda o: o.position)


def robust_tenth(x: Tensor) -> Tensor:
    """Right on everything: nothing can be broken."""
    return torch.stack([1 + x.flatten(1).mean(1), x.flatten(1).mean(1) * 0], 1)


@pytest.mark.parametrize(("name", "forwards", "gradients"), [("fgsm", 2, 1), ("pgd", 8, 7), ("noise", 1, 0)])
def test_cost_of_a_sample_that_stands(name, forwards, gradients):
    model = Recorder(Outputs(robust_tenth))
    attack = attacks.make(name, "linf", steps=7)
    x = images(10)
    for o in run(model, attack, x, torch.zeros(10, dtype=int), [0.1, 0.2], slots=4):
        assert o.rung is None and o.restart is None
        assert o.forwards == (forwards, forwards)
        assert o.gradients == (gradients, gradients)
    assert sum(model.calls) == 10 * 2 * forwards
    assert max(model.calls) <= 4


def test_counts_are_those_the_model_saw(monkeypatch):
    monkeypatch.setattr(evaluation, "SMALL", 0)  # without copies, which are not counted
    model, x = Recorder(conv_net()), images(50)
    y = model.model(x).argmax(1)
    outcomes = run(model, attacks.make("pgd", "linf", steps=6, restarts=2), x, y, [0.004, 0.02, 0.1], slots=8)
    assert sum(sum(o.forwards) for o in outcomes) == sum(model.calls)
    # The backward pass is shared by the batch: it computes some gradients that nobody goes on from.
    used = sum(sum(o.gradients) for o in outcomes)
    assert used <= model.gradients <= sum(model.calls)
    assert {o.rung for o in outcomes} >= {0, 1, 2}


def test_the_batch_stays_full_while_samples_wait():
    model, x = Recorder(conv_net()), images(60)
    y = model.model(x).argmax(1)
    run(model, attacks.make("pgd", "linf", steps=9), x, y, [0.02], slots=8)
    assert set(model.calls[:20]) == {8}
    assert max(model.calls) == 8


@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_every_point_is_judged_the_first_and_the_last_included(call):
    (outcome,) = run(Script({call}), attacks.make("pgd", "linf", steps=3), images(1), torch.tensor([0]), [0.1])
    assert outcome.rung == 0
    assert outcome.forwards == (call + 1,)
    assert outcome.gradients == (call,)


def test_restarts_run_only_on_what_stands():
    attack = attacks.make("pgd", "linf", steps=3, restarts=3)
    (outcome,) = run(Script({5}), attack, images(1), torch.tensor([0]), [0.1, 0.2], slots=1)
    assert (outcome.rung, outcome.restart) == (0, 1)
    assert outcome.forwards == (6, 0)  # 4 of the first start, 2 of the second
    (outcome,) = run(Script({12}), attack, images(1), torch.tensor([0]), [0.1, 0.2], slots=1)
    assert (outcome.rung, outcome.restart) == (1, 0)
    assert outcome.forwards == (12, 1)
    (outcome,) = run(Script(set()), attack, images(1), torch.tensor([0]), [0.1, 0.2], slots=1)
    assert outcome.rung is None and outcome.forwards == (12, 12)


def test_restarts_begin_elsewhere():
    seen = []
    model = lambda x: (seen.append(x.clone()), robust_tenth(x))[1]  # noqa: E731
    run(model, attacks.make("noise", "linf", restarts=3), images(2), torch.zeros(2, dtype=int), [0.1], slots=2)
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize(
    ("name", "norm", "options", "least", "most", "rungs"),
    [
        ("noise", "linf", {"restarts": 8}, 0.3, 0.5, 3),
        ("pgd", "linf", {"steps": 2, "restarts": 5}, 0.012, 0.045, 12),
        ("apgd-ce", "l2", {"steps": 2, "restarts": 4}, 0.2, 0.7, 6),
        ("apgd-t", "linf", {"steps": 2, "restarts": 2}, 0.012, 0.045, 12),
        ("square", "linf", {"queries": 30, "restarts": 4}, 0.04, 0.1, 3),
        ("fab-t", "l2", {"steps": 1, "restarts": 2}, 0.518, 0.518, 1),
        ("fmn", "l2", {"steps": 12, "restarts": 4}, 0.404, 0.404, 1),
    ],
)
def test_runs_begun_ahead_of_their_turn_change_nothing(name, norm, options, least, most, rungs):
    """The first run that breaks a sample counts, with those before it, not the one that breaks it soonest."""
    model, x = conv_net().double(), images(24, seed=3).double()
    y, attack = model(x).argmax(1), attacks.make(name, norm, classes=5, **options)
    eps = torch.linspace(least, most, rungs, dtype=torch.float64).tolist()
    enough = most if attack.budget == "minimal" else 0.0

    def outcomes(slots: int) -> tuple[list[attacks.Outcome], int]:
        recorder = Recorder(model)
        made = engine.run(recorder, attack, tasks(x, y), eps, slots=slots, seed=0, enough=enough)
        return sorted(made, key=lambda o: o.position), len(recorder.calls)

    one_by_one, calls = outcomes(1)
    # Some break in a later run, for which those begun beside it have to go on; some stand.
    assert any((o.restart or 0) > 0 for o in one_by_one) and any(o.rung is None for o in one_by_one)
    for slots in (200, 31):
        together, fewer = outcomes(slots)
        for one, other in zip(one_by_one, together, strict=True):
            assert (one.rung, one.restart, one.forwards) == (other.rung, other.restart, other.forwards)
            assert one.gradients == other.gradients
            torch.testing.assert_close(one.x_adv, other.x_adv, atol=1e-9, rtol=0)
        assert fewer < calls / 16


@pytest.mark.parametrize("name", ["fmn", "pgd"])
def test_a_gradient_that_is_no_number_in_places_shows_no_way_there(name):
    net, x = conv_net(), images(30, seed=3)
    x[:, :, 4, 4] = 0.5
    y = net(x).argmax(1)
    nowhere = Outputs(lambda x: net(x) + 0 * (x - 0.5).abs().sqrt().sum((1, 2, 3))[:, None])  # 0 * inf at 0.5
    broken = []
    for model in (net, nowhere):
        made = run(model, attacks.make(name, "linf", steps=20), x, y, [0.05], slots=30)
        broken.append(sum(outcome.rung is not None for outcome in made))
    assert broken[1] > 0.8 * broken[0] > 5


def test_runs_ahead_of_their_turn_take_the_slots_that_are_left_alone():
    attack = attacks.make("pgd", "linf", steps=4, restarts=8)
    model = Recorder(Outputs(robust_tenth))
    three, zeros = images(3), torch.zeros(3, dtype=int)
    run(model, attack, three, zeros, [0.1], slots=24)
    assert model.calls == [24] * 5  # all at once
    model.calls.clear()
    run(model, attack, three, zeros, [0.1], slots=8)
    assert model.calls == [8] * 15
    model.calls.clear()
    big = images(3, (3, 60, 60))  # a row costs as much as the other
    run(model, attack, big, zeros, [0.1], slots=24)
    assert model.calls == [3] * 40


@pytest.mark.parametrize("falls", [0, 1])
def test_runs_begun_ahead_end_as_soon_as_they_are_in_vain(falls):
    def errs(x: Tensor) -> Tensor:
        """In the first call, on one run of each of three samples."""
        logits = robust_tenth(x)
        if len(model.calls) == 1:
            rows = torch.arange(3 * falls, 3 * falls + 3)
            logits = logits.index_copy(0, rows, logits[rows].flip(1))
        return logits

    model, attack = Recorder(Outputs(errs)), attacks.make("pgd", "linf", steps=4, restarts=8)
    outcomes = run(model, attack, images(3), torch.zeros(3, dtype=int), [0.1], slots=12)
    assert all((o.restart, o.forwards) == (falls, (5 * falls + 1,)) for o in outcomes)
    # Where the second run of a sample fell its first goes on, and no other is begun.
    assert model.calls == [12, 4, 4, 4, 4][: 1 + 4 * falls]


def test_slots_that_wait_for_a_gradient_are_let_go_when_they_are_in_vain():
    model, x = conv_net().double(), images(30, seed=3).double()
    y, attack = model(x).argmax(1), attacks.make("fab-t", "l2", steps=4, restarts=2)

    def forwards(slots: int) -> list[tuple[int, ...]]:
        made = list(engine.run(model, attack, tasks(x, y), [0.7], slots=slots, seed=0, enough=0.7))
        assert len(made) == 30
        return [outcome.forwards for outcome in sorted(made, key=lambda o: o.position)]

    assert forwards(64) == forwards(1)


def test_nothing_of_a_random_network_is_asked_ahead():
    model = Recorder(Outputs(robust_tenth))
    for attack in (attacks.make("pgd", "linf", steps=4, restarts=3), attacks.make("square", "linf", queries=15)):
        model.calls.clear()
        list(engine.run(model, attack, tasks(images(2), torch.zeros(2)), [0.1], slots=40, seed=0, draws=2))
        assert model.calls == [2] * 30


def test_another_seed_is_another_start():
    x, y = images(4), torch.zeros(4, dtype=int)
    attack = attacks.make("noise", "linf")
    one, two = (run(robust_tenth, attack, x, y, [0.1], seed=seed) for seed in (0, 1))
    assert not torch.equal(one[0].x_adv, two[0].x_adv)


def test_an_adversarial_found_at_a_small_eps_costs_nothing_at_larger_ones():
    model = Linear(27)
    x = 0.5 + 0.02 * (images(20, (3, 3, 3)) - 0.5)
    y = model(x).argmax(1)
    smallest = 1.01 * float(model.distance(x, "linf").max())
    for o in run(model, attacks.make("pgd", "linf"), x, y, [smallest, 0.3, 0.4]):
        assert o.rung == 0 and o.forwards[1:] == (0, 0)


def test_global_random_state_is_untouched():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    run(conv_net(), attacks.make("pgd", "l2", steps=2), images(3), torch.zeros(3, dtype=int), [0.1])
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_batches_come_in_few_sizes_and_the_copies_in_them_count_for_nobody():
    linear = Linear(27)
    x = 0.5 + 0.02 * (images(100, (3, 3, 3)) - 0.5)
    y, farthest = linear(x).argmax(1), float(linear.distance(x, "linf").max())
    attack = attacks.make("pgd", "linf", steps=40, step_size=0.025)
    model = Recorder(linear)
    outcomes = run(model, attack, x, y, [1.1 * farthest], slots=100)
    few = {*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 100}
    assert set(model.calls) <= few and len(set(model.calls)) > 8
    counted = sum(sum(o.forwards) for o in outcomes)
    assert counted < sum(model.calls) < 1.25 * counted
    (alone,) = run(linear, attack, x[:1], y[:1], [1.1 * farthest])
    assert alone.forwards == outcomes[0].forwards


def test_no_tasks_no_outcomes():
    assert list(engine.run(robust_tenth, attacks.make("pgd", "linf"), [], [0.1], slots=4, seed=0)) == []


def test_slots_that_need_no_gradient_are_judged_by_forwards_alone():
    model = Recorder(conv_net())
    x = images(3)
    y = model(x).argmax(1)
    attack = attacks.make("fab-t", "linf", classes=5)
    outcomes = run(model, attack, x, y, [0.1], slots=1)
    assert model.gradients == sum(o.gradients[0] for o in outcomes) == 3 * 4 * 100
    assert sum(model.calls) - len(x) == sum(o.forwards[0] for o in outcomes) == 3 * (1 + 4 * (200 + 3))


@pytest.mark.parametrize("name", ["fab-t", "fmn"])
def test_the_image_itself_is_no_adversarial(name):
    """Whatever one draw of a random model says of it; the clean pass said that it is right."""
    wrong = lambda x: torch.stack([0 * x.flatten(1).sum(1), 1 + 0 * x.flatten(1).sum(1)], 1)  # noqa: E731
    x = images(1)
    (outcome,) = run(wrong, attacks.make(name, "linf", steps=5), x, torch.tensor([0]), [0.1])
    assert outcome.found == (name == "fmn") == (not torch.equal(outcome.x_adv, x[0]))  # fab-t has nowhere to go


def test_a_batch_that_stays_as_it_is_is_not_padded_for_long():
    model = Recorder(Outputs(robust_tenth))
    x = images(17)
    run(model, attacks.make("pgd", "linf", steps=30), x, torch.zeros(17, dtype=int), [0.1], slots=32)
    assert model.calls == [20] * engine.STEADY + [18] * (31 - engine.STEADY)


@pytest.mark.parametrize(("side", "small"), [(12, True), (64, False)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batches_come_in_few_sizes_of_small_images_in_even_ones(side, small, layout):
    x = images(70, (3, side, side)).contiguous(memory_format=layout)
    for slots in (1, 2, 7, 16, 70):
        for n in range(1, slots + 1):
            batch = padded(x[:n], slots)
            assert torch.equal(batch[:n], x[:n]) and torch.equal(batch[n:], x[: len(batch) - n])
            assert batch.is_contiguous(memory_format=layout)
            assert n <= len(batch) <= (slots + 1 if small and slots > 1 else slots)
            assert len(batch) % 2 == 0 or not small or slots == 1
            rows = even(slots, x[0].numel())
            assert slots - 1 <= rows <= slots and len(padded(x[: min(n, rows)], rows)) <= rows
    assert {len(padded(x[:n], 70)) for n in range(8, 65)} == {
        8,
        10,
        12,
        14,
        *range(16, 33, 4),
        *range(40, 65, 8),
    }
    # As many as one rests on another library's ways: in full copies, and what is left.
    few = padded(x[:5], 16, fewest=12)
    assert len(few) == (12 if small else 5) and few.is_contiguous(memory_format=layout)
    assert not small or torch.equal(few, x[[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]])


@pytest.mark.parametrize("name", ["pgd", "fmn"])
def test_an_attack_is_given_the_mean_of_the_draws(name, monkeypatch):
    attack, x, seen = attacks.make(name, "l2", steps=1), images(2), []
    calls = iter(range(1000))

    def model(query):
        score = query.flatten(1).sum(1) * float(next(calls))  # of gradient 0, 1, 2, ...
        return torch.stack([score.detach() * 0, score - score.detach() - 1], 1)

    step = type(attack).step
    monkeypatch.setattr(
        type(attack),
        "step",
        lambda self, state, logits, grad: seen.append(grad.clone()) or step(self, state, logits, grad),
    )
    monkeypatch.setattr(type(attack), "loss", lambda self, logits, state: logits[:, 1])
    list(engine.run(model, attack, tasks(x, torch.zeros(2, dtype=int)), [0.1], slots=2, seed=0, draws=3))
    assert [float(grad.mean()) for grad in seen] == [1.0]  # of 0, 1, 2


@pytest.mark.parametrize("name", ["fab-t", "fmn", "ddn", "sigma-zero"])
def test_an_attack_steers_by_the_verdict_that_the_engine_gives(name, monkeypatch):
    """Not by the class of the mean logits, which may be another than the vote of the draws."""
    norm = "l0" if name == "sigma-zero" else "l2"
    attack, net, x = attacks.make(name, norm, steps=12), conv_net(), images(2)
    model, asked = Recorder(net), []
    fools = type(attack).fools
    monkeypatch.setattr(type(attack), "fools", lambda self, pred, state: asked.append(1) or fools(self, pred, state))
    list(engine.run(model, attack, tasks(x, net(x).argmax(1)), [0.1], slots=2, seed=0, draws=3))
    choosing = 3 if attack.targets else 0  # evaluations that choose the targets
    assert len(model.calls) - choosing == 3 * len(asked) > 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_gradient_of_a_sum_through_another_precision(dtype):
    """One number seen many times, which nobody may write to."""
    x = images(6)
    linear = nn.Linear(3, 2).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
        linear.bias.copy_(torch.tensor([0.0, x.sum((2, 3))[:, 0].max() + 5]))

    def model(x):
        return linear(x.sum((2, 3)).to(dtype))

    attack = attacks.make("pgd", "linf", steps=4, random_start=False)
    for o in run(model, attack, x, torch.ones(6, dtype=int), [0.05], slots=4):
        delta = o.x_adv - x[o.position]
        # Class 1 falls where the first channel rises, and no other.
        assert (delta[0] >= 0).all() and delta[0].sum() > 0 and (delta[1:] == 0).all()
