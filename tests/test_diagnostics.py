"""Whether the numbers can be believed: faults planted in a model are found, and a sound one raises no alarm."""

import pytest
import torch
from torch import nn

import attacks
import robust
import robust.api
from robust.diagnostics import _comparisons, standing_unproved
from toys import Linear, Outputs, conv_net, images


def level(run, name):
    return {finding.name: finding.level for finding in run.findings}[name]


def message(run, name):
    return {finding.name: finding.message for finding in run.findings}[name]


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


def test_steps_that_cannot_reach_the_edge_of_the_ball_are_told(model, data):
    for size, said in ((0.001, "warn"), (0.2, "pass")):
        run = robust.run(model, data, attacks=["pgd"], eps=0.02, steps=20, step_size=size, random_start=False)
        assert level(run, "attack strength") == said


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


def test_every_attack_that_goes_on_by_gradients_is_known_to_search_on(model, data):
    """Those of ATTACKS, whichever they are, and the ensembles; of foolbox's nobody knows."""
    few = data[0][5:9], data[1][5:9]
    for name, kind in attacks.ATTACKS.items():
        if kind.needs_grad and name not in ("fgsm", "transfer"):
            norm = kind.norms[0]
            run = robust.run(model, few, attacks=[name], norm=norm, eps=1 if norm == "l0" else 0.01, steps=10)
            assert level(run, "attack strength") == "pass", name
    assert level(robust.run(model, few, attacks=["foolbox:LinfPGD"], eps=0.01), "attack strength") == "warn"


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


@pytest.mark.parametrize(("wrong", "said"), [(1, "warn"), (3, "warn"), (4, "fail")])
def test_few_images_that_are_wrong_prove_no_wrong_labels(model, wrong, said):
    x = images(wrong)
    run = robust.run(model, (x, (model(x).argmax(1) + 1) % 5), attacks=["noise"], eps=[0.01])
    assert level(run, "clean accuracy") == said


@pytest.mark.parametrize(("right", "said"), [(12, "fail"), (13, "warn"), (18, "warn"), (20, "pass")])
def test_what_may_be_guessing_is_not_passed(right, said):
    """Of 60 images on 5 classes, where 12 are right by chance."""
    model = Outputs(lambda x: torch.eye(5)[torch.zeros(len(x), dtype=torch.long)] + x.sum((1, 2, 3))[:, None] * 1e-3)
    y = torch.tensor([0] * right + [1] * (60 - right))
    run = robust.run(model, (images(60), y), attacks=["noise"], eps=0.01)
    assert level(run, "clean accuracy") == said


@pytest.mark.parametrize(
    ("attack", "options", "said"),
    [
        ("pgd", {"norm": "linf", "eps": 0.001}, "and --attack autoattack may leave fewer"),
        ("pgd", {"norm": "linf", "eps": 0.001, "eot": 2}, "and --attack autoattack-rand may leave fewer"),
        ("sigma-zero", {"norm": "l0", "eps": 1, "steps": 10}, "and a stronger attack may leave fewer"),
    ],
)
def test_what_stands_without_a_proof_is_an_upper_bound(model, data, attack, options, said):
    run = robust.run(model, (data[0][5:9], data[1][5:9]), attacks=[attack], **options)
    unproved = standing_unproved(run.store, run.summary)
    assert unproved == round(run.summary.robust_accuracy.iloc[-1] * 4) > 0
    assert message(run, "attack strength").endswith(f"without a proof: an upper bound, {said}")
    assert level(run, "attack strength") == "pass"


def test_what_autoattack_left_or_nothing_is_no_mere_bound(model, data):
    few = data[0][5:9], data[1][5:9]
    run = robust.run(model, few, attacks=["pgd"], eps=0.001)
    assert standing_unproved(run.store, run.summary) > 0
    assert standing_unproved(run.store, run.summary.replace({"attack": {"pgd": "autoattack"}})) == 0
    run = robust.run(model, few, attacks=["pgd"], eps=0.3)
    assert standing_unproved(run.store, run.summary) == 0
    assert "upper bound" not in message(run, "attack strength")


def test_a_result_that_is_proved_is_not_doubted():
    """On a network that is sure of everything no attack has anything to do: neither is its idleness a sign."""
    steady = nn.Sequential(nn.Flatten(), nn.Linear(432, 5))
    steady[1].weight.data = torch.linspace(-1e-3, 1e-3, 5 * 432).view(5, 432)
    steady[1].bias.data = torch.arange(5.0)
    x = images(20)
    run = robust.run(steady.eval(), (x, steady(x).argmax(1)), attacks=["fgsm", "pgd"], eps=0.01, certify=True)
    assert run.store.certified() == [20] and standing_unproved(run.store, run.summary) == 0
    said = {finding.name: finding.message for finding in run.findings}
    assert {f.name for f in run.findings if f.level != "pass"} == {"sample size"}
    assert said["falls with eps"] == "no image fell at any eps, nor could one: all that stand are certified"
    assert not {"more steps", "re-verification"} & set(said)
    run = robust.run(steady, (x, steady(x).argmax(1)), attacks=["autoattack"], eps=0.01)
    assert "gradients inside autoattack" not in {finding.name for finding in run.findings}


def test_nothing_is_said_of_attacks_where_nothing_was_attacked(model, data):
    x = data[0]
    run = robust.run(model, (x, (model(x).argmax(1) + 1) % 5), attacks=["fgsm", "pgd", "noise"], eps=0.02)
    preflight = {"eval mode", "deterministic", "rows independent", "logits", "gradients"}
    assert {finding.name for finding in run.findings} == preflight | {"clean accuracy", "sample size"}


def test_the_widths_named_are_those_on_the_page(model, data):
    run = robust.run(model, data, attacks=["pgd"], eps=[0.001, 0.3])  # 35 of 40, and none
    assert message(run, "sample size") == (
        "only 40 images: 95 % intervals are 21 points wide for the clean accuracy and "
        "9 for the worst case at the largest eps"
    )
