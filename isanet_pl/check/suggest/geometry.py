"""What a network should see of a data set's images: scale, crop and windows, from numbers alone."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from isanet_pl.check.fingerprint import Fingerprint, SplitFingerprint
from isanet_pl.check.suggest.machine import Machine
from isanet_pl.errors import InputError
from isanet_pl.inference import fit_scale

Size = tuple[int, int]
Sizes = npt.NDArray[np.float64]

STRIDE = 8
"""Image pixels per position of the feature map."""
SHORT_EDGE = 256
"""Smaller images are enlarged to this, at most four times: objects must span a few positions."""
WHOLE_CROPS = 4
"""Images of at most the area of so many crops are evaluated at once, larger ones by windows:
mmsegmentation trains on a quarter of a Cityscapes image and evaluates all of it."""
SMALLEST_CROP = 128
"""Edge of the smallest crop that makes sense, 16 positions of the feature map."""
FEWEST_CROPS = 2
"""On a device at a time: BatchNorm learns nothing from less."""


@dataclass(frozen=True)
class Geometry:
    """What the network sees of an image.

    Attributes:
        base_size: (long, short) edge of images at scale 1; None: their own.
        image_size: (H, W) of the median training image at scale 1.
        crop_size: (H, W) of crops.
        scale_range: Of the random scale.
        window: (dh, dw), the down factor.
        slide: Whether images to evaluate are too large for one look.
        largest: (H, W) of the largest image to evaluate.
    """

    base_size: Size | None
    image_size: Size
    crop_size: Size
    scale_range: tuple[float, float]
    window: Size
    slide: bool
    largest: Size

    @property
    def crop_pixels(self) -> int:
        """Returns the area of a crop."""
        return self.crop_size[0] * self.crop_size[1]

    @property
    def feature_size(self) -> Size:
        """Returns (H, W) of the crop's feature map."""
        return math.ceil(self.crop_size[0] / STRIDE), math.ceil(self.crop_size[1] / STRIDE)


