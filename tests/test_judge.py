"""The judge: what is claimed is verified, inside the ball and the box, as it is and as an 8-bit image."""

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attacks
import robust
import robust.api
from attacks.fgsm import FGSM
from attacks.norms import NORMS, per_slot
from attacks.pgd import PGD
from robust import judge
from robust.errors import InputError
from robust.judge import round_to_8bit, within
from toys import Linear, Outputs, images


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_success_stands_up_to_an_independent_check(model, data, norm):
    x, y = data
    eps = [0.01, 0.05] if norm == "linf" else [0.1, 0.6]
    run = robust.run(model, data, attacks=["pgd", "fgsm"], norm=norm, eps=eps, steps=8, save_adversarials=True)
    samples = run.samples.set_index(["sample_id", "attack", "eps"])
    saved = list(run.store.adversarials())
    assert len(saved) > 20
    for clean, attack, smallest, x_clean, x_adv in saved:
        k = int(clean.sample_id)
        assert np.array_equal(x_clean, x[k].numpy())
        logits = model(torch.tensor(x_adv)[None])
        delta = x_adv.astype(np.float64) - x_clean
        linf, l2 = np.abs(delta).max(), np.sqrt((delta**2).sum())
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        assert smallest == next(radius for radius in eps if samples.success[clean.sample_id, attack, radius])
        for radius in eps:
            row = samples.loc[(clean.sample_id, attack, radius)]
            assert row.success == within(linf if norm == "linf" else l2, radius, norm, x_adv.size)
            if row.success:
                assert row.adv_pred == logits.argmax() != y[k]
                assert row.adv_confidence == pytest.approx(float(logits.softmax(1).max().detach()), abs=1e-5)
                assert (row.distance_linf, row.distance_l2) == pytest.approx((linf, l2))
    assert samples.success.groupby(["sample_id", "attack"]).any().sum() == len(saved)


def test_what_a_search_for_the_least_distance_finds_lies_within_eps():
    """Exactly, however small: it was not projected onto eps, and rounded beyond it."""
    model, x = Linear(27), images(80, (3, 3, 3), seed=4) / 2 + 0.25
    y = model(x).argmax(1)
    least = model.distance(x, "linf").sort().values
    tiny = 0.5 * float(least[0] + least[1])  # one image breaks, by an eps as small as they come
    scaled = Outputs(lambda x: model((x - 0.5) * 1e4 + 0.5))
    x = (x - 0.5) / 1e4 + 0.5
    for factor in (0.999, 1.001):
        eps = factor * tiny / 1e4
        samples = robust.run(scaled, (x, y), attacks=["fmn"], eps=[eps]).samples
        assert 0 < samples.success.sum() < 3
        assert (samples.distance_linf[samples.success] <= eps * (1 + 1e-6)).all()


def test_a_model_that_gives_no_number_in_the_ball_is_told_with_the_attack():
    """Also where it is at the image in 8 bits, which no attack has asked about."""
    model = Linear(27)

    def sometimes(x):
        logits = model(x)
        levels = (x * 255 - (x * 255).round()).abs().flatten(1).amax(1)
        saved = (levels < 1e-4) & (x.flatten(1).amax(1) != 0.3)
        return torch.where(saved[:, None], torch.nan, logits)

    x = 0.3 + 0.01 * images(6, (3, 3, 3))
    x[:, 0, 0, 0] = 0.3
    with pytest.raises(InputError, match=r"at a point that fmn found, .*NaN"):
        robust.run(Outputs(sometimes), (x, model(x).argmax(1)), attacks=["fmn"], eps=[0.2, 0.5])


