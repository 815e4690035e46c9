"""Convs of the heads, with what follows them."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# The CPU's kernels for convs in channels_last go along the rows of the map and are fast while the
# rows under the kernel stay in its cache; many channels of a wide map do not. Hence the parts. On
# an AMD EPYC with 1 MiB of L2, from 2048 to 512 channels at 97x97, copies of the parts included: a
# 3x3 conv takes 0.85 of the time in fp32 and 0.7 in bf16, its weight gradient 0.55 and 0.85, the
# fp32 weight gradient of a 1x1 conv 0.7. At 64x64 they take the same or less. In bf16 each part of
# a 3x3 conv is rounded: from 2048 channels the error is twice that of one call.
_FORWARD_CHANNELS = 512
_WEIGHT_BYTES = {1: 2048, 3: 512}  # by kernel: of a position, 128 channels for 3x3 in fp32


class _Conv(torch.autograd.Function):
    """A conv of the same size, stride 1, whose weight gradient is not left to one call of oneDNN.

    In bf16 that of a 1x1 conv takes 1.4 times that of the matrix product which it is; all others
    are taken by blocks of channels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        padding = dilation * (weight.shape[2] // 2)
        ctx.geometry = ([1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], 1)
        return _by_parts(x, weight, None, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        backward = torch.ops.aten.convolution_backward
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            mask = [True, False, False]
            to_x = backward(gradient, x, weight, None, *ctx.geometry, mask)[0]
        if ctx.needs_input_grad[1] and weight.shape[2] == 1 and weight.dtype == torch.bfloat16:
            rows, columns = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (gradient, x))
            to_weight = (rows.T @ columns)[..., None, None]  # (C_out, N*H*W) (N*H*W, C)
        elif ctx.needs_input_grad[1]:
            to_weight = torch.empty_like(weight)
            step, nhwc = _WEIGHT_BYTES[weight.shape[2]] // weight.itemsize, torch.channels_last
            gradients = [g.contiguous(memory_format=nhwc) for g in torch.split(gradient, step, 1)]
            for part, block in zip(
                torch.split(x, step, 1), torch.split(to_weight, step, 1), strict=True
            ):
                part = part.contiguous(memory_format=nhwc)
                for g, out in zip(gradients, torch.split(block, step), strict=True):
                    mask = [False, True, False]
                    out.copy_(backward(g, part, out, None, *ctx.geometry, mask)[1])
        return to_x, to_weight, None


def _by_parts(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Returns the conv of a map as the sum of those of its channels, 512 at a time if it is 3x3."""
    padding = dilation * (weight.shape[2] // 2)
    step = _FORWARD_CHANNELS if weight.shape[2] == 3 else x.shape[1]
    parts = zip(torch.split(x, step, 1), torch.split(weight, step, 1), strict=True)
    part, part_weight = next(parts)
    out = F.conv2d(part, part_weight, bias, padding=padding, dilation=dilation)
    for part, part_weight in parts:
        out += F.conv2d(part, part_weight, padding=padding, dilation=dilation)
    return out


def same_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """Returns the conv (N, C_out, H, W) of a map (N, C, H, W), stride 1, that is fast on CPUs.

    Args:
        x: The map.
        weight: (C_out, C, k, k), k 1 or 3.
        bias: (C_out,).
        dilation: Of the kernel.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        padding = dilation * (weight.shape[2] // 2)
        return F.conv2d(x, weight, bias, padding=padding, dilation=dilation)
    if torch.is_grad_enabled() and bias is None:
        mixed = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if mixed else x.dtype
        out: Tensor = _Conv.apply(x.to(dtype), weight.to(dtype), dilation)
        return out
    return _by_parts(x, weight, bias, dilation)


class SameConv(nn.Conv2d):
    """Returns `same_conv` of a map, without bias until it is folded.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: 1 or 3.
        dilation: Of the kernel.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Literal[1, 3], dilation: int = 1
    ) -> None:
        padding = dilation * (kernel_size // 2)
        super().__init__(
            in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the (N, C_out, H, W) map of a (N, C, H, W) one."""
        return same_conv(x, self.weight, self.bias, self.dilation[0])


def is_same_conv(conv: nn.Conv2d) -> bool:
    """Returns whether a conv could be a `SameConv`."""
    size, dilation = conv.kernel_size[0], conv.dilation[0]
    return (
        conv.kernel_size in ((1, 1), (3, 3))
        and conv.stride == (1, 1)
        and conv.padding == (dilation * (size // 2),) * 2
        and conv.dilation == (dilation, dilation)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


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
    conv = SameConv(in_channels, out_channels, kernel_size, dilation)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), activation(negative_slope))


def mix(layers: nn.Sequential, parts: Sequence[Tensor]) -> Tensor:
    """Returns what a conv and the layers after it make of the concatenation of (N, C_i, H, W) maps.

    The conv of a concatenation is the sum of convs of the parts, which spares its copy.
    """
    conv = layers[0]
    assert isinstance(conv, nn.Conv2d)
    weights = torch.split(conv.weight, [part.shape[1] for part in parts], dim=1)
    mixed = same_conv(parts[0], weights[0], conv.bias)
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        mixed = mixed.add_(same_conv(part, weight))
    out: Tensor = layers[1:](mixed)
    return out


def upsample(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Returns a map (N, C, h, w) at another size, bilinear, (N, C, H, W) in its own dtype."""
    dtype = x.dtype
    if x.is_cuda and x.requires_grad:
        # GPUs sum the gradient of each position in the input's type: of the hundreds of addends,
        # 16 bits would lose some.
        x = x.to(torch.promote_types(dtype, torch.float32))
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners).to(dtype)
