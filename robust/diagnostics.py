"""Can the numbers be believed? What is checked before the attacks, and what the tables themselves give away.

The checks are those of Carlini et al. 2019 (arXiv 1902.06705) and of what users of such tools most often got
wrong: see each one's comment. `preflight` looks at the model; `review` needs only a finished store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from robust.errors import InputError
from robust.statistics import WORST_CASE, wilson
from robust.store import Finding, Store
from robust.units import format_images, format_percent

if TYPE_CHECKING:
    from torch import Tensor

    from robust.models.model import Model

CONTROL = "noise"
GRADIENT_FREE = ("square", "transfer", CONTROL)
FEW_SAMPLES = 100
FEW_STEPS = 10


def _check(name: str, good: bool, passed: str, failed: str, level: str = "warn") -> Finding:
    return Finding(name, "pass", passed) if good else Finding(name, level, failed)


def has_input_gradient(model: Model, x: Tensor) -> bool:
    """Whether the model's output depends on its input for autograd; x is (N, C, H, W)."""
    import torch

    query = x[:1].detach().clone().requires_grad_()
    with torch.enable_grad():
        output = model.module(query)
        return output.requires_grad and torch.autograd.grad(output.sum(), query, allow_unused=True)[0] is not None


def check_keeps_input(model: Model, x: Tensor) -> None:
    """InputError for a model that changes images like x (N, C, H, W) in place, without gradients or with."""
    import torch

    # Not x: what rounds to 8 bits changes no image that was read from a file.
    images = torch.rand(x[:1].shape, generator=torch.Generator().manual_seed(0)).to(x)
    for wants_grad in (False, True):
        given = images.clone().requires_grad_(wants_grad)
        with torch.set_grad_enabled(wants_grad):
            model.module(given)
        if not torch.equal(given.detach(), images):
            raise InputError("the model changes the images it is given; let its forward begin with x = x.clone()")


