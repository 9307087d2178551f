"""The attack suite inside the harness: least distances, ensembles, random models, surrogates, the norms l1 and l0."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import attacks
import robust
from attacks.evaluation import vote
from reports.html import _least
from robust.baseline import from_store
from robust.errors import InputError
from robust.gate import compare
from robust.pairing import Incomparable
from robust.units import format_distance
from toys import conv_net, images

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module")
def model():
    return conv_net()


@pytest.fixture(scope="module")
def data(model):
    x = (images(30) * 255).round() / 255
    with torch.no_grad():
        return x, model(x).argmax(1)


def findings(run):
    return {finding.name: finding for finding in run.findings}


# Least distances


@pytest.mark.parametrize(("name", "norm", "eps"), [("fmn", "linf", 0.02), ("ddn", "l2", 0.3), ("fab-t", "l1", 3.0)])
def test_the_nearest_adversarials_are_stored_and_answer_for_every_eps(model, data, name, norm, eps):
    few, many = [eps], [eps * k / 5 for k in range(1, 6)]
    one, run = (robust.run(model, data, attacks=[name], norm=norm, eps=radii, steps=30) for radii in (few, many))
    nearest = run.store.nearest(name)
    assert nearest == one.store.nearest(name) and len(nearest) > 20
    for k, radius in enumerate(many):
        rows = run.samples[run.samples.eps == radius]
        broken = {int(i) for i in rows.sample_id[rows.success]}
        assert broken == {position for position, distance in nearest.items() if distance <= radius * (1 + 1e-5)}, k
    found = run.samples[run.samples.success]
    assert np.allclose(found[f"distance_{norm}"], [nearest[int(i)] for i in found.sample_id])
    # Everything was evaluated once, whatever the number of eps.
    assert run.samples.forwards.sum() == one.samples.forwards.sum()


def test_a_nearest_point_beyond_every_eps_is_no_success_and_no_picture(model, data):
    run = robust.run(model, data, attacks=["fmn"], eps=[1e-5], steps=20, save_adversarials=True)
    assert run.store.nearest("fmn") and not run.samples.success.any()
    assert run.samples.distance_linf.isna().all()
    assert not run.store.pictures() and not list(run.store.adversarials())


def test_the_report_draws_the_exact_curve_and_says_the_median(model, data, tmp_path):
    run = robust.run(model, data, attacks=["fmn", "pgd"], eps=[0.005, 0.02], steps=20, output=tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text()
    distances, right = sorted(run.store.nearest("fmn").values()), len(data[1])
    assert "fmn looks for the least distance" in text and run.summary.clean_accuracy.eq(1).all()
    half = distances[(right + 1) // 2 - 1]
    assert f"half of them break within linf {format_distance(half, 'linf', 0.02)}" in text


@pytest.mark.parametrize(
    ("distances", "correct", "median"),
    [([1.0], 2, 1.0), ([1.0, 2.0], 3, 2.0), ([1.0, 2.0, 3.0, 5.0], 4, 2.0), ([1.0], 3, np.inf), ([], 1, np.inf)],
)
def test_the_median_is_where_half_are_broken(distances, correct, median):
    assert _least("fmn", np.array(distances), correct)["median"] == median


def test_descriptions_have_no_holes(model, data):
    names = [name for name in attacks.ATTACKS if "linf" in attacks.ATTACKS[name].norms and name != "transfer"]
    run = robust.run(model, data, attacks=[*names, "foolbox:LinfFastGradientAttack"], eps=0.1, steps=2, queries=2)
    for attack in run.store.details["attacks"]:
        assert not re.search(r"[`{}]|\bNone\b", attack["description"]), attack


def test_the_report_describes_an_attack_in_whole_sentences(model, data):
    described = robust.run(model, data, attacks=["ddn"], norm="l2", eps=0.1, steps=20).store.details["attacks"]
    assert described[0]["description"].startswith("20 steps: the first tenth of them")
    assert described[0]["description"].endswith("search between the best point and the image.")


@pytest.mark.parametrize(("name", "norm"), [("fmn", "linf"), ("fab-t", "l2"), ("ddn", "l2"), ("sigma-zero", "l0")])
def test_a_search_that_finds_nothing_is_no_bug(data, name, norm):
    class Sure(nn.Module):
        def forward(self, x):
            return conv_net()(x) * 0.01 + 50 * torch.eye(5)[0]

    run = (
        robust.run(Sure(), (data[0], 0 * data[1]), attacks=[name], norm=norm, eps=2, steps=5)
        if norm == "l0"
        else (robust.run(Sure(), (data[0], 0 * data[1]), attacks=[name], norm=norm, eps=0.1, steps=5))
    )
    assert not run.samples.success.any() and not run.store.nearest(name)
    assert run.summary.robust_accuracy.eq(1).all() and run.answer


def test_a_nearest_point_that_rounding_refutes_is_tried_a_little_farther_out(model, data, monkeypatch):
    # A twin that errs a little too early: what is nearest on it is not adversarial on the model.
    class Early(nn.Module):
        def forward(self, x):
            logits = model(x)
            best = logits.detach().argmax(1, keepdim=True)
            return logits.scatter_add(1, best, torch.full_like(logits[:, :1], -1e-4))

    monkeypatch.setattr(robust.harness, "fast_twin", lambda module, x: (Early(), "early", False))
    run = robust.run(model, data, attacks=["fmn"], eps=0.02, steps=40)
    monkeypatch.undo()
    honest = robust.run(model, data, attacks=["fmn"], eps=0.02, steps=40)
    ours, theirs = run.store.nearest("fmn"), honest.store.nearest("fmn")
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert all(ours[k] <= 1.07 * theirs[k] for k in ours)


# Options


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        (["square"], {"steps": 5}, "steps means nothing to square: leave it out, or .*: pgd, .*, many of foolbox's"),
        (["pgd", "fgsm"], {"queries": 100}, "queries means nothing to pgd or fgsm: .* takes it: square "),
        (["fmn"], {"random_start": False}, "random_start means nothing to fmn: .*: pgd, many"),
        (["fgsm"], {"random_start": True}, "random_start means nothing to fgsm"),
        (["apgd-ce"], {"step_size": 0.1}, "step_size means nothing to apgd-ce: .*: pgd, fmn, many"),
        (["autoattack"], {"steps": 9}, "steps means nothing to autoattack"),
        (["autoattack"], {"queries": 9}, "queries means nothing to autoattack"),
        (["autoattack"], {"restarts": 2}, "restarts means nothing to autoattack"),
        (["autoattack-rand"], {"step_size": 0.1}, "step_size means nothing to autoattack-rand"),
        (["fgsm", "mi-fgsm"], {"restarts": 5}, "restarts means nothing to fgsm or mi-fgsm: .*: pgd, apgd-ce"),
        (["pgd"], {"restarts": 5, "random_start": False}, "restarts means nothing to pgd without a random start"),
        (["foolbox:FGSM"], {"steps": 9}, "steps means nothing to foolbox:FGSM"),
        (["foolbox:DDNAttack"], {"step_size": 0.1, "norm": "l2"}, "step_size means nothing to foolbox:DDNAttack"),
        (None, {"queries": 100}, "queries means nothing to fgsm or pgd or noise"),
        # Attacks of the norm are named.
        (None, {"random_start": False, "norm": "l1"}, "apgd-ce or fmn or noise: .* takes it: many of foolbox's"),
        (None, {"queries": 9, "norm": "l0", "eps": 5}, r"fmn or noise: leave it out \(see attacks\.takes"),
    ],
)
def test_an_option_that_no_attack_takes_is_refused(model, data, names, options, says):
    with pytest.raises(InputError, match=says) as caught:
        robust.run(model, data, attacks=names, **{"eps": 0.02, **options})
    assert "\n" not in str(caught.value)


def test_an_option_goes_to_the_attacks_that_take_it_and_the_others_keep_their_own(model, data):
    x, y = data[0][:4], data[1][:4]
    options = {"steps": 3, "queries": 20, "restarts": 2, "random_start": False}
    run = robust.run(model, (x, y), attacks=["fgsm", "pgd", "square", "mi-fgsm", "noise"], eps=1e-6, **options)
    forwards = run.samples.groupby("attack").forwards.unique().map(list).to_dict()
    # Twice where there is something random.
    assert forwards == {"fgsm": [2], "pgd": [4], "square": [40], "mi-fgsm": [4], "noise": [2]}
    assert robust.run(model, (x, y), eps=0.02, steps=3).samples.attack.nunique() == 3


def test_the_default_number_of_restarts_is_not_given(model, data):
    assert not robust.run(model, data, attacks=["fgsm"], eps=0.02, restarts=1).samples.empty


@pytest.mark.parametrize("name", sorted({*attacks.ATTACKS} - {"transfer"}))
def test_every_restart_asks_about_other_points(model, name):
    """And where nothing is random, there is only one run."""
    norm = attacks.ATTACKS[name].norms[0]
    sure = 50 * torch.eye(5)[0]
    asked = []

    def never_fooled(x):
        asked.append(x.detach().clone())
        return model(x) + sure

    def distinct(**options) -> int:
        asked.clear()
        attack = attacks.make(name, norm, steps=2, queries=4, **options)
        (outcome,) = attacks.run(never_fooled, attack, [attacks.Task(0, 0, images(1)[0], 0)], [4], slots=1, seed=0)
        assert not outcome.found
        return len(torch.cat(asked).flatten(1).unique(dim=0))

    once, twice = distinct(), distinct(restarts=2)
    assert twice > once if "restarts" in attacks.takes(name) else twice == once
    if "random_start" in attacks.takes(name):
        assert distinct(restarts=2, random_start=False) == distinct(random_start=False)


# Other norms


@pytest.mark.parametrize("norm", ["l1", "l0"])
def test_every_success_in_l1_and_l0_stands_up_to_an_independent_check(model, data, norm):
    _, y = data
    eps = {"l1": [1.0, 6.0], "l0": [4, 40]}[norm]
    run = robust.run(model, data, norm=norm, eps=eps, steps=30, save_adversarials=True)
    assert set(run.summary.attack) == {*robust.options.DEFAULT_ATTACKS[norm], "worst_case"}
    samples = run.samples.set_index(["sample_id", "attack", "eps"])
    saved = list(run.store.adversarials())
    assert len(saved) > 20
    for clean, attack, _, x_clean, x_adv in saved:
        delta = x_adv.astype(np.float64) - x_clean
        size = np.abs(delta).sum() if norm == "l1" else np.count_nonzero(delta)
        wrong = int(model(torch.tensor(x_adv)[None]).argmax()) != int(y[int(clean.sample_id)])
        assert wrong and x_adv.min() >= 0 and x_adv.max() <= 1
        for radius in eps:
            row = samples.loc[(clean.sample_id, attack, radius)]
            assert row.success == (size <= radius * (1 + 1e-5))
            if row.success:
                assert row[f"distance_{norm}"] == pytest.approx(size)


def test_in_l0_values_that_do_not_change_are_not_rounded(model):
    x = images(20)  # between the 256 levels
    run = robust.run(model, (x, model(x).argmax(1)), attacks=["fmn"], norm="l0", eps=60, steps=40)
    assert run.summary.robust_accuracy_8bit.iloc[0] < 0.5


def test_l0_counts_whole_values():
    with pytest.raises(InputError, match=r"whole number, not 2\.5"):
        robust.run(conv_net(), (images(2), torch.tensor([0, 1])), norm="l0", eps=2.5)
    with pytest.raises(InputError, match="larger than any change"):
        robust.run(conv_net(), (images(2), torch.tensor([0, 1])), norm="l0", eps=1000)


# Ensembles


def test_autoattack_is_the_worst_of_its_parts_and_says_what_each_did(model, data, tmp_path):
    names = ("apgd-ce", "apgd-t", "fab-t", "square")
    few, options = (data[0][18:38], data[1][18:38]), {"eps": 0.025, "certify": False}
    run = robust.run(model, few, attacks=["autoattack"], output=tmp_path / "run", **options)
    alone = robust.run(model, few, attacks=names, **options).samples.groupby("sample_id").success.any()
    together = run.samples.set_index("sample_id").success
    assert (alone == together).all() and 3 < together.sum() < len(together) - 3

    parts = run.store.components("autoattack")
    assert set(parts) == set(names)
    assert sum(parts.values()) == together.sum()
    text = (tmp_path / "run" / "report.html").read_text()
    assert all(f"<b>{part}</b> broke {count}" in text for part, count in parts.items())
    assert findings(run)["attack strength"].level == "pass"


def test_with_three_classes_the_report_says_what_gave_way(data):
    model = conv_net(classes=3)
    run = robust.run(model, (data[0], model(data[0]).argmax(1)), attacks=["autoattack"], eps=0.02)
    assert set(run.store.components("autoattack")) == {"apgd-ce", "apgd-dlr", "fab-t", "square"}
    assert "gives way to apgd-dlr" in findings(run)["parts of autoattack"].message
    assert findings(run)["attack strength"].message.startswith("autoattack is what the classes allow of")


def test_square_that_beats_gradients_is_a_warning():
    class Masked(nn.Module):
        """The gradient says nothing of where the boundary is."""

        def __init__(self):
            super().__init__()
            self.net = conv_net()

        def forward(self, x):
            logits = self.net(x)
            return logits.detach() + 1e-9 * (x - x.detach()).flatten(1).sum(1, keepdim=True)

    x = images(30)
    model = Masked()
    y = model(x).argmax(1)
    run = robust.run(model, (x, y), attacks=["apgd-ce", "square"], eps=0.06, steps=5, queries=200)
    assert findings(run)["square against gradients"].level == "warn"


def test_a_later_part_never_makes_a_sample_robust_again(model, data):
    class Far(attacks.ATTACKS["fmn"]):
        """Finds something, but only far out."""

        name, queries = "far", 1

        def init(self, state, noise):
            state.query = 1 - state.x.round()
            return state

    x, y = data
    eps = [0.005, 0.02, 0.05, 0.5, 1.0]
    first = attacks.make("apgd-ce", "linf", steps=20)
    ensemble = attacks.Ensemble(name="two", norm="linf", stages=(first, Far(norm="linf")))
    tasks = [attacks.Task(k, k, x[k], int(y[k])) for k in range(len(x))]
    alone, both = (
        {o.position: o for o in attacks.run(model, attack, tasks, eps, slots=30, seed=0)}
        for attack in (first, ensemble)
    )
    for k, outcome in alone.items():
        assert both[k].rung is not None and both[k].rung <= (4 if outcome.rung is None else outcome.rung)
        assert both[k].component == "apgd-ce" or outcome.rung is None
    assert len({outcome.rung for outcome in alone.values()}) > 2


# Random models


class Jittery(nn.Module):
    """Adds noise of its own to the logits."""

    def __init__(self, scale: float):
        super().__init__()
        self.net, self.scale = conv_net(), scale

    def forward(self, x):
        logits = self.net(x)
        return logits + self.scale * torch.randn_like(logits)


def test_lucky_draws_are_no_success_where_the_draws_vote(data):
    model = Jittery(float(conv_net()(data[0]).std().detach()) * 0.4)
    lucky = robust.run(model, data, attacks=["noise"], eps=1e-4, restarts=10)
    sober = robust.run(model, data, attacks=["noise"], eps=1e-4, restarts=10, eot=25)
    assert findings(lucky)["deterministic"].level == "warn" and findings(sober)["deterministic"].level == "pass"
    assert sober.samples.success.mean() < lucky.samples.success.mean()
    again = robust.run(model, data, attacks=["noise"], eps=1e-4, restarts=10, eot=25)
    assert again.samples.equals(sober.samples)
    assert (sober.samples.forwards % 25 == 0).all() and sober.samples.forwards.max() >= 250


def test_autoattack_rand_votes_without_being_told(data):
    run = robust.run(Jittery(1e-3), (data[0][:12], data[1][:12]), attacks=["autoattack-rand"], eps=0.02)
    assert run.store.identity["options"]["eot"] is None
    assert findings(run)["deterministic"].level == "pass"
    assert set(run.store.components("autoattack-rand")) == {"apgd-ce", "apgd-dlr"}
    assert (run.samples.forwards % 20 == 0).all()


def test_the_global_random_state_is_as_it_was(data):
    before = torch.random.get_rng_state()
    robust.run(Jittery(0.1), data, attacks=["apgd-ce", "square"], eps=0.02, steps=3, queries=5)
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_a_random_model_refutes_is_attacked_at_the_larger_eps(data):
    model = Jittery(float(conv_net()(data[0]).std().detach()) * 0.2)
    run = robust.run(model, data, attacks=["pgd"], eps=[0.01, 0.3, 0.6], steps=10, eot=3)
    refuted, _ = run.store.twin_disagreements()
    assert refuted > 0
    assert run.summary[run.summary.attack == "pgd"].robust_accuracy.iloc[-1] < 0.2


class Dim(nn.Module):
    """Class 1 where the image is darker than grey by more than noise of a twentieth."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        brightness = x.flatten(1).mean(1) - 0.5
        return torch.stack([brightness, -brightness], 1) * self.gain + 0.5 * torch.randn(len(x), 2)


