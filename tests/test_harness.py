"""The harness: what it claims is verified, what it counts is exact, and nothing of the user's is changed."""

import copy
import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import attacks
import robust
import robust.api
from attacks.fgsm import FGSM
from attacks.norms import NORMS, per_slot
from attacks.pgd import PGD
from robust import harness, judge
from robust.diagnostics import _comparisons
from robust.errors import InputError
from robust.judge import TOLERANCE, round_to_8bit, within
from robust.models.model import fingerprint
from robust.models.prepare import fast_twin
from robust.store import SAMPLE_COLUMNS
from toys import Linear, conv_net, images


@pytest.fixture
def model():
    return conv_net()


@pytest.fixture
def data(model):
    """40 images with the model's own predictions as labels, but for the first five, which are wrong."""
    x = images(40)
    y = model(x).argmax(1)
    y[:5] = (y[:5] + 1) % 5
    return x, y


def verdicts(run):
    return run.samples[["sample_id", "attack", "eps", "success", "robust"]].to_numpy().tolist()


def test_clean_errors_count_as_not_robust_and_are_not_attacked(model, data):
    run = robust.run(model, data, attacks=["fgsm", "pgd", "noise"], eps=[0.01, 0.05], steps=5)
    samples = run.samples
    assert tuple(samples.columns) == SAMPLE_COLUMNS
    assert len(samples) == 40 * 3 * 2
    wrong = samples[samples.clean_pred != samples.label]
    assert sorted(set(wrong.sample_id)) == [f"{k:05d}" for k in range(5)]
    assert not wrong.robust.any() and not wrong.robust_8bit.any() and not wrong.success.any()
    assert wrong.forwards.sum() == wrong.gradients.sum() == 0
    assert set(run.summary.n) == {40}
    assert set(run.summary.clean_accuracy) == {35 / 40}


def test_those_of_which_the_model_is_surest_are_attacked_first(model, data, monkeypatch):
    order, run = [], attacks.run

    def watched(network, attack, tasks, *args, **options):
        order.extend(task.position for task in tasks)
        return run(network, attack, tasks, *args, **options)

    monkeypatch.setattr(attacks, "run", watched)
    table = robust.run(model, data, attacks=["fgsm"], eps=1e-9).samples
    confidence = table.clean_confidence[table.clean_pred == table.label]
    assert order == confidence.sort_values(ascending=False, kind="stable").index.tolist() != sorted(order)


def test_where_nothing_broke_the_saved_adversarials_are_none(model, data, tmp_path):
    robust.run(model, data, attacks="fgsm", eps=1e-9, save_adversarials=True, output=tmp_path)
    with np.load(tmp_path / "adversarials.npz") as arrays:
        shapes = {name: arrays[name].shape for name in arrays}
    assert shapes == {"x": (0, 3, 12, 12), "x_adv": (0, 3, 12, 12), "labels": (0,), "ids": (0,), "attacks": (0,)}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_success_stands_up_to_an_independent_check(model, data, norm):
    x, y = data
    eps = [0.01, 0.05] if norm == "linf" else [0.1, 0.6]
    run = robust.run(model, data, attacks=["pgd", "fgsm"], norm=norm, eps=eps, steps=8, save_adversarials=True)
    samples = run.samples.set_index(["sample_id", "attack", "eps"])
    saved = list(run.store.adversarials())
    assert len(saved) > 20
    for clean, attack, x_clean, x_adv in saved:
        k = int(clean.sample_id)
        assert np.array_equal(x_clean, x[k].numpy())
        logits = model(torch.tensor(x_adv)[None])
        delta = x_adv.astype(np.float64) - x_clean
        linf, l2 = np.abs(delta).max(), np.sqrt((delta**2).sum())
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        for radius in eps:
            row = samples.loc[(clean.sample_id, attack, radius)]
            assert row.success == within(linf if norm == "linf" else l2, radius, norm, x_adv.size)
            if row.success:
                assert row.adv_pred == logits.argmax() != y[k]
                assert row.adv_confidence == pytest.approx(float(logits.softmax(1).max().detach()), abs=1e-5)
                assert (row.distance_linf, row.distance_l2) == pytest.approx((linf, l2))
    assert samples.success.groupby(["sample_id", "attack"]).any().sum() == len(saved)


def test_a_twin_that_claims_everything_is_refuted(model, data, monkeypatch):
    expected = robust.run(model, data, attacks=["pgd"], eps=[0.02], steps=6)

    class Liar(nn.Module):
        def forward(self, x):
            return model(x).flip(1) * 0 + torch.arange(5.0) * 1e-3 * torch.randn(1)

    monkeypatch.setattr(harness, "fast_twin", lambda module, x: (Liar(), "a liar", False))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        got = robust.run(model, data, attacks=["pgd"], eps=[0.02], steps=6)
    assert got.store.twin_disagreements()[0] > 0
    assert verdicts(got) == verdicts(expected)


