"""The fixture `robustness` in a user's own suite, run by pytest's own pytester.

The network tells images brighter than 0.5 + SHIFT from the others, and the 40 images are of one grey each, 0.505 to
0.7, all of the first class: image k (from 0) is (k + 1) / 200 - SHIFT away from the boundary in linf. So 20 of them
withstand eps 0.1025, and with SHIFT=0.05, where the first 10 are wrong unchanged, 10 do.
"""

import html
import json
import os
import re
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

# The suites under test run in this process, and forget what they were first to import: numpy cannot be imported twice.
import attacks
import reports.comparehtml
import reports.markdown  # noqa: F401
import robust.api
import robust.table  # noqa: F401

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
NETWORK = """
    import os
    import pytest
    import torch
    from torch import nn

    class Brighter(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(shift))

        def forward(self, x):
            f = x.mean((1, 2, 3)) - 0.5 - self.shift
            return torch.stack([f, -f], 1)

    @pytest.fixture
    def model():
        return Brighter(float(os.environ.get("SHIFT", "0"))).train("TRAIN" in os.environ)

    @pytest.fixture
    def data():
        grey = 0.5 + torch.arange(1, 41) / 200
        return [(grey.view(40, 1, 1, 1).expand(40, 3, 4, 4), torch.zeros(40, dtype=torch.long))]
"""
ONE_TEST = """
    def test_robust(robustness, model, data):
        robustness.check(model, data, attack="fgsm", eps="0.1025", min_accuracy=0.2)
"""
KEY = "test_net.py::test_robust"
BASELINE = ("--robust-baseline", "b.json")
UPDATE = (*BASELINE, "--robust-update")


