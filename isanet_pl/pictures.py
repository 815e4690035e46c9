"""Pictures of class maps."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from isanet_pl.data.files import IGNORE

Pixels = npt.NDArray[np.uint8]


def colourise(classes: Tensor, palette: Sequence[Sequence[int]]) -> Pixels:
    """Returns an RGB picture (H, W, 3) of a class map (H, W); ignored pixels are black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    return table[classes.cpu().numpy().astype(np.uint8)]


def overlay(image: Tensor, classes: Tensor, palette: Sequence[Sequence[int]]) -> Pixels:
    """Returns the image uint8 (3, H, W) with its class map (H, W) laid over it, RGB (H, W, 3)."""
    picture = image.permute(1, 2, 0).cpu().numpy()
    mixed = picture // 2 + colourise(classes, palette) // 2
    ignored = (classes == IGNORE).cpu().numpy()[..., None]
    return np.where(ignored, picture, mixed)


def draw_panels(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]],
    class_names: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> Figure:
    """Returns a figure with a row of pictures for each image, and a legend.

    Args:
        rows: Image uint8 (3, H, W), true and predicted class map (H, W), each.
        class_names: Names of the classes.
        palette: RGB colours of the classes, 0..255.
    """
    _, height, width = rows[0][0].shape
    legend_rows = math.ceil(len(class_names) / 6)
    columns = 3
    size = (columns * 3.2, len(rows) * 3.2 * height / width + 0.35 + 0.25 * legend_rows)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for i, (image, truth, prediction) in enumerate(rows):
        # Where the truth is unknown, a prediction cannot be judged: show it, but leave truth black.
        pictures = (
            image.permute(1, 2, 0),
            colourise(truth, palette),
            colourise(prediction, palette),
        )
        for axis, picture, title in zip(
            axes[i], pictures, ("image", "truth", "prediction"), strict=True
        ):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
            if i == 0:
                axis.set_title(title, fontsize=9)
    handles = [
        Patch(facecolor=(r / 255, g / 255, b / 255), edgecolor="grey", label=name)
        for name, (r, g, b) in zip(class_names, palette, strict=True)
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(6, len(handles)),
        fontsize=8,
        frameon=False,
    )
    return figure
