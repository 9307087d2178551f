"""python -m robust.compare: how it ends, what it prints and writes. Names are the worst that people can think of."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

import robust.compare
from gate_runs import CHECKS, ENVIRONMENT, MODEL, OPTIONS, PGD, make_run, verdicts
from reports.comparehtml import write_page
from reports.markdown import inert, write_markdown
from robust import cli
from robust.baseline import read
from robust.gate import compare
from robust.store import FILENAME, Clean, Finding, Picture, Result, Store
from robust.table import remarks, table
from test_reports import Reader

N = 60
IDS = [
    "=cmd|' /C calc'!A0", "+x.png", "-5.png", "@someone.png", "<img src=x onerror=alert(1)>.png", "a|b`c`.png",
    "![i](http://x.y)", "www.x.org", "ctrl\x01\x1b[31m\ufffe\n.png", "]]>&amp;.png", "熊猫.png", "<!-- -->.png",
    *(f"{k:03d}.png" for k in range(12, N)),
]  # fmt: skip


def stands(fell: int) -> list[int]:
    """Of 60, the first 40 stand, less the first `fell`."""
    return [0] * fell + [1] * (40 - fell) + [0] * 20


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """before, same: equal verdicts. worse: 15 fell at 8/255. other: other data. train: comes in training mode."""
    root = tmp_path_factory.mktemp("runs")

    def rows(fell: int) -> dict:
        return {
            (attack, eps): stands(fell * (eps > 0.02)) for attack in ("<b>pgd|", "fgsm") for eps in (1 / 255, 8 / 255)
        }

    make_run(root / "before", rows(0), ids=IDS, reports=True)
    make_run(root / "same", rows(0), ids=IDS, seed=5, batch_size=3)
    make_run(root / "worse", rows(15), ids=IDS, model=MODEL | {"fingerprint": "0" * 64})
    make_run(root / "other", rows(0))
    make_run(root / "train", rows(0), ids=IDS, findings=[Finding("eval mode", "warn", "in training mode"), *CHECKS[1:]])
    return root


@pytest.fixture
def here(runs, tmp_path, monkeypatch) -> Path:
    """An empty folder with the runs beside it."""
    monkeypatch.chdir(tmp_path)
    for run in ("before", "same", "worse", "other", "train"):
        (tmp_path / run).symlink_to(runs / run)
    return tmp_path


def run(line: str, capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line, in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["robust.compare", *shlex.split(line)])
        cli.main(robust.compare.compare)
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


# How it ends


@pytest.mark.parametrize(
    ("line", "code", "last"),
    [
        ("before same", 0, "PASS: worst case at linf 8/255 stayed at 66.7 %"),
        ("before before", 0, "PASS: worst case at linf 8/255 stayed at 66.7 %"),
        ("before worse", 1, "FAIL (and 2 more): worst case at linf 8/255 fell from 66.7 % to 41.7 % (−25.0 points"),
        ("worse before", 0, "PASS: worst case at linf 8/255 rose from 41.7 % to 66.7 % (+25.0 points"),
        ("before worse --eps 1/255", 0, "PASS: worst case at linf 1/255 stayed"),
        ("before worse --max-drop 0.3", 0, "PASS"),
        ("before worse --max-drop 0.3 --min-robust-accuracy 0.5", 1,
         "FAIL: worst case at linf 8/255 is 41.7 %, below the 50.0 % asked for"),
        ("before worse --max-drop 0.3 --min-robust-accuracy 0.4 --strict", 1,
         "FAIL: worst case at linf 8/255 is 41.7 %, the 95 % interval from 30.1 %, below the 40.0 % asked for"),
        ("before same --min-clean-accuracy 1", 0, "PASS"),
        ("before train", 1, "FAIL: eval mode – in training mode"),
    ],
)  # fmt: skip
def test_exit_codes_and_the_last_sentence(here, capsys, line, code, last):
    ended, out, err = run(line, capsys)
    assert (ended, err) == (code, "")
    assert out.splitlines()[-1].startswith(last)
    assert "\x1b" not in out and "\x01" not in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "before other",
            "other cannot be compared with before: other data: the two have no sample in common (60 there, 60 here)",
        ),
        ("before nowhere", "nowhere cannot be read: No such file or directory"),
        ("before same worse", "two runs can be compared, not 3"),
        ("before same --max-drop 5", "max_drop is a share between 0 and 1, not 5; did you mean 0.05?"),
        ("before same --eps 4/255", "before has no eps 4/255; it has 1/255, 8/255"),
        ("before same --strict", "strict is about a least accuracy"),
        ("before same --junit /dev/null/x.xml", "cannot write /dev/null/x.xml"),
        ("same", "robustness-baseline.json cannot be read: No such file or directory"),
        ("", "no run is named, and there is none under runs/"),
        ("--update same/samples.csv", "cannot be read"),
        ("--update before/samples.csv", "has no content hashes and no options"),
        ("--update same before", "--update writes a file, and same is a folder"),
        ("--update new.json same --junit j.xml", "--update writes no reports: leave out --junit"),
        ("--plan 0.1 --markdown m.md --html h.html", "--plan writes no reports: leave out --markdown and --html"),
        ("--plan 0.1 --update", "--plan and --update are two commands: leave one out"),
        ("--plan 2", "a drop of 2 cannot be planned for"),
        ("--mistake", "No such option: --mistake"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(here, capsys, line, message):
    code, out, err = run(line, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert "\x1b" not in err
    assert not (here / "robustness-baseline.json").exists()


def test_quiet_prints_errors_only(here, capsys):
    assert run("before same --quiet", capsys) == (0, "", "")
    code, out, err = run("before worse --quiet", capsys)
    assert (code, out) == (1, "") and err.startswith("FAIL (and 2 more): worst case") and err.count("\n") == 1


def test_plan(here, capsys):
    code, out, err = run("--plan 0.05", capsys)
    assert (code, err) == (0, "")
    few, many = (int(line.split()[0].replace(",", "")) for line in out.splitlines()[1:])
    assert 100 < few < many < 2000


def test_it_needs_neither_torch_nor_a_plotting_library(here):
    code = (
        "import sys, robust.compare\n"
        "from robust import cli\n"
        "sys.argv = ['compare', 'before', 'worse', '--quiet']\n"
        "try: cli.main(robust.compare.compare)\n"
        "except SystemExit as ended: assert ended.code == 1\n"
        "assert not {'torch', 'matplotlib', 'jinja2', 'foolbox'} & set(sys.modules)\n"
        "sys.argv += ['--junit', 'j.xml', '--markdown', 'm.md', '--json', 'c.json', '--html', 'c.html']\n"
        "try: cli.main(robust.compare.compare)\n"
        "except SystemExit as ended: assert ended.code == 1\n"
        "assert 'torch' not in sys.modules\n"
    )
    root = Path(robust.compare.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Baselines


def test_update_writes_a_baseline_that_the_next_run_is_held_against(here, capsys):
    code, out, err = run("--update before", capsys)
    assert (code, err) == (0, "") and out == "Wrote robustness-baseline.json from before: new, 60 images\n"
    assert run("same", capsys)[0] == 0
    assert "would be compared with itself" in run("robustness-baseline.json", capsys)[2]
    code, out, _ = run("worse", capsys)
    assert code == 1 and "=cmd" not in (here / "robustness-baseline.json").read_text()
    code, out, err = run("--update worse", capsys)
    assert (code, err) == (0, "")
    last = out.splitlines()[-1]
    assert last.startswith(
        "Wrote robustness-baseline.json from worse: worst case at linf 8/255 fell from 66.7 % to 41.7"
    )
    assert run("worse --quiet", capsys) == (0, "", "")


def test_update_under_another_name(here, capsys):
    assert run("--update bases/a.json before --quiet", capsys) == (0, "", "")
    assert run("bases/a.json same --quiet", capsys) == (0, "", "")


@pytest.mark.parametrize("file", [FILENAME, "report.json", "samples.csv"])
def test_update_never_replaces_a_run(runs, tmp_path, capsys, file):
    shutil.copytree(runs / "before", tmp_path / "run")
    kept = (tmp_path / "run" / file).read_bytes()
    code, _, err = run(f"--update {tmp_path}/run/{file} {tmp_path}/run", capsys)
    assert code == 2 and "is a run's own file and no baseline; name one such" in err
    assert (tmp_path / "run" / file).read_bytes() == kept


def test_files_are_written_through_links_and_to_what_is_no_regular_file(here, capsys):
    (here / "real.md").write_text("old")
    (here / "link.md").symlink_to("real.md")
    os.mkfifo(here / "pipe")
    reader = subprocess.Popen(["cat", "pipe"], cwd=here, stdout=subprocess.PIPE, text=True)
    assert run("before same --quiet --markdown link.md --json pipe", capsys)[0] == 0
    assert json.loads(reader.communicate(timeout=60)[0])["passed"] is True
    assert (here / "link.md").is_symlink() and (here / "real.md").read_text().startswith("#")


def test_an_empty_path_is_refused(here, capsys):
    code, _, err = run("before same --markdown ''", capsys)
    assert (code, err) == (2, "error: --markdown is empty: give it a value, or leave it out\n")


def test_a_tilde_that_the_shell_has_left_is_the_home_folder(here, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    assert run("'~/before' same --quiet --markdown=~/a.md", capsys)[0] == 0
    assert (here / "a.md").exists() and not (here / "~").exists()


def test_update_never_replaces_what_it_cannot_compare(here, capsys):
    run("--update before", capsys)
    kept = (here / "robustness-baseline.json").read_bytes()
    code, _, err = run("--update other", capsys)
    assert code == 2 and "robustness-baseline.json is left as it was: remove it first if it has had its day" in err
    assert (here / "robustness-baseline.json").read_bytes() == kept
    (here / "robustness-baseline.json").write_bytes(kept[:300])
    assert run("--update before", capsys)[0] == 2
    assert (here / "robustness-baseline.json").read_bytes() == kept[:300]


def test_without_names_the_newest_run_is_meant(here, capsys):
    (here / "runs").mkdir()
    (here / "runs" / "old").symlink_to(here / "other")
    (here / "runs" / "new").symlink_to(here / "before")
    newest = here / "before" / FILENAME
    newest.touch()
    assert "from runs/new" in run("--update", capsys)[1]
    assert run("", capsys)[0] == 0


# What it writes


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    options = [f"--{name}={folder / name}" for name in ("junit", "markdown", "json", "html")]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["robust.compare", str(runs / "before"), str(runs / "worse"), "--quiet", *options])
        cli.main(robust.compare.compare)
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "before worse --json before/report.json",
        "base.json worse --html base.json",
        "before worse --json a --markdown ./a",
    ],
)
def test_a_report_does_not_replace_what_is_compared_nor_another(here, capsys, line):
    run("base.json before --update", capsys)
    files = {path: path.read_bytes() for path in (here / "base.json", here / "before" / "report.json") if path.exists()}
    code, out, err = run(line, capsys)
    assert (code, out) == (2, "") and "name another one for this report" in err and err.count("\n") == 1
    assert files and all(path.read_bytes() == content for path, content in files.items())


def test_junit_has_a_case_for_every_rule_and_row(written, runs):
    comparison = compare(read(runs / "before"), read(runs / "worse"))
    (suite,) = ElementTree.parse(written / "junit").getroot()
    cases = suite.findall("testcase")
    assert [(case.get("classname"), case.get("name")) for case in cases] == [
        (f"robust.compare.{judgement.rule}", judgement.subject) for judgement in comparison.judgements
    ]
    failed = [case.get("name") for case in cases if case.find("failure") is not None]
    assert failed == [failure.subject for failure in comparison.failures]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("8", "3", "0")
    message = cases[-2].find("failure")
    assert message.get("message").startswith("worst case at linf 8/255 fell from 66.7 %")
    assert "it is robustness itself that fell." in message.text and "ctrl␁␛[31m" in "".join(
        case.find("failure").text for case in cases if case.find("failure") is not None
    )


@pytest.mark.parametrize("line", ["before worse", "before other", "before same --max-drop 0.1 --significant 0.01"])
def test_junit_keeps_to_the_schema(here, capsys, line):
    run(f"{line} --junit j.xml", capsys)
    etree = pytest.importorskip("lxml.etree", reason="validates against the schema; the structure is tested without it")
    schema = etree.XMLSchema(etree.parse(Path(__file__).parent / "junit-10.xsd"))
    schema.assertValid(etree.parse(here / "j.xml"))


def test_where_nothing_can_be_compared_the_server_is_told_why(here, capsys):
    code, _, err = run("before other --junit j.xml --markdown m.md --json c.json --html c.html", capsys)
    assert code == 2
    (suite,) = ElementTree.parse(here / "j.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "0", "1")
    reason = suite.find("testcase/error").get("message")
    assert f"error: {reason}\n" == err
    assert unescape((here / "m.md").read_text()).endswith(f"{reason}\n")
    told = json.loads((here / "c.json").read_text(encoding="utf-8"))
    assert told == {"schema_version": 3, "passed": False, "answer": reason, "error": reason}
    page = Reader((here / "c.html").read_text(encoding="utf-8"))
    assert reason in [line.strip() for line in page.text] and not any(tag == "script" for tag, _ in page.tags)


@pytest.mark.parametrize("option", ["junit", "markdown", "json", "html"])
def test_no_report_is_written_where_one_of_them_cannot_be(here, capsys, option):
    others = " ".join(f"--{name} made/{name}" for name in ("junit", "markdown", "json", "html") if name != option)
    (here / "file").touch()
    for path, why in (("file/x", "Not a directory"), (".", "Is a directory")):
        code, out, err = run(f"before same {others} --{option} {path}", capsys)
        assert (code, out, err) == (2, "", f"error: cannot write {path}: {why}\n")
    assert not (here / "made").exists()


def test_markdown_shows_the_rows_and_lets_nothing_in(written):
    text = (written / "markdown").read_text(encoding="utf-8")
    assert text.startswith("### Robustness: FAIL (and 2 more)\n\n**worst case at linf 8/255 fell from 66.7 % to 41.7 %")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 7
    assert {row.count("|") for row in rows} == {10}
    assert sum("✕" in row for row in rows) == 3
    # Of HTML there is only our own; no link, no mention, no code fence, no control character.
    assert set(re.findall(r"<[^>]*>", text)) == {
        "<details>",
        "<summary>",
        "</summary>",
        "</details>",
        "<code>",
        "</code>",
    }
    assert "15 images newly fell" in text
    assert not re.search(r"@|`|!\[|\]\(|https?:|www\.", text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\ufffe]", text)
    for cell in re.findall(r"<code>(.*?)</code>", text):
        assert cell[0] not in "=+-@"
    assert "=cmd|' /C calc'!A0" in unescape(text) and "<img src=x onerror=alert(1)>.png" in unescape(text)


def test_markdown_is_rendered_as_one_table_of_text(written):
    # rich, which the command line needs, brings this parser.
    page = MarkdownIt("js-default", {"html": True, "linkify": False}).render((written / "markdown").read_text("utf-8"))
    tags = [tag for tag, _ in Reader(page).tags]
    assert set(tags) <= set("h3 p strong ul li table thead tbody tr th td details summary code".split())
    assert (tags.count("table"), tags.count("tr"), tags.count("td")) == (1, 1 + 7, 7 * 9)


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "+1",
        "-1",
        "@team",
        "a|b",
        "`x`",
        "**b**",
        "<script>",
        "&lt;",
        "[a](b)",
        "# h",
        "a\n\n# h",
        "http://a.b",
        "www.a.b",
    ],
)
def test_inert_text_reads_the_same_and_does_nothing(text):
    made = inert(text)
    assert unescape(made) == text.replace("\n", "␊")
    assert made[0] not in "=+-@#" and not re.search(r"[|`*<>\[\]@#]|://|www\.", re.sub(r"&#\d+;", "", made))


def test_json_holds_everything(written, runs):
    report = json.loads((written / "json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert (report["schema_version"], report["error"], report["passed"]) == (3, None, False)
    assert report["answer"].startswith("FAIL")
    assert report["rules"]["significant"] == 0.05
    row = report["rows"][-1]
    assert (row["attack"], row["eps"]) == ("worst_case", 8 / 255)
    assert row["robust_accuracy"] == {"baseline": 40 / 60, "current": 25 / 60}
    assert row["clean_accuracy"] == {"baseline": 1, "current": 1}
    assert row["change"] == -0.25 and row["ci_low"] < -0.25 < row["ci_high"] < 0
    assert row["p_value"] == 2 * 0.5**15 and sorted(row["fell"]) == sorted(IDS[:15]) and row["rose"] == []
    assert [j["passed"] for j in report["judgements"]].count(False) == 3
    assert report["current"]["model"]["fingerprint"] == "0" * 64


def test_html_is_one_sound_page_that_lets_nothing_in(written):
    page = (written / "html").read_text(encoding="utf-8")
    reader = Reader(page)
    assert not re.search(r"https?:(?!//x\.y)|@import|url\(|srcset", page, re.IGNORECASE)
    assert not any(tag == "script" for tag, _ in reader.tags)
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert [attributes.get("alt") for tag, attributes in reader.tags if tag == "img"] == []
    text = "".join(reader.text)
    assert "Worst case at linf 8/255 fell from 66.7" in text.replace("\u00a0", " ")
    assert IDS[0] in text and IDS[4] in text and "\x1b" not in page
    assert "The run kept no picture of an image that newly fell" in text
    charts = [attributes for tag, attributes in reader.tags if tag == "svg"]
    assert len(charts) == 2 and "66.7 % before, 41.7 % now" in charts[0]["aria-label"]


def test_html_shows_what_no_attack_is_called_as_symbols(tmp_path):
    run = verdicts({("pgd\x1b[31m", 0.1): [1, 0]})
    write_page(compare(run, run), tmp_path, tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "pgd␛[31m" in page and "\x1b" not in page


def test_what_passes_does_not_fail_on_anything(tmp_path):
    same, worse = verdicts({("pgd", 0.1): [1] * 20}), verdicts({("pgd", 0.1): [0] * 20})
    for current, said in ((same, "Would fail on: "), (worse, "Fails on: ")):
        comparison = compare(same, current)
        write_page(comparison, tmp_path, tmp_path / "c.html")
        write_markdown(comparison, tmp_path / "c.md")
        assert said in (tmp_path / "c.html").read_text(encoding="utf-8")
        assert said in (tmp_path / "c.md").read_text(encoding="utf-8")
        assert list(remarks(comparison))[-1].startswith(said)


def pictured(folder: Path, fell: int, saved: bool = False) -> Path:
    """A run of 40 images on which pgd broke the first `fell`, and noted the first of these for the report."""
    x = np.random.default_rng(0).random((3, 8, 8)).astype(np.float32)
    eps = 8 / 255
    details = {"finished": "2026-01-01", "environment": ENVIRONMENT, "attacks": [{"name": "pgd", "parameters": PGD}]}
    identity = {"model": MODEL, "data": {"name": "d", "size": 40}, "options": OPTIONS | {"eps": [eps]}}
    store = Store.create(folder / FILENAME, identity, details)
    store.add_clean([Clean(k, f"{k}.png", f"{k:064x}", 0, 0, 0.9) for k in range(40)])
    known = {"attack": "pgd", "eps": eps, "distance_linf": eps, "distance_l2": 0.3, "distance": eps}

    def of(kind, **values):
        return kind(**{name: (known | values).get(name) for name in kind.__dataclass_fields__})

    results = [
        of(Result, position=k, success=k < fell, success_8bit=k < fell, adv_pred=1 if k < fell else None,
           adv_confidence=0.5 if k < fell else None, forwards=1, gradients=1, restart=0)
        for k in range(40)
    ]  # fmt: skip
    pictures = [
        of(Picture, role="smallest", rank=0.0, position=0, adv_pred=1, adv_confidence=0.5, x=x, x_adv=x),
        of(Picture, role="withstood", rank=0.0, position=39, adv_pred=0, adv_confidence=0.5, x=x, x_adv=x),
    ]
    adversarials = [(k, x, x) for k in range(fell)] if saved else []
    store.add_unit(0, "pgd", 1.0, results, pictures if fell else [], adversarials)
    store.close()
    return folder


@pytest.mark.parametrize(("saved", "shown"), [(False, 1), (True, 6)])
def test_html_shows_images_that_newly_fell(tmp_path, capsys, saved, shown):
    before, now = pictured(tmp_path / "a", 0), pictured(tmp_path / "b", 12, saved)
    run(f"{before} {now} --html {tmp_path / 'c.html'} --quiet", capsys)
    reader = Reader((tmp_path / "c.html").read_text(encoding="utf-8"))
    images = [attributes["alt"] for tag, attributes in reader.tags if tag == "img"]
    assert len(images) == 3 * shown
    assert images[0].startswith("Original image 0.png") and not any("39.png" in alt for alt in images)
    assert "Fell to pgd" in "".join(reader.text)


# The terminal


def test_the_table_fits_80_columns(runs):
    stream = io.StringIO()
    Console(file=stream, width=80).print(table(compare(read(runs / "before"), read(runs / "worse"))))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert text.count("✕") == 3 and "66.7 → 41.7 %" in text and "<b>pgd|" in text
