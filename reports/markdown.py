"""Markdown, for a comment on a pull request or the summary of a CI step. Short: such places hold 65,536 letters."""

import re
from collections.abc import Iterator
from pathlib import Path

from robust.files import write_text
from robust.gate import Change, Comparison
from robust.text import format_bare_p, format_points, visible
from robust.units import format_count, format_images, format_percent

IDS_SHOWN = 20
ID_LENGTH = 80

# What GitHub's and GitLab's Markdown may read as more than a letter; and what a spreadsheet may, where a cell begins.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>&|~@#$!^]|^[-=+\"']|:(?=\S)|(?<=www)\.", re.IGNORECASE)


def write_markdown(comparison: Comparison, path: Path, title: str = "Robustness") -> None:
    """The outcome, its causes, a row of the table for every accuracy, and the first images that fell."""
    verdict, _, said = comparison.answer.partition(": ")
    write_text(path, "\n".join([f"### {inert(title)}: {verdict}", *_lines(comparison, said)]) + "\n")


def write_reason(reason: str, path: Path, title: str = "Robustness") -> None:
    """Why there is no comparison."""
    write_text(path, f"### {inert(title)}: cannot be compared\n\n{inert(reason)}\n")


def inert(text: str) -> str:
    """Text that stays text in a table, a list or a paragraph."""
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", visible(text))


def _lines(comparison: Comparison, said: str) -> Iterator[str]:
    yield ""
    yield f"**{inert(said)}**"
    yield ""
    for failure in comparison.failures:
        if failure.rule.startswith("min-") and failure.message not in said:
            yield f"- {inert(failure.message)}"
    yield from (f"- {inert(cause)}" for cause in comparison.causes)
    yield ""
    yield "| | accuracy | before | now | points | 95 % interval | fell | rose | p |"
    yield "|---|---|--:|--:|--:|:-:|--:|--:|--:|"
    failing = {failure.row for failure in comparison.failures}
    for change in comparison.changes:
        yield f"| {'✕' if change.row in failing else ''} | {_cells(change)} |"
    yield ""
    yield (
        f"{format_images(comparison.headline.n)}, paired. p: exact McNemar test, Holm-corrected over "
        f"{comparison.tests} rows. {'Would fail' if comparison.passed else 'Fails'} on: {inert(str(comparison.rules))}."
    )
    yield from _fallen(comparison)
    yield ""
    yield from (f"- {inert(note)}" for note in comparison.notes)


def _cells(change: Change) -> str:
    return " | ".join(
        (
            inert(str(change.row)),
            format_percent(change.before, change.n),
            format_percent(change.after, change.n),
            format_points(change.change),
            f"{format_points(change.low)} to {format_points(change.high)}",
            format_count(len(change.fell)),
            format_count(len(change.rose)),
            inert(format_bare_p(change.p_adjusted)),
        )
    )


def _fallen(comparison: Comparison) -> Iterator[str]:
    """The first images that fell in the worst case, to be unfolded."""
    fell = comparison.headline.fell
    if not len(fell):
        return
    shown = f", the first {IDS_SHOWN}" if len(fell) > IDS_SHOWN else ""
    yield ""
    yield (
        f"<details><summary>{format_images(len(fell))} newly fell to the "
        f"{inert(str(comparison.headline.row))}{shown}</summary>"
    )
    yield ""
    # As code: elsewhere GitHub and GitLab would tell the person who is called like a file named @somebody.
    for id in comparison.ids(fell[:IDS_SHOWN]):
        yield f"- <code>{inert(id[:ID_LENGTH])}{'…' * (len(id) > ID_LENGTH)}</code>"
    yield ""
    yield "</details>"
