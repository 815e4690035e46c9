"""A made-up task that only long-range context can solve: grey balls named after a far lamp."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from isanet_pl.data.datamodule import SegmentationDataModule, Split
from isanet_pl.data.dataset import Sample
from isanet_pl.errors import InputError

CELL = 80
"""Pixels of a cell; the scene is a lattice of cells."""
LAMP_INSET, LAMP_RADIUS = 8, 8
BALL_INSET, BALL_SHIFT, BALL_RADIUS = 19, 2, (8, 11)
Array = npt.NDArray[np.float32]


class SyntheticDataset(Dataset[Sample]):
    """Scenes of grey balls on a soft background with one coloured lamp in a corner.

    The class of every ball is the colour of the lamp around its white core; nothing near a ball
    tells it. So that neither stage of ISA can do it alone, the scene keeps to a lattice of 80-pixel
    cells: the lamp hugs the outer corner of a corner cell, balls sit in the opposite corner of the
    other cells. With windows of 80 pixels the long range does not lead from the lamp to a ball
    (their places in the window differ), nor does the short range (their windows differ), even where
    both are blurred by a backbone that sees 21 pixels far, as a ResNet-18 up to its first stage
    does, and by the head. A backbone that sees further may solve the task by itself.

    Args:
        num_images: Length.
        cells: Cells along each side of the square image.
        palette: Background and lamp colours, RGB 0..255.
        seed: Sequence of integers; scene i depends on it and on i alone.
    """

    def __init__(
        self, num_images: int, cells: int, palette: npt.NDArray[np.uint8], seed: tuple[int, ...]
    ) -> None:
        self.num_images = num_images
        self.cells = cells
        self.palette = palette
        self.seed = seed
        # Weights of a smooth curve through four points, one row for each pixel.
        t = np.linspace(0, 1, cells * CELL, dtype=np.float32)
        self.blend = np.stack(
            [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1
        )

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        rng = np.random.default_rng((*self.seed, index))
        image = self._background(rng)
        mask = np.zeros(image.shape[:2], dtype=np.uint8)
        colour = int(rng.integers(1, len(self.palette)))
        corner = rng.integers(0, 2, size=2)  # top or bottom, left or right
        lamp = np.where(corner == 0, LAMP_INSET, self.cells * CELL - LAMP_INSET).astype(np.float32)
        corner_cell = tuple(corner * (self.cells - 1))
        free = [c for c in np.ndindex(self.cells, self.cells) if c != corner_cell]
        place = np.where(corner == 0, CELL - BALL_INSET, BALL_INSET)
        for choice in rng.permutation(len(free))[: rng.integers(3, 6)]:
            shift = rng.uniform(-BALL_SHIFT, BALL_SHIFT, size=2)
            centre = (np.array(free[choice]) * CELL + place + shift).astype(np.float32)
            rows, columns, ball = self._draw_ball(rng, image, centre, lamp)
            mask[rows, columns][ball] = colour
        self._draw_lamp(image, lamp, self.palette[colour].astype(np.float32))
        pixels = image.clip(0, 255).astype(np.uint8).transpose(2, 0, 1).copy()
        return {
            "image": torch.from_numpy(pixels),
            "mask": torch.from_numpy(mask),
            "name": f"synthetic_{'-'.join(map(str, self.seed))}_{index:05d}",
        }

    def _background(self, rng: np.random.Generator) -> Array:
        """Returns soft, dim colours with a little grain, (H, W, 3)."""
        coarse = rng.uniform(20, 180, size=(4, 4, 3)).astype(np.float32)
        coarse = 0.4 * coarse.mean(axis=2, keepdims=True) + 0.6 * coarse
        soft = np.einsum("hi,wj,ijc->hwc", self.blend, self.blend, coarse, optimize=True)
        grain = rng.standard_normal((*soft.shape[:2], 1), dtype=np.float32)
        scene: Array = soft + 4 * grain
        return scene

    @staticmethod
    def _around(centre: Array, reach: float) -> tuple[slice, slice, Array, Array]:
        """Returns the rows and columns around a point, and their offsets from it in pixels."""
        first = np.maximum(np.floor(centre - reach), 0).astype(int)
        last = np.ceil(centre + reach).astype(int)
        rows, columns = slice(first[0], last[0]), slice(first[1], last[1])
        y = np.arange(first[0], last[0], dtype=np.float32)[:, None] + 0.5 - centre[0]
        x = np.arange(first[1], last[1], dtype=np.float32)[None, :] + 0.5 - centre[1]
        return rows, columns, y, x

    def _draw_ball(
        self, rng: np.random.Generator, image: Array, centre: Array, lamp: Array
    ) -> tuple[slice, slice, npt.NDArray[np.bool_]]:
        """Draws a grey sphere lit from the lamp; returns rows, columns and which pixels of them."""
        radius = rng.uniform(*BALL_RADIUS)
        rows, columns, y, x = self._around(centre, radius)
        y, x = y / radius, x / radius
        square = y**2 + x**2
        to_lamp = (lamp - centre) / np.linalg.norm(lamp - centre)
        light = 0.7 * np.sqrt((1 - square).clip(0)) + 0.6 * (y * to_lamp[0] + x * to_lamp[1])
        light = light.clip(0)
        inside = square < 1
        image[rows, columns][inside] = (60 + 130 * light + 60 * light**8)[inside, None]
        return rows, columns, inside

    def _draw_lamp(self, image: Array, centre: Array, colour: Array) -> None:
        rows, columns, y, x = self._around(centre, 1.25 * LAMP_RADIUS)
        patch = image[rows, columns]
        y, x = y[: patch.shape[0]], x[:, : patch.shape[1]]
        distance = (y**2 + x**2) / LAMP_RADIUS**2
        glow, core = np.exp(-(distance**4))[..., None], np.exp(-((4 * distance) ** 2))[..., None]
        image[rows, columns] = patch * (1 - glow) + glow * (core * 255 + (1 - core) * colour)


class Synthetic(SegmentationDataModule):
    """Made on the fly, no files: name grey balls after the colour of a lamp far away from them.

    See `SyntheticDataset`. A network without context cannot tell the four colours apart and stays
    below 0.32 mIoU, what even guessing gives; one with context gets nearly all of them.

    Args:
        num_train: Training images; each is a function of `seed` and its number.
        num_eval: Validation images, and as many test images.
        cells: Cells of 80 pixels along each side of the image, at least 2.
        seed: Of the images, independent of the seed of the training.
        kwargs: See `SegmentationDataModule`; `root` and the augmentation are not used.

    Raises:
        InputError: An argument is out of its range, or `train_on_val` is set.
    """

    class_names = ("background", "red", "green", "blue", "yellow")
    palette = ((45, 45, 50), (230, 60, 50), (60, 190, 90), (70, 110, 240), (240, 200, 50))

    def __init__(
        self,
        num_train: int = 4800,
        num_eval: int = 64,
        cells: int = 3,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if cells < 2 or num_train < 1 or num_eval < 1 or seed < 0:
            raise InputError(
                f"Synthetic needs cells >= 2, at least one image and a seed >= 0, got cells "
                f"{cells}, num_train {num_train}, num_eval {num_eval}, seed {seed}"
            )
        if self.train_on_val:
            raise InputError(
                "Synthetic makes as many training images as you like: instead of train_on_val, "
                f"raise --data.num_train, now {num_train}"
            )
        self.num_train = num_train
        self.num_eval = num_eval
        self.cells = cells
        self.seed = seed

    def build_dataset(self, split: Split) -> SyntheticDataset:
        """Returns the scenes of a split; splits never share one."""
        return SyntheticDataset(
            self.num_train if split == "train" else self.num_eval,
            self.cells,
            np.array(self.palette, dtype=np.uint8),
            (self.seed, ("train", "val", "test").index(split)),
        )