def test_a_twin_that_is_not_the_model_at_the_points_that_stand_is_given_up(model, data, tmp_path, monkeypatch):
    class Blind(nn.Module):
        """Has the model's gradient, and an answer that never changes."""

        def forward(self, x):
            logits = model(x)
            nearest = torch.cdist(x.detach().flatten(1), clean.flatten(1)).argmin(1)
            return logits - logits.detach() + 9 * nn.functional.one_hot(y[nearest], 5).float()

    arguments = {"attacks": ["fgsm", "pgd"], "eps": [0.02, 0.05], "steps": 5, "batch_size": 2}
    clean, y = data[0][5:], data[1][5:]
    monkeypatch.setattr(harness, "fast_twin", lambda module, x: (module, "", False))
    expected = robust.run(model, (clean, y), **arguments)
    monkeypatch.setattr(harness, "fast_twin", lambda module, x: (Blind(), "blind", False))
    run = robust.run(model, (clean, y), **arguments)
    assert run.samples.equals(expected.samples)
    assert run.store.details["twin"].startswith("the model itself: under attack, a copy's logits were off by")

    # An interrupted run goes on without it too.
    monkeypatch.setattr(robust.api, "write_reports", lambda store, folder: None)
    add_unit, calls = robust.api.Store.add_unit, []

    def failing(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return add_unit(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(robust.api.Store, "add_unit", failing)
        robust.run(model, (clean, y), output=tmp_path, **arguments)
    resumed = robust.run(model, (clean, y), output=tmp_path, resume=True, **arguments)
    assert resumed.samples.equals(expected.samples) and resumed.store.details["twin"] == run.store.details["twin"]


class TwoWays(nn.Module):
    """Rows of little contrast go through a batch-norm, the others past it."""

    def __init__(self):
        super().__init__()
        net = conv_net()
        with torch.no_grad():
            net[-1].bias -= net(0.25 + images(60) / 2).mean(0)  # so that all classes are near
        self.conv, self.norm, self.rest = net[0], net[1], net[2:]

    def forward(self, x):
        plain = (x.amax((1, 2, 3)) - x.amin((1, 2, 3)) < 0.52)[:, None, None, None]
        z = self.conv(x)
        return self.rest(self.norm(z) if bool(plain.all()) else torch.where(plain, self.norm(z), z))


@pytest.mark.parametrize(
    ("names", "eps"),
    [(["noise", "pgd"], [0.002, 0.012, 0.03]), (["pgd"], [0.002, 0.005, 0.008, 0.012, 0.02, 0.03])],
    ids=["some stand", "some break late"],
)
def test_a_network_that_takes_another_way_under_attack_has_its_own_verdicts(monkeypatch, names, eps):
    """The twin is traced on images that all take one way, and agrees with the model there."""
    x = 0.25 + images(60) / 2
    model = TwoWays().eval()
    data = x, model(x).argmax(1)
    made = []
    monkeypatch.setattr(harness, "fast_twin", lambda *args: made.append(fast_twin(*args)) or made[-1])
    arguments = {"attacks": names, "eps": eps, "steps": 8}
    run = robust.run(model, data, **arguments)
    ((_, description, _),) = made
    assert "batch-norm folded" in description
    monkeypatch.setattr(harness, "fast_twin", lambda module, x: (module, "", False))
    assert verdicts(run) == verdicts(robust.run(model, data, **arguments))


def test_what_a_twin_overlooks_is_attacked_on_the_model_at_the_smaller_eps_too(monkeypatch):
    model, x = Linear(432), 0.25 + images(60) / 2
    y = model(x).argmax(1)
    late = 2e-3 * float(model(x).detach().abs().max())  # well within what a twin may be off by

    class Late(nn.Module):
        """Breaks a little later than the model."""

        def forward(self, x):
            return model(x) + late * nn.functional.one_hot(y[torch.cdist(x.detach().flatten(1), flat).argmin(1)], 2)

    flat, reach = x.flatten(1), model.distance(x, "linf")
    monkeypatch.setattr(harness, "fast_twin", lambda module, x: (Late(), "late", False))
    eps = [float(reach.min()) + beyond for beyond in (3e-6, 7e-6)]
    run = robust.run(model, (x, y), attacks=["fgsm"], eps=eps)
    assert run.store.details["twin"] == "late" and run.store.twin_disagreements() == (0, 1)
    broken = run.samples[run.samples.success]
    assert broken.sample_id.tolist() == 2 * [f"{int(reach.argmin()):05d}"] and broken.eps.nunique() == 2


class Reuses(nn.Module):
    """Writes its logits where its last ones are, as runtimes do that keep their output buffer."""

    def __init__(self, net):
        super().__init__()
        self.net, self.buffer = net, torch.zeros(256, 5)

    def forward(self, x):
        out = self.buffer[: len(x)]
        return out.copy_(self.net(x.detach()).detach())


@pytest.mark.parametrize("eot", [None, 3])
def test_a_model_that_overwrites_its_logits_is_read_in_time(model, data, monkeypatch, eot):
    arguments = {"attacks": ["noise", "square"], "eps": [0.05], "queries": 60, "batch_size": 8, "eot": eot}
    run = robust.run(Reuses(model), data, **arguments)
    monkeypatch.setattr(harness, "fast_twin", lambda module, x: (module, "", False))
    assert verdicts(run) == verdicts(robust.run(model, data, **arguments))


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


class Narrow(nn.Module):
    """Gives its logits in another precision."""

    def __init__(self, net, dtype):
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, x):
        return self.net(x).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_precision_of_the_logits_blinds_no_attack(dtype, norm):
    """The loss of a classifier as sure as this one has gradients that float16 does not hold."""
    model, x = Linear(432), 0.25 + images(200) / 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        score = model.score(x).abs()
    sure = x[(score > 9) & (score < 25)][:30]
    y = model(sure).argmax(1)
    assert len(y) == 30
    names = [
        name for name in ("fgsm", "pgd", "apgd-ce", "mi-fgsm", "fab-t", "fmn") if norm in attacks.ATTACKS[name].norms
    ]
    options = {"attacks": names, "norm": norm, "eps": {"linf": 0.02, "l2": 0.35, "l1": 4.0}[norm], "steps": 20}
    networks = model, Narrow(model, dtype)
    summaries = [robust.run(network, (sure, y), **options).summary.set_index("attack") for network in networks]
    expected, got = (summary.robust_accuracy for summary in summaries)
    assert (expected < 1).all() and ((got - expected).abs() <= 1.5 / len(y)).all(), (expected, got)


@pytest.mark.parametrize("masked", [-10.0, -1e9])
def test_a_masked_class_hides_no_randomness_and_no_mixing_of_rows(data, masked):
    class Odd(nn.Module):
        def __init__(self, odd):
            super().__init__()
            self.net, self.odd = conv_net(), odd

        def forward(self, x):
            logits = self.net(x)
            return torch.cat([self.odd(logits), torch.full((len(x), 1), masked)], 1)

    x, y = data
    for odd, name, said in (
        (lambda logits: logits + torch.randn_like(logits), "deterministic", "warn"),
        (lambda logits: logits - 3 * logits.mean(0), "rows independent", "fail"),
    ):
        run = robust.run(Odd(odd), (x, y), attacks=["noise"], eps=0.01)
        assert level(run, name) == said


def test_a_model_that_tosses_a_coin_is_randomised_though_two_passes_may_agree(data):
    class Coin(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList([conv_net(), conv_net(seed=1)])

        def forward(self, x):
            return self.nets[int(torch.rand(1) < 0.5)](x)

    for seed in range(6):
        run = robust.run(Coin(), data, attacks=["noise"], eps=0.01, seed=seed)
        assert (level(run, "deterministic"), level(run, "rows independent")) == ("warn", "pass")


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


def test_steps_that_cannot_reach_the_edge_of_the_ball_are_told(model, data):
    for size, said in ((0.001, "warn"), (0.2, "pass")):
        run = robust.run(model, data, attacks=["pgd"], eps=0.02, steps=20, step_size=size, random_start=False)
        assert level(run, "attack strength") == said


def test_an_attack_that_leaves_the_ball_fails_loudly(model, data, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Cheat(PGD):
        def init(self, state, noise):
            return super().init(replace(state, eps=1.1 * state.eps), noise)

    monkeypatch.setitem(attacks.ATTACKS, "pgd", Cheat)
    with pytest.raises(RuntimeError, match=r"pgd left the ball or the box on sample .* this is a bug"):
        robust.run(model, data, attacks=["pgd"], eps=[0.05], steps=4)


def test_the_users_module_is_left_as_it_was(data):
    module = conv_net().train()
    module[1].eval()
    module[0].weight.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    flags = [part.training for part in module.modules()], [p.requires_grad for p in module.parameters()]
    robust.run(module, data, attacks=["pgd"], eps=[0.02], steps=3)
    assert ([part.training for part in module.modules()], [p.requires_grad for p in module.parameters()]) == flags
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_same_seed_same_table_and_other_batches_same_verdicts(model, data):
    def run(**changes):
        return robust.run(model, data, attacks=["pgd", "noise"], **{"eps": [0.01, 0.03], "steps": 5} | changes)

    reference = run()
    assert run().samples.to_csv() == reference.samples.to_csv()
    for batch_size in (3, 16):
        assert verdicts(run(batch_size=batch_size)) == verdicts(reference)
    assert run(seed=1).samples.to_csv() != reference.samples.to_csv()


def test_worst_case_is_what_no_attack_broke(model, data):
    run = robust.run(model, data, attacks=["fgsm", "noise"], eps=[0.03])
    by_sample = run.samples.groupby("sample_id").robust.all()
    worst = run.summary[run.summary.attack == "worst_case"]
    assert worst.robust_accuracy.item() == by_sample.mean()


def test_targeted_run_leaves_the_target_class_out(model, data):
    run = robust.run(model, data, attacks=["pgd"], eps=[0.5], steps=20, target=2)
    assert set(run.samples.label) == set(data[1].tolist()) - {2}
    reached = run.samples[run.samples.success]
    assert len(reached) > 0 and set(reached.adv_pred) == {2}
    left_out = int((data[1] == 2).sum())
    assert f"{left_out} images of the target's own class" in {f.name: f.message for f in run.findings}["target"]
    with pytest.raises(InputError, match="every one already has the target's label"):
        robust.run(model, (data[0], torch.full_like(data[1], 2)), attacks=["pgd"], eps=[0.5], target=2)


def test_a_generator_is_read_once_and_in_pieces(model, data):
    x, y = data
    stream = ((x[k : k + 7], y[k : k + 7]) for k in range(0, 40, 7))
    streamed = robust.run(model, stream, attacks=["pgd"], eps=[0.02], steps=4)
    whole = robust.run(model, data, attacks=["pgd"], eps=[0.02], steps=4)
    assert verdicts(streamed) == verdicts(whole)


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


@pytest.mark.parametrize(("norm", "eps"), [("linf", 10.3 / 255), ("l2", 0.7)])
def test_an_adversarial_that_can_be_saved_as_an_image_is_that_image(model, norm, eps, monkeypatch):
    x = (images(60) * 255).round() / 255
    ask, asked = judge.Judge._ask, []
    monkeypatch.setattr(judge.Judge, "_ask", lambda self, x: asked.append(len(x)) or ask(self, x))
    run = robust.run(model, (x, model(x).argmax(1)), attacks="pgd", norm=norm, eps=eps, save_adversarials=True)
    samples, found, lost = run.samples.set_index("sample_id"), 0, 0
    for clean, _, _, x_adv in run.store.adversarials():
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
    assert per_slot(torch.ones(2), torch.zeros(2, 3, 4, 4)).shape == (2, 1, 1, 1)


# Bad input


class Outputs(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


class Trains(nn.Module):
    """Answers, but not where gradients are asked for."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        if x.requires_grad:
            raise ValueError("no gradients here")
        return self.net(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.flatten(1).sum(1), "logits of shape"),
        (lambda x: x, "logits of shape"),
        (lambda x: (x.flatten(1), x), "not one tensor of logits"),
        (lambda x: x.flatten(1)[:, :5] * float("nan"), "NaN"),
        (lambda x: x.flatten(1)[:, :5].detach(), "no gradient back to its input"),
        (lambda x: x.flatten(1)[:, :5].detach() * torch.ones(5).requires_grad_(), "no gradient back to its input"),
        (lambda x: x.flatten(1) @ torch.ones(7, 5), "the model fails on 3x12x12 images: RuntimeError"),
    ],
)
def test_a_model_that_is_no_classifier_is_refused(data, make, message):
    with pytest.raises(InputError, match=message) as caught:
        robust.run(Outputs(make), data, attacks=["fgsm"], eps=[0.1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("unloaded", "attack", "message"),
    [
        (3, "fgsm", "must be an nn.Module or a spec, not a int"),
        ("resnet5", "pdg", "unknown attack 'pdg'; did you mean pgd"),
    ],
)
def test_what_is_wrong_whatever_the_model_is_is_said_before_it_is_loaded(data, unloaded, attack, message):
    with pytest.raises(InputError, match=message):
        robust.run(unloaded, data, attacks=[attack], eps=[0.1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": ["pdg"]}, "unknown attack 'pdg'; did you mean pgd"),
        ({"attacks": ["foolbox:LinfDeepFool"]}, "foolbox:LinfDeepFoolAttack"),
        ({"attacks": ["foolbox:L2PGD"]}, "measures its perturbations in l2"),
        ({"target": "gibbon"}, "has no class names: give the target as a number, 0 .. 4"),
        ({"target": "gibon", "class_names": ["gibbon", *"abcd"]}, "unknown target 'gibon'; did you mean gibbon"),
        ({"target": 5, "class_names": list("abcde")}, "unknown target '5'"),
        ({"device": "warp"}, "device 'warp' cannot be used"),
        ({"eps": 8}, "did you mean 8/255"),
        ({"limit": 3}, "limit needs a data spec"),
        ({"resume": True}, "resume needs the output"),
        ({"class_names": ["a", "b"]}, "class_names has 2 names and the model 5 classes"),
        ({"eps": 128, "norm": "l2"}, "did you mean 128/255"),
        ({"batch_size": 2**63}, "batch_size must be at most"),
        ({"batch_size": 8.0}, r"batch_size must be a whole number, not 8\.0"),
        ({"attacks": ["pgd"], "steps": "3"}, "steps must be a whole number, not '3'"),
        ({"attacks": ["pgd"], "steps": 2.5}, r"steps must be a whole number, not 2\.5"),
        ({"attacks": ["pgd"], "random_start": "no"}, "random_start must be True or False, not 'no'"),
        ({"attacks": ["pgd"], "step_size": [0.1]}, r"step_size must be a number, not \[0\.1\]"),
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"attacks": [PGD]}, "attacks are given by their names, such as 'pgd'"),
        ({"attacks": PGD(norm="linf")}, "attacks are given by their names, such as 'pgd'"),
        ({"norm": 2}, "unknown norm '2'; did you mean l2"),
        ({"conv": 3}, "unknown conv '3'"),
        ({"eps": [None]}, "eps must be a number, not None"),
        ({"eps": True}, "eps must be a number, not True"),
        ({"class_names": range(5)}, "class_names must be 5 strings, in label order"),
        ({"device": "meta"}, "device 'meta' cannot be used"),
        ({"output": 3}, "output must be a folder's path, not 3"),
        ({"attacks": ["pgd", "transfer"], "surrogate": 5}, "surrogate must be an nn.Module or a spec, not a int"),
        ({"attacks": ["transfer"], "surrogate": Trains()}, "the surrogate Trains fails where gradients are asked for"),
        ({"weights": "w.pth"}, "weights and input_size go with a model spec"),
        ({"label": "cat"}, "label, data_root and skip_bad_images go with a data spec"),
        ({"attacks": ["pgd"], "random_start": np.bool_(False), "restarts": 2}, "restarts means nothing to pgd"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(model, data, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        robust.run(model, data, **{"attacks": ["fgsm"], "eps": [0.1]} | changes)
    assert "\n" not in str(caught.value)


def test_labels_outside_the_classes_are_refused(model, data):
    x, y = data
    with pytest.raises(InputError, match=r"label 7 of 00003 is none of the model's 5 classes"):
        robust.run(model, (x, torch.where(torch.arange(40) == 3, 7, y)), attacks=["fgsm"], eps=[0.1])


def test_eps_and_attacks_as_people_write_them(model, data):
    for eps in ("8/255", np.float32(8 / 255), [8 / 255]):
        run = robust.run(model, data, attacks="noise", eps=eps)
        assert list(run.summary.eps) == pytest.approx([8 / 255] * 2)


def test_numbers_of_every_library(model, data):
    run = robust.run(
        model, data, attacks="pgd", eps=np.array([0.01, 0.02]), steps=np.int64(2), seed=torch.tensor(3),
        step_size="1/4", batch_size=np.int32(8), class_names=np.array(list("abcde")),
    )  # fmt: skip
    same = robust.run(model, data, attacks="pgd", eps=["0.01", "0.02"], steps=2, seed=3, step_size=0.25, batch_size=8)
    assert run.samples.equals(same.samples)
    options = robust.run(model, data, attacks="noise", eps=torch.tensor(0.5)).store.identity["options"]
    assert options["eps"] == [0.5]


def test_a_finished_run_is_loaded_and_written_anew(model, data, tmp_path):
    run = robust.run(model, data, attacks=["fgsm"], eps=0.02, output=tmp_path / "run")
    summary = (tmp_path / "run" / "summary.csv").read_bytes()
    (tmp_path / "run" / "summary.csv").unlink()
    loaded = robust.load(tmp_path / "run")
    assert loaded.samples.equals(run.samples)
    loaded.write(tmp_path / "run")
    assert (tmp_path / "run" / "summary.csv").read_bytes() == summary
    with pytest.raises(InputError, match="no run at"):
        robust.load(tmp_path / "none")


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 32, 32)])
def test_images_of_another_size_than_a_spec_takes_are_refused(shape):
    """It might read them all the same: of one channel, a normalisation makes three."""
    with pytest.raises(InputError, match=r"the images are \d x \d+ x \d+ .*, and mnist_cnn takes 1 x 28 x 28 "):
        robust.run("mnist_cnn", [(torch.rand(2, *shape), torch.tensor([0, 1]))], attacks=["fgsm"], eps=0.1)


def test_autocast_and_default_dtype_around_a_run_do_not_reach_it(model, data):
    """Else points that fool the rounded network alone would be confirmed by it."""

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.seen = model, set()

        def forward(self, x):
            y = self.net(x)
            self.seen |= {x.dtype, y.dtype}
            return y

    watching = Watching()
    plain = robust.run(model, data, attacks=["pgd"], eps=0.02, steps=3)
    with torch.autocast("cpu", torch.bfloat16):
        found = robust.run(watching, data, attacks=["pgd"], eps=0.02, steps=3)
        assert torch.is_autocast_enabled("cpu")
    assert verdicts(found) == verdicts(plain) and watching.seen == {torch.float32}
    torch.set_default_dtype(torch.float64)
    try:
        found = robust.run(watching, data, attacks=["pgd"], eps=0.02, steps=3)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert verdicts(found) == verdicts(plain) and watching.seen == {torch.float32}


def test_a_default_device_is_not_that_of_a_run(model, data):
    """Here the device without values: whatever were made on it would fail, as on a GPU beside images on the CPU."""
    arguments = {"attacks": ["pgd", "square", "fmn"], "eps": 0.02, "steps": 3, "queries": 9}
    plain = robust.run(model, data, **arguments)
    with torch.device("meta"):
        inside = robust.run(model, data, **arguments)
        assert torch.empty(1).is_meta
    torch.set_default_device("meta")
    try:
        found = robust.run(model, data, **arguments)
        assert torch.empty(1).is_meta
    finally:
        torch.set_default_device(None)
    assert verdicts(found) == verdicts(inside) == verdicts(plain)


@pytest.mark.parametrize(
    ("cores", "environment", "expected"),
    [
        (8, {}, 3),  # never more than there are
        (2, {}, 2),
        (2, {"PYTEST_XDIST_WORKER_COUNT": "2"}, 1),
        (2, {"PYTEST_XDIST_WORKER_COUNT": "4"}, 1),
        (2, {"OMP_NUM_THREADS": "3"}, 3),
    ],
)
def test_a_run_has_no_more_threads_than_its_share_of_cores(model, data, monkeypatch, cores, environment, expected):
    monkeypatch.setattr("joblib.cpu_count", lambda: cores)
    for name in ("OMP_NUM_THREADS", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    seen = {}  # by rows: the last pass of two is the run's, though those before it, that count the classes, are not
    model.register_forward_pre_hook(lambda _, images: seen.update({len(images[0]): torch.get_num_threads()}))
    torch.set_num_threads(3)
    try:
        run = robust.run(model, data, attacks=["pgd"], eps=0.02, steps=2)
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(1)
    assert set(seen.values()) == {expected} and run.store.details["environment"]["threads"] == str(expected)
    assert after == 3


def test_runs_in_several_threads_take_turns(model, data):
    """Each would put the modes back that it found, and find the other's."""
    network = nn.Sequential(nn.BatchNorm2d(3), model).train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    alone = robust.run(network, data, attacks=["pgd"], eps=0.02, steps=3)
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: robust.run(network, data, attacks=["pgd"], eps=0.02, steps=3), range(3)))
    assert all(verdicts(run) == verdicts(alone) for run in runs)
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_a_run_made_in_a_thread_is_read_in_another(model, data):
    with ThreadPoolExecutor() as pool:
        run = pool.submit(robust.run, model, data, attacks=["noise"], eps=0.1).result()
    assert len(run.samples) == len(data[1])


class WithExtraState(nn.Module):
    def __init__(self, extra: int):
        super().__init__()
        self.net, self.extra = conv_net(), extra

    def get_extra_state(self):
        return {"extra": self.extra}

    def forward(self, x):
        return self.net(x)


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


def test_torchs_random_numbers_are_as_they_were_though_a_loader_draws_some(model, data):
    loader = DataLoader(TensorDataset(*data), batch_size=8)
    before = torch.get_rng_state()
    robust.run(model, loader, attacks=["noise"], eps=0.02)
    assert torch.equal(torch.get_rng_state(), before)


def test_precision_that_torch_cannot_tell_is_refused(model, data):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(InputError, match=r"fp32_precision of torch\.backends is set"):
            robust.run(model, data, attacks=["noise"], eps=0.02)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    robust.run(model, data, attacks=["noise"], eps=0.02)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("kind", ["extra state", "script", "export"])
def test_modules_of_every_kind(kind, model, data):
    make = {
        "extra state": lambda: WithExtraState(3),
        "script": lambda: torch.jit.script(conv_net()),
        "export": lambda: torch.export.export(
            conv_net(), (data[0],), dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=64)},)
        ).module(),
    }
    arguments = {"attacks": ["fgsm"], "eps": [0.02]}
    run = robust.run(make[kind](), data, **arguments)
    assert run.samples.success.equals(robust.run(model, data, **arguments).samples.success)


def test_extra_state_is_part_of_the_fingerprint():
    assert fingerprint(WithExtraState(3)) == fingerprint(WithExtraState(3)) != fingerprint(WithExtraState(4))


def test_parameters_that_no_gradient_passes_are_refused(data):
    with torch.inference_mode():
        made_there = conv_net()
    for module, message in (
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), r"1\.weight is not initialised; call the model once"),
        (nn.Sequential(nn.Flatten(), nn.Linear(432, 5, device="meta")), r"1\.weight is on the meta device"),
        (made_there, r"0\.weight was made under torch\.inference_mode"),
    ):
        with pytest.raises(InputError, match=message):
            robust.run(module, data, attacks=["fgsm"], eps=[0.02])
    with torch.inference_mode(), pytest.raises(InputError, match="call it outside"):
        robust.run(conv_net(), data, attacks=["fgsm"], eps=[0.02])


def test_no_data_is_refused(model):
    with pytest.raises(InputError, match="no image"):
        robust.run(model, [], attacks=["fgsm"], eps=[0.1])


def test_an_attack_that_raises_is_left_out_and_named(model, data, monkeypatch):
    def fail(self, *args):
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr(attacks.FoolboxAttack, "_attack", fail)
    run = robust.run(model, data, attacks=["fgsm", "foolbox:LinfDeepFoolAttack"], eps=[0.1])
    assert set(run.samples.attack) == {"fgsm"}
    (finding,) = [f for f in run.findings if f.level == "fail"]
    assert "LinfDeepFoolAttack raised ZeroDivisionError: no luck" in finding.message
    with pytest.raises(InputError, match="raised ZeroDivisionError: no luck"):
        robust.run(model, data, attacks=["foolbox:LinfDeepFoolAttack"], eps=[0.1])