@pytest.fixture
def suite(pytester, monkeypatch):
    """suite(tests, *arguments) runs a suite of these tests that has the network; the plugin is the only one there."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeconftest(NETWORK)

    def run(tests, *arguments, subprocess=False):
        pytester.makepyfile(test_net=tests)
        start = pytester.runpytest_subprocess if subprocess else pytester.runpytest_inprocess
        return start("-p", "robust.pytest_plugin", "--strict-markers", "--robust-reports=out", *arguments)

    return run


def failure(result) -> list[str]:
    """What pytest prints after its E."""
    return [line[1:].strip() for line in result.outlines if re.match(r"E\s", line)]


def sections(pytester) -> dict:
    return json.loads((pytester.path / "b.json").read_text())["checks"]


# Without a baseline


@pytest.mark.parametrize(("arguments", "outcome"), [([], "passed"), (UPDATE, "recorded")])
def test_a_check_whose_gradients_are_blind_says_so_beside_its_outcome(suite, arguments, outcome):
    blind = (
        ONE_TEST.replace("(model,", "(lambda_(model),").replace("0.2)", "0)")
        + """
    class lambda_(__import__("torch").nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return (self.net(x) * 1e4).softmax(1)
    """
    )
    result = suite(blind, *arguments)
    result.assert_outcomes(passed=1)
    (line,) = [line for line in result.outlines if line.startswith(f"{outcome} {KEY}: ")]
    assert "blind" in line and "probabilities" in line


def test_a_test_that_changes_the_working_directory_uses_the_same_files(suite, pytester):
    moved = ONE_TEST.replace(
        "model, data):", "model, data, monkeypatch, tmp_path):\n        monkeypatch.chdir(tmp_path)"
    )
    suite(moved, *UPDATE).assert_outcomes(passed=1)
    assert set(sections(pytester)) == {KEY}
    result = suite(moved, *BASELINE)
    result.assert_outcomes(passed=1)
    assert (pytester.path / "out").is_dir()


def test_a_damaged_section_is_replaced_by_an_update(suite, pytester):
    suite(ONE_TEST, *UPDATE).assert_outcomes(passed=1)
    whole = sections(pytester)
    edited = whole[KEY] | {"verdicts": whole[KEY]["verdicts"] | {"clean_accuracy": 0.1}}
    (pytester.path / "b.json").write_text(json.dumps({"checks": {KEY: edited}}))
    result = suite(ONE_TEST, *BASELINE)
    assert "it was edited" in failure(result)[0]
    result = suite(ONE_TEST, *UPDATE)
    assert any(line.startswith(f"recorded {KEY}: ") and "it was edited" in line for line in result.outlines)
    assert sections(pytester) == whole
    suite(ONE_TEST, *BASELINE).assert_outcomes(passed=1)


def test_a_check_that_passes_leaves_its_report(suite, pytester):
    result = suite(ONE_TEST)
    result.assert_outcomes(passed=1)
    (line,) = [line for line in result.outlines if line.startswith(f"passed {KEY}: ")]
    report = pytester.path / line.partition(": ")[2]
    assert report.name == "report.html" and "20 of 40 remain" in report.read_text()


def test_a_check_that_fails_says_which_row_and_shows_the_users_line_only(suite):
    result = suite(ONE_TEST.replace("0.2)", "0.6, min_clean_accuracy=1)"))
    result.assert_outcomes(failed=1)
    said, report = failure(result)
    assert said == "Failed: FAIL: worst case at linf 0.1025 is 50.0 %, below the 60.0 % asked for"
    assert re.fullmatch(r"report: out\S+report.html", report)
    assert ">       robustness.check(" in result.stdout.str()
    assert "pytest_plugin.py" not in result.stdout.str()


def test_strict_holds_the_interval_against_the_least_accuracy(suite):
    suite(ONE_TEST.replace("0.2)", "0.45)")).assert_outcomes(passed=1)
    result = suite(ONE_TEST.replace("0.2)", "0.45, strict=True)"))
    assert "the 95 % interval from 35.2 %, below the 45.0 % asked for" in failure(result)[0]


def test_the_run_is_returned(suite):
    suite("""
        def test_run(robustness, model, data):
            run = robustness.check(model, data, "fgsm", "linf", [0.0525, 0.1025], min_accuracy=0.5, batch_size=7)
            assert run.summary.groupby("eps").robust_accuracy.min().tolist() == [0.75, 0.5]
            assert not model.training
    """).assert_outcomes(passed=1)


def test_an_attack_that_fails_is_no_pass(suite, monkeypatch):
    run = attacks.run

    def broken(model, attack, *rest, **options):
        if attack.name == "fgsm":
            raise attacks.AttackFailed("fgsm raised ZeroDivisionError: no luck")
        return run(model, attack, *rest, **options)

    monkeypatch.setattr(attacks, "run", broken)
    (said,) = failure(suite(ONE_TEST.replace('"fgsm"', '"fgsm,pgd", steps=2')))
    assert said == "Failed: robustness.check: fgsm raised ZeroDivisionError: no luck"


# With a baseline


def test_from_the_first_baseline_to_an_accepted_fall(suite, pytester, monkeypatch):
    result = suite(ONE_TEST, *BASELINE)
    record = "pytest --robust-baseline b.json --robust-update"
    missing = f"there is no file {pytester.path / 'b.json'}, so no baseline for {KEY}"
    assert failure(result) == [f"Failed: robustness.check: {missing}: record it with {record}"]
    result = suite(ONE_TEST, *UPDATE)
    result.stdout.fnmatch_lines([f"recorded {KEY}: new, 40 images; out*report.html", "wrote 1 of the checks to b.json"])
    suite(ONE_TEST, *BASELINE).assert_outcomes(passed=1)
    before = (pytester.path / "b.json").read_bytes()

    monkeypatch.setenv("SHIFT", "0.05")
    result = suite(ONE_TEST, *BASELINE)
    result.assert_outcomes(failed=1)
    said = failure(result)
    assert said[0].startswith("Failed: FAIL (and 2 more): clean accuracy fell from 100 % to 75.0 % (−25.0 points")
    assert said[1] == f"against b.json ({KEY}):"
    assert any(line.startswith("FAIL fgsm at linf 0.1025 fell from 50.0 % to 25.0 %") for line in said)
    assert any(line.startswith("cause: The clean accuracy fell by 25.0 points") for line in said)
    (lost,) = [line for line in said if line.startswith("worst case at linf 0.1025 lost: ")]
    assert set(lost.partition(": ")[2].split(", ")) == {f"{k:05d}" for k in range(20, 30)}
    (page,) = [line.removeprefix("before and now: ") for line in said if line.startswith("before and now")]
    assert "<html" in (pytester.path / page).read_text()
    assert said[-1] == f"if this is meant: {record}"
    assert "pytest_plugin.py" not in result.stdout.str()
    assert (pytester.path / "b.json").read_bytes() == before

    result = suite(ONE_TEST, *UPDATE)
    result.stdout.fnmatch_lines([f"recorded {KEY}: worst case at linf 0.1025 fell from 50.0 % to 25.0 % *"])
    suite(ONE_TEST, *BASELINE).assert_outcomes(passed=1)


def test_an_accepted_fall_is_told_at_the_eps_where_it_is(suite, monkeypatch):
    ladder = ONE_TEST.replace('"0.1025", min_accuracy=0.2', "[0.1025, 0.25]")  # at 0.25 nothing stands
    suite(ladder, *UPDATE)
    monkeypatch.setenv("SHIFT", "0.05")
    result = suite(ladder, *UPDATE)
    result.stdout.fnmatch_lines([f"recorded {KEY}: worst case at linf 0.1025 fell from 50.0 % to 25.0 % *"])


def test_a_drop_is_judged_by_the_rules_of_the_check(suite, monkeypatch):
    suite(ONE_TEST, *UPDATE)
    monkeypatch.setenv("SHIFT", "0.01")  # 2 of 40 fall: no test can tell
    suite(ONE_TEST, *BASELINE).assert_outcomes(passed=1)
    suite(ONE_TEST.replace("0.2)", "0.2, max_drop=0.06)"), *BASELINE).assert_outcomes(passed=1)
    suite(ONE_TEST.replace("0.2)", "0.2, max_drop=0.04)"), *BASELINE).assert_outcomes(failed=1)


def test_training_mode_fails_against_a_baseline_that_was_not(suite, monkeypatch):
    suite(ONE_TEST, *UPDATE)
    monkeypatch.setenv("TRAIN", "1")
    said = failure(suite(ONE_TEST, *BASELINE))
    assert said[0].startswith("Failed: FAIL: eval mode – the model came in training mode")


def test_another_eps_cannot_be_compared_and_an_update_replaces_it(suite):
    suite(ONE_TEST, *UPDATE)
    changed = ONE_TEST.replace("0.1025", "0.0525")
    (said,) = failure(suite(changed, *BASELINE))
    assert said == (
        f"Failed: robustness.check: this run cannot be compared with b.json ({KEY}): fgsm lacks eps 0.1025; "
        "if the check was changed on purpose, add --robust-update"
    )
    suite(changed, *UPDATE).stdout.fnmatch_lines([f"recorded {KEY}: this run cannot be compared with b.json*"])
    suite(changed, *BASELINE).assert_outcomes(passed=1)


def test_each_check_has_markdown_that_names_it_and_none_keeps_an_earlier_verdict(suite, pytester):
    two = ONE_TEST + '        robustness.check(model, data, attack="fgsm", eps=0.1, name="second")\n'

    def heads():
        pages = (pytester.path / "out").glob("*/compare.md")
        return {html.unescape(page.read_text().splitlines()[0]) for page in pages}

    suite(two, *UPDATE).assert_outcomes(passed=1)
    suite(two, *BASELINE).assert_outcomes(passed=1)
    assert heads() == {f"### Robustness of {KEY}: PASS", f"### Robustness of {KEY} [second]: PASS"}
    unlike = {f"### Robustness of {KEY}: cannot be compared", f"### Robustness of {KEY} [second]: PASS"}
    suite(ONE_TEST, "--robust-baseline", "other.json").assert_outcomes(failed=1)
    assert heads() == unlike
    suite(two, *BASELINE).assert_outcomes(passed=1)
    suite(ONE_TEST.replace("0.1025", "0.0525"), *BASELINE).assert_outcomes(failed=1)
    assert heads() == unlike


def test_a_least_accuracy_holds_at_an_eps_that_the_baseline_lacks(suite):
    suite(ONE_TEST, *UPDATE).assert_outcomes(passed=1)
    result = suite(ONE_TEST.replace('"0.1025"', "[0.1025, 0.1925]"), *BASELINE)
    result.assert_outcomes(failed=1)
    assert "worst case at linf 0.1925 is 5.0 %, below the 20.0 % asked for" in failure(result)[0]


def test_what_is_too_low_is_not_recorded(suite, pytester):
    suite(ONE_TEST.replace("0.2)", "0.6)"), *UPDATE).assert_outcomes(failed=1)
    assert not (pytester.path / "b.json").exists()


def test_a_name_of_two_lines_is_summed_up_on_one(suite):
    named = ONE_TEST.replace("min_accuracy=0.2", "min_accuracy=0.2, name='a\\nb'")
    suite(named).stdout.fnmatch_lines([f"passed {KEY} [[]a␊b[]]: *"])


MANY = """
    import pytest

    def test_two(robustness, model, data):
        robustness.check(model, data, attack="fgsm", eps=0.1, name="linf")
        robustness.check(model, data, attack="fgsm", norm="l2", eps=0.5, name="l2")

    @pytest.mark.xdist_group("a")
    @pytest.mark.parametrize("eps", ["2/255", "8/255"])
    def test_each(robustness, model, data, eps):
        robustness.check(model, data, attack="fgsm", eps=eps)
"""
KEYS = ["test_net.py::test_each[2/255]", "test_net.py::test_each[8/255]",
        "test_net.py::test_two [l2]", "test_net.py::test_two [linf]"]  # fmt: skip


def test_each_check_has_a_section_and_workers_write_the_same_file(suite, pytester):
    pytest.importorskip("xdist")
    parallel = ("-p", "xdist", "-n", "2", "--dist", "loadgroup")
    result = suite(MANY, *parallel, *UPDATE, subprocess=True)
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["wrote 4 of the checks to b.json"])
    assert list(sections(pytester)) == KEYS
    written = (pytester.path / "b.json").read_bytes()
    suite(MANY, "-p", "xdist", *BASELINE).assert_outcomes(passed=3)
    suite(MANY, "-p", "xdist", *UPDATE)
    assert (pytester.path / "b.json").read_bytes() == written


def test_a_check_that_the_file_lacks_and_the_mark_that_some_editors_put_before_it(suite, pytester):
    suite(ONE_TEST, *UPDATE).assert_outcomes(passed=1)
    path = pytester.path / "b.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    suite(ONE_TEST, *BASELINE).assert_outcomes(passed=1)
    (said,) = failure(suite(ONE_TEST.replace("test_robust", "test_new"), *BASELINE))
    assert said.startswith("Failed: robustness.check: b.json has no baseline for test_net.py::test_new: record it with")


def test_a_tilde_is_the_home_folder_in_paths_that_no_shell_has_read(suite, pytester, monkeypatch):
    monkeypatch.setenv("HOME", str(pytester.mkdir("home")))
    update = ["--robust-baseline=~/b.json", "--robust-update", "--robust-reports=~/out"]
    suite(ONE_TEST, *update).assert_outcomes(passed=1)
    home = pytester.path / "home"
    assert (home / "b.json").is_file() and list(home.glob("out/*/report.html"))


def test_an_update_of_some_keeps_the_others(suite, pytester, monkeypatch):
    suite(MANY, "-p", "xdist", *UPDATE)
    before = sections(pytester)
    monkeypatch.setenv("SHIFT", "0.05")
    suite(MANY, "-p", "xdist", *UPDATE, "-k", "two")
    after = sections(pytester)
    assert [key for key in KEYS if before[key] != after[key]] == KEYS[2:]


# Marks


def test_marks_give_defaults_the_nearest_wins_and_an_argument_over_all(suite):
    suite("""
        import pytest

        pytestmark = pytest.mark.robustness(attack="fgsm", eps=0.1025, min_accuracy=0.6)

        def test_module(robustness, model, data):
            robustness.check(model, data)

        @pytest.mark.robustness(min_accuracy=0.5)
        def test_nearest(robustness, model, data):
            robustness.check(model, data)

        def test_argument(robustness, model, data):
            robustness.check(model, data, eps=0.0525)
    """).assert_outcomes(passed=2, failed=1)


def test_the_mark_need_not_be_written_to_leave_the_tests_out(suite):
    result = suite(ONE_TEST + "\n    def test_other():\n        pass\n", "-m", "not robustness")
    result.assert_outcomes(passed=1, deselected=1)
    assert "= robustness =" not in result.stdout.str()


# JUnit


def test_the_junit_file_names_every_report(suite, pytester):
    suite(MANY, "-p", "xdist", *UPDATE, "--junitxml=j.xml")
    cases = {case.get("name"): case for case in ElementTree.parse(pytester.path / "j.xml").iter("testcase")}
    said = {p.get("name"): p.get("value") for p in cases["test_two"].iter("property")}
    assert list(said) == ["robustness [linf]", "robustness report [linf]", "robustness [l2]", "robustness report [l2]"]
    assert said["robustness [linf]"].startswith("Brighter classifies 40 of 40 images correctly")
    assert (pytester.path / said["robustness report [l2]"]).is_file()
    assert len(list(cases["test_each[2/255]"].iter("property"))) == 2


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "there is nothing to hold the run against: give min_accuracy, or a baseline (--robust-baseline FILE)"),
        ("min_accuracy=40", "min_accuracy is a share between 0 and 1, not 40; did you mean 0.4?"),
        ("strict=True", "strict is about a least accuracy: give min_accuracy or min_clean_accuracy too"),
        ("min_accuracy='0.4'", "min_accuracy is a share between 0 and 1, not '0.4'"),
        ("min_accuracy=True", "min_accuracy is a share between 0 and 1, not True"),
        ("min_accuracy=0.4, attack='pdg'", "unknown attack 'pdg'; did you mean pgd?"),
        ("min_accuracy=0.4, norm='linfty'", "unknown norm 'linfty'; did you mean linf?"),
        ("min_accuracy=0.4, eps='8'", "eps 8 is larger than the whole range of pixels, which is [0, 1]; "
         "did you mean 8/255?"),
        ("min_accuracy=0.4, step=3", "unknown option 'step'; did you mean steps or step_size or eps?"),
        ("min_accuracy=0.4, output='x'", "unknown option 'output'"),
    ],
)  # fmt: skip
def test_bad_arguments_fail_in_one_line(suite, arguments, message):
    result = suite(f"""
        def test_bad(robustness, model, data):
            robustness.check(model, data, {arguments})
    """)
    (said,) = failure(result)
    assert said.startswith(f"Failed: robustness.check: {message}")
    assert "pytest_plugin.py" not in result.stdout.str() and "api.py" not in result.stdout.str()


def test_two_checks_of_one_name(suite):
    body = ONE_TEST.rstrip() + "\n        robustness.check(model, data, min_accuracy=0.2)\n"
    (said,) = failure(suite(body))
    assert said == 'Failed: robustness.check: this test has another check without a name: tell them apart by name="..."'


def test_a_mark_with_positional_arguments(suite):
    (said,) = failure(suite('    import pytest\n\n    @pytest.mark.robustness("8/255")' + ONE_TEST))
    assert said == 'Failed: robustness.check: @pytest.mark.robustness takes keywords only, such as eps="8/255"'


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, ["--robust-update"], "--robust-update needs to know which file: add --robust-baseline FILE"),
        ('{"checks": {', BASELINE, "b.json is truncated or damaged, no JSON"),
        ("[" * 100_000, BASELINE, "b.json is truncated or damaged, no JSON"),
        ("[]", UPDATE, "b.json was not written by pytest --robust-update"),
        ('{"schema_version": 1}', BASELINE, "b.json was not written by pytest --robust-update"),
        (None, ["--robust-baseline", "."], ". cannot be read: Is a directory"),
    ],
)
def test_bad_options_and_files_stop_at_the_start(suite, pytester, content, arguments, message):
    if content is not None:
        (pytester.path / "b.json").write_text(content)
    result = suite(ONE_TEST, *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line]
    assert line.startswith(f"ERROR: {message}")


@pytest.mark.parametrize(
    ("arguments", "path"), [(UPDATE, "b.json"), (["--robust-reports", "locked/out"], "locked/out/compare.html")]
)
def test_what_cannot_be_written_is_said_before_the_attacks(suite, pytester, monkeypatch, arguments, path):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != pytester.path and access(path, mode))
    result = suite("    raise AssertionError\n", *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line]
    assert line == f"ERROR: cannot write {path}: Permission denied; name another file or folder"


def test_a_section_that_was_edited(suite, pytester):
    suite(ONE_TEST, *UPDATE)
    path = pytester.path / "b.json"
    path.write_text(path.read_text().replace('"robust_accuracy": 0.5', '"robust_accuracy": 0.7'))
    (said,) = failure(suite(ONE_TEST, *BASELINE))
    assert said.startswith(f"Failed: robustness.check: b.json ({KEY}) says 0.7000 where its verdicts give 0.5000")


# Suites that do not use it


def test_it_costs_nothing_where_it_is_not_used(suite):
    result = suite(
        """
        import sys

        def test_light():
            assert not {"torch", "numpy", "pandas", "scipy", "attacks", "reports"} & set(sys.modules)
        """,
        "--noconftest",
        subprocess=True,
    )
    result.assert_outcomes(passed=1)
    assert "robust" not in result.stdout.str().replace("robust-reports", "")


def test_an_installation_brings_the_plugin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"robust": "robust.pytest_plugin"}
