"""The tables of a report."""

from collections.abc import Collection, Sequence

from reporting.page import Cell, Table
from reporting.run_folders import Run
from reporting.settings import Comparison, Setting, Statistic, statistic


def spread(value: Statistic | None, strong: bool = False) -> Cell:
    """Returns a cell with a score in percent, mean and standard deviation; a dash for none."""
    if value is None:
        return Cell("-")
    std = "" if value.std is None else f" ± {100 * value.std:.2f}"
    return Cell(f"{100 * value.mean:.2f}{std}", value.mean, strong)


def number(value: float | None, form: str = ".2f") -> Cell:
    """Returns a cell with a number; a dash where there is none."""
    return Cell("-") if value is None else Cell(f"{value:{form}}", value)


def summary_table(comparison: Comparison, base: Setting) -> Table:
    """Returns a row for each setting, the best first, without columns that nothing is known of.

    Args:
        comparison: The settings.
        base: The one that the others are compared with.
    """
    best, several = comparison.settings[0], len(comparison.settings) > 1
    score = f"{comparison.split} mIoU"
    rows = []
    for setting in comparison.settings:
        tops = [max(curve.values()) for curve in setting.curves("val/miou")]
        rows.append(
            {
                "setting": Cell(setting.label),
                "n": number(len(setting.runs), "d"),
                score: spread(setting.miou, several and setting is best),
                "difference": _difference(setting, base) if several else Cell("-"),
                "best val mIoU": spread(statistic(tops if comparison.command == "fit" else [])),
                "mAcc": spread(setting.score("macc")),
                "aAcc": spread(setting.score("aacc")),
                "M params": number((setting.parameters or 0) / 1e6 or None),
                "GMACs": number(setting.gmacs),
                "context GMACs": number(setting.context_gmacs),
                "time": mean_time(setting.runs.values()),
                "images/s": number(setting.images_per_s, ".1f"),
                "differs in": Cell(
                    "-" if setting.label == setting.difference else setting.difference
                ),
            }
        )
    if all(row["best val mIoU"].text == row[score].text for row in rows):
        for row in rows:
            del row["best val mIoU"]
    known = [name for name in rows[0] if any(row[name].text not in ("-", "") for row in rows)]
    return Table(known, [[row[name] for name in known] for row in rows])


def _difference(setting: Setting, base: Setting) -> Cell:
    if setting is base:
        return Cell("reference", 0.0)
    return number(100 * (setting.miou.mean - base.miou.mean), "+.2f")


def time_taken(seconds: float | None, whole: bool) -> Cell:
    """Returns a cell with a time; `whole` is false where a killed process left none of its own."""
    if seconds is None:
        return Cell("-")
    units = ((3600, "h", ".1f"), (60, "min", ".0f"), (1, "s", ".0f"))
    size, unit, form = next((u for u in units if seconds >= u[0]), units[-1])
    return Cell(f"{'' if whole else '≥ '}{seconds / size:{form}} {unit}", seconds)


def mean_time(runs: Collection[Run]) -> Cell:
    """Returns a cell with the mean time of some runs."""
    mean = statistic(run.seconds for run in runs)
    return time_taken(mean.mean if mean else None, all(run.all_seconds for run in runs))


def class_table(comparison: Comparison) -> Table:
    """Returns the IoU of each class, a column for each setting, the best of a class strong."""
    rows = []
    for name in comparison.classes:
        scores = [setting.score(f"iou/{name}") for setting in comparison.settings]
        means = {score.mean for score in scores if score}
        best = max(means) if len(means) > 1 else None
        rows.append([Cell(name)] + [spread(s, s is not None and s.mean == best) for s in scores])
    return Table(["class", *(setting.label for setting in comparison.settings)], rows)


def run_table(comparisons: Sequence[Comparison]) -> Table:
    """Returns a row for each finished run, with what is known of it alone."""
    rows = []
    for comparison in comparisons:
        for setting in comparison.settings:
            for seed, run in sorted(setting.runs.items()):
                assert run.result is not None
                rows.append(
                    [
                        Cell(setting.label),
                        Cell(comparison.title),
                        Cell(seed),
                        spread(statistic([run.result.scores["miou"]])),
                        number(run.result.step, "d"),
                        time_taken(run.seconds, run.all_seconds),
                        Cell(run.result.machine or "-"),
                        Cell(_folders(run)),
                    ]
                )
    head = ("setting", "measured", "seed", "mIoU", "steps", "time", "machine", "folder")
    return Table(head, rows)


def _folders(run: Run) -> str:
    return " + ".join(map(str, run.folders))


def unfinished_table(runs: Sequence[Run]) -> Table:
    """Returns a row for each run without a result, and how far it came."""
    rows = []
    for run in runs:
        total = run.config.get("trainer.max_steps")
        of = f" of {total}" if isinstance(total, int) and total > 0 else ""
        reached = f"{run.last_step}{of}" if run.last_step else "nothing logged"
        scores = run.curves.get("val/miou", {})
        last = scores[max(scores)] if scores else None
        rows.append(
            [
                Cell(_folders(run)),
                Cell(run.command),
                Cell(reached, float(run.last_step)),
                spread(statistic([last])),
            ]
        )
    return Table(("folder", "command", "steps", "last val mIoU"), rows)
