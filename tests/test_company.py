"""What an attack does with a sample does not depend on the samples beside it.

Whole runs on real networks, to the bit, are in test_harness.py; what batches and layers do for it in test_engine.py and
test_models_prepare.py.
"""

import pytest
import torch
from torch import Tensor

import attacks
from attacks import engine
from attacks.attack import Attack, MinimalState
from attacks.norms import NORMS
from attacks.square import SquareState
from toys import begin, conv_net, images, tasks

SHAPE = (3, 11, 7)  # no multiple of the values in a register, so that rows begin anywhere in one
B, STEPS = 29, 300


def points(attack: Attack, eps: float, rows: slice) -> list[Tensor]:
    """What is asked about these rows of B, each at another step of the attack and told the same in any company."""
    x, labels = images(B, SHAPE)[rows], (torch.arange(B) % 5)[rows]
    state = begin(attack, x, labels, eps, target=(labels + 1) % 5, first=rows.start)
    ahead = 11 * torch.arange(B)[rows] % STEPS
    state.asked += ahead
    if isinstance(state, SquareState):
        state.proposed += 6 * ahead  # over several sizes of windows
    asked = [state.query.clone()]
    for k in range(min(12, attack.queries - 1)):
        random = torch.Generator().manual_seed(k)
        logits, grad = (torch.randn(B, *shape, generator=random)[rows] for shape in ((5,), SHAPE))
        state.asked += 1
        state.fooled = attack.fools(logits.argmax(1), state)
        if isinstance(state, MinimalState):
            engine._keep_nearest(attack, state)
        state = attack.step(state, logits, grad if attack.needs_grad else None)
        asked.append(state.query.clone())
    return asked


# Within the first about a third of the images of a run can be broken, within the second two thirds.
EPS = {"linf": [0.02, 0.045], "l2": [0.28, 0.65], "l1": [1.55, 4.4], "l0": [2.0, 6.0]}
EVERY = pytest.mark.parametrize(
    ("name", "norm"),
    [(name, norm) for name, kind in attacks.ATTACKS.items() if name != "transfer" for norm in kind.norms],
)


@EVERY
def test_a_step_on_a_sample_is_the_same_in_any_company(name, norm):
    """To the bit."""
    attack = attacks.make(name, norm, classes=5, steps=STEPS, queries=2000)
    together = points(attack, EPS[norm][-1], slice(0, B))
    for rows in (slice(0, 1), slice(3, 10), slice(12, 29)):
        apart = points(attack, EPS[norm][-1], rows)
        assert all(torch.equal(one, each[rows]) for one, each in zip(apart, together, strict=True))


@EVERY
def test_a_run_is_the_same_whatever_its_slots_and_order(name, norm):
    """Where some slots are done early, so that those at different steps share the batch; up to rounding, which a search
    for the least distance, FAB too, makes more of.
    """
    model, x = conv_net(), images(9, seed=5)
    y, restarts = model(x).argmax(1), 2 if "restarts" in attacks.takes(name) else None
    attack = attacks.make(name, norm, classes=5, steps=12, queries=25, restarts=restarts)
    eps, enough = [radius * (3 if name == "square" else 1) for radius in EPS[norm]], 0.0

    def outcomes(slots: int, order: int) -> list[attacks.Outcome]:
        given = tasks(x, y)[::order]
        done = engine.run(model, attack, given, eps, slots=slots, seed=0, enough=enough)
        return sorted(done, key=lambda outcome: outcome.position)

    if attack.budget == "minimal":
        reached = torch.stack([outcome.x_adv for outcome in outcomes(9, 1)]) - x
        enough = 1.1 * float(NORMS[norm].distance(reached).median())
    together = outcomes(9, 1)
    # Some fall, early and late, and some stand; noise breaks hardly anything.
    assert len({(outcome.rung, outcome.forwards) for outcome in together}) > 2 or name == "noise"
    for slots, order in ((64, -1), (4, -1), (1, 1)):
        for one, other in zip(outcomes(slots, order), together, strict=True):
            counted = [(o.rung, o.restart, o.forwards, o.gradients) for o in (one, other)]
            assert counted[0] == counted[1]
            within = 1e-4 if attack.budget == "minimal" else 1e-5
            torch.testing.assert_close(one.x_adv, other.x_adv, atol=within, rtol=0)
