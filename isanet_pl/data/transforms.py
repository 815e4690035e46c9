"""Training transforms on uint8 tensors: one random window of image and mask, perhaps mirrored."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from isanet_pl.data.files import IGNORE
from isanet_pl.errors import InputError
from isanet_pl.inference import fit_scale

# The ImageNet mean, so that padding is near zero once the image is normalised.
IMAGE_FILL = [124.0, 116.0, 104.0]


class Window(NamedTuple):
    """A part of an image, and what becomes of it; in pixels."""

    top: int
    left: int
    height: int
    width: int
    out_height: int
    out_width: int
    mirrored: bool


class TrainTransform:
    """Returns a random crop of the randomly scaled image, perhaps mirrored, with its mask.

    The window is cut out of the source image and only that is resized, which gives the
    distribution of scale and position of resize-then-crop without resizing the rest. It is drawn
    by looking at the mask alone, so that no more of the image need be decoded than it covers.

    Args:
        crop_size: (H, W) of the result.
        scale_range: Scale factors are uniform between the two.
        base_size: (long, short) edge of an image at scale 1, see `fit_scale`; None: its own.
        cat_max_ratio: Try up to ten other windows while one class has this share of a window's
            labelled pixels, or more; 1 takes every window. mmsegmentation's recipes have 0.75.
        flip: Mirror left and right with probability 0.5.
        mirrored_classes: Pairs of classes that a flip turns into each other.

    Raises:
        InputError: A size or factor is not positive, or the range is the wrong way round.
    """

    def __init__(
        self,
        crop_size: Sequence[int],
        scale_range: Sequence[float],
        base_size: Sequence[int] | None = None,
        cat_max_ratio: float = 1.0,
        flip: bool = False,
        mirrored_classes: Sequence[tuple[int, int]] = (),
    ) -> None:
        if len(crop_size) != 2 or min(crop_size) < 1:
            raise InputError(f"crop_size must be two positive integers, got {tuple(crop_size)}")
        if len(scale_range) != 2 or not 0 < scale_range[0] <= scale_range[1]:
            raise InputError(f"scale_range must be 0 < low <= high, got {tuple(scale_range)}")
        if base_size is not None and (len(base_size) != 2 or min(base_size) < 1):
            raise InputError(f"base_size must be two positive integers, got {tuple(base_size)}")
        if not 0 < cat_max_ratio <= 1:
            raise InputError(f"cat_max_ratio must be above 0 and at most 1, got {cat_max_ratio}")
        self.crop_size = (crop_size[0], crop_size[1])
        self.scale_range = (scale_range[0], scale_range[1])
        self.base_size = base_size
        self.cat_max_ratio = cat_max_ratio
        self.flip = flip
        self.mirrored = torch.arange(256, dtype=torch.uint8)  # class of each class in a mirror
        for left, right in mirrored_classes:
            self.mirrored[left], self.mirrored[right] = right, left
        self.swaps_classes = len(mirrored_classes) > 0

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns uint8 (3, crop H, crop W) and (crop H, crop W).

        Args:
            image: (3, H, W) uint8.
            mask: (H, W) uint8; where the window leaves the image, the result is 255.
        """
        return self.cut(image, mask, self.draw(mask))

    def draw(self, mask: Tensor) -> Window:
        """Returns a random window of an image with this mask, uint8 (H, W)."""
        low, high = self.scale_range
        scale = low + (high - low) * float(torch.rand(()))
        scale *= fit_scale(mask.shape, self.base_size)
        for _ in range(11):
            (top, height, out_height), (left, width, out_width) = (
                self._axis(source, crop, scale)
                for source, crop in zip(mask.shape, self.crop_size, strict=True)
            )
            if self._is_varied(mask[top : top + height, left : left + width]):
                break
        mirrored = self.flip and float(torch.rand(())) < 0.5
        return Window(top, left, height, width, out_height, out_width, mirrored)

    def cut(self, image: Tensor, mask: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Returns the window, resized, perhaps mirrored, and padded to the crop's size.

        Args:
            image: (3, h, W) uint8, at least the rows down to the window's last.
            mask: (H, W) uint8.
            window: As `draw` returns it.
        """
        place = window[:4]
        size = [window.out_height, window.out_width]
        # Shrunk without antialiasing, as evaluation does it, and mmsegmentation both.
        image = TF.resized_crop(image, *place, size, antialias=False)
        mask = TF.resized_crop(mask[None], *place, size, InterpolationMode.NEAREST_EXACT)
        if window.mirrored:
            image, mask = image.flip(-1), mask.flip(-1)
            mask = self.mirrored[mask.long()] if self.swaps_classes else mask
        # Pad on the right and at the bottom, as mmsegmentation does, and evaluation.
        padding = [0, 0, self.crop_size[1] - size[1], self.crop_size[0] - size[0]]
        if any(padding):
            image = TF.pad(image, padding, fill=IMAGE_FILL)
            mask = TF.pad(mask, padding, fill=IGNORE)
        return image, mask[0]

    def _is_varied(self, mask: Tensor) -> bool:
        """Returns whether no class has too large a share of a window."""
        if self.cat_max_ratio == 1:
            return True
        # One pixel in 16 tells a share well enough, and costs nothing beside the rest.
        counts = torch.bincount(mask[::4, ::4].flatten(), minlength=IGNORE + 1)[:IGNORE]
        return int(counts.max()) < self.cat_max_ratio * int(counts.sum())

    @staticmethod
    def _axis(source: int, crop: int, scale: float) -> tuple[int, int, int]:
        """Returns start and length in the source, and length in the result, of one axis."""
        if round(source * scale) <= crop:  # all of it fits
            return 0, source, max(1, round(source * scale))
        length = min(source, max(1, round(crop / scale)))
        return int(torch.randint(source - length + 1, ())), length, crop
