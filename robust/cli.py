"""What the command lines of the project share: how a model is named, how a run is repeated, how they end.

0 done; 1 a gate or an attack failed; 2 the input or the options are wrong, said in one line on stderr; 3 a fault of
this project, with its traceback; 130 interrupted; 141 its output went unread and it stopped, as others do by SIGPIPE.
"""

import inspect
import io
import os
import re
import signal
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer

from robust.errors import InputError

UNREAD = 141
SPINS = "3000"  # about 50 microseconds

MODEL = "Model"  # the panels of --help that these are in
ModelSpec = Annotated[
    str,
    typer.Option(
        help="torchvision name, [bold]torchvision:NAME@WEIGHTS[/], [bold]timm:NAME[/], the bundled "
        "efficientnet_lite0, mnist_cnn and mnist_cnn_robust, or [bold]file.py:factory[/] (module:factory).",
        rich_help_panel=MODEL,
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help="State dict for the model: .pth or .safetensors.", rich_help_panel=MODEL)
]
InputSize = Annotated[
    int | None,
    typer.Option(help="Side of the square images that the model takes, in pixels.", rich_help_panel=MODEL),
]

DATA = "Data"
DataSpec = Annotated[
    str,
    typer.Option(
        help="samples (20 images that foolbox ships), a folder or .zip of class folders, an .npz with x and y, "
        "an image file (with --label), or a torchvision data set by name.",
        rich_help_panel=DATA,
    ),
]
Label = Annotated[str | None, typer.Option(help="Class of a single image: name, index or wnid.", rich_help_panel=DATA)]
DataRoot = Annotated[Path | None, typer.Option(help="Where torchvision's data sets lie.", rich_help_panel=DATA)]
SkipBadImages = Annotated[
    bool, typer.Option("--skip-bad-images", help="Leave unreadable images out, and count them.", rich_help_panel=DATA)
]


def main(command: Callable[..., Any]) -> NoReturn:
    """Run a typer command function on sys.argv, and exit."""
    _wait_briefly()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command()(_interruptible(command))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a dash that the encoding lacks is no reason to fail
            stream.reconfigure(errors="replace")
    if empty := next((option for option, value in pairwise(sys.argv) if option[:2] == "--" and value == ""), None):
        _fail(f"{empty} is empty: give it a value, or leave it out")  # a path would be the folder that one is in
    sys.argv[1:] = map(_at_home, sys.argv[1:])
    try:
        # Typer prints usage errors in a box of many lines; ours are one line, as all others.
        sys.exit(_run(app))
    except InputError as error:
        _fail(_noted(str(error), error))
    except (sqlite3.OperationalError, OSError) as error:
        from robust.store import BUSY, disk_is_full, is_locked

        if is_locked(error):
            _fail(BUSY)
        if disk_is_full(error):
            _fail(_noted("the disk is full: make room, and repeat the command", error))
        if not isinstance(error, OSError) and not re.search("readonly|I/O", str(error)):
            _fault()
        elsewhere = ", or name another --output," if "output" in inspect.signature(command).parameters else ""
        _fail(_noted(f"{error}; mend that{elsewhere} and repeat the command", error))
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None:
            _fault()
        _fail(f"{usage()} (see --help)")


def _at_home(argument: str) -> str:
    """With a ~ that the shell has left, as in --output=~/runs: else a folder would be made that is called so."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return option + equals + os.path.expanduser(value)


def _wait_briefly() -> None:
    """Have threads that wait for each other fall asleep soon, unless the user has settled how they wait.

    By default GNU's OpenMP, torch's on Linux, has them spin for milliseconds. Where another process wants the core of
    one of them they only keep each other from it: a run then takes thirty times as long. It is read when torch is
    imported, so only a command can set it (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def _interruptible(command: Callable[..., Any]) -> Callable[..., Any]:
    """Ctrl-C at any time, also in the seconds that importing torch takes."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except KeyboardInterrupt as error:
            ignore_interrupts()
            tell(_noted("interrupted", error))
            return 130

    return run


def ignore_interrupts() -> None:
    """From the first Ctrl-C on, so that a second one, of somebody impatient, cannot spoil how the first one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def tell(line: str) -> None:
    """A line on stderr; whether it can be written changes no exit code."""
    _write(line + "\n", sys.stderr)


def _run(app: typer.Typer) -> int:
    """The command's exit code, whether or not somebody reads its output to the end."""
    try:
        code = app(standalone_mode=False) or 0
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as left:
        if isinstance(left.__context__, BrokenPipeError):  # of click or rich, which write nothing more
            return UNREAD
        did = f"called sys.exit({left.code!r})" if isinstance(left, SystemExit) else f"raised {type(left).__name__}"
        said = f"code of the model or the data {did}: mend it, and begin anew where that changes the model's file"
        raise InputError(_noted(said, left)) from None
    _write("", sys.stdout)
    return code


def without_output(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments that make the same run in another folder."""
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--output":
            next(remaining, None)
        elif argument != "--resume" and not argument.startswith("--output="):
            yield argument


def slug(model: str) -> str:
    """A model's spec as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.@-]+", "-", model).strip("-.")


def _noted(message: str, error: BaseException) -> str:
    """The message, and what was noted on the error on its way here."""
    return "; ".join([message, *getattr(error, "__notes__", ())])


def _fault() -> NoReturn:
    """A code of its own, as 1 is a verdict."""
    _end(traceback.format_exc(), 3)


def _fail(message: str) -> NoReturn:
    # Spaces stay what they are, for a path may be among the words.
    _end("error: " + " ".join(map(str.strip, message.splitlines())) + "\n", 2)


def _end(text: str, code: int) -> NoReturn:
    _write(text, sys.stderr)
    with suppress(OSError):  # which is told already
        _write("", sys.stdout)
    sys.exit(code)


def _write(text: str, stream: TextIO) -> None:
    """The text, and whatever the stream holds back; if nobody reads it, the exit code stays what it is."""
    try:
        print(text, end="", file=stream, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what Python flushes at its end
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise
