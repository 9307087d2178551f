"""The harness: what is attacked and how often, on a twin and on the model, and what the rows say of it."""

import copy
import io
import zipfile

import numpy as np
import pytest
import torch
from pandas.testing import assert_frame_equal
from PIL import Image
from torch import nn

import attacks
import robust
import robust.api
from robust import harness
from robust.errors import InputError
from robust.judge import Verified
from robust.models.prepare import fast_twin
from robust.store import SAMPLE_COLUMNS
from toys import Linear, conv_net, images, tasks, verdicts


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
    none = dict.fromkeys(["labels", "ids", "attacks", "eps"], (0,))
    assert shapes == {"x": (0, 3, 12, 12), "x_adv": (0, 3, 12, 12)} | none


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


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_the_first_look_at_a_model_keeps_to_the_batch_size_too(model, batch_size):
    """But for two images at least, by which it is seen whether a model mixes them."""
    rows, x = set(), images(6, (3, 60, 60))
    y = model(x).argmax(1)
    handle = model.register_forward_pre_hook(lambda _, given: rows.add(len(given[0])))
    robust.run(model, (x, y), attacks=["pgd"], eps=[0.01], steps=3, batch_size=batch_size)
    handle.remove()
    assert max(rows) == max(2, batch_size)


def test_of_two_verdicts_the_smaller_eps_counts():
    def broke(rung: int | None, fooled: bool = True, forwards: int = 1) -> Verified:
        outcome = attacks.Outcome(0, torch.zeros(1), fooled, rung, 0, (forwards,), (0,))
        return Verified(outcome, torch.zeros(1), rung, fooled, (), 0, 1.0, torch.zeros(2), {})

    for early, late, kept in [
        (broke(0), broke(1, forwards=2), 0),
        (broke(1), broke(0, forwards=2), 0),
        (broke(None), broke(1, forwards=2), 1),
        (broke(1), broke(1, fooled=False, forwards=2), 1),
        (broke(0, fooled=False), broke(1, forwards=2), 1),
    ]:
        better = harness._better(early, late)
        assert (better.broken_at, better.outcome.forwards) == (kept, (2,))


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
def test_batch_size_changes_nothing_on_real_networks(shared, factory):
    """Not one bit: not even of a confidence."""
    model, (x, y) = network(shared, factory), first_images(shared, factory)
    if factory == "cifar10_resnet20":
        x, y = x[::5], y[::5]
    eps = [0.1, 0.3] if factory.startswith("mnist") else [1 / 255, 8 / 255]
    small, large = (robust.run(model, (x, y), attacks=["fgsm", "pgd"], eps=eps, batch_size=b) for b in (16, 128))
    assert_frame_equal(small.samples, large.samples, check_exact=True)


@pytest.mark.long
@pytest.mark.parametrize(
    ("factory", "norm", "eps", "names"),
    [
        ("mnist_robust_03", "linf", [0.2, 0.5], ["pgd", "apgd-dlr", "fmn", "fab-t", "square"]),
        ("mnist_robust_03", "l0", [9, 40], ["fmn", "sigma-zero", "noise"]),
        ("cifar10_robust_8px", "l1", [2, 20], ["apgd-ce", "fmn", "fab-t", "square", "noise"]),
        ("cifar10_robust_8px", "l2", [0.2, 1.5], ["pgd", "apgd-ce", "fab-t", "mi-fgsm", "square"]),
        ("cifar10_resnet20", "l2", [0.02, 0.2], ["pgd", "fmn", "ddn"]),
        ("cifar10_resnet20", "l0", [1, 9], ["sigma-zero"]),
    ],
)
def test_company_changes_nothing_on_real_networks(shared, factory, norm, eps, names):
    """Of what no attack finds, and not one bit: seven or two slots, and so another order."""
    model, (x, y) = network(shared, factory).module.eval(), first_images(shared, factory)
    twin, _, by_rows = fast_twin(model, x[:8])
    twin.by_rows = by_rows
    given = tasks(x[::40], y[::40])
    for name in names:
        attack = attacks.make(name, norm, classes=10, steps=12, queries=60)
        seven, two = (
            {o.position: o for o in attacks.run(twin, attack, given, eps, slots=slots, seed=0)} for slots in (7, 2)
        )
        assert len({o.rung for o in two.values()}) > 1 or name == "noise"
        for k, o in two.items():
            assert torch.equal(o.x_adv, seven[k].x_adv)
            assert (o.rung, o.restart, o.forwards) == (seven[k].rung, seven[k].restart, seven[k].forwards)


@pytest.mark.long
@pytest.mark.parametrize(
    ("factory", "norm", "eps"),
    [
        ("mnist_robust_03", "linf", [0.2, 0.4]),
        ("cifar10_robust_8px", "l0", [9, 40]),
        ("cifar10_resnet20", "l2", [0.02, 0.2]),
    ],
)
def test_batch_size_changes_no_nearest_adversarial_of_real_networks(shared, factory, norm, eps):
    """Nor what the model itself says of it, if it is given twelve at once or more."""
    model, (x, y) = network(shared, factory), first_images(shared, factory)
    options = {"attacks": ["fmn", "sigma-zero"] if norm == "l0" else ["fmn"], "norm": norm, "eps": eps, "steps": 20}
    small, large = (robust.run(model, (x[::20], y[::20]), **options, batch_size=b).samples for b in (13, 64))
    assert small.success.any()
    assert_frame_equal(small, large, check_exact=True)
