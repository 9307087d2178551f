"""Convolution from scratch: from the sliding window to a GPU kernel, and whole pretrained networks on it.

A ladder, each rung checked against the one before: `direct` (the specification), `toeplitz` (the matrix), `im2col` and
`winograd` (CPU), `kernels` (Triton). `functional` makes one operator of them, `layers` modules, `convert` swaps them
into any network.
"""
