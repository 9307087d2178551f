"""The store: what is written is read back, a unit is there whole or not at all."""

import itertools
import math
import re
import sqlite3
from contextlib import closing

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust.errors import InputError
from robust.options import Options
from robust.statistics import SUMMARY_COLUMNS, WORST_CASE, wilson
from robust.store import (
    FILENAME,
    PICTURES_KEPT,
    SAMPLE_COLUMNS,
    Busy,
    Clean,
    Finding,
    Picture,
    Result,
    Store,
    differences,
    holds_run,
)

IDENTITY = {
    "model": {"name": "net", "fingerprint": "f"},
    "data": {"name": "d"},
    "options": {"attacks": ["pgd", "fgsm"], "norm": "linf", "eps": [0.1, 0.2]},
}


def clean(position: int, pred: int = 0) -> Clean:
    return Clean(position, f"id{position}", f"sha{position}", 0, pred, 0.5)


def results(position: int, attack: str, success: bool) -> list[Result]:
    found = (1, 0.9, 0.1, 2.0, 3.0, 4.0) if success else (None,) * 6
    return [
        Result(position, attack, eps, success, False, *found, forwards=3, gradients=2, restart=0 if success else None)
        for eps in (0.1, 0.2)
    ]


def picture(position: int, rank: float, role: str = "smallest") -> Picture:
    x = np.full((1, 2, 3), position / 10, np.float32)
    return Picture(role, rank, position, "pgd", 0.1, 1, 0.9, 0.1, 0.1, 2.0, x, x + 0.1)


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store.create(tmp_path / "run" / FILENAME, IDENTITY, {"command": "x"})
    store.add_clean([clean(0), clean(1, pred=1)])
    return store


def test_samples_come_in_the_order_of_data_attacks_and_eps(store):
    store.add_unit(0, "fgsm", 1.0, [*results(1, "fgsm", False), *results(0, "fgsm", False)])
    store.add_unit(0, "pgd", 1.0, [*results(0, "pgd", True), *results(1, "pgd", False)])
    samples = store.samples()
    assert tuple(samples.columns) == SAMPLE_COLUMNS
    assert list(zip(samples.sample_id, samples.attack, samples.eps, strict=True)) == [
        (name, attack, eps) for name in ("id0", "id1") for attack in ("pgd", "fgsm") for eps in (0.1, 0.2)
    ]
    assert list(samples.robust) == [False, False, True, True, False, False, False, False]
    assert list(samples.robust_8bit) == [True] * 4 + [False] * 4
    chunks = list(store.sample_chunks(rows=3))
    assert [len(chunk) for chunk in chunks] == [3, 3, 2]
    assert list(chunks[2].sample_id) == ["id1", "id1"]


def test_samples_of_one_eps_or_one_sample(store):
    store.add_unit(0, "pgd", 1.0, [*results(0, "pgd", True), *results(1, "pgd", False)])
    samples = store.samples()
    for part, rows in (
        (store.samples(0.2), samples.eps == 0.2),
        (store.samples(position=1), samples.sample_id == "id1"),
        (store.samples(0.1, 0), (samples.eps == 0.1) & (samples.sample_id == "id0")),
    ):
        pd.testing.assert_frame_equal(part, samples[rows].reset_index(drop=True))


# The summary


def three() -> Store:
    """Three samples: 0 is wrong when clean, 1 falls to fgsm only, 2 to pgd only; both at eps 0.2."""
    store = Store.create(None, IDENTITY, {})
    store.add_clean([clean(0, pred=1), clean(1), clean(2)])
    for attack, broken, seconds in (("fgsm", 1, 4.0), ("pgd", 2, 8.0)):
        rows = []
        for k, eps in itertools.product(range(3), (0.1, 0.2)):
            success = k == broken and eps == 0.2
            found = (1, 0.9, 0.15, 9.0, 9.0, 9.0) if success else (None,) * 6
            rows.append(Result(k, attack, eps, success, False, *found, 3 * (k > 0), int(k > 0), 0 if success else None))
        store.add_unit(0, attack, seconds, rows)
    return store


