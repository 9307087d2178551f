"""Verdicts from any file that holds them, and robustness-baseline.json: the verdicts of a run, made to be committed.

The baseline is a part of report.json, without what names a sample: one reader reads both. A verdict is one bit, and the
samples are in an order that depends on their ids alone, so that what a diff shows is what changed.
"""

import base64
import binascii
import io
import json
import sqlite3
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from robust import __version__, samples_csv
from robust.errors import InputError
from robust.files import write_text
from robust.store import BUSY, FILENAME, SCHEMA_VERSION, Busy, Finding, Store, is_locked
from robust.text import visible
from robust.verdicts import Row, Samples, Verdicts, known_norm

BASELINE = "robustness-baseline.json"

# The schemas, of report.json and of baselines, whose "verdicts" are the ones described in `pack`. A committed baseline
# is to outlive many versions.
READABLE = range(1, SCHEMA_VERSION + 1)

_LINE = 100  # letters of packed verdicts in a line: a diff shows the lines with a verdict that changed
_SQLITE = b"SQLite format 3\0"


def read(path: Path) -> Verdicts:
    """The verdicts in `path`: a run directory or its run.sqlite, report.json or samples.csv, or a baseline.

    InputError, in one line, for anything else, and for a run that is not finished.
    """
    source = str(path)
    if path.is_dir():
        path = next((path / name for name in (FILENAME, "report.json") if (path / name).is_file()), path)
    if path.is_dir():
        raise InputError(f"{source} holds no run: there is neither {FILENAME} nor report.json")
    try:
        with open(path, "rb") as opened:
            # What comes through a pipe can be read once.
            stream = opened if opened.seekable() else io.BytesIO(opened.read())
            head = stream.read(len(_SQLITE))
            if head != _SQLITE and head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
                return _from_json(head + stream.read(), source)
            if head and head != _SQLITE:
                stream.seek(0)
                return samples_csv.read(stream, str(path))
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror or error}") from None
    if not head:
        raise InputError(f"{path} is empty")
    if not path.is_file():
        raise InputError(f"{source} is a pipe, and a run's store is read from its file: name that, or pipe report.json")
    return _from_run(path, source)


def from_store(store: Store, source: str = "this run") -> Verdicts:
    """The verdicts of a run; `source` names it in messages. InputError where it has none on some samples."""
    clean, (keys, success) = store.clean(), store.successes()
    if not keys or success.size != len(clean) * len(keys):
        raise InputError(f"{source} is not finished: it lacks verdicts on some samples; continue it with --resume")
    samples, order = Samples.of(
        [row.sample_id for row in clean], [row.label for row in clean], [row.sha256 for row in clean]
    )
    right = np.array([row.clean_pred == row.label for row in clean])[order]
    success = success.reshape(len(clean), len(keys))[order]
    identity, details = store.identity, store.details
    norm = known_norm(identity["options"]["norm"])
    return Verdicts(
        source=source,
        samples=samples,
        clean=right,
        robust={Row(attack, norm, eps): right & ~success[:, k] for k, (attack, eps) in enumerate(keys)},
        model=identity.get("model", {}),
        data={**identity.get("data", {}), "fingerprint": details.get("data_fingerprint")},
        options=identity["options"],
        attacks={attack["name"]: attack.get("parameters", {}) for attack in details.get("attacks") or []},
        environment=details.get("environment") or {},
        findings=tuple(store.findings()),
    )