def test_the_unchanged_image_is_no_adversarial_whatever_chance_says_of_it():
    class Rounds(nn.Module):
        """Random and without a gradient: an attack that finds nothing shows the image itself."""

        def forward(self, x):
            z = ((x * 2).round() / 2 + 0 * x).flatten(1) @ weight
            return z + 0.5 * torch.randn_like(z)

    weight = torch.randn(432, 3, generator=torch.Generator().manual_seed(0)) / 8
    x = images(60)
    y = (((x * 2).round() / 2).flatten(1) @ weight).argmax(1)
    attacks = ["fab-t", "foolbox:L2DeepFoolAttack", "pgd", "fgsm"]
    run = robust.run(Rounds(), (x, y), attacks=attacks, norm="l2", eps=1e-3, steps=3, random_start=False)
    assert 0 < run.summary.clean_accuracy.iloc[0] < 1
    assert not run.samples.success.any() and (run.summary.robust_accuracy == run.summary.clean_accuracy).all()


def test_nor_is_it_one_that_survives_as_an_image(model):
    """The only 8-bit image within eps is the image itself."""

    def random(x):
        logits = model(x)
        return logits + logits.std() * torch.randn_like(logits)

    x = (images(60) * 255).round() / 255
    run = robust.run(Outputs(random), (x, model(x).argmax(1)), attacks="noise", eps=0.4 / 255, eot=3)
    right = run.samples.clean_pred == run.samples.label
    assert run.samples.success.sum() > 10 and (run.samples.robust_8bit == right).all()


