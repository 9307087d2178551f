"""What every command line of the project shares: how it ends.

0 done; 1 a gate or an attack failed; 2 the input or the options are wrong, said in one line on stderr; 130 interrupted.
"""

import sqlite3
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from robust.errors import InputError


def main(command: Callable[..., Any]) -> NoReturn:
    """Run a typer command function on sys.argv, and exit."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command()(command)
    try:
        # Typer prints usage errors in a box of many lines; ours are one line, as all others.
        sys.exit(app(standalone_mode=False) or 0)
    except InputError as error:
        _fail(str(error))
    except (sqlite3.OperationalError, OSError) as error:
        from robust.store import disk_is_full

        if "locked" in str(error):
            _fail("another process is writing this run: wait for it, or name another --output")
        if not disk_is_full(error):
            raise
        _fail("the disk is full: make room, then repeat the command with --resume; what is done is kept")
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        _fail(f"{usage()} (see --help)")


def _fail(message: str) -> NoReturn:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