def test_foolbox_attacks_keep_their_own_defaults(model, data):
    made = attacks.make("foolbox:LinfBasicIterativeAttack", "linf", random_start=None, steps=None, restarts=1)
    assert made.options == {}
    run = robust.run(model, data, attacks=["foolbox:LinfFastGradientAttack", "fgsm"], eps=[0.03])
    by_attack = [rows.robust.tolist() for _, rows in run.samples.groupby("attack")]
    assert by_attack[0] == by_attack[1]


def test_foolbox_minimal_attack_in_the_tables_and_pictures(model, data):
    run = robust.run(model, data, attacks=["foolbox:LinfDeepFoolAttack"], eps=[0.002, 0.02, 0.1])
    samples = run.samples
    assert 0 < samples.success.sum() < len(samples)
    assert (samples.distance_linf[samples.success] <= samples.eps[samples.success] + TOLERANCE).all()
    label_of = dict(zip(samples.sample_id, samples.label, strict=True))
    for picture in run.store.pictures():
        label = label_of[f"{picture.position:05d}"]
        assert (picture.adv_pred == label) == (picture.role == "withstood")
        assert np.abs(picture.x_adv - picture.x).max() <= picture.eps + TOLERANCE


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


# Resume


class Counted:
    """A stream, which does not say how long it is: the first n images of the fixture `data`, or more."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        x = images(40)
        y = conv_net()(x).argmax(1)
        y[:5] = (y[:5] + 1) % 5
        for k in range(self.n):
            yield x[k % 40], int(y[k % 40])


def test_interrupted_anywhere_and_resumed_equals_uninterrupted(model, tmp_path, monkeypatch):
    monkeypatch.setattr(robust.api, "write_reports", lambda store, folder: None)
    x = images(60)
    y = model(x).argmax(1)
    arguments = {"attacks": ["pgd", "noise"], "eps": [0.01, 0.03], "steps": 4, "batch_size": 2}
    expected = robust.run(model, (x, y), **arguments)

    class Stop(Exception):
        pass

    add_unit = robust.api.Store.add_unit
    for allowed in range(6):
        calls = 0

        def failing(self, *args, limit=allowed, **kwargs):
            nonlocal calls
            if calls == limit:
                raise Stop
            calls += 1
            return add_unit(self, *args, **kwargs)

        output = tmp_path / str(allowed)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            patch.setattr(robust.api.Store, "add_unit", failing)
            robust.run(model, (x, y), output=output, **arguments)
        resumed = robust.run(model, (x, y), output=output, resume=True, **arguments)
        assert resumed.samples.to_csv() == expected.samples.to_csv()
        assert resumed.summary.drop(columns="seconds").equals(expected.summary.drop(columns="seconds"))
        again = robust.run(model, (x, y), output=output, resume=True, **arguments)
        assert again.samples.to_csv() == expected.samples.to_csv()


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"eps": [0.02, 0.04]}, r"options eps \(\[0.02\] there, \[0.02, 0.04\] here\)"),
        ({"seed": 1}, "options seed"),
        ({"attacks": ["fgsm", "noise"]}, "options attacks"),
        ({"model": conv_net(seed=9)}, "model fingerprint"),
        ({"data": (images(40, seed=5), torch.zeros(40, dtype=int))}, "the data have changed"),
        ({"data": iter([])}, "no image"),
        ({"data": Counted(30)}, "the data have changed since the run began: 30 images, 40 then"),
        ({"data": Counted(45)}, "the data have changed since the run began"),
    ],
)
def test_a_run_resumes_only_on_what_it_began_with(model, data, tmp_path, changes, differs):
    arguments = {"model": model, "data": data, "attacks": ["fgsm"], "eps": [0.02], "output": tmp_path / "run"}
    if not isinstance(changes.get("data", ()), tuple):
        arguments["data"] = Counted(40)
    robust.run(**arguments)
    before = (tmp_path / "run" / "samples.csv").read_bytes()
    with pytest.raises(InputError, match=differs):
        robust.run(**arguments | changes, resume=True)
    with pytest.raises(InputError, match="already holds a run"):
        robust.run(**arguments)
    assert (tmp_path / "run" / "samples.csv").read_bytes() == before


class Shifted(nn.Module):
    """Normalises by a number that is neither parameter nor buffer."""

    def __init__(self, mean: float):
        super().__init__()
        self.net, self.mean = conv_net(), mean

    def forward(self, x):
        return self.net(x - self.mean)


def test_a_run_does_not_resume_on_other_code_with_the_same_weights(data, tmp_path):
    arguments = {"data": data, "attacks": ["fgsm"], "eps": [0.02], "output": tmp_path / "run"}
    first = robust.run(Shifted(0.0), **arguments)
    with pytest.raises(InputError, match="the model has changed since the run began: its weights are the same"):
        robust.run(Shifted(0.1), **arguments, resume=True)
    assert robust.run(Shifted(0.0), **arguments, resume=True).samples.equals(first.samples)


def test_a_run_does_not_resume_with_another_class_of_the_targets_name(model, data, tmp_path):
    options = {"attacks": ["pgd"], "eps": 0.02, "steps": 2, "target": "cat", "output": tmp_path}
    robust.run(model, data, class_names=["dog", "cat", *"abc"], **options)
    with pytest.raises(InputError, match=r"differs in target index \(1 there, 0 here\)"):
        robust.run(model, data, class_names=["cat", "dog", *"abc"], resume=True, **options)


def test_a_run_does_not_resume_with_another_surrogate_of_the_same_weights(model, data, tmp_path):
    arguments = {"data": data, "attacks": ["transfer"], "eps": [0.02], "output": tmp_path / "run"}
    robust.run(model, surrogate=Shifted(0.0), **arguments)
    with pytest.raises(InputError, match="the surrogate has changed"):
        robust.run(model, surrogate=Shifted(0.1), **arguments, resume=True)


@pytest.mark.parametrize("generator", ["torch", "numpy"])
def test_a_random_model_resumes(generator, data, tmp_path):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_net()

        def forward(self, x):
            noise = torch.randn_like(x) if generator == "torch" else torch.tensor(np.random.randn(*x.shape)).to(x)
            return self.net(x + 0.3 * noise)

    arguments = {"data": data, "attacks": ["fgsm"], "eps": [0.02], "output": tmp_path / "run"}
    first = robust.run(Noisy(), **arguments)
    assert robust.run(Noisy(), **arguments, resume=True).samples.equals(first.samples)


def test_a_run_does_not_resume_with_another_version_of_an_attack(model, data, tmp_path, monkeypatch):
    few = data[0][:6], data[1][:6]
    arguments = {"data": few, "attacks": ["autoattack"], "eps": [0.02], "output": tmp_path / "run"}
    robust.run(model, **arguments)
    monkeypatch.setattr(attacks.autoattack.FAB, "eta", 1.04)
    init = attacks.autoattack.FAB.__init__
    monkeypatch.setattr(attacks.autoattack.FAB, "__init__", lambda self, **given: init(self, **{"eta": 1.04} | given))
    with pytest.raises(InputError, match=r"differs in attacks fab-t \(.*'eta': 1\.05.* there, .*'eta': 1\.04.* here\)"):
        robust.run(model, **arguments, resume=True)


class InPlace(nn.Module):
    """Works without gradients only."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        return self.net(x.sub_(0.1))


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.mul_(255).round_().div_(255).clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Rounding(nn.Module):
    """Changes its images only where gradients are asked for, behind autograd's back."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        return self.net(_Round.apply(x) if x.requires_grad else x)


class _Once(torch.autograd.Function):
    """Forgets on its way back what it would need to go there again."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = [2]
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return ctx.kept.pop() * g


