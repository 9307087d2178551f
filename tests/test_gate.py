"""The gate as a pure function: what is paired, what changed, what fails and why."""

import math
from dataclasses import replace

import numpy as np
import pytest

from gate_runs import MODEL, OPTIONS, PGD, verdicts
from robust.errors import InputError
from robust.gate import Comparison, Incomparable, Rules, compare
from robust.statistics import WORST_CASE
from robust.store import Finding
from robust.text import format_bare_p, format_p, format_points, visible
from robust.verdicts import CLEAN, Row


def share(n: int, right: int) -> list[int]:
    return [1] * right + [0] * (n - right)


def change(comparison: Comparison, attack: str, eps: float = 0.1):
    return next(
        c for c in comparison.changes if c.row.attack == attack and c.row.eps == (0 if attack == CLEAN else eps)
    )


# What changed


def test_changes_by_hand():
    before = verdicts({("pgd", 0.1): [1, 1, 1, 0, 0, 0, 0, 0]}, clean=[1, 1, 1, 1, 1, 1, 0, 0])
    after = verdicts({("pgd", 0.1): [0, 0, 1, 1, 0, 0, 0, 0]}, clean=[1, 1, 1, 1, 1, 0, 0, 0])
    comparison = compare(before, after)
    pgd = change(comparison, "pgd")
    assert (pgd.n, pgd.before, pgd.after, pgd.change) == (8, 3, 2, -1 / 8)
    assert sorted(comparison.ids(pgd.fell)) == ["0000.png", "0001.png"]
    assert comparison.ids(pgd.rose) == ["0003.png"]
    # Two of three changed fell: 2 * P(binomial(3, 1/2) <= 1) = 1.
    assert pgd.p_value == 1
    assert pgd.low < -1 / 8 < pgd.high
    clean = change(comparison, CLEAN)
    assert (clean.before, clean.after, comparison.ids(clean.fell)) == (6, 5, ["0005.png"])
    assert [c.row for c in comparison.changes] == [
        Row(CLEAN, "", 0.0), Row("pgd", "linf", 0.1), Row(WORST_CASE, "linf", 0.1),
    ]  # fmt: skip


def test_p_values_are_corrected_over_the_rows():
    n = 100
    before = {("fgsm", 0.1): share(n, 50), ("pgd", 0.1): share(n, 50)}
    # 10 fall to fgsm, another 8 to pgd, so 18 in the worst case.
    after = {("fgsm", 0.1): [0] * 10 + [1] * 40 + [0] * 50, ("pgd", 0.1): [1] * 42 + [0] * 58}
    comparison = compare(verdicts(before), verdicts(after))
    raw = {c.row.attack: c.p_value for c in comparison.changes}
    assert raw == {CLEAN: 1, "fgsm": 2 * 0.5**10, "pgd": 2 * 0.5**8, WORST_CASE: 2 * 0.5**18}
    # Holm over four rows: the smallest times 4, the next times 3 ...
    assert {c.row.attack: c.p_adjusted for c in comparison.changes} == pytest.approx(
        {WORST_CASE: 8 * 0.5**18, "fgsm": 6 * 0.5**10, "pgd": 4 * 0.5**8, CLEAN: 1}
    )
    assert comparison.tests == 4


def test_the_worst_case_is_taken_per_sample():
    before = verdicts({("fgsm", 0.1): [1, 1, 0, 0], ("pgd", 0.1): [0, 1, 1, 0]})
    worst = change(compare(before, before), WORST_CASE)
    assert worst.before == 1  # each attack leaves two of four, both together one


def test_the_worst_case_over_one_attack_is_no_test_of_its_own():
    comparison = compare(verdicts({("pgd", 0.1): share(50, 25)}), verdicts({("pgd", 0.1): share(50, 19)}))
    assert comparison.tests == 2  # clean, and pgd
    assert change(comparison, "pgd").p_adjusted == change(comparison, WORST_CASE).p_adjusted == 2 * 2 * 0.5**6


