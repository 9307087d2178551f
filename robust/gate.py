"""The regression gate: two runs on the same samples, rules, and whether robustness fell. Pure functions, no torch.

comparison = compare(read(baseline), read(current), Rules(max_drop=0.02))
comparison.passed, comparison.answer, comparison.failures, comparison.causes
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from robust import causes
from robust.errors import InputError
from robust.pairing import Incomparable, Pairs, pair
from robust.statistics import CONTROL, WORST_CASE, holm, mcnemar, paired_difference, wilson
from robust.text import format_p, format_points, visible
from robust.units import format_count, format_images, format_percent, same_eps
from robust.verdicts import CLEAN, Row, Samples, Verdicts, among, worst_cases

__all__ = ["Change", "Comparison", "Incomparable", "Judgement", "Rules", "compare"]

SIGNIFICANT = 0.05

# Findings about the network itself, which no seed, batch size or machine changes. Of the others, which are measured on
# the attacks' success and may wobble, only "fail" counts.
MODEL_CHECKS = frozenset({"eval mode", "deterministic", "rows independent", "logits", "gradients"})
_LEVELS = ("pass", "warn", "fail")


@dataclass(frozen=True)
class Rules:
    """When a comparison fails. Shares are of all samples, in [0, 1].

    max_drop, significant: an accuracy, clean or robust, may not fall by more than `max_drop`; it may not fall by an
        amount that the exact McNemar test finds significant at this level, Holm-corrected over the rows tested: all but
        the noise control beside attacks, to which neither rule is put. With both, only a drop that is larger and
        significant fails. With neither, `significant` is 0.05.
    min_robust_accuracy: least robust accuracy in the worst case over all attacks of the current run, at each of its
        eps.
    min_clean_accuracy: least accuracy on unchanged images.
    strict: hold the lower end of the 95 % interval (Wilson) against these two, instead of the accuracy itself.
    eps: look at these only; () for all that the baseline has, and for the least accuracy all of the current run's.

    InputError for a value that is none.
    """

    max_drop: float | None = None
    significant: float | None = None
    min_robust_accuracy: float | None = None
    min_clean_accuracy: float | None = None
    strict: bool = False
    eps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_drop", "significant", "min_robust_accuracy", "min_clean_accuracy"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                hint = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""
                raise InputError(f"{name} is a share between 0 and 1, not {value:g}{hint}")
        if self.significant == 0:
            raise InputError("significant is above 0: at 0 no drop could be; give 0.05")
        if self.strict and self.min_robust_accuracy is None and self.min_clean_accuracy is None:
            raise InputError("strict is about a least accuracy: give min_robust_accuracy or min_clean_accuracy too")
        if self.max_drop is None and self.significant is None:
            object.__setattr__(self, "significant", SIGNIFICANT)

    def __str__(self) -> str:
        """What fails, in words."""
        drop = "fell" if self.max_drop is None else f"fell by more than {100 * self.max_drop:g} points"
        test = "" if self.significant is None else f" significantly ({self.significant:g})"
        least = {"robust": self.min_robust_accuracy, "clean": self.min_clean_accuracy}
        floors = [
            f"a {kind} accuracy {'whose 95 % interval begins ' * self.strict}below {format_percent(value)}"
            for kind, value in least.items()
            if value is not None
        ]
        return "; ".join([f"an accuracy that {drop}{test}", *floors, "a check of the model that got worse"])

    @property
    def level(self) -> float:
        """What counts as significant where something is to be said of it, whether or not it decides."""
        return self.significant or SIGNIFICANT


@dataclass(frozen=True, eq=False)
class Change:
    """What became of one accuracy. `fell` and `rose` are positions in `Comparison.samples`.

    low, high: 95 % interval of `change`. p_value: of the exact McNemar test; p_adjusted: after Holm, over all rows that
    are tested, NaN for one that is not.
    """

    row: Row
    n: int
    before: int
    after: int
    fell: np.ndarray
    rose: np.ndarray
    low: float
    high: float
    p_value: float
    p_adjusted: float = math.nan

    @property
    def change(self) -> float:
        """Current minus baseline, as a share of the samples."""
        return (self.after - self.before) / self.n

    def __str__(self) -> str:
        """'pgd at linf 8/255 fell from 41.2 % to 33.0 % (−8.2 points, ..., p < 0.001): 52 images fell, 11 rose'"""
        before, after = format_percent(self.before, self.n), format_percent(self.after, self.n)
        verb = "fell" if self.change < 0 else "rose"
        moved = f"{verb} from {before} to {after}" if self.change else f"stayed at {after}"
        test = "the control, not tested" if math.isnan(self.p_adjusted) else format_p(self.p_adjusted)
        return (
            f"{self.row} {moved} ({format_points(self.change)} points, 95 % interval {format_points(self.low)} to "
            f"{format_points(self.high)}, {test}): {format_images(len(self.fell))} fell, "
            f"{format_count(len(self.rose))} rose"
        )


@dataclass(frozen=True)
class Judgement:
    """One rule held against one row, or against one check of the run (row None). `rule` is the option's name."""

    rule: str
    subject: str
    passed: bool
    message: str
    row: Row | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two runs, row by row, and what the rules say.

    pairs: the verdicts behind it. changes: clean accuracy first, then each (attack, norm, eps), then the worst case at
    each (norm, eps). tests: how many of them Holm's correction counts. judgements: every rule against all it concerns.
    """

    baseline: Verdicts
    current: Verdicts
    rules: Rules
    pairs: Pairs
    changes: tuple[Change, ...]
    tests: int
    judgements: tuple[Judgement, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> list[Judgement]:
        return [judgement for judgement in self.judgements if not judgement.passed]

    @property
    def samples(self) -> Samples:
        """Those compared, with their ids where either run knows them."""
        return self.current.samples if self.current.samples.ids is not None else self.baseline.samples

    @property
    def headline(self) -> Change:
        """The worst case at the largest eps."""
        return max((change for change in self.changes if change.row.attack == WORST_CASE), key=lambda c: c.row.eps)

    @property
    def answer(self) -> str:
        """The outcome in one sentence, which begins with PASS or FAIL."""
        if self.passed:
            return f"PASS: {self.headline}"
        # First what people ask for, the worst case; but a robust image is right when unchanged, so where the clean
        # accuracy fell by more, its fall explains the other.
        asked = [change for change in self.changes if change.row.attack in (CLEAN, WORST_CASE)]
        order = [change.row for change in sorted(asked, key=lambda c: (c.change, c.row.attack != CLEAN, c.after))]
        first = min(self.failures, key=lambda f: order.index(f.row) if f.row in order else len(order))
        more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        return f"FAIL{more}: {first.message}"

    @cached_property
    def causes(self) -> tuple[str, ...]:
        """Why it fails, where that can be known, in sentences."""
        return tuple(causes.causes(self))

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What else differs, what could not be checked and what was left out, in sentences."""
        return tuple(causes.notes(self))

    def ids(self, positions: np.ndarray) -> list[str]:
        """The samples at `positions`, by id where either run knows it."""
        return [self.samples.name(int(position)) for position in positions]

    def is_fall(self, change: Change) -> bool:
        """Whether the accuracy fell, significantly."""
        return change.change < 0 and change.p_adjusted <= self.rules.level


