"""A verification for a terminal of 80 columns, and as plain lines where there is none."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reports.verify import RESULTS, WINOGRAD, ladder_rows, network_row, shape_rows, verdict_rows
from robust.text import visible
from robust.units import format_percent

if TYPE_CHECKING:
    from robust.verification import Verification


def print_tables(console: Console, verification: "Verification") -> None:
    console.print(_ladder(verification), _shapes(verification), _network(verification))
    for line in remarks(verification):
        console.print(Text(line))


def plain_lines(verification: "Verification") -> Iterator[str]:
    """The tables' rows, a line each: 'ok   64 → 64, 3×3 at 56×56 by im2col: 0.90, 0.90, 0.90 of torch's error ...'."""
    for row in ladder_rows(verification):
        yield f"{_word(row['passed'])} {row['shape']}: {_rungs(row)}"
    for row in shape_rows(verification):
        ratios = ", ".join(_ratios(row))
        yield (
            f"{_word(row['passed'])} {row['shape']} by {row['algorithm']}: {ratios} of torch's error, "
            f"{format_percent(row['share'])} of the bound"
        )
    for measurement in verification.measurements:
        if measurement.part == "network":
            row = network_row(measurement)
            said = [f"{row['result']}: {row['what']} {row['value']}"]
            said += [
                f"{name} {row[key]}" for name, key in (("torch", "torch"), ("at most", "limit")) if row[key] != "–"
            ]
            yield f"{_word(row['passed'])} {', '.join(said)}"
    for row in verdict_rows(verification):
        yield (
            f"{_word(row['passed'])} {row['attack']} at {row['eps']}: {row['converted']} of {row['images']} images "
            f"fall, torch {row['original']}; {_agreement(row)}"
        )
    yield from remarks(verification)


def remarks(verification: "Verification") -> Iterator[str]:
    """What failed, the conversion, notes, what is not on the ladder, how to read the ratios. A line each."""
    yield from (f"✕ {visible(str(failure))}" for failure in verification.failures)
    yield f"Converted: {verification.converted}"
    yield from (f"Note: {visible(note)}" for note in verification.notes)
    yield from (f"Not on the ladder: {name} {reason}" for name, reason in verification.left_out.items())
    yield WINOGRAD


def _table(caption: str) -> Table:
    return Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption, caption_justify="left")


def _ladder(verification: "Verification") -> Table:
    grid = _table("each algorithm against torch in float64, on whole numbers, to the last bit")
    grid.add_column("")
    grid.add_column("in miniature", overflow="fold")
    grid.add_column("by", overflow="fold")
    for row in ladder_rows(verification):
        grid.add_row(_mark(row["passed"]), Text(row["shape"]), _rungs(row))
    return grid


def _shapes(verification: "Verification") -> Table:
    grid = _table(
        "error over torch's own, at most 2, for gradients 3, in brackets where it is only reported; bound: the "
        "largest share of its limit, √K·u in float32"
    )
    grid.add_column("")
    grid.add_column("convolution", overflow="fold")
    grid.add_column("layers", justify="right")
    grid.add_column("by")
    for name in (*(result.split()[0] for result in RESULTS), "bound"):
        grid.add_column(name, justify="right", no_wrap=True)
    for row in shape_rows(verification):
        grid.add_row(
            _mark(row["passed"]), Text(row["shape"]), str(len(row["layers"])), row["algorithm"], *_ratios(row),
            format_percent(row["share"]),
        )  # fmt: skip
    return grid


def _network(verification: "Verification") -> Table:
    grid = _table("errors are against float64")
    grid.add_column("")
    grid.add_column("whole network", overflow="fold")
    for name in ("converted", "torch", "at most"):
        grid.add_column(name, justify="right", no_wrap=True)
    for measurement in verification.measurements:
        if measurement.part == "network":
            row = network_row(measurement)
            grid.add_row(
                _mark(row["passed"]), f"{row['result']}: {row['what']}", row["value"], row["torch"], row["limit"]
            )
    grid.add_section()
    for row in verdict_rows(verification):
        label = f"{row['attack']} at {row['eps']}: of {row['images']} images fall; {_agreement(row)}"
        grid.add_row(_mark(row["passed"]), label, str(row["converted"]), str(row["original"]), "–")
    return grid


def _rungs(row: dict[str, Any]) -> str:
    return " → ".join(name if passed else f"✕ {name}" for name, passed in row["rungs"])


def _ratios(row: dict[str, Any]) -> Iterator[str]:
    """Of the three results: '0.90', '✕2.26', or '(2.26)' where it is not held against a limit."""
    for cell in row["cells"]:
        ratio = f"{cell['ratio']:.2f}" if cell["held"] else f"({cell['ratio']:.2f})"
        yield ratio if cell["passed"] else f"✕{ratio}"


def _agreement(row: dict[str, Any]) -> str:
    return f"the same verdict on {row['same']}, {row['by_original']} confirmed by the original"


def _mark(passed: bool) -> str:
    return "" if passed else "✕"


def _word(passed: bool) -> str:
    return "ok  " if passed else "FAIL"
