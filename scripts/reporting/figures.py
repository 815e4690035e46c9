"""Draws comparisons: scores, classes, learning curves, cost."""

import io
import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from isanet_pl.pictures import unhidden
from reporting.page import Picture
from reporting.run_folders import Curve
from reporting.settings import Comparison, Setting, Statistic

# Okabe and Ito's colours without yellow and black, which one of the two backgrounds swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
LINES = ("-", "--", ":", "-.")
HATCHES = ("", "////", "....", "xxxx")
LEAST_SPAN = 3.0
"""Points of mIoU that an axis shows at least: smaller differences shall look small."""
OTHERS = "#999999"
INK = "#3b444d"
SHOWN = len(COLOURS)
"""Settings that a picture tells apart: the best ones."""
MOST_CLASSES = 30
"""Classes with bars."""
MOST_MARKS = 30
"""Points of a curve that are marked."""
RATES: dict[str, Any] = {"lr/new": "-", "lr/pretrained": "--"}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # names are no formulas
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same runs give the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "grid.color": "#88888840",
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}
INKS = f"<style>svg{{color:{INK}}}@media(prefers-color-scheme:dark){{svg{{color:#c9d1d9}}}}</style>"


def picture(name: str, alt: str, draw: Callable[[], Figure]) -> Picture:
    """Returns a figure as PNG on white, and as SVG whose ink turns light on a dark page."""
    png, svg = io.BytesIO(), io.BytesIO()
    with mpl.rc_context(STYLE):
        figure = draw()
        figure.savefig(png, format="png", dpi=150, facecolor="white", metadata={"Software": None})
        figure.savefig(svg, format="svg", facecolor="none", metadata={"Date": None})
    text = svg.getvalue().decode("utf-8").replace(INK, "currentColor")
    text = re.sub(r"(<svg [^>]*>)", lambda found: found[1] + INKS, text, count=1)
    return Picture(name, alt, png.getvalue(), text.encode("utf-8"), "image/svg+xml")


def shorten(label: str, width: int = 40) -> str:
    """Returns a label that fits into a picture, on two lines at most."""
    lines = textwrap.wrap(label, width, max_lines=2, placeholder=" ...") or [""]
    return unhidden("\n".join(lines))


def _look(setting: Setting) -> dict[str, Any]:
    round_, index = divmod(setting.number, len(COLOURS))
    marker = MARKERS[(index + round_) % len(MARKERS)]
    return {"color": COLOURS[index], "marker": marker, "linestyle": LINES[round_ % len(LINES)]}