def test_the_control_is_shown_beside_attacks_and_raises_no_bar():
    n = 100
    before = {("fgsm", 0.1): share(n, 60), ("noise", 0.1): share(n, 90)}
    # 9 fall to the attack; nobody asks whether the control's fall is significant, though it is.
    after = {("fgsm", 0.1): share(n, 51), ("noise", 0.1): share(n, 70)}
    comparison = compare(verdicts(before), verdicts(after), Rules(max_drop=0.05))
    assert comparison.tests == 3  # clean, the attack, the worst case over both
    control = change(comparison, "noise")
    assert np.isnan(control.p_adjusted) and control.p_value < 0.001 and not comparison.is_fall(control)
    assert "the control, not tested" in str(control)
    assert {failure.row.attack for failure in comparison.failures} == {"fgsm", WORST_CASE}
    alone = compare(*(verdicts({("noise", 0.1): run["noise", 0.1]}) for run in (before, after)))
    assert alone.tests == 2 and {failure.row.attack for failure in alone.failures} == {"noise", WORST_CASE}


def test_the_order_of_the_samples_says_nothing():
    rng = np.random.default_rng(0)
    bits, ids = rng.integers(0, 2, 40), [f"{k}.png" for k in range(40)]
    labels, hashes = rng.integers(0, 5, 40).tolist(), [f"{k:064x}" for k in range(40)]
    mixed = rng.permutation(40)
    one = verdicts({("pgd", 0.1): bits}, ids=ids, labels=labels, sha256=hashes)
    other = verdicts(
        {("pgd", 0.1): bits[mixed]},
        ids=[ids[k] for k in mixed],
        labels=[labels[k] for k in mixed],
        sha256=[hashes[k] for k in mixed],
    )
    assert all(not len(c.fell) and not len(c.rose) for c in compare(one, other).changes)


# The rules


@pytest.mark.parametrize(
    ("fell", "rose", "rules", "passed", "reason"),
    [
        (0, 0, {}, True, "nothing changed"),
        (5, 0, {}, True, "p = 0.0625, times 2 rows: may be chance"),
        (7, 0, {}, False, "p = 0.0156, times 2 rows: significant"),
        (0, 30, {}, True, "a rise is no regression"),
        (30, 30, {}, True, "as many fell as rose"),
        (3, 0, {"max_drop": 0.02}, False, "3 points are more than 2, whatever the test says"),
        (2, 0, {"max_drop": 0.02}, True, "2 points are not more than 2"),
        (20, 18, {"max_drop": 0.02}, True, "the drop is what is left after the rises"),
        (7, 0, {"max_drop": 0.1}, True, "given max_drop alone, the test does not decide"),
        (7, 0, {"max_drop": 0.1, "significant": 0.05}, True, "significant, but not large"),
        (3, 0, {"max_drop": 0.02, "significant": 0.05}, True, "large, but not significant"),
        (12, 0, {"max_drop": 0.1, "significant": 0.05}, False, "both"),
        (7, 0, {"significant": 0.01}, True, "p = 0.0156 at 0.01"),
        (0, 0, {"min_robust_accuracy": 0.5}, True, "exactly the least"),
        (1, 0, {"min_robust_accuracy": 0.5}, False, "49 %"),
        (0, 0, {"min_robust_accuracy": 0.45, "strict": True}, False, "50 % of 100, Wilson from 40.4 %"),
        (0, 0, {"min_robust_accuracy": 0.4, "strict": True}, True, "50 % of 100, Wilson from 40.4 %"),
        (0, 0, {"min_clean_accuracy": 1}, True, "all are right unchanged"),
        (0, 0, {"min_clean_accuracy": 0.97, "strict": True}, False, "100 of 100, Wilson from 96.3 %"),
    ],
)
def test_rules(fell, rose, rules, passed, reason):
    before = [1] * 50 + [0] * 50
    after = [0] * fell + [1] * (50 - fell) + [1] * rose + [0] * (50 - rose)
    comparison = compare(verdicts({("pgd", 0.1): before}), verdicts({("pgd", 0.1): after}), Rules(**rules))
    assert comparison.passed is passed, reason
    assert comparison.answer.startswith("PASS" if passed else "FAIL")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"max_drop": 2}, "max_drop is a share between 0 and 1, not 2; did you mean 0.02?"),
        ({"significant": -0.1}, "significant is a share between 0 and 1, not -0.1"),
        ({"min_robust_accuracy": math.nan}, "min_robust_accuracy is a share between 0 and 1, not nan"),
        ({"strict": True}, "strict is about a least accuracy: give min_robust_accuracy or min_clean_accuracy too"),
    ],
)
def test_rules_that_are_none_are_refused(rules, message):
    with pytest.raises(InputError) as error:
        Rules(**rules)
    assert str(error.value) == message


