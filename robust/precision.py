"""In which precision torch multiplies, and that it does so the same way every time."""

from collections.abc import Iterator
from contextlib import contextmanager

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
