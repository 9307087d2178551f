"""JUnit XML for CI servers: one test case a rule and row, by the grammar that they share (Jenkins' junit-10)."""

from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from robust.files import replacing
from robust.gate import Comparison, Judgement
from robust.table import lines, remarks
from robust.text import visible

IDS_SHOWN = 20

_SUITE = "robust.compare"


def write_junit(comparison: Comparison, path: Path) -> None:
    """Every judgement as a test case; what the terminal shows is the suite's output."""
    judgements = comparison.judgements
    suite = _suite(len(judgements), failures=len(comparison.failures))
    properties = ElementTree.SubElement(suite, "properties")
    for name, run in (("baseline", comparison.baseline), ("current", comparison.current)):
        ElementTree.SubElement(properties, "property", name=name, value=visible(run.source))
    for judgement in judgements:
        rule = judgement.rule.replace(", ", " and ")
        case = ElementTree.SubElement(suite, "testcase", classname=f"{_SUITE}.{rule}", name=judgement.subject, time="0")
        if not judgement.passed:
            failure = ElementTree.SubElement(case, "failure", type=rule, message=judgement.message)
            failure.text = "\n".join(_details(comparison, judgement))
    output = ElementTree.SubElement(suite, "system-out")
    output.text = "\n".join([*lines(comparison), *remarks(comparison), comparison.answer])
    _write(suite, path)


def write_reason(reason: str, path: Path) -> None:
    """One test case that says why there is no comparison."""
    suite = _suite(1, errors=1)
    case = ElementTree.SubElement(suite, "testcase", classname=_SUITE, name="comparable", time="0")
    ElementTree.SubElement(case, "error", type="incomparable", message=visible(reason))
    _write(suite, path)


def _suite(tests: int, failures: int = 0, errors: int = 0) -> ElementTree.Element:
    counts = {"tests": tests, "failures": failures, "errors": errors, "skipped": 0, "time": 0}
    return ElementTree.Element("testsuite", {"name": _SUITE, **{key: str(value) for key, value in counts.items()}})


def _details(comparison: Comparison, judgement: Judgement) -> Iterable[str]:
    yield judgement.message
    yield from comparison.causes
    change = next((change for change in comparison.changes if change.row == judgement.row), None)
    if change is not None and len(change.fell):
        ids = comparison.ids(change.fell[:IDS_SHOWN])
        more = len(change.fell) - len(ids)
        yield f"fell: {', '.join(map(visible, ids))}{f' and {more:,} more' if more else ''}"


def _write(suite: ElementTree.Element, path: Path) -> None:
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    with replacing(path) as stream:
        ElementTree.ElementTree(suites).write(stream, encoding="utf-8", xml_declaration=True)
