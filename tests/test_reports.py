"""Reports are written from a store alone, so these tests make one by hand, with the worst names people can think of."""

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

import reports.html
from reports import REPORTS, write_reports
from reports.answer import answer, headline, strongest, verdict
from reports.breakdown import confusions, per_class
from reports.curve import NARROW, WIDE, _beneath, describe, inline_svg, nearest, with_certified
from reports.figures import _safe, panda
from reports.gallery import Example, choose, png, rule
from reports.terminal import plain_lines, summary_table
from robust.errors import InputError
from robust.files import replacing
from robust.statistics import SUMMARY_COLUMNS, WORST_CASE, wilson
from robust.store import SAMPLE_COLUMNS, SCHEMA_VERSION, Clean, Finding, Picture, Result, Store
from robust.units import (
    format_class,
    format_count,
    format_distance,
    format_eps,
    format_images,
    format_interval,
    format_percent,
    format_seconds,
)

pytestmark = pytest.mark.pictures

CLASSES = ["<script>alert(1)</script>", "=cmd|' /C calc'!A0", r"a | b $\frac$", "größer 大熊猫", "panda"]
ATTACKS = ["fgsm", "foolbox:LinfDeepFoolAttack", "noise"]
LADDER = [1 / 255, 2 / 255, 4 / 255, 8 / 255]
N = 30


def make_store(
    norm: str = "linf",
    eps: list[float] = LADDER,
    channels: int = 3,
    side: int = 12,
    target: str | None = None,
    findings: tuple[Finding, ...] = (Finding("sample size", "warn", "only <30> images"),),
    adversarials: bool = True,
    certified: tuple[int, ...] = (),
) -> Store:
    """30 images of which the first 24 are classified right. Of those, at rung k (from 0), fgsm breaks 4 (k + 1),
    DeepFool 6 (k + 1) and noise none, always the first ones. `certified` of them are at rung k, the last ones."""
    rng = np.random.default_rng(0)
    identity = {
        "model": {
            "name": "resnet<b>", "source": "made & up", "fingerprint": "f" * 64, "num_classes": 5,
            "input_size": [channels, side, side],
        },
        "data": {"name": "pictures", "size": N},
        "options": {"attacks": ATTACKS, "norm": norm, "eps": eps, "target": target, "seed": 7, "steps": None},
    }  # fmt: skip
    store = Store.create(
        None,
        identity,
        {
            "command": "python -m robust.evaluate --model 'resnet<b>' --seed 7",
            "environment": {"torch": "2.15", "device": "cpu"},
            "class_names": CLASSES,
            "attacks": [{"name": "fgsm", "description": "One step", "source": "arXiv 1412.6572",
                         "parameters": {"norm": norm, "step_size": None}}],
            "started": "2026-01-02T03:04:05+00:00",
            "finished": "2026-01-02T03:05:05+00:00",
            "data_fingerprint": "d" * 64,
            "skipped_images": ["broken.png"],
            "certifier": "CROWN-IBP" if certified else "the <network> is too large",
        },
    )  # fmt: skip
    ids = ["=1+1.png", "+x.png", "-5.png", "@sum.png", "<img src=x onerror=alert(1)>.png", 'q"uo,te|.png', "熊猫.png"]
    ids += [f"class/{k}.png" for k in range(len(ids), N)]
    clean = [
        Clean(
            k,
            ids[k],
            f"{k:064x}",
            k % 5,
            k % 5 if k < 24 else (k + 1) % 5,
            1.0 if k == 0 else 0.9996,
            sum(24 - count <= k < 24 for count in certified),
        )
        for k in range(N)
    ]
    store.add_clean(clean)
    for attack, each in zip(ATTACKS, (4, 6, 0), strict=True):
        results, pictures = [], []
        for row in clean:
            rung = row.position // each if each and row.position < 24 else len(eps)
            x = rng.random((channels, side, side), dtype=np.float32)
            size = eps[min(rung, len(eps) - 1)]
            delta = rng.choice([-1.0, 1.0], x.shape) * (size if norm == "linf" else size / math.sqrt(x.size))
            x_adv = np.clip(x + delta, 0, 1).astype(np.float32)
            linf, l2 = float(abs(x_adv - x).max()), float(np.linalg.norm(x_adv - x))
            wrong = (row.label + 1 + row.position % 2) % 5
            for k, radius in enumerate(eps):
                found = k >= rung
                results.append(
                    Result(
                        row.position, attack, radius, found, found and row.position % 3 > 0,
                        wrong if found else None, 0.75 if found else None, linf if found else None,
                        l2 if found else None, 30.0 if found else None, 40.0 if found else None,
                        10 if row.position < 24 else 0, 9, 0 if found else None,
                    )
                )  # fmt: skip
            fooled = rung < len(eps)
            if row.position < 24 and attack != "noise":
                for role in ("smallest", "typical", "confident") if fooled else ("withstood",):
                    pred = wrong if fooled else row.label
                    pictures.append(
                        Picture(role, row.position, row.position, attack, size, pred, 0.75, size, linf, l2, x, x_adv)
                    )
        saved = [(p.position, p.x, p.x_adv) for p in pictures if p.role == "typical"] if adversarials else []
        store.add_unit(0, attack, 1.5, results, pictures, saved)
    store.set_findings(findings)
    return store


