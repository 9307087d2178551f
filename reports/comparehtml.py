"""The page of a comparison: both runs side by side, and the images that newly fell. One file, as report.html is."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup

from reports.gallery import Example
from reports.html import LIMIT, environment, view
from robust.files import write_text
from robust.gate import Change, Comparison
from robust.statistics import WORST_CASE
from robust.store import FILENAME, Clean, Picture, Store
from robust.text import format_bare_p, format_points, visible
from robust.units import format_eps, format_percent
from robust.verdicts import CLEAN, Verdicts

EXAMPLES = 6
IDS_SHOWN = 500


def write_page(comparison: Comparison, current: Path, path: Path) -> None:
    """Write the page to `path`. Pictures come from `current`, where that is a run directory or its store."""
    kept = current.name == FILENAME or (current / FILENAME).is_file()
    store = Store.open(current) if kept else None
    class_names = None if store is None else store.details.get("class_names")
    examples = [] if store is None else [_view(example, class_names) for example in _newly_fallen(comparison, store)]
    template = environment(class_names).get_template("compare.html.j2")
    context = _context(comparison) | {"pictured": store is not None}
    for count in range(len(examples), -1, -1):
        text = template.render(context, examples=examples[:count])
        if len(text.encode()) < LIMIT:
            break
    write_text(path, text)
    if store is not None:
        store.close()


def write_reason(reason: str, path: Path) -> None:
    """A page that says why there is no comparison."""
    template = environment(None).get_template("incomparable.html.j2")
    write_text(path, template.render(reason=visible(reason)))


def _view(example: Example, class_names: Sequence[str] | None) -> dict[str, Any]:
    return view(example, class_names) | {"title": f"Fell to {visible(example.picture.attack)}"}


def _context(comparison: Comparison) -> dict[str, Any]:
    headline = comparison.headline
    verdict, _, said = comparison.answer.partition(": ")
    return {
        "comparison": comparison,
        "level": "pass" if comparison.passed else "fail",
        "verdict": verdict,
        "said": said[:1].upper() + said[1:],
        "failures": [failure for failure in comparison.failures if failure.message != said],
        "groups": list(_groups(comparison)),
        "charts": [Markup(chart(comparison, 640, "wide")), Markup(chart(comparison, 340, "narrow"))],
        "headline": headline,
        "fell": list(map(visible, comparison.ids(headline.fell[:IDS_SHOWN]))),
        "rose": list(map(visible, comparison.ids(headline.rose[:IDS_SHOWN]))),
        "runs": [("before", _run(comparison.baseline)), ("now", _run(comparison.current))],
    }


def _groups(comparison: Comparison) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(what its attack is called, its rows), clean accuracy first and the worst case next."""
    failing = {failure.row for failure in comparison.failures}
    rank = {CLEAN: 0, WORST_CASE: 1}
    attacks = dict.fromkeys(change.row.attack for change in comparison.changes)
    widest = max(max(abs(change.low), abs(change.high)) for change in comparison.changes)
    for attack in sorted(attacks, key=lambda attack: rank.get(attack, 2)):
        rows = [change for change in comparison.changes if change.row.attack == attack]
        yield rows[0].row.label, [_row(change, change.row in failing, widest) for change in rows]


def _row(change: Change, fails: bool, widest: float) -> dict[str, Any]:
    def at(share: float) -> str:
        """Where on a line from -widest to widest, in percent of its length."""
        return f"{50 + 50 * share / (widest or 1):.2f}%"

    return {
        "eps": format_eps(change.row.eps, change.row.norm),
        "fails": fails,
        "before": change.before / change.n,
        "now": change.after / change.n,
        "points": format_points(change.change),
        "interval": f"{format_points(change.low)} to {format_points(change.high)}",
        "low": at(change.low),
        "at": at(change.change),
        "high": at(change.high),
        "fell": len(change.fell),
        "rose": len(change.rose),
        "p": format_bare_p(change.p_adjusted),
    }