@pytest.mark.parametrize("name", ["fab-t", "fmn"])
def test_a_random_models_least_distance_is_not_that_of_its_luckiest_vote(name):
    x, y = torch.full((60, 1, 2, 2), 0.55), torch.zeros(60, dtype=torch.long)
    run = robust.run(Dim(), (x, y), attacks=[name, "pgd"], eps=[0.04, 0.5], steps=20, eot=20)
    standing = run.summary[run.summary.eps == 0.5].set_index("attack").robust_accuracy
    assert standing[name] < 0.1 and standing["pgd"] < 0.1
    distances = np.array([*run.store.nearest(name).values()])
    assert distances.min() > 0 and 0.02 < np.median(distances) < 0.1


@pytest.mark.parametrize("steps", [5, 40])
def test_an_attack_goes_on_from_a_majority_that_may_be_lucky(steps):
    """At x - eps every draw is fooled; the first majority on the way there is one of chance."""
    x, y = torch.full((60, 1, 2, 2), 0.55), torch.zeros(60, dtype=torch.long)
    run = robust.run(Dim(), (x, y), attacks=["pgd"], eps=0.1, steps=steps, eot=20)
    assert run.summary.robust_accuracy.iloc[0] == 0
    assert run.store.twin_disagreements() == (0, 0)


