"""Writers from a finished run to the files of its folder. They need the store alone: no model, no torch."""

from collections.abc import Callable
from pathlib import Path

from reports.answer import headline
from reports.curve import write_curve
from reports.figures import write_figures
from reports.html import write_html
from reports.jsonreport import write_json
from reports.npz import write_npz
from reports.tables import write_samples, write_summary
from robust.store import Store

__all__ = ["REPORTS", "write_reports"]

# What is written -> its writer, which is given the run's folder and puts it there whole or not at all.
REPORTS: dict[str, Callable[[Store, Path], None]] = {
    "samples.csv": write_samples,
    "summary.csv": write_summary,
    "report.json": write_json,
    "report.html": write_html,
    "figures/curve.svg": write_curve,
    "figures/panda_*.png": write_figures,
    "adversarials.npz": write_npz,
}


def write_reports(store: Store, folder: Path) -> None:
    """Write every report of a finished run into `folder`. InputError, and nothing written, where it is empty."""
    headline(store.summary())
    for write in REPORTS.values():
        write(store, folder)