def _looks(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Returns the looks of settings, the best first, where those that are not told apart are grey.

    For single points: there are no lines between them.
    """
    rest = [{"color": OTHERS, "marker": "."}] * len(settings[SHOWN:])
    looks = [*map(_look, settings[:SHOWN]), *rest]
    point = {"linestyle": "none", "markersize": 8, "capsize": 4}
    # Hollow: of a single run, of whose spread nothing is known.
    fills = [{"markerfacecolor": "none"} if len(s.runs) == 1 else {} for s in settings]
    return [{**look, **point, **fill} for look, fill in zip(looks, fills, strict=True)]


def _percent(value: Statistic) -> tuple[float, float | None]:
    return 100 * value.mean, None if value.std is None else 100 * value.std


def _bar(setting: Setting) -> dict[str, Any]:
    """Returns the look of a setting's bars: hatched where its colour is that of another one."""
    hatch = HATCHES[setting.number // len(COLOURS) % len(HATCHES)]
    return {"facecolor": _look(setting)["color"], "edgecolor": "white", "hatch": hatch}


def _legend(figure: Figure, settings: Sequence[Setting], bars: bool = False) -> None:
    handles: list[Artist] = [
        Patch(**_bar(setting)) if bars else Line2D([], [], linewidth=2, **_look(setting))
        for setting in settings
    ]
    labels = [shorten(setting.label) for setting in settings]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = min(len(labels), 3, max(1, 100 // (longest + 8)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def draw_scores(comparison: Comparison) -> Figure:
    """Returns the mIoU of every setting: a stroke for each seed, the mean, the spread."""
    settings = comparison.settings
    figure = Figure(figsize=(8, 0.9 + 0.4 * len(settings)), layout="constrained")
    axes = figure.subplots()
    for row, (setting, look) in enumerate(zip(settings, _looks(settings), strict=True)):
        mean, std = _percent(setting.miou)
        axes.errorbar(mean, row, xerr=std, elinewidth=2, **look)
        results = [run.result for run in setting.runs.values() if run.result]
        seeds = [100 * (result.scores["miou"] or 0.0) for result in results]
        axes.plot(seeds, [row] * len(seeds), "|", color=INK, markersize=10, zorder=3)
        axes.annotate(
            f"{mean:.1f}", (mean, row), (0, 8), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_yticks(range(len(settings)), [shorten(setting.label) for setting in settings])
    axes.set_ylim(len(settings) - 0.5, -0.8)
    low, high = axes.get_xlim()
    wider = max(0.0, LEAST_SPAN - (high - low)) / 2
    axes.set_xlim(low - wider, high + wider)
    axes.set_xlabel(f"{comparison.split} mIoU, %")
    axes.grid(axis="x")
    return figure


def draw_classes(comparison: Comparison) -> Figure:
    """Returns bars of the IoU of each class, those that differ most where there are many."""
    settings = comparison.settings[:SHOWN]
    names = differing(comparison.classes, settings)
    height = 1 + len(names) * max(0.3, 0.13 * len(settings) + 0.1)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    thickness = 0.8 / len(settings)
    for index, setting in enumerate(settings):
        place = (index - (len(settings) - 1) / 2) * thickness
        for row, name in enumerate(names):
            score = setting.score(f"iou/{name}")
            if score is not None:
                mean, std = _percent(score)
                axes.barh(row + place, mean, 0.9 * thickness, linewidth=0, **_bar(setting))
                axes.errorbar(
                    mean, row + place, xerr=std, ecolor=INK, elinewidth=1, capsize=2, zorder=3
                )
    axes.set_yticks(range(len(names)), [shorten(name, 24) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"{comparison.split} IoU, %")
    axes.grid(axis="x")
    _legend(figure, settings, bars=True)
    return figure


def differing(classes: Sequence[str], settings: Sequence[Setting]) -> list[str]:
    """Returns the MOST_CLASSES classes whose IoU differs most between settings, in their order."""

    def spread(name: str) -> float:
        scores = [setting.score(f"iou/{name}") for setting in settings]
        means = [score.mean for score in scores if score]
        return max(means) - min(means) if means else -1.0

    chosen = set(sorted(classes, key=spread, reverse=True)[:MOST_CLASSES])
    return [name for name in classes if name in chosen]


def smooth(curve: Curve) -> Curve:
    """Returns the mean over the last twentieth of a curve's points, at each of them."""
    steps, values = sorted(curve), [curve[step] for step in sorted(curve)]
    window = max(1, len(steps) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(steps) + 1)
    first = np.maximum(0, last - window)
    return dict(zip(steps, ((sums[last] - sums[first]) / (last - first)).tolist(), strict=True))


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Returns the mean of some curves at the steps that all of them have."""
    common = set.intersection(*map(set, curves)) if curves else set()
    return {step: statistics.fmean(curve[step] for curve in curves) for step in sorted(common)}


def draw_curves(comparison: Comparison) -> Figure:
    """Returns validation score, training loss and learning rates by step."""
    settings = comparison.settings[:SHOWN]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    score, loss, rate = figure.subplots(1, 3)
    for setting in settings:
        look = _look(setting)
        scores = [{s: 100 * v for s, v in c.items()} for c in setting.curves("val/miou")]
        _draw_curves(score, scores, look)
        _draw_curves(loss, [smooth(c) for c in setting.curves("train/loss")], look)
        for name, line in RATES.items():
            for curve in setting.curves(name)[:1]:  # it follows from the config, not the seed
                _plot(rate, curve, linestyle=line, color=look["color"])
    rates = [name for name in RATES if any(setting.curves(name) for setting in settings)]
    rate.legend([Line2D([], [], linestyle=RATES[name], color=INK) for name in rates], rates)
    titles = ("val mIoU, %", "training loss, smoothed", "learning rate")
    for axes, title in zip((score, loss, rate), titles, strict=True):
        axes.set_title(title)
        axes.set_xlabel("optimiser steps")
        axes.grid()
    _legend(figure, settings)
    return figure


def _draw_curves(axes: Axes, curves: Sequence[Curve], look: Mapping[str, Any]) -> None:
    """Draws the seeds thin and their mean thick."""
    if len(curves) > 1:
        for curve in curves:
            _plot(axes, curve, linewidth=0.7, alpha=0.6, color=look["color"])
    mean = mean_curve(curves)
    marker = look["marker"] if len(mean) <= MOST_MARKS else ""
    _plot(axes, mean, linewidth=2, markersize=4, **{**look, "marker": marker})


def _plot(axes: Axes, curve: Curve, **look: Any) -> None:
    axes.plot(sorted(curve), [curve[step] for step in sorted(curve)], **look)


def draw_cost(comparison: Comparison) -> Figure:
    """Returns mIoU against the costs that are known: parameters, arithmetic, time of training."""
    settings = comparison.settings
    speeds = [setting.images_per_s for setting in settings]
    costs = {
        "million parameters": [s.parameters and s.parameters / 1e6 for s in settings],
        "GMACs an image": [s.gmacs for s in settings],
        "GMACs of the context module": [s.context_gmacs for s in settings],
        "training, ms an image": [speed and 1000 / speed for speed in speeds],
    }
    known = {name: values for name, values in costs.items() if any(values)}
    figure = Figure(figsize=(4.2 * max(1, len(known)), 3.8), layout="constrained")
    row = figure.subplots(1, max(1, len(known)), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(row, known.items(), strict=False):
        for setting, look, value in zip(settings, _looks(settings), values, strict=True):
            if value:
                mean, std = _percent(setting.miou)
                axes.errorbar(value, mean, yerr=std, **look)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(name)
        axes.margins(0.15)
        axes.grid()
    row[0].set_ylabel(f"{comparison.split} mIoU, %")
    _legend(figure, settings[:SHOWN])
    return figure