def test_classes_with_as_many_votes_are_told_apart_by_their_logits_and_not_by_their_numbers():
    low = torch.tensor([[3.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 9.0]])
    assert vote(low).tolist() == [2] and vote([one.flip(1) for one in low]).tolist() == [0]
    more = *low, torch.tensor([[0.1, 0.0, 0.0]])
    assert vote(more).tolist() == [0]


# Surrogates


def test_transfer_needs_a_surrogate_of_the_same_classes_and_size(model, data):
    with pytest.raises(InputError, match="name it with surrogate"):
        robust.run(model, data, attacks=["transfer"], eps=0.02)
    with pytest.raises(InputError, match="for attack transfer only"):
        robust.run(model, data, attacks=["pgd"], eps=0.02, surrogate=model)
    with pytest.raises(InputError, match="the surrogate resnet5: unknown model 'resnet5'; did you mean resnet50"):
        robust.run(model, data, attacks=["transfer"], eps=0.02, surrogate="resnet5")
    with pytest.raises(InputError, match="has 3 classes and the model 5"):
        robust.run(model, data, attacks=["transfer"], eps=0.02, surrogate=conv_net(classes=3))
    with pytest.raises(InputError, match="cannot read the model's images, 3 x 12 x 12"):
        robust.run(model, data, attacks=["transfer"], eps=0.02, surrogate=nn.Sequential(nn.Flatten(), nn.Linear(7, 5)))