def preflight(model: Model, x: Tensor, logits: Tensor, eot: int = 1) -> Iterator[Finding]:
    """Findings on the model itself, on a few images x (N, C, H, W) and what it says of them, (N, K).

    eot: draws of which a randomised model's verdicts are the vote.
    """
    import torch

    from robust.models.probe import apart
    from robust.randomness import watched

    module = model.module
    with torch.no_grad():
        again = module(x).clone()  # a module may write its next output over the last one
    elsewhere, draws = watched(module, torch.cat([x[:1], 1 - x[:1]]))

    yield _check(
        "eval mode",
        not model.was_training,
        "the model came in eval mode",
        "the model came in training mode; it was evaluated in eval mode, where batch-norm and dropout are fixed",
    )
    spread = apart(logits, again)
    lucky = draws and spread < 1e-5
    differ = f"two passes over the same images differ by {spread:.1e} of the largest logit"
    if lucky:
        differ = "a pass draws random numbers"
    random = lucky or spread >= 1e-5
    yield _check(
        "deterministic",
        not random or eot > 1,
        f"the model is randomised; gradients and verdicts are those of {eot} draws"
        if random
        else "two passes over the same images agree",
        f"{differ}: the model is randomised, and verdicts from single draws overstate the attack; use --eot 20",
    )
    mixed = apart(logits[:1], elsewhere[:1])
    yield _check(
        "rows independent",
        lucky or mixed < max(1e-3, 10 * spread),  # passes that agreed by luck say nothing of how far others differ
        "an image's logits depend on its batch no more than on chance"
        if random
        else "an image's logits do not depend on its batch",
        f"an image's logits change by {mixed:.1e} of the largest with its batch; the model mixes rows "
        "(batch statistics?), so no verdict belongs to one image",
        level="fail",
    )
    # A softmax inside the model saturates, and its gradients with it.
    sums = logits.sum(1)
    yield _check(
        "logits",
        not (bool((logits >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all())),
        "the model returns logits",
        "the model's rows are non-negative and sum to 1: probabilities, not logits; drop its softmax, "
        "for gradients vanish through it",
    )
    with torch.enable_grad():
        query = x.detach().clone().requires_grad_()
        out = module(query)
        if out.requires_grad:
            loss = torch.nn.functional.cross_entropy(out, out.argmax(1), reduction="sum")
            (grad,) = torch.autograd.grad(loss, query, allow_unused=True)
        else:
            grad = None
    largest = torch.zeros(len(x)) if grad is None else grad.flatten(1).abs().amax(1)  # NaN where any value is
    blind = int((~((largest > 0) & largest.isfinite())).sum())
    yield _check(
        "gradients",
        blind == 0,
        "every image has a gradient that is finite and not zero",
        f"the gradient is zero or not finite on {blind} of {len(x)} images: gradient attacks are blind there, and what "
        "stands may stand for that reason only",
        level="fail" if blind == len(x) else "warn",
    )


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
    low, _ = wilson(round(clean * n), n)
    chance = f"guessing among {classes} classes ({format_percent(guess)})"
    if clean <= guess:
        level, said = "fail", f"is no better than {chance}: labels or preprocessing are probably wrong"
    elif low <= guess:
        level, said = "warn", f"cannot be told from {chance} on {format_images(n)}: look at labels and preprocessing"
    else:
        level, said = "pass", f"is above {chance}"
    yield Finding("clean accuracy", level, f"{format_percent(clean)} on clean images {said}")
    width = 100 * float((summary.ci_high - summary.ci_low).max())
    yield _check(
        "sample size",
        n >= FEW_SAMPLES,
        f"{format_images(n)}: the 95 % interval is at most {width:.0f} points wide",
        f"only {format_images(n)}: the 95 % interval is up to {width:.0f} points wide",
    )
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
        yield _strength(identity["options"], set(summary.attack) - {WORST_CASE}, details.get("attacks", []))
    for attack in details.get("attacks", []):
        for reason in attack.get("left_out", []):
            yield Finding(f"parts of {attack['name']}", "warn", f"{reason}; this is not the whole standard ensemble")
    if broken := store.components("autoattack"):
        # The flag of fra31/auto-attack's own checks.py.
        found = broken.get("square", 0)
        yield _check(
            "gradients inside autoattack",
            found <= max(1, 0.002 * n),
            "Square, which uses no gradient, found next to nothing that the gradient attacks had left",
            f"Square, which uses no gradient, broke {found} images that the gradient attacks had left: their "
            "gradients may be masked (arXiv 1802.00420)",
        )
    yield from _comparisons(summary)
    refuted, overlooked = store.twin_disagreements()
    yield Finding(
        "re-verification",
        "pass" if refuted + overlooked <= max(1, n // 100) else "warn",
        "every adversarial was confirmed by a fresh pass of the model itself"
        + (f"; {refuted} claims of the fast path were refuted and attacked anew" if refuted else "")
        + (f"; {overlooked} that it had overlooked were found" if overlooked else ""),
    )


def _strength(options: dict, attacks: set[str], described: Sequence[dict]) -> Finding:
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
        if known == ["pgd"] and (reach := _reach(described)) < 1:
            return Finding(
                name,
                "warn",
                f"pgd's steps reach {reach:.2g} eps, not the edge of the ball: robust accuracy is likely lower",
            )
        if steps is not None and steps < FEW_STEPS and "autoattack-rand" not in known:
            return Finding(name, "warn", f"{steps} steps are few; with more, robust accuracy is likely lower")
        return Finding(name, "pass", f"{', '.join(known)} searched beyond the first step")
    return Finding(name, "warn", f"how strong {', '.join(others)} is, is not known; add --attack pgd")


def _reach(described: Sequence[dict]) -> float:
    """How far pgd's steps go together, as a share of eps."""
    parameters = next(attack["parameters"] for attack in described if attack["name"] == "pgd")
    size = parameters.get("step_size")
    return 1.0 if size is None else round(parameters["steps"] * size, 6)


def _but(share: float, n: int) -> str:
    """By how many images what is said does not hold, where that is no evidence against it."""
    return f", but for {format_images(round(share * n))}" if share > 0 else ""


def _comparisons(summary: pd.DataFrame) -> Iterator[Finding]:
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
            yield _check(
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
            yield _check(
                f"{name} against gradients",
                beaten < one,
                f"{name}, which does not use the model's gradients, breaks no more than the attacks that do"
                + _but(beaten, n),
                f"{name}, which does not use the model's gradients, breaks {beaten:.1%} more images than the attacks "
                "that do: their gradients are masked, or they were given few steps (arXiv 1902.06705)",
            )
    if "fgsm" in table and "pgd" in table:
        behind = (table["pgd"] - table["fgsm"]).max()
        yield _check(
            "more steps",
            behind < one,
            "PGD's many steps break at least as many images as FGSM's one" + _but(behind, n),
            f"one step (FGSM) breaks {behind:.1%} more images than PGD's many: a sign of masked gradients "
            "(arXiv 1802.00420)",
        )
    worst = table[WORST_CASE]
    fell = clean - float(worst.iloc[-1])
    yield _check(
        "falls with eps",
        fell > 0 or clean == 0,
        f"accuracy falls by {100 * fell:.1f} points up to the largest eps",
        "no image fell at any eps: the eps are too small to tell, or the attacks do not work on this model",
    )
