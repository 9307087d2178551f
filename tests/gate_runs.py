"""Runs made by hand for the tests of the gate: what each sample's verdicts were, and nothing else of interest."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from reports import write_reports
from robust.store import FILENAME, Clean, Finding, Result, Store
from robust.verdicts import Row, Samples, Verdicts

MODEL = {"name": "net", "source": "net of a.py", "fingerprint": "f" * 64, "num_classes": 5, "input_size": [3, 8, 8]}
OPTIONS = {
    "attacks": ["pgd"], "norm": "linf", "eps": [0.1], "steps": 10, "step_size": None, "restarts": 1,
    "random_start": None, "target": None, "batch_size": 64, "limit": None, "seed": 0, "device": "cpu",
    "save_adversarials": False,
}  # fmt: skip
PGD = {"norm": "linf", "targeted": False, "restarts": 1, "steps": 10, "step_size": None, "random_start": True}
ENVIRONMENT = {"robust": "0.1.0", "torch": "2.15.0"}
CHECKS = (Finding("eval mode", "pass", "the model came in eval mode"), Finding("sample size", "warn", "only 4 images"))

Bits = Sequence[int] | np.ndarray  # 1 for right, a sample each


def verdicts(
    robust: Mapping[tuple[str, float], Bits],
    clean: Bits | None = None,
    ids: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    sha256: Sequence[str] | None = None,
    **other: Any,
) -> Verdicts:
    """As `robust.baseline.read` gives them, from {(attack, eps): verdicts}. `clean` is all right by default."""
    n = len(next(iter(robust.values())))
    norm = other.pop("norm", "linf")
    samples, order = Samples.of(
        ids or [f"{k:04d}.png" for k in range(n)], labels or [0] * n, sha256 or [f"{k:064x}" for k in range(n)]
    )
    known: dict[str, Any] = {
        "source": "runs/a", "model": MODEL, "options": OPTIONS, "environment": ENVIRONMENT, "findings": CHECKS,
        "attacks": {attack: PGD for attack, _ in robust},
    }  # fmt: skip
    right = np.ones(n, bool) if clean is None else np.array(clean, bool)
    return Verdicts(
        samples=samples,
        clean=right[order],
        robust={Row(attack, norm, eps): np.array(bits, bool)[order] for (attack, eps), bits in robust.items()},
        **known | other,
    )


def make_run(
    folder: Path,
    robust: Mapping[tuple[str, float], Bits],
    clean: Bits | None = None,
    ids: Sequence[str] | None = None,
    reports: bool = False,
    finished: bool = True,
    model: Mapping[str, Any] = MODEL,
    findings: Sequence[Finding] = CHECKS,
    **options: Any,
) -> Path:
    """The same as a run directory. Every attack has the same eps; labels are k % 5."""
    n = len(next(iter(robust.values())))
    ids = ids or [f"{k:04d}.png" for k in range(n)]
    right = [1] * n if clean is None else clean
    attacks, ladder = list(dict.fromkeys(attack for attack, _ in robust)), sorted({eps for _, eps in robust})
    details: dict[str, Any] = {
        "environment": ENVIRONMENT, "attacks": [{"name": name, "parameters": PGD} for name in attacks],
        "data_fingerprint": "d" * 64, "class_names": list("abcde"),
    }  # fmt: skip
    store = Store.create(
        folder / FILENAME,
        {
            "model": dict(model),
            "data": {"name": "/home/me/images.zip", "size": n},
            "options": OPTIONS | {"attacks": attacks, "eps": ladder} | options,
        },
        details | ({"finished": "2026-01-02T03:04:05+00:00"} if finished else {}),
    )
    labels = [k % 5 for k in range(n)]
    preds = [label if ok else (label + 1) % 5 for label, ok in zip(labels, right, strict=True)]
    store.add_clean([Clean(k, ids[k], f"{k:064x}", labels[k], preds[k], 0.9) for k in range(n)])
    for attack in attacks:
        results = [
            _result(k, attack, eps, bool(right[k]) and not robust[attack, eps][k]) for k in range(n) for eps in ladder
        ]
        store.add_unit(0, attack, 1.0, results)
    store.set_findings(findings)
    if reports:
        write_reports(store, folder)
    store.close()
    return folder


def _result(position: int, attack: str, eps: float, success: bool) -> Result:
    values = {
        "position": position, "attack": attack, "eps": eps, "success": success, "success_8bit": success,
        "forwards": 3, "gradients": 2,
    }  # fmt: skip
    if success:
        values |= {"adv_pred": 4, "adv_confidence": 0.5, "distance_linf": eps, "distance_l2": eps, "restart": 0}
    return Result(**{field.name: values.get(field.name) for field in fields(Result)})
