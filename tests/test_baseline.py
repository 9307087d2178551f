"""Verdicts read from every kind of file, written as a baseline, and what is refused."""

import json
import math
import os
import sqlite3
import subprocess
import sys
import uuid
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate_runs import make_run, verdicts
from robust.baseline import pack, read, write_baseline
from robust.errors import InputError
from robust.gate import compare
from robust.store import BUSY, FILENAME, SCHEMA_VERSION, Store
from robust.verdicts import Row

IDS = ["=1+1.png", "+x.png", "-5.png", "@sum.png", "a|b.png", 'q"uo,te.png', "熊猫.png", "NA", "007", "new\nline.png"]
CLEAN = [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
ROBUST = {
    ("pgd", 1 / 255): [1, 1, 1, 1, 0, 1, 1, 0, 0, 0], ("pgd", 8 / 255): [1, 0, 0, 1, 0, 0, 0, 0, 0, 0],
    ("foolbox:LinfDeepFoolAttack", 1 / 255): [1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    ("foolbox:LinfDeepFoolAttack", 8 / 255): [0, 1, 0, 1, 0, 0, 0, 0, 0, 0],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a", ROBUST, CLEAN, IDS, reports=True)


@pytest.fixture(scope="module")
def baseline(folder) -> Path:
    path = folder.parent / "robustness-baseline.json"
    write_baseline(read(folder), path)
    return path


def same(a, b) -> bool:
    return (
        a.samples.equal(b.samples)
        and (a.clean == b.clean).all()
        and set(a.robust) == set(b.robust)
        and all((a.robust[row] == b.robust[row]).all() for row in a.robust)
    )


# Reading


@pytest.mark.parametrize("name", ["samples.csv", "report.json"])
def test_what_comes_through_a_pipe_is_read_once(folder, tmp_path, name):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cp", folder / name, pipe]):
        assert same(read(pipe), read(folder))


def test_a_store_that_comes_through_a_pipe_is_refused(folder, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["dd", f"if={folder / FILENAME}", f"of={pipe}", "status=none"]):
        assert "is a pipe, and a run's store is read from its file" in refusal(pipe)


def test_a_run_directory(folder):
    run = read(folder)
    assert run.source == str(folder) and len(run) == 10
    assert dict(zip(run.samples.ids, run.clean, strict=True)) == {
        id: bool(ok) for id, ok in zip(IDS, CLEAN, strict=True)
    }
    for (attack, eps), bits in ROBUST.items():
        by_id = dict(zip(run.samples.ids, run.robust[Row(attack, "linf", eps)], strict=True))
        assert by_id == {id: bool(bit) for id, bit in zip(IDS, bits, strict=True)}
    assert run.attacks["pgd"]["steps"] == 10 and run.model["num_classes"] == 5
    assert run.findings[0].name == "eval mode"
    assert (np.diff(run.samples.id_tags.astype(np.int64)) >= 0).all()


@pytest.mark.parametrize("name", [FILENAME, "report.json", "samples.csv", "../robustness-baseline.json"])
def test_every_file_of_a_run_says_the_same(folder, baseline, name):
    run, other = read(folder), read(folder / name)
    assert same(run, other)
    comparison = compare(other, run)
    assert comparison.passed and all(not len(change.fell) + len(change.rose) for change in comparison.changes)
    if name != "samples.csv":
        assert (other.model["fingerprint"], other.options, other.attacks) == (
            run.model["fingerprint"], run.options, run.attacks,
        )  # fmt: skip
        assert other.findings == run.findings and other.environment == run.environment


def test_a_folder_with_a_report_alone_will_do(folder, tmp_path):
    (tmp_path / "report.json").write_bytes((folder / "report.json").read_bytes())
    assert same(read(folder), read(tmp_path))


def test_verdicts_agree_with_the_summary(folder):
    summary = pd.read_csv(folder / "summary.csv")
    for row, robust in read(folder).robust.items():
        # Some versions of pandas read numbers to within an ulp.
        (accuracy,) = summary[(summary.attack == row.attack) & np.isclose(summary.eps, row.eps)].robust_accuracy
        assert robust.mean() == accuracy


# The baseline file


def test_a_baseline_is_sorted_readable_and_names_nobody(folder, baseline):
    text = baseline.read_text(encoding="utf-8")
    report = json.loads(text)
    assert text == json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert report["verdicts"]["clean_accuracy"] == 0.8
    assert [(row["attack"], row["robust_accuracy"]) for row in report["verdicts"]["rows"]] == [
        ("foolbox:LinfDeepFoolAttack", 0.6), ("foolbox:LinfDeepFoolAttack", 0.2), ("pgd", 0.6), ("pgd", 0.2),
    ]  # fmt: skip
    assert report["data"]["name"] == "images.zip"
    assert "/home/me" not in text and "panda" not in text and "ids" not in report["verdicts"]
    assert read(baseline).samples.ids is None


def test_it_is_a_part_of_the_report(folder, baseline):
    report, part = (json.loads(path.read_text(encoding="utf-8")) for path in (folder / "report.json", baseline))
    assert set(part) <= set(report)
    assert {key: report["verdicts"][key] for key in part["verdicts"]} == part["verdicts"]
    assert part["options"] == report["options"] and part["findings"] == report["findings"]


def test_the_same_verdicts_make_the_same_bytes(folder, baseline, tmp_path):
    for source in (folder, folder / "report.json"):
        write_baseline(read(source), tmp_path / "again.json")
        assert (tmp_path / "again.json").read_bytes() == baseline.read_bytes()


def test_a_changed_verdict_changes_two_lines(folder, tmp_path):
    run = read(folder)
    row = Row("pgd", "linf", 8 / 255)
    changed = run.robust[row].copy()
    changed[changed.argmax()] = False
    write_baseline(run, tmp_path / "a.json")
    run.robust[row] = changed
    write_baseline(run, tmp_path / "b.json")
    lines = [(tmp_path / name).read_text(encoding="utf-8").splitlines() for name in ("a.json", "b.json")]
    assert len(lines[0]) == len(lines[1])
    differing = [a for a, b in zip(*lines, strict=True) if a != b]
    assert len(differing) == 2 and '"robust_accuracy": 0.2' in differing[1]


def test_10_000_samples_take_less_than_100_kb(tmp_path):
    # Names without any order, three attacks at five eps, and verdicts like coins: there is nothing to compress.
    rng = np.random.default_rng(0)
    n = 10_000
    ids = [str(uuid.UUID(bytes=rng.bytes(16))) for _ in range(n)]
    rows = {(f"attack{k}", eps): rng.integers(0, 2, n) for k in range(3) for eps in (0.1, 0.2, 0.3, 0.4, 0.5)}
    run = verdicts(rows, ids=ids, labels=rng.integers(0, 1000, n).tolist(), sha256=[rng.bytes(32).hex() for _ in ids])
    write_baseline(run, tmp_path / "b.json")
    assert (tmp_path / "b.json").stat().st_size < 100_000
    assert same(run, read(tmp_path / "b.json"))


@given(st.lists(st.tuples(st.text(max_size=8), st.integers(0, 3), st.booleans(), st.booleans()), min_size=1))
def test_packing_loses_nothing(rows):
    rows = list({row[0]: row for row in rows}.values())
    ids, labels, clean, stood = zip(*rows, strict=True)
    robust = np.array(clean) & np.array(stood)
    run = verdicts({("pgd", 0.1): robust}, clean=clean, ids=ids, labels=labels)
    for names in (True, False):
        report = {
            "schema_version": SCHEMA_VERSION, "environment": {}, "model": {}, "data": {}, "options": {},
            "attacks": [], "findings": [], "verdicts": pack(run, names),
        }  # fmt: skip
        again = from_json(json.dumps(report))
        assert same(run, again)
        assert again.samples.ids == (run.samples.ids if names else None)


def from_json(text: str):
    from robust.baseline import _from_json

    return _from_json(text.encode(), "x.json")


def test_a_baseline_that_cannot_be_written_leaves_the_old_one(folder, tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_baseline(read(folder), path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# What is refused


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    return message


def edited(path: Path, tmp_path: Path, change) -> Path:
    report = json.loads(path.read_text(encoding="utf-8"))
    change(report)
    (tmp_path / "edited.json").write_text(json.dumps(report), encoding="utf-8")
    return tmp_path / "edited.json"


def test_a_number_of_thousands_of_digits_is_refused(tmp_path):
    (tmp_path / "b.json").write_text('{"schema_version": ' + "9" * 5000 + "}")
    assert "JSON" in refusal(tmp_path / "b.json")


def test_a_truncated_file_is_refused_wherever_it_ends(baseline, tmp_path):
    whole = baseline.read_bytes()
    cut = tmp_path / "cut.json"
    for end in range(1, len(whole) - 2, 97):
        cut.write_bytes(whole[:end])
        assert "truncated or damaged" in refusal(cut)
    cut.write_bytes(b"")
    assert "is empty" in refusal(cut)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "neither a report.json nor a robustness-baseline.json of robust"),
        ('[{"schema_version": 1}]', "neither a report.json"),
        ('{"version": 3, "results": []}', "neither a report.json"),
        ('{"schema_version": 1}', "has no verdicts on samples: name the run directory"),
        ('{"schema_version": 1, "verdicts": 5}', "is damaged: its verdicts cannot be read"),
        ('{"schema_version": 1, "verdicts": {"samples": 1}}', "is damaged"),
        ("<<<<<<< HEAD\n{}", "is no samples.csv"),
        ('{"a": 1,\n<<<<<<< HEAD\n}', "truncated or damaged, no JSON"),
        ("[" * 100_000, "truncated or damaged"),
        ("PK\x03\x04", "is no samples.csv"),
        ("attack,norm,eps\npgd,linf,0.1\n", "lacks the column sample_id"),
    ],
)
def test_foreign_files_are_refused(tmp_path, text, reason):
    (tmp_path / "x").write_text(text)
    assert reason in refusal(tmp_path / "x")


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, "1", None, [1]])
def test_another_schema_version_is_refused_with_who_reads_it(baseline, tmp_path, version):
    def change(report):
        report["schema_version"], report["environment"]["robust"] = version, "9.9"

    assert (
        f"has schema version {version}, which robust 9.9 reads; this is robust 0.1.0 and reads 1 to {SCHEMA_VERSION}"
    ) in refusal(edited(baseline, tmp_path, change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r["verdicts"]["rows"][0].update(robust_accuracy=0.9), "says 0.9000 where its verdicts give 0.6000"),
        (lambda r: r["verdicts"].update(clean_accuracy=0.5), "says 0.5000 where its verdicts give 0.8000"),
        (lambda r: r["verdicts"].update(samples=11), "is damaged"),
        (lambda r: r["verdicts"].update(samples=-10), "is damaged"),
        (lambda r: r["verdicts"].update(clean=["AAAA"]), "is damaged"),
        (lambda r: r["verdicts"].update(clean=["/////"]), "is damaged"),
        (lambda r: r["verdicts"].update(clean=["//8="], clean_accuracy=1), "is damaged"),  # 16 bits for 10 samples
        (lambda r: r["verdicts"].update(id_tags="!"), "is damaged"),
        (lambda r: r["verdicts"].update(rows=[]), "its verdicts contradict each other"),
        (lambda r: r["verdicts"].update(rows=r["verdicts"]["rows"][:1] * 2), "its verdicts contradict each other"),
        (lambda r: r["verdicts"].update(clean=r["verdicts"]["rows"][0]["robust"], clean_accuracy=0.6),
         "its verdicts contradict each other"),
        (lambda r: r["verdicts"]["rows"][0].update(norm="linf\x1b[31m"), "there is no norm 'linf\\\\x1b[31m'"),
        (lambda r: r.update(findings=[{"level": "pass"}]), "is damaged"),
        (lambda r: r.update(attacks={"pgd": {}}), "is damaged"),
        (lambda r: r.update(model=None), "is damaged"),
    ],
)  # fmt: skip
def test_what_was_edited_by_hand_is_refused(baseline, tmp_path, change, reason):
    assert reason in refusal(edited(baseline, tmp_path, change))