def test_a_surrogate_takes_images_of_the_models_size(model, data, tmp_path, monkeypatch):
    """Another size it might read, and see less in it; one that is named is both networks'."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(
        """
from torch import nn

def net(size):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.input_size = (3, size, size)
    return model

def twelve():
    return net(12)

def sixteen():
    return net(16)
"""
    )
    arguments = {"attacks": ["transfer"], "eps": 0.1}
    assert robust.run(model, data, **arguments, surrogate="nets.py:twelve").samples.forwards.sum() > 0
    with pytest.raises(InputError, match=r"the surrogate sixteen takes 3 x 16 x 16 \(.*\) and the .* 3 x 12 x 12"):
        robust.run(model, data, **arguments, surrogate="nets.py:sixteen")
    robust.run("nets.py:twelve", data, **arguments, surrogate="nets.py:sixteen", input_size=12)


class Pairs(nn.Module):
    """Takes two images at a time, and no other number."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        if len(x) != 2:
            raise ValueError("not two")
        return self.net(x)


def test_a_surrogate_that_fails_under_attack_is_named(model, data):
    with pytest.raises(InputError, match="the surrogate Pairs fails under attack: ValueError: not two"):
        robust.run(model, data, attacks=["transfer"], eps=0.1, surrogate=Pairs())


