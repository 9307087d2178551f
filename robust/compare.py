"""python -m robust.compare: did robustness fall? The regression gate for pipelines."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from robust import cli
from robust.errors import InputError
from robust.files import check_writable
from robust.options import parse_eps

if TYPE_CHECKING:
    from robust import gate

_RULES, _OUTPUT, _RUN = "Rules", "Output", "Baseline"
_NEWEST_OF = Path("runs")  # where robust.evaluate puts its runs
_OWN = ("run.sqlite", "samples.csv", "summary.csv", "report.json", "report.html")  # a run's files


def compare(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[BASELINE] [CURRENT]",
            help="Run directories, or their report.json or samples.csv, or a baseline file. Without BASELINE: "
            "robustness-baseline.json. Without CURRENT too: the newest run under runs/.",
            show_default=False,
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Fail where an accuracy, clean or robust, fell by more than this share of the images, such as 0.02.",
            rich_help_panel=_RULES,
        ),
    ] = None,
    significant: Annotated[
        float | None,
        typer.Option(
            help="Fail only where the exact McNemar test, Holm-corrected over the rows, finds the drop significant at "
            "this level. Together with --max-drop, a drop fails if it is both. Default: 0.05, unless --max-drop is "
            "given.",
            rich_help_panel=_RULES,
        ),
    ] = None,
    min_robust_accuracy: Annotated[
        float | None,
        typer.Option(
            help="Fail where the robust accuracy of CURRENT in the worst case over its attacks, at any of its eps, is "
            "below this share.",
            rich_help_panel=_RULES,
        ),
    ] = None,
    min_clean_accuracy: Annotated[
        float | None,
        typer.Option(help="Fail where the accuracy on unchanged images is below this share.", rich_help_panel=_RULES),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Hold the lower end of the 95 % interval against these two.", rich_help_panel=_RULES
        ),
    ] = False,
    eps: Annotated[
        str | None,
        typer.Option(help="Look at these only, such as 8/255. Default: all of the baseline's.", rich_help_panel=_RULES),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(help="Write JUnit XML, for CI servers.", rich_help_panel=_OUTPUT)
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help="Write Markdown, for a pull request or a step's summary.", rich_help_panel=_OUTPUT),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything, for programs.", rich_help_panel=_OUTPUT)] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write a page with both runs side by side, and pictures of images that newly fell.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.", rich_help_panel=_OUTPUT)] = False,
    update: Annotated[
        bool,
        typer.Option(
            "--update",
            help="Write CURRENT's verdicts to the file BASELINE, made to be committed, and say what changes. Refuses "
            "where the two cannot be compared.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    plan: Annotated[
        float | None,
        typer.Option(
            metavar="DROP",
            help="Print how many images it takes to see a drop of this share, such as 0.05, and stop.",
            rich_help_panel=_RUN,
        ),
    ] = None,
) -> int:
    """Compare two runs on the same images, and fail where robustness fell.

    Images are paired by id and content. Without rules, an accuracy fails that
    fell significantly (0.05, exact McNemar test, Holm-corrected over the rows):
    one that merely wobbles passes. Whatever the rules, a check of the model that
    got worse (its mode, its gradients ...) fails.
    Exit codes: 0 pass, 1 regression, 2 the runs cannot be compared,
    3 a fault of robust itself, 130 interrupted, 141 its output went unread.
    """
    reports = {
        name: path
        for name, path in (("junit", junit), ("markdown", markdown), ("json", json), ("html", html))
        if path is not None
    }
    if (update or plan is not None) and reports:
        raise InputError(f"--{'update' if update else 'plan'} writes no reports: leave out --{' and --'.join(reports)}")
    if plan is not None:
        if update:
            raise InputError("--plan and --update are two commands: leave one out")
        _print_plan(plan, significant)
        return 0
    # Late, so that --help does not wait for pandas.
    from robust import gate
    from robust.baseline import read

    rules = gate.Rules(
        max_drop, significant, min_robust_accuracy, min_clean_accuracy, strict, parse_eps(eps) if eps else ()
    )
    before, after = _named(runs or [])
    _check_reports(reports.values(), (before, after))
    if update:
        return _update(before, after, rules, quiet)
    try:
        comparison = gate.compare(read(before), read(after), rules)
    except InputError as error:
        _write_reason(str(error), reports)
        raise
    _write(comparison, after, reports)
    if not quiet:
        _print(comparison)
        print(comparison.answer)
    elif not comparison.passed:
        cli.tell(comparison.answer)
    return 0 if comparison.passed else 1


def _named(runs: list[Path]) -> tuple[Path, Path]:
    """BASELINE and CURRENT; see the help of the command."""
    from robust.baseline import BASELINE

    if len(runs) > 2:
        raise InputError(f"two runs can be compared, not {len(runs)}: name BASELINE and CURRENT")
    before = runs[0] if len(runs) == 2 else Path(BASELINE)
    after = runs[-1] if runs else _newest()
    if len(runs) < 2 and before.exists() and after.exists() and before.samefile(after):
        raise InputError(f"{after} would be compared with itself: name BASELINE and CURRENT")
    return before, after


def _check_reports(reports: Iterable[Path], runs: tuple[Path, Path]) -> None:
    """InputError where a report would be written over what is compared, or over another one, or cannot be written."""
    own = {folder.resolve() / name for folder in runs if folder.is_dir() for name in _OWN}
    taken = own | {run.resolve() for run in runs}
    for path in reports:
        if path.exists() and not path.is_file():  # a device, or a folder, which is refused where it is written
            continue
        if path.resolve() in taken:
            raise InputError(f"{path} is compared, or is another report's file: name another one for this report")
        taken.add(path.resolve())
    for path in reports:
        with _writing(path):
            check_writable(path)


def _newest() -> Path:
    from robust.store import FILENAME

    stores = sorted(_NEWEST_OF.glob(f"*/{FILENAME}"), key=lambda path: path.stat().st_mtime)
    if not stores:
        raise InputError(f"no run is named, and there is none under {_NEWEST_OF}/: name BASELINE and CURRENT")
    return stores[-1].parent


def _update(path: Path, run: Path, rules: "gate.Rules", quiet: bool) -> int:
    """Replace the baseline at `path` by the verdicts of `run`, and say what that changes."""
    from robust import gate
    from robust.baseline import read, write_baseline
    from robust.units import format_images

    if path.is_dir():
        raise InputError(f"--update writes a file, and {path} is a folder; name one such as robustness-baseline.json")
    current = read(run)
    if current.samples.content_digest is None:
        raise InputError(f"{run} has no content hashes and no options: name the run directory or its report.json")
    said = f"new, {format_images(len(current))}"
    if path.exists():
        try:
            before = read(path)
            comparison = gate.compare(before, current, rules)
        except InputError as error:
            raise InputError(f"{error}; {path} is left as it was: remove it first if it has had its day") from None
        if before.samples.ids is not None:
            raise InputError(f"{path} is a run's own file and no baseline; name one such as robustness-baseline.json")
        said = str(comparison.headline)
        if not quiet:
            _print(comparison)
    with _writing(path):
        write_baseline(current, path)
    if not quiet:
        print(f"Wrote {path} from {run}: {said}")
    return 0


def _write(comparison: "gate.Comparison", current: Path, reports: Mapping[str, Path]) -> None:
    """The reports, by their options' names; each writer is imported for the file that was asked for."""
    for name, path in reports.items():
        with _writing(path):
            if name == "junit":
                from reports.junit import write_junit

                write_junit(comparison, path)
            elif name == "markdown":
                from reports.markdown import write_markdown

                write_markdown(comparison, path)
            elif name == "json":
                from reports.comparejson import write_comparison

                write_comparison(comparison, path)
            else:
                from reports.comparehtml import write_page

                write_page(comparison, current, path)