def nodes(value, path=()):
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from nodes(item, (*path, key))


@pytest.mark.parametrize("junk", [None, -1, 2.5, "x", [], {}, [None], math.nan])
@pytest.mark.parametrize("name", ["report.json", "../robustness-baseline.json"])
def test_junk_anywhere_in_a_file_is_read_or_refused_in_one_line(folder, baseline, name, junk):
    text = (folder / name).read_text(encoding="utf-8")
    run = read(folder)
    for path in nodes(json.loads(text)):
        report = json.loads(text)
        holder = report
        for key in path[:-1]:
            holder = holder[key]
        if path:
            holder[path[-1]] = junk
        try:
            comparison = compare(from_json(json.dumps(report)), run)
            assert comparison.answer and [*comparison.notes, *comparison.causes]
        except InputError as error:
            assert "\n" not in str(error)


def test_names_that_were_edited_are_refused(folder, tmp_path):
    other = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    ids = pack(verdicts({("pgd", 0.1): [1] * 10}))["ids"]
    other["verdicts"]["ids"] = ids
    (tmp_path / "r.json").write_text(json.dumps(other))
    assert "its ids and labels are not those judged" in refusal(tmp_path / "r.json")


def test_folders_without_a_finished_run(tmp_path):
    assert "holds no run: there is neither run.sqlite nor report.json" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "missing")
    unfinished = make_run(tmp_path / "run", ROBUST, CLEAN, IDS, finished=False)
    assert "is not finished: continue it with --resume" in refusal(unfinished)
    store = Store.open(unfinished)
    store.set(finished="now")
    store.drop_attack("pgd")
    store._db.execute("DELETE FROM result WHERE position = 3")
    store.close()
    assert "lacks verdicts on some samples" in refusal(unfinished)