def row(summary: pd.DataFrame, attack: str, eps: float) -> pd.Series:
    return summary[(summary.attack == attack) & (summary.eps == eps)].iloc[0]


def test_summary_by_hand():
    summary = three().summary()
    assert tuple(summary.columns) == SUMMARY_COLUMNS
    assert list(zip(summary.attack, summary.eps, strict=True)) == [
        (attack, eps) for attack in ("pgd", "fgsm", WORST_CASE) for eps in (0.1, 0.2)
    ]
    at_02 = row(summary, "pgd", 0.2)
    assert (at_02.n, at_02.clean_accuracy, at_02.robust_accuracy) == (3, pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert (at_02.ci_low, at_02.ci_high) == pytest.approx(wilson(1, 3))
    assert at_02.median_distance == 0.15
    assert math.isnan(row(summary, "pgd", 0.1).median_distance)
    assert (at_02.forwards, at_02.gradients) == (6, 2)
    # 8 seconds over two eps with the same evaluations.
    assert at_02.seconds == pytest.approx(4.0)
    assert at_02.robust_accuracy_8bit == pytest.approx(2 / 3)


def test_worst_case_is_taken_per_sample():
    worst = row(three().summary(), WORST_CASE, 0.2)
    # Each attack alone leaves one of three standing; together they leave none.
    assert worst.robust_accuracy == 0
    assert worst.forwards == 12 and worst.seconds == pytest.approx(6.0)


def test_summary_of_nothing_has_its_columns(store):
    assert tuple(store.summary().columns) == SUMMARY_COLUMNS and store.summary().empty


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 9), seed=st.integers(0, 999), attacks=st.integers(1, 3), norm=st.sampled_from(["l2", "l1"]))
def test_the_summary_is_that_of_the_samples(n, seed, attacks, norm):
    random = np.random.default_rng(seed)
    options = {"attacks": [f"b{k}" for k in range(attacks)][::-1], "norm": norm, "eps": [0.1, 0.5, 2.0]}
    store = Store.create(None, IDENTITY | {"options": options}, {})
    preds = random.integers(0, 2, n)
    store.add_clean([clean(k, pred=int(pred)) for k, pred in enumerate(preds)])
    for attack in options["attacks"]:
        rows = []
        for k, eps in itertools.product(range(n), options["eps"]):
            success = preds[k] == 0 and random.random() < 0.5
            found = (1, 0.9, *random.random(4)) if success else (None,) * 6
            counts = map(int, random.integers(0, 9, 2))
            rows.append(Result(k, attack, eps, success, success and random.random() < 0.5, *found, *counts, None))
        store.add_unit(0, attack, 3.0, rows)
    samples, summary = store.samples(), store.summary()
    samples["correct"] = samples.clean_pred == samples.label
    for of in summary.itertuples():
        at = samples[samples.eps == of.eps]
        if of.attack == WORST_CASE:
            verdicts = at.groupby("sample_id")[["correct", "robust", "robust_8bit"]].all()
            distances = at.groupby("sample_id")[f"distance_{norm}"].min()
        else:
            at = at[at.attack == of.attack]
            verdicts, distances = at, at[f"distance_{norm}"]
        assert of.n == n and of.norm == norm
        assert (of.clean_accuracy, of.robust_accuracy, of.robust_accuracy_8bit) == pytest.approx(
            (verdicts.correct.mean(), verdicts.robust.mean(), verdicts.robust_8bit.mean())
        )
        assert of.median_distance == pytest.approx(distances.dropna().median(), nan_ok=True)
        assert (of.forwards, of.gradients) == (at.forwards.sum(), at.gradients.sum())
    spent = samples.groupby("attack")[["forwards", "gradients"]].sum().sum(axis=1)
    assert summary[summary.attack == WORST_CASE].seconds.sum() == pytest.approx(3.0 * (spent > 0).sum())


