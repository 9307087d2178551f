"""What a verification leaves: verify.csv, one row a gate; verify.json, everything; verify.html, a page for people."""

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports.html import environment
from reports.tables import inert
from robust.files import write_text
from robust.text import visible
from robust.units import format_eps

if TYPE_CHECKING:
    from robust.conv.ladder import Measurement
    from robust.verification import Verification

# History: 1: first.
SCHEMA_VERSION = 1
COLUMNS = ("part", "subject", "layers", "algorithm", "result", "gate", "value", "limit", "torch", "passed")
RESULTS = ("forward", "input gradient", "weight gradient")
WINOGRAD = (
    "Winograd's F(4 × 4) is less accurate than a plain sum, and the more so the fewer channels there are: auto picks "
    "it from 512 channels on, and holds it against torch's error as all that it picks. An algorithm asked for by name "
    "where auto would take another is held against its own bound (4√K·u for F(4 × 4)), and its ratio is reported."
)


def write_verification(verification: "Verification", folder: Path, command: str) -> None:
    """All three into `folder`; `command` is what makes them again."""
    write_text(folder / "verify.csv", _csv(verification))
    write_text(folder / "verify.json", _json(verification, command))
    write_text(folder / "verify.html", _html(verification, command))


def _csv(verification: "Verification") -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    layers = {str(shape): " ".join(names) for shape, names in verification.shapes.items()}
    for row in verification.measurements:
        gate, named = row.gate, layers.get(row.subject, "")
        limit = "" if math.isinf(gate.limit) else gate.limit
        torchs = "" if row.torch is None else row.torch
        writer.writerow([row.part, row.subject, inert(named), row.algorithm, row.result, gate.name, gate.value, limit,
                         torchs, gate.passed])  # fmt: skip
    return text.getvalue()


