"""Can the numbers be believed? What a finished run's tables give away, beside what was seen before the attacks.

The checks are those of Carlini et al. 2019 (arXiv 1902.06705) and of what users of such tools most often got
wrong: see each one's comment. Nothing here needs the model; `robust/preflight.py` looks at that.
"""

from collections.abc import Iterator, Sequence

import pandas as pd

from robust.statistics import CONTROL, WORST_CASE, wilson
from robust.store import Finding, Store
from robust.units import format_images, format_percent

STANDARD = ("autoattack", "autoattack-rand")  # of the field: what a claim of robustness is held to
GRADIENT_FREE = ("square", "transfer", CONTROL)
FEW_SAMPLES = 100
FEW_STEPS = 10
LEARNT = 0.5  # a clean accuracy that, if it may still be so on few images, speaks against wrong labels


def review(store: Store) -> Iterator[Finding]:
    """Every finding on a run: those of the preflight, and what its tables say."""
    details, identity = store.details, store.identity
    yield from (Finding(**row) for row in details.get("preflight", []))
    for name, message in details.get("failed_attacks", {}).items():
        yield Finding(f"attack {name}", "fail", f"{message}; the other attacks went on without it")
    if left_out := details.get("target_images"):
        yield Finding("target", "pass", f"{left_out} images of the target's own class were left out")
    if skipped := details.get("skipped_images"):
        yield Finding("images read", "warn", f"{len(skipped)} unreadable images were left out, the first {skipped[0]}")
    summary = store.summary()
    if summary.empty:
        return
    worst = summary[summary.attack == WORST_CASE]
    n, clean = int(worst.n.iloc[0]), float(worst.clean_accuracy.iloc[0])

    # Wrong labels, a missing normalisation or another resizing show first on the clean images.
    classes = identity["model"]["num_classes"]
    guess = 1 / classes
    low, high = wilson(round(clean * n), n)
    chance = f"guessing among {classes} classes ({format_percent(guess)})"
    if clean <= guess and high < LEARNT:
        level, said = "fail", f"is no better than {chance}: labels or preprocessing are probably wrong"
    elif low <= guess or clean <= guess:
        level, said = "warn", f"cannot be told from {chance} on {format_images(n)}: look at labels and preprocessing"
    else:
        level, said = "pass", f"is above {chance}"
    yield Finding("clean accuracy", level, f"{format_percent(clean)} on clean images {said}")
    wide = 100 * float(worst.ci_high.iloc[-1] - worst.ci_low.iloc[-1])
    widths = (
        f"{format_images(n)}: 95 % intervals are {100 * (high - low):.0f} points wide for the clean accuracy and "
        f"{wide:.0f} for the worst case at the largest eps"
    )
    yield Finding.check("sample size", n >= FEW_SAMPLES, widths, f"only {widths}")
    if clean == 0:  # nothing was attacked, and what is said of attacks would be said of none
        return
    certified, standing = store.certified(), [round(share * n) for share in worst.robust_accuracy]
    if certified[-1]:
        yield Finding(
            "certified",
            "pass",
            f"of the {format_images(standing[-1])} that stand at the largest eps, bounds on the logits prove "
            f"{certified[-1]} (CROWN-IBP, arXiv 1906.06316)",
        )
    if certified == standing and certified[-1]:
        yield Finding("attack strength", "pass", "no attack could break more: what stands is certified, at every eps")
    else:
        attacks, unproved = set(summary.attack) - {WORST_CASE}, standing_unproved(store, summary)
        yield _strength(identity["options"], attacks, details.get("attacks", []), unproved)
    for attack in details.get("attacks", []):
        for reason in attack.get("left_out", []):
            yield Finding(f"parts of {attack['name']}", "warn", f"{reason}; this is not the whole standard ensemble")
    broken = store.components("autoattack")
    if broken and summary.forwards[summary.attack == "autoattack"].any():
        # The flag of fra31/auto-attack's own checks.py.
        found = broken.get("square", 0)
        yield Finding.check(
            "gradients inside autoattack",
            found <= max(1, 0.002 * n),
            "Square, which uses no gradient, found next to nothing that the gradient attacks had left",
            f"Square, which uses no gradient, broke {found} images that the gradient attacks had left: their "
            "gradients may be masked (arXiv 1802.00420)",
        )
    yield from _comparisons(summary, certified[-1] == standing[-1])
    if not summary.forwards.any():
        return
    refuted, overlooked = store.twin_disagreements()
    yield Finding(
        "re-verification",
        "pass" if refuted + overlooked <= max(1, n // 100) else "warn",
        "every adversarial was confirmed by a fresh pass of the model itself"
        + (f"; {refuted} claims of the fast path were refuted and attacked anew" if refuted else "")
        + (f"; {overlooked} that it had overlooked were found" if overlooked else ""),
    )


def standing_unproved(store: Store, summary: pd.DataFrame) -> int:
    """How many images stand at the largest eps without a proof, where the field's standard has not been tried.

    As long as there are any, robust accuracy is an upper bound. `summary` holds results.
    """
    if not summary.attack.isin(STANDARD).any():
        worst = summary[summary.attack == WORST_CASE].iloc[-1]
        return round(worst.robust_accuracy * worst.n) - store.certified()[-1]
    return 0


def _strength(options: dict, attacks: set[str], described: Sequence[dict], unproved: int) -> Finding:
    name, steps = "attack strength", options.get("steps")
    others = sorted(attacks - {"fgsm", *GRADIENT_FREE})
    if "autoattack" in others:
        whole = not any(attack.get("left_out") for attack in described if attack["name"] == "autoattack")
        standard = "the field's standard ensemble"
        return Finding(name, "pass", f"autoattack is {standard if whole else f'what the classes allow of {standard}'}")
    if not others:
        return Finding(name, "warn", "no iterative gradient attack ran: an upper bound only; add --attack pgd")
    iterative = {attack["name"] for attack in described if "steps" in attack["parameters"] or "components" in attack}
    if known := [attack for attack in others if attack in iterative]:
        if known == ["pgd"] and (span := _span(described)) < 1:
            return Finding(
                name,
                "warn",
                f"pgd's steps reach {span:.2g} eps, not the edge of the ball: robust accuracy is likely lower",
            )
        if steps is not None and steps < FEW_STEPS and "autoattack-rand" not in known:
            return Finding(name, "warn", f"{steps} steps are few; with more, robust accuracy is likely lower")
        said = f"{', '.join(known)} searched beyond the first step"
        return Finding(name, "pass", said + (_bound(options, unproved) if unproved else ""))
    return Finding(name, "warn", f"how strong {', '.join(others)} is, is not known; add --attack pgd")


def _bound(options: dict, unproved: int) -> str:
    """No warning, for where attacks leave anything at all this is so, and the more the smaller eps is."""
    stand = "image stands" if unproved == 1 else "images stand"
    standard = "autoattack-rand" if (options.get("eot") or 1) > 1 else "autoattack"
    stronger = "a stronger attack" if options["norm"] == "l0" else f"--attack {standard}"
    return f"; {unproved:,} {stand} without a proof: an upper bound, and {stronger} may leave fewer"


def _span(described: Sequence[dict]) -> float:
    """How far pgd's steps go together, as a share of eps."""
    parameters = next(attack["parameters"] for attack in described if attack["name"] == "pgd")
    size = parameters.get("step_size")
    return 1.0 if size is None else round(parameters["steps"] * size, 6)


def _but(share: float, n: int) -> str:
    """By how many images what is said does not hold, where that is no evidence against it."""
    return f", but for {format_images(round(share * n))}" if share > 0 else ""


def _comparisons(summary: pd.DataFrame, proved: bool = False) -> Iterator[Finding]:
    """What the curves say beside each other. proved: whether all that stands at the largest eps is certified."""
    # An attack that was spared every image, as all are certified, says nothing of itself.
    evaluated = summary.groupby("attack").forwards.transform("sum") > 0
    summary = summary[evaluated | (summary.attack == WORST_CASE)]
    table = summary.pivot(index="eps", columns="attack", values="robust_accuracy")
    n = int(summary.n.iloc[0])
    one = max(1.5 / n, 0.005)  # a difference of one image, or of half a point, is no evidence
    clean = float(summary.clean_accuracy.iloc[0])
    # By what they asked for: foolbox's names do not say.
    asked = summary.groupby("attack").gradients.sum()
    gradient = [name for name in table.columns if asked[name] > 0 and name not in (*GRADIENT_FREE, WORST_CASE)]
    if CONTROL in table and gradient:
        ahead = table[CONTROL] - table[gradient].min(axis=1)
        if clean - table[CONTROL].min() >= one > ahead.abs().max():
            yield Finding(
                "noise control",
                "warn",
                "random noise of the same size breaks as many images as the gradient attacks: their gradients are "
                "masked or broken (arXiv 1802.00420), or eps is so large that no search is needed",
            )
        else:
            yield Finding.check(
                "noise control",
                ahead.min() > -one,
                "random noise of the same size breaks no more than the attacks do" + _but(-ahead.min(), n),
                f"random noise breaks {-ahead.min():.1%} more images than the gradient attacks: their gradients are "
                "masked or broken (arXiv 1802.00420)",
                level="fail",
            )
    for name in ("square", "transfer"):
        if name in table and gradient:
            beaten = (table[gradient].min(axis=1) - table[name]).max()
            yield Finding.check(
                f"{name} against gradients",
                beaten < one,
                f"{name}, which does not use the model's gradients, breaks no more than the attacks that do"
                + _but(beaten, n),
                f"{name}, which does not use the model's gradients, breaks {beaten:.1%} more images than the attacks "
                "that do: their gradients are masked, or they were given few steps (arXiv 1902.06705)",
            )
    if "fgsm" in table and "pgd" in table:
        behind = (table["pgd"] - table["fgsm"]).max()
        yield Finding.check(
            "more steps",
            behind < one,
            "PGD's many steps break at least as many images as FGSM's one" + _but(behind, n),
            f"one step (FGSM) breaks {behind:.1%} more images than PGD's many: a sign of masked gradients "
            "(arXiv 1802.00420)",
        )
    worst = table[WORST_CASE]
    fell = clean - float(worst.iloc[-1])
    yield Finding.check(
        "falls with eps",
        fell > 0 or proved,
        f"accuracy falls by {100 * fell:.1f} points up to the largest eps"
        if fell > 0
        else "no image fell at any eps, nor could one: all that stand are certified",
        "no image fell at any eps: the eps are too small to tell, or the attacks do not work on this model",
    )