def test_every_rule_is_judged_on_every_row():
    run = verdicts({("fgsm", 0.1): [1, 0], ("fgsm", 0.2): [0, 0], ("pgd", 0.1): [1, 0], ("pgd", 0.2): [0, 0]})
    rules = Rules(max_drop=0.1, min_robust_accuracy=0.4, min_clean_accuracy=0.5)
    judged = [(j.rule, j.subject) for j in compare(run, run, rules).judgements]
    rows = [
        "clean accuracy",
        *(f"{attack} at linf {eps}" for attack in ("fgsm", "pgd", "worst case") for eps in (0.1, 0.2)),
    ]
    assert judged == [
        *(("max-drop", row) for row in rows),
        ("min-robust-accuracy", "worst case at linf 0.1"),
        ("min-robust-accuracy", "worst case at linf 0.2"),
        ("min-clean-accuracy", "clean accuracy"),
        ("checks", "eval mode"),
    ]


def test_eps_selects_the_rows():
    before = verdicts({("pgd", 0.1): share(50, 25), ("pgd", 0.2): share(50, 25)})
    after = verdicts({("pgd", 0.1): share(50, 25), ("pgd", 0.2): share(50, 5)})
    assert not compare(before, after).passed
    assert compare(before, after, Rules(eps=(0.1,))).passed
    with pytest.raises(InputError, match=r"runs/a has no eps 0\.3; it has 0\.1, 0\.2"):
        compare(before, after, Rules(eps=(0.3,)))


# Checks of the run


@pytest.mark.parametrize(
    ("name", "before", "now", "passed", "reason"),
    [
        ("eval mode", "pass", "warn", False, "a network that comes in training mode"),
        ("eval mode", "warn", "warn", True, "as it was"),
        ("eval mode", "warn", "pass", True, "better"),
        ("gradients", None, "fail", False, "a check that the baseline did not have counts as passed there"),
        ("more steps", "pass", "warn", True, "measured on the attacks' success: may wobble"),
        ("noise control", "pass", "fail", False, "masked gradients make a network look robust"),
        ("noise control", "fail", "fail", True, "as it was"),
    ],
)
def test_a_check_that_got_worse_fails(name, before, now, passed, reason):
    run = verdicts({("pgd", 0.1): [1, 0, 1, 0]})
    other = () if before is None else (Finding(name, before, "so"),)
    baseline = replace(run, findings=(Finding("deterministic", "pass", "agree"), *other))
    comparison = compare(baseline, replace(run, findings=(Finding(name, now, "the model is odd."),)))
    assert comparison.passed is passed, reason
    if not passed:
        assert comparison.answer == f"FAIL: {name} – the model is odd"
        assert comparison.causes == (f"{name} – the model is odd.",)


def test_checks_that_the_baseline_does_not_know_are_not_held_against_it():
    run = verdicts({("pgd", 0.1): [1, 0]}, findings=(Finding("eval mode", "warn", "training mode"),))
    assert compare(replace(run, findings=()), run).passed


# What cannot be compared

