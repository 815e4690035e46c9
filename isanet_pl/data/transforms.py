"""Training transforms on uint8 tensors: one random window of the image, flipped, recoloured."""

from collections.abc import Sequence

import torch
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from isanet_pl.data.files import IGNORE

# The ImageNet mean, so that padding is near zero once the image is normalised.
IMAGE_FILL = [124.0, 116.0, 104.0]


class RandomScaleCrop:
    """Returns a random crop of the randomly scaled image, and the same crop of its mask.

    The window is cut out of the source image and only that is resized, which gives the
    distribution of scale and position of resize-then-crop without resizing the rest.

    Args:
        crop_size: (H, W) of the result.
        scale_range: Scale factors are uniform between the two.

    Raises:
        ValueError: A size or factor is not positive, or the range is the wrong way round.
    """

    def __init__(self, crop_size: Sequence[int], scale_range: Sequence[float]) -> None:
        if len(crop_size) != 2 or min(crop_size) < 1:
            raise ValueError(f"crop_size must be two positive integers, got {tuple(crop_size)}")
        if len(scale_range) != 2 or not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(f"scale_range must be 0 < low <= high, got {tuple(scale_range)}")
        self.crop_size = (crop_size[0], crop_size[1])
        self.scale_range = (scale_range[0], scale_range[1])

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns uint8 (3, crop H, crop W) and (crop H, crop W).

        Args:
            image: (3, H, W) uint8.
            mask: (H, W) uint8; where the window leaves the image, the result is 255.
        """
        low, high = self.scale_range
        scale = low + (high - low) * float(torch.rand(()))
        (top, source_h, out_h), (left, source_w, out_w) = (
            self._window(source, crop, scale)
            for source, crop in zip(image.shape[1:], self.crop_size, strict=True)
        )
        image = TF.resized_crop(
            image, top, left, source_h, source_w, [out_h, out_w], antialias=True
        )
        mask = TF.resized_crop(
            mask[None],
            top,
            left,
            source_h,
            source_w,
            [out_h, out_w],
            interpolation=InterpolationMode.NEAREST_EXACT,
        )
        # Pad on the right and at the bottom, as mmsegmentation does.
        padding = [0, 0, self.crop_size[1] - out_w, self.crop_size[0] - out_h]
        if any(padding):
            image = TF.pad(image, padding, fill=IMAGE_FILL)
            mask = TF.pad(mask, padding, fill=IGNORE)
        return image, mask[0]

    @staticmethod
    def _window(source: int, crop: int, scale: float) -> tuple[int, int, int]:
        """Returns start and length in the source, and length in the result, of one axis."""
        if round(source * scale) <= crop:  # all of it fits
            return 0, source, max(1, round(source * scale))
        length = min(source, max(1, round(crop / scale)))
        return int(torch.randint(source - length + 1, ())), length, crop


class TrainTransform:
    """Returns an augmented (image, mask): scale, crop, flip, photometric distortion.

    Args:
        crop_size: (H, W) of the result.
        scale_range: See `RandomScaleCrop`.
        flip: Mirror left and right with probability 0.5.
        photometric: Change brightness, contrast, saturation and hue, each with probability 0.5, in
            the ranges of mmsegmentation's PhotoMetricDistortion.
        mirrored_classes: Pairs of classes that a flip turns into each other.
    """

    def __init__(
        self,
        crop_size: Sequence[int],
        scale_range: Sequence[float],
        flip: bool = True,
        photometric: bool = True,
        mirrored_classes: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.scale_crop = RandomScaleCrop(crop_size, scale_range)
        self.flip = flip
        self.mirrored = torch.arange(256, dtype=torch.uint8)  # class of each class in a mirror
        for left, right in mirrored_classes:
            self.mirrored[left], self.mirrored[right] = right, left
        self.swaps_classes = len(mirrored_classes) > 0
        # torchvision's own RandomPhotometricDistort would permute the colour channels as well.
        changes = (
            v2.ColorJitter(brightness=32 / 255),
            v2.ColorJitter(contrast=0.5),
            v2.ColorJitter(saturation=0.5),
            v2.ColorJitter(hue=18 / 360),
        )
        self.photometric = (
            v2.Compose([v2.RandomApply([change]) for change in changes]) if photometric else None
        )

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns uint8 (3, crop H, crop W) and (crop H, crop W); see `RandomScaleCrop`."""
        image, mask = self.scale_crop(image, mask)
        if self.flip and float(torch.rand(())) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
            mask = self.mirrored[mask.long()] if self.swaps_classes else mask
        if self.photometric is not None:
            image = self.photometric(image)
        return image, mask
