"""Photometric distortion: its factors are drawn with the sample, its work is done on the device."""

from typing import NamedTuple

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor


class Jitter(NamedTuple):
    """How to change the colours of one image; the defaults change nothing."""

    brightness: float = 0.0
    """Added to values of 0..255."""
    contrast: float = 1.0
    """Multiplies them."""
    contrast_last: bool = False
    """Whether contrast follows saturation and hue."""
    saturation: float = 1.0
    """Multiplies the S of HSV."""
    hue: float = 0.0
    """Added to the H of HSV, in turns of the colour circle."""
    height: int | None = None
    """Rows from the top that are the image; what is below them is padding. None: all."""
    width: int | None = None
    """Columns from the left that are the image; None: all."""


def draw_jitter() -> Jitter:
    """Returns random changes, each left out with probability 0.5.

    The ranges and the order are those of mmsegmentation's `PhotoMetricDistortion`: brightness
    within 32 of 255, contrast and saturation 0.5 to 1.5, hue within a tenth of a turn.
    """
    amounts = torch.rand(4).mul(2).sub(1).tolist()  # -1..1
    *used, contrast_last = torch.rand(5).lt(0.5).tolist()
    brightness, contrast, saturation, hue = (
        amount if use else 0.0 for amount, use in zip(amounts, used, strict=True)
    )
    return Jitter(
        32 * brightness, 1 + 0.5 * contrast, contrast_last, 1 + 0.5 * saturation, 0.1 * hue
    )


def distort(image: Tensor, jitter: Jitter) -> Tensor:
    """Returns the image with its colours changed, uint8 (3, H, W).

    Args:
        image: (3, H, W) uint8 RGB, on any device, without padding.
        jitter: What to change; see there.
    """
    x = image.float()
    if jitter.brightness:
        x = x.add(jitter.brightness).clamp_(0, 255)
    if not jitter.contrast_last:
        x = _scale(x, jitter.contrast)
    if jitter.saturation != 1:
        x = _saturate(x, jitter.saturation)
    if jitter.hue:
        x = TF.adjust_hue(x / 255, jitter.hue) * 255
    if jitter.contrast_last:
        x = _scale(x, jitter.contrast)
    return x.round_().to(torch.uint8)


def _scale(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x.mul(factor).clamp_(0, 255)


def _saturate(x: Tensor, factor: float) -> Tensor:
    """Returns values 0..255 with the S of HSV times the factor, at most 1; H and V stay."""
    value, least = x.amax(dim=0), x.amin(dim=0)
    # S = (value - least) / value; it reaches 1 when the least channel reaches 0.
    most = value / (value - least).clamp_(min=1e-6)
    return value - (value - x) * most.clamp_(max=factor)