@pytest.fixture(scope="module")
def store() -> Store:
    return make_store()


@pytest.fixture(scope="module")
def folder(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    write_reports(store, path)
    return path


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Tags in order, and whether every one of them is closed in turn."""

    VOID = frozenset("meta link img br hr input".split())

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text.append(data)


# Units


@pytest.mark.parametrize(
    ("eps", "norm", "text"),
    [
        (8 / 255, "linf", "8/255"),
        (float(np.float32(8 / 255)), "linf", "8/255"),
        (0.5 / 255, "linf", "0.5/255"),
        (0.25 / 255, "linf", "0.25/255"),
        (1, "linf", "1"),
        (0.3, "linf", "0.3"),  # also 76.5/255
        (float(np.float32(0.3)), "linf", "0.3"),
        (0.031, "linf", "0.031"),
        (1 / 300, "linf", "0.85/255"),
        (math.pi / 100, "linf", "0.0314159"),
        (0.5, "l2", "0.5"),
        (8 / 255, "l2", "0.0313725"),
        (3.0, "l2", "3"),
    ],
)
def test_eps_is_said_in_the_unit_people_think_in(eps: float, norm: str, text: str) -> None:
    assert format_eps(eps, norm) == text


def test_a_percentage_is_never_rounded_to_0_or_100() -> None:
    assert [format_percent(k, 10_000) for k in (0, 1, 5, 6, 9994, 9996, 9999, 10_000)] == [
        "0 %", "<0.1 %", "0.1 %", "0.1 %", "99.9 %", ">99.9 %", ">99.9 %", "100 %",
    ]  # fmt: skip
    for k in range(1, 5000):
        assert format_percent(k, 5000) not in ("0 %", "0.0 %", "100 %", "100.0 %")
    assert format_percent(15, 20) == "75.0 %"
    assert format_percent(math.nan) == "–"
    assert format_interval(0.0, 0.161125) == "0–16.1 %"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.0421, "0.042 s"), (0.999, "1.0 s"), (12.34, "12.3 s"), (59.96, "1 min 0 s"),
        (125, "2 min 5 s"), (3599.6, "1 h 0 min"), (11_040, "3 h 4 min"), (86_399, "1 d 0 h"), (190_800, "2 d 5 h"),
    ],
)  # fmt: skip
def test_seconds_are_said_in_human_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_other_units() -> None:
    assert format_count(1234567) == "1,234,567"
    assert [format_images(k) for k in (0, 1, 1234)] == ["0 images", "1 image", "1,234 images"]
    assert format_distance(3.14159 / 255, "linf", 4 / 255) == "3.14/255"
    assert format_distance(0.123456, "linf", 0.3) == "0.123"
    assert format_distance(math.nan, "l2", 0.5) == "–"
    assert format_class(4, CLASSES) == "panda"
    assert format_class(4, None) == "4"
    assert format_class(0, ["x" * 80]) == "x" * 80
    assert format_class(0, ["x" * 300]) == "x" * 79 + "…"


# The answer


def test_the_answer_gives_the_numbers_of_the_summary(store: Store) -> None:
    # 24 of 30 are right; at 8/255 DeepFool has broken 6 * 4 = 24 of them. Wilson: 24/30 and 0/30.
    assert answer(store) == (
        "resnet<b> classifies 24 of 30 images correctly (80.0 %, 95 % interval 62.7–90.5 %). "
        "With changes of at most 8/255 per pixel, hardly visible to people, 0 of 30 remain (0–11.4 %)."
    )


@pytest.mark.parametrize(
    ("certified", "words"),
    [
        ((10, 4), "12 of 30 remain (24.6–57.7 %), 4 of them provably."),
        ((18, 12), "12 of 30 remain (24.6–57.7 %), all of them provably."),
        ((3, 0), "12 of 30 remain (24.6–57.7 %)."),
    ],
)
def test_the_answer_says_what_is_proved(certified: tuple[int, ...], words: str) -> None:
    assert answer(make_store(eps=[2 / 255, 4 / 255], certified=certified)).endswith(words)


def test_what_is_certified_is_in_every_report(tmp_path: Path, page: str) -> None:
    made = make_store(eps=[2 / 255, 4 / 255], certified=(10, 4))
    write_reports(made, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "have no adversarial example within eps:\n10 of 30 at 2/255, 4 of 30 at 4/255. Attacks" in html
    assert html.count("certified (proved)") == 2  # in the wide curve and in the narrow one
    assert "<dd>by CROWN-IBP, arXiv 1906.06316</dd>" in html
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["certified"] == {"by": "CROWN-IBP", "images": [10, 4]}
    rows = with_certified(made.summary(), made)
    rows = rows[rows.attack == "certified"]
    assert rows.robust_accuracy.tolist() == [10 / 30, 4 / 30] and rows.ci_low.tolist() == [
        wilson(k, 30)[0] for k in (10, 4)
    ]
    # And where nothing is, only the reason.
    assert "certified (proved)" not in page and "Certified:" not in page
    assert "<dd>nothing: the &lt;network&gt; is too large</dd>" in page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eps": [4 / 255]}, "With changes of at most 4/255 per pixel, invisible to people, 18 of 30 remain"),
        ({"eps": [16 / 255]}, "With changes of at most 16/255 per pixel, 18 of 30 remain"),
        ({"eps": [4 / 255], "channels": 1}, "With changes of at most 4/255 per pixel, 18 of 30 remain"),
        ({"eps": [0.3]}, "With changes of at most 0.3 per pixel (on a scale of 0 to 1), 18 of 30 remain"),
        ({"eps": [0.5], "norm": "l2"}, "With changes of l2 size at most 0.5, 18 of 30 remain"),
        (
            {"eps": [4 / 255], "target": "gibbon"},
            "With changes of at most 4/255 per pixel, invisible to people, 6 of the 24 come to be taken for "
            "‘gibbon’; 18 of 30 withstand (42.3–75.4 %).",
        ),
    ],
)
def test_the_answer_claims_no_more_than_is_known(options: dict, words: str) -> None:
    assert words in answer(make_store(**options))


@pytest.mark.parametrize(
    ("target", "robust", "words"),
    [
        (None, 1, "classifies 1 of 1 image correctly"),
        (None, 1, "1 of 1 remains"),
        (None, 0, "0 of 1 remain ("),
        ("cat", 1, "0 of the 1 come to be taken for ‘cat’; 1 of 1 withstands"),
        ("cat", 0, "1 of the 1 comes to be taken for ‘cat’; 0 of 1 withstand ("),
    ],
)
def test_the_answer_on_one_image(target: str | None, robust: int, words: str) -> None:
    store = make_store(target=target)
    assert words in answer(store, store.summary().assign(n=1, clean_accuracy=1.0, robust_accuracy=float(robust)))


def test_the_headline_is_the_largest_eps_and_the_strongest_attack_never_the_control(store: Store) -> None:
    summary = store.summary()
    assert headline(summary).eps == 8 / 255
    assert strongest(summary) == "foolbox:LinfDeepFoolAttack"
    equal = summary.assign(robust_accuracy=0.5, median_distance=0.01)
    assert strongest(equal) == "foolbox:LinfDeepFoolAttack"  # of equals the last, but not noise
    assert strongest(summary[summary.attack == "noise"]) == "noise"


def test_of_attacks_that_leave_as_few_the_strongest_is_so_at_smaller_eps(store: Store) -> None:
    summary = store.summary().assign(median_distance=0.01)
    last = (summary.attack != WORST_CASE) & (summary.eps == 8 / 255)
    summary.loc[last, "robust_accuracy"] = 0.0
    summary.loc[(summary.attack == "fgsm") & (summary.eps == 4 / 255), "robust_accuracy"] = 0.0
    assert strongest(summary) == "fgsm"
    assert "from fgsm, one of those that leave the fewest images at 8/255:" in rule(
        store, summary, choose(store, summary)
    )
    nearer = summary.assign(robust_accuracy=0.5)
    nearer.loc[nearer.attack == "fgsm", "median_distance"] = 0.005
    assert strongest(nearer) == "fgsm"
    nearer.loc[nearer.attack != "fgsm", "median_distance"] = math.nan  # they broke nothing
    assert strongest(nearer) == "fgsm"


def test_an_empty_run_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    empty = Store.create(None, {"model": {}, "data": {}, "options": {"attacks": ["pgd"], "norm": "linf"}}, {})
    with pytest.raises(InputError, match="no results"):
        write_reports(empty, tmp_path)
    assert list(tmp_path.iterdir()) == []


PASS, WARN, FAIL = Finding("a", "pass", "fine."), Finding("b", "warn", "few."), Finding("c", "fail", "masked.")


@pytest.mark.parametrize(
    ("findings", "level", "sentence"),
    [
        ([PASS], "pass", "This number can be believed, because the one check passes: a."),
        ([PASS, replace(PASS, name="b")], "pass", "This number can be believed, because all 2 checks pass: a, b."),
        ([WARN], "warn", "Believe this number with care, because 1 of 1 check warns: b – few."),
        ([PASS, WARN], "warn", "Believe this number with care, because 1 of 2 checks warns: b – few."),
        ([WARN, FAIL, PASS], "fail", "Do not believe this number yet, because 1 of 3 checks fails: c – masked."),
        ([WARN, replace(WARN, name="d")], "warn", "Believe this number with care, because 2 of 2 checks warn: "
                                                  "b – few; d – few."),
        ([], "warn", "Nothing was checked, so nothing says whether this can be believed."),
    ],
)  # fmt: skip
def test_the_verdict_is_that_of_the_worst_finding(findings: list[Finding], level: str, sentence: str) -> None:
    assert verdict(findings) == (level, sentence)


@pytest.mark.parametrize(
    ("findings", "unproved", "sentence"),
    [
        ([PASS], 12, "This number can be believed as an upper bound, because the one check passes: a. "
                     "A stronger attack may break the 12 images that stand without a proof."),
        ([PASS], 1, "This number can be believed as an upper bound, because the one check passes: a. "
                    "A stronger attack may break the image that stands without a proof."),
        ([WARN], 12, "Believe this number with care, as an upper bound, because 1 of 1 check warns: b – few."),
        ([FAIL], 12, "Do not believe this number yet, because 1 of 1 check fails: c – masked."),
    ],
)  # fmt: skip
def test_the_verdict_calls_an_upper_bound_one(findings: list[Finding], unproved: int, sentence: str) -> None:
    assert verdict(findings, unproved)[1] == sentence


def test_the_reports_count_what_stands_without_a_proof(tmp_path: Path) -> None:
    # Of the 24 right, DeepFool breaks 12 at 2/255; of the 12 that stand 4 are certified.
    write_reports(make_store(eps=[1 / 255, 2 / 255], certified=(10, 4), findings=(PASS,)), tmp_path)
    said = "A stronger attack may break the 8 images that stand without a proof."
    assert said in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert said in json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["verdict"]["reason"]


# Tables


def test_the_tables_have_the_columns_of_the_contract(folder: Path) -> None:
    samples = list(csv.reader(io.StringIO((folder / "samples.csv").read_text(encoding="utf-8"))))
    summary = list(csv.reader(io.StringIO((folder / "summary.csv").read_text(encoding="utf-8"))))
    assert tuple(samples[0]) == SAMPLE_COLUMNS
    assert tuple(summary[0]) == SUMMARY_COLUMNS
    assert len(samples) == 1 + N * len(ATTACKS) * len(LADDER)
    assert len(summary) == 1 + (len(ATTACKS) + 1) * len(LADDER)


def test_no_cell_of_text_is_a_formula_and_no_number_is_touched(folder: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((folder / "samples.csv").read_text(encoding="utf-8"))))
    ids = {row["sample_id"] for row in rows}
    assert {"'=1+1.png", "'+x.png", "'-5.png", "'@sum.png", 'q"uo,te|.png', "熊猫.png"} <= ids
    for row in rows:
        assert row["sample_id"][0] not in "=+-@\t\r"
        assert float(row["eps"]) in LADDER  # repr: the very same float
        assert row["success"] in ("True", "False")
        assert (row["adv_pred"] == "") == (row["distance_l2"] == "") == (row["success"] == "False")


def test_samples_are_streamed_in_pieces_that_make_the_whole(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = Store.sample_chunks
    monkeypatch.setattr(Store, "sample_chunks", lambda self: chunks(self, 7))
    REPORTS["samples.csv"](store, tmp_path)
    assert (tmp_path / "samples.csv").read_bytes() == (folder / "samples.csv").read_bytes()


def test_summary_against_gold(folder: Path) -> None:
    # Derived by hand: 24 of 30 right; fgsm breaks 4 a rung, of which one in three is lost in 8 bits (positions
    # 0, 3, ...); 30 images of 10 (24 of them) and 9 evaluations a rung; 1.5 s over 4 rungs. Wilson for 20 of 30.
    rows = list(csv.DictReader(io.StringIO((folder / "summary.csv").read_text(encoding="utf-8"))))
    first = {key: rows[0][key] for key in SUMMARY_COLUMNS if key != "median_distance"}
    assert first == {
        "attack": "fgsm", "norm": "linf", "eps": "0.00392156862745098", "n": "30", "clean_accuracy": "0.8",
        "robust_accuracy": "0.6666666666666666", "ci_low": first["ci_low"], "ci_high": first["ci_high"],
        "robust_accuracy_8bit": "0.7333333333333333", "forwards": "240", "gradients": "270",
        "seconds": first["seconds"],
    }  # fmt: skip
    assert float(first["ci_low"]) == pytest.approx(0.4878, abs=1e-4)
    assert float(first["ci_high"]) == pytest.approx(0.8077, abs=1e-4)
    assert float(first["seconds"]) == pytest.approx(0.375)
    assert [row["attack"] for row in rows[-4:]] == ["worst_case"] * 4


def test_the_same_run_makes_the_same_bytes(store: Store, folder: Path, tmp_path: Path) -> None:
    write_reports(store, tmp_path)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name


# report.json


def test_json_is_strict_and_complete(store: Store, folder: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert report["schema_version"] == SCHEMA_VERSION
    assert report["answer"] == answer(store)
    assert report["verdict"]["level"] == "warn"
    assert report["data"]["fingerprint"] == "d" * 64
    assert report["class_names"] == CLASSES
    assert report["command"].startswith("python -m robust.evaluate")
    assert list(report["summary"][0]) == list(SUMMARY_COLUMNS)
    noise = next(row for row in report["summary"] if row["attack"] == "noise")
    assert noise["median_distance"] is None  # NaN: noise found nothing
    assert report["findings"] == [{"name": "sample size", "level": "warn", "message": "only <30> images"}]


# report.html


def test_html_is_balanced_and_has_the_six_parts_in_order(page: str) -> None:
    Reader(page)
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "The answer", "The curve", "Adversarial examples", "What it turned into", "Can this be believed",
        "What was run",
    ]  # fmt: skip


def test_html_refers_to_nothing_outside(page: str) -> None:
    assert not re.search(r"https?:|//\w+\.\w|@import|url\(|srcset", page, re.IGNORECASE)
    for tag, attributes in Reader(page).tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)


def test_html_runs_nobodys_script(page: str) -> None:
    tags = Reader(page).tags
    assert sum(tag == "script" for tag, _ in tags) == 1  # our own
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert "<script>alert" not in page and "<img src=x" not in page and "resnet<b>" not in page
    text = "".join(Reader(page).text)
    assert CLASSES[0] in text and CLASSES[2] in text and CLASSES[3] in text
    assert "<img src=x onerror=alert(1)>.png" in text
    assert "only <30> images" in text


def test_html_names_no_option_without_a_value(page: str) -> None:
    text = "".join(Reader(page).text)
    assert "norm linf" in text and "step_size" not in text and "None" not in text


def test_html_opens_with_the_answer(store: Store, page: str) -> None:
    body = unescape(re.search(r'<p class="answer">(.*?)</p>', page, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert body.replace("\u00a0", " ") == answer(store)


def test_every_picture_has_its_words(page: str) -> None:
    tags = Reader(page).tags
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) % 3 == 0 and 6 <= len(images) // 3 <= 12
    assert all(attributes["alt"] for attributes in images)
    curves = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(curves) == 2
    assert all(a["role"] == "img" and "80.0 % without an attack" in a["aria-label"] for a in curves)


def test_ids_are_unique(page: str) -> None:
    ids = [attributes["id"] for _, attributes in Reader(page).tags if "id" in attributes]
    defined = [name for name in ids if re.fullmatch(r"m[0-9a-f]{10}", name)]
    assert len(defined) == len(set(defined))
    for _, attributes in Reader(page).tags:
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids


def page_of(store: Store, folder: Path) -> str:
    REPORTS["report.html"](store, folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_a_target_is_named_and_what_is_counted_said(tmp_path: Path, page: str) -> None:
    aimed = make_store(target="4")
    aimed._put(identity=aimed.identity | {"target": {"index": 4}})
    assert "come to be taken for ‘panda’;" in answer(aimed)
    said = page_of(aimed, tmp_path)
    assert "that no change found made it take for the target,\n‘panda’ (another wrong class counts as" in said
    assert "goes on classifying correctly" not in said and "goes on classifying correctly" in page
    aimed._put(class_names=None)
    assert "come to be taken for ‘4’;" in answer(aimed)


def test_what_is_rounded_at_a_larger_eps_is_said(tmp_path: Path, page: str) -> None:
    assert "scaled up to the eps of the" in page
    assert "scaled up" not in page_of(make_store(norm="l0", eps=[1.0, 3.0]), tmp_path)


def test_what_was_run_is_told_in_full(tmp_path: Path) -> None:
    store = make_store()
    described = {"description": "", "source": "", "parameters": {}}
    foreign = {"restarts": 1, "options": {"steps": 20, "random_start": False}}
    attacks = [
        described | {"name": "noise", "parameters": {"options": {}}},
        described | {"name": "foolbox:LinfDeepFoolAttack", "parameters": foreign},
        described | {"name": "pgd", "parameters": {"steps": 40, "step_size": None}},
    ]
    store._put(attacks=attacks, failed_attacks={"pgd": "it fell <over>"})
    text = " ".join("".join(Reader(page_of(store, tmp_path)).text).split())
    assert "options steps 20 random_start no" in text and "options foolbox's own" in text and "{" not in text
    assert "pgdfailed" in text.replace(" ", "")
    assert "steps 40, step_size 0.1It failed, and what it had found is not counted: it fell <over>" in text


@pytest.mark.parametrize(
    ("rate", "said"),
    [(6814.2, "6,814"), (1234567.0, "1,234,567"), (99.96, "100"), (12.345, "12.3"), (0.05123, "0.0512")],
)
def test_images_a_second_are_written_out(rate: float, said: str) -> None:
    assert reports.html._speed(rate) == said


def test_names_do_not_turn_the_direction_of_the_page(tmp_path: Path) -> None:
    store = make_store(findings=(replace(WARN, message="\u202eside"),))
    store._put(class_names=["cat\u202e", "\u2067dog", "\u2066bird", "fish", "panda"])
    store._db.execute("UPDATE clean SET sample_id = '\u202dp.png' WHERE position = 0")
    page = page_of(store, tmp_path)
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", page)
    assert "<bdi>panda</bdi>" in page  # names from right to left keep to themselves
    assert "cat\ufffd" in page and "\ufffddog" in page and "\ufffdp.png" in page and "\ufffdside" in page


def test_findings_are_told_by_word_and_symbol(tmp_path: Path) -> None:
    store = make_store(findings=(PASS, WARN, FAIL))
    REPORTS["report.html"](store, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    listed = re.search(r'<ul class="findings">(.*?)</ul>', page, re.DOTALL).group(1)  # type: ignore[union-attr]
    assert re.findall(r"</span>(\w+)</span>", listed) == ["fail", "warn", "pass"]
    for level, symbol in (("pass", "✓"), ("warn", "!"), ("fail", "✕")):
        assert f"{symbol}</span>{level}</span>" in page


def test_html_leaves_out_the_last_examples_to_stay_small(
    store: Store, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(page.encode()) < reports.html.LIMIT == 5_000_000
    limit = len(page.encode()) - 1
    monkeypatch.setattr(reports.html, "LIMIT", limit)
    REPORTS["report.html"](store, tmp_path)
    smaller = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(smaller.encode()) < limit
    assert page.count("<img") - smaller.count("<img") == 3


def test_html_of_a_run_that_recorded_no_details(tmp_path: Path) -> None:
    bare = make_store(findings=())
    bare._db.execute("DELETE FROM meta WHERE key != 'identity'")
    bare._db.execute("DELETE FROM picture")
    write_reports(bare, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    Reader(page)
    assert "None" not in "".join(Reader(page).text)
    assert "kept no picture" in page


# The parts of the page


def test_classes_and_confusions_of_a_table_counted_by_hand() -> None:
    rows = [  # sample, label, clean, attack, success, adv_pred, distance
        ("a", 0, 0, "fgsm", True, 1, 0.3), ("a", 0, 0, "pgd", True, 2, 0.1),
        ("b", 0, 0, "fgsm", False, None, None), ("b", 0, 0, "pgd", True, 2, 0.2),
        ("c", 1, 1, "fgsm", False, None, None), ("c", 1, 1, "pgd", False, None, None),
        ("d", 1, 3, "fgsm", False, None, None), ("d", 1, 3, "pgd", False, None, None),
    ]  # fmt: skip
    names = ["sample_id", "label", "clean_pred", "attack", "success", "adv_pred", "distance_linf"]
    samples = pd.DataFrame(rows, columns=names).assign(eps=0.1, norm="linf", distance_l2=9.0)
    samples["robust"] = (samples.label == samples.clean_pred) & ~samples.success
    table = per_class(samples)
    # Class 0: both images right, both broken by some attack. Class 1: c stands, d was wrong from the start.
    assert table[["label", "n", "correct", "robust"]].to_numpy().tolist() == [[0, 2, 2, 0], [1, 2, 1, 1]]
    # a became 2 (pgd's adversarial is nearer), b became 2.
    assert confusions(samples).to_numpy().tolist() == [[0, 2, 2]]


def test_examples_are_chosen_by_the_rule(store: Store) -> None:
    samples, summary = store.samples(), store.summary()
    examples = choose(store, summary)
    positions = [example.picture.position for example in examples]
    assert len(positions) == len(set(positions)) <= 12
    assert {example.picture.attack for example in examples} == {"foolbox:LinfDeepFoolAttack"}
    assert examples[0].picture.role == "smallest" and examples[0].picture.position == 0
    rows = samples[(samples.attack == "foolbox:LinfDeepFoolAttack") & (samples.eps == 8 / 255) & samples.success]
    kept = [p for p in store.pictures() if p.role == "typical" and p.attack == "foolbox:LinfDeepFoolAttack"]
    median = min((p for p in kept if p.position != 0), key=lambda p: abs(p.distance_l2 - rows.distance_l2.median()))
    assert examples[1].picture.position == median.position


def test_images_that_withstood_are_shown_too() -> None:
    store = make_store(eps=[1 / 255, 2 / 255])
    roles = [example.picture.role for example in choose(store, store.summary())]
    assert roles[:4] == ["smallest", "typical", "confident", "withstood"]
    said = rule(store, store.summary(), choose(store, store.summary()))
    assert said.endswith("answer; and some drawn at random that withstood it. No image is shown twice.")


def test_the_rule_names_what_was_chosen_and_no_more(tmp_path: Path) -> None:
    store = make_store(eps=[1 / 255, 2 / 255])
    store._db.execute("DELETE FROM picture WHERE role = 'withstood'")  # as where all that stand are certified
    REPORTS["report.html"](store, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "; and those with the most confident wrong answer. No image" in page and "withstood it" not in page
    store._db.execute("DELETE FROM picture WHERE role != 'smallest'")
    said = rule(store, store.summary(), choose(store, store.summary()))
    assert said.endswith("at 2/255: those with the smallest change in l2. No image is shown twice.")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clean_accuracy": 0.0}, "None: no image was classified correctly, and so none was attacked."),
        ({"attack": "noise"}, "None: of the noise control no picture is kept."),
        ({"forwards": 0}, "None: all images that are classified correctly are certified, and "
                          "foolbox:LinfDeepFoolAttack was spared them."),
        ({}, "The run kept no picture of foolbox:LinfDeepFoolAttack that can be shown here."),
    ],
)  # fmt: skip
def test_where_no_picture_is_shown_it_is_said_why(store: Store, change: dict, said: str) -> None:
    assert rule(store, store.summary().assign(**change), []) == said


@pytest.mark.parametrize(
    ("norm", "delta", "drawn", "factor"),
    [
        ("linf", [-4 / 255, 0, 4 / 255], [0, 0.5, 1], "× 31.9 for the eye"),
        ("linf", [-2 / 255, 0, 2 / 255], [0.25, 0.5, 0.75], "× 31.9 for the eye"),
        ("l2", [-0.1, 0, 0.05], [0, 0.5, 0.75], "× 5 for the eye"),
        ("l2", [0, 0, 0], [0.5, 0.5, 0.5], "no change"),
    ],
)
def test_a_perturbation_is_drawn_by_its_factor(norm: str, delta: list, drawn: list, factor: str) -> None:
    x = np.full((1, 1, 3), 0.5, np.float32)
    x_adv = (x + np.array(delta)).astype(np.float32)
    largest = float(abs(x_adv - x).max())
    picture = Picture("smallest", 0, 0, "pgd", 4 / 255, 1, 0.5, largest, largest, 0.25, x, x_adv)
    example = Example(picture, Clean(0, "a", "", 0, 0, 0.5), norm)
    assert example.perturbation.ravel() == pytest.approx(drawn, abs=1e-5)
    assert example.factor == factor
    assert example.size.endswith("l2 0.25") and not example.drawn_alike


def test_a_change_that_rounding_takes_back_is_said_where_the_pictures_are() -> None:
    """Else one picture would stand under two names."""
    x = np.full((1, 1, 2), 0.25, np.float32)
    for delta, alike in ((0.25 / 255, True), (1 / 255, False)):
        picture = Picture("smallest", 0, 0, "pgd", delta, 1, 0.75, 0.1, delta, 0.1, x, x + np.float32(delta))
        example = Example(picture, Clean(0, "a", "", 0, 0, 0.5), "linf")
        assert example.drawn_alike == alike == (png(example.picture.x) == png(example.picture.x_adv))
        assert example.size.endswith("drawn alike") == alike
        words = [text.get_text() for text in panda(example, None).texts]
        assert ("75.0 %, not in 8 bits" in words) == alike == ("75.0 % confidence" not in words)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel(channels: int) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (channels, 5, 7), np.uint8)
    with Image.open(io.BytesIO(png(levels.astype(np.float32) / 255))) as image:
        assert image.size == (7, 5)
        back = np.asarray(image).reshape(5, 7, channels).transpose(2, 0, 1)
    assert (back == levels).all()


@pytest.mark.parametrize("layout", [WIDE, NARROW])
def test_the_curve_takes_the_colour_of_the_page(store: Store, layout: object) -> None:
    svg = inline_svg(store.summary(), {}, layout, "wide")  # type: ignore[arg-type]
    assert "currentColor" in svg and "#010203" not in svg and not re.search("http|xml|xlink", svg)
    for label in ("worst case", "fgsm", "noise (control)", "4/255", "100 %"):
        assert label in svg
    assert "#000000" not in svg


def test_the_worst_case_is_drawn_above_no_attack() -> None:
    """At eps 10 nothing stands; an attack on the least distance broke half of the images, at 2 and 4."""
    eps, accuracy = np.array([0.0, 10.0]), np.array([100.0, 0.0])
    steps = (np.array([0.0, 2.0, 4.0, 10.0]), np.array([100.0, 75.0, 50.0, 50.0]))
    at, line = _beneath(eps, accuracy, [steps])
    assert at.tolist() == [0, 0, 2, 2, 4, 4, 10, 10]
    assert line.tolist() == [100, 100, 80, 75, 60, 50, 0, 0]
    at, line = _beneath(eps, accuracy, [])
    assert np.interp(3, at, line) == 70


def test_the_worst_case_of_searches_for_the_least_distance_is_exact() -> None:
    """Image by image the least of all; where another attack ran too, nobody knows it between the eps."""
    options = {"attacks": ["fmn", "ddn"], "norm": "l2", "eps": [1.0], "seed": 0}
    store = Store.create(None, {"model": {}, "data": {}, "options": options}, {})
    store.add_unit(0, "fmn", 1.0, [], nearest=[(0, 0.5), (1, 0.7)])
    assert set(nearest(store)) == {"fmn"}
    store.add_unit(0, "ddn", 1.0, [], nearest=[(1, 0.2), (2, 0.9)])
    found = nearest(store)
    assert {attack: distances.tolist() for attack, distances in found.items()} == {
        WORST_CASE: [0.2, 0.5, 0.9], "fmn": [0.5, 0.7], "ddn": [0.2, 0.9]
    }  # fmt: skip


def test_the_curve_in_words(store: Store) -> None:
    # DeepFool, the strongest, breaks 6 a rung of the 24 that are right.
    assert describe(store.summary()) == (
        "Robust accuracy against eps: 80.0 % without an attack; in the worst case "
        "60.0 % at 1/255, 40.0 % at 2/255, 20.0 % at 4/255, 0 % at 8/255."
    )


def test_many_eps_get_only_the_labels_that_fit() -> None:
    eps = [k / 255 for k in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 8, 16)]
    svg = inline_svg(make_store(eps=eps).summary(), {}, NARROW, "narrow")
    assert ">16/255<" in svg and ">0.5/255<" not in svg


# Files


def test_figures_have_safe_names_and_300_dpi(store: Store, folder: Path) -> None:
    figures = sorted((folder / "figures").glob("panda_*.png"))
    assert len(figures) == len(choose(store, store.summary()))
    assert all(re.fullmatch(r"panda_\d+_[A-Za-z0-9_-]+\.png", path.name) for path in figures)
    with Image.open(figures[0]) as image:
        assert round(image.info["dpi"][0]) == 300 and image.width > 1800
    assert (folder / "figures" / "curve.svg").read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.parametrize(
    ("sample_id", "name"),
    [("n01/../../etc/passwd", "passwd"), ("a\\b:c.png", "b_c"), ("熊猫.png", "image"), ("x" * 300, "x" * 60)],
)
def test_file_names_are_safe(sample_id: str, name: str) -> None:
    assert _safe(sample_id) == name


def test_figures_of_an_earlier_report_go(store: Store, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    stale, mine = tmp_path / "figures" / "panda_99_old.png", tmp_path / "figures" / "mine.png"
    half = tmp_path / "figures" / ".panda_1_0001.png.4711"  # of a process that was killed
    for path in (stale, half, mine):
        path.touch()
    REPORTS["figures/panda_*.png"](store, tmp_path)
    assert not stale.exists() and not half.exists() and mine.exists()


@pytest.mark.parametrize("options", [{"channels": 1}, {"norm": "l2", "eps": [0.25, 0.5]}, {"side": 120}])
def test_every_kind_of_image_and_norm_is_reported(options: dict, tmp_path: Path) -> None:
    store = make_store(**options)
    REPORTS["report.html"](store, tmp_path)
    reader = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert answer(store) in "".join(reader.text).replace("\u00a0", " ")
    # Of every picture kept, image, perturbation and adversarial; two layouts of the curve.
    names = [name for name, _ in reader.tags]
    assert names.count("img") > 0 and names.count("img") % 3 == 0 and names.count("svg") == 2


def test_npz_holds_the_verified_successes(store: Store, folder: Path) -> None:
    saved = list(store.adversarials())
    with np.load(folder / "adversarials.npz") as arrays:
        assert {name: arrays[name].dtype.kind for name in arrays} == {
            "x": "f", "x_adv": "f", "labels": "i", "ids": "U", "attacks": "U", "eps": "f",
        }  # fmt: skip
        assert arrays["x"].shape == (len(saved), 3, 12, 12) and arrays["x"].dtype == np.float32
        assert arrays["labels"].dtype == np.int64
        for k, (clean, attack, eps, x, x_adv) in enumerate(saved):
            assert (arrays["ids"][k], arrays["attacks"][k]) == (clean.sample_id, attack)
            assert (arrays["labels"][k], arrays["eps"][k]) == (clean.label, eps)
            assert (arrays["x"][k] == x).all() and (arrays["x_adv"][k] == x_adv).all()


def test_no_npz_without_saved_adversarials(tmp_path: Path) -> None:
    REPORTS["adversarials.npz"](make_store(adversarials=False), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), replacing(path) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["report.json"]
    with replacing(path) as stream:
        stream.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert os.listdir(tmp_path) == ["report.json"]


def test_what_a_killed_process_left_of_a_file_goes_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "report[1].json"
    code = (
        "import os, sys; from pathlib import Path; from robust.files import replacing\n"
        "with replacing(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    (left,) = tmp_path.iterdir()
    running = left.with_name(f".{path.name}.{os.getppid()}.part")  # of a process that may be writing it still
    own = tmp_path / f".{path.name}.mine.part"
    for other in (running, own):
        other.touch()
    with replacing(path) as stream:
        stream.write(b"after")
    assert set(tmp_path.iterdir()) == {path, running, own} and path.read_text() == "after"


# The terminal


@pytest.mark.parametrize(("norm", "eps"), [("linf", LADDER), ("linf", [0.1, 0.3]), ("l2", [0.25, 3.0])])
def test_the_table_fits_80_columns(norm: str, eps: list[float]) -> None:
    stream = io.StringIO()
    Console(file=stream, width=80).print(summary_table(make_store(norm=norm, eps=eps)))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text and "foolbox:LinfDeepFoolAttack" in text and "62.7–90.5 %" in text


def test_plain_lines_say_the_same(store: Store) -> None:
    lines = plain_lines(store)
    assert lines[0] == "no attack: 24 of 30 correct, 80.0 % (62.7–90.5 %)"
    assert lines[1] == "fgsm, linf 1/255: 20 of 30 robust, 66.7 % (48.8–80.8 %)"
    assert len(lines) == 1 + (len(ATTACKS) + 1) * len(LADDER)


def test_reports_do_without_torch() -> None:
    code = "import sys, reports, reports.terminal, robust.units; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
