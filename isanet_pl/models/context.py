"""The context modules that ISA is compared with, (N, C, H, W) -> (N, C_out, H, W) as `ISAModule`.

Each is built as its paper and mmsegmentation's head have it, from its input on, so that they share
backbone, classifier and recipe, and differ in the context alone; dense attention is ISA's own block
over all positions, and "none" a conv1x1, where mmsegmentation's FCN head has three conv3x3. Pooled
maps are enlarged without `align_corners`, whatever the network does with its logits.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isanet_pl.models.attention import SelfAttentionBlock2D
from isanet_pl.models.layers import conv_bn_relu, mix

POOL_SIZES = (1, 2, 3, 6)
"""Parts of PPM along each side of the map, for each branch."""


class NoContext(nn.Module):
    """Returns a conv1x1-BN-ReLU of each position: an FCN.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        dropout: Probability of Dropout2d on the output.
        negative_slope: Of the activations below zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        negative_slope: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv_bn = conv_bn_relu(in_channels, out_channels, 1, negative_slope)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the (N, C_out, H, W) features of a (N, C, H, W) map."""
        out: Tensor = self.dropout(self.conv_bn(x))
        return out


class DenseAttention(nn.Module):
    """Returns a map with dense self-attention mixed in: every position attends to every other.

    The block that ISA factorises, in the same place, then the authors' concatenation and conv1x1:
    what remains if only the factorisation is taken away. OCNet's BaseOC (arXiv 1809.00916) has
    the same widths but no BatchNorm and ReLU after the attention, and starts its last conv at
    zero. The affinity has (H W)^2 entries for each image.

    Args:
        in_channels: Channels of the input.
        key_channels: Channels of key, query and, as in OCNet, value.
        out_channels: Channels of the output.
        dropout: Probability of Dropout2d on the output.
        sdpa: Use PyTorch's fused attention; the papers' code stores the affinity.
        negative_slope: Of the activations below zero.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        sdpa: bool = False,
        negative_slope: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention = SelfAttentionBlock2D(
            in_channels,
            key_channels,
            key_channels,
            out_channels,
            negative_slope=negative_slope,
            recompute=False,
            sdpa=sdpa,
        )
        self.conv_bn = conv_bn_relu(in_channels + out_channels, out_channels, 1, negative_slope)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the (N, C_out, H, W) features of a (N, C, H, W) map."""
        out: Tensor = self.dropout(mix(self.conv_bn, [x, self.attention(x)]))
        return out


class PyramidPooling(nn.Module):
    """Returns a map with averages over its parts mixed in: PSPNet (arXiv 1612.01105).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of each pooled branch and of the output.
        dropout: Probability of Dropout2d on the output.
        negative_slope: Of the activations below zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        negative_slope: float = 0.0,
    ) -> None:
        super().__init__()
        conv = partial(conv_bn_relu, negative_slope=negative_slope)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), *conv(in_channels, out_channels))
            for size in POOL_SIZES
        )
        channels = in_channels + len(POOL_SIZES) * out_channels
        self.conv_bn = conv(channels, out_channels, 3)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the (N, C_out, H, W) features of a (N, C, H, W) map."""
        pooled = [_enlarge(branch(x), x) for branch in self.branches]
        out: Tensor = self.dropout(mix(self.conv_bn, [x, *pooled]))
        return out


class AtrousPyramid(nn.Module):
    """Returns a map seen through dilated convs and as a whole: ASPP of DeepLabV3 (1706.05587).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of each branch and of the output.
        dropout: Probability of Dropout2d on the output.
        dilations: Of the branches; 1 is a conv1x1. The default is that of stride 8.
        negative_slope: Of the activations below zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        dilations: Sequence[int] = (1, 12, 24, 36),
        negative_slope: float = 0.0,
    ) -> None:
        super().__init__()
        conv = partial(conv_bn_relu, negative_slope=negative_slope)
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv(in_channels, out_channels))
        self.branches = nn.ModuleList(
            conv(in_channels, out_channels, 1 if d == 1 else 3, dilation=d) for d in dilations
        )
        channels = (1 + len(dilations)) * out_channels
        self.conv_bn = conv(channels, out_channels, 3)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the (N, C_out, H, W) features of a (N, C, H, W) map."""
        branches = [_enlarge(self.image_pool(x), x), *(branch(x) for branch in self.branches)]
        out: Tensor = self.dropout(mix(self.conv_bn, branches))
        return out


class CrissCrossAttention(nn.Module):
    """Returns self-attention of each position to its row and its column, as a residual.

    CCNet, arXiv 1811.11721, section 3.2; its residual starts at zero.

    Args:
        channels: Channels of input and output.
        key_channels: Channels of key and query.
    """

    def __init__(self, channels: int, key_channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, key_channels, 1)
        self.key = nn.Conv2d(channels, key_channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns a (N, C, H, W) map for a (N, C, H, W) map."""
        h = x.shape[2]
        query, key, value = (
            conv(x).permute(0, 2, 3, 1) for conv in (self.query, self.key, self.value)
        )  # (N, H, W, C)
        columns = query.transpose(1, 2) @ key.permute(0, 2, 3, 1)  # (N, W, H, H)
        rows = query @ key.transpose(2, 3)  # (N, H, W, W)
        # A position is in its row and in its column: it counts once.
        itself = torch.eye(h, dtype=torch.bool, device=x.device)
        columns = columns.masked_fill(itself, torch.finfo(columns.dtype).min)
        scores = torch.cat([columns.transpose(1, 2), rows], dim=3)  # (N, H, W, H + W)
        affinity = scores.softmax(dim=-1).to(value.dtype)
        context = affinity[..., h:] @ value  # along the rows
        along_columns = affinity[..., :h].transpose(1, 2) @ value.transpose(1, 2)  # (N, W, H, C)
        context = context + along_columns.transpose(1, 2)
        out: Tensor = x + self.gamma * context.permute(0, 3, 1, 2)
        return out


class RecurrentCrissCross(nn.Module):
    """Returns a map with criss-cross attention mixed in, run twice with the same weights: CCNet.

    After two passes every position has reached every other, over a corner.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels inside and of the output.
        dropout: Probability of Dropout2d on the output.
        negative_slope: Of the activations below zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        negative_slope: float = 0.0,
    ) -> None:
        super().__init__()
        conv = partial(conv_bn_relu, negative_slope=negative_slope)
        self.before = conv(in_channels, out_channels, 3)
        self.attention = CrissCrossAttention(out_channels, max(1, out_channels // 8))
        self.after = conv(out_channels, out_channels, 3)
        self.conv_bn = conv(in_channels + out_channels, out_channels, 3)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the (N, C_out, H, W) features of a (N, C, H, W) map."""
        context = self.before(x)
        for _ in range(2):
            context = self.attention(context)
        out: Tensor = self.dropout(mix(self.conv_bn, [x, self.after(context)]))
        return out


def _enlarge(x: Tensor, like: Tensor) -> Tensor:
    """Returns a pooled map (N, C, h, w) at the size of `like`, (N, C, H, W)."""
    size = like.shape[2:]
    if x.shape[2:] == (1, 1):
        return x.expand(-1, -1, *size)
    # GPUs sum the gradient of each input pixel in the input's type: of thousands of addends, 16
    # bits would lose most.
    return F.interpolate(x.float(), size, mode="bilinear", align_corners=False).to(x.dtype)