def plan_geometry(fingerprint: Fingerprint, machine: Machine) -> Geometry:
    """Returns what the network should see of the images.

    Raises:
        InputError: The memory does not suffice for two small crops.
    """
    num_classes = len(fingerprint.class_names)
    most_pixels = min(machine.recipe.crop_pixels, machine.room(num_classes) // FEWEST_CROPS)
    if most_pixels < SMALLEST_CROP**2:
        raise InputError(
            f"{machine.memory / 1e9:.1f} GB of memory are too little to train {num_classes} "
            f"classes on {machine.device}: not even {FEWEST_CROPS} crops of {SMALLEST_CROP} pixels "
            "a side fit; was --memory given in GB?"
        )
    splits = fingerprint.splits
    train = list_sizes([splits["train"]])
    judged = list_sizes(facts for name, facts in splits.items() if name != "train")
    base_size = choose_base_size(train, most_pixels, machine.recipe.image_crops)
    image_h, image_w = np.median(scale(train, base_size), axis=0)
    crop_size = choose_crop_size(scale(train, base_size), most_pixels)
    crop_pixels = crop_size[0] * crop_size[1]
    # At the smallest scale an image still fills half of a crop, within the range of the field.
    low = min(0.75, max(0.5, math.sqrt(0.5 * crop_pixels / (image_h * image_w))))
    largest = judged[judged.prod(axis=1).argmax()]
    return Geometry(
        base_size=base_size,
        image_size=(round(image_h), round(image_w)),
        crop_size=crop_size,
        scale_range=(round(20 * low) / 20, 2.0),
        window=choose_window(math.ceil(crop_size[0] / STRIDE), math.ceil(crop_size[1] / STRIDE)),
        slide=bool(scale(judged, base_size).prod(axis=1).max() > 1.1 * WHOLE_CROPS * crop_pixels),
        largest=(int(largest[0]), int(largest[1])),
    )


def list_sizes(splits: Iterable[SplitFingerprint]) -> Sizes:
    """Returns (H, W) of every image, (N, 2)."""
    counted = np.array([size for split in splits for size in split.sizes], dtype=np.int64)
    return np.repeat(counted[:, :2], counted[:, 2], axis=0).astype(np.float64)


def scale(sizes: Sizes, base_size: Size | None) -> Sizes:
    """Returns the sizes (N, 2) that images have at scale 1."""
    distinct, where = np.unique(sizes, axis=0, return_inverse=True)
    factors = np.array([fit_scale(size, base_size) for size in distinct.tolist()])
    scaled: Sizes = sizes * factors[where.reshape(-1), None]
    return scaled


def choose_base_size(sizes: Sizes, most_pixels: int, image_crops: int) -> Size | None:
    """Returns the (long, short) edge to scale images to, None where they can stay as they are.

    They cannot where they are tiny, where a crop would show too little of the scene, or where the
    same thing is several times as large in one image as in another, which different sizes suggest.

    Args:
        sizes: (N, 2) of the training images.
        most_pixels: Of a crop.
        image_crops: Area of an image, in crops, that is not too large.
    """
    longs, shorts = sizes.max(axis=1), sizes.min(axis=1)
    long, short = float(np.median(longs)), float(np.median(shorts))
    varied = longs.max() > 2 * long or longs.min() < long / 2
    # Images of all sizes are photographs, whose details are not worth windows.
    area = (WHOLE_CROPS if varied else image_crops) * most_pixels
    wanted = min(max(short, min(SHORT_EDGE, 4 * short)), math.sqrt(area * short / long))
    # Hardly another size is not worth the interpolation.
    if not varied and 0.9 < wanted / short < 1.1:
        return None
    edge = _multiple(wanted, up=wanted > short)
    # Where shapes vary, as wide a limit as mmsegmentation's (2048, 512): the short edge decides for
    # all but extreme ones.
    return (4 * edge if varied else _multiple(wanted * long / short, up=True)), edge


def choose_crop_size(sizes: Sizes, most_pixels: int) -> Size:
    """Returns the (H, W) of crops: the whole image if it fits, of its shape if all have one.

    Args:
        sizes: (N, 2) of the training images at scale 1.
        most_pixels: Of a crop.
    """
    low, high = np.quantile(sizes[:, 1] / sizes[:, 0], (0.05, 0.95))
    if high < 1.1 * low:
        height, width = np.median(sizes, axis=0).tolist()
    else:
        height = width = float(np.median(sizes.min(axis=1)))
    factor = min(1.0, math.sqrt(most_pixels / (height * width)))
    whole = factor == 1.0
    return _multiple(factor * height, up=whole), _multiple(factor * width, up=whole)


def _multiple(length: float, up: bool) -> int:
    """Returns a multiple of the stride, at least one."""
    positions = length / STRIDE
    return STRIDE * max(1, math.ceil(positions - 0.05) if up else math.floor(positions))


def attention_cost(height: int, width: int, window: Size) -> int:
    """Returns how many pairs of positions attend to each other in ISA, padding included.

    In the long range each of N positions sees the N / (dh dw) windows, in the short range the
    dh dw places of its window; N counts the padding of `isanet_pl.models.attention.TokenGrid`.
    """
    windows = math.ceil(height / window[0]) * math.ceil(width / window[1])
    places = window[0] * window[1]
    return windows * places * (windows + places)


def choose_window(height: int, width: int) -> Size:
    """Returns the (dh, dw) that costs a feature map least, the squarest among equals.

    Windows are at most twice as long as wide. A strip as long as the crop would often be cheaper
    still, for it needs no padding there; but it is no neighbourhood, and on an image of another
    size it would be padding for the most part.
    """
    pairs = [
        (dh, dw)
        for dh in range(1, height + 1)
        for dw in range(1, width + 1)
        if max(dh, dw) <= 2 * min(dh, dw)
    ]
    return min(pairs, key=lambda pair: (attention_cost(height, width, pair), max(pair) / min(pair)))