PAIR = {("pgd", 0.1): [1, 0, 1, 0]}
LADDER = {("pgd", eps): [1, 0, 1, 0] for eps in (0.1, 0.2, 0.3)}
IDS = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("before", "now", "reason"),
    [
        (verdicts(PAIR, ids=IDS), verdicts(PAIR, ids=list("wxyz")),
         "the two have no sample in common (4 there, 4 here)"),
        (verdicts(PAIR, ids=IDS), verdicts({("pgd", 0.1): [1, 0, 1]}, ids=IDS[:3]),
         "1 of 4 samples missing (the first: d)"),
        (verdicts(PAIR, ids=IDS), verdicts(PAIR, ids=["a", "b", "c", "é"]),
         "1 of 4 samples missing (the first: d); 1 new (the first: é)"),
        (verdicts(PAIR, ids=IDS), verdicts(PAIR, ids=IDS, labels=[0, 0, 1, 0]), "1 with another label (the first: c)"),
        (verdicts(PAIR, ids=IDS), verdicts(PAIR, ids=IDS, sha256=["0" * 63 + k for k in "0193"]),
         "1 with another content (the first: c)"),
        (verdicts(PAIR, ids=IDS), verdicts(PAIR, ids=IDS, sha256=[f"{k:064x}" for k in (1, 0, 2, 3)]),
         "2 with another content (the first: b); they are the same images in another order: give them unshuffled"),
        (verdicts(PAIR, options=OPTIONS | {"limit": 4}),
         verdicts(PAIR, ids=IDS, options=OPTIONS | {"limit": 4, "seed": 1}),
         "(drawn by --limit 4 --seed 0 there, drawn by --limit 4 --seed 1 here)"),
        (verdicts(PAIR), verdicts(PAIR, ids=IDS, options=OPTIONS | {"limit": 4}),
         "(all images there, drawn by --limit 4 --seed 0 here)"),
        (verdicts(PAIR), verdicts(PAIR, model=MODEL | {"num_classes": 10}), "the model has 10 classes, and had 5"),
        (verdicts(PAIR), verdicts(PAIR, options=OPTIONS | {"target": "cat"}), "option target (None there, cat here)"),
        (verdicts(PAIR), verdicts(PAIR, options=OPTIONS | {"to_come": 1}), "option to_come (None there, 1 here)"),
        (verdicts(PAIR), verdicts(PAIR, attacks={"pgd": PGD | {"steps": 40}}), "pgd's steps (10 there, 40 here)"),
        (verdicts(PAIR), verdicts(PAIR, attacks={"pgd": PGD | {"restarts": 5, "random_start": False}}),
         "pgd's random_start (True there, False here); pgd's restarts (1 there, 5 here)"),
        (verdicts(PAIR), verdicts(PAIR, norm="l2"), "pgd ran in l2, not in linf"),
        (verdicts(PAIR), verdicts({("fgsm", 0.1): [1, 0, 1, 0]}), "pgd is missing"),
        (verdicts(PAIR),
         verdicts({("fgsm", 0.1): [1, 0, 1, 0]}, findings=(Finding("attack pgd", "fail", "no memory"),)),
         "pgd failed: no memory"),
        (verdicts(LADDER), verdicts({("pgd", eps): [1, 0, 1, 0] for eps in (0.1, 0.2)}), "pgd lacks eps 0.3"),
        (verdicts(PAIR), verdicts({("pgd", 8 / 255): [1, 0, 1, 0]}), "pgd lacks eps 0.1"),
        (verdicts({("pgd", 0.3): [1, 0, 1, 0]}), verdicts(LADDER),
         "pgd climbed eps 0.1, 0.2 too, and what it finds there counts at larger ones"),
    ],
)  # fmt: skip
def test_other_evaluations_are_refused_with_the_reason(before, now, reason):
    with pytest.raises(Incomparable) as error:
        compare(before, replace(now, source="runs/b"))
    assert str(error.value).startswith("runs/b cannot be compared with runs/a: ")
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_all_reasons_are_given_at_once():
    now = verdicts(PAIR, ids=IDS, model=MODEL | {"num_classes": 2}, attacks={"pgd": PGD | {"steps": 40}})
    with pytest.raises(Incomparable, match=r"no sample in common.*2 classes.*pgd's steps"):
        compare(verdicts(PAIR), now)


