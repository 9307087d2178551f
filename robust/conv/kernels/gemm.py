"""Convolution and weight gradient as implicit matrix products: windows are rows that are never written to memory."""

import triton
import triton.language as tl

from robust.conv.kernels.parts import PLAIN, finish, operand

# With rows m = (n, p, q) and columns k, the K axis of the product runs over (r, s, c):
#
#   for m, k in parallel, BLOCK_M x BLOCK_N a program:
#       for r, s, c, BLOCK_K channels of one tap at a time:
#           h = p·stride + start + r·dilation                       likewise w
#           acc[m, k] += x[n, h, w, c] · w[k, r, s, c]              x is 0 outside of the image
#       y[n, p, q, k] = epilogue(acc[m, k])
#
# start is -padding in the forward pass. The input gradient is this with the output's gradient for x, once a phase
# (geometry.Phase): stride 1, start -before, the taps of the phase, and y every stride-th pixel of the result.
#
# Loops over taps and channels are one, so that loads are prefetched across taps. The like of it in torch's compiler,
# with 8 warps, gave wrong results in some versions of Triton (pytorch#173068). This one was right in all configurations
# on an H200 with Triton 3.6; of others `robust.verify` tells.


@triton.jit(do_not_specialize=PLAIN)
def convolve(
    x_ptr,  # (N, H, W, groups·C)
    w_ptr,  # (groups·K, R, S, C)
    y_ptr,  # (N, P, Q, groups·K), y_n, y_p, y_q elements apart
    mask_ptr,  # None, or x's shape: x counts for 0 where this is not above 0
    shift_ptr,  # None, or (groups·K,)
    residual_ptr,  # None, or y's shape and strides
    M,  # N·P·Q
    H,
    W,
    P,
    Q,
    R,
    S,
    C,  # in units of C_UNIT
    K,  # in units of K_UNIT
    x_w,  # from one pixel of x to the next, groups·C unless FOLDED, in units of C_UNIT
    y_n,  # in units of K_UNIT
    y_p,
    y_q,
    stride_h,
    stride_w,
    start_h,
    start_w,
    dilation_h,
    dilation_w,
    POINTWISE: tl.constexpr,  # one tap, which sees pixel m for pixel m
    FOLDED: tl.constexpr,  # S = 1, and C covers the taps of a row, which are adjacent in memory
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    C_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    C, x_w, K = C * C_UNIT, x_w * C_UNIT, K * K_UNIT
    tiles = tl.cdiv(K, BLOCK_N)
    group = tl.program_id(1)
    # Tiles of the same rows are neighbours in time: the second one finds x in the cache, as all find the weights.
    m = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_N
    k = first + tl.arange(0, BLOCK_N)
    rows, columns = m < M, k < K
    n, p, q = m // (P * Q), m // Q % P, m % Q
    h, w = p * stride_h + start_h, q * stride_w + start_w
    # A batch may pass 2^31 elements, one image may not.
    if POINTWISE:
        x_pixel = m.to(tl.int64) * x_w
        y_pixel = m.to(tl.int64) * (tl.num_programs(1) * K)
    else:
        x_pixel = ((n.to(tl.int64) * H + h) * W + w) * x_w
        y_pixel = (n.to(tl.int64) * y_n + p * y_p + q * y_q) * K_UNIT

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    blocks = tl.cdiv(C, BLOCK_K)
    for step in range(R * S * blocks):
        tap = 0 if POINTWISE else step // blocks
        c = (step - tap * blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = rows[:, None] & (c < C)[None, :]
        if POINTWISE:
            x_offsets = x_pixel[:, None] + (group * C + c)[None, :]
        else:
            r, s = tap // S, tap % S
            h_in, w_in = h + r * dilation_h, w + s * dilation_w
            x_offsets = x_pixel[:, None] + ((r * dilation_h * W + s * dilation_w) * x_w + group * C + c)[None, :]
            inside &= ((h_in >= 0) & (h_in < H))[:, None]
            if FOLDED:
                along = (w_in * x_w)[:, None] + c[None, :]  # within the row of the image
                inside &= (along >= 0) & (along < W * x_w)
            else:
                inside &= ((w_in >= 0) & (w_in < W))[:, None]
        x = tl.load(x_ptr + x_offsets, mask=inside, other=0.0)
        if mask_ptr is not None:
            x = tl.where(tl.load(mask_ptr + x_offsets, mask=inside, other=0.0) <= 0, 0.0, x)
        w_offsets = (group * K + k)[None, :] * (R * S * C) + (tap * C + c)[:, None]
        weight = tl.load(w_ptr + w_offsets, mask=columns[None, :] & (c < C)[:, None], other=0.0)
        acc = tl.dot(operand(x, PRECISION), operand(weight, PRECISION), acc, input_precision=PRECISION)

    finish(acc, y_ptr, shift_ptr, residual_ptr, y_pixel, rows, group * K, first, K, RELU, BLOCK_M, BLOCK_N)


# One tap and BLOCK_N channels a program, with the pixels m = (n, p, q) for the K axis, cut into `splits` shares:
#
#   for k, (r, s, c), share in parallel:
#       for m of the share, BLOCK_K at a time:
#           acc[k, c] += g[n, p, q, k] · x[n, h, w, c]              h, w as above
#       sums[share, k, r, s, c] = acc[k, c]
#
# The sums of the shares are added in one order, always the same.


@triton.jit(do_not_specialize=PLAIN)
def weight_gradient(
    g_ptr,  # (N, P, Q, groups·K)
    x_ptr,  # (N, H, W, groups·C)
    sums_ptr,  # (splits, groups·K, R, S, C) fp32
    M,  # N·P·Q
    H,
    W,
    P,
    Q,
    R,
    S,
    C,  # these three as in `convolve`
    K,
    x_w,
    stride_h,
    stride_w,
    start_h,
    start_w,
    dilation_h,
    dilation_w,
    share,  # pixels of a split, a multiple of BLOCK_K
    POINTWISE: tl.constexpr,
    FOLDED: tl.constexpr,
    PRECISION: tl.constexpr,
    C_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    C, x_w, K = C * C_UNIT, x_w * C_UNIT, K * K_UNIT
    tile, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channels = tl.num_programs(2) * K
    blocks = tl.cdiv(C, BLOCK_N)
    c = tile % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    tap = tile // blocks % (R * S)
    k = tile // (blocks * R * S) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, columns = k < K, c < C
    h0, w0 = start_h + tap // S * dilation_h, start_w + tap % S * dilation_w

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(split * share, tl.minimum(M, (split + 1) * share), BLOCK_K):
        m = first + tl.arange(0, BLOCK_K)
        g_offsets = m.to(tl.int64)[None, :] * channels + (group * K + k)[:, None]
        g = tl.load(g_ptr + g_offsets, mask=(m < M)[None, :] & rows[:, None], other=0.0)
        inside = (m < M)[:, None] & columns[None, :]
        if POINTWISE:
            x_pixel = m.to(tl.int64) * x_w
        else:
            h, w = m // Q % P * stride_h + h0, m % Q * stride_w + w0
            x_pixel = (((m // (P * Q)).to(tl.int64) * H + h) * W + w) * x_w
            inside &= ((h >= 0) & (h < H))[:, None]
            if FOLDED:
                along = (w * x_w)[:, None] + c[None, :]
                inside &= (along >= 0) & (along < W * x_w)
            else:
                inside &= ((w >= 0) & (w < W))[:, None]
        x = tl.load(x_ptr + x_pixel[:, None] + (group * C + c)[None, :], mask=inside, other=0.0)
        acc = tl.dot(operand(g, PRECISION), operand(x, PRECISION), acc, input_precision=PRECISION)

    row = split.to(tl.int64) * channels + group * K + k
    sums = sums_ptr + (row * R * S + tap)[:, None] * C + c[None, :]
    tl.store(sums, acc, mask=rows[:, None] & columns[None, :])