def compare(baseline: Verdicts, current: Verdicts, rules: Rules = Rules()) -> Comparison:
    """Hold `current` against `baseline`. Incomparable, an InputError, where they are not the same evaluation.

    `current` may have more attacks, and larger eps, than the baseline: of these only the least accuracies are asked.
    """
    pairs = pair(baseline, current, rules.eps)
    tests = _tests(pairs)
    changes = _changes(pairs, tests)
    judgements = (
        *_drops([change for change in changes if change.row in tests], rules),
        *_floors(changes, current, rules),
        *_checks(baseline, current),
    )
    return Comparison(baseline, current, rules, pairs, changes, 1 + max(tests.values()), judgements)


def _tests(rows: Collection[Row]) -> dict[Row, int]:
    """Which test, from 0, each row stands for: the worst case over one attack is that attack's row again.

    The control is none beside attacks: what it breaks is in the worst case, and more tests raise the bar for all.
    """
    tests: dict[Row, int] = {}
    for row in rows:
        alike = [other for other in rows if other[1:] == row[1:] and other.attack not in (row.attack, WORST_CASE)]
        if row.attack == CONTROL and alike:
            continue
        again = row.attack == WORST_CASE and len(alike) == 1
        tests[row] = tests[alike[0]] if again else max(tests.values(), default=-1) + 1
    return tests


