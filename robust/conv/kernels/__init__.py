"""The convolution and its gradients in Triton: one portable implicit matrix product, right for every case.

`algorithm` has the functions of the Algorithm, `launch` leads from tensors to a kernel, `tiles` is the static table of
configurations. The kernels: `gemm` has the convolution, which is its own input gradient too, and the weight gradient;
`depthwise` both for groups of one input channel, without matrix products; `parts` is what they share. Apart from all
that, `pooling`: the largest value of every window.
"""

from robust.conv.kernels.algorithm import forward, input_grad, misfit, pack, pack_input_grad, weight_grad

__all__ = ["forward", "input_grad", "misfit", "pack", "pack_input_grad", "weight_grad"]
