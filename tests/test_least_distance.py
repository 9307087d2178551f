"""Attacks on the least distance beside the optimum on a linear network, with the box in the way."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

import attacks
from attacks import engine
from attacks.norms import NORMS
from toys import Linear, images, tasks

# How far above the optimum they may end. FMN in l1 comes within a tenth of it only.
ABOVE = {("fmn", "linf"): 1.01, ("fmn", "l2"): 1.01, ("ddn", "l2"): 1.01, ("fmn", "l1"): 1.1}


def distances(model, name: str, norm: str, x: Tensor, y: Tensor, slots: int = 64) -> Tensor:
    """(B,) of what the attack finds; infinite where it finds nothing."""
    found = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for outcome in engine.run(model, attacks.make(name, norm), tasks(x, y), [1.0], slots=slots, seed=0):
        if outcome.found:
            found[outcome.position] = NORMS[norm].distance(
                (outcome.x_adv.double() - x[outcome.position].double())[None]
            )
    return found


def optimum(norm: str, weight: Tensor, x: Tensor, score: float) -> float:
    """The least change of x inside the box that brings the score to zero."""
    need, w = abs(score), weight.abs().numpy()
    room = torch.where((weight > 0) ^ (score > 0), 1 - x, x).numpy()
    if norm == "linf":
        return brentq(lambda r: (w * np.minimum(r, room)).sum() - need, 0, 1, xtol=1e-12)
    if norm == "l2":  # in proportion to the weights, as far as the box allows
        factor = brentq(lambda c: (w * np.minimum(c * w, room)).sum() - need, 0, 1 / w.min(), xtol=1e-12)
        return float(np.linalg.norm(np.minimum(factor * w, room)))
    if norm == "l0":
        return float(1 + np.searchsorted(np.sort(w * room)[::-1].cumsum(), need))
    order = np.argsort(-w)  # l1: the heaviest values first, each as far as the box allows
    before = (w * room)[order].cumsum() - (w * room)[order]
    return float(np.minimum(room[order], (need - before).clip(0) / w[order]).sum())


@pytest.mark.parametrize(("name", "norm"), [*ABOVE, ("fmn", "l0"), ("sigma-zero", "l0")])
def test_linear_networks_break_at_the_closed_form(name, norm):
    model, x = Linear(48, seed=3), images(24, (3, 4, 4), seed=5)
    y = model(x).argmax(1)
    with torch.no_grad():
        scores = model.score(x).double()
        least = [optimum(norm, model.weight.double(), x[k].flatten().double(), float(scores[k])) for k in range(24)]
    found = distances(model, name, norm, x, y)
    if norm == "l0":
        assert found.tolist() == least and max(least) > 1
    else:
        ratio = found / torch.tensor(least)
        assert float(ratio.min()) > 1 - 1e-4 and float(ratio.max()) < ABOVE[name, norm]


@pytest.mark.parametrize(("name", "norm"), [("fmn", "linf"), ("ddn", "l2"), ("sigma-zero", "l0")])
def test_company_changes_nothing(name, norm):
    model, x = Linear(48, seed=3), images(20, (3, 4, 4), seed=5)
    y = model(x).argmax(1)
    together, apart = (distances(model, name, norm, x, y, slots) for slots in (20, 3))
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
