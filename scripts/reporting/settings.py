"""Groups runs: those that differ in nothing but their seed are one setting, measured again."""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from reporting.labels import (
    OF_EVALUATION,
    PATHS,
    Config,
    Kind,
    find_differences,
    find_kind,
    find_labels,
    starts,
)
from reporting.page import slug
from reporting.resumed_runs import is_of, owner
from reporting.run_folders import Curve, Run, natural

COMMANDS = ("fit", "validate", "test")
BASE = "base"
"""What a grid calls the setting without an overlay."""

Key = tuple[str, str, str, tuple[str, ...], str]
"""What the runs of a comparison have in common: command, data set, split, classes and, of a folder
of one's own, its name."""


@dataclass(frozen=True)
class Statistic:
    """Mean, sample standard deviation (None for a single value) and number of some values."""

    mean: float
    std: float | None
    n: int


def statistic(values: Iterable[float | None]) -> Statistic | None:
    """Returns the statistic of the values that are there, None if none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return Statistic(statistics.fmean(known), std, len(known))


@dataclass(frozen=True)
class Setting:
    """One way to train or evaluate, and its finished runs.

    Args:
        label: Short name.
        difference: What it has that most others of its comparison have not.
        runs: By the seed of the training; where that is not fixed, by the run's folder.
        number: Of the label, counted over all comparisons: the same one looks the same in all.
    """

    label: str
    difference: str
    runs: dict[str, Run]
    number: int = 0

    def score(self, name: str) -> Statistic | None:
        """Returns a score over the runs, as a fraction; None for a class that is absent."""
        return statistic(run.result.scores.get(name) for run in self.runs.values() if run.result)

    @property
    def miou(self) -> Statistic:
        """Returns the mIoU over the runs, as a fraction."""
        score = self.score("miou")
        assert score is not None  # no result is read without it
        return score

    @property
    def images_per_s(self) -> float | None:
        """Returns the median speed of training: of each run first, then of the runs."""
        speeds = [curve.values() for curve in self.curves("images_per_s")]
        return statistics.median(map(statistics.median, speeds)) if speeds else None

    @property
    def parameters(self) -> int | None:
        """Returns the number of parameters."""
        return next((r.result.parameters for r in self.runs.values() if r.result), None)

    @property
    def gmacs(self) -> float | None:
        """Returns the billions of multiply-adds for an image."""
        known = (run.result.gmacs for run in self.runs.values() if run.result)
        return next((gmacs for gmacs in known if gmacs), None)

    @property
    def context_gmacs(self) -> float | None:
        """Returns those of the context module alone, where runs say so."""
        known = (run.result.context_gmacs for run in self.runs.values() if run.result)
        return next((gmacs for gmacs in known if gmacs), None)

    def curves(self, name: str) -> list[Curve]:
        """Returns what the runs logged under a name."""
        return [run.curves[name] for run in self.runs.values() if name in run.curves]


@dataclass(frozen=True)
class Comparison:
    """Settings whose scores may be compared: same command, data set, split and classes.

    Args:
        title: What was measured; no two are alike, nor are their slugs.
        command: fit, validate or test.
        split: val or test.
        classes: Names of the classes.
        settings: The best first.
    """

    title: str
    command: str
    split: str
    classes: tuple[str, ...]
    settings: tuple[Setting, ...]

    def reference(self, *labels: str | None) -> Setting:
        """Returns the setting that others are compared with.

        Args:
            labels: That of the first label that one has; else the base of a grid, else the best.
        """
        known = {setting.label: setting for setting in self.settings}
        found = (known[label] for label in (*labels, BASE) if label in known)
        return next(found, self.settings[0])


@dataclass
class _Group:
    kind: Kind
    first: tuple[Run, Run]
    runs: dict[str, Run] = field(default_factory=dict)


def compare(runs: Sequence[Run], problems: list[str]) -> list[Comparison]:
    """Returns the finished runs, grouped; trainings come first.

    Args:
        runs: Of any kind.
        problems: Gets a line for every run that is left out.
    """
    members: dict[Key, list[Run]] = {}
    for run in runs:
        if run.result is None:
            continue
        if not run.config:
            problems.append(f"{run.folder} is left out: without config.yaml nothing tells its kind")
            continue
        classes = tuple(k.removeprefix("iou/") for k in run.result.scores if k.startswith("iou/"))
        data = str(run.config.get("data", "data")).rsplit(".", 1)[-1]
        root = Path(str(run.config.get("data.root"))).name if data == "SegmentationFolder" else ""
        members.setdefault((run.command, data, run.result.stage, classes, root), []).append(run)
    comparisons = []
    numbers: dict[str, int] = {}
    titles = find_titles(members)
    for key in sorted(members, key=lambda key: (COMMANDS.index(key[0]), key)):
        command, _, split, classes, _ = key
        settings = find_settings(members[key], runs, problems)
        settings.sort(key=lambda setting: -setting.miou.mean)
        settings = [
            replace(setting, number=numbers.setdefault(setting.label, len(numbers)))
            for setting in settings
        ]
        comparisons.append(Comparison(titles[key], command, split, classes, tuple(settings)))
    return comparisons


def find_titles(members: Mapping[Key, Sequence[Run]]) -> dict[Key, str]:
    """Returns the title of each comparison, told apart where the class of the data does not do it.

    Folders of one's own all have the same class, and so has a data set with and without background.

    Args:
        members: Runs of each comparison.
    """
    alike: dict[tuple[str, str, str], list[Key]] = {}
    for key in sorted(members):
        alike.setdefault(key[:3], []).append(key)
    titles = {}
    for (command, data, split), keys in alike.items():
        how = "at the end of training" if command == "fit" else f"by isanet-pl {command}"
        roots = [
            {Path(str(run.config.get("data.root"))).resolve().name for run in members[key]}
            for key in keys
        ]
        ways = (
            [""] * (len(keys) == 1),
            [f" ({', '.join(sorted(some))})" for some in roots],
            [f" ({len(key[3])} classes)" for key in keys],
            [f" ({number})" for number in range(1, len(keys) + 1)],
        )
        chosen = next(way for way in ways if len({slug(text) for text in way}) == len(keys))
        for key, text in zip(keys, chosen, strict=True):
            titles[key] = f"{data}{text} {split} {how}"
    return titles


def find_settings(
    members: Sequence[Run], runs: Sequence[Run], problems: list[str]
) -> list[Setting]:
    """Returns the labelled settings of some runs.

    Args:
        members: Finished runs of one comparison.
        runs: All runs: an evaluation is told from others by the training behind it.
        problems: Gets a line for every run that a later one repeats: it is no other seed.
    """
    groups: dict[str, _Group] = {}
    identified = [(run, *_identify(run, runs)) for run in members]
    known: dict[tuple[Path, str], set[str]] = {}  # options that all runs of a grid's cell have
    for _, training, kind in identified:
        cell = _cell(training, kind)
        known[cell] = known.get(cell, set(kind.config)) & kind.config.keys()
    for run, training, kind in identified:
        # An older config lacks newer options, whose null changes nothing. In a cell of a grid they
        # had their defaults: `ablate.py` has seen to it.
        chosen = {
            key: value
            for key, value in kind.config.items()
            if value is not None and (not kind.cell or key in known[_cell(training, kind)])
        }
        # Paths are compared by their ends: the cells of a grid differ even where these do not.
        key = json.dumps([kind.cell, chosen], sort_keys=True, default=str)
        group = groups.setdefault(key, _Group(kind, (run, training)))
        if group.kind.name != kind.name:  # one run on two machines has one name
            problems.extend(_other_places(group.first, (run, training)))
        same = group.runs
        seed = training.config.get("seed_everything")
        name = str(seed) if type(seed) is int else str(training.folder)
        if name in same:
            before, run = sorted((same[name], run), key=_ended)
            problems.append(
                f"{before.folder} is left out: {run.folder}, which is later, has the same "
                "setting and seed"
            )
        same[name] = run
    kinds = [group.kind for group in groups.values()]
    differences = find_differences([kind.config for kind in kinds])
    return [
        Setting(label, ", ".join(parts), group.runs)
        for group, label, parts in zip(
            groups.values(), find_labels(kinds), differences, strict=True
        )
    ]


def _cell(training: Run, kind: Kind) -> tuple[Path, str]:
    """Returns the folder of the grid that a training may be of, and its cell there."""
    return training.folder.parents[2] if kind.cell else Path(), kind.cell


def _other_places(first: tuple[Run, Run], then: tuple[Run, Run]) -> Iterator[str]:
    """Yields a line for each path that two runs of one setting have in different places.

    Args:
        first: A run, and the training that it is or evaluates.
        then: The other one.
    """
    for key in PATHS:
        chosen = 0 if starts(key, OF_EVALUATION) else 1
        places = [str(pair[chosen].config.get(key)) for pair in (first, then)]
        if places[0] != places[1]:
            yield (
                f"{then[0].folder} counts as another seed of {first[0].folder}, though {key} is "
                f"{places[1]} and not {places[0]}: only the ends of paths are compared"
            )


def _ended(run: Run) -> tuple[float, list[list[tuple[str, int]]]]:
    """Returns a key that sorts runs by the time of their results."""
    file = run.folder / "results.json"
    return file.stat().st_mtime, natural(run.folder)


def _identify(run: Run, runs: Sequence[Run]) -> tuple[Run, Kind]:
    """Returns the training that a run is or evaluates, itself if that is unknown, and its kind."""
    if run.command == "fit":
        return run, find_kind(run.config, run.folder, start=_find_start(run))
    checkpoint = str(run.config.get("ckpt_path"))
    training = owner(run.config.get("ckpt_path"), runs)
    if training is None:
        return run, find_kind(run.config, run.folder, weights=checkpoint)
    weights, start = Path(checkpoint).name, _find_start(training)
    return training, find_kind(run.config, training.folder, training.config, weights, start)


def _find_start(run: Run) -> str:
    """Returns the checkpoint of another training that a training started from; empty if none."""
    configs = [*run.earlier, run.config]
    for before, after in reversed(list(pairwise(configs))):
        if not _only_longer(before, run):
            return str(after.get("ckpt_path"))
    # Of a training that is not among the runs, the name tells whether this is more of it.
    first = configs[0].get("ckpt_path")
    return str(first) if first and not is_of(str(first), run.folders[0]) else ""


def _only_longer(first: Config, then: Run) -> bool:
    """Returns whether a run that goes on from another one is the same training, or more of it.

    Args:
        first: Config of the other one.
        then: The run.
    """
    kinds = [find_kind(config, then.folder).config for config in (first, then.config)]
    keys = {key for kind in kinds for key in kind} - {"trainer.max_steps", "trainer.max_epochs"}
    return all(kinds[0].get(key) == kinds[1].get(key) for key in keys)
