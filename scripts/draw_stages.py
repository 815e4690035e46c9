"""Draws the two stages of ISA, from the grouping that the code really uses.

python scripts/draw_stages.py    writes docs/two_stages.png
"""

import argparse
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from isanet_pl.models.attention import TokenGrid

SIDE, WINDOW = 12, 4
ROW, COLUMN = 5, 6  # the position that is followed
FAR = 10, 0  # one that it learns of


def groups(long_range: bool) -> Tensor:
    """Returns the number of the group that each position attends in, (SIDE, SIDE)."""
    grid = TokenGrid(SIDE, SIDE, (WINDOW, WINDOW))
    places, windows = WINDOW**2, (SIDE // WINDOW) ** 2
    number = torch.arange(places)[:, None] if long_range else torch.arange(windows)[None, :]
    tokens = number.expand(places, windows).float()
    return grid.merge(tokens[None, None])[0, 0].long()


def draw(axis: Axes, colours: Tensor, strong: Tensor, title: str) -> None:
    """Draws one map: a colour for each group, strong where the followed position looks."""
    picture = torch.from_numpy(colormaps["tab20"](colours.numpy() % 20)).clone()
    picture[..., 3] = torch.where(strong, 1.0, 0.28)
    axis.imshow(picture.numpy())
    for edge in range(SIDE + 1):
        width = 1.6 if edge % WINDOW == 0 else 0.3
        axis.axhline(edge - 0.5, color="black", lw=width)
        axis.axvline(edge - 0.5, color="black", lw=width)
    axis.plot(COLUMN, ROW, marker="*", color="black", markersize=13)
    axis.set_title(title, fontsize=10)
    axis.set_axis_off()


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("docs/two_stages.png"), help="PNG file to write"
    )
    path: Path = parser.parse_args().output
    long_range, short_range = groups(long_range=True), groups(long_range=False)
    follows_long = long_range == long_range[ROW, COLUMN]
    follows_short = short_range == short_range[ROW, COLUMN]
    # What is far away comes first to its place in the star's window, then to the star.
    far = long_range == long_range[FAR]
    [(row, column)] = (far & follows_short).nonzero().tolist()
    share = (follows_long.sum() + follows_short.sum()).item() / SIDE**2
    figure = Figure(figsize=(10, 3.75), dpi=110, layout="constrained")
    axes = figure.subplots(1, 3)
    draw(axes[0], long_range, follows_long, "1. long range: same place in every window")
    draw(axes[1], short_range, follows_short, "2. short range: the positions of one window")
    draw(axes[2], long_range, far, "both: any position (dot) reaches the star")
    axes[2].plot(FAR[1], FAR[0], "o", color="black", markersize=9)
    for start, end, name in (
        (FAR, (row, column), "1"),
        ((row, column), (ROW, COLUMN), "2"),
    ):
        axes[2].annotate(
            "", xy=end[::-1], xytext=start[::-1],
            arrowprops={"arrowstyle": "-|>", "lw": 2, "shrinkA": 3, "shrinkB": 5},
        )  # fmt: skip
        middle = ((start[1] + end[1]) / 2 - 0.7, (start[0] + end[0]) / 2 - 0.35)
        axes[2].annotate(name, middle, fontsize=13, fontweight="bold")
    figure.suptitle(
        f"The star attends to {int(follows_long.sum())} + {int(follows_short.sum())} positions "
        f"instead of {SIDE**2} ({100 * share:.0f} %); at 128 x 128 with windows of 8 x 8 it is "
        f"{100 * (16**2 + 8**2) / 128**2:.0f} %",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
