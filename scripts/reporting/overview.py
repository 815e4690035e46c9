"""One table of what each training on a data set reached, beside what papers say."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isanet_pl.errors import InputError
from reporting.commands import describe, find_start
from reporting.labels import starts
from reporting.page import Cell, Table
from reporting.resumed_runs import owner
from reporting.run_folders import Run, natural
from reporting.settings import Comparison, statistic
from reporting.tables import mean_time, number, spread

VIEWS = {
    ((1.0,), False): "",
    ((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), True): " ms+flip",
}
"""Scales and mirroring of an evaluation, and what the field calls them; others have no column.

Scales are those of the training's own validations times these, where it has a single one.
"""

COLUMNS = ("val", "val ms+flip", "test", "test ms+flip")

MEASURED_ALIKE = ("model.inference.pad_multiple", "data.base_size", "data.label_map",
                  "data.reduce_zero_label")  # fmt: skip
"""What an evaluation must have in common with the training's own for a score to have a column."""


@dataclass(frozen=True)
class Place:
    """Where stored results are told of.

    Args:
        title: What a row may call them.
        link: Where they stand.
    """

    title: str
    link: str


@dataclass
class Training:
    """One training and what its last checkpoint reached.

    Args:
        kept_as: Name of the stored results that have it, the first of several.
        configs: Their names.
        changes: Options that change what the configs say, and the training that it started from.
        run: With the result at the end of the training.
        seed: Of the training.
        scores: mIoU as a fraction, by column.
        step: Of the weights that were measured.
    """

    kept_as: str
    configs: str
    changes: tuple[str, ...]
    run: Run
    seed: str
    scores: dict[str, float]
    step: int = 0


def find_column(split: str, config: Mapping[str, Any], trained: Mapping[str, Any]) -> str | None:
    """Returns the column that a score belongs to, None if it was measured in another way.

    Args:
        split: val or test.
        config: Of the evaluation, by dotted key.
        trained: Of its training.
    """
    inference: dict[str, Any] = {
        key: config.get(f"model.inference.{key}") for key in ("mode", "scales", "flip")
    }
    if config.get(f"trainer.limit_{split}_batches") not in (None, 1.0):
        return None
    if inference["mode"] != "whole":
        return None
    if _measured_alike(config) != _measured_alike(trained):
        return None
    own = trained["model.inference.scales"]
    unit = own[0] if len(own) == 1 else 1
    scales = tuple(round(scale / unit, 6) for scale in inference["scales"])
    views = VIEWS.get((scales, inference["flip"]))
    return None if views is None else split + views


