"""The network as it is deployed: BatchNorm folded into convs, projections merged."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from isanet_pl.models.attention import Along, SelfAttentionBlock2D, attend_along

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@torch.no_grad()
def fuse_for_inference(module: ModuleT, dtype: torch.dtype | None = None) -> ModuleT:
    """Returns a folded copy of a network or a part of one, in eval mode, with the same results.

    BatchNorm becomes part of the conv before it; in an attention block whose output is no wider
    than its value, value and output conv become one. The copy has other parameters than the
    original and cannot be trained.

    Args:
        module: An `ISANet`, or any module whose BatchNorms follow their convs in the order of
            registration, as those of the ResNets do.
        dtype: What autocast will compute in: the parameters are converted to it once, rather than
            at every call, with the same results (but for RCCA, whose residual autocast adds in
            fp32). None leaves them as they are.
    """
    fused = copy.deepcopy(module).eval()
    for name, part in list(fused.named_modules()):
        if isinstance(part, SelfAttentionBlock2D):
            fused = _put(fused, name, FusedSelfAttention(part))
    conv_name, conv = "", None
    for name, part in list(fused.named_modules()):
        if isinstance(part, _BatchNorm) and conv is not None:
            fused = _put(fused, conv_name, _fold(conv, part))
            fused = _put(fused, name, nn.Identity())
        if not any(part.children()):
            conv_name, conv = name, part if isinstance(part, nn.Conv2d) else None
    for parameter in fused.parameters():  # not the buffers: images are normalised in fp32
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    return fused.requires_grad_(False)


def _fold(conv: nn.Module, norm: nn.Module) -> Any:
    """Returns a conv with a bias that does what conv and BatchNorm do."""
    return fuse_conv_bn_eval(conv, norm)  # type: ignore[type-var, arg-type]


def _put(module: nn.Module, name: str, part: nn.Module) -> Any:
    """Returns the module with one of its parts replaced; the part itself, if the name is empty."""
    if not name:
        return part
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, part)
    return module


class FusedSelfAttention(nn.Module):
    """Returns what a `SelfAttentionBlock2D` in eval mode returns; made by `fuse_for_inference`.

    Args:
        block: The trained block.
    """

    def __init__(self, block: SelfAttentionBlock2D) -> None:
        super().__init__()
        self.sdpa = block.sdpa
        self.negative_slope = float(getattr(block.f_query[2], "negative_slope", 0.0))
        # These feed one regrouping: their biases come after its padding, as BatchNorm did.
        self.query = _fold(block.f_query[0], block.f_query[1])
        self.key = _fold(block.f_key[0], block.f_key[1])
        self.query2 = _fold(block.f_query[3], block.f_query[4])
        self.key2 = _fold(block.f_key[3], block.f_key[4])
        # W (A (V x + b)) = A (W V x) + W b, because each row of the affinity A sums to one. Not
        # where W widens the value: A would be multiplied with more channels, at a higher cost.
        out = _fold(block.W[0], block.W[1])
        value, weight = block.f_value, out.weight.flatten(1)
        if value.out_channels >= out.out_channels:
            self.value_weight = nn.Parameter((weight @ value.weight.flatten(1))[..., None, None])
            self.out_weight = None
        else:
            self.value_weight = nn.Parameter(value.weight)
            self.out_weight = out.weight
        bias = out.bias if value.bias is None else out.bias + weight @ value.bias
        self.out_bias = nn.Parameter(bias)

    def forward(
        self,
        x: Tensor,
        regroup: Callable[[Tensor], Tensor] | None = None,
        along: Along = "all",
        mask: Tensor | None = None,
    ) -> Tensor:
        """Returns the attended map, or token grid; see `SelfAttentionBlock2D`."""
        query, key = F.conv2d(x, self.query.weight), F.conv2d(x, self.key.weight)
        value = F.conv2d(x, self.value_weight)
        if regroup is not None:
            query, key, value = regroup(query), regroup(key), regroup(value)
        query = self.query2(self._activate(query, self.query.bias))
        key = self.key2(self._activate(key, self.key.bias))
        query, key = self._activate(query), self._activate(key)
        out = attend_along(query, key, value, along, mask, self.sdpa)
        out = out if self.out_weight is None else F.conv2d(out, self.out_weight)
        out = self._activate(out, self.out_bias)
        return out.transpose(2, 3) if along == "places" else out

    def _activate(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns x, (N, C, ...) and changed in place, with a bias of (C,) added and activated."""
        # In the dtype of x: under autocast, adding another one takes ten times as long.
        x = x if bias is None else x.add_(bias[:, None, None].to(x.dtype))
        return F.leaky_relu_(x, self.negative_slope) if self.negative_slope else x.relu_()