def test_a_store_that_is_none(tmp_path):
    path = tmp_path / FILENAME
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE t (a)")
    database.close()
    assert "is damaged, or no run's store (it has no table meta)" in refusal(path)
    assert "there is no norm 'linf\\x1b'" in refusal(make_run(tmp_path / "norm", ROBUST, CLEAN, IDS, norm="linf\x1b"))
    run = make_run(tmp_path / "run", ROBUST, CLEAN, IDS) / FILENAME
    whole = run.read_bytes()
    run.write_bytes(whole[:5000] + b"\xff" * 3000 + whole[8000:])
    assert "damaged" in refusal(run) or "no run" in refusal(run)


def test_a_store_without_its_facts_is_damaged_and_an_empty_one_is_named(tmp_path):
    path = make_run(tmp_path / "run", ROBUST, CLEAN, IDS) / FILENAME
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM meta")
    assert "is damaged" in refusal(path.parent)
    path.write_bytes(b"")
    assert refusal(path.parent) == f"{path} is empty"


def test_a_store_that_another_process_writes_is_not_damaged(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", ROBUST, CLEAN, IDS)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, **options | {"timeout": 0}))
    with closing(sqlite3.connect(run / FILENAME)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert refusal(run) == f"{run / FILENAME}: {BUSY}" and "--output" not in BUSY
        other.rollback()
        # Or a moment later.
        monkeypatch.setattr(Store, "findings", lambda store: other.execute("BEGIN EXCLUSIVE") and store.clean())
        assert refusal(run) == f"{run}: {BUSY}"


# samples.csv and spreadsheets


def resaved(folder: Path, path: Path, change) -> Path:
    table = pd.read_csv(folder / "samples.csv", dtype=str, keep_default_na=False)
    path.write_bytes(change(table))
    return path


def german(table: pd.DataFrame) -> bytes:
    """As a spreadsheet with decimal commas saves it: BOM, semicolons, TRUE, CRLF, eight digits."""
    table = table.replace({"True": "TRUE", "False": "FALSE"})
    table["eps"] = [f"{float(eps):.8g}".replace(".", ",") for eps in table.eps]
    return b"\xef\xbb\xbf" + table.to_csv(index=False, sep=";", lineterminator="\r\n").encode()


@pytest.mark.parametrize(
    "change",
    [
        german,
        lambda table: table.to_csv(index=False, sep="\t").encode(),
        lambda table: b"\xef\xbb\xbf" + table.to_csv(index=False, lineterminator="\r\n").encode(),
        lambda table: table[table.columns[::-1]].sample(frac=1, random_state=0).to_csv(index=False).encode(),
        lambda table: table.to_csv(index=False, quoting=1).encode(),
    ],
)
def test_csv_that_a_spreadsheet_saved_is_read_rightly(folder, tmp_path, change):
    run = read(folder)
    assert compare(run, read(resaved(folder, tmp_path / "s.csv", change))).passed
    other = read(tmp_path / "s.csv")
    assert other.samples.equal(run.samples) and (other.clean == run.clean).all()
    for row, robust in other.robust.items():
        eps = min((1 / 255, 8 / 255), key=lambda eps: abs(eps - row.eps))
        assert (robust == run.robust[row._replace(eps=eps)]).all()


def csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False).encode()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: csv(t.replace({"True": "WAHR", "False": "FALSCH"})), "has 'FALSCH' for robust in row 5"),
        (lambda t: csv(t.assign(eps="1e")), "has '1e' for eps in row 2"),
        (lambda t: csv(t.assign(eps="nan")), "has 'nan' for eps in row 2"),
        (lambda t: csv(t.assign(eps="0,1")), "has '0,1' for eps in row 2"),
        (lambda t: csv(t.assign(label="1.5")), "has '1.5' for label"),
        (lambda t: csv(t.assign(norm=["linf\x1b[31m", *t.norm[1:]])), "has 'linf␛[31m' for norm in row 2"),
        (lambda t: csv(t.assign(clean_pred="")), "has '' for clean_pred"),
        (lambda t: csv(pd.concat([t, t.iloc[:1]])), "has 2 lines for sample =1+1.png, pgd at linf 1/255"),
        (lambda t: csv(t.drop(index=5)), "has no line for sample +x.png, pgd at linf 8/255"),
        (lambda t: csv(t.assign(sample_id=["", *t.sample_id[1:]])), "has a line without a sample_id"),
        (lambda t: csv(t.assign(label=["3", *t.label[1:]])), "contradicts itself"),
        (lambda t: csv(t.assign(label=["3", *t.label[1:]], clean_pred=["3", *t.clean_pred[1:]])),
         "has two labels or clean predictions for sample =1+1.png"),
        (lambda t: csv(t.assign(robust="True")), "contradicts itself: robust has to mean correct, and no success"),
        (lambda t: csv(t.drop(columns="robust")), "lacks the column robust"),
        (lambda t: csv(t.iloc[:0]), "holds no sample"),
        (lambda t: csv(t).replace("熊猫".encode(), b"\xff\xfe"), "is not in UTF-8"),
        (lambda t: csv(t).decode().encode("utf-16"), "is not in UTF-8"),
        (lambda t: csv(t)[:-60], "for robust in row 41"),
        (lambda t: csv(t) + b'"', "is no samples.csv (Error tokenizing data"),
    ],
)  # fmt: skip
def test_csv_that_says_two_things_is_refused(folder, tmp_path, change, reason):
    message = refusal(resaved(folder, tmp_path / "s.csv", change))
    assert reason in message


def test_reading_needs_neither_torch_nor_the_reports_with_their_plotting_library(folder, baseline):
    code = (
        "import sys; from pathlib import Path; from robust.baseline import read; from robust.gate import compare; "
        "a, b = (read(Path(p)) for p in sys.argv[1:]); compare(a, b).answer; "
        "print({'torch', 'reports', 'matplotlib', 'scipy.stats'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(baseline), str(folder)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")