def test_a_unit_that_fails_midway_leaves_nothing(store):
    def failing():
        yield from results(0, "pgd", True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.add_unit(0, "pgd", 1.0, failing())
    assert not store.done(0, "pgd")
    assert store.samples().empty
    store.add_unit(0, "pgd", 1.0, results(0, "pgd", True))
    assert store.done(0, "pgd") and len(store.samples()) == 2


def test_what_was_written_is_there_for_another_connection(store, tmp_path):
    store.add_unit(0, "pgd", 2.5, results(0, "pgd", True), refuted=1, overlooked=2)
    store.set(command="again")
    store.set_findings([Finding("a", "warn", "m")])
    store.set_findings([Finding("b", "pass", "n")])
    other = Store.open(tmp_path / "run")
    assert other.identity == IDENTITY
    assert other.details == {"command": "again"}
    assert other.clean(start=1) == [clean(1, pred=1)]
    assert other.seconds() == {"pgd": 2.5}
    assert other.twin_disagreements() == (1, 2)
    assert other.findings() == [Finding("b", "pass", "n")]
    assert other.standing(0, 2, "pgd") == 0


def test_the_best_pictures_stay_whatever_the_order_of_arrival(tmp_path):
    ranks = [0.5, 0.1, 0.9, 0.3, 0.7, 0.2]
    kept = set()
    for order in (ranks, ranks[::-1]):
        store = Store.create(None, IDENTITY, {})
        for rank in order:
            store.add_unit(int(rank * 10), "pgd", 0, [], [picture(int(rank * 10), rank)])
        assert [p.rank for p in store.pictures()] == sorted(ranks)[: PICTURES_KEPT["smallest"]]
        kept.add(tuple(p.position for p in store.pictures()))
    assert len(kept) == 1
    np.testing.assert_allclose(store.pictures()[0].x_adv, np.full((1, 2, 3), 0.2), rtol=1e-6)


def test_adversarials_come_back(store):
    x = np.random.default_rng(0).random((3, 4, 5), np.float32)
    store.add_unit(0, "pgd", 0, results(0, "pgd", True), adversarials=[(0, x, x / 2)])
    ((row, attack, eps, got, got_adv),) = store.adversarials()
    assert (row.sample_id, attack, eps) == ("id0", "pgd", 0.1)
    assert np.array_equal(got, x) and np.array_equal(got_adv, x / 2)


def test_a_dropped_attack_leaves_no_trace(store):
    store.add_unit(0, "pgd", 1, results(0, "pgd", True), [picture(0, 0.1)])
    store.add_unit(0, "fgsm", 1, results(0, "fgsm", True))
    store.drop_attack("pgd")
    assert set(store.samples().attack) == {"fgsm"}
    assert not store.pictures() and not store.done(0, "pgd") and store.done(0, "fgsm")


def test_a_second_run_in_the_same_place_is_refused(store, tmp_path):
    with pytest.raises(InputError, match="already holds a run: continue it with --resume"):
        Store.create(tmp_path / "run" / FILENAME, IDENTITY, {})


def test_a_blank_file_of_a_run_that_never_began_is_no_run(tmp_path):
    (tmp_path / FILENAME).touch()
    assert not holds_run(tmp_path / FILENAME)
    Store.create(tmp_path / FILENAME, IDENTITY, {})
    assert holds_run(tmp_path / FILENAME)


def test_a_place_where_nothing_can_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write a run to .*file .*; name another --output"):
        Store.create(tmp_path / "file" / FILENAME, IDENTITY, {})


@pytest.mark.parametrize("content", [b"", b"not a database, whatever its name says"])
def test_a_file_that_is_no_run_is_refused(tmp_path, content):
    (tmp_path / FILENAME).write_bytes(content)
    with pytest.raises(InputError, match="run"):
        Store.open(tmp_path)


def test_a_run_of_another_schema_is_refused(store, tmp_path):
    sqlite3.connect(tmp_path / "run" / FILENAME).execute("PRAGMA user_version = 99")
    with pytest.raises(InputError, match=r"version 99, .* reads 3: use the version that wrote it, or make"):
        Store.open(tmp_path / "run")


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("DELETE FROM meta", "it has no identity"),
        ("UPDATE meta SET value = '{' WHERE key = 'identity'", "Expecting property name"),
        ("UPDATE meta SET value = '[]' WHERE key = 'identity'", "list indices"),
        ("UPDATE meta SET value = '' WHERE key = 'command'", "Expecting value"),
        ("DROP TABLE result", "it has no table result"),
    ],
)
@pytest.mark.parametrize(("to_resume", "advice"), [(True, "name another --output"), (False, "make the run anew")])
def test_a_store_that_lacks_something_is_damaged(store, statement, reason, to_resume, advice):
    path = store._path
    store.close()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(statement)
    said = rf"^{re.escape(str(path))} is damaged.*{reason}.*{advice}$"
    with pytest.raises(InputError, match=said):
        Store.open(path, to_resume)


