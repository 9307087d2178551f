"""report.json: the run for programs. Strict JSON: what is not a number is null."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reports.answer import answer, verdict
from robust.baseline import from_store, pack
from robust.diagnostics import standing_unproved
from robust.files import write_text
from robust.store import SCHEMA_VERSION, Store


def write_json(store: Store, folder: Path) -> None:
    """Write `folder`/report.json. InputError where the run holds no results, or lacks verdicts on some samples."""
    identity, details, summary, findings = store.identity, store.details, store.summary(), store.findings()
    level, reason = verdict(findings, standing_unproved(store, summary))
    refuted, overlooked = store.twin_disagreements()
    report = {
        "schema_version": SCHEMA_VERSION,
        "answer": answer(store, summary),
        "verdict": {"level": level, "reason": reason},
        "command": details.get("command"),
        "environment": details.get("environment"),
        "model": identity.get("model"),
        "class_names": details.get("class_names"),
        "data": {
            **identity.get("data", {}),
            "fingerprint": data_fingerprint(store),
            "skipped_images": details.get("skipped_images"),
        },
        "options": identity.get("options"),
        "attacks": details.get("attacks"),
        "summary": summary.to_dict("records"),
        "findings": [asdict(finding) for finding in findings],
        "certified": {"by": details.get("certifier"), "images": store.certified()},
        "twin": {"description": details.get("twin"), "refuted": refuted, "overlooked": overlooked},
        "started": details.get("started"),
        "finished": details.get("finished"),
        "verdicts": pack(from_store(store)),
    }
    text = json.dumps(_strict(report), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder / "report.json", text + "\n")


def data_fingerprint(store: Store) -> str | None:
    """That of the data as they were read; of a stream it is known at the end of the run only."""
    return store.details.get("data_fingerprint") or store.identity.get("data", {}).get("fingerprint")


def _strict(value: Any) -> Any:
    """`value` with None for NaN and infinity, for which JSON has no words."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
