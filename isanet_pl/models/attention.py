"""Interlaced sparse self-attention (Huang et al., arXiv 1907.12273), the whole of the paper.

Dense self-attention relates all H*W positions of a feature map with one (H*W) x (H*W) affinity.
ISA factorises it into two small ones. Cut the map into windows of dh x dw positions:

- long range: positions at the same place inside their window attend to each other, so every group
  is a coarse sampling of the whole map;
- short range: the positions of one window attend to each other.

One after the other they connect any two positions. Both stages are the same attention block on the
same numbers in another order, so the map is regrouped once, into a token grid of shape
(N, C, T, M): T = dh*dw places in a window, M = number of windows. The long-range stage attends
along M, the short-range stage along T. Convolutions are 1x1 and BatchNorm pools over all positions,
so neither cares about the order, and the regrouping can wait until the channels are few.

Notation in this file: N batch, C channels, H W map, dh dw window, T places, M windows.
Parameter names are those of the authors' code (openseg.pytorch, lib/models/modules/isa_block.py).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from isanet_pl.models.layers import conv_bn_relu, mix, same_conv

Along = Literal["all", "places", "windows"]
AttentionOrder = Literal["long_short", "short_long", "long", "short"]


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, sdpa: bool = False
) -> Tensor:
    """Returns softmax(q k^T / sqrt(C_k)) v along the last axis, separately for each group.

    Args:
        query: (N, C_k, G, L), G groups of L positions.
        key: (N, C_k, G, L).
        value: (N, C_v, G, L).
        mask: (G, L) bool, True where a position may be attended to; None attends everywhere.
        sdpa: Use PyTorch's fused attention, which does not store the affinity; it pays where L is
            large.

    Returns:
        (N, C_v, G, L) in channels_last memory order.
    """
    if sdpa:
        # (N, G, L, C)
        query, key, value = (t.permute(0, 2, 3, 1) for t in (query, key, value))
        # The fused kernels want as many channels of the value as of the key.
        values = torch.split(value, key.shape[3], dim=3)
        mask = None if mask is None else mask[:, None, :]
        parts = [F.scaled_dot_product_attention(query, key, v, mask) for v in values]
        return torch.cat(parts, dim=3).permute(0, 3, 1, 2)
    n, _, groups, length = query.shape
    # (N*G, L, C), rows of channels: a view of a grid, and otherwise a copy in its cheapest order.
    query, key, value = (t.permute(0, 2, 3, 1).flatten(0, 1) for t in (query, key, value))
    query = query * query.shape[2] ** -0.5
    scores: Tensor  # (N*G, L, L)
    if torch.compiler.is_compiling():
        # It orders memory itself, and in older releases cannot split a graph for DDP that has an
        # autograd function.
        scores = query @ key.transpose(1, 2)
    else:
        scores = _Scores.apply(query, key)
    if mask is not None:
        # The lowest finite value rather than -inf: a group that is all padding gets a uniform
        # affinity, not NaN; its output is cropped away.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask.repeat(n, 1)[:, None, :], lowest)
    context = scores.softmax(dim=-1).to(value.dtype) @ value  # (N*G, L, C_v)
    return context.view(n, groups, length, value.shape[2]).permute(0, 3, 1, 2)


class _Scores(torch.autograd.Function):
    """q k^T of (B, L, C) operands, with the gradient of the key in the key's own memory order.

    The gradient that `torch.bmm` returns for it is transposed, and slows down what follows.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor) -> Tensor:
        scores = query @ key.transpose(1, 2)
        # Under autocast in its type, which the backward pass does not choose again.
        ctx.save_for_backward(query.to(scores.dtype), key.to(scores.dtype))
        return scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        query, key = ctx.saved_tensors
        return gradient @ key, gradient.transpose(1, 2) @ query