def chart(comparison: Comparison, width: int, css_class: str) -> str:
    """Worst-case accuracy against eps, before and now, as <svg>; eps are evenly spaced, clean accuracy is at 0."""
    height, left, right, top, bottom = 260, 52, 64, 12, 34
    worst = sorted((c for c in comparison.changes if c.row.attack == WORST_CASE), key=lambda c: (c.row.norm, c.row.eps))
    changes = [comparison.changes[0], *worst]

    def x(k: int) -> float:
        return left + k * (width - left - right) / len(worst)

    def y(share: float) -> float:
        return top + (1 - share) * (height - top - bottom)

    parts = []
    for percent in range(0, 101, 25):
        parts.append(f'<path class="grid" d="M{left} {y(percent / 100):.1f}H{width - right}"/>')
        parts.append(f'<text x="{left - 10}" y="{y(percent / 100) + 4:.1f}" text-anchor="end">{percent} %</text>')
    for k in range(0, len(changes), -(-len(changes) * 60 // width)):
        label = format_eps(changes[k].row.eps, changes[k].row.norm)
        parts.append(f'<text x="{x(k):.1f}" y="{height - 12}" text-anchor="middle">{label}</text>')
    before, now = [change.before / change.n for change in changes], [change.after / change.n for change in changes]
    for name, shares in (("before", before), ("now", now)):
        points = [(f"{x(k):.1f}", f"{y(share):.1f}") for k, share in enumerate(shares)]
        parts.append(f'<polyline class="{name}" points="{" ".join(map(",".join, points))}"/>')
        parts += [f'<circle class="{name}" cx="{cx}" cy="{cy}" r="4"/>' for cx, cy in points]
    # The names stand at the ends of the lines, apart even where these meet.
    upper, lower = ("before", "now") if before[-1] >= now[-1] else ("now", "before")
    ends = sorted((y(before[-1]), y(now[-1])))
    gap = max(0.0, 16 - (ends[1] - ends[0])) / 2
    for name, at in ((upper, ends[0] - gap), (lower, ends[1] + gap)):
        parts.append(f'<text class="{name}" x="{width - right + 10}" y="{at + 4:.1f}">{name}</text>')
    words = "; ".join(
        f"{c.row}: {format_percent(c.before, c.n)} before, {format_percent(c.after, c.n)} now" for c in changes
    )
    return (
        f'<svg class="{css_class}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(words)}">'
        f"{''.join(parts)}</svg>"
    )


def _run(run: Verdicts) -> dict[str, Any]:
    model = run.model
    said = {
        "file": run.source,
        "model": model.get("source") or model.get("name"),
        "fingerprint": model.get("fingerprint"),
        "data": run.data.get("name"),
        "seed": run.options.get("seed"),
        "environment": ", ".join(f"{name} {version}" for name, version in run.environment.items()),
    }
    return {name: visible(str(value)) for name, value in said.items() if value not in (None, "")}


def _newly_fallen(comparison: Comparison, store: Store) -> list[Example]:
    """Pictures of samples that fell, those of the headline's row first, nearest first; no sample twice."""
    fell = _fell_by_attack(comparison)
    headline = set(comparison.ids(comparison.headline.fell))
    norm = comparison.headline.row.norm
    chosen: dict[str, Example] = {}
    examples = [Example(picture, clean, norm) for picture, clean in _pictures(store, fell)]
    examples.sort(key=lambda e: (e.clean.sample_id not in headline, e.picture.distance_l2, e.clean.position))
    for example in examples:
        chosen.setdefault(example.clean.sample_id, example)
    return list(chosen.values())[:EXAMPLES]


def _fell_by_attack(comparison: Comparison) -> dict[str, set[str]]:
    """Attack -> ids of the samples that withstood it before, at some eps, and do not now."""
    found: dict[str, set[str]] = {}
    for change in comparison.changes:
        if change.row.attack not in (CLEAN, WORST_CASE):
            # One that is wrong even unchanged has no adversarial to show.
            still_right = change.fell[comparison.current.clean[change.fell]]
            found.setdefault(change.row.attack, set()).update(comparison.ids(still_right))
    return found


def _pictures(store: Store, fell: dict[str, set[str]]) -> Iterator[tuple[Picture, Clean]]:
    """What the run kept of them: for its report, and with --save-adversarials."""
    for picture in store.pictures():
        clean = store.clean(picture.position, 1)[0]
        if clean.sample_id in fell.get(picture.attack, ()):
            yield picture, clean
    for clean, attack, _, x, x_adv in store.adversarials():
        if clean.sample_id in fell.get(attack, ()):
            samples = store.samples(position=clean.position)
            row = samples[samples.success & (samples.attack == attack)].iloc[0].to_dict()
            values = row | {"role": "typical", "rank": 0.0, "position": clean.position, "attack": attack,
                            "x": x, "x_adv": x_adv, "distance": 0.0}  # fmt: skip
            yield Picture(**{field.name: values[field.name] for field in fields(Picture)}), clean
