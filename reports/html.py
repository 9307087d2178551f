"""report.html: one file for people, with no reference to anything outside it."""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from reports.answer import answer, attack_label, headline, target_name, verdict
from reports.breakdown import confusions, per_class
from reports.curve import NARROW, WIDE, inline_svg, nearest, with_certified
from reports.gallery import ROLES, Example, choose, data_uri, rule
from reports.jsonreport import data_fingerprint
from robust import units
from robust.diagnostics import standing_unproved
from robust.files import write_text
from robust.statistics import CONTROL, WORST_CASE, wilson
from robust.store import Store
from robust.text import visible

LIMIT = 5_000_000  # bytes
_TOGETHER = re.compile(r" (?=%)|(?<=\bp) (?=[<=])|(?<=\bp\s[<=]) ")  # '5 %' and 'p < 0.001' stay on one line
CONFUSIONS_SHOWN = 12
SMALL = 100  # pixels: below, an image is drawn enlarged and with its pixels to be seen


def write_html(store: Store, folder: Path) -> None:
    """Write `folder`/report.html, with as many examples as fit under `LIMIT`, the last ones left out first."""
    summary = store.summary()
    class_names = store.details.get("class_names")
    chosen = choose(store, summary)
    examples = [view(example, class_names) for example in chosen]
    template = environment(class_names).get_template("report.html.j2")
    context = _context(store, summary)
    for count in range(len(examples), -1, -1):
        shown = sorted(examples[:count], key=lambda example: list(ROLES).index(example["role"]))
        text = template.render(context, examples=shown, rule=rule(store, summary, chosen[:count]))
        if len(text.encode()) < LIMIT or not count:
            break
    write_text(folder / "report.html", text)


def environment(class_names: Sequence[str] | None) -> Environment:
    """Jinja with this package's templates: what it fills in is escaped, and said as `robust.units` says it."""
    made = Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalized,
    )
    made.filters |= {
        "percent": units.format_percent,
        "eps": units.format_eps,
        "count": units.format_count,
        "images": units.format_images,
        "seconds": units.format_seconds,
        "attack": attack_label,
        "said": _said,
        "time": _time,
        "class": lambda label: units.format_class(label, class_names),
        "nobreak": lambda text: _TOGETHER.sub("\u00a0", str(text)),
    }
    made.globals |= {"interval": units.format_interval, "distance": units.format_distance}
    return made


def _finalized(value: Any) -> Any:
    """Names come from anywhere: what would turn the direction of the page's writing, or not be seen, is a symbol."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _context(store: Store, summary: pd.DataFrame) -> dict[str, Any]:
    identity, details, row = store.identity, store.details, headline(summary)
    findings = store.findings()
    level, reason = verdict(findings, standing_unproved(store, summary))
    correct = round(row.clean_accuracy * row.n)
    samples = store.samples(row.eps)
    confused = confusions(samples)
    attacks = list(_by_attack(summary))
    skipped = details.get("skipped_images") or 0
    distances, drawn = nearest(store), with_certified(summary, store)
    return {
        "answer": answer(store, summary),
        "target": target_name(store),
        "level": level,
        "reason": reason,
        "model": identity.get("model", {}),
        "data": {**identity.get("data", {}), "fingerprint": data_fingerprint(store)},
        "options": {key: value for key, value in identity.get("options", {}).items() if key != "seed"},
        "seed": identity.get("options", {}).get("seed", ""),
        "details": details,
        "skipped": skipped if isinstance(skipped, int) else len(skipped),
        "row": row,
        "clean": {"correct": correct, "interval": wilson(correct, int(row.n))},
        "curves": [Markup(inline_svg(drawn, distances, *kind)) for kind in ((WIDE, "wide"), (NARROW, "narrow"))],
        "certified": list(zip(sorted(summary.eps.unique()), store.certified(), strict=True)),
        "nearest": [_least(attack, found, correct) for attack, found in distances.items() if attack != WORST_CASE],
        "attacks": attacks,
        "control": next((rows[-1] for attack, rows in attacks if attack == CONTROL), None),
        "classes": per_class(samples).to_dict("records"),
        "confusions": confused.head(CONFUSIONS_SHOWN).to_dict("records"),
        "confusions_hidden": max(0, len(confused) - CONFUSIONS_SHOWN),
        "findings": sorted(findings, key=lambda finding: ("fail", "warn", "pass").index(finding.level)),
        "efforts": list(_efforts(store, summary)),
        "twin": store.twin_disagreements(),
    }


def _by_attack(summary: pd.DataFrame) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(attack, its rows by rising eps), the worst case first and the control last."""
    rank = {WORST_CASE: -1, CONTROL: 1}
    for attack in sorted(summary.attack.unique(), key=lambda attack: rank.get(attack, 0)):
        rows = summary[summary.attack == attack].to_dict("records")
        yield attack, [{**row, "robust": round(row["robust_accuracy"] * row["n"])} for row in rows]