class GoesBackOnce(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        return _Once.apply(self.net(x))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(GoesBackOnce, id="forgets"),
        pytest.param(lambda: torch.compile(conv_net(), backend="aot_eager"), id="compiled", marks=pytest.mark.long),
    ],
)
def test_a_graph_is_gone_back_through_once(make, data):
    """More is not to be had of all networks."""
    run, plain = (robust.run(net, data, attacks=["pgd"], eps=0.05, steps=5) for net in (make(), conv_net()))
    assert verdicts(run) == verdicts(plain) and run.samples.success.any()


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


class Squeezes(nn.Module):
    """Works on several images only."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        return self.net(x) if len(x) > 1 else self.net(x).view(7, 3)


class Small(nn.Module):
    """Takes eight images at most; more are too many for it or, with `memory`, for its device."""

    def __init__(self, memory: bool):
        super().__init__()
        self.net, self.memory = conv_net(), memory

    def forward(self, x):
        if len(x) > 8:
            raise torch.OutOfMemoryError("out of memory") if self.memory else ValueError("too many")
        return self.net(x)


class Tires(nn.Module):
    """Fails from its n-th evaluation with gradients on."""

    def __init__(self, n: int):
        super().__init__()
        self.net, self.left = conv_net(), n

    def forward(self, x):
        self.left -= int(x.requires_grad)
        if self.left < 0:
            raise ValueError("tired")
        return self.net(x)

    def __deepcopy__(self, memo):
        return self  # so that the twin tires too


def test_a_model_that_fails_under_attack_is_named_and_what_is_done_is_kept(data, tmp_path):
    with pytest.raises(InputError, match=r"the model Tires fails under attack: ValueError: tired; .* what is done is"):
        robust.run(Tires(20), data, attacks=["fgsm", "pgd"], eps=[0.001], output=tmp_path / "run")
    kept = robust.load(tmp_path / "run").samples
    assert set(kept.attack) == {"fgsm"} and len(kept) == len(data[1])


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (True, r"the device has too little memory \(OutOfMemoryError: .*\): free some .* with a batch_size below 64"),
        (False, "the model Small fails on batches of up to 64 images: ValueError: too many; mend that and"),
    ],
)
def test_a_model_that_fails_on_large_batches_is_refused_in_a_line(memory, message, data, tmp_path):
    with pytest.raises(InputError, match=message):
        robust.run(Small(memory), data, attacks=["fgsm"], eps=[0.02], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert len(robust.run(Small(memory), data, attacks=["fgsm"], eps=[0.02], batch_size=8).samples) == len(data[1])


def test_a_model_that_fails_on_the_first_images_is_refused_in_a_line(data, tmp_path):
    with pytest.raises(InputError, match=r"fails on the first images: RuntimeError: .*; it must take one image and"):
        robust.run(Squeezes(), data, attacks=["fgsm"], eps=[0.02], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", [InPlace, Rounding])
def test_a_model_that_changes_its_images_is_refused(module, data):
    x = data[0].clone()
    with pytest.raises(InputError, match="the model changes the images it is given; let its forward begin with"):
        robust.run(module(), data, attacks=["fgsm"], eps=[0.02])
    assert torch.equal(data[0], x)


def test_nothing_is_left_behind_by_a_run_that_never_began(data, tmp_path):
    with pytest.raises(InputError):
        robust.run(Outputs(lambda x: x.flatten(1)[:, :5] * float("nan")), data, eps=[0.1], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Findings


def level(run, name):
    return {finding.name: finding.level for finding in run.findings}[name]


def test_a_sound_model_raises_no_alarm_but_for_its_few_samples(model, data):
    x, y = data
    run = robust.run(model, (x[5:], y[5:]), attacks=["fgsm", "pgd", "noise"], eps=[0.01, 0.1])
    assert {f.name for f in run.findings if f.level != "pass"} == {"sample size"}


@pytest.mark.parametrize(
    ("fault", "name", "expected"),
    [
        (lambda model: nn.Sequential(model, nn.Softmax(1)), "logits", "warn"),
        (lambda model: model.train(), "eval mode", "warn"),
        (lambda model: Outputs(lambda x: model(x) + 0.1 * torch.randn(len(x), 5)), "deterministic", "warn"),
        (lambda model: Outputs(lambda x: model((x * 8).round() / 8)), "gradients", "fail"),
        (lambda model: Outputs(lambda x: model(x - x.mean(0))), "rows independent", "fail"),
        (
            lambda model: Outputs(lambda x: model(x - x.mean(0)) + 1e-4 * torch.randn(len(x), 5)),
            "rows independent",
            "fail",
        ),
        (lambda model: Outputs(lambda x: model(x) + (x - x).sum((1, 2, 3)).sqrt()[:, None]), "gradients", "fail"),
    ],
)
def test_planted_faults_are_found(model, data, fault, name, expected):
    x, y = data
    planted = fault(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        run = robust.run(planted, (x[5:], y[5:]), attacks=["fgsm", "noise"], eps=[0.02])
    assert level(run, name) == expected


def test_rows_that_mix_are_found_on_a_single_image(model, data):
    x, y = data
    mixing = Outputs(lambda x: model(x - x.mean(0)))
    assert level(robust.run(mixing, (x[5:6], y[5:6]), attacks="noise", eps=0.02), "rows independent") == "fail"
    assert level(robust.run(model, (x[5:6], y[5:6]), attacks="noise", eps=0.02), "rows independent") == "pass"


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.5)])
def test_a_gradient_that_is_no_number_leaves_the_image_standing(model, data, norm, eps):
    blind = Outputs(lambda x: model(x) + (x - x).sum((1, 2, 3)).sqrt()[:, None])
    run = robust.run(blind, data, attacks=["pgd", "noise"], norm=norm, eps=eps, steps=5, random_start=False)
    sees = robust.run(model, data, attacks=["pgd"], norm=norm, eps=eps, steps=5, random_start=False)
    worst = run.summary.set_index("attack").robust_accuracy
    assert worst["pgd"] == run.summary.clean_accuracy.iloc[0] > sees.summary.robust_accuracy.iloc[0]


def test_attacks_no_better_than_noise_are_found():
    model, x = Linear(432), images(40)
    data = x, model(x).argmax(1)
    lost = Outputs(lambda x: model(x.detach()) + 1e-9 * x.sum((1, 2, 3))[:, None])
    run = robust.run(lost, data, attacks=["pgd", "noise"], eps=0.3, steps=10, step_size=1e-6)
    assert level(run, "noise control") == "warn"
    run = robust.run(model, data, attacks=["pgd", "noise"], eps=[0.001, 0.3], steps=10)
    assert level(run, "noise control") == "pass"


def test_foolboxs_attacks_without_gradients_are_not_taken_for_blind_ones(model, data):
    run = robust.run(model, data, attacks=["foolbox:LinfAdditiveUniformNoiseAttack", "square"], eps=0.05, queries=300)
    assert {f.name for f in run.findings if f.level != "pass"} == {"sample size", "attack strength"}


def test_what_a_check_lets_pass_is_not_denied(model, data):
    """One image is no evidence that gradients are masked, but it is there."""
    summary = robust.run(model, data, attacks=["fgsm", "pgd"], eps=0.02).summary
    summary["robust_accuracy"] = [0.5, 0.5 + 1 / 40, 0.5]  # fgsm, pgd, worst case
    (said,) = (finding for finding in _comparisons(summary) if finding.name == "more steps")
    assert said.level == "pass" and said.message.endswith("as many images as FGSM's one, but for 1 image")


def test_masked_gradients_lose_to_noise_and_are_found(model, data):
    x = data[0]
    masked = Outputs(lambda x: model((x * 8).round() / 8))
    run = robust.run(masked, (x, masked(x).argmax(1)), attacks=["pgd", "noise"], eps=[0.3], random_start=False)
    assert level(run, "noise control") == "fail"


def test_wrong_labels_show_on_the_clean_images(model, data):
    x, y = data
    run = robust.run(model, (x, (y + 1) % 5), attacks=["fgsm"], eps=[0.02])
    assert level(run, "clean accuracy") == "fail"


@pytest.mark.parametrize(("right", "said"), [(12, "fail"), (13, "warn"), (18, "warn"), (20, "pass")])
def test_what_may_be_guessing_is_not_passed(right, said):
    """Of 60 images on 5 classes, where 12 are right by chance."""
    model = Outputs(lambda x: torch.eye(5)[torch.zeros(len(x), dtype=torch.long)] + x.sum((1, 2, 3))[:, None] * 1e-3)
    y = torch.tensor([0] * right + [1] * (60 - right))
    run = robust.run(model, (images(60), y), attacks=["noise"], eps=0.01)
    assert level(run, "clean accuracy") == said


# Real networks


def first_images(shared, factory):
    """The first 500 MNIST test images, or the first 50 of each CIFAR-10 class, as the networks' README has them."""
    if factory.startswith("mnist"):
        with np.load(shared / "data" / "mnist_test.npz") as data:
            return torch.tensor(data["x"][:500])[:, None] / 255, torch.tensor(data["y"][:500]).long()
    with zipfile.ZipFile(shared / "data" / "cifar10_test.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg") and name[-8:-4] < "0050")
        arrays = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]
    return torch.tensor(np.stack(arrays)).permute(0, 3, 1, 2) / 255, torch.arange(10).repeat_interleave(50)


