"""Reading samples.csv back, also after a spreadsheet has saved it. It has no content hashes and no options."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

from robust.errors import InputError
from robust.text import visible
from robust.verdicts import Row, Samples, Verdicts, known_norm

_COLUMNS = ("sample_id", "label", "clean_pred", "attack", "norm", "eps", "success", "robust")
_INERT = tuple("'" + first for first in "=+-@\t\r")  # how reports/tables.py writes text that would be a formula


def read(stream: BinaryIO, source: str) -> Verdicts:
    """The verdicts in a stream that can be wound back, called `source` in messages.

    InputError where it is no samples.csv, or one that can be read in more than one way.
    """
    try:
        return _read(stream, source)
    except UnicodeDecodeError:
        raise InputError(f"{source} is not in UTF-8: no samples.csv, or one to be saved again as CSV UTF-8") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, csv.Error) as error:
        raise InputError(f"{source} is no samples.csv ({visible(str(error).strip())})") from None
    except InputError as error:
        raise InputError(f"{source} {error}; export it anew") from None


def _read(stream: BinaryIO, source: str) -> Verdicts:
    table, comma = _table(stream)
    if table.empty:
        raise InputError("holds no sample")
    label, pred = (_parsed(table[name], int) for name in ("label", "clean_pred"))
    robust, success = (_parsed(table[name], _boolean) for name in ("robust", "success"))
    _parsed(table.norm, known_norm)
    eps = _parsed(table.eps, lambda text: _radius(text.replace(",", ".") if comma else text))
    correct = label == pred
    if (robust != (correct & ~success)).any():
        raise InputError("contradicts itself: robust has to mean correct, and no success, in every row")
    # Whole numbers for samples and for rows: which of each a line is about.
    sample, cells = pd.factorize(table.sample_id)
    ids = [cell[1:] if cell.startswith(_INERT) else cell for cell in cells.tolist()]
    attack, norm = table.attack.cat, table.norm.cat
    radius, radii = pd.factorize(eps)
    line = (attack.codes.to_numpy(np.int64) * len(norm.categories) + norm.codes) * len(radii) + radius
    which, lines = pd.factorize(line)
    rows = [
        Row(attack.categories[k // len(radii) // len(norm.categories)],
            norm.categories[k // len(radii) % len(norm.categories)], float(radii[k % len(radii)]))
        for k in lines
    ]  # fmt: skip
    _require_each_once(sample, which, ids, rows)
    first = np.unique(sample, return_index=True)[1]
    for values in (label, pred):
        if (differs := values != values[first][sample]).any():
            raise InputError(f"has two labels or clean predictions for sample {visible(ids[sample[differs.argmax()]])}")
    samples, order = Samples.of(ids, label[first])
    verdicts = np.empty((len(ids), len(rows)), bool)
    verdicts[sample, which] = robust
    return Verdicts(
        source=source,
        samples=samples,
        clean=correct[first][order],
        robust={row: verdicts[order, k] for k, row in enumerate(rows)},
    )


def _table(stream: BinaryIO) -> tuple[pd.DataFrame, bool]:
    """The columns that matter as text, as categories where values are few; and whether decimals may have commas."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    head = text.readline()
    text.detach().seek(0)
    separator = max(",;\t", key=head.count)
    header = next(csv.reader([head], delimiter=separator), [])
    if missing := [name for name in _COLUMNS if name not in header]:
        raise InputError(f"is no samples.csv, for it lacks the column {missing[0]}")
    table = pd.read_csv(
        stream,
        sep=separator,
        usecols=list(_COLUMNS),
        dtype={name: str if name == "sample_id" else "category" for name in _COLUMNS},
        keep_default_na=False,
        encoding="utf-8-sig",
    )
    return table, separator != ","


def _parsed(column: pd.Series, parse: Callable[[str], Any]) -> np.ndarray:
    """The column's values, each different text parsed once."""
    values = []
    for text in map(str, column.cat.categories):  # of True and False pandas makes bools
        try:
            values.append(parse(text))
        except ValueError:
            row = int((column.cat.codes == len(values)).to_numpy().argmax())
            raise InputError(f"has {visible(text)!r} for {column.name} in row {row + 2}") from None
    return np.array(values)[column.cat.codes.to_numpy()]


def _boolean(text: str) -> bool:
    """'True', and 'TRUE' as a spreadsheet writes it. Other languages have other words, which are not guessed at."""
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _radius(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(text)
    return value


def _require_each_once(sample: np.ndarray, which: np.ndarray, ids: Sequence[str], rows: Sequence[Row]) -> None:
    """InputError unless every sample has one line for every row."""
    if "" in ids:
        raise InputError("has a line without a sample_id")
    counts = np.bincount(sample * len(rows) + which, minlength=len(ids) * len(rows))
    if (counts != 1).any():
        culprit = int((counts != 1).argmax())
        count = int(counts[culprit])
        raise InputError(
            f"has {f'{count} lines' if count else 'no line'} for sample {visible(ids[culprit // len(rows)])}, "
            f"{rows[culprit % len(rows)]}"
        )
