"""Are two runs the same evaluation of two networks? Then their verdicts, row by row in pairs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from robust.errors import InputError
from robust.options import Options
from robust.text import visible
from robust.units import format_eps, same_eps
from robust.verdicts import CLEAN, Row, Verdicts, among, worst_cases

Pairs = dict[Row, tuple[np.ndarray, np.ndarray]]  # row -> verdicts (n,) bool before, and after

# Options that leave the question as it is. Data and eps are compared by themselves; what an attack was told is compared
# attack by attack, where both runs recorded it.
_FREE = frozenset(
    {"attacks", "norm", "eps", "batch_size", "limit", "seed", "device", "conv", "save_adversarials", "certify"}
)
_OF_ATTACKS = frozenset({"steps", "step_size", "restarts", "random_start", "queries"})
_DEFAULTS = {option.name: option.default for option in fields(Options)}


class Incomparable(InputError):
    """The two runs do not answer the same question; the message says in what they differ."""


def pair(baseline: Verdicts, current: Verdicts, eps: Sequence[float] = ()) -> Pairs:
    """The verdicts before and after: on unchanged images, each (attack, norm, eps), the worst case at each (norm, eps).

    eps: those wanted; () for all of the baseline's. `current` may have more attacks and larger eps; they are left out.
    Incomparable where data, classes, attacks, their options or their eps differ. InputError for an eps nobody has.
    """
    _require(eps, baseline)
    pairs: Pairs = {Row(CLEAN, "", 0.0): (baseline.clean, current.clean)}
    reasons = list(_differences(baseline, current))
    for attack, norm in sorted({(row.attack, row.norm) for row in baseline.robust}):
        there, here = _ladder(baseline, attack, norm), _ladder(current, attack, norm)
        wanted = [k for k, row in enumerate(there) if not eps or among(row.eps, eps)]
        climbed = there[: max(wanted, default=-1) + 1]
        if len(here) >= len(climbed) and all(same_eps(a.eps, b.eps) for a, b in zip(climbed, here, strict=False)):
            pairs |= {there[k]: (baseline.robust[there[k]], current.robust[here[k]]) for k in wanted}
        else:
            reasons.append(_unlike(attack, norm, climbed, here, current))
    if reasons:
        raise Incomparable(f"{current.source} cannot be compared with {baseline.source}: {'; '.join(reasons)}")
    attacked = [row for row in pairs if row.attack != CLEAN]
    before, after = (worst_cases({row: pairs[row][k] for row in attacked}) for k in (0, 1))
    pairs |= {row: (before[row], after[row]) for row in before}
    return pairs


def _differences(baseline: Verdicts, current: Verdicts) -> Iterator[str]:
    if not baseline.samples.equal(current.samples):
        yield f"other data: {baseline.samples.difference(current.samples)}{_other_draw(baseline, current)}"
    there, here = baseline.model.get("num_classes"), current.model.get("num_classes")
    if None not in (there, here) and there != here:
        yield visible(f"the model has {here} classes, and had {there}")
    both = [name for name in baseline.attacks if name in current.attacks]
    if baseline.options and current.options:
        for name in sorted({*baseline.options, *current.options} - _FREE - (_OF_ATTACKS if both else frozenset())):
            yield from _differing(f"option {name}", name, baseline.options, current.options, _DEFAULTS.get(name))
    for attack in both:
        parameters = baseline.attacks[attack], current.attacks[attack]
        # One that only one run names came or went with a version of the library.
        for name in sorted(set(parameters[0]) & set(parameters[1])):
            yield from _differing(f"{attack}'s {name}", name, *parameters)


def _differing(
    what: str, name: str, there: Mapping[str, Any], here: Mapping[str, Any], default: Any = None
) -> Iterator[str]:
    before, after = there.get(name, default), here.get(name, default)
    if before != after:
        yield visible(f"{what} ({before} there, {after} here)")


def _other_draw(baseline: Verdicts, current: Verdicts) -> str:
    """The likeliest reason for other data: --limit draws its subset from the seed."""
    draws = [(run.options.get("limit"), run.options.get("seed")) for run in (baseline, current)]
    if draws[0] == draws[1] or all(limit is None for limit, _ in draws):
        return ""
    said = ["all images" if limit is None else f"drawn by --limit {limit} --seed {seed}" for limit, seed in draws]
    return visible(f" ({said[0]} there, {said[1]} here)")


def _require(eps: Sequence[float], baseline: Verdicts) -> None:
    """InputError for an eps that the baseline has not."""
    norm = next(iter(baseline.robust)).norm
    known = sorted({row.eps for row in baseline.robust})
    for radius in eps:
        if not among(radius, known):
            said = ", ".join(format_eps(value, norm) for value in known)
            raise InputError(f"{baseline.source} has no eps {format_eps(radius, norm)}; it has {said}")


def _ladder(verdicts: Verdicts, attack: str, norm: str) -> list[Row]:
    return sorted(row for row in verdicts.robust if (row.attack, row.norm) == (attack, norm))


def _unlike(attack: str, norm: str, there: Sequence[Row], here: Sequence[Row], current: Verdicts) -> str:
    """Why an attack's rows cannot be compared. Its eps are a ladder: what is found at one counts at all larger ones."""
    failed = next((finding.message for finding in current.findings if finding.name == f"attack {attack}"), None)
    if failed is not None:
        return visible(f"{attack} failed: {failed}")
    if not here:
        norms = sorted({row.norm for row in current.robust if row.attack == attack})
        return visible(f"{attack} ran in {' and '.join(norms)}, not in {norm}" if norms else f"{attack} is missing")
    measured, wanted = [row.eps for row in here], [row.eps for row in there]
    if lost := [format_eps(eps, norm) for eps in wanted if not among(eps, measured)]:
        return visible(f"{attack} lacks eps {', '.join(lost)}")
    extra = [format_eps(eps, norm) for eps in measured if eps < wanted[-1] and not among(eps, wanted)]
    return visible(f"{attack} climbed eps {', '.join(extra)} too, and what it finds there counts at larger ones")
