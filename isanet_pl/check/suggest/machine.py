"""What suits a machine: the network and what it needs, measured once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from isanet_pl.errors import InputError
from isanet_pl.hardware import precision_in_hardware

Device = Literal["cpu", "cuda"]

MEMORY_SHARE = 0.85
"""Of the memory; the rest is for other processes and for what lies between allocations."""


SINGLE_PRECISION_MEMORY = 1.5
"""How much more a pixel takes in fp32, measured for the CPU's recipe."""


@dataclass(frozen=True)
class Recipe:
    """What suits a device: the network with what it needs, and the length of a run.

    Attributes:
        network: Arguments of ISANet.
        pixel_bytes: Memory that a training step takes for each pixel of its crops, in bf16.
        class_bytes: The same for each pixel and class.
        fixed_bytes: Weights, copies, gradients, optimiser; on a GPU also what CUDA takes.
        crop_pixels: Area of the largest crop.
        image_crops: Area that images may have, in such crops; what is more is scaled down.
        epochs: Times that each image is seen, within the bounds below.
        steps: Fewest and most optimiser steps.
        most_epochs: How often the fewest steps may see each part of an image.
    """

    network: Mapping[str, Any]
    pixel_bytes: float
    class_bytes: float
    fixed_bytes: float
    crop_pixels: int
    image_crops: int
    epochs: int
    steps: tuple[int, int]
    most_epochs: int


# The memory was measured on a CPU (bf16-mixed, torch 2.15): peak of the process over two training
# steps, less the weights, with crops of 320x416 and 512x512 and 11, 19 and 151 classes. It came to
# 820 + 20 K bytes a pixel (resnet18, direct) and 2470 + 19 K (resnet50c, reduced). The memory that
# mmsegmentation published (V100, fp32) comes to 4600 + 23 K: twice the first, as it should.
# The lengths are those of configs/camvid_*.yaml and of mmsegmentation's schedules: 60 epochs (VOC,
# 40k) to 215 (Cityscapes, 80k).
RECIPES: dict[Device, Recipe] = {
    "cpu": Recipe(
        network={
            "form": "direct",
            "backbone": "resnet18",
            "pretrained": True,
            "classify_before_upsampling": True,
            "key_channels": 128,
            "value_channels": 256,
            "out_channels": 256,
            "dropout": 0.1,
            "aux_head": True,
            "aux_channels": 128,
        },
        pixel_bytes=850,
        class_bytes=23,
        fixed_bytes=18 * 13e6,
        crop_pixels=150_000,
        image_crops=4,  # evaluation by windows would take longer than the training
        epochs=30,
        steps=(600, 3000),
        most_epochs=200,
    ),
    "cuda": Recipe(
        network={"form": "reduced", "backbone": "resnet50c", "pretrained": True},
        pixel_bytes=2500,
        class_bytes=23,
        fixed_bytes=14 * 38e6 + 1e9,
        crop_pixels=512 * 1024,
        image_crops=16,
        epochs=100,
        steps=(4000, 80_000),
        most_epochs=400,
    ),
}


@dataclass(frozen=True)
class Machine:
    """What a run is for.

    Attributes:
        device: Its kind.
        memory: Bytes of one device, or of the computer.
        num_devices: How many GPUs there are.
        precision: The one to train in.
    """

    device: Device
    memory: float
    num_devices: int = 1
    precision: str = "bf16-mixed"

    @property
    def recipe(self) -> Recipe:
        """Returns what suits the device."""
        return RECIPES[self.device]

    def __str__(self) -> str:
        count = f"{self.num_devices} GPUs" if self.num_devices > 1 else "a GPU"
        return f"{'a CPU' if self.device == 'cpu' else count} with {self.memory / 1e9:.0f} GB"

    def room(self, num_classes: int) -> int:
        """Returns the pixels that the crops of a batch on one device may have together."""
        free = MEMORY_SHARE * self.memory - self.recipe.fixed_bytes
        return int(free / self._pixel_bytes(num_classes))

    def step_bytes(self, num_classes: int, pixels: int) -> float:
        """Returns the memory that a training step takes for so many pixels of crops."""
        return self.recipe.fixed_bytes + pixels * self._pixel_bytes(num_classes)

    def _pixel_bytes(self, num_classes: int) -> float:
        factor = SINGLE_PRECISION_MEMORY if self.precision == "32-true" else 1
        return factor * self.recipe.pixel_bytes + num_classes * self.recipe.class_bytes


def find_machine(device: Device | None = None, gigabytes: float | None = None) -> Machine:
    """Returns this machine, or another one that is described.

    Args:
        device: Its kind; None: cuda where there is one.
        gigabytes: Memory of one device, or of the computer; None: what it has here.

    Raises:
        InputError: The memory of a GPU that is not here was not given.
    """
    here = torch.cuda.is_available()
    device = device or ("cuda" if here else "cpu")
    if gigabytes is not None:
        memory = 1e9 * gigabytes
    elif device == "cpu":
        memory = _memory()
    elif here:
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        raise InputError("no GPU was found: say how many GB yours has with --memory")
    if device == "cuda" and not here:
        return Machine(device, memory)
    count = torch.cuda.device_count() if device == "cuda" else 1
    return Machine(device, memory, count, precision_in_hardware("bf16-mixed", torch.device(device)))


def _memory() -> float:
    """Returns the bytes that this process may have, in a container (cgroup v2) its limit."""
    limits = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        limits.append(float(text))
    return min(limits)