@pytest.mark.parametrize(
    "now",
    [
        verdicts(
            PAIR,
            options=OPTIONS
            | {"seed": 9, "batch_size": 7, "device": "cuda", "save_adversarials": True, "certify": False},
        ),
        verdicts(PAIR, model=MODEL | {"name": "other", "fingerprint": "0" * 64}),
        verdicts(PAIR, options={key: value for key, value in OPTIONS.items() if key != "target"}),  # of another version
        verdicts(PAIR, attacks={"pgd": PGD | {"momentum": 0}}),
        verdicts({("pgd", 0.1 * (1 + 1e-8)): [1, 0, 1, 0]}),  # through a spreadsheet
        verdicts(PAIR, model={}, options={}, attacks={}, environment={}, findings=()),  # samples.csv
    ],
)
def test_what_may_differ(now):
    assert compare(verdicts(PAIR), now).passed


def test_more_in_the_current_run_is_left_out_and_said():
    now = verdicts({**LADDER, ("apgd", 0.1): [0, 0, 0, 0]})
    comparison = compare(verdicts({("pgd", eps): [1, 0, 1, 0] for eps in (0.1, 0.2)}), now)
    assert comparison.passed and change(comparison, WORST_CASE).after == 2
    assert "Only the current run has apgd: left out, of the worst case too." in comparison.notes
    assert "Only the current run has eps 0.3: left out." in comparison.notes


# What is said


def answer(**rows) -> str:
    """Of 100 images: clean and pgd counts before and now, all nested."""
    (clean_before, clean_now), (before, now) = rows["clean"], rows["pgd"]
    return compare(
        verdicts({("pgd", 0.1): share(100, before)}, clean=share(100, clean_before)),
        verdicts({("pgd", 0.1): share(100, now)}, clean=share(100, clean_now)),
    )


def test_the_least_robust_accuracy_is_asked_of_what_the_baseline_lacks_too():
    before = verdicts({("noise", 0.1): [1] * 10})
    attack = compare(before, verdicts({("noise", 0.1): [1] * 10, ("pgd", 0.1): [1, 1] + [0] * 8}),
                     Rules(max_drop=1, min_robust_accuracy=0.4))  # fmt: skip
    assert attack.answer == (
        "FAIL: worst case at linf 0.1 (with pgd, which the baseline lacks) is 20.0 %, below the 40.0 % asked for"
    )
    assert "Only the current run has pgd: left out, of the worst case too; the least robust accuracy is asked of it " \
        "too." in attack.notes  # fmt: skip
    # No row that was compared is the one that fails.
    assert [failure.row for failure in attack.failures] == [None] and change(attack, WORST_CASE).after == 10

    larger = verdicts({("noise", 0.1): [1] * 10, ("noise", 0.2): [1, 1] + [0] * 8})
    rules = Rules(max_drop=1, min_robust_accuracy=0.4)
    assert compare(before, larger, rules).answer == (
        "FAIL: worst case at linf 0.2 is 20.0 %, below the 40.0 % asked for"
    )
    only = Rules(max_drop=1, min_robust_accuracy=0.4, eps=(0.1,))
    assert compare(before, larger, only).passed
    both = verdicts({(name, eps): [1, 1] + [0] * 8 for name in ("noise", "pgd") for eps in (0.1, 0.2)})
    attack, eps = (note for note in compare(before, both, only).notes if note.startswith("Only the current run"))
    assert attack.endswith("the least robust accuracy is asked of it too.") and eps.endswith("has eps 0.2: left out.")


def test_the_answer_is_one_sentence_with_the_numbers():
    comparison = answer(clean=(90, 90), pgd=(50, 35))
    assert comparison.answer.startswith(
        "FAIL (and 1 more): worst case at linf 0.1 fell from 50.0 % to 35.0 % (−15.0 points, 95 % interval −"
    )
    assert comparison.answer.endswith(", p < 0.001): 15 images fell, 0 rose")
    assert answer(clean=(90, 90), pgd=(50, 50)).answer.startswith("PASS: worst case at linf 0.1 stayed at 50.0 % (0 po")


