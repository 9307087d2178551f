"""The summary for a terminal of 80 columns, and as plain lines where there is none."""

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from reports.answer import attack_label, headline
from robust.statistics import WORST_CASE, wilson
from robust.store import Store
from robust.units import (
    format_count,
    format_distance,
    format_eps,
    format_images,
    format_interval,
    format_percent,
    format_seconds,
)


def summary_table(store: Store) -> Table:
    """Clean accuracy, then each attack and the worst case at each eps."""
    summary = store.summary()
    row = headline(summary)
    n, correct = int(row.n), round(row.clean_accuracy * row.n)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    table.caption = f"{format_images(n)}; {row.norm}; distance: median of the adversarials found"
    table.add_column("attack", overflow="fold")
    for name in ("eps", "robust", "95 % interval", "distance", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("none", "0", format_percent(correct, n), format_interval(*wilson(correct, n)), "–", "–")
    for attack, rows in summary.groupby("attack", sort=False):
        table.add_section()
        for k, line in enumerate(rows.itertuples()):
            table.add_row(
                # As Text, for a plain string could be read as markup.
                Text(attack_label(str(attack)) if k == 0 else ""),
                format_eps(line.eps, line.norm),
                format_percent(line.robust_accuracy),
                format_interval(line.ci_low, line.ci_high),
                format_distance(line.median_distance, line.norm, line.eps),
                format_seconds(line.seconds),
                style="bold" if attack == WORST_CASE else "",
            )
    return table


def plain_lines(store: Store) -> list[str]:
    """The same, a line a row: 'pgd, linf 4/255: 3 of 20 robust, 15.0 % (5.2–36.0 %)'."""
    summary = store.summary()
    row = headline(summary)
    n, correct = int(row.n), round(row.clean_accuracy * row.n)
    lines = [
        f"no attack: {_of(correct, n)} correct, {format_percent(correct, n)} ({format_interval(*wilson(correct, n))})"
    ]
    for line in summary.itertuples():
        robust, eps = round(line.robust_accuracy * line.n), format_eps(line.eps, line.norm)
        lines.append(
            f"{attack_label(line.attack)}, {line.norm} {eps}: {_of(robust, line.n)} robust, "
            f"{format_percent(robust, line.n)} ({format_interval(line.ci_low, line.ci_high)})"
        )
    return lines


def _of(part: int, whole: int) -> str:
    return f"{format_count(part)} of {format_count(whole)}"
