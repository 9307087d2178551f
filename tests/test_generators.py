"""The global generators of random numbers: what a run may do to them, which is nothing that lasts."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import robust
from attacks.generators import put_back, seed_all, seeded, states
from toys import conv_net, images


@pytest.fixture
def gpus(monkeypatch):
    """The generators of two GPUs, or what stands in for them."""
    stand_ins = (torch.Generator(), torch.Generator())
    monkeypatch.setattr(torch.cuda, "default_generators", stand_ins)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    return stand_ins


DRAWS = {
    "torch": lambda gpus: torch.rand(1),
    "a GPU": lambda gpus: torch.rand(1, generator=gpus[1]),
    "numpy": lambda gpus: np.random.rand(),
    "numpy, half a pair": lambda gpus: np.random.randn(),
    "python": lambda gpus: random.random(),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_every_generator_is_seeded_and_put_back(gpus, draw):
    before = states()
    with seeded(5):
        assert states() != before
        begun, first = states(), draw(gpus)
        assert states() != begun
    assert states() == before
    with put_back():
        seed_all(5)
        assert draw(gpus) == first
        seed_all(6)
        assert draw(gpus) != first
    assert states() == before


def test_seeds_have_64_bits():
    """Of which numpy's generator and torch's for the CPU take the lower half."""
    drawn = []
    for seed in (0, 2**32, 2**64 - 1):
        with seeded(seed):
            drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
    torchs, pythons, numpys = zip(*drawn, strict=True)
    assert [len(set(numbers)) for numbers in (torchs, numpys, pythons)] == [2, 2, 3]


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        return self.net(x + 0.1 * torch.randn_like(x))


@pytest.mark.parametrize("in_use", [True, False])
def test_a_run_leaves_every_generator_as_it_was_and_later_gpus_alone(gpus, monkeypatch, in_use):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    model, surrogate, x = Noisy(), conv_net(seed=1), images(4)
    y = model.net(x).argmax(1)
    # What torch offers seeds GPUs that are used only later, or starts them to see how they were.
    for module, name in ((torch, "manual_seed"), (torch.random, "fork_rng"), (torch.cuda, "manual_seed_all")):
        monkeypatch.setattr(module, name, lambda *args, name=name, **kwargs: pytest.fail(f"{name} was called"))
    before = states(), [each.get_state().tolist() for each in gpus]
    run = robust.run(
        model, [(x, y)], attacks=["pgd", "transfer", "foolbox:L2AdditiveGaussianNoiseAttack"], norm="l2", eps=0.1,
        steps=2, surrogate=surrogate,
    )  # fmt: skip
    assert run.samples.forwards.sum() > 0
    assert (states(), [each.get_state().tolist() for each in gpus]) == before
