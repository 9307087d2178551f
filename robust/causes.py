"""Why a comparison fails, where that can be known, and what else differs between the two runs. Sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from robust.statistics import WORST_CASE, mcnemar
from robust.text import format_points, visible
from robust.units import format_count, format_eps, format_images, format_percent

if TYPE_CHECKING:
    from robust.gate import Comparison

FEW = 0.05  # a drop of this share that the test cannot see is worth a note


def causes(comparison: Comparison) -> Iterator[str]:
    """What made the comparison fail, as far as clean accuracy, fingerprints and the runs' own checks tell."""
    yield from (f"{failure.message}." for failure in comparison.failures if failure.rule == "checks")
    clean = comparison.changes[0]
    fallen = [change for change in comparison.changes if comparison.is_fall(change)]
    if comparison.passed or not fallen:
        return
    same = _same_weights(comparison)
    if clean not in fallen:
        held = "did not fall" if clean.after >= clean.before else "did not fall significantly"
        yield (
            f"The clean accuracy {held} ({format_percent(clean.before, clean.n)} before, "
            f"{format_percent(clean.after, clean.n)} now): it is robustness itself that fell."
        )
        if same:
            changed = ", ".join(_circumstances(comparison))
            yield (
                f"The weights are the same, so it was what changed besides, or code outside of them: {changed}."
                if changed
                else "The weights are the same, so code outside of them changed."
            )
        return
    look = (
        "The weights and layers are the same, so look at what surrounds them, first for a normalisation that was lost"
        if same
        else "Look first for a normalisation that was lost or is done twice, then at the weights"
    )
    yield (
        f"The clean accuracy fell by {format_points(-clean.change).lstrip('+')} points: the network errs before any "
        f"attack. {look}."
    )
    yield _among_correct(comparison)


def notes(comparison: Comparison) -> Iterator[str]:
    """Which network, which circumstances, what could not be checked, and what was left out."""
    baseline, current = comparison.baseline, comparison.current
    names = [visible(str(run.model["name"])) for run in (baseline, current) if "name" in run.model]
    if len(set(names)) == 2:
        yield f"The model is {names[1]}, and was {names[0]}."
    same = _same_weights(comparison)
    if same is not None:
        there, here = (visible(str(run.model["fingerprint"])[:8]) for run in (baseline, current))
        yield (
            f"The weights and layers are the same (fingerprint {here})."
            if same
            else f"The weights, the layers or the model's Python file changed (fingerprint {there} → {here})."
        )
    if changed := ", ".join(_circumstances(comparison)):
        yield f"Changed besides: {changed}."
    if not (baseline.options and current.options):
        yield "samples.csv says nothing of the attacks' options and the network: whether they agree is not checked."
    if None in (baseline.samples.content_digest, current.samples.content_digest):
        yield "samples.csv has no content hashes: samples are paired by id and label alone."
    yield from _not_compared(comparison)
    yield from _nothing_to_lose(comparison)
    yield from _few(comparison)


def _same_weights(comparison: Comparison) -> bool | None:
    there, here = (run.model.get("fingerprint") for run in (comparison.baseline, comparison.current))
    return None if there is None or here is None else there == here


def _circumstances(comparison: Comparison) -> Iterator[str]:
    """What may differ between runs that can be compared: 'torch 2.11.0 → 2.15.0'."""
    before, after = comparison.baseline, comparison.current
    for there, here, names in (
        (before.model, after.model, ["input_size"]),
        (before.options, after.options, ["seed", "batch_size"]),
        (before.environment, after.environment, list(before.environment)),
    ):
        for name in names:
            if name in there and name in here and there[name] != here[name]:
                yield visible(f"{name} {there[name]} → {here[name]}")


def _among_correct(comparison: Comparison) -> str:
    """Whether robustness fell as well, or only what it starts from: looked at where both networks are right, at the
    largest eps that one of these images withstood before."""
    both = comparison.baseline.clean & comparison.current.clean
    pairs = comparison.pairs.items()
    withstood = [row for row, (before, _) in pairs if row.attack == WORST_CASE and before[both].any()]
    if not withstood:
        return (
            "No image that both classify correctly unchanged withstood the worst case before: whether robustness "
            "itself fell cannot be told."
        )
    row = max(withstood, key=lambda row: row.eps)
    before, after = (verdicts[both] for verdicts in comparison.pairs[row])
    fell, rose = int((before & ~after).sum()), int((after & ~before).sum())
    if fell <= rose:
        said = "held"
    else:
        said = "fell as well" if mcnemar(fell, rose) <= comparison.rules.level else "did not fall significantly"
    return (
        f"Of the {format_images(len(before))} that both classify correctly unchanged, "
        f"{format_count(int(before.sum()))} withstood the {row} before and {format_count(int(after.sum()))} now: "
        f"robustness itself {said}."
    )


def _not_compared(comparison: Comparison) -> Iterator[str]:
    baseline, current = comparison.baseline, comparison.current
    asked = comparison.rules.min_robust_accuracy is not None
    also = "; the least robust accuracy is asked of it too" if asked else ""
    known = {row.attack for row in baseline.robust}
    if extra := sorted({visible(row.attack) for row in current.robust if row.attack not in known}):
        yield f"Only the current run has {', '.join(extra)}: left out, of the worst case too{also}."
    largest = max(row.eps for row in baseline.robust)
    beyond = sorted({row[1:] for row in current.robust if row.eps > largest * (1 + 1e-6) and row.attack in known})
    if beyond:
        said = ", ".join(format_eps(eps, norm) for norm, eps in beyond)
        yield f"Only the current run has eps {said}: left out{'' if comparison.rules.eps else also}."


def _nothing_to_lose(comparison: Comparison) -> Iterator[str]:
    """Where the baseline had fallen altogether, so that the gate sees nothing."""
    worst = [change for change in comparison.changes if change.row.attack == WORST_CASE and not change.before]
    if worst:
        where = ", ".join(f"{change.row.norm} {format_eps(change.row.eps, change.row.norm)}" for change in worst)
        yield f"At {where} no image withstood before, so none can fall: compare at smaller eps too."


def _few(comparison: Comparison) -> Iterator[str]:
    """The least drop that the test could see, that in which no image rises, where it is a large one or impossible."""
    if not comparison.rules.significant:
        return
    clean = comparison.changes[0]
    needed = math.ceil(math.log2(2 * comparison.tests / comparison.rules.significant))
    if needed > clean.before:
        yield (
            f"On {format_images(clean.n)} no drop can be significant, even if all that were right fall; "
            "--plan says how many are needed."
        )
        return
    if needed > FEW * clean.n:
        yield (
            f"{format_images(clean.n)} are few: {format_count(needed)} of them would have to fall, and none rise, "
            "before the test can tell; --plan says how many are needed."
        )
    for change in comparison.changes:
        if change.row.attack == WORST_CASE and 0 < change.before < needed:
            yield (
                f"At {change.row.norm} {format_eps(change.row.eps, change.row.norm)} {format_images(change.before)} "
                f"withstood before, and {format_count(needed)} would have to fall before the test can tell: compare at "
                "smaller eps too."
            )