def test_the_clean_accuracy_comes_first_where_it_fell_by_more():
    assert answer(clean=(90, 40), pgd=(50, 35)).answer.startswith("FAIL (and 2 more): clean accuracy fell from 90.0 %")


def test_a_fall_of_the_clean_accuracy_is_told_from_one_of_robustness():
    # Same weights, and of the 40 that both get right, as many withstand: something around the network broke.
    clean, held = answer(clean=(90, 40), pgd=(35, 35)).causes
    assert clean == (
        "The clean accuracy fell by 50.0 points: the network errs before any attack. The weights and layers are the "
        "same, so look at what surrounds them, first for a normalisation that was lost."
    )
    assert held == (
        "Of the 40 images that both classify correctly unchanged, 35 withstood the worst case at linf 0.1 before and "
        "35 now: robustness itself held."
    )
    assert answer(clean=(90, 40), pgd=(40, 20)).causes[1].endswith("20 now: robustness itself fell as well.")
    assert answer(clean=(90, 40), pgd=(20, 40)).causes[1].endswith("40 now: robustness itself held.")
    for now, says in ((90, "did not fall"), (96, "did not fall"), (88, "did not fall significantly")):
        causes = answer(clean=(90, now), pgd=(50, 30)).causes
        assert causes[0].startswith(f"The clean accuracy {says} (90.0 % before, {now}.0 % now)")
    # Five that fell are no evidence that it fell, nor that it held.
    assert (
        answer(clean=(90, 40), pgd=(10, 5)).causes[1].endswith("5 now: robustness itself did not fall significantly.")
    )
    # Where none withstood before nothing fell; it is looked at where some did.
    low, high = ("pgd", 0.1), ("pgd", 0.2)
    before = verdicts({low: share(100, 20), high: share(100, 0)}, clean=share(100, 90))
    fallen = verdicts({low: share(100, 0), high: share(100, 0)}, clean=share(100, 40))
    assert compare(before, fallen).causes[1] == (
        "Of the 40 images that both classify correctly unchanged, 20 withstood the worst case at linf 0.1 before and "
        "0 now: robustness itself fell as well."
    )
    assert answer(clean=(90, 40), pgd=(0, 0)).causes[1].endswith("whether robustness itself fell cannot be told.")
    (robust, same) = answer(clean=(90, 89), pgd=(50, 35)).causes
    assert robust.endswith("(90.0 % before, 89.0 % now): it is robustness itself that fell.")
    assert same == "The weights are the same, so code outside of them changed."


def test_circumstances_are_told():
    before = verdicts({("pgd", 0.1): share(100, 50)})
    now = verdicts(
        {("pgd", 0.1): share(100, 30)},
        options=OPTIONS | {"seed": 3},
        environment={"robust": "0.1.0", "torch": "2.16.0\x1b[31m"},
    )
    comparison = compare(before, now)
    assert comparison.causes[1] == (
        "The weights are the same, so it was what changed besides, or code outside of them: seed 0 → 3, "
        "torch 2.15.0 → 2.16.0␛[31m."
    )
    other = compare(before, replace(now, model=MODEL | {"name": "new", "fingerprint": "0" * 64}))
    assert other.notes[:2] == (
        "The model is new, and was net.",
        "The weights, the layers or the model's Python file changed (fingerprint ffffffff → 00000000).",
    )


def test_a_baseline_that_has_nothing_to_lose_is_told():
    before = verdicts({("pgd", 0.1): [1] * 9 + [0], ("pgd", 0.2): [0] * 10, ("pgd", 0.3): [0] * 10})
    said = "At linf 0.2, linf 0.3 no image withstood before, so none can fall: compare at smaller eps too."
    assert said in compare(before, before).notes
    assert not any("withstood" in note for note in compare(before, before, Rules(eps=(0.1,))).notes)


