"""Convolutions with one input channel a group, and their gradients: sums of products, too thin for matrix products."""

import triton
import triton.language as tl

from robust.conv.kernels.parts import PLAIN, finish

# For pixels m = (n, p, q) and channels k, which all read J channels of x, `OUT` of them the same ones:
#
#   for m, k in parallel, BLOCK_M x BLOCK_N a program:
#       for r, s, j:
#           acc[m, k] += x[n, h, w, k // OUT · J + j] · w[j, r, s, k]       h, w as in `gemm`
#       y[n, p, q, k] = epilogue(acc[m, k])
#
# With a channel multiplier, the forward pass has OUT = multiplier and J = 1, the input gradient the reverse.


@triton.jit(do_not_specialize=PLAIN)
def convolve(
    x_ptr,  # (N, H, W, K // OUT · J)
    w_ptr,  # (J, R, S, K)
    y_ptr,  # (N, P, Q, K), y_n, y_p, y_q elements apart
    shift_ptr,  # None, or (K,)
    residual_ptr,  # None, or y's shape and strides
    M,  # N·P·Q
    H,
    W,
    P,
    Q,
    R,
    S,
    J,
    K,  # in units of K_UNIT
    OUT,
    x_w,  # channels of x, in units of C_UNIT
    y_n,  # in units of K_UNIT
    y_p,
    y_q,
    stride_h,
    stride_w,
    start_h,
    start_w,
    dilation_h,
    dilation_w,
    RELU: tl.constexpr,
    C_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    x_w, K = x_w * C_UNIT, K * K_UNIT
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    k = first + tl.arange(0, BLOCK_N)
    rows, columns = m < M, k < K
    n, p, q = m // (P * Q), m // Q % P, m % Q
    h, w = p * stride_h + start_h, q * stride_w + start_w
    x_pixel = ((n.to(tl.int64) * H + h) * W + w) * x_w
    channel = k // OUT * J

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tap in range(R * S):
        r, s = tap // S, tap % S
        h_in, w_in = h + r * dilation_h, w + s * dilation_w
        inside = (rows & (h_in >= 0) & (h_in < H) & (w_in >= 0) & (w_in < W))[:, None] & columns[None, :]
        for j in range(J):
            x_offsets = x_pixel[:, None] + ((r * dilation_h * W + s * dilation_w) * x_w + channel + j)[None, :]
            x = tl.load(x_ptr + x_offsets, mask=inside, other=0.0)
            weight = tl.load(w_ptr + (j * R * S + tap) * K + k, mask=columns, other=0.0)
            acc += x.to(tl.float32) * weight.to(tl.float32)[None, :]

    y_pixel = (n.to(tl.int64) * y_n + p * y_p + q * y_q) * K_UNIT
    finish(acc, y_ptr, shift_ptr, residual_ptr, y_pixel, rows, 0, first, K, RELU, BLOCK_M, BLOCK_N)


# One tap and BLOCK_N channels a program, the pixels in shares as in `gemm`:
#
#   for k, (r, s), share in parallel:
#       for m of the share, BLOCK_M at a time:
#           acc[:, k] += g[n, p, q, k] · x[n, h, w, k // OUT]
#       sums[share, k, r, s] = sum of acc[:, k]


@triton.jit(do_not_specialize=PLAIN)
def weight_gradient(
    g_ptr,  # (N, P, Q, K)
    x_ptr,  # (N, H, W, K // OUT)
    sums_ptr,  # (splits, K, R, S) fp32
    M,  # N·P·Q
    H,
    W,
    P,
    Q,
    R,
    S,
    K,  # in units of K_UNIT
    OUT,
    x_w,  # channels of x, in units of C_UNIT
    stride_h,
    stride_w,
    start_h,
    start_w,
    dilation_h,
    dilation_w,
    share,  # pixels of a split, a multiple of BLOCK_M
    C_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    x_w, K = x_w * C_UNIT, K * K_UNIT
    tile, split = tl.program_id(0), tl.program_id(1)
    tap = tile % (R * S)
    k = tile // (R * S) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = k < K
    h0, w0 = start_h + tap // S * dilation_h, start_w + tap % S * dilation_w

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(split * share, tl.minimum(M, (split + 1) * share), BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        h, w = m // Q % P * stride_h + h0, m % Q * stride_w + w0
        x_pixel = (((m // (P * Q)).to(tl.int64) * H + h) * W + w) * x_w
        inside = ((m < M) & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & columns[None, :]
        g = tl.load(g_ptr + m.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)
        x = tl.load(x_ptr + x_pixel[:, None] + (k // OUT)[None, :], mask=inside, other=0.0)
        acc += g.to(tl.float32) * x.to(tl.float32)

    sums = sums_ptr + (split.to(tl.int64) * K + k) * (R * S) + tap
    tl.store(sums, tl.sum(acc, axis=0), mask=columns)
