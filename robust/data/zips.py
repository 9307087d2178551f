"""Opening a zip whose members are read for as long as its data set lives."""

import weakref
from pathlib import Path
from zipfile import ZipFile


def open_zip(path: Path) -> ZipFile:
    """The zip at `path`; its file is closed when nothing refers to it any more. Raises as ZipFile does."""
    file = path.open("rb")
    try:
        archive = ZipFile(file)
    except BaseException:
        file.close()
        raise
    weakref.finalize(archive, file.close)
    return archive
