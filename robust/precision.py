"""In which precision torch multiplies, and that it does so the same way every time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock

import torch

from robust.errors import InputError


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """float32 products in full or, in tf32, as a GPU's tensor cores form them; the same kernels every time.

    InputError where torch cannot say how they are formed outside of the block.
    """
    cudnn = torch.backends.cudnn
    try:
        matmul = torch.get_float32_matmul_precision()
        before = cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    except RuntimeError:  # torch's older and newer settings, which it does not let be mixed
        raise InputError(
            "fp32_precision of torch.backends is set, beside which torch reads none of its older settings; "
            "set it back to 'none' before"
        ) from None
    cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = precision == "tf32", True, False
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before
        torch.set_float32_matmul_precision(matmul)


_TURN = RLock()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without what code around it asked of torch: no autocast, new tensors on the CPU and in float32; it comes back
    afterwards.

    Threads take turns: modes, precision and random numbers are those of the process, and a module's mode is its own.
    """
    with _TURN, ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if (device := torch.get_default_device()).type != "cpu":
            torch.set_default_device(None)
            if torch.get_default_device().type == "cpu":
                stack.callback(torch.set_default_device, device)
            else:  # it is that of a with block, which nothing but another one ends
                stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        yield