def attend_along(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    along: Along,
    mask: Tensor | None = None,
    sdpa: bool = False,
) -> Tensor:
    """Returns `attend` of maps (N, C, H, W), or along one axis of token grids (N, C, T, M).

    Args:
        query: C_k channels.
        key: C_k channels.
        value: C_v channels.
        along: Which positions attend to each other: all of the map, the windows (M), or the places
            of a window (T).
        mask: (T, M) bool, see `attend`; not for `all`.
        sdpa: See `attend`.

    Returns:
        C_v channels, in channels_last memory order; along the places transposed, (N, C_v, M, T).
    """
    if along == "windows":
        return attend(query, key, value, mask, sdpa)
    if along == "places":
        query, key, value = (t.transpose(2, 3) for t in (query, key, value))
        return attend(query, key, value, None if mask is None else mask.T, sdpa)
    shape = value.shape
    # (N, C, 1, H*W): one group
    query, key, value = (t.flatten(2).unsqueeze(2) for t in (query, key, value))
    return attend(query, key, value, sdpa=sdpa).view(shape)


class TokenGrid:
    """Maps (N, C, H, W) to the token grid (N, C, T, M) and back.

    H and W are padded with zeros to multiples of the window, half of it on each side, the odd
    position on the right and at the bottom, as the reference code does.

    Args:
        height: H of the map.
        width: W of the map.
        window: (dh, dw), the down factor.
    """

    def __init__(self, height: int, width: int, window: tuple[int, int]) -> None:
        self.size = (height, width)
        self.window = window
        self.windows = (-(-height // window[0]), -(-width // window[1]))  # rounded up
        pad_h = self.windows[0] * window[0] - height
        pad_w = self.windows[1] * window[1] - width
        self.padding = (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2)

    def split(self, x: Tensor) -> Tensor:
        """Returns the token grid (N, C, T, M) of a map (N, C, H, W)."""
        if any(self.padding):
            x = F.pad(x, self.padding)
        n, c, _, _ = x.shape
        (mh, mw), (dh, dw) = self.windows, self.window
        x = x.permute(0, 2, 3, 1).reshape(n, mh, dh, mw, dw, c)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(n, dh * dw, mh * mw, c)  # (N, T, M, C)
        return x.permute(0, 3, 1, 2)

    def merge(self, grid: Tensor) -> Tensor:
        """Returns the map (N, C, H, W) of a token grid (N, C, T, M), the padding cropped."""
        n, c, _, _ = grid.shape
        (mh, mw), (dh, dw) = self.windows, self.window
        x = grid.permute(0, 2, 3, 1).reshape(n, dh, dw, mh, mw, c)
        x = x.permute(0, 3, 1, 4, 2, 5).reshape(n, mh * dh, mw * dw, c)  # (N, H', W', C), padded
        left, _, top, _ = self.padding
        height, width = self.size
        return x[:, top : top + height, left : left + width].permute(0, 3, 1, 2)

    def real_positions(self, device: torch.device) -> Tensor:
        """Returns a bool (T, M), False at the padding."""
        return self.split(torch.ones(1, 1, *self.size, device=device))[0, 0] > 0


class SelfAttentionBlock2D(nn.Module):
    """Returns self-attention over all positions of a map: (N, C, H, W) -> (N, C_out, H, W).

    Key and query are two conv1x1-BN-ReLU each, the value is one bare conv1x1, the output a
    conv1x1-BN-ReLU (paper section 3.2; `SelfAttentionBlock2D` of the authors' code).

    Args:
        in_channels: Channels of the input.
        key_channels: Channels of key and query, C_k.
        value_channels: Channels of the value, C_v.
        out_channels: Channels of the output; `in_channels` if None.
        value_bias: Give the value conv a bias (mmsegmentation has one, the authors do not).
        negative_slope: Of the activations below zero; 0 is ReLU, the authors' InPlaceABN has 0.01.
        recompute: In training, compute what lies between the first convs and the output conv once
            more in the backward pass instead of keeping it: half the memory for a few per cent of
            the time. Weights must not change in between, as under torch.func.functional_call.
        sdpa: See `attend`.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int | None = None,
        value_bias: bool = False,
        negative_slope: float = 0.0,
        recompute: bool = True,
        sdpa: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.sdpa = sdpa
        out_channels = in_channels if out_channels is None else out_channels
        conv = partial(conv_bn_relu, negative_slope=negative_slope)
        # One flat Sequential each, so that convs are 0 and 3, BatchNorms 1 and 4.
        self.f_key = nn.Sequential(
            *conv(in_channels, key_channels), *conv(key_channels, key_channels)
        )
        self.f_query = nn.Sequential(
            *conv(in_channels, key_channels), *conv(key_channels, key_channels)
        )
        self.f_value = nn.Conv2d(in_channels, value_channels, 1, bias=value_bias)
        self.W = conv(value_channels, out_channels)

    def forward(
        self,
        x: Tensor,
        regroup: Callable[[Tensor], Tensor] | None = None,
        along: Along = "all",
        mask: Tensor | None = None,
    ) -> Tensor:
        """Returns the attended map, or token grid.

        Args:
            x: (N, C, H, W) map, or a (N, C, T, M) token grid.
            regroup: Applied to the narrow tensors right after the first projections; turns the map
                into a token grid there. Zero padding added by it meets BatchNorm as in the
                reference, because the convs before it have no bias and would map 0 to 0.
            along: Which positions attend to each other: all of the map, the places of a window
                (short range) or the windows (long range).
            mask: (T, M) bool, False at positions that nobody may attend to.
        """
        query, key = self.f_query[0](x), self.f_key[0](x)
        # The bias of the value belongs to padded positions too, so it comes after the padding.
        value = same_conv(x, self.f_value.weight)
        if regroup is not None:
            query, key, value = regroup(query), regroup(key), regroup(value)
        if self.f_value.bias is not None:
            value = value + self.f_value.bias.to(value.dtype)[:, None, None]  # under autocast
        again = self.recompute and self.training and torch.is_grad_enabled()
        if again and not torch.compiler.is_compiling():  # which decides by itself what to keep
            norms = [m for m in (*self.f_query, *self.f_key) if isinstance(m, _BatchNorm)]
            out: Tensor = checkpoint(
                self._attend_and_project,
                *(query, key, value, along, mask),
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), _StatisticsKept(norms)),
            )
        else:
            out = self._attend_and_project(query, key, value, along, mask)
        out = self.W[1:](out)  # BatchNorm, activation
        # Transposed back only now, because the conv wants its input in true channels_last order.
        return out.transpose(2, 3) if along == "places" else out

    def _attend_and_project(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        along: Along,
        mask: Tensor | None,
    ) -> Tensor:
        """Returns the output before its BatchNorm, of what the first convs gave."""
        query, key = self.f_query[1:](query), self.f_key[1:](key)
        attended = attend_along(query, key, value, along, mask, self.sdpa)
        # Not `same_conv`: `checkpoint` stops the second pass where PyTorch's own conv saves its
        # input, before computing it, but only after a conv that is an autograd.Function.
        project: Any = self.W[0]
        return F.conv2d(attended, project.weight)


class _StatisticsKept:
    """Keeps a second forward pass of the same batch out of BatchNorm's running statistics.

    It is entered once for each backward pass through the block.
    """

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        self.norms = norms
        self.kept: list[tuple[float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        self.kept = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            # A copy counts: a signal may ask for a checkpoint at any moment, which needs all
            # buffers.
            norm.momentum, norm.num_batches_tracked = 0.0, deepcopy(norm.num_batches_tracked)

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class ISABlock(nn.Module):
    """Returns interlaced sparse self-attention: (N, C, H, W) -> (N, C_out, H, W) for any H, W >= 1.

    Paper section 3.3; `ISA_Block` of the authors' code.

    Args:
        in_channels: Channels of the input.
        key_channels: Channels of key and query.
        value_channels: Channels of the value.
        out_channels: Channels of the output.
        down_factor: (dh, dw), the window: how many places it has in each direction.
        value_bias: Give the value convs a bias.
        order: The two stages, the other way round, or one alone (ablations).
        mask_padding: Keep padded positions from being attended to. The reference does not. They
            take part in BatchNorm's training statistics either way.
        negative_slope: Of the activations below zero.
        recompute: See `SelfAttentionBlock2D`.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int,
        down_factor: tuple[int, int] = (8, 8),
        value_bias: bool = False,
        order: AttentionOrder = "long_short",
        mask_padding: bool = False,
        negative_slope: float = 0.0,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        if len(down_factor) != 2 or not all(isinstance(d, int) and d >= 1 for d in down_factor):
            raise ValueError(f"down_factor must be two integers >= 1, got {down_factor}")
        if order not in get_args(AttentionOrder):
            raise ValueError(f"order must be one of {get_args(AttentionOrder)}, got {order!r}")
        self.down_factor = (down_factor[0], down_factor[1])
        self.mask_padding = mask_padding
        self.ranges = order.split("_")
        for i, name in enumerate(self.ranges):
            channels = in_channels if i == 0 else out_channels
            block = SelfAttentionBlock2D(
                channels,
                key_channels,
                value_channels,
                out_channels,
                value_bias,
                negative_slope,
                recompute,
            )
            self.add_module(f"{name}_range_sa", block)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the (N, C_out, H, W) context of a (N, C, H, W) map."""
        _, _, h, w = x.shape
        grid = TokenGrid(h, w, self.down_factor)
        mask = None
        if self.mask_padding and any(grid.padding):
            mask = grid.real_positions(x.device)
        regroup: Callable[[Tensor], Tensor] | None = grid.split
        for name in self.ranges:
            along = "windows" if name == "long" else "places"
            x = self.get_submodule(f"{name}_range_sa")(x, regroup, along, mask)  # (N, C_out, T, M)
            regroup = None
        return grid.merge(x)

    def extra_repr(self) -> str:
        """Returns what the parameters do not show."""
        return f"down_factor={self.down_factor}, order={'_'.join(self.ranges)!r}"


class ISAModule(nn.Module):
    """Returns a map with its ISA context mixed in: (N, C, H, W) -> (N, C_out, H, W), any H, W >= 1.

    One ISA block for each down factor, concatenated with the input, then conv1x1-BN-ReLU and
    Dropout2d (paper section 3.4; `ISA_Module` of the authors' code). With several down factors the
    input first goes through a conv1x1-BN-ReLU to as many channels as the blocks return together.

    For speed some modules (the blocks' `f_query`, `f_key`, `f_value`, `W` and `W[0]`, `conv_bn` and
    `conv_bn[0]`) are not called, only their weights and parts are: hooks on them, and what is built
    on hooks, do nothing. For the features, hook this module. Transforms of torch.func (grad, vmap)
    are not supported.

    Args:
        in_channels: Channels of the input.
        key_channels: Channels of key and query.
        value_channels: Channels of the value.
        out_channels: Channels of each block's output and of the module's.
        down_factors: One window (dh, dw) for each block.
        dropout: Probability of Dropout2d on the output.
        value_bias: Give the value convs a bias.
        context_first: Concatenate [contexts, input] (mmsegmentation) instead of [input, contexts].
        order: See `ISABlock`.
        mask_padding: See `ISABlock`.
        negative_slope: Of the activations below zero.
        recompute: See `SelfAttentionBlock2D`.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int,
        down_factors: Sequence[tuple[int, int]] = ((8, 8),),
        dropout: float = 0.0,
        value_bias: bool = False,
        context_first: bool = False,
        order: AttentionOrder = "long_short",
        mask_padding: bool = False,
        negative_slope: float = 0.0,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        if not down_factors:
            raise ValueError("down_factors must name at least one window, such as [[8, 8]]")
        self.context_first = context_first
        self.stages = nn.ModuleList(
            ISABlock(
                in_channels,
                key_channels,
                value_channels,
                out_channels,
                down_factor,
                value_bias,
                order,
                mask_padding,
                negative_slope,
                recompute,
            )
            for down_factor in down_factors
        )
        context_channels = len(down_factors) * out_channels
        input_channels = in_channels if len(down_factors) == 1 else context_channels
        conv = partial(conv_bn_relu, negative_slope=negative_slope)
        self.up_conv = conv(in_channels, input_channels) if len(down_factors) > 1 else None
        self.conv_bn = conv(input_channels + context_channels, out_channels)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the (N, C_out, H, W) features of a (N, C, H, W) map."""
        contexts = [stage(x) for stage in self.stages]
        if self.up_conv is not None:
            x = self.up_conv(x)
        parts = [*contexts, x] if self.context_first else [x, *contexts]
        out: Tensor = self.dropout(mix(self.conv_bn, parts))
        return out