def write_baseline(verdicts: Verdicts, path: Path) -> None:
    """Write `verdicts` to `path`, whole or not at all. The same verdicts make the same bytes."""
    baseline = {
        "schema_version": SCHEMA_VERSION,
        # Threads are a matter of who ran it, beside what: a parallel pytest has fewer.
        "environment": {key: value for key, value in verdicts.environment.items() if key != "threads"},
        "model": _part(verdicts.model, "name", "fingerprint", "num_classes", "input_size"),
        # Of a path only its end: the same on every machine.
        "data": {**_part(verdicts.data, "fingerprint"), "name": PurePath(str(verdicts.data.get("name"))).name},
        "options": verdicts.options,
        "attacks": [{"name": name, "parameters": verdicts.attacks[name]} for name in sorted(verdicts.attacks)],
        "findings": [asdict(finding) for finding in verdicts.findings],
        "verdicts": pack(verdicts, names=False),
    }
    write_text(path, json.dumps(baseline, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def pack(verdicts: Verdicts, names: bool = True) -> dict[str, Any]:
    """The verdicts as JSON values: accuracies to read, and the bits that they are the means of.

    With `names`, the samples' ids and labels too, which take most of the room.
    """
    samples = verdicts.samples
    packed = {
        "samples": len(samples),
        "samples_sha256": samples.digest,
        "contents_sha256": samples.content_digest,
        "id_tags": _squeeze(_planes(np.diff(samples.id_tags, prepend=np.uint32(0)))),
        "content_tags": None if samples.content_tags is None else _squeeze(_planes(samples.content_tags)),
        "clean_accuracy": float(verdicts.clean.mean()),
        "clean": _bits(verdicts.clean),
        "rows": [
            {**row._asdict(), "robust_accuracy": float(robust.mean()), "robust": _bits(robust)}
            for row, robust in sorted(verdicts.robust.items())
        ],
    }
    if names and samples.ids is not None and samples.labels is not None:
        packed["ids"] = _squeeze(json.dumps(list(samples.ids)).encode())
        packed["labels"] = _squeeze(json.dumps(samples.labels.tolist()).encode())
    return packed


def _from_run(path: Path, source: str) -> Verdicts:
    try:
        store = Store.open(path)
        try:
            if "finished" not in store.details:
                raise InputError(f"the run in {source} is not finished: continue it with --resume")
            return from_store(store, source)
        finally:
            store.close()
    except (sqlite3.DatabaseError, KeyError, ValueError) as error:
        if is_locked(error):
            raise Busy(f"{source}: {BUSY}") from None
        raise InputError(f"{source} is damaged ({visible(str(error))}); make the run anew") from None


def _from_json(text: bytes, source: str) -> Verdicts:
    try:
        report = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, numbers of thousands of digits
        raise InputError(f"{source} is truncated or damaged, no JSON ({error}); restore it or make it anew") from None
    if not isinstance(report, dict) or "schema_version" not in report:
        raise InputError(f"{source} is neither a report.json nor a {BASELINE} of robust: it has no schema_version")
    if (version := report["schema_version"]) not in READABLE:
        environment = report.get("environment")
        writer = environment.get("robust") if isinstance(environment, dict) else None
        raise InputError(
            visible(
                f"{source} has schema version {version}, which robust {writer or 'of another version'} reads; this is "
                f"robust {__version__} and reads {READABLE[0]} to {READABLE[-1]}: use that one, or make the file anew"
            )
        )
    if "verdicts" not in report:
        raise InputError(f"{source} has no verdicts on samples: name the run directory instead, or evaluate anew")
    try:
        return _unpack(report, source)
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error, zlib.error) as error:
        raise InputError(f"{source} is damaged: its verdicts cannot be read ({visible(repr(error))})") from None


def _unpack(report: Mapping[str, Any], source: str) -> Verdicts:
    packed = report["verdicts"]
    samples = _samples(packed, source)
    accuracies = [packed["clean_accuracy"], *(row["robust_accuracy"] for row in packed["rows"])]
    bits = [_from_bits(lines, len(samples)) for lines in (packed["clean"], *(row["robust"] for row in packed["rows"]))]
    for accuracy, verdicts in zip(accuracies, bits, strict=True):
        if not abs(accuracy - verdicts.mean()) <= 1e-9:
            raise InputError(
                f"{source} says {accuracy:.4f} where its verdicts give {verdicts.mean():.4f}: it was edited; "
                "restore it, or make it anew"
            )
    clean, *robust = bits
    rows = [Row(str(row["attack"]), known_norm(row["norm"]), float(row["eps"])) for row in packed["rows"]]
    if not rows or len(set(rows)) < len(rows) or any((one & ~clean).any() for one in robust):
        raise InputError(f"{source} is damaged: its verdicts contradict each other; restore it, or make it anew")
    return Verdicts(
        source=source,
        samples=samples,
        clean=clean,
        robust=dict(zip(rows, robust, strict=True)),
        model=dict(report["model"]),
        data=dict(report["data"]),
        options=dict(report["options"]),
        attacks={str(attack["name"]): dict(attack["parameters"]) for attack in report["attacks"]},
        environment={name: str(value) for name, value in (report["environment"] or {}).items()},
        findings=tuple(map(_finding, report["findings"])),
    )


def _finding(values: Mapping[str, Any]) -> Finding:
    finding = Finding(*(str(values[name]) for name in ("name", "level", "message")))
    if finding.level not in ("pass", "warn", "fail"):
        raise ValueError(f"level {finding.level!r}")
    return finding


def _samples(packed: Mapping[str, Any], source: str) -> Samples:
    n = packed["samples"]
    id_tags = _from_planes(_unsqueeze(packed["id_tags"]), np.uint32).cumsum(dtype=np.uint32)
    contents = packed["content_tags"]
    content_tags = None if contents is None else _from_planes(_unsqueeze(contents), np.uint16)
    names: dict[str, Any] = {}
    if "ids" in packed:
        named, _ = Samples.of(json.loads(_unsqueeze(packed["ids"])), json.loads(_unsqueeze(packed["labels"])))
        if named.digest != packed["samples_sha256"]:
            raise InputError(f"{source} was edited: its ids and labels are not those judged; restore it")
        names = {"ids": named.ids, "labels": named.labels}
    if not n or len(id_tags) != n or (content_tags is not None and len(content_tags) != n):
        raise ValueError(f"{n} samples, {len(id_tags)} tags")
    content_digest = None if contents is None else str(packed["contents_sha256"])
    return Samples(id_tags, content_tags, str(packed["samples_sha256"]), content_digest, **names)


def _part(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _bits(verdicts: np.ndarray) -> list[str]:
    text = base64.b64encode(np.packbits(verdicts).tobytes()).decode()
    return [text[start : start + _LINE] for start in range(0, len(text), _LINE)]


def _from_bits(lines: Sequence[str], n: int) -> np.ndarray:
    packed = np.frombuffer(base64.b64decode("".join(lines), validate=True), np.uint8)
    bits = np.unpackbits(packed).astype(bool)
    if len(packed) != -(-n // 8) or bits[n:].any():
        raise ValueError(f"{len(packed)} bytes for {n} verdicts")
    return bits[:n]


def _planes(values: np.ndarray) -> bytes:
    """All the lowest bytes, then all the next ...: the highest are nearly all zero and take no room."""
    size = values.dtype.itemsize
    return values.astype(values.dtype.newbyteorder("<")).view(np.uint8).reshape(-1, size).T.tobytes()


def _from_planes(raw: bytes, dtype: type[np.unsignedinteger]) -> np.ndarray:
    little = np.dtype(dtype).newbyteorder("<")
    return np.frombuffer(raw, np.uint8).reshape(little.itemsize, -1).T.copy().view(little).ravel().astype(dtype)


def _squeeze(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw, 9)).decode()


def _unsqueeze(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text, validate=True))
