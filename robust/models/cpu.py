"""What the CPU is, where that decides which of two ways is the faster one."""

import torch


def lanes() -> int:
    """float32 values in a vector register, as x86 has them."""
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
