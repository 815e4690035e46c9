"""From PIL images to RGB pixels, one way for files and for Python callers."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor


def rgb_pixels(image: Image.Image) -> Tensor:
    """Returns a PIL image as uint8 (3, H, W) RGB.

    Raises:
        ValueError: Its numbers are no brightness: floating point, or grey values of more than 8
            bits of which only the lowest 8 are used.
    """
    deep = np.asarray(image) if image.mode.startswith("I") else None  # 16 or 32 bits
    if image.mode == "F" or (deep is not None and 0 < deep.max() < 256):
        raise ValueError(
            f"pixels of mode {image.mode} do not say what is white: convert the image to 8 bits a "
            "channel, or to grey values that use all 16 bits"
        )
    if deep is not None:  # 16 bits: keep the upper eight, convert() would clip
        grey = (deep.astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return torch.from_numpy(grey).expand(3, -1, -1).contiguous()
    pixels: Tensor = pil_to_tensor(image.convert("RGB"))
    return pixels