def _json(verification: "Verification", command: str) -> str:
    report = {
        "schema_version": SCHEMA_VERSION,
        "passed": verification.passed,
        "answer": verification.answer,
        "command": command,
        "environment": verification.environment,
        "model": verification.model,
        "data": verification.data,
        "options": verification.options,
        "conversion": {
            "summary": verification.converted,
            "layers": [asdict(layer) for layer in verification.layers],
        },
        "notes": verification.notes,
        "left_out": verification.left_out,
        "shapes": [{"shape": str(shape), **asdict(shape), "layers": names} for shape, names in
                   verification.shapes.items()],
        "gates": [_measurement(row) for row in verification.measurements],
        "attacks": [asdict(attacked) for attacked in verification.attacked],
        "started": verification.started,
        "finished": verification.finished,
    }  # fmt: skip
    return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _measurement(row: "Measurement") -> dict[str, Any]:
    """Numbers that JSON has no words for are null: a value of NaN or infinity, and the limit of what has none."""
    gate = row.gate
    return {
        "part": row.part,
        "subject": row.subject,
        "algorithm": row.algorithm,
        "result": row.result,
        "gate": gate.name,
        "value": _finite(gate.value),
        "limit": _finite(gate.limit),
        "torch": _finite(row.torch),
        "passed": gate.passed,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _html(verification: "Verification", command: str) -> str:
    verdict, _, said = verification.answer.partition(": ")
    return (
        environment(None)
        .get_template("verify.html.j2")
        .render(
            v=verification,
            command=command,
            verdict=verdict,
            said=said,
            level="pass" if verification.passed else "fail",
            steps=list(ladder_rows(verification)),
            rows=list(shape_rows(verification)),
            results=RESULTS,
            winograd=WINOGRAD,
            network=[network_row(row) for row in verification.measurements if row.part == "network"],
            verdicts=list(verdict_rows(verification)),
            failures=[visible(str(row)) for row in verification.failures],
            layers=[{key: visible(str(value)) for key, value in asdict(layer).items()} for layer in
                    verification.layers],
            notes=[visible(note) for note in verification.notes],
            data={key: visible(str(value)) for key, value in verification.data.items()},
            model={key: visible(str(value)) for key, value in verification.model.items()},
        )
    )  # fmt: skip


# What the page and the terminal both show


def ladder_rows(verification: "Verification") -> Iterator[dict[str, Any]]:
    """The rungs of each miniature, in order: (algorithm, whether it passed)."""
    for subject, rows in _by_subject(verification, "ladder"):
        rungs: dict[str, bool] = {}
        for row in rows:
            rungs[row.algorithm] = rungs.get(row.algorithm, True) and row.gate.passed
        yield {"shape": subject, "rungs": list(rungs.items()), "passed": all(rungs.values())}


def shape_rows(verification: "Verification") -> Iterator[dict[str, Any]]:
    """Each distinct convolution at full size; of its results, the share of the bound and the ratio to torch's error."""
    layers = {str(shape): names for shape, names in verification.shapes.items()}
    for subject, rows in _by_subject(verification, "shapes"):
        gates = {(row.result, row.gate.name): row.gate for row in rows}
        cells = []
        for result in RESULTS:
            bound, relative = gates[result, "bound"], gates[result, "relative"]
            held = [gate for (of, _), gate in gates.items() if of == result]
            cells.append({
                "share": bound.value / bound.limit,
                "ratio": relative.value,
                "held": not math.isinf(relative.limit),
                "passed": all(gate.passed for gate in held),
            })  # fmt: skip
        yield {
            "shape": subject,
            "layers": [visible(name) for name in layers[subject]],
            "algorithm": rows[0].algorithm,
            "cells": cells,
            "share": max(cell["share"] for cell in cells),
            "exact": (RESULTS[0], "exact") in gates,
            "passed": all(row.gate.passed for row in rows),
        }


def network_row(row: "Measurement") -> dict[str, Any]:
    """One gate of the whole network, in words."""
    what, form = {
        "error": ("relative error", "{:.2g}".format),
        "relative": ("relative error over torch's", "{:.2f}".format),
        "written": ("values left unwritten", "{:.0f}".format),
        "signs": ("signs that are not float64's", lambda share: f"{100 * share:.4f} %"),
        "top-1": ("images of another top-1", "{:.0f}".format),
        "left to torch": ("left to torch", "{:.0f}".format),
    }[row.gate.name]
    return {
        "result": row.result,
        "what": what,
        "value": form(row.gate.value),
        "torch": "–" if row.torch is None or row.gate.name == "relative" else form(row.torch),
        "limit": "–" if math.isinf(row.gate.limit) else form(row.gate.limit),
        "passed": row.gate.passed,
    }


def verdict_rows(verification: "Verification") -> Iterator[dict[str, Any]]:
    """Each attack: on how many images the two networks come to the same, and confirm what fell on the other."""
    for attacked in verification.attacked:
        rows = [row for row in verification.measurements if (row.part, row.subject) == ("verdicts", attacked.attack)]
        differ = [
            visible(name)
            for name, *fell in zip(
                attacked.images, attacked.original_fell, attacked.converted_fell, strict=True
            )
            if fell[0] != fell[1]
        ]  # fmt: skip
        yield {
            "attack": attacked.attack,
            "eps": format_eps(attacked.eps, "linf"),
            "images": len(attacked.images),
            "same": attacked.same,
            "original": sum(attacked.original_fell),
            "converted": sum(attacked.converted_fell),
            "by_original": attacked.converted_confirmed.count(True),
            "by_converted": attacked.original_confirmed.count(True),
            "differ": differ,
            "passed": all(row.gate.passed for row in rows),
        }


def _by_subject(verification: "Verification", part: str) -> Iterator[tuple[str, list["Measurement"]]]:
    rows: dict[str, list[Measurement]] = {}
    for row in verification.measurements:
        if row.part == part:
            rows.setdefault(row.subject, []).append(row)
    yield from rows.items()
