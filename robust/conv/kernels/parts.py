"""What the kernels share."""

import triton
import triton.language as tl

# Kernels compiled anew where a number is 1 or divisible by 16, as is usual, would only cost time. What has to be known
# is how wide a load may be: so numbers of channels come in units that divide them, and these are constants.
PLAIN = [
    "M", "H", "W", "P", "Q", "R", "S", "C", "K", "x_w", "y_n", "y_p", "y_q",
    "stride_h", "stride_w", "start_h", "start_w", "dilation_h", "dilation_w", "share",
]  # fmt: skip


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """What a product takes of x: for tf32, rounded to 11 bits, half away from zero.

    Tensor cores drop the other bits, which makes every product smaller than it is; cuDNN rounds too.
    """
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # the largest NaN would become -0
    return x


@triton.jit
def finish(
    acc,  # (BLOCK_M, BLOCK_N) fp32
    y_ptr,  # (N, P, Q, groups·K), of any strides but for the channels, which are adjacent
    shift_ptr,  # None, or (groups·K,)
    residual_ptr,  # None, or y's shape and strides
    pixel,  # (BLOCK_M,) int64: where in y each row begins
    rows,  # (BLOCK_M,) bool: which of them exist
    first,  # the channel of y at which the group begins
    k,  # that of the group at which acc begins
    K,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = relu(acc + shift + residual), rounded once: the `Epilogue` of `robust.conv.algorithm`."""
    HALF: tl.constexpr = BLOCK_N // 2
    if BLOCK_N > 64:  # a large tile beside as large a residual would not fit the registers
        left, right = tl.split(acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1))
        _store(left, y_ptr, shift_ptr, residual_ptr, pixel, rows, first, k + tl.arange(0, HALF), K, RELU)
        k += HALF
        _store(right, y_ptr, shift_ptr, residual_ptr, pixel, rows, first, k + tl.arange(0, HALF), K, RELU)
    else:
        _store(acc, y_ptr, shift_ptr, residual_ptr, pixel, rows, first, k + tl.arange(0, BLOCK_N), K, RELU)


@triton.jit
def _store(
    acc, y_ptr, shift_ptr, residual_ptr, pixel, rows, first,  # as above
    k,  # (BLOCK_N,)
    K,
    RELU: tl.constexpr,
):  # fmt: skip
    columns, channel = k < K, first + k
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + channel, mask=columns, other=0.0).to(tl.float32)[None, :]
    offsets = pixel[:, None] + channel[None, :]
    stored = rows[:, None] & columns[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, mask=stored, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # a NaN stays one, which a maximum would hide
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=stored)
