"""Pictures of class maps and of scores."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from isanet_pl.data.files import IGNORE

Pixels = npt.NDArray[np.uint8]

BAR_ROWS = 50
"""Bars in a column, at most."""
NUMBERED = 30
"""Classes, at most, of a confusion matrix whose cells have room for numbers."""


def plain(name: str) -> str:
    """Returns a name that matplotlib writes as it is.

    Between two `$` would be a formula, and a file's name that is no UTF-8 could not be written.
    """
    return unhidden(name.encode("utf-8", "replace").decode().replace("$", r"\$"))


def unhidden(label: str) -> str:
    """Returns a label that every matplotlib shows in a legend.

    Older ones hide those that begin with an underscore, as labelme's `_background_`; a space of no
    width goes before it.
    """
    return "\u200b" + label if label.startswith("_") else label


def render(figure: Figure) -> Pixels:
    """Returns the RGB pixels (H, W, 3) of a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.array(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]


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


def legend_patch(label: str, colour: Sequence[int]) -> Patch:
    """Returns a colour, RGB 0..255, as it stands in a legend."""
    r, g, b = colour
    return Patch(facecolor=(r / 255, g / 255, b / 255), edgecolor="grey", label=label)


def draw_panels(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]],
    class_names: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> Figure:
    """Returns a figure with a row of pictures for each image, and a legend.

    These are the image, the truth, the prediction, and the prediction laid over the image. Ignored
    pixels of the truth are chequered, as any plain colour may be that of a class.

    Args:
        rows: Image uint8 (3, H, W), true and predicted class map (H, W), each.
        class_names: Names of the classes.
        palette: RGB colours of the classes, 0..255.
    """
    _, height, width = rows[0][0].shape
    handles = [
        legend_patch(plain(name), colour) for name, colour in zip(class_names, palette, strict=True)
    ]
    if any(bool((truth == IGNORE).any()) for _, truth, _ in rows):
        handles.append(Patch(facecolor="0.8", edgecolor="0.5", hatch="xxxx", label="ignored"))
    # In inches; all sizes are known, and matplotlib would take as long to find them as to draw.
    columns, wide, gap = 4, 3.14, 0.06
    tall, titles, legend = wide * height / width, 0.24, 0.12 + 0.18 * math.ceil(len(handles) / 6)
    full_width = columns * (wide + gap) + gap
    full_height = titles + len(rows) * (tall + gap) + legend
    figure = Figure(figsize=(full_width, full_height), dpi=100)
    axes = figure.subplots(
        len(rows),
        columns,
        squeeze=False,
        gridspec_kw={
            "left": gap / full_width,
            "right": 1 - gap / full_width,
            "bottom": (legend + gap) / full_height,
            "top": 1 - titles / full_height,
            "wspace": gap / wide,
            "hspace": gap / tall,
        },
    )
    for i, (image, truth, prediction) in enumerate(rows):
        pictures = {
            "image": image.permute(1, 2, 0).cpu().numpy(),
            "truth": _chequer_ignored(colourise(truth, palette), truth),
            "prediction": colourise(prediction, palette),
            "prediction over image": overlay(image, prediction, palette),
        }
        for axis, (title, picture) in zip(axes[i], pictures.items(), strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
            if i == 0:
                axis.set_title(title, fontsize=9)
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=min(6, len(handles)),
        fontsize=8,
        frameon=False,
    )
    return figure


def _chequer_ignored(picture: Pixels, classes: Tensor) -> Pixels:
    height, width, _ = picture.shape
    side = max(2, width // 60)  # to be seen when the picture is made smaller
    rows, columns = np.ogrid[:height, :width]
    chequers = np.where((rows // side + columns // side) % 2, 235, 150)[..., None]
    ignored = (classes == IGNORE).cpu().numpy()[..., None]
    return np.where(ignored, chequers, picture).astype(np.uint8)


def draw_confusion(confusion: Tensor, class_names: Sequence[str]) -> Figure:
    """Returns a heat map of where the pixels of each class went, in percent of its true pixels.

    Rows of classes without true pixels are grey.

    Args:
        confusion: (K, K) numbers of pixels; rows are the truth, columns the prediction.
        class_names: Names of the classes.
    """
    counts = confusion.cpu().double()
    percent = (100 * counts / counts.sum(dim=1, keepdim=True)).numpy()  # 0 / 0 is NaN: grey
    numbered = len(class_names) <= NUMBERED
    side = max(3.0, (0.42 if numbered else 0.15) * len(class_names))
    figure = Figure(figsize=(side + 2.4, side + 1.6), dpi=100, layout="constrained")
    axis = figure.subplots()
    # One hue, so that it reads without colour too; the root lifts rare confusions off the white.
    image = axis.imshow(
        percent,
        cmap=colormaps["Blues"].with_extremes(bad="0.88"),
        norm=PowerNorm(0.5, vmin=0, vmax=100),
        interpolation="nearest",
    )
    size = 9 if numbered else 7
    names = [plain(name) for name in class_names]
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axis.set_yticks(range(len(names)), names, fontsize=size)
    axis.set_xlabel("prediction")
    axis.set_ylabel("truth")
    bar = figure.colorbar(image, ax=axis, shrink=0.6, aspect=30, pad=0.01)
    bar.set_label("% of the true pixels")
    bar.set_ticks([0, 1, 5, 10, 25, 50, 75, 100])
    if numbered:
        for row, column in zip(*np.nonzero(percent >= 0.5), strict=True):
            value = percent[row, column]
            colour = "white" if value > 35 else "black"
            axis.text(column, row, f"{value:.0f}", c=colour, ha="center", va="center", fontsize=8)
    return figure


def draw_class_scores(scores: Mapping[str, float], miou: float) -> Figure:
    """Returns a bar for the IoU of each class, from best to worst, and a line at their mean.

    Args:
        scores: IoU by class name, 0..1; NaN for a class that does not occur.
        miou: Their mean.
    """
    ranked = sorted(scores.items(), key=lambda item: -1.0 if math.isnan(item[1]) else item[1])[::-1]
    columns = math.ceil(len(ranked) / BAR_ROWS)
    rows = math.ceil(len(ranked) / columns)
    mean = 100 * miou
    size = (2 + 3.6 * columns, 1.1 + 0.22 * rows)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.suptitle(f"IoU of each class in %, mean {mean:.2f} (dashed)", fontsize=11)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for index, axis in enumerate(axes):
        _draw_bars(axis, ranked[index * rows : (index + 1) * rows], mean)
        axis.set_ylim(rows - 0.4, -0.6)
    return figure


def _draw_bars(axis: Axes, scores: Sequence[tuple[str, float]], mean: float) -> None:
    for row, (_, iou) in enumerate(scores):
        absent = math.isnan(iou)
        axis.barh(row, 0 if absent else 100 * iou, color="#0072B2", height=0.75)
        text = "absent" if absent else f"{100 * iou:.1f}"
        label = axis.text(1 if absent else 100 * iou + 1, row, text, va="center", fontsize=8)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axis.axvline(mean, color="0.35", linestyle="--", linewidth=1, zorder=0)
    axis.set_yticks(range(len(scores)), [plain(name) for name, _ in scores], fontsize=8)
    axis.set_xlim(0, 110)
    axis.set_xticks(range(0, 101, 20))
    axis.spines[["top", "right"]].set_visible(False)
