"""The fixture `robustness` for users' own test suites; pytest loads this file by itself.

    def test_robust(robustness):
        robustness.check(model, data, attack="pgd", norm="linf", eps="8/255", min_accuracy=0.4)

Every suite on the machine loads it, so torch, pandas and the rest of the project wait for the first check.

Each check writes a report folder. With --robust-update its verdicts lie there too, and the process that the user
started puts them into the one baseline file when all tests have ended; so workers of pytest-xdist share no file.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from robust.errors import InputError, unknown
from robust.files import at_home, check_writable, write_text
from robust.text import visible

if TYPE_CHECKING:
    from torch import nn

    from robust.api import Run
    from robust.gate import Comparison, Rules
    from robust.models.model import Model
    from robust.verdicts import Verdicts

IDS_SHOWN = 10

_RULES = ("min_accuracy", "min_clean_accuracy", "max_drop", "significant")
_REPORTS = ("report.html", "report.json", "samples.csv", "summary.csv")  # drawing the figures takes seconds
_MARKDOWN = "compare.md"
_NODE_ID = pytest.StashKey[str]()
_CHECKS = pytest.StashKey[list[dict[str, str]]]()


class Robustness:
    """What the fixture `robustness` is: checks of one test."""

    def __init__(self, request: pytest.FixtureRequest, reports: Path):
        self._node, self._config = request.node, request.config
        self._reports = reports
        self._runs: list[Run] = []
        self._checks: list[dict[str, str]] = []
        self._node.stash[_CHECKS] = self._checks

    def check(
        self,
        model: nn.Module | Model | str,
        data: Any,
        attack: str | Sequence[str] | None = None,
        norm: str | None = None,
        eps: float | str | Sequence[float] | None = None,
        *,
        min_accuracy: float | None = None,
        min_clean_accuracy: float | None = None,
        max_drop: float | None = None,
        significant: float | None = None,
        strict: bool | None = None,
        name: str | None = None,
        **options: Any,
    ) -> Run:
        """Attack `model` on `data`; the test fails where accuracy is too low, or fell against the baseline.

        model, data, attack, norm, eps and further options (steps, restarts, seed, batch_size ...): as in `robust.run`.
        min_accuracy: least robust accuracy, a share of all samples, in the worst case over the attacks, at each eps.
        min_clean_accuracy: least accuracy on unchanged images.
        strict: hold the lower end of the 95 % interval against these two.
        max_drop, significant: when a fall against the baseline fails; see `robust.gate.Rules`.
        name: tells the checks of one test apart, in the baseline and in reports.

        What is not given is taken from the nearest mark `@pytest.mark.robustness(...)` that has it. Returns the run,
        to be read as long as the test goes on.
        """
        __tracebackhide__ = True
        given = {
            "attack": attack, "norm": norm, "eps": eps, "min_accuracy": min_accuracy,
            "min_clean_accuracy": min_clean_accuracy, "max_drop": max_drop, "significant": significant,
            "strict": strict, **options,
        }  # fmt: skip
        try:
            run, failure = self._check(model, data, name, given)
        except InputError as error:
            failure = f"robustness.check: {error}"
        if failure:
            pytest.fail(failure)
        return run

    def _check(self, model: Any, data: Any, name: str | None, given: Mapping[str, Any]) -> tuple[Run, str]:
        """The run, and why the test fails; "" where it passes."""
        key = self._key(name)
        folder = self._reports / _folder_name(key)
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier session, whose verdict it holds
        try:
            return self._judge(model, data, name, key, folder, given)
        except InputError as error:
            if self._config.getoption("robust_baseline") is not None:
                from reports.markdown import write_reason

                write_reason(str(error), folder / _MARKDOWN, _title(key))
            raise

    def _judge(
        self, model: Any, data: Any, name: str | None, key: str, folder: Path, given: Mapping[str, Any]
    ) -> tuple[Run, str]:
        from reports import REPORTS
        from robust import baseline, gate
        from robust.api import run
        from robust.store import FILENAME

        settings = self._defaults() | {option: value for option, value in given.items() if value is not None}
        rules = _rules(settings)
        options = _run_options(settings)
        file, update = self._config.getoption("robust_baseline"), self._config.getoption("robust_update")
        if file is None and rules.min_robust_accuracy is None and rules.min_clean_accuracy is None:
            raise InputError(
                "there is nothing to hold the run against: give min_accuracy, or a baseline (--robust-baseline FILE)"
            )
        section = None if file is None else _sections(file, self._config).get(key)
        if file is not None and section is None and not update:
            placed = _placed(file, self._config)
            found = f"{file} has" if placed.exists() else f"there is no file {placed}, so"
            raise InputError(
                f"{found} no baseline for {key}: record it with pytest --robust-baseline {file} --robust-update"
            )

        done = run(model, data, **options)
        self._runs.append(done)
        if failed := done.store.details.get("failed_attacks"):
            raise InputError("; ".join(failed.values()))
        done.store.copy_to(folder / FILENAME)
        for report in _REPORTS:
            REPORTS[report](done.store, folder)
        current = baseline.from_store(done.store)
        said = list(_doubts(done))
        before, damage = None, ""
        if section is not None:
            try:
                before = _unpacked(section, folder / "before.json", f"{file} ({key})")
            except InputError as error:
                if not update:
                    raise
                damage = str(error)
        if update:
            said.insert(0, damage or _difference(before, current))
            before = None
        # Without a baseline the run is held against itself: nothing fell, and the least accuracies remain.
        try:
            comparison = gate.compare(before or current, current, rules)
        except gate.Incomparable as error:
            raise InputError(f"{error}; if the check was changed on purpose, add --robust-update") from None
        shown = _shown(folder, self._config)
        report_path = shown / "report.html"
        if before is not None:
            report_path = shown / "compare.html"
            _write_comparison(comparison, folder, key)
        passed = comparison.passed
        if update and passed:
            baseline.write_baseline(current, folder / baseline.BASELINE)
        answer = comparison.answer if before is not None else done.answer
        self._node.user_properties += [
            (f"robustness{'' if name is None else f' [{name}]'}", answer),
            (f"robustness report{'' if name is None else f' [{name}]'}", str(report_path)),
        ]
        self._checks.append(
            {
                "key": key,
                "outcome": ("recorded" if update else "passed") if passed else "failed",
                "said": "; ".join(said),
                "report": str(report_path),
                "section": str(folder / baseline.BASELINE) if update and passed else "",
            }
        )
        return done, "" if passed else "\n".join(_explain(comparison, before is not None, shown, file))

    def close(self) -> None:
        """Let go of the runs."""
        for run in self._runs:
            run.store.close()

    def _defaults(self) -> dict[str, Any]:
        """What the marks of the test say, the nearest last."""
        defaults: dict[str, Any] = {}
        for mark in reversed(list(self._node.iter_markers("robustness"))):
            if mark.args:
                raise InputError('@pytest.mark.robustness takes keywords only, such as eps="8/255"')
            defaults |= mark.kwargs
        return defaults

    def _key(self, name: str | None) -> str:
        node_id = self._node.stash.get(_NODE_ID, self._node.nodeid)
        key = node_id if name is None else f"{node_id} [{name}]"
        if any(check["key"] == key for check in self._checks):
            which = "without a name" if name is None else f"named {name!r}"
            raise InputError(f'this test has another check {which}: tell them apart by name="..."')
        return key


@pytest.fixture
def robustness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Robustness]:
    """Adversarial robustness checks: robustness.check(model, data, attack=..., norm=..., eps=..., min_accuracy=...)."""
    folder = request.config.getoption("robust_reports")
    reports = _placed(folder, request.config) if folder else tmp_path_factory.getbasetemp() / "robustness"
    checks = Robustness(request, reports)
    yield checks
    checks.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("robust", "adversarial robustness")
    group.addoption(
        "--robust-baseline",
        metavar="FILE",
        help="Fail checks of the fixture robustness that fell against this file, made to be committed.",
    )
    group.addoption(
        "--robust-update",
        action="store_true",
        help="Record what the checks measure in the file of --robust-baseline, instead of comparing with it.",
    )
    group.addoption(
        "--robust-reports", metavar="DIR", help="Where reports of checks go. Default: pytest's temporary folder."
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "robustness(**defaults): keywords of robustness.check, for all checks of the test. Tests with the fixture "
        'have the mark without asking: -m "not robustness" leaves them out.',
    )
    file = config.getoption("robust_baseline")
    try:
        _check_files(file, config)
    except InputError as error:
        raise pytest.UsageError(str(error)) from None
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist, whose checks come to the controller in reports
        config.pluginmanager.register(_Session(file, config), "robust-session")


def pytest_itemcollected(item: pytest.Item) -> None:
    if "robustness" in getattr(item, "fixturenames", ()):
        item.add_marker("robustness")
        # As it is now: pytest-xdist may add the name of a group.
        item.stash[_NODE_ID] = item.nodeid


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    outcome = yield
    if checks := item.stash.get(_CHECKS, None):
        outcome.get_result().robustness = checks


class _Session:
    """Gathers the checks of all tests, in the process that the user started."""

    def __init__(self, file: str | None, config: pytest.Config):
        self._file, self._config = file, config
        self._checks: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for check in getattr(report, "robustness", ()):
            self._checks[check["key"]] = check

    def pytest_sessionfinish(self) -> None:
        recorded = {key: check["section"] for key, check in self._checks.items() if check["section"]}
        if not recorded or self._file is None:
            return
        try:
            sections = {key: json.loads(Path(path).read_text("utf-8")) for key, path in recorded.items()}
            # Tests that did not run keep theirs.
            document = {"checks": _sections(self._file, self._config) | sections}
            write_text(
                _placed(self._file, self._config),
                json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
            )
        except (OSError, InputError) as error:
            pytest.exit(f"cannot write {self._file}: {error}", pytest.ExitCode.USAGE_ERROR)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._checks:
            return
        terminalreporter.section("robustness")
        for key, check in sorted(self._checks.items()):
            said = f"{check['said']}; " if check["said"] else ""
            terminalreporter.line(f"{check['outcome']} {visible(key)}: {said}{check['report']}")
        if recorded := sum(bool(check["section"]) for check in self._checks.values()):
            terminalreporter.line(f"wrote {recorded} of the checks to {self._file}")


def _rules(settings: dict[str, Any]) -> Rules:
    """Takes out of `settings` what is a rule."""
    from robust.gate import Rules

    values = {name: settings.pop(name, None) for name in _RULES}
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise InputError(f"{name} is a share between 0 and 1, not {value!r}")
    try:
        return Rules(min_robust_accuracy=values.pop("min_accuracy"), strict=settings.pop("strict", False), **values)
    except InputError as error:  # in the words of `check`
        raise InputError(str(error).replace("min_robust_accuracy", "min_accuracy")) from None


def _run_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is left, as `robust.run` calls it."""
    from inspect import signature

    from robust.api import run

    known = {*signature(run).parameters, "attack"} - {"model", "data", "attacks", "output", "resume"}
    for name in settings:
        if name not in known:
            raise unknown("option", name, sorted({*known, *_RULES, "strict"}))
    return {"attacks" if name == "attack" else name: value for name, value in settings.items()}