def test_runs_that_crafted_on_other_surrogates_are_not_compared(model, data):
    """Though both are called Sequential."""
    runs = [
        from_store(robust.run(model, data, attacks=["transfer"], eps=0.1, surrogate=conv_net(seed=seed)).store)
        for seed in (8, 8, 9)
    ]
    assert compare(*runs[:2]).passed
    with pytest.raises(Incomparable, match=r"transfer's surrogate \(Sequential \(\w{12}\) there"):
        compare(*runs[1:])


def test_a_surrogate_comes_back_as_it_was_and_needs_a_gradient(model, data):
    surrogate = conv_net(seed=3).train()
    robust.run(model, data, attacks=["transfer"], eps=0.02, surrogate=surrogate)
    assert surrogate.training and all(parameter.requires_grad for parameter in surrogate.parameters())

    class Blind(nn.Module):
        @torch.no_grad()
        def forward(self, x):
            return surrogate(x)

    with pytest.raises(InputError, match="passes no gradient"):
        robust.run(model, data, attacks=["transfer"], eps=0.02, surrogate=Blind().eval())
    with pytest.raises(InputError, match=r"the surrogate Sequential: the model's 1\.weight is not initialised"):
        lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
        robust.run(model, data, attacks=["transfer"], eps=0.02, surrogate=lazy)


