"""A comparison for a terminal of 80 columns, and as plain lines where there is none."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from robust.gate import Comparison
from robust.statistics import WORST_CASE
from robust.text import format_bare_p, format_points
from robust.units import format_count, format_eps, format_images, format_percent


def table(comparison: Comparison) -> Table:
    """Clean accuracy, then each attack and the worst case at each eps; ✕ before what fails."""
    failing = {failure.row for failure in comparison.failures}
    norm, images = comparison.headline.row.norm, format_images(comparison.headline.n)
    grid = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    grid.caption = f"{images}; {norm}; p: exact McNemar test, Holm-corrected over {comparison.tests} rows"
    grid.add_column("")
    grid.add_column("attack", overflow="fold")
    for name in ("eps", "before → now", "points", "95 % interval", "fell, rose", "p"):
        grid.add_column(name, justify="right", no_wrap=True)
    attack = None
    for change in comparison.changes:
        if change.row.attack != attack:
            grid.add_section()
        grid.add_row(
            "✕" if change.row in failing else "",
            # As Text, for a plain string could be read as markup.
            Text(change.row.label if change.row.attack != attack else ""),
            format_eps(change.row.eps, change.row.norm),
            f"{format_percent(change.before, change.n).removesuffix(' %')} → {format_percent(change.after, change.n)}",
            format_points(change.change),
            f"{format_points(change.low)} to {format_points(change.high)}",
            f"{format_count(len(change.fell))}, {format_count(len(change.rose))}",
            format_bare_p(change.p_adjusted),
            style="bold" if change.row.attack == WORST_CASE else "",
        )
        attack = change.row.attack
    return grid


def lines(comparison: Comparison) -> Iterator[str]:
    """The rows as text, a line each."""
    failing = {failure.row for failure in comparison.failures}
    for change in comparison.changes:
        yield f"{'FAIL' if change.row in failing else 'ok  '} {change}"


def remarks(comparison: Comparison) -> Iterator[str]:
    """What the table does not show: failures that are not drops, causes, notes, rules. A line each."""
    for failure in comparison.failures:
        if failure.rule.startswith("min-"):
            yield f"✕ {failure.message}"
    yield from (f"Cause: {cause}" for cause in comparison.causes)
    yield from (f"Note: {note}" for note in comparison.notes)
    yield f"{'Would fail' if comparison.passed else 'Fails'} on: {comparison.rules}."
