"""Where files lie, and that they are written whole or not at all."""

import errno
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast


def at_home(path: str | Path) -> Path:
    """The path, which may begin with ~; where there is no home of that name, as it is."""
    return Path(os.path.expanduser(path))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once the block has ended well.

    Whatever goes wrong, `path` holds what it held before, or all of the new. A link is followed, and what is no
    regular file, such as /dev/stdout, is written to.
    """
    path = path.resolve()
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, "wb") as stream:
            yield cast(BinaryIO, stream)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in _left_behind(path):
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as stream:
            yield cast(BinaryIO, stream)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _left_behind(path: Path) -> Iterator[Path]:
    """What processes that were killed had written in place of `path`; other processes may be writing theirs."""
    for part in path.parent.glob(glob.escape(f".{path.name}.") + "*.part"):
        pid = part.suffixes[-2][1:]
        if pid.isdecimal() and not _runs(int(pid)):
            yield part


def _runs(pid: int) -> bool:
    if os.name != "posix":  # elsewhere the signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)  # which sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8."""
    with replacing(path) as stream:
        stream.write(text.encode())


def check_writable(path: Path) -> None:
    """OSError where no file can be put at `path`, folders above it included; nothing is made to find out."""
    path = path.resolve()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    replaced = path.is_file() or not path.exists()  # else it is written to, as it is: a device, a pipe
    if not os.access(folder if replaced else path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