def network(shared, factory):
    from robust.models import load_model

    return load_model(f"{shared / 'models' / 'architectures.py'}:{factory}")


@pytest.mark.long
@pytest.mark.parametrize(
    ("factory", "eps", "right", "standing"),
    [
        ("mnist_robust_03", 0.3, 418, 361),  # 86.4 % of 418
        ("cifar10_robust_8px", 8 / 255, 154, 121),  # 78.6 % of 154
        ("cifar10_resnet20", 4 / 255, 400, 0),
    ],
)
def test_published_robust_accuracies(shared, factory, eps, right, standing):
    """PGD-40 of public tools, on the same images. One random start gives or takes three images: so the mean of four."""
    model, (x, y) = network(shared, factory), first_images(shared, factory)
    seeds = range(4) if standing else range(1)
    runs = [robust.run(model, (x, y), attacks=["pgd"], eps=eps, steps=40, seed=seed) for seed in seeds]
    samples = runs[0].samples
    assert abs((samples.clean_pred == samples.label).sum() - right) <= (0 if standing else 25)
    counts = [int(run.samples.robust.sum()) for run in runs]
    assert abs(np.mean(counts) - standing) <= 1.5
    assert all(abs(count - standing) <= 5 for count in counts)


@pytest.mark.long
@pytest.mark.parametrize("factory", ["mnist_robust_03", "cifar10_robust_8px", "cifar10_resnet20"])
def test_batch_size_changes_no_verdict_of_real_networks(shared, factory):
    model, (x, y) = network(shared, factory), first_images(shared, factory)
    if factory == "cifar10_resnet20":
        x, y = x[::5], y[::5]
    eps = [0.1, 0.3] if factory.startswith("mnist") else [1 / 255, 8 / 255]
    small, large = (robust.run(model, (x, y), attacks=["fgsm", "pgd"], eps=eps, batch_size=b) for b in (16, 128))
    assert verdicts(small) == verdicts(large)