def _least(attack: str, distances: np.ndarray, correct: int) -> dict[str, Any]:
    """The distance within which half of the images classified correctly break, infinite where fewer do."""
    ordered = np.append(distances, np.full(correct - len(distances), np.inf))
    half = np.quantile(ordered, 0.5, method="inverted_cdf")  # a mean of two would be infinite where exactly half break
    return {"attack": attack, "found": len(distances), "correct": correct, "median": float(half)}


def _efforts(store: Store, summary: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """What each attack is, and what it cost; of those that failed, why."""
    details = store.details
    known = {attack["name"]: _explicit(attack) for attack in details.get("attacks") or []}
    for attack, rows in summary[summary.attack != WORST_CASE].groupby("attack", sort=False):
        seconds, n = float(rows.seconds.sum()), int(rows.n.iloc[0])
        yield {
            "description": "",
            "source": "",
            "parameters": {},
            **known.get(str(attack), {}),
            "name": attack,
            "forwards": int(rows.forwards.sum()),
            "gradients": int(rows.gradients.sum()),
            "broken": store.components(str(attack)),
            "seconds": seconds,
            "speed": _speed(n / seconds) if seconds else "–",
        }
    for name, message in (details.get("failed_attacks") or {}).items():
        yield {
            "description": "",
            "source": "",
            "parameters": {},
            **known.get(name, {}),
            "name": name,
            "failed": message,
        }


def _explicit(attack: dict[str, Any]) -> dict[str, Any]:
    """What was recorded of an attack, with the step size that pgd chooses for itself; see attacks/pgd.py."""
    parameters = attack["parameters"]
    if attack["name"] == "pgd" and parameters["step_size"] is None:
        return {**attack, "parameters": {**parameters, "step_size": f"{4 / parameters['steps']:.4g}"}}
    return attack


def _speed(rate: float) -> str:
    """Images a second to three digits, those before the point in full: '6,810', '12.3'."""
    return f"{rate:,.0f}" if rate >= 99.95 else f"{rate:.3g}"


def _said(value: Any, key: str, norm: str) -> str:
    """An option as text."""
    if isinstance(value, list | tuple):
        return " ".join(units.format_eps(item, norm) if key == "eps" else str(item) for item in value)
    if isinstance(value, dict):  # of foolbox's, by their own names
        return " ".join(f"{name} {_said(item, name, norm)}" for name, item in value.items()) or "foolbox's own"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _time(text: str) -> str:
    """A time in ISO format, to the minute; another text as it is."""
    try:
        return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return text


def view(example: Example, class_names: Sequence[str] | None) -> dict[str, Any]:
    """What the template draws of an example."""
    picture, clean = example.picture, example.clean
    width = picture.x.shape[-1]
    zoom = max(1, 128 // width) if width < SMALL else 1
    return {
        "role": picture.role,
        "title": ROLES[picture.role],
        "id": clean.sample_id,
        "scale": example.scale_label,
        "factor": example.factor,
        "size": example.size,
        "small": width < SMALL,
        "width": width * zoom,
        "height": picture.x.shape[-2] * zoom,
        "before": units.format_class(clean.clean_pred, class_names),
        "before_confidence": units.format_percent(clean.clean_confidence),
        "after": units.format_class(picture.adv_pred, class_names),
        "after_confidence": units.format_percent(picture.adv_confidence),
        "x": Markup(data_uri(picture.x)),
        "perturbation": Markup(data_uri(example.perturbation)),
        "x_adv": Markup(data_uri(picture.x_adv)),
    }