def _changes(pairs: Pairs, tests: dict[Row, int]) -> tuple[Change, ...]:
    changes = []
    for row, (before, after) in pairs.items():
        fell, rose, n = np.flatnonzero(before & ~after), np.flatnonzero(after & ~before), len(before)
        low, high = paired_difference(len(fell), len(rose), n, kept=int((before & after).sum()))
        p_value = mcnemar(len(fell), len(rose))
        changes.append(Change(row, n, int(before.sum()), int(after.sum()), fell, rose, low, high, p_value))
    adjusted = holm(list({tests[change.row]: change.p_value for change in changes if change.row in tests}.values()))
    return tuple(
        replace(change, p_adjusted=adjusted[tests[change.row]]) if change.row in tests else change for change in changes
    )


def _drops(changes: Sequence[Change], rules: Rules) -> Iterator[Judgement]:
    names = {"max-drop": rules.max_drop, "significant": rules.significant}
    rule = ", ".join(name for name, value in names.items() if value is not None)
    for change in changes:
        fails = (
            change.change < 0
            and (rules.max_drop is None or -change.change > rules.max_drop)
            and (rules.significant is None or change.p_adjusted <= rules.significant)
        )
        yield Judgement(rule, str(change.row), not fails, str(change), change.row)


def _floors(changes: Sequence[Change], current: Verdicts, rules: Rules) -> Iterator[Judgement]:
    """Least accuracies are asked of the whole current run, of attacks and eps that the baseline lacks too."""
    least = rules.min_robust_accuracy
    for worst, stands in worst_cases(current.robust).items():
        if least is None or (rules.eps and not among(worst.eps, rules.eps)):
            continue
        at = [change.row for change in changes if change.row.norm == worst.norm and same_eps(change.row.eps, worst.eps)]
        ran = {row.attack for row in current.robust if row[1:] == worst[1:]}
        new = ", ".join(map(visible, sorted(ran - {row.attack for row in at}))) if at else ""
        subject = f"{worst} (with {new}, which the baseline lacks)" if new else str(worst)
        # Where it is the accuracy that was compared, it is that row which fails.
        row = next((row for row in at if row.attack == WORST_CASE and not new), None)
        yield _floor("min-robust-accuracy", least, subject, stands, row, rules.strict)
    if rules.min_clean_accuracy is not None:
        clean = changes[0].row
        yield _floor("min-clean-accuracy", rules.min_clean_accuracy, str(clean), current.clean, clean, rules.strict)


def _floor(rule: str, least: float, subject: str, stands: np.ndarray, row: Row | None, strict: bool) -> Judgement:
    right, n = int(stands.sum()), len(stands)
    low, _ = wilson(right, n)
    passed = (low if strict else right / n) >= least
    bound = f", the 95 % interval from {format_percent(low)}" if strict else ""
    message = (
        f"{subject} is {format_percent(right, n)}{bound}, "
        f"{'at least' if passed else 'below'} the {format_percent(least)} asked for"
    )
    return Judgement(rule, subject, passed, message, row)


def _checks(baseline: Verdicts, current: Verdicts) -> Iterator[Judgement]:
    """Checks that say less good of this run than of the baseline: its numbers, up or down, are not to be believed."""
    before = {finding.name: finding.level for finding in baseline.findings}
    for finding in current.findings if before else ():
        if finding.name in MODEL_CHECKS or finding.level == "fail":
            worse = _LEVELS.index(finding.level) > _LEVELS.index(before.get(finding.name, "pass"))
            message = visible(f"{finding.name} – {finding.message.rstrip('.')}")
            yield Judgement("checks", visible(finding.name), not worse, message)
