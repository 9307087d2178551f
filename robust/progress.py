"""How far a run has come, said while it goes: a bar on a terminal, a plain line now and then elsewhere."""

import time
from collections import Counter
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30


class Meter(AbstractContextManager["Meter"]):
    """A listener to `robust.harness.evaluate`: images per second, time left, how many stood so far.

    Every attack takes all images, and each time they count: `total` is the number of images times that of attacks.
    With `quiet` it says nothing.
    """

    def __init__(self, console: Console, total: int | None, quiet: bool = False):
        self._console, self._total, self._quiet = console, total, quiet
        self._done: Counter[str] = Counter()
        self._robust: Counter[str] = Counter()
        self._began = self._spoke = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[robust]}"),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, rate="", robust="")

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, attack: str, n: int, robust: int) -> None:
        self._done[attack] += n
        self._robust[attack] += robust
        now = time.monotonic()
        rate = f"{self._done.total() / max(now - self._began, 1e-9):,.1f} images/s"
        # No share: images that are wrong unattacked are done first, then those that break.
        standing = f"{self._robust[attack]:,} stand so far"
        self._bar.update(self._task, advance=n, description=attack, rate=rate, robust=standing)
        if not self._quiet and not self._console.is_terminal and now - self._spoke > SECONDS_BETWEEN_LINES:
            self._spoke = now
            of = f" of {self._total:,}" if self._total else ""
            done = f"{self._done.total():,}{of} pairs of image and attack done"
            print(f"{done}, {rate}; {attack}: {standing}", flush=True)
