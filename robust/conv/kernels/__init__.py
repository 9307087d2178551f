"""The convolution and its gradients in Triton: one portable implicit matrix product, right for every case.

`launch` is the Algorithm, `tiles` the static table of configurations. The kernels: `gemm` has the convolution (which
is its input gradient too) and the weight gradient, `depthwise` both for one input channel a group, without matrix
products.
"""

from robust.conv.kernels.launch import forward, input_grad, misfit, pack, pack_input_grad, weight_grad

__all__ = ["forward", "input_grad", "misfit", "pack", "pack_input_grad", "weight_grad"]
