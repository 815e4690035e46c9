"""ISA as it is published, step by step: the yardstick of tests and benchmarks, not used to train.

It computes what `attention.ISAModule` computes, from the same parameters, in the way of the
authors' code and of mmsegmentation: regroup all channels before each stage and back after it,
project the regrouped maps, concatenate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from isanet_pl.models.attention import ISABlock, ISAModule, SelfAttentionBlock2D


def plain_forward(module: ISAModule, x: Tensor) -> Tensor:
    """Returns the (N, C_out, H, W) features of a (N, C, H, W) map."""
    contexts = [_block(stage, x) for stage in module.stages]  # type: ignore[arg-type]
    if module.up_conv is not None:
        x = module.up_conv(x)
    parts = [*contexts, x] if module.context_first else [x, *contexts]
    out: Tensor = module.dropout(module.conv_bn(torch.cat(parts, dim=1)))
    return out


def _block(block: ISABlock, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    dh, dw = block.down_factor
    pad_h, pad_w = -h % dh, -w % dw
    x = F.pad(x, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
    mh, mw = (h + pad_h) // dh, (w + pad_w) // dw
    for name in block.ranges:
        c = x.shape[1]
        x = x.reshape(n, c, mh, dh, mw, dw)
        # One map for each place in the window (long range), or for each window (short range).
        order = (0, 3, 5, 1, 2, 4) if name == "long" else (0, 2, 4, 1, 3, 5)
        maps = (dh, dw, mh, mw) if name == "long" else (mh, mw, dh, dw)
        x = x.permute(order).reshape(n * maps[0] * maps[1], c, maps[2], maps[3])
        x = _attention(block.get_submodule(f"{name}_range_sa"), x)  # type: ignore[arg-type]
        x = x.reshape(n, maps[0], maps[1], x.shape[1], maps[2], maps[3])
        back = (0, 3, 4, 1, 5, 2) if name == "long" else (0, 3, 1, 4, 2, 5)
        x = x.permute(back).reshape(n, x.shape[3], mh * dh, mw * dw)
    top, left = pad_h // 2, pad_w // 2
    return x[:, :, top : top + h, left : left + w]


def _attention(block: SelfAttentionBlock2D, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    query, key = block.f_query(x).flatten(2), block.f_key(x).flatten(2)  # (n, C_k, h*w)
    value = block.f_value(x).flatten(2)
    affinity = (query.transpose(1, 2) @ key * query.shape[1] ** -0.5).softmax(dim=-1)
    context = (affinity @ value.transpose(1, 2)).transpose(1, 2)
    out: Tensor = block.W(context.reshape(n, -1, h, w))
    return out