def _placed(path: str, config: pytest.Config) -> Path:
    """Beside where pytest was called, for a test may be elsewhere."""
    return config.invocation_params.dir / at_home(path)  # no shell reads --robust-reports=~/DIR, or addopts


def _shown(path: Path, config: pytest.Config) -> Path:
    """As it is named from there."""
    called = config.invocation_params.dir
    return path.relative_to(called) if path.is_relative_to(called) else path


def _check_files(file: str | None, config: pytest.Config) -> None:
    """InputError where the baseline cannot be read, or something not be written: now, and not after the attacks."""
    update, folder = config.getoption("robust_update"), config.getoption("robust_reports")
    if update and file is None:
        raise InputError("--robust-update needs to know which file: add --robust-baseline FILE")
    if file is not None:
        _sections(file, config)
    for path in (file if update else None, folder and f"{folder}/compare.html"):
        try:
            if path:
                check_writable(_placed(path, config))
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}; name another file or folder") from None


def _sections(file: str, config: pytest.Config) -> dict[str, Any]:
    """The baselines in the file: check -> what `robust.baseline.write_baseline` writes. {} where there is no file."""
    try:
        document = json.loads(_placed(file, config).read_text("utf-8-sig"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is truncated or damaged, no JSON ({error}); restore it") from None
    checks = document.get("checks") if isinstance(document, dict) else None
    if not isinstance(checks, dict):
        raise InputError(f"{file} was not written by pytest --robust-update: name another file for --robust-baseline")
    return checks


def _unpacked(section: Any, path: Path, source: str) -> Verdicts:
    """The verdicts of one section, called `source` in messages; `path` is kept, to compare the run with."""
    from robust.baseline import read

    write_text(path, json.dumps(section))
    try:
        return replace(read(path), source=source)
    except InputError as error:
        raise InputError(str(error).replace(str(path), source)) from None


def _doubts(run: Run) -> Iterator[str]:
    """Why the run's numbers may be too good, as far as its checks of the model say."""
    from robust.gate import MODEL_CHECKS

    yield from (finding.message for finding in run.findings if finding.name in MODEL_CHECKS and finding.level != "pass")


def _difference(before: Verdicts | None, current: Verdicts) -> str:
    """What replacing the baseline changes: the row that moves most, of equals the worst case at the largest eps."""
    from robust.gate import compare
    from robust.units import format_images

    if before is None:
        return f"new, {format_images(len(current))}"
    try:
        return str(max(reversed(compare(before, current).changes), key=lambda change: abs(change.change)))
    except InputError as error:
        return str(error)


def _write_comparison(comparison: Comparison, folder: Path, key: str) -> None:
    from reports.comparehtml import write_page
    from reports.markdown import write_markdown

    write_page(comparison, folder, folder / "compare.html")
    write_markdown(comparison, folder / _MARKDOWN, _title(key))


def _title(key: str) -> str:
    """Of one check among those whose Markdown is read together."""
    return f"Robustness of {key}"


def _explain(comparison: Comparison, compared: bool, folder: Path, file: str | None) -> Iterator[str]:
    """Which rows, by how much, which samples, why, and where to read on."""
    from robust.table import lines

    yield comparison.answer
    floors = [failure.message for failure in comparison.failures if failure.rule.startswith("min-")]
    yield from (f"  {message}" for message in floors if not comparison.answer.endswith(message))
    if compared:
        yield f"against {comparison.baseline.source}:"
        yield from (f"  {line}" for line in lines(comparison))
        yield from (f"cause: {cause}" for cause in comparison.causes)
        yield from (f"{row} lost: {ids}" for ids, row in _fallen(comparison).items())
        yield from (f"note: {note}" for note in comparison.notes)
        yield f"fails on: {comparison.rules}"
        yield f"before and now: {folder / 'compare.html'}"
    yield f"report: {folder / 'report.html'}"
    if compared:
        yield f"if this is meant: pytest --robust-baseline {file} --robust-update"


def _fallen(comparison: Comparison) -> dict[str, str]:
    """The samples that fell -> the row, of those that fail. What fell in several rows is named once, with the last."""
    failing = {failure.row for failure in comparison.failures}
    found = {}
    for change in comparison.changes:
        if change.row in failing and len(change.fell):
            ids = ", ".join(map(visible, comparison.ids(change.fell[:IDS_SHOWN])))
            more = len(change.fell) - IDS_SHOWN
            found[f"{ids} and {more:,} more" if more > 0 else ids] = str(change.row)
    return found


def _folder_name(key: str) -> str:
    """A name that file systems take, and no other check's."""
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", key).strip("-.")[-80:]
    return f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
