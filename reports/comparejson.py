"""A comparison as JSON: everything that it holds, ids included."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robust.files import write_text
from robust.gate import Change, Comparison
from robust.verdicts import Verdicts

# History: 1: first. 2: `error`, which is null, or why there is no comparison: then all else is left out.
# 3: `p_adjusted` is null for the noise control, which beside attacks is not tested.
SCHEMA_VERSION = 3


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write `comparison` to `path`: shares in [0, 1], of accuracies and of their changes; samples by id."""
    clean = comparison.changes[0]
    report = {
        "schema_version": SCHEMA_VERSION,
        "passed": comparison.passed,
        "answer": comparison.answer,
        "error": None,
        "causes": comparison.causes,
        "notes": comparison.notes,
        "rules": asdict(comparison.rules),
        "baseline": _run(comparison.baseline),
        "current": _run(comparison.current),
        "samples": len(comparison.samples),
        "tests": comparison.tests,
        "rows": [_row(comparison, change, clean) for change in comparison.changes],
        "judgements": [
            {**asdict(judgement), "row": judgement.row and judgement.row._asdict()}
            for judgement in comparison.judgements
        ],
    }
    _write(report, path)


def write_reason(reason: str, path: Path) -> None:
    """Why there is no comparison; not passed."""
    _write({"schema_version": SCHEMA_VERSION, "passed": False, "answer": reason, "error": reason}, path)


def _write(report: dict[str, Any], path: Path) -> None:
    write_text(path, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _run(run: Verdicts) -> dict[str, Any]:
    return {"source": run.source, "model": run.model, "data": run.data, "environment": run.environment}


def _row(comparison: Comparison, change: Change, clean: Change) -> dict[str, Any]:
    """One row; of clean accuracy, for which attack is "clean", the robust accuracy is the clean one."""
    return {
        **change.row._asdict(),
        "clean_accuracy": {"baseline": clean.before / clean.n, "current": clean.after / clean.n},
        "robust_accuracy": {"baseline": change.before / change.n, "current": change.after / change.n},
        "change": change.change,
        "ci_low": change.low,
        "ci_high": change.high,
        "p_value": change.p_value,
        "p_adjusted": None if math.isnan(change.p_adjusted) else change.p_adjusted,
        "fell": comparison.ids(change.fell),
        "rose": comparison.ids(change.rose),
    }