def _measured_alike(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is set of MEASURED_ALIKE, by dotted key."""
    return {k: v for k, v in config.items() if starts(k, MEASURED_ALIKE) and v not in (None, False)}


def find_trainings(stored: Mapping[str, Sequence[Comparison]]) -> list[Training]:
    """Returns the trainings with the scores of their last checkpoints, also of evaluations.

    Args:
        stored: Comparisons on one data set by the name that they are kept as.

    Raises:
        InputError: Two trainings have the same run folder, so that no evaluation tells which it is
            of.
    """
    trainings: dict[Path, Training] = {}
    for name, comparison, run, seed in _runs(stored, ("fit",)):
        assert run.result is not None
        training = Training(name, *describe(run.result.command, run.folder), run, seed, {})
        known = trainings.setdefault(run.folder, training)  # several names may keep the same one
        assert known.run.result is not None
        if known.run.result != run.result:
            raise InputError(
                f"two trainings are kept as {run.folder}: {known.run.result.command}\nand "
                f"{run.result.command}\nGive one another --name, and add its runs again"
            )
        _add(known, comparison.split, run)
    evaluations = _runs(stored, ("validate", "test"))
    # Where one way was measured twice, the first counts and not the better one.
    for _, comparison, run, _ in sorted(evaluations, key=lambda found: natural(found[2].folder)):
        kept = [training.run for training in trainings.values()]
        trained = owner(run.config.get("ckpt_path"), kept)
        if trained is not None:
            _add(trainings[trained.folder], comparison.split, run)
    return list(trainings.values())


def _add(training: Training, split: str, measured: Run) -> None:
    """Adds a score to those of a training, if it is one of its last weights on unseen images."""
    assert training.run.result is not None
    assert measured.result is not None
    step, last = measured.result.step or 0, training.run.result.step or 0
    if step < max(last, training.step):  # the best on val is no other's last
        return
    if step > training.step:  # no validation need come after the last step
        training.scores.clear()
    training.step = step
    if split == "val" and training.run.config.get("data.train_on_val"):
        return
    column = find_column(split, measured.config, training.run.config)
    if column is not None:
        training.scores.setdefault(column, _miou(measured))


def _runs(
    stored: Mapping[str, Sequence[Comparison]], commands: Sequence[str]
) -> Iterator[tuple[str, Comparison, Run, str]]:
    """Yields the runs of some commands: kept as, compared in, the run, the seed of its training."""
    for name, comparisons in stored.items():
        for comparison in comparisons:
            if comparison.command in commands:
                for setting in comparison.settings:
                    for seed, run in setting.runs.items():
                        yield name, comparison, run, seed


def _miou(run: Run) -> float:
    score = run.result.scores["miou"] if run.result else None
    assert score is not None  # no result is read without it
    return score


def overview_table(
    stored: Mapping[str, Sequence[Comparison]],
    published: Sequence[Mapping[str, Any]],
    places: Mapping[str, Place],
) -> tuple[list[str], Table]:
    """Returns a row for each way to train, the best on test first, then those of papers.

    What changes all of them stands in no row; it is returned before the table.

    Args:
        stored: Comparisons on one data set by the name that they are kept as.
        published: `name`, `source` and the score in percent by column, of each number.
        places: Of stored results by name. A row has their title in place of its options, where
            they tell of no other training.
    """
    ways = _find_ways(stored)
    scores = {
        way: {c: statistic(t.scores.get(c) for t in trained) for c in COLUMNS}
        for way, trained in ways.items()
    }
    means = {way: {c: s.mean for c, s in found.items() if s} for way, found in scores.items()}
    tops = {c: max((mean.get(c, 0.0) for mean in means.values()), default=None) for c in COLUMNS}
    changes = [trained[0].changes for trained in ways.values()]
    shared = [c for c in changes[0] if len(ways) > 1 and all(c in other for other in changes)]
    labels = _find_labels([trained[0] for trained in ways.values()], shared, places)
    rows = []
    for way in sorted(ways, key=lambda way: [-means[way].get(c, 0.0) for c in ("test", "val")]):
        first = ways[way][0]
        assert first.run.result is not None
        label = labels[first.run.folder]
        known = [label, number(len(ways[way]), "d"), number(_step(first), "d")]
        cells = [spread(s, s is not None and s.mean == tops[c]) for c, s in scores[way].items()]
        time = mean_time([training.run for training in ways[way]]).text
        rows.append([*known, *cells, Cell(f"{time}, {first.run.result.machine}")])
    for entry in published:
        known = [Cell(f"literature: {entry['name']}"), Cell("-"), Cell("-")]
        cells = [number(entry.get(column), "g") for column in COLUMNS]
        rows.append([*known, *cells, Cell(entry["source"])])
    return shared, Table(("training", "n", "steps", *COLUMNS, "time, or source"), rows)


def _find_labels(
    trainings: Sequence[Training], shared: Sequence[str], places: Mapping[str, Place]
) -> dict[Path, Cell]:
    """Returns what the row of each training begins with, by folder."""
    told = Counter(places[t.kept_as].link for t in trainings if t.kept_as in places)
    labels = {}
    for training in trainings:
        changes = [change for change in training.changes if change not in shared]
        place = places.get(training.kept_as)
        if changes and place and told[place.link] == 1:
            changes = [place.title]
        label = ", ".join([training.configs, *changes])
        labels[training.run.folder] = Cell(label, link=place.link if place else "")
    return labels


def _find_ways(stored: Mapping[str, Sequence[Comparison]]) -> dict[tuple[Any, ...], list[Training]]:
    """Returns the trainings that differ in nothing but their seeds together."""
    ways: dict[tuple[Any, ...], list[Training]] = {}
    repeats: Counter[tuple[Any, ...]] = Counter()
    for training in find_trainings(stored):
        assert training.run.result is not None
        start = find_start(training.run.result.command, training.run.folder)
        way = (training.configs, training.changes, _step(training), start)
        # The same training once more, on another machine say, is no other seed.
        again = repeats[way, training.seed]
        repeats[way, training.seed] += 1
        ways.setdefault((*way, again), []).append(training)
    return ways


def _step(training: Training) -> int | None:
    """Returns the step of the weights that were measured, or the last one."""
    assert training.run.result is not None
    return training.step or training.run.result.step
