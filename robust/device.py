"""The machine that a run computes on: which device, how many threads, and what happens when memory runs out."""

import contextlib
import os
from collections.abc import Iterator

import joblib
import torch
from torch import nn

from robust.errors import InputError
from robust.models.probe import describe, device_of


def pick_device(name: str) -> torch.device:
    """The device called so by torch; auto is a GPU where there is one. InputError where it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used ({reason}); try --device cpu") from None
    return device


@contextlib.contextmanager
def share_of_cores() -> Iterator[None]:
    """No more threads of torch than this process may use cores, while the block runs.

    OpenMP counts the cores of the machine, whatever quota a container has of them, and each worker of pytest-xdist
    counts them for itself. Threads that have to take turns on a core wait for each other in a spin. OMP_NUM_THREADS is
    an answer of the user's own, and stands.
    """
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        torch.set_num_threads(max(1, min(before, joblib.cpu_count() // workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def on(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module on `device` while the block runs."""
    before = device_of(module)
    try:
        module.to(device)
        yield
    finally:
        module.to(before)


@contextlib.contextmanager
def readable_exhaustion(batch_size: int) -> Iterator[None]:
    """InputError for memory that the device has not."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = f", or begin anew with a batch_size below {batch_size}" if batch_size > 1 else ""
        raise InputError(
            f"the device has too little memory ({describe(error)}): free some and go on{smaller}"
        ) from error


def keep_freed_memory() -> None:
    """Have the C library keep what layers free, rather than give it back and fetch it anew page by page.

    glibc gives blocks back that are larger than the largest freed so far, up to 32 MiB (M_MMAP_THRESHOLD in
    mallopt(3)). This one is not written to, and so costs nothing, unless torch fills new memory to be deterministic.
    It holds for the rest of the process, as if the process had freed such a block itself.
    """
    torch.empty(2**25 - 2**14, dtype=torch.uint8)
