"""Finds which training wrote a checkpoint, and joins the folders of a resumed one."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from reporting.run_folders import Run


def owner(checkpoint: str | None, runs: Iterable[Run]) -> Run | None:
    """Returns the training that wrote a checkpoint; None if it is not among the runs.

    Where its folder is no longer there, it may have been moved: it is the one whose path ends most
    like the checkpoint's, at least in NAME/version_N, or in CELL/seedN/version_N.
    """
    if not checkpoint:
        return None
    home = Path(checkpoint).absolute().parent.parent
    wanted, stays = home.parts, home.is_dir()
    if len(wanted) < 2:  # in no run folder, so near to the root of the file system
        return None

    def shared(folder: Path) -> int:
        if stays:
            return len(wanted) if folder.resolve() == home.resolve() else 0
        pairs = zip(reversed(wanted), reversed(folder.absolute().parts), strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(wanted))

    least = 3 if re.fullmatch(r"seed\d+", wanted[-2]) else 2
    # Of a run and the one that went on from it, the first.
    likeness = [
        ((max(map(shared, run.folders)), shared(run.folder)), run)
        for run in runs
        if run.command == "fit"
    ]
    most = max((counts for counts, _ in likeness), default=(0, 0))
    best = [run for counts, run in likeness if counts == most]
    return best[0] if most[0] >= least and len(best) == 1 else None


def name_of(folder: Path) -> tuple[str, str]:
    """Returns the folder of the cell of a grid that a run is of, empty if of none, and its name."""
    cell = folder.parents[1].name if folder.parent.name.startswith("seed") else ""
    return cell, folder.parent.name


def is_of(checkpoint: str, folder: Path) -> bool:
    """Returns whether a checkpoint is of a run of the same name as one in a folder."""
    home = Path(checkpoint).absolute().parent.parent
    return name_of(home) == name_of(folder.absolute())


def join_resumed(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs, a resumed training as one; a finished one stays what it is as well.

    What goes on from a training that is not among them has taken longer than is known.
    """
    earlier = {
        run.folder: found
        for run in runs
        if run.command == "fit" and (found := owner(run.config.get("ckpt_path"), runs))
        if found is not run
    }
    absorbed = {run.folder for run in earlier.values() if run.result is None}
    joined = []
    for run in runs:
        if run.folder in absorbed:
            continue
        whole, seen = run, {run.folder}
        while (before := earlier.get(whole.folders[0])) and before.folder not in seen:
            whole = continue_run(before, whole)
            seen.add(before.folder)
        if whole.command == "fit" and whole.folders[0] not in earlier:
            start = whole.config.get("ckpt_path")
            if start and owner(start, runs) is None:
                whole = replace(whole, all_seconds=False)
        joined.append(whole)
    return joined


def continue_run(first: Run, then: Run) -> Run:
    """Returns two runs as one, without the steps of the first that the second did again."""
    start = min((min(curve) for curve in then.curves.values() if curve), default=math.inf)
    curves = {
        name: {
            **{step: value for step, value in first.curves.get(name, {}).items() if step < start},
            **then.curves.get(name, {}),
        }
        for name in {**first.curves, **then.curves}
    }
    known = [run.seconds for run in (first, then) if run.seconds is not None]
    return replace(
        then,
        folders=first.folders + then.folders,
        earlier=(*first.earlier, first.config, *then.earlier),
        curves={name: curve for name, curve in curves.items() if curve},
        seconds=sum(known) if known else None,
        all_seconds=len(known) == 2 and then.all_seconds,
    )
