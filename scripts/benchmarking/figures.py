"""Pictures of what `benchmark_efficiency.py` measured."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarking.tables import DENSE, Row, edges, ms, representative, representative_growth

OURS, OTHERS = "C3", "C0"
"""Colours of ISA and of what it is compared with."""


def draw_growth(rows: Sequence[Row], path: Path) -> None:
    """Draws how time and memory grow with the map, and which window is the cheapest."""
    rows = representative_growth(rows)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    time_axis, memory_axis, window_axis = figure.subplots(1, 3)
    ticks = sorted({row["size"] for row in rows if row["kind"] != "window"})
    for name, colour in (("ISA", OURS), (DENSE, OTHERS)):
        kind = [row for row in rows if row["kind"] == name]
        sides = [row["size"] for row in kind]
        style = {"marker": "o", "color": colour, "label": name}
        time_axis.plot(sides, [row["median"] for row in kind], **style)
        memory_axis.plot(sides, [row["peak_mib"] for row in kind], **style)
    for axis, label in ((time_axis, "ms"), (memory_axis, "peak MiB")):
        axis.set(xscale="log", yscale="log", xlabel="edge of the map, positions", ylabel=label)
        axis.set_xticks(ticks, [str(edge) for edge in ticks])
        axis.minorticks_off()
        axis.legend()
    windows = [row for row in rows if row["kind"] == "window"]
    sides = [row["window"] for row in windows]
    times = [row["median"] for row in windows]
    window_axis.plot(sides, times, "o-", color=OURS)
    for side, time in zip(sides, times, strict=True):
        window_axis.annotate(
            ms(time), (side, time), (8, 6), textcoords="offset points",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    window_axis.set(
        xscale="log",
        yscale="log",
        xlabel=f"edge of ISA's window, map of {windows[0]['size']}x{windows[0]['size']}",
        ylabel="ms",
    )
    window_axis.margins(x=0.22, y=0.2)
    window_axis.set_xticks(sides, [str(side) for side in sides])
    window_axis.set_yticks([])
    window_axis.minorticks_off()
    figure.suptitle(
        f"Inference of the attention on 512 channels, {rows[0]['dtype']}, "
        f"memory by {rows[0]['heap']}"
    )
    figure.savefig(path, dpi=110)


def draw_heads(rows: Sequence[Row], path: Path) -> None:
    """Draws time and memory of each head on the largest map, in inference, as bars."""
    rows = [row for row in representative(rows) if row["mode"] == "inference"]
    rows = [row for row in rows if row["dtype"] == rows[-1]["dtype"]]
    largest = max((row["size"] for row in rows), key=edges)
    rows = sorted((row for row in rows if row["size"] == largest), key=lambda row: -row["median"])
    figure = Figure(figsize=(11, 0.8 + 0.28 * len(rows)), layout="constrained")
    time_axis, memory_axis = figure.subplots(1, 2, sharey=True)
    colours = [OURS if row["head"] == "ISA" else OTHERS for row in rows]
    for axis, key, label in (
        (time_axis, "median", "ms"),
        (memory_axis, "peak_mib", "peak MiB beside the input"),
    ):
        bars = axis.barh([row["head"] for row in rows], [row[key] for row in rows], color=colours)
        axis.bar_label(bars, fmt=ms if key == "median" else "%.0f", padding=3)
        axis.margins(x=0.12)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Inference in the direct form, [1, 2048, {largest.replace('x', ', ')}], "
        f"{rows[0]['dtype']}, memory by {rows[0]['heap']}"
    )
    figure.savefig(path, dpi=110)
