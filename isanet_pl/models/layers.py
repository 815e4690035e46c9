"""Convs of the heads, with what follows them."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Conv(torch.autograd.Function):
    """A conv whose weight gradient is taken in NCHW.

    oneDNN's fp32 weight gradient of a 3x3 conv in channels_last takes twice the time of NCHW on
    x86 CPUs; the copies cost a tenth of what that saves.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: int, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = ([1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], 1)
        return F.conv2d(x, weight, padding=padding, dilation=dilation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        backward = torch.ops.aten.convolution_backward
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            mask = [True, False, False]
            to_x = backward(gradient, x, weight, None, *ctx.geometry, mask)[0]
        if ctx.needs_input_grad[1]:
            parts = (gradient.contiguous(), x.contiguous(), weight.contiguous())
            to_weight = backward(*parts, None, *ctx.geometry, [False, True, False])[1]
        return to_x, to_weight, None, None


class Conv3x3(nn.Conv2d):
    """Returns a 3x3 conv of the same size, without bias, that trains fast on CPUs in fp32.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        dilation: Of the kernel.
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        super().__init__(
            in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the (N, C_out, H, W) map of a (N, C, H, W) one."""
        slow = (
            torch.is_grad_enabled()
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and self.bias is None  # folded
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )
        if not slow:
            return super().forward(x)
        out: Tensor = _Conv.apply(x, self.weight, self.dilation[0], self.dilation[0])
        return out


def activation(negative_slope: float) -> nn.Module:
    """Returns ReLU, or leaky ReLU if the slope below zero is not 0."""
    return nn.LeakyReLU(negative_slope, inplace=True) if negative_slope else nn.ReLU(inplace=True)


def conv_bn_relu(
    in_channels: int,
    out_channels: int,
    kernel_size: Literal[1, 3] = 1,
    negative_slope: float = 0.0,
    dilation: int = 1,
) -> nn.Sequential:
    """Returns conv (same padding, no bias), BatchNorm, (leaky) ReLU, numbered 0, 1, 2."""
    conv = (
        Conv3x3(in_channels, out_channels, dilation)
        if kernel_size == 3
        else nn.Conv2d(in_channels, out_channels, 1, bias=False)
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), activation(negative_slope))


def mix(layers: nn.Sequential, parts: Sequence[Tensor]) -> Tensor:
    """Returns `layers`, a conv and what follows it, of the concatenation of maps (N, C_i, H, W).

    The conv of a concatenation is the sum of convs of the parts, which spares its copy.
    """
    conv = layers[0]
    assert isinstance(conv, nn.Conv2d)
    weights = torch.split(conv.weight, [part.shape[1] for part in parts], dim=1)
    mixed = F.conv2d(parts[0], weights[0], conv.bias, padding=conv.padding)
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        mixed = mixed.add_(F.conv2d(part, weight, padding=conv.padding))
    out: Tensor = layers[1:](mixed)
    return out
