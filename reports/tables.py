"""samples.csv and summary.csv: the run's tables, for programs and spreadsheets."""

from pathlib import Path

import pandas as pd

from robust.files import replacing
from robust.statistics import SUMMARY_COLUMNS
from robust.store import SAMPLE_COLUMNS, Store

_TEXT_COLUMNS = ("sample_id", "attack", "norm")


def write_samples(store: Store, folder: Path) -> None:
    """One row a (sample, attack, eps), streamed: the table may be larger than memory."""
    with replacing(folder / "samples.csv") as stream:
        stream.write((",".join(SAMPLE_COLUMNS) + "\n").encode())
        for chunk in store.sample_chunks():
            stream.write(_csv(chunk, SAMPLE_COLUMNS))


def write_summary(store: Store, folder: Path) -> None:
    """One row an (attack, eps) and one a (worst_case, eps)."""
    with replacing(folder / "summary.csv") as stream:
        stream.write((",".join(SUMMARY_COLUMNS) + "\n").encode())
        stream.write(_csv(store.summary(), SUMMARY_COLUMNS))


def _csv(table: pd.DataFrame, columns: tuple[str, ...]) -> bytes:
    """The rows without a header: floats by repr, True and False, an empty cell for what is missing."""
    texts = {name: table[name].map(inert) for name in _TEXT_COLUMNS if name in table}
    text = table.assign(**texts).to_csv(columns=list(columns), index=False, header=False, lineterminator="\n")
    return text.encode()


def inert(cell: str) -> str:
    """Text that no spreadsheet takes for a formula: sample ids and layers have whatever names somebody gave them."""
    return "'" + cell if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
