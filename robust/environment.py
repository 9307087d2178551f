"""What a run was made with, and when, as its reports state it."""

import platform
import sys
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from importlib.util import find_spec

import torch

from robust import __version__


def environment(device: torch.device, *packages: str) -> dict[str, str]:
    """Versions of the project, of torch, of those `packages` that are installed, and of Python; machine and threads."""
    cuda = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return {
        "robust": __version__,
        **{name: _version(name) for name in ("torch", *packages) if find_spec(name)},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": f"{device}{cuda}",
        "threads": str(torch.get_num_threads()),
    }


@cache  # it reads files
def _version(package: str) -> str:
    return metadata.version(package)


def now() -> str:
    """The time in UTC, in ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