def test_a_store_that_was_cut_or_written_over_is_damaged(store):
    store.add_unit(0, "pgd", 1.0, results(0, "pgd", True), pictures=[picture(k, k) for k in range(3)])
    path = store._path
    store.close()
    whole = path.read_bytes()
    # But for the last page it is whole: who only opens it sees nothing.
    path.write_bytes(whole[:-4096] + bytes(range(256)) * 16)
    Store.open(path).close()
    for content in (path.read_bytes(), whole[: len(whole) // 2], whole[:50]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"is damaged.*: name another --output$"):
            Store.open(path, to_resume=True)


def test_a_store_that_another_process_holds_is_no_damaged_one(store, monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, **options | {"timeout": 0}))
    with closing(sqlite3.connect(store._path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert holds_run(store._path)
        with pytest.raises(Busy, match="another process is writing this run"):
            Store.open(store._path)


def test_no_run_at_all_is_said(tmp_path):
    with pytest.raises(InputError, match="no run at"):
        Store.open(tmp_path)


def test_an_empty_run_is_discarded_and_another_is_not(tmp_path, store):
    empty = Store.create(tmp_path / "empty" / FILENAME, IDENTITY, {})
    empty.close_and_discard_if_empty()
    assert not (tmp_path / "empty").exists()
    store.add_unit(0, "pgd", 1.0, [])
    store.close_and_discard_if_empty()
    assert (tmp_path / "run" / FILENAME).exists()


def test_what_another_process_wrote_meanwhile_is_not_written_over(tmp_path):
    ours = Store.create(tmp_path / FILENAME, IDENTITY, {})
    theirs = Store.open(tmp_path)
    ours.add_clean([clean(0)])
    ours.add_unit(0, "pgd", 1.0, [])
    with pytest.raises(InputError, match="another process is writing this run"):
        theirs.add_clean([clean(0)])
    with pytest.raises(InputError, match="another process is writing this run"):
        theirs.add_unit(0, "pgd", 2.0, [])
    assert theirs.seconds() == ours.seconds() == {"pgd": 1.0}


def test_a_run_in_memory_can_be_written_once(tmp_path):
    store = Store.create(None, IDENTITY, {})
    store.add_clean([clean(0)])
    store.copy_to(tmp_path / "out" / FILENAME)
    assert Store.open(tmp_path / "out").clean() == [clean(0)]
    with pytest.raises(InputError, match="already holds a run: name another folder"):
        store.copy_to(tmp_path / "out" / FILENAME)


def test_differences_name_what_differs_and_both_values():
    other = {**IDENTITY, "options": {**IDENTITY["options"], "eps": [0.3]}, "model": {"name": "net", "fingerprint": "g"}}
    assert differences(IDENTITY, IDENTITY) == []
    assert differences(IDENTITY, other) == [
        "model fingerprint (f there, g here)",
        "options eps ([0.1, 0.2] there, [0.3] here)",
    ]


def test_an_option_younger_than_the_run_had_its_default_then():
    then = IDENTITY["options"]
    now = Options(attacks=("pgd", "fgsm"), norm="linf", eps=(0.1, 0.2)).as_dict()
    assert now.keys() > then.keys()
    assert differences(IDENTITY, {**IDENTITY, "options": now}) == []
    assert differences(IDENTITY, {**IDENTITY, "options": now | {"conv": "scratch"}}) == [
        "options conv (torch there, scratch here)"
    ]
    # Models and data have no defaults.
    assert differences(IDENTITY, {**IDENTITY, "data": {"name": "d", "size": 3}}) == ["data size (None there, 3 here)"]
