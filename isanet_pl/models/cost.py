"""What a network costs."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_gmacs(network: nn.Module, height: int, width: int) -> float:
    """Returns the arithmetic of segmenting one image, in billions of multiply-adds.

    Convs and matrix products count, those of the attention too, as the papers do; no number is
    computed for it. The network is taken as it is, not folded, without its auxiliary head.

    Args:
        network: Takes images (N, 3, H, W); an ISANet.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
    """
    shapes = copy.deepcopy(network).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shapes(torch.empty(1, 3, height, width, device="meta"))
    return float(counter.get_total_flops() / 2e9)
