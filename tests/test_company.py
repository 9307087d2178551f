"""What an attack does with a sample does not depend on the samples beside it: the arithmetic of its steps, to the bit.

Whole runs on real networks are in test_harness.py, what batches and layers do for it in test_engine.py and
test_models_prepare.py.
"""

import pytest
import torch
from torch import Tensor

import attacks
from attacks import engine
from attacks.attack import Attack, MinimalState
from attacks.square import SquareState
from toys import begin, images

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


@pytest.mark.parametrize(
    ("name", "norm"),
    [(name, norm) for name, kind in attacks.ATTACKS.items() if name != "transfer" for norm in kind.norms],
)
def test_a_step_on_a_sample_is_the_same_in_any_company(name, norm):
    attack = attacks.make(name, norm, classes=5, steps=STEPS, queries=2000)
    eps = {"linf": 0.1, "l2": 1.0, "l1": 8.0, "l0": 9.0}[norm]
    together = points(attack, eps, slice(0, B))
    for rows in (slice(0, 1), slice(3, 10), slice(12, 29)):
        apart = points(attack, eps, rows)
        assert all(torch.equal(one, all_[rows]) for one, all_ in zip(apart, together, strict=True))
