"""Depthwise convolution with a fast backward pass on CPUs."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d with one filter per channel, without bias, padded by kernel_size // 2.

    Same parameters and same result.  Two of oneDNN's bfloat16 gradients have no fast kernel: that of the
    input at stride 2 and that of the weights of 5x5 kernels, each 20 to 100 times slower than the forward
    pass.  DepthwiseFunction takes them from kernels that are fast; float32 and other devices use
    nn.Conv2d as it is.
    """

    def __init__(self, channels, kernel_size, stride=1):
        super().__init__(channels, channels, kernel_size, stride, padding=kernel_size // 2,
                         groups=channels, bias=False)

    def forward(self, x):
        """[B, C, H, W] -> [B, C, ceil(H / stride), ceil(W / stride)]."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if x.device.type != "cpu" or dtype != torch.bfloat16:
            return super().forward(x)
        return DepthwiseFunction.apply(x.to(dtype), self.weight.to(dtype), self.stride[0])


class DepthwiseFunction(torch.autograd.Function):
    """Depthwise convolution of x [B, C, H, W] with weight [C, 1, k, k]; gradients by the functions below."""

    @staticmethod
    def forward(ctx, x, weight, stride):
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        grad_x = input_gradient(gradient, x, weight, ctx.stride) if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(gradient, x, weight, ctx.stride) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def library_gradients(gradient, x, weight, stride, padding, wanted):
    """(of x or None, of weight or None, None) by the library, as ``wanted`` = (bool, bool) says."""
    return torch.ops.aten.convolution_backward(gradient, x, weight, None, [stride] * 2, [padding] * 2, [1, 1],
                                               False, [0, 0], len(weight), [*wanted, False])


def input_gradient(gradient, x, weight, stride):
    """Gradient of x [B, C, H, W]: at stride 2 computed in float32, which has a fast kernel."""
    if stride == 1:
        return library_gradients(gradient, x, weight, 1, weight.shape[-1] // 2, (True, False))[0]
    gradient, wide_x, weight = gradient.float(), x.float(), weight.float()
    result = library_gradients(gradient, wide_x, weight, stride, weight.shape[-1] // 2, (True, False))[0]
    return result.to(x.dtype)


def weight_gradient(gradient, x, weight, stride):
    """Gradient of weight [C, 1, k, k]: for k = 5 put together from four 3x3 corners, overlapping by one row.

    A corner at offset (i, j) is the gradient of a 3x3 convolution whose input is x shifted by (i, j).
    """
    size = weight.shape[-1]
    if size != 5:
        return library_gradients(gradient, x, weight, stride, size // 2, (False, True))[1]
    padded = F.pad(x, [2] * 4)
    height, width = (stride * (n - 1) + 3 for n in gradient.shape[-2:])
    result = torch.empty_like(weight)
    for i in (0, 2):
        for j in (0, 2):
            shifted, corner = padded[:, :, i:i + height, j:j + width], (..., slice(i, i + 3), slice(j, j + 3))
            result[corner] = library_gradients(gradient, shifted, weight[corner].contiguous(), stride, 0,
                                               (False, True))[1]
    return result