def test_transfer_counts_only_what_the_model_was_asked(model, data):
    run = robust.run(model, data, attacks=["transfer", "mi-fgsm"], eps=0.05, surrogate=conv_net(seed=3))
    by = run.samples.groupby("attack")
    assert by.forwards.max()["transfer"] == 1 and by.gradients.max()["transfer"] == 0
    assert by.success.sum()["transfer"] < by.success.sum()["mi-fgsm"]
    assert run.store.identity["surrogate"]["name"] == "Sequential"
    assert findings(run)["transfer against gradients"].level == "pass"


# On a network that is provably robust


@pytest.mark.long
@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="needs the shared networks")
def test_no_attack_breaks_what_interval_bounds_certify():
    namespace: dict = {"__file__": str(SHARED / "models" / "architectures.py")}
    exec((SHARED / "models" / "architectures.py").read_text(), namespace)
    model = namespace["mnist_robust_03"]()
    with np.load(SHARED / "data" / "mnist_test.npz") as file:
        x, y = torch.tensor(file["x"][:150])[:, None] / 255, torch.tensor(file["y"][:150]).long()
    eps = 0.05
    certified = certify(model, x, y, eps)
    assert 20 < int(certified.sum()) < 150
    names = ["apgd-ce", "apgd-t", "fab-t", "square", "fmn", "pgd"]
    options = {"eps": [eps, 0.4], "steps": 20, "queries": 100, "batch_size": 150, "certify": False}
    run = robust.run(model, (x, y), attacks=names, **options)
    at = run.samples[run.samples.eps == eps]
    broken = at.groupby("sample_id").success.any().to_numpy()
    assert not (broken & certified.numpy()).any()
    assert run.samples[run.samples.eps == 0.4].groupby("sample_id").success.any().sum() > 30


def certify(model: nn.Sequential, x, y, eps: float):
    """(N,) bool: whether interval bounds prove that no point within eps in linf changes the class.

    The last layer is merged with the differences of the logits, or the bounds would say next to nothing.
    """
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    *body, last = list(model)
    with torch.no_grad():
        for layer in body:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                middle, radius = (low + high) / 2, (high - low) / 2
                plain = nn.functional.linear if isinstance(layer, nn.Linear) else layer._conv_forward
                spread = plain(radius, layer.weight.abs(), None)
                middle = layer(middle)
                low, high = middle - spread, middle + spread
            else:
                low, high = layer(low), layer(high)
        difference = last.weight[y][:, None] - last.weight[None]  # (N, K, d): of the label and each class
        bias = last.bias[y][:, None] - last.bias[None]
        middle, radius = (low + high) / 2, (high - low) / 2
        least = (difference * middle[:, None]).sum(2) + bias - (difference.abs() * radius[:, None]).sum(2)
        return (least.scatter(1, y[:, None], torch.inf) > 0).all(1)


def test_an_attack_breaks_nothing_that_is_certified_on_a_linear_network():
    # The planted fault: an attack that steps outside of eps is told by the bound.
    class Line(nn.Module):
        def forward(self, x):
            f = x.flatten(1).sum(1) - 6
            return torch.stack([f, -f], 1)

    x = torch.full((1, 1, 3, 3), 0.7)  # f = 0.3, so linf 0.3 / 9
    outcomes = [
        next(attacks.run(Line(), attacks.make(name, "linf"), [attacks.Task(0, 0, x[0], 0)], [0.033], slots=1, seed=0))
        for name in ("apgd-ce", "square", "fab-t", "fmn")
    ]
    assert all(outcome.rung is None for outcome in outcomes)