def _write_reason(reason: str, reports: Mapping[str, Path]) -> None:
    """Reports that say why there is no comparison, in place of an earlier outcome."""
    for name, path in reports.items():
        with _writing(path):
            if name == "junit":
                from reports.junit import write_reason
            elif name == "markdown":
                from reports.markdown import write_reason
            elif name == "json":
                from reports.comparejson import write_reason
            else:
                from reports.comparehtml import write_reason
            write_reason(reason, path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def _print(comparison: "gate.Comparison") -> None:
    from robust.table import lines, remarks, table

    console = Console()
    if console.is_terminal:
        console.print(table(comparison))
    else:
        print(*lines(comparison), sep="\n")
    print(*remarks(comparison), sep="\n")


def _print_plan(drop: float, significant: float | None) -> None:
    from robust.gate import SIGNIFICANT
    from robust.statistics import CHURN, sample_size

    level = SIGNIFICANT if significant is None else significant
    few, many = (sample_size(drop, churn, significance=level) for churn in (0.005, CHURN))
    print(
        f"To see a drop of {100 * drop:g} points with power 0.8 (exact McNemar test at {level:g}, one row):\n"
        f"{few:,} images where the same network is attacked again, or one much like it (0.5 % of the images rise);\n"
        f"{many:,} images where it was trained again, or replaced ({100 * CHURN:g} % rise although it got worse)."
    )


if __name__ == "__main__":
    cli.main(compare)
