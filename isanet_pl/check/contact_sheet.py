"""Contact sheets of a data set: images with their masks, and one picture of every class."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from isanet_pl.check.facts import Pixels
from isanet_pl.data.files import IGNORE, INVALID, Codes, Pair, read_image
from isanet_pl.pictures import legend_patch, overlay, plain

WRONG = (255, 0, 255)
"""Colour of pixels whose code has no class."""
COLUMNS = 4


@dataclass(frozen=True)
class Thumbnail:
    """A small image (H, W, 3) with its class map (H, W); codes without a class are INVALID."""

    name: str
    image: Pixels
    classes: Pixels


def read_thumbnail(
    pair: Pair, table: Pixels, read_codes: Callable[[Path], Codes], edge: int
) -> Thumbnail | None:
    """Returns an image and its mask, scaled to at most `edge` pixels a side; None if unreadable.

    Args:
        pair: The files.
        table: (256,) class of each code.
        read_codes: Returns the codes (H, W) of a mask file.
        edge: Longest side of the result.
    """
    try:
        image, codes = read_image(pair[0]), read_codes(pair[1])
    except Exception:  # such a file is reported elsewhere, with its message
        return None
    wide = (codes < 0) | (codes > 255)
    classes = np.where(wide, INVALID, table[codes.clip(0, 255)]).astype(np.uint8)
    _, height, width = image.shape
    scale = min(1.0, edge / max(height, width))
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    small = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picked = Image.fromarray(classes).resize(size, Image.Resampling.NEAREST)
    return Thumbnail(
        pair[0].name, np.array(small.resize(size, Image.Resampling.BOX)), np.array(picked)
    )


def draw_contact_sheet(
    splits: Mapping[str, Sequence[Thumbnail]],
    class_names: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> Figure:
    """Returns a figure with the images of each split, their masks laid over them below.

    Ignored pixels keep the image's full brightness.

    Args:
        splits: Thumbnails by name of the split, COLUMNS of each are shown.
        class_names: Names of the classes.
        palette: RGB colours of the classes, 0..255.
    """
    colours = [*palette, *[WRONG] * (INVALID + 1 - len(palette))]
    rows = [(name, shown[:COLUMNS]) for name, shown in splits.items() if shown]
    legend = _legend(class_names, palette, [t for _, shown in rows for t in shown])
    columns = 6
    heights = [3.1 * _aspect(shown) for _, shown in rows for _ in range(2)]
    height = sum(heights) + 0.3 * len(rows) + 0.2 * math.ceil(len(legend) / columns) + 0.4
    figure = Figure(figsize=(3.2 * COLUMNS, height), dpi=100, layout="constrained")
    axes = figure.subplots(2 * len(rows), COLUMNS, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (split, shown) in enumerate(rows):
        for column, thumbnail in enumerate(shown):
            above, below = axes[2 * row][column], axes[2 * row + 1][column]
            above.set_anchor("S")
            below.set_anchor("N")
            above.imshow(thumbnail.image)
            above.set_title(f"{split}: {_shorten(thumbnail.name)}", fontsize=8)
            pixels = torch.from_numpy(thumbnail.image).permute(2, 0, 1)
            below.imshow(overlay(pixels, torch.from_numpy(thumbnail.classes), colours))
    figure.legend(
        handles=legend, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )
    return figure


def _aspect(shown: Sequence[Thumbnail]) -> float:
    """Returns the height of a row of images as a share of their width."""
    ratios = [float(t.image.shape[0] / t.image.shape[1]) for t in shown]
    return min(0.9, max(ratios))


def _shorten(name: str, most: int = 34) -> str:
    return plain(name if len(name) <= most else f"...{name[3 - most :]}")


def _legend(
    class_names: Sequence[str], palette: Sequence[Sequence[int]], shown: Iterable[Thumbnail]
) -> list[Patch]:
    found = {int(index) for thumbnail in shown for index in np.unique(thumbnail.classes)}
    labels = [
        (f"{i} {plain(name)}", colour)
        for i, (name, colour) in enumerate(zip(class_names, palette, strict=True))
    ]
    if INVALID in found:
        labels.append(("NO CLASS", WRONG))
    patches = [legend_patch(label, colour) for label, colour in labels]
    if IGNORE in found:
        patches.append(Patch(facecolor="none", edgecolor="grey", label="ignored: undimmed"))
    return patches


def draw_classes(
    thumbnails: Mapping[int, Thumbnail], class_names: Sequence[str], shares: Sequence[float]
) -> Figure:
    """Returns a figure with every class, alone in the image that shows most of it.

    Names that belong to other values of the masks, the commonest mistake that no program can find,
    are seen here at a glance.

    Args:
        thumbnails: By class; classes that do not occur are left out.
        class_names: Names of the classes.
        shares: Share of each class in the pixels that have one.
    """
    columns = max(1, min(10, round(math.sqrt(1.5 * len(thumbnails)))))
    rows = max(1, math.ceil(len(thumbnails) / columns))
    height = rows * (0.3 + 2.2 * _aspect(list(thumbnails.values())))
    figure = Figure(figsize=(2.3 * columns, height), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (index, thumbnail) in zip(axes.flat, thumbnails.items(), strict=False):
        axis.imshow(_spotlight(thumbnail, index))
        axis.set_title(
            f"{index} {plain(class_names[index])}  {100 * shares[index]:.3g} %", fontsize=8
        )
    return figure


def _spotlight(thumbnail: Thumbnail, index: int) -> Pixels:
    """Returns the image with all but one class dark and grey, an outline around the class."""
    inside = thumbnail.classes == index
    grey = thumbnail.image.mean(axis=2, keepdims=True) * 0.35
    picture = np.where(inside[..., None], thumbnail.image, grey).astype(np.uint8)
    around = np.pad(inside, 1)
    near = around[:-2, 1:-1] | around[2:, 1:-1] | around[1:-1, :-2] | around[1:-1, 2:]
    picture[near & ~inside] = (255, 255, 0)
    return picture
