"""Reads run folders: what a run was made of, how it went, and what it reached."""

import csv
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from isanet_pl.callbacks.run_config import flatten
from isanet_pl.errors import InputError

Curve = dict[int, float]
"""A value by the optimiser steps done."""


@dataclass(frozen=True)
class Result:
    """What `results.json` says; it is written when fit, validate or test ends."""

    command: str
    stage: str
    step: int | None
    scores: Mapping[str, float | None]
    seconds: float | None = None
    machine: str | None = None
    torch: str | None = None
    git: str | None = None
    parameters: int | None = None
    gmacs: float | None = None
    context_gmacs: float | None = None


@dataclass(frozen=True)
class Run:
    """A run: one folder or, where a training was resumed, several.

    Args:
        folders: Oldest first.
        command: fit, validate, test or predict.
        config: The complete config by dotted key; empty if it could not be read.
        result: None while the run is not finished.
        curves: What was logged, by name.
        seconds: Of all folders; None if nothing is known.
        all_seconds: Whether that is surely all: a process that was killed leaves no time.
        earlier: Configs of the folders before the last.
    """

    folders: tuple[Path, ...]
    command: str
    config: Mapping[str, Any]
    result: Result | None
    curves: Mapping[str, Curve]
    seconds: float | None
    all_seconds: bool = True
    earlier: tuple[Mapping[str, Any], ...] = ()

    @property
    def folder(self) -> Path:
        """Returns the folder that holds the result."""
        return self.folders[-1]

    @property
    def last_step(self) -> int:
        """Returns the last step that anything was logged for."""
        return max((max(curve) for curve in self.curves.values()), default=0)

    def panel(self) -> Path | None:
        """Returns the last picture of predictions."""
        stage = self.result.stage if self.result else "val"
        found = [p for f in self.folders for p in f.glob(f"panels/{stage}_step=*.png")]
        return max(found, key=lambda path: (path.name, path), default=None)


def natural(path: Path) -> list[list[tuple[str, int]]]:
    """Returns a key that sorts version_10 after version_9."""
    return [
        [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", part)]
        for part in path.parts
    ]


def find_folders(paths: Sequence[Path]) -> list[Path]:
    """Returns the run folders among some folders and below them.

    Raises:
        InputError: One does not exist, or there is no run folder at all.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path} is no folder; give run folders, or folders above them")
        seen: set[Path] = set()
        for name, children, files in os.walk(path, followlinks=True):
            folder = Path(name)
            if folder.resolve() in seen:  # a link to where the walk has been
                children.clear()
                continue
            seen.add(folder.resolve())
            started = folder.name.startswith("version_") and "config.yaml" in files
            if started or not {"results.json", "metrics.csv"}.isdisjoint(files):
                found.setdefault(folder.resolve(), folder)
                children.clear()
    if not found:
        raise InputError(
            f"no run folder in {', '.join(map(str, paths))}: none holds results.json or "
            "metrics.csv; give the runs_dir of a training, such as runs/"
        )
    return sorted(found.values(), key=natural)


def read_runs(paths: Sequence[Path], problems: list[str]) -> list[Run]:
    """Returns the runs of training and evaluation in some folders, each folder as one.

    Args:
        paths: Run folders, or folders above them.
        problems: Gets a line for every file that could not be read.

    Raises:
        InputError: There is none.
    """
    runs = [read_run(folder, problems) for folder in find_folders(paths)]
    return [run for run in runs if run.command != "predict"]


def read_run(folder: Path, problems: list[str]) -> Run:
    """Returns the run of one folder; what cannot be read is left out and listed."""

    def attempt(read: Callable[[Path], Any], name: str, default: Any) -> Any:
        path = folder / name
        try:
            return read(path) if path.exists() else default
        except (OSError, ValueError, yaml.YAMLError, csv.Error) as error:
            problems.append(f"{path} is left out: {' '.join(str(error).split())}")
            return default

    config = attempt(read_config, "config.yaml", {})
    result = attempt(read_result, "results.json", None)
    curves = attempt(lambda path: read_curves(path, problems), "metrics.csv", {})
    seconds = result.seconds if result else None
    return Run((folder,), find_command(config, result), config, result, curves, seconds)


def find_command(config: Mapping[str, Any], result: Result | None) -> str:
    """Returns the sub-command, by the options that only some of them have."""
    if result and result.stage == "test":
        return "test"
    if "verbose" in config:
        return "validate" if result else "validate or test"
    return "predict" if "return_predictions" in config else "fit"


def read_config(path: Path) -> dict[str, Any]:
    """Returns a config by dotted key, classes and their arguments as the command line spells them.

    Raises:
        ValueError: The file holds no mapping.
    """
    content = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it is no YAML mapping")
    return flatten(content)


def read_result(path: Path) -> Result:
    """Returns what a run reached.

    Raises:
        ValueError: The file is no JSON, or lacks a score.
    """
    record = json.loads(path.read_text("utf-8"))
    try:
        scores = {str(k): None if v is None else float(v) for k, v in record["scores"].items()}
        for name in ("miou", "macc", "aacc"):
            if scores[name] is None:
                raise ValueError(f"{name} is null")
        known = {key: record.get(key) for key in Result.__dataclass_fields__}
        step = None if record["step"] is None else int(record["step"])  # None: not known
        return Result(**{**known, "step": step, "scores": scores})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it lacks what a result has: {error}") from error


def read_curves(path: Path, problems: list[str]) -> dict[str, Curve]:
    """Returns the columns of a metrics.csv by name; broken lines are left out and listed.

    Raises:
        ValueError: It has no column `step`.
    """
    curves: dict[str, Curve] = {}
    with path.open(newline="", encoding="utf-8") as file:
        # A killed process may leave half a line; half a number looks like a number.
        text, end, rest = file.read().rpartition("\n")
        if rest:
            problems.append(f"{path}: its last line is cut off and left out")
        rows = csv.DictReader(f"{text}{end}".splitlines())
        if "step" not in (rows.fieldnames or ()):
            raise ValueError("it has no column 'step'")
        for row in rows:
            whole = None not in row and None not in row.values()
            try:
                numbers = {name: float(text) for name, text in row.items() if text} if whole else {}
                # Lightning counts steps from 0, and adds the epoch; where a step is given, it is
                # the number of steps done, and there is no epoch.
                step = int(numbers.pop("step")) + (numbers.pop("epoch", None) is not None)
            except (ValueError, KeyError):
                problems.append(f"{path}: line {rows.line_num} is broken and left out")
                continue
            for name, value in numbers.items():
                if math.isfinite(value):
                    curves.setdefault(name, {})[step] = value
    return curves


def read_confusion(path: Path) -> tuple[list[str], list[list[float]]]:
    """Returns class names and counts (K, K) of a confusion matrix, rows are the truth.

    Raises:
        ValueError: It is not square.
    """
    with path.open(newline="", encoding="utf-8") as file:
        names, *rows = csv.reader(file)
    counts = [[float(text) for text in row] for row in rows]
    if len(rows) != len(names) or any(len(row) != len(names) for row in rows):
        raise ValueError(f"{len(names)} classes need as many rows and columns")
    return names, counts