def test_few_images_are_told():
    # Two rows: 2 * 2 * 0.5^k <= 0.05 from k = 7 on, of 20 images.
    run = verdicts({("pgd", 0.1): share(20, 10)})
    assert any("20 images are few: 7 of them would have to fall" in note for note in compare(run, run).notes)
    fall = verdicts({("pgd", 0.1): share(20, 4)})
    assert compare(run, fall).passed and not compare(run, verdicts({("pgd", 0.1): share(20, 3)})).passed


def test_so_few_images_that_no_drop_can_be_significant_are_told():
    note = "On 20 images no drop can be significant, even if all that were right fall; --plan says how many are needed."
    for right in (6, 7):
        run = verdicts({("pgd", 0.1): share(20, right)}, clean=share(20, right))
        gone = verdicts({("pgd", 0.1): share(20, 0)}, clean=share(20, right))
        assert (note in compare(run, run).notes) == compare(run, gone).passed == (right == 6)
    one = verdicts({("pgd", 0.1): [1]})
    assert any(said.startswith("On 1 image no drop") for said in compare(one, one).notes)


def test_so_few_that_withstood_that_their_fall_cannot_be_significant_are_told():
    for standing in (6, 7):
        run = verdicts({("pgd", 0.1): share(200, standing)}, clean=share(200, 200))
        gone = verdicts({("pgd", 0.1): share(200, 0)}, clean=share(200, 200))
        told = any("At linf 0.1 6 images withstood before, and 7 would" in note for note in compare(run, run).notes)
        assert told == compare(run, gone).passed == (standing == 6)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (format_points(-0.082), "−8.2"), (format_points(0.5), "+50.0"), (format_points(0), "0"),
        (format_points(-0.0002), "−0.02"), (format_p(0.0004), "p < 0.001"), (format_p(0.0341), "p = 0.034"),
        (format_p(0.0501), "p = 0.0501"), (format_p(0.0499995), "p = 0.0499995"), (format_p(0.05), "p = 0.05"),
        (format_p(1), "p = 1"), (format_bare_p(0.0004), "< 0.001"),
        (format_bare_p(0.0341), "0.034"), (visible("a\nb\x1b[2J\u202ec\ud800é大"), "a␊b␛[2J\ufffdc\ufffdé大"),
    ],
)  # fmt: skip
def test_words(written, expected):
    assert written == expected


# How often it errs


def simulate(runs: int, n: int, drop: float, seed: int) -> int:
    """How many of `runs` pairs fail. Two attacks at two eps on a network that is right on 80 % of the samples.

    Each sample has a margin, uniform in [0, 1], that each evaluation sees with noise of its own; it stands where that
    exceeds the attack's strength. In the second evaluation every margin is so much smaller that `drop` of the samples
    fall in each row, on balance.
    """
    rng = np.random.default_rng(seed)
    base = verdicts({("pgd", 0.1): [1] * n})
    strengths = {("fgsm", 0.1): 0.2, ("fgsm", 0.2): 0.4, ("pgd", 0.1): 0.25, ("pgd", 0.2): 0.5}
    failed = 0
    for _ in range(runs):
        margin, correct = rng.random(n), rng.random(n) < 0.8
        sides = []
        for shift in (0, drop / 0.8):
            seen = margin - shift + 0.05 * rng.standard_normal(n)
            robust = {Row(a, "linf", eps): correct & (seen > strength) for (a, eps), strength in strengths.items()}
            sides.append(replace(base, clean=correct, robust=robust))
        failed += not compare(*sides).passed
    return failed


def test_without_a_change_it_fails_in_at_most_5_percent_of_runs():
    assert 0 < simulate(runs=2000, n=300, drop=0, seed=1) <= 0.05 * 2000


def test_a_drop_of_5_points_on_1000_samples_fails_in_at_least_95_percent_of_runs():
    assert simulate(runs=300, n=1000, drop=0.05, seed=2) >= 0.95 * 300