def test_a_search_for_the_least_distance_counts_within_eps_only_what_lies_within_it():
    """A projection onto l1 may be rounded in each of 150,528 values; distances that were found are not."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 2, bias=False))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].weight[0, :50] = net[1].weight[1, 50:100] = 1
    x = torch.full((3, 3, 224, 224), 0.5)
    x.view(3, -1)[:, 0] += torch.tensor([0.002, 0.003, 0.004])
    run = robust.run(net, (x, net(x).argmax(1)), attacks=["fmn"], norm="l1", eps=[0.001, 0.01], steps=20)
    found = run.samples[run.samples.success]
    assert set(found.eps) == {0.01} and len(found) == 3
    assert (found.distance_l1 <= found.eps).all()


def test_an_attack_that_leaves_the_ball_fails_loudly(model, data, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Cheat(PGD):
        def init(self, state, noise):
            return super().init(replace(state, eps=1.1 * state.eps), noise)

    monkeypatch.setitem(attacks.ATTACKS, "pgd", Cheat)
    with pytest.raises(RuntimeError, match=r"pgd left the ball or the box on sample .* this is a bug"):
        robust.run(model, data, attacks=["pgd"], eps=[0.05], steps=4)


# 8-bit


def test_a_change_of_less_than_half_a_level_is_lost_in_8_bits():
    model = Linear(27)
    x = (torch.randint(126, 130, (30, 3, 3, 3), generator=torch.Generator().manual_seed(0)) / 255).float()
    y = model(x).argmax(1)
    eps = [0.4 / 255, 30 / 255]
    samples = robust.run(model, (x, y), attacks=["fgsm"], eps=eps).samples
    small, large = samples[samples.eps == eps[0]], samples[samples.eps == eps[1]]
    assert 0 < small.success.sum() < 30
    assert small.robust_8bit.all()
    # At 30 levels every one is broken, and the break survives, those first found at 0.4 levels included.
    assert large.success.all() and not large.robust_8bit.any()


@settings(max_examples=50, deadline=None)
@given(
    norm=st.sampled_from(sorted(NORMS)),
    levels=st.floats(0.1, 40),
    seed=st.integers(0, 999),
    on_grid=st.booleans(),
)
def test_rounding_to_8_bits_lands_on_the_grid_and_in_the_ball(norm, levels, seed, on_grid):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 2, 4, 4, generator=g)
    x = (x * 255).round() / 255 if on_grid else x
    eps = levels / 255 * (1 if norm == "linf" else 5)
    delta = NORMS[norm].project_(torch.randn(x.shape, generator=g) * eps, torch.full((3,), eps))
    rounded = round_to_8bit(x, (x + delta).clamp(0, 1), eps, norm)
    # In l1 and l0, where few values change, the others stay as they are.
    lands = torch.ones_like(x, dtype=torch.bool) if norm in ("linf", "l2") else (x + delta).clamp(0, 1) != x
    torch.testing.assert_close(rounded[lands] * 255, (rounded[lands] * 255).round(), atol=1e-4, rtol=0)
    assert torch.equal(rounded[~lands], x[~lands])
    assert float(rounded.min()) >= 0 and float(rounded.max()) <= 1
    if on_grid:
        assert bool(within(NORMS[norm].distance(rounded - x), eps, norm, 32).all())
    # The nearest levels, where they lie inside.
    nearest = torch.where(lands, ((x + delta).clamp(0, 1) * 255).round() / 255, x)
    inside = NORMS[norm].distance(nearest - x) < eps * (1 - 1e-6)
    torch.testing.assert_close(rounded[inside], nearest[inside], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 10.3 / 255), ("l2", 0.7)])
def test_an_adversarial_that_can_be_saved_as_an_image_is_that_image(model, norm, eps, monkeypatch):
    x = (images(60) * 255).round() / 255
    ask, asked = judge.Judge._ask, []
    monkeypatch.setattr(judge.Judge, "_ask", lambda self, x: asked.append(len(x)) or ask(self, x))
    run = robust.run(model, (x, model(x).argmax(1)), attacks="pgd", norm=norm, eps=eps, save_adversarials=True)
    samples, found, lost = run.samples.set_index("sample_id"), 0, 0
    for clean, *_, x_adv in run.store.adversarials():
        saved = np.allclose(x_adv * 255, (x_adv * 255).round(), atol=1e-4)
        assert saved == (not samples.robust_8bit[clean.sample_id])
        found, lost = found + 1, lost + (not saved)
    assert found > 20 and 0 < lost < found
    assert asked == [60, 60, lost]  # clean, every claim, and what is lost as an image once more


@pytest.mark.parametrize("name", ["foolbox:L2DeepFoolAttack", "fmn"])
def test_what_a_search_for_the_least_distance_found_is_not_rounded(model, name):
    x = (images(20) * 255).round() / 255
    data = x, model(x).argmax(1)
    run = robust.run(model, data, attacks=name, norm="l2", eps=1.0, steps=30, save_adversarials=True)
    found = [x_adv for *_, x_adv in run.store.adversarials()]
    assert len(found) > 10
    assert not any(np.allclose(x_adv * 255, (x_adv * 255).round(), atol=1e-3) for x_adv in found)


@pytest.mark.parametrize("name", ["ddn", "foolbox:L2DeepFoolAttack"])
def test_a_nearest_adversarial_is_taken_out_to_eps_before_it_is_rounded(model, name):
    """At the boundary, where it lies, rounding decides; whether an image within eps fools the model is another
    question, and has nothing to do with which smaller eps were asked about."""
    x = (images(40) * 255).round() / 255
    data = x, model(x).argmax(1)
    alone, farther = (
        robust.run(model, data, attacks=name, norm="l2", eps=eps, steps=30).samples for eps in ([1.5], [0.2, 0.4, 1.5])
    )
    at = farther[farther.eps == 1.5]
    lost = (alone.success & alone.robust_8bit).sum()
    assert alone.success.sum() > 30 and lost == (at.success & at.robust_8bit).sum() == 0


def test_what_is_inside_only_when_rounded_has_left_the_ball_all_the_same(model, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Cheat(FGSM):
        def init(self, state, noise):
            return super().init(replace(state, eps=state.eps + 0.4 / 255), noise)

    x = (images(40) * 255).round() / 255
    y, eps = model(x).argmax(1), 20 / 255
    samples = robust.run(model, (x, y), attacks="fgsm", eps=eps).samples
    saved = torch.tensor(~samples.robust_8bit.to_numpy())
    assert saved.sum() > 5
    monkeypatch.setitem(attacks.ATTACKS, "fgsm", Cheat)
    with pytest.raises(RuntimeError, match=r"fgsm left the ball or the box on sample .* this is a bug"):
        robust.run(model, (x[saved], y[saved]), attacks="fgsm", eps=eps)


def test_rounding_keeps_what_is_already_8_bit():
    x = torch.arange(256).view(1, 1, 16, 16) / 255
    x_adv = ((x * 255 + 3).clamp(0, 255)) / 255
    assert torch.equal(round_to_8bit(x, x_adv, 3 / 255, "linf"), x_adv)
    for norm in ("l2", "l1", "l0"):
        size = float(NORMS[norm].distance((x_adv - x).double()))
        below = size * (1 - 1e-7) if norm != "l0" else size  # as near as a verdict tells
        torch.testing.assert_close(round_to_8bit(x, x_adv, below, norm), x_adv, atol=1e-6, rtol=0)
    # What leaves the ball when rounded keeps what lies on a level, and not the level below.
    mixed = torch.cat([x_adv[..., :8], x[..., 8:] + 3.4 / 255], -1)
    rounded = round_to_8bit(x, mixed, float(NORMS["l2"].distance(torch.tensor([[3.0 / 255] * 256]))) * 0.9, "l2")
    torch.testing.assert_close(rounded[..., :8], x_adv[..., :8], atol=1e-6, rtol=0)
    assert per_slot(torch.ones(2), torch.zeros(2, 3, 4, 4)).shape == (2, 1, 1, 1)


# How it asks


def test_logits_in_float64_are_not_rounded_before_they_are_compared(model, data):
    far = copy.deepcopy(model).double()
    run = robust.run(Outputs(lambda x: far(x.double()) - 1e6), data, attacks=["fgsm"], eps=0.02)
    assert run.samples.success.equals(robust.run(model, data, attacks=["fgsm"], eps=0.02).samples.success)


def test_a_point_where_the_model_gives_no_number_is_named(model, data):
    x, _ = data
    holed = Outputs(lambda x: model(x) / (x.amax((1, 2, 3)) < 1)[:, None])
    dark = 0.9 * x
    with pytest.raises(InputError, match="at a point that noise found, the model's output holds NaN or infinity"):
        robust.run(holed, (dark, model(dark).argmax(1)), attacks=["noise"], eps=1.0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_of_usual_size_stay_in_the_ball(norm):
    """Sums over 150,528 squares in float32 are off by more than the tolerance."""

    class Mean(nn.Module):
        def forward(self, x):
            score = (x - 0.5).flatten(1).sum(1) / 100
            return torch.stack([score, -score], 1)

    x = 0.25 + 0.5 * torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    y = Mean()(x).argmax(1)
    eps = [1.0, 3.0, 30.0] if norm == "l2" else [4 / 255]
    run = robust.run(Mean(), (x, y), attacks=["fgsm", "pgd", "noise"], norm=norm, eps=eps, steps=3)
    assert len(run.samples) == 4 * 3 * len(eps)


class Lies(nn.Module):
    """Notes how the images lie in memory that it is given without a gradient; `views` takes them in one way only."""

    def __init__(self, views=False):
        super().__init__()
        self.conv, self.linear, self.views, self.seen = nn.Conv2d(3, 4, 3), nn.Linear(144, 5), views, []

    def forward(self, x):
        if not x.requires_grad and len(x) == 10:
            self.seen.append(x.is_contiguous(memory_format=torch.channels_last))
        inner = self.conv(x)
        return self.linear(inner.view(len(x), -1) if self.views else inner.flatten(1))


@pytest.mark.parametrize("views", [False, True])
def test_the_model_judges_images_with_the_channels_last_if_it_takes_them(views):
    torch.manual_seed(0)
    net, x = Lies(views), images(20, (3, 8, 8))
    with torch.no_grad():
        y = net(x).argmax(1)
    net.seen.clear()
    run = robust.run(net, (x, y), attacks=["pgd"], eps=0.3, steps=3, batch_size=10)
    # Two full batches of clean images and two of points that the attack found.
    assert len(net.seen) >= 4 and net.seen == [not views] * len(net.seen)
    assert run.samples.success.any() and run.samples.clean_pred.tolist() == y.tolist()
