"""What a run says, in one sentence, and whether to believe it."""

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from robust.errors import InputError
from robust.statistics import CERTIFIED, CONTROL, WORST_CASE, wilson
from robust.store import Finding, Store
from robust.units import format_class, format_count, format_eps, format_images, format_interval, format_percent


def headline(summary: pd.DataFrame) -> pd.Series:
    """The summary's row that the report opens with: the worst case at the largest eps.

    InputError where the run holds no results.
    """
    worst = summary[summary.attack == WORST_CASE]
    if worst.empty:
        raise InputError("the run holds no results to report; continue it with --resume")
    return worst.loc[worst.eps.idxmax()]


def strongest(summary: pd.DataFrame) -> str:
    """The attack with the lowest robust accuracy at the largest eps.

    Of equals the one with the lowest at the next smaller eps, and so on; then with the smallest median distance; then
    the one listed last. The noise control counts only where nothing else ran.
    """
    attacks = [attack for attack in summary.attack.unique() if attack not in (WORST_CASE, CONTROL)] or [CONTROL]
    rows = summary.sort_values("eps", ascending=False)

    def weakness(attack: str) -> tuple[list[float], float]:
        own = rows[rows.attack == attack]
        return own.robust_accuracy.tolist(), own.median_distance.fillna(math.inf).iloc[0]

    return str(min(reversed(attacks), key=weakness))


def attack_label(attack: str) -> str:
    """What an attack of the summary is called before people."""
    return {WORST_CASE: "worst case", CONTROL: "noise (control)", CERTIFIED: "certified (proved)"}.get(attack, attack)


def target_name(store: Store) -> str | None:
    """The class that the attacks aim at, by its name if it has one and else as it was asked for; None without."""
    identity, names = store.identity, store.details.get("class_names")
    index = identity.get("target", {}).get("index")
    return identity.get("options", {}).get("target") if index is None or not names else format_class(index, names)


def answer(store: Store, summary: pd.DataFrame | None = None) -> str:
    """The result in one sentence. `summary` spares computing `store.summary()` again."""
    summary = store.summary() if summary is None else summary
    row = headline(summary)
    identity = store.identity
    name = identity.get("model", {}).get("name", "the model")
    target = target_name(store)
    n, correct, robust = int(row.n), round(row.clean_accuracy * row.n), round(row.robust_accuracy * row.n)
    clean = (
        f"{name} classifies {format_count(correct)} of {format_images(n)} correctly "
        f"({format_percent(correct, n)}, 95 % interval {format_interval(*wilson(correct, n))})."
    )
    changes = _changes(row.norm, row.eps, set(summary.attack) == {CONTROL, WORST_CASE})
    changes += _seen(row.norm, row.eps, _grayscale(store))
    interval = format_interval(row.ci_low, row.ci_high)
    left = f"{format_count(robust)} of {format_count(n)}"
    certified = store.certified()[-1]
    proved = f", {'all' if certified == robust else format_count(certified)} of them provably" if certified else ""
    if target is None:
        return f"{clean} With {changes} {left} {_agreeing('remain', robust)} ({interval}){proved}."
    taken = correct - robust
    return (
        f"{clean} With {changes} {format_count(taken)} of the {format_count(correct)} {_agreeing('come', taken)} to be "
        f"taken for ‘{target}’; {left} {_agreeing('withstand', robust)} ({interval}){proved}."
    )


def verdict(findings: Iterable[Finding], unproved: int = 0) -> tuple[str, str]:
    """("pass" | "warn" | "fail", in a sentence or two: whether to believe the answer, and why).

    unproved: images that stand without a proof; see `robust.diagnostics.standing_unproved`.
    """
    findings = list(findings)
    if not findings:
        return "warn", "Nothing was checked, so nothing says whether this can be believed."
    care = f"Believe this number with care{', as an upper bound' if unproved else ''}"
    for level, advice in (("fail", "Do not believe this number yet"), ("warn", care)):
        reasons = [finding for finding in findings if finding.level == level]
        if reasons:
            said = "; ".join(f"{finding.name} – {finding.message.rstrip('.')}" for finding in reasons)
            checks = "check" if len(findings) == 1 else "checks"
            count = f"{len(reasons)} of {len(findings)} {checks} {_agreeing(level, len(reasons))}"
            return level, f"{advice}, because {count}: {said}."
    names = ", ".join(finding.name for finding in findings)
    passing = "the one check passes" if len(findings) == 1 else f"all {len(findings)} checks pass"
    if not unproved:
        return "pass", f"This number can be believed, because {passing}: {names}."
    standing = "the image that stands" if unproved == 1 else f"the {format_images(unproved)} that stand"
    return "pass", (
        f"This number can be believed as an upper bound, because {passing}: {names}. A stronger attack may break "
        f"{standing} without a proof."
    )


def _agreeing(verb: str, count: int) -> str:
    """'remains' of one, else 'remain'."""
    return f"{verb}s" if count == 1 else verb


def _changes(norm: str, eps: float, random: bool) -> str:
    kind, size = "random changes" if random else "changes", format_eps(eps, norm)
    if norm != "linf":
        return f"{kind} of {norm} size at most {size},"
    scale = "" if "/" in size else " (on a scale of 0 to 1)"
    return f"{kind} of at most {size} per pixel{scale},"


def _seen(norm: str, eps: float, grayscale: bool) -> str:
    """What people see of the change. Nothing is claimed of l2, whose changes may gather in one place, nor of
    drawings on a plain ground, where any noise shows."""
    if norm != "linf" or grayscale or eps > 8.001 / 255:
        return ""
    return " invisible to people," if eps <= 4.001 / 255 else " hardly visible to people,"


def _grayscale(store: Store) -> bool:
    size: Any = store.identity.get("model", {}).get("input_size")
    if size is None:
        size = next((picture.x.shape for picture in store.pictures()), (3,))
    return size[0] == 1
