"""How long and in which batches to train."""

import math
from dataclasses import dataclass

from isanet_pl.check.fingerprint import Fingerprint
from isanet_pl.check.suggest.geometry import Geometry, list_sizes, scale
from isanet_pl.check.suggest.machine import Machine, Recipe

SMALL_CROP = 300_000
"""Pixels of a crop up to which a step of mmsegmentation's has 16 of them (ADE20K, VOC); larger
ones come in eights (Cityscapes), with the same learning rate."""
OVERLAP = 2.25
"""How often windows at a stride of two thirds see a pixel."""
MOST_VALIDATIONS = 10
VALIDATION_SHARE = 0.25
"""Validations may take this share of the work of training, of which a third is the forward pass."""


@dataclass(frozen=True)
class Schedule:
    """How long and in which batches to train.

    Attributes:
        num_images: Training images that can be read.
        num_devices: Devices to use.
        batch_size: Crops for each device at a time.
        accumulate: Batches for each optimiser step.
        reference: Images of a step that the recipe's learning rate is for.
        step_bytes: Memory that a training step takes on a device.
        num_steps: Optimiser steps.
        num_validations: Spread evenly over them.
    """

    num_images: int
    num_devices: int
    batch_size: int
    accumulate: int
    reference: int
    step_bytes: float
    num_steps: int
    num_validations: int

    @property
    def step_images(self) -> int:
        """Returns the images of an optimiser step."""
        return self.num_devices * self.batch_size * self.accumulate

    @property
    def epochs(self) -> float:
        """Returns how often each image is seen."""
        return self.num_steps * self.step_images / self.num_images


def plan_schedule(fingerprint: Fingerprint, machine: Machine, geometry: Geometry) -> Schedule:
    """Returns how long and in which batches to train."""
    recipe, num_classes = machine.recipe, len(fingerprint.class_names)
    num_images = sum(images for *_, images in fingerprint.splits["train"].sizes)
    reference = 16 if machine.device == "cuda" and geometry.crop_pixels <= SMALL_CROP else 8
    most = max(1, machine.room(num_classes) // geometry.crop_pixels)
    num_devices, batch_size, accumulate = choose_batch(
        num_images, reference, machine.num_devices, most
    )
    step_images = num_devices * batch_size * accumulate
    # Of an image larger than the crop, each epoch sees another part.
    parts = max(1.0, math.prod(geometry.image_size) / geometry.crop_pixels)
    steps = choose_steps(recipe, num_images, step_images, parts)
    judged = scale(list_sizes([fingerprint.splits["val"]]), geometry.base_size)
    seen = judged.prod(axis=1).sum() * (OVERLAP if geometry.slide else 1)
    num_validations = choose_validations(seen, steps * step_images * geometry.crop_pixels)
    return Schedule(
        num_images=num_images,
        num_devices=num_devices,
        batch_size=batch_size,
        accumulate=accumulate,
        reference=reference,
        step_bytes=machine.step_bytes(num_classes, batch_size * geometry.crop_pixels),
        # A multiple, so that the last validation is the end.
        num_steps=num_validations * max(1, round(steps / num_validations)),
        num_validations=num_validations,
    )


def choose_batch(num_images: int, reference: int, devices: int, most: int) -> tuple[int, int, int]:
    """Returns how many devices to use, crops for each at a time, and batches for a step.

    A step has `reference` crops, or fewer where the data would give less than four steps an epoch.

    Args:
        num_images: Training images.
        reference: Images of a step.
        devices: How many there are.
        most: Crops that fit into one.
    """
    wanted = min(reference, num_images, max(2, num_images // 4))
    step = 2 ** int(math.log2(wanted))  # a power of two can be shared among devices and batches
    used = 2 ** int(math.log2(min(devices, max(1, step // 2))))
    batch = min(step // used, 2 ** int(math.log2(most)))
    return used, batch, step // (used * batch)


def choose_steps(recipe: Recipe, num_images: int, step_images: int, parts: float) -> float:
    """Returns the optimiser steps.

    Args:
        recipe: Says how many epochs, and how few and many steps.
        num_images: Training images.
        step_images: Of an optimiser step.
        parts: How often an image must be seen until all of it was.
    """
    low, high = recipe.steps
    wanted = min(max(recipe.epochs * num_images / step_images, low), high)
    return min(wanted, recipe.most_epochs * parts * num_images / step_images)


def choose_validations(pixels: float, trained_pixels: float) -> int:
    """Returns how many validations a run can afford.

    Args:
        pixels: Of one validation.
        trained_pixels: Of all crops of the run, which go forward and, twice as costly, backward.
    """
    affordable = VALIDATION_SHARE * 3 * trained_pixels / pixels
    return max(2, min(MOST_VALIDATIONS, int(affordable)))
