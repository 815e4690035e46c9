"""What a comparison comes to, in a few figures."""

import math
from collections.abc import Iterator

from reporting.page import Facts
from reporting.settings import Comparison, Setting
from reporting.tables import spread, time_taken

NEAR = 0.01
"""Of the best mIoU: what a cheaper setting may be below it."""


def headline(comparison: Comparison, reference: Setting) -> Facts:
    """Returns the best score, how far it is ahead, what is as good for less, and the runs.

    Args:
        comparison: The settings.
        reference: The one that others are compared with.
    """
    return Facts([*_scores(comparison, reference), *_cheapest(comparison), *_runs(comparison)])


def _scores(comparison: Comparison, reference: Setting) -> Iterator[tuple[str, str]]:
    best, *others = comparison.settings
    of = f", the best of {1 + len(others)} settings" if others else ""
    yield spread(best.miou).text, f"{comparison.split} mIoU of {best.label}{of}"
    if others:
        other = others[0] if reference is best else reference
        ahead = f"ahead of {other.label}, {_chance(best, other)}"
        yield f"{100 * (best.miou.mean - other.miou.mean):.2f} points", ahead


def _chance(one: Setting, other: Setting) -> str:
    """Returns how the difference of two settings compares with the spread over their seeds."""
    if one.miou.std is None or other.miou.std is None:
        return "of one seed: by chance, for all that is known"
    both = math.hypot(one.miou.std, other.miou.std)
    times = (one.miou.mean - other.miou.mean) / both if both else math.inf
    return f"{times:.1f} times their spread over seeds" if both else "without any spread"


def _cheapest(comparison: Comparison) -> Iterator[tuple[str, str]]:
    top = comparison.settings[0].miou.mean
    near = [s for s in comparison.settings if s.gmacs and top - s.miou.mean <= NEAR]
    if len(near) > 1:
        least = min(near, key=lambda setting: setting.gmacs or 0.0)
        yield f"{least.gmacs:.2f} GMACs", f"an image: {least.label}, the least within a point"


def _runs(comparison: Comparison) -> Iterator[tuple[str, str]]:
    runs = [run for setting in comparison.settings for run in setting.runs.values()]
    seconds = sum(run.seconds or 0.0 for run in runs)
    whole = all(run.all_seconds and run.seconds is not None for run in runs)
    what = "run" if len(runs) == 1 else "runs"
    yield f"{len(runs)} {what}", f"in {time_taken(seconds, whole).text} altogether"
