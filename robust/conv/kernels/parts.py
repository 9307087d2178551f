"""What the kernels share."""

import triton
import triton.language as tl

# Only channel counts and strides in memory decide how wide a load may be: a kernel compiled anew for every other
# number, as Triton does where it is 1 or divisible by 16, would only cost time.
PLAIN = [
    "M", "H", "W", "P", "Q", "R", "S",
    "stride_h", "stride_w", "start_h", "start_w", "dilation_h", "dilation_w", "share",
]  # fmt: skip


@triton.jit
def finish(
    acc,  # (BLOCK_M, BLOCK_N) fp32
    y_ptr,  # (N, P, Q, channels), of any strides but for the channels, which are adjacent
    scale_ptr,  # None, or (channels,)
    shift_ptr,  # None, or (channels,)
    residual_ptr,  # None, or y's shape and strides
    pixel,  # (BLOCK_M,) int64: where in y each row begins
    channel,  # (BLOCK_N,)
    rows,  # (BLOCK_M,) bool: which of them exist
    columns,  # (BLOCK_N,) bool
    RELU: tl.constexpr,
):
    """y = relu(acc · scale + shift + residual), rounded once: the `Epilogue` of `robust.conv.algorithm`."""
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + channel, mask=columns, other=0.0).to(tl.float32)[None, :]
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + channel, mask=columns, other=0.0).to(tl.float32)[None, :]
    offsets = pixel[:, None] + channel[None, :]
    stored = rows[:, None] & columns[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, mask=stored, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # a NaN stays one, which a maximum would hide
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=stored)
